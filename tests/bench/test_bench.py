"""The benchmarks check what they time, count exactly, and distinguish changes from noise."""

import json
import random
import re
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as bench_main
from bench import compare, interleaved, plots, tables, typical
from bench.__main__ import SUITES, main, select
from bench.benchmark_case import BenchmarkCase, Workload, device
from bench.environment import environment
from bench.measure import PreparedCase
from bench.suites import bench_attention, bench_input, bench_step
from fastvit_kernels import GELULinear, registry
from fastvit_train.data import loader
from fastvit_train.utils.errors import UserError
from fastvit_train.utils.gpu_monitor import Usage
from fastvit_train.utils.memory import saved_for_backward
from tests.support import ROOT, null_gpu, run
from tests.support.pictures import record_pictures

ATTENTION = "attention operator forward+backward, B256 N64 D48 H4, fp32, "
SMALL = ["--benchmark-min-rounds", "3", "--benchmark-max-time", "0.05", "-p", "no:cacheprovider"]


def case_of(suite: Any, id: str) -> BenchmarkCase:
    return next(case for case in suite.cases() if case.id == id)


def pytest_here(*arguments: str, **env: str) -> Any:
    return run([sys.executable, "-m", "pytest", *arguments], ROOT, **env)


@pytest.mark.slow
def test_benchmark_only_selects_the_main_rows_or_all_rows_of_bench_and_nothing_else() -> None:
    for options, only in ([], ()), (["--benchmark-rows", "all"], ("",)):
        lines = pytest_here("--benchmark-only", "--collect-only", "-q", *options).stdout.splitlines()
        rows = [line for line in lines if "::" in line]
        assert rows and all(line.startswith("bench/suites/") for line in rows)
        runnable = {case.id for cases in select(only).values() for case in cases}
        selected = {row.partition("[")[2].removesuffix("]") for row in rows}
        assert selected >= runnable
        if not only:
            assert {case.main for suite in SUITES for case in suite.cases() if case.id in selected} == {True}
    row_id = f"bench/suites/bench_attention.py::test_attention[{ATTENTION}fused]"
    assert row_id in pytest_here("--benchmark-only", "--collect-only", "-q", row_id).stdout


@pytest.mark.slow
def test_the_main_rows_are_narrowed_by_keyword() -> None:
    collect = ["--benchmark-only", "--collect-only", "-q", "-p", "no:cacheprovider"]
    narrowed = pytest_here(*collect, "bench/suites/bench_step.py", "-k", "bf16 and naive").stdout.splitlines()
    assert [line.partition("[")[2] for line in narrowed if "::" in line] == [
        "training step, mc_vit_4_4_32 B256, bf16, naive]"
    ]


def test_the_main_rows_are_few_and_plain_pytest_checks_one_or_two_cases_per_file() -> None:
    main_rows = [case.id for cases in select(()).values() for case in cases]
    assert len(main_rows) <= 40 and {row.partition(",")[0] for row in main_rows} == {
        "epoch end to end",
        "training step",
        "input pipeline",
        "attention module forward+backward",
    }
    for suite in SUITES:
        assert 1 <= sum(case.quick_check for case in suite.cases()) <= 2, suite.__name__


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="our GELU has a kernel only for CPUs")
def test_the_typical_script_is_refused_if_it_runs_our_gelu() -> None:
    images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    script = typical.Script("mc_vit_4_4_32", images, labels, batch_size=4)
    script.check()
    plain = script.model.blocks[0].mlp.fc2
    script.model.blocks[0].mlp.fc2 = GELULinear(plain.in_features, plain.out_features, "tanh")
    with pytest.raises(AssertionError, match="fastvit_kernels.gelu.* ran in the typical script"):
        script.check()


@pytest.mark.slow
def test_a_row_carries_its_facts(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    row_id = f"bench/suites/bench_attention.py::test_attention[{ATTENTION}fused]"
    done = pytest_here("--benchmark-only", row_id, "--benchmark-json", str(out), *SMALL)
    assert done.returncode == 0, done.stdout
    (row,) = json.loads(out.read_text())["benchmarks"]
    facts, median = row["extra_info"], row["stats"]["median"]
    assert row["group"].startswith(ATTENTION.removesuffix(", "))
    median /= facts["calls_per_block"]
    assert facts["images_per_second"] == pytest.approx(256 / median)
    tokens, dim = 64, 48
    assert facts["flops_per_image"] == 3 * (6 * tokens * dim**2 + 4 * tokens**2 * dim)
    assert facts["mfu"] == pytest.approx(facts["flops_per_image"] * 256 / median / facts["matmul_ceiling_flops"])
    assert 0 < facts["mfu"] < 1 and facts["first_call_seconds"] > 0
    if device().type == "cpu":
        t, scores = 256 * tokens * dim * 4 / 2**20, 256 * 4 * tokens**2 * 4 / 2**20
        # x; query, key and value as the batched products take them; the softmax's result
        assert facts["saved_for_backward_mib"] == pytest.approx(4 * t + scores)
        assert (
            facts["energy_joules_per_image"] is None and facts["energy_unmeasured"] == "the device is not an NVIDIA GPU"
        )
    assert facts["environment"].keys() >= {"device", "driver", "torch", "triton", "threads", "commit"}
    assert facts["peak_rss_mib" if device().type == "cpu" else "peak_memory_mib"] > 0


@pytest.mark.slow
def test_plain_pytest_times_nothing() -> None:
    done = pytest_here("bench/suites/bench_input.py", "-p", "no:cacheprovider")
    assert "2 passed" in done.stdout and "Rounds" not in done.stdout


SLOWED = """
import time, pytest
from fastvit_kernels import GELULinear, registry
entry = registry.IMPLEMENTATIONS["fused"]
def slowed(*arguments):
    for _ in range(50):
        output = entry.function(*arguments)
    return output
registry.IMPLEMENTATIONS["fused"] = entry._replace(function=slowed)
"""


@pytest.mark.soak  # what pytest-benchmark itself does; `python -m bench` is compared in the slow tier
def test_pytest_benchmark_distinguishes_a_slowed_implementation(tmp_path: Path) -> None:
    (tmp_path / "slowed.py").write_text(SLOWED)
    # In fp32: a processor without instructions for bf16 emulates them, and takes seconds.
    row_id = "bench/suites/bench_attention.py::test_attention[attention operator forward, B256 N64 D48 H4, fp32, fused]"
    chosen = ["--benchmark-only", row_id]
    chosen += ["--benchmark-storage", str(tmp_path / "storage"), "--benchmark-min-rounds", "10"]
    assert pytest_here(*chosen, "--benchmark-autosave").returncode == 0
    # The minimum, since other tests may use the machine: the median of an unchanged row has tripled.
    against = ["--benchmark-compare", "--benchmark-compare-fail=min:300%"]
    same = pytest_here(*chosen, *against)
    assert same.returncode == 0, same.stdout
    slowed = pytest_here(*chosen, *against, "-p", "slowed", PYTHONPATH=f"{tmp_path}:{ROOT}:{ROOT / 'kernels'}")
    assert slowed.returncode != 0 and "Performance has regressed" in slowed.stdout + slowed.stderr


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., torch.Tensor]) -> None:
    entry = registry.IMPLEMENTATIONS[name]
    monkeypatch.setitem(registry.IMPLEMENTATIONS, name, entry._replace(function=function))


def test_an_attention_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = registry.IMPLEMENTATIONS["sdpa"].function
    PreparedCase(case_of(bench_attention, f"{ATTENTION}sdpa"), 2)
    spoil(monkeypatch, "sdpa", lambda x, weight, *rest: right(x, weight * 1.01, *rest))
    with pytest.raises(AssertionError, match="from the reference"):
        PreparedCase(case_of(bench_attention, f"{ATTENTION}sdpa"), 2)


def test_a_step_with_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(bench_step, "training step, mc_vit_4_4_32 B256, fp32, sdpa")
    right = registry.IMPLEMENTATIONS["sdpa"].function
    PreparedCase(case, 2)
    spoil(monkeypatch, "sdpa", lambda x, *rest: right(x.detach() * 0.9 + x * 0.1, *rest))
    with pytest.raises(AssertionError, match="gradients"):
        PreparedCase(case, 2)


def test_an_input_that_loses_an_image_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in bench_input.cases() if case.name == "fastvit_train")
    PreparedCase(case, 8)
    monkeypatch.setattr(loader.TrainLoader, "_order", lambda self, epoch: torch.zeros(1, 1, 8, dtype=torch.long))
    with pytest.raises(AssertionError, match="every image once"):
        PreparedCase(case, 8)


def test_what_autograd_saves_is_counted_to_the_byte(seed: int) -> None:
    x, weight = torch.randn(8, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    kept: list[torch.Tensor] = []

    def forward() -> None:
        hidden = (x * 2) @ weight.t()  # saves x * 2, and the weight, which is there anyway
        kept.append((hidden.view(128).exp() + hidden.exp().view(128)).sum())  # saves two results

    assert saved_for_backward(forward, (weight,)) == (8 * 32 + 2 * 8 * 16) * 4
    part = torch.randn(100, requires_grad=True) * 1.0
    assert saved_for_backward(lambda: kept.append((part[:10] * part[10:20]).sum()), ()) == 400  # one storage, once
    with torch.no_grad():
        assert saved_for_backward(forward, ()) == 0


def result(scale: float, seed: int, rows: int = 200, control: float = 1.0, device: str = "cpu") -> dict[str, Any]:
    """A made-up result: rows of 21 rounds with 8% of noise, controls in all rounds; `scale` slows the first row."""
    draws = random.Random(seed)

    def rounds(median: float, number: int = 21) -> list[float]:
        return [median * draws.lognormvariate(0, 0.08) for _ in range(number)]

    measured = {f"row {i}": rounds(0.01 * (scale if i == 0 else 1) * control) for i in range(rows)}
    facts = {"device": device, "commit": str(seed)}
    return {"environment": facts, "controls": {"product": rounds(control, 210)}, "rows": measured}


def verdicts(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    return {change.id: change.verdict for change in compare.changes(before, after)}


def test_the_same_commit_is_unchanged_and_a_slowed_row_is_caught(seed: int) -> None:
    same = verdicts(result(1.0, seed), result(1.0, seed + 1))
    assert list(same.values()).count("unchanged") >= 197
    slowed = verdicts(result(1.0, seed), result(1.3, seed + 1))
    assert slowed["row 0"] == "slower"
    assert verdicts(result(1.3, seed), result(1.0, seed + 1))["row 0"] == "faster"


def test_a_slower_machine_widens_the_noise(seed: int) -> None:
    drifted = verdicts(result(1.0, seed), result(1.0, seed + 1, control=1.3))
    assert list(drifted.values()).count("unchanged") >= 190  # without the controls, none is


def test_results_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="different devices"):
        compare.changes(result(1, 0), result(1, 1, device="gpu"))
    with pytest.raises(UserError, match="no row in common"):
        compare.changes(result(1, 0), {**result(1, 1), "rows": {}})
    with pytest.raises(UserError, match="different controls"):
        compare.changes(result(1, 0), {**result(1, 1), "controls": {"other": [1.0]}})
    for content in ("[]", "{", '{"rows": []}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match="not a result of"):
            compare.read(tmp_path / "x.json")


def made_up(name: str, run: Callable[[], object], check: Callable[[], None] = lambda: None) -> BenchmarkCase:
    return BenchmarkCase("operation", "shape", "fp32", name, 1, lambda batch: Workload(run, check, batch))


def test_a_row_that_fails_costs_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise AssertionError("1.0 from the reference")

    rows = [made_up("first", lambda: None), made_up("second", lambda: None, fail), made_up("third", lambda: None)]
    monkeypatch.setattr(interleaved, "controls", lambda: {"nothing": lambda: None})
    monkeypatch.setattr(bench_main, "select", lambda only: {"some": rows, "all fail": [rows[1]]})
    monkeypatch.setattr(bench_main, "prepare_process", lambda: None)
    with pytest.raises(SystemExit) as stop:
        bench(monkeypatch, "--seconds", "0.01", "--output", str(tmp_path))
    assert stop.value.code == 1
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [row["name"] for row in written["rows"]] == ["first", "third"]
    assert [row["error"] for row in written["failed"]] == ["AssertionError: 1.0 from the reference"] * 2
    assert "failed: operation, shape, fp32, second: AssertionError: 1.0" in capsys.readouterr().out


@pytest.mark.parametrize("value, shown", [(0.0123456, "0.0123"), (0.999, "0.999"), (12.345, "12.3"), (1234.5, "1,234")])
def test_times_have_three_significant_digits(value: float, shown: str) -> None:
    assert tables.significant(value) == shown


@pytest.mark.nullgpu
@pytest.mark.parametrize("graph", ["", ", CUDA graph"])
def test_memory_of_a_replayed_graph_is_that_of_the_call(graph: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_attention, "assert_close", lambda *arguments: None)  # nothing is computed
    id = f"attention operator forward, B4096 N64 D48 H4, bf16, sdpa{graph}"
    row = PreparedCase(case_of(bench_attention, id))
    mib = 4096 * 64 * 48 * 2 / 2**20  # of one token tensor
    peak = row.describe(1.0, Usage(1.0))["peak_memory_mib"]
    assert 4 * mib <= peak <= 12 * mib  # at least query, key, value and the output


@pytest.mark.nullgpu
@pytest.mark.slow
def test_a_graphed_step_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "assert_close", lambda *arguments: None)  # nothing is computed
    workload = case_of(bench_step, "training step, mc_vit_4_4_32 B256, bf16, triton, step graphed").build(256)
    with null_gpu.counted() as counts:
        workload.run()
    assert counts.launched.total() == 0 and counts.calls == {"cudaGraphLaunch": 1} and counts.violations == 0
    assert 100 <= counts.replayed.total() <= 240


def test_rows_of_a_group_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved, "controls", lambda: {"nothing": lambda: None})
    order: list[str] = []

    cases = [made_up(name, partial(order.append, name)) for name in "ab"]
    for _ in interleaved.measure({"group": cases}, 0.0, interleaved.Console(quiet=True)):
        pass
    timed = "".join(order)
    assert "ab" * interleaved.MIN_ROUNDS in timed


@pytest.mark.slow
def test_the_main_comparison_is_written_compared_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ["--only", "attention operator forward, B256 N64 D48 H4, fp32, fused", "--seconds", "0.3"]
    before, after = tmp_path / "before", tmp_path / "after"
    bench(monkeypatch, *only, "--output", str(before))
    spoil_speed = registry.IMPLEMENTATIONS["fused"].function
    spoil(monkeypatch, "fused", lambda *arguments: time.sleep(0.2) or spoil_speed(*arguments))
    bench(monkeypatch, *only, "--output", str(after))
    written = json.loads((before / "bench.json").read_text())
    assert written["environment"]["commit"] == environment()["commit"] and len(written["controls"]) == 3
    assert "| fused |" in (before / "table.md").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        bench(monkeypatch, "--compare", str(before / "bench.json"), str(after / "bench.json"))
    assert stop.value.code == 1
    output = capsys.readouterr().out
    assert "slower" in output and "0 rows unchanged, 1 slower" in output and "noise ±" in output


def bench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    main()


@pytest.mark.slow
def test_every_command_in_the_readme_is_one_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "bench" / "README.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) == 7
    for line in lines:
        program, *arguments = shlex.split(line)
        if program == "pytest":  # collected here, run by .ci/run
            done = pytest_here(
                *(argument for argument in arguments if "compare" not in argument), "--collect-only", "-q"
            )
            assert done.returncode == 0 and "bench/suites/bench_" in done.stdout, line
        elif "--compare" in arguments:  # run by test_the_main_comparison_is_written_compared_and_drawn
            assert arguments[:3] == ["-m", "bench", "--compare"]
        elif program == "python":
            bench(monkeypatch, *arguments[2:], "--list")
            assert "training step, mc_vit" in capsys.readouterr().out
        else:
            assert (ROOT / program).is_file()


def test_unknown_rows_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench(monkeypatch, "--only", "nonsense")
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_pictures_are_drawn_of_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = record_pictures(monkeypatch)
    rows = [
        {"operation": case.operation, "shape": case.shape, "dtype": case.dtype, "name": case.name}
        | {"images_per_second": 100.0, "saved_for_backward_mib": 3.0}
        for cases in select(("training step, mc_vit", "scaling with batch", "scaling with tokens")).values()
        for case in cases
    ]
    written = plots.draw(rows, environment(), tmp_path)
    assert [path.name for path in written] == ["throughput.png", "memory.png", "scaling.png"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows if row["operation"] == bench_step.OPERATION))
    for path, label in zip(written, ("images/s", "kept for the backward pass, MiB", "µs per image"), strict=True):
        picture = pictures[path]
        caption = next(box for text, box in picture.texts.items() if text.startswith(environment()["device"]))
        legend = [picture.texts[text] for text in ("fp32", "bf16") if text in picture.texts]
        assert label in picture.texts and not any(caption.overlaps(box) for box in legend)
        assert len(picture.panels) == (2 if path.stem == "scaling" else len(shapes))
    assert plots.draw([], environment(), tmp_path) == []
    throughput = plots.draw([row for row in rows if row["dtype"] == "bf16"], environment(), tmp_path)[0]
    assert "bf16" in pictures[throughput].texts and "fp32" not in pictures[throughput].texts
