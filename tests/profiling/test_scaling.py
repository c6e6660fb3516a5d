"""`plan`: the counts are what a training really holds and sends, and the estimate follows from them."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastvit_train.cli.main import main
from fastvit_train.config.schema import TrainConfig
from fastvit_train.models import OUR_MODELS
from fastvit_train.profiling import collectives, scaling
from fastvit_train.profiling.collectives import Collective, RankCost
from fastvit_train.profiling.scaling import check_options
from fastvit_train.profiling.scaling_estimate import DDP, FSDP2, SINGLE, MeasuredStep, conclude, estimate_row
from fastvit_train.profiling.scaling_options import PlanOptions
from fastvit_train.profiling.short_run import short_run
from fastvit_train.training.session import TrainSession
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.torch_private import fake_process_group
from tests.support import launch, one_line_error, run
from tests.support.pictures import record_pictures

Config = Callable[..., TrainConfig]
GIGABIT = PlanOptions(link_gbps=1.0, latency_us=100.0).network
MEASURED = MeasuredStep(images=64, seconds=0.1, spread=(0.1, 0.1), activations=2**20)


@pytest.fixture(autouse=True)
def the_fake_process_group_is_destroyed() -> Iterator[None]:
    yield
    assert not dist.is_initialized()


def small(config: Config, **settings: object) -> TrainConfig:
    return config(**{"optimizer": "adamw", "patch_size": None, "embed_dim": 32, **settings})


def trainable(session: TrainSession) -> int:
    return sum(p.numel() for p in session.bare_model.parameters() if p.requires_grad)


@pytest.mark.parametrize("model", OUR_MODELS)
def test_ddp_sums_every_gradient_once(small_config: Config, model: str) -> None:
    with short_run(small(small_config, model=model), steps=1) as session:
        for processes in (2, 1024):
            cost = collectives.ddp_cost(session, processes)
            assert cost.collectives == (Collective("all-reduce", 4 * trainable(session)),)
            assert cost.gradients == 4 * trainable(session) and cost.gathered == 0


@pytest.mark.slow
def test_gradients_of_several_buckets_and_micro_batches_are_summed_once(small_config: Config) -> None:
    with short_run(small(small_config, embed_dim=512, depth=3, grad_accum=2), steps=1) as session:
        result = collectives.ddp_cost(session, 4).collectives
        assert len(result) > 1 and {collective.kind for collective in result} == {"all-reduce"}
        assert sum(collective.size for collective in result) == 4 * trainable(session)


def test_batch_norms_buffers_are_broadcast_and_no_others(small_config: Config) -> None:
    sizes = dict.fromkeys(("patch_size", "embed_dim", "depth", "num_heads"))
    config = small_config(model="resnet10t", image_size=32, attention="timm", optimizer="adamw", **sizes)
    with short_run(config, steps=1) as session:
        cost = collectives.ddp_cost(session, 4)
        sent = sum(collective.size for collective in cost.collectives if collective.kind == "broadcast")
        assert sent == sum(buffer.nbytes for buffer in session.bare_model.buffers()) > 0


@pytest.mark.slow
def test_a_shard_is_one_processs_part_but_for_padding(small_config: Config) -> None:
    with short_run(small(small_config), steps=1) as session:
        whole = collectives.single_process_cost(session)
        parameters = list(session.bare_model.parameters())
        for processes in (2, 3, 8, 1024):
            cost = collectives.fsdp2_cost(session, processes)
            rows = [-(-len(p) // processes) for p in parameters]  # cut along the first dimension, filled up
            padded = sum(4 * count * p[0].numel() for count, p in zip(rows, parameters, strict=True))
            assert cost.weights == cost.gradients == padded
            filling = sum(4 * p[0].numel() for p in parameters)
            assert whole.weights / processes <= padded < whole.weights / processes + filling
            assert cost.optimizer == 2 * padded + 4 * len(parameters)  # two averages, and steps counted in float32
            gathers = [c.size for c in cost.collectives if c.kind == "all-gather"]
            scatters = [c.size for c in cost.collectives if c.kind == "reduce-scatter"]
            assert sum(scatters) == padded * processes  # each gradient once
            assert len(scatters) == 3 and len(gathers) == 5  # root once; two blocks, forward and backward
            assert cost.gathered == padded * processes  # the root, and both blocks


def test_bf16_gathers_half_and_clipping_exchanges_the_norm(
    small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    with short_run(small(small_config), steps=1) as session:
        plain = collectives.fsdp2_cost(session, 4)
        settings = replace(session.config.settings, optim=replace(session.config.optim, clip_grad=1.0))
        clipped = replace(session, config=replace(session.config, settings=settings))
        more = [c for c in collectives.fsdp2_cost(clipped, 4).collectives if c.kind == "all-reduce"]
        parameters = len(list(session.bare_model.parameters()))
        assert [c.size for c in more] in ([4 * parameters], [4])  # a norm of each; torch 2.9 reduces their total
        monkeypatch.setattr(session.accelerator.state, "_mixed_precision", "bf16")
        half = collectives.fsdp2_cost(session, 4)
        assert half.gathered == plain.gathered / 2 and half.weights == plain.weights


@pytest.mark.slow
def test_one_process_holds_what_a_training_allocates(small_config: Config) -> None:
    config = small(small_config, drop_path_rate=0.1)
    with short_run(config, steps=1) as session:
        step = scaling.measure_step(session, session.batch_size, steps=1)
        cost = collectives.single_process_cost(session)
        model, optimizer = session.bare_model, session.optimizer.optimizer
        images, labels = next(session.train_loader.micro_batches(0))
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        assert cost.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        assert cost.gradients == sum(p.grad.nbytes for p in model.parameters())
        assert cost.optimizer == sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        assert cost.collectives == () and cost.gathered == 0
        assert step.spread[0] <= step.seconds <= step.spread[1]
        assert step.activations > 240 * 64 * 32 * 4  # at the least a block's input
        assert scaling.measure_step(session, 120, steps=1).activations == pytest.approx(step.activations / 2, abs=1024)
        held = (cost.weights + cost.gradients + cost.optimizer + step.activations) / 2**20
        assert estimate_row(SINGLE, 1, cost, step, PlanOptions().network).memory_mib == pytest.approx(held)


@pytest.mark.slow
@pytest.mark.nullgpu
def test_one_process_and_ddp_are_taken_to_launch_a_graph_and_fsdp_is_not(small_config: Config) -> None:
    """Where kernels take no time, a step takes what its launches cost the host."""
    config = small(small_config, compile=True, attention="triton", optimizer="adamw")
    plan = scaling.plan_model(config, check_options(PlanOptions(world_sizes=(2, 4), steps=3, scaling="strong")))
    assert [step.images for step in plan.steps] == [240, 120, 60, 120, 60]
    single, *graphs, half, quarter = (step.seconds for step in plan.steps)
    assert max(single, *graphs) < min(half, quarter) / 2
    rows = {(row.strategy, row.processes): row.step_seconds - row.communication_seconds for row in plan.rows}
    expected = {(DDP, 2): graphs[0], (DDP, 4): graphs[1], (FSDP2, 2): half, (FSDP2, 4): quarter}
    assert {key: rows[key] for key in expected} == pytest.approx(expected)
    assert plan.notes[-1].startswith("the step is measured as one CUDA graph, but for FSDP2")


def test_what_is_given_replaces_the_preset_of_the_link() -> None:
    presets = {link: PlanOptions(link=link).network for link in ("nvlink", "infiniband", "ethernet")}
    assert PlanOptions().network == presets["ethernet"]
    cost = RankCost(0, 0, 0, 0, (Collective("all-reduce", 10**6),))
    seconds = [estimate_row(DDP, 8, cost, MEASURED, presets[link], 640.0).communication_seconds for link in presets]
    assert seconds == sorted(seconds) and seconds[0] < seconds[-1] / 5
    assert seconds[0] == pytest.approx(1.75e6 / 300e9 + 14 * 3e-6)  # 300 GB/s and 3 us
    assert PlanOptions(link="nvlink", latency_us=0.0).network == presets["nvlink"]._replace(latency_us=0.0)


def test_traffic_around_a_ring_by_hand() -> None:
    megabyte = 1_000_000
    reduce, gather = Collective("all-reduce", megabyte), Collective("all-gather", megabyte)
    scatter, broadcast = Collective("reduce-scatter", megabyte), Collective("broadcast", megabyte)
    assert [c.sent(4) for c in (reduce, gather, scatter, broadcast)] == [1_500_000, 750_000, 750_000, 750_000]
    assert [c.hops(4) for c in (reduce, gather, scatter, broadcast)] == [6, 3, 3, 3]
    assert [c.sent(1) for c in (reduce, gather)] == [c.hops(1) for c in (reduce, gather)] == [0, 0]
    result = estimate_row(DDP, 4, RankCost(0, 0, 0, 0, (reduce, gather)), MEASURED, GIGABIT, single_rate=640.0)
    assert result.communication_seconds == pytest.approx(2_250_000 * 8 / 1e9 + 9 * 100e-6)  # 18.9 ms
    assert result.sent_mib == pytest.approx(2_250_000 / 2**20) and result.collectives == 2
    assert result.step_seconds == pytest.approx(0.1189)
    assert result.images_per_second == pytest.approx(256 / 0.1189)
    assert result.efficiency == pytest.approx(0.1 / 0.1189)


def test_efficiency_falls_and_the_conclusion_says_where_by_half() -> None:
    cost = RankCost(2**20, 2**20, 2**20, 0, (Collective("all-reduce", 2**20),))
    rows = [estimate_row(SINGLE, 1, replace(cost, collectives=()), MEASURED, GIGABIT)]
    sizes = [2**i for i in range(1, 13)]
    rows += [estimate_row(DDP, n, cost, MEASURED, GIGABIT, rows[0].images_per_second) for n in sizes]
    efficiencies = [result.efficiency for result in rows]
    assert efficiencies[0] == 1 and efficiencies == sorted(efficiencies, reverse=True) and len(set(efficiencies)) == 13
    last = max(result.processes for result in rows if result.efficiency >= 0.5)
    assert conclude(rows) == f"DDP has an efficiency below 50% beyond {last} processes"
    assert 256 <= last < 4096
    assert conclude(rows[:3]).startswith("DDP has an efficiency of 8")
    assert "below 50% already at 4096 processes" in conclude([rows[0], rows[-1]]).replace(",", "")
    sharded = estimate_row(FSDP2, 4096, replace(cost, weights=0), MEASURED, GIGABIT, rows[0].images_per_second)
    assert conclude([*rows, sharded]).endswith("at 4,096 processes FSDP2 needs 75% of DDP's memory")


@pytest.mark.slow
def test_the_command_prints_tables_and_writes_figures_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pictures = record_pictures(monkeypatch)
    sizes = ["--depth", "1", "--attention", "fused", "--steps", "1", "--optimizer", "adamw"]
    main(["plan", *sizes, "--models", "c_vit_4_4_32", "mc_vit_4_4_32", "--world-sizes", "2", "1024"])
    output = capsys.readouterr().out
    assert (
        "c_vit_4_4_32, 34,282 parameters; weak scaling: 64 images per process, so that the batch grows to 65,536"
        in output
    )
    assert output.count("~ estimated: ") == output.count("measured: the step of a single process on cpu") == 2
    plans = json.loads((tmp_path / "plan" / "plan.json").read_text())["plans"]
    for plan in plans:
        assert [(r["strategy"], r["processes"]) for r in plan["rows"]] == [
            (SINGLE, 1), *((strategy, n) for strategy in (DDP, FSDP2) for n in (2, 1024))
        ]  # fmt: skip
        assert plan["rows"][0]["efficiency"] == 1 and plan["conclusion"] in output
    picture = pictures[Path("plan/plan.png")]
    lines = {f"{model}_vit_4_4_32, {strategy}" for model in ("c", "mc") for strategy in (DDP, FSDP2)}
    assert len(picture.panels) == 2 and {"processes", *lines} <= set(picture.texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan"]


@pytest.mark.slow
def test_strong_scaling_measures_what_each_process_takes(small_config: Config) -> None:
    options = check_options(PlanOptions(scaling="strong", world_sizes=(2, 8, 16, 64), steps=1))
    result = scaling.plan_model(small_config(grad_accum=2), options)
    assert [(r.processes, r.images) for r in result.rows] == [(1, 240), (2, 120), (8, 30), (2, 120), (8, 30)]
    assert [step.images for step in result.steps] == [240, 120, 30]
    assert result.rows[1].activations_mib == pytest.approx(result.rows[0].activations_mib / 2, rel=0.01)
    assert result.rows[2].images_per_second == pytest.approx(240 / result.rows[2].step_seconds)
    assert "left out: 16, 64 processes, as they can't share 240 images equally" in result.notes
    assert not any("FSDP2" in note for note in result.notes)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--world-sizes", "0"], "--world-sizes 0 is out of range; allowed: 1 to 4096"),
        (["--world-sizes", "8192"], "--world-sizes 8192"),
        (["--link-gbps", "0"], "--link-gbps 0.0 is out of range; allowed: above 0"),
        (["--latency-us", "-1"], "--latency-us -1.0"),
        (["--steps", "0"], "--steps 0"),
        (["--models", "mc_vit_4_4_33"], "unknown model 'mc_vit_4_4_33'"),
        (["--output", "file/plan"], "choose another --output"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *arguments])
    assert complaint in one_line_error(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unknown_collective_raises() -> None:
    with (
        fake_process_group(4),
        pytest.raises(RuntimeError, match="add it to KINDS"),
        collectives.CollectiveCounter(),
    ):
        dist.all_to_all_single(torch.ones(4), torch.ones(4))


def test_a_real_process_group_is_rejected_and_kept(small_config: Config, tmp_path: Path) -> None:
    with short_run(small(small_config), steps=1) as session:
        dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
        for count_cost in (collectives.ddp_cost, collectives.fsdp2_cost):
            with pytest.raises(UserError, match="start it without a launcher: python -m fastvit_train plan"):
                count_cost(session, 4)
        assert dist.get_backend() == "gloo"


@pytest.mark.parametrize("variable", [("WORLD_SIZE", "2"), ("TORCHELASTIC_RUN_ID", "1")], ids=["two", "torchrun"])
def test_a_launched_process_is_rejected_before_anything_is_measured(
    variable: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(*variable)
    monkeypatch.setattr(scaling, "short_run", pytest.fail)
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--attention", "auto"])
    assert "start it without a launcher" in one_line_error(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_several_processes_are_rejected(tmp_path: Path) -> None:
    done = launch("plan", "--attention", "fused", processes=2, cwd=tmp_path)
    assert done.returncode and "plan runs in one process" in one_line_error(done.stderr)


@pytest.mark.slow
def test_every_model_of_ours_in_a_new_process(tmp_path: Path) -> None:
    command = ["-m", "fastvit_train", "plan", "--models", "ours", "--depth", "1", "--attention", "fused"]
    done = run([sys.executable, *command, "--steps", "1", "--world-sizes", "2", "4", "--batch-size", "16"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(f"\n{model}: DDP has an efficiency " in done.stdout for model in OUR_MODELS)
    assert not done.stderr
