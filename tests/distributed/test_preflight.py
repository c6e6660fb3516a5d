"""A launch that can't train as it says is answered with one line, before anything is waited for or written."""

from pathlib import Path

import accelerate.commands.launch
import pytest
import torch
import yaml
from accelerate.commands.config import config_args

import fastvit_train.distributed.accelerator
from fastvit_train.distributed.accelerator import start_accelerator
from fastvit_train.distributed.parallelize import check_shardable
from fastvit_train.distributed.preflight import check_joined
from fastvit_train.utils.errors import UserError
from tests.distributed.accelerates import launched_with
from tests.support import ROOT, launch, one_line_error

CONFIGS = ROOT / "accelerate_configs"
OLD = {
    "compute_environment": "LOCAL_MACHINE",
    "num_machines": 1,
    "main_process_ip": None,
    "main_training_function": "main",
}


def written(folder: Path, **settings: object) -> Path:
    """A launch configuration in a file, with the keys that accelerate 0.5 wrote."""
    path = folder / "old.yaml"
    path.write_text(
        yaml.safe_dump({**OLD, "num_machines": 1, "machine_rank": 0, "main_process_port": None, **settings})
    )
    return path


@pytest.fixture(autouse=True)
def _accelerate_has_started(tmp_path: Path) -> None:
    """Its state is made once per process, by whoever comes first: here without the variables of a test."""
    start_accelerator(1, (), tmp_path)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """Let this machine seem to have so many GPUs, with or without bf16."""

    def pretend(count: int, bf16: bool = True) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16
        )
        monkeypatch.setattr(fastvit_train.distributed.accelerator, "Accelerator", lambda **_: pytest.fail("it went on"))

    return pretend


def complaint(tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        start_accelerator(1, (), tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_launch_whose_processes_did_not_find_each_other_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU machine where the processes were started without the variables that torch's launcher sets."""
    accelerator = start_accelerator(1, (), tmp_path)
    monkeypatch.setattr(fastvit_train.distributed.accelerator, "Accelerator", lambda **_: accelerator)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "the launch started 2 processes, but this one sees 1" in complaint(tmp_path)


@pytest.mark.slow
def test_several_processes_asked_for_and_one_started_is_refused(tmp_path: Path) -> None:
    result = launch("--runs-dir", tmp_path / "runs", before=("--cpu", "--num_processes", 2))
    assert result.returncode != 0 and "asks for 2 processes, but accelerate started 1" in one_line_error(result.stderr)
    assert "--multi_gpu --num_processes N" in one_line_error(result.stderr)
    assert "fastvit_train/" not in result.stderr and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["MULTI_CPU", "NO"])
def test_files_that_ask_for_several_processes_in_vain_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    launched_with(monkeypatch, "--config_file", written(tmp_path, distributed_type=kind, num_processes=2, use_cpu=True))
    assert "asks for 2 processes, but accelerate started 1" in complaint(tmp_path)


def test_a_number_that_the_machines_do_not_divide_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--config_file", CONFIGS / "multi_node.yaml", "--num_processes", 5, "--mixed_precision", "no")
    launched_with(monkeypatch, *flags, "--machine_rank", 1)
    with pytest.raises(UserError, match="asks for 5 processes, but accelerate started 4"):
        monkeypatch.setenv("WORLD_SIZE", "4")
        check_joined(4)


@pytest.mark.parametrize("flags", [("--num_processes", 1), ("--cpu", "--num_processes", 1)])
def test_one_process_that_was_asked_for_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[object, ...]
) -> None:
    launched_with(monkeypatch, *flags)
    start_accelerator(1, (), tmp_path)


def test_the_users_default_file_counts_where_the_launcher_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(written(tmp_path, distributed_type="NO", num_processes=2))
    for module in (config_args, accelerate.commands.launch):
        monkeypatch.setattr(module, "default_config_file", path)
    launched_with(monkeypatch)
    assert "asks for 2 processes" in complaint(tmp_path)
    launched_with(monkeypatch, "--cpu")  # with it, it doesn't
    start_accelerator(1, (), tmp_path)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(("name", "possible"), [("single_gpu", True), ("cpu", True), ("fp16", False)])
def test_which_files_of_ours_for_one_process_a_cpu_can_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, possible: bool
) -> None:
    launched_with(monkeypatch, "--config_file", CONFIGS / f"{name}.yaml")
    if possible:
        start_accelerator(1, (), tmp_path)
    else:
        assert complaint(tmp_path) == "mixed precision fp16 is not supported on a CPU; allowed: no, bf16"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("settings", [{"fp16": True}, {"mixed_precision": "fp16"}])
def test_fp16_of_an_old_file_is_understood_and_refused_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    """accelerate would train in fp32, and say fp16."""
    launched_with(monkeypatch, "--config_file", written(tmp_path, distributed_type="NO", num_processes=1, **settings))
    assert "fp16 is not supported on a CPU" in complaint(tmp_path)


def test_a_minimal_old_file_starts_one_process_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched_with(monkeypatch, "--config_file", written(tmp_path, distributed_type="NO", fp16=False))
    assert start_accelerator(1, (), tmp_path).mixed_precision == "no"


def test_bf16_that_a_gpu_would_emulate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus) -> None:
    gpus(1, bf16=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert complaint(tmp_path) == "mixed precision bf16 is not supported on Tesla T4; allowed: no, fp16"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_fp8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus, on_gpu: bool) -> None:
    if on_gpu:
        gpus(1)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "mixed precision fp8 is not supported" in complaint(tmp_path)


def test_more_processes_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus) -> None:
    gpus(2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    message = "the launch starts 4 processes on this machine, which has 2 GPUs; allowed: up to 2 per machine"
    assert complaint(tmp_path).startswith(message)


def test_the_machine_that_lacks_a_gpu_says_so_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus) -> None:
    gpus(1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError) as caught:
        start_accelerator(1, (), tmp_path)
    assert not caught.value.on_all_ranks


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a machine without a GPU")
def test_fsdp_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would go on with DDP, silently: it knows no FSDP on CPUs."""
    launched_with(monkeypatch, "--config_file", CONFIGS / "fsdp2.yaml")
    assert "FSDP needs a GPU, and this machine has none" in complaint(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"fsdp_version": 1}, "fsdp_version 1 is not supported; set it to 2"),
        ({"fsdp_state_dict_type": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type SHARDED_STATE_DICT is not supported"),
        ({"fsdp_state_dict_type": None}, "fsdp_state_dict_type is not set; set it to FULL_STATE_DICT"),
    ],
)
def test_other_kinds_of_fsdp_say_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus, changed: dict[str, object], message: str
) -> None:
    settings = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())
    settings["fsdp_config"] |= changed
    path = tmp_path / "fsdp.yaml"
    path.write_text(yaml.safe_dump(settings))
    launched_with(monkeypatch, "--config_file", path)
    gpus(2)
    assert message in complaint(tmp_path)


def test_fp16_under_fsdp_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus) -> None:
    launched_with(monkeypatch, "--config_file", CONFIGS / "fsdp2.yaml", "--mixed_precision", "fp16")
    gpus(2)
    assert "mixed precision fp16 is not supported on this GPU under FSDP; allowed: no, bf16" in complaint(tmp_path)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_other_kinds_of_training_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "true")
    assert "allowed are DDP and FSDP2" in complaint(tmp_path)


def test_an_accumulation_from_outside_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would step every fourth time; the loop counts a step each time."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert "differs from --grad-accum 1; unset it" in complaint(tmp_path)


def test_optimizers_and_models_that_cannot_be_sharded_are_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    check_shardable(["Linear"], model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(
        UserError, match="has no module of class Block to shard by; set fsdp_transformer_layer_cls_to_wrap"
    ):
        check_shardable(["Block"], model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(UserError, match="optimizer SGD can't update sharded weights; allowed: adam, adamw, muon"):
        check_shardable(["Linear"], model, torch.optim.SGD(model.parameters()))
