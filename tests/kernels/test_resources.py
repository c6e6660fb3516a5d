"""The Triton kernels compile ahead of time to machine code, without a GPU, within the limits of each chip."""

import json
import re
import sys
from subprocess import PIPE, Popen
from typing import Any

import pytest
from filelock import FileLock

from fastvit_kernels.resources.chips import CHIPS
from fastvit_kernels.resources.estimate import microseconds, occupancy
from fastvit_kernels.resources.machine_code import PIPES, Instruction, work
from fastvit_kernels.resources.variants import SHAPES
from tests.support import environment, run

Plan = dict[int, tuple[str, ...]]
ONE_DTYPE: Plan = {75: ("fp16",), 80: ("bf16",), 86: ("bf16",)}
ALL = ("fp32", "bf16", "fp16")
# sm_89 and sm_120 have as much shared memory per program as sm_86: their fp32 and fp16 would show nothing new.
EVERYTHING: Plan = {75: ("fp32", "fp16"), 80: ALL, 86: ALL, 89: ("bf16",), 90: ALL, 120: ("bf16",)}


@pytest.fixture(
    scope="module",
    params=[pytest.param(ONE_DTYPE, marks=pytest.mark.slow), pytest.param(EVERYTHING, marks=pytest.mark.soak)],
    ids=["one-dtype", "everything"],
)
def plan(request: pytest.FixtureRequest) -> Plan:
    """The dtypes to compile for, by compute capability."""
    return request.param


@pytest.fixture(scope="module")
def rows(plan: Plan, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> list[dict[str, Any]]:
    """The planned kernels, compiled once for all processes of pytest-xdist: this takes minutes."""
    own = tmp_path_factory.getbasetemp()
    file = (own if worker_id == "master" else own.parent) / f"resources-{len(plan)}.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(json.dumps(compile_kernels(plan)))
    return json.loads(file.read_text())


def compile_kernels(plan: Plan) -> list[dict[str, Any]]:
    # A separate process, because in this one the kernels are defined for the interpreter.
    rows: list[dict[str, Any]] = []
    for capability, dtypes in plan.items():
        for words in [[]] if dtypes == ALL else [[dtype] for dtype in dtypes]:
            done = run([sys.executable, "-m", "fastvit_kernels.resources", f"sm_{capability}", *words, "--json"])
            assert done.returncode == 0, done.stderr
            rows += json.loads(done.stdout)
    return rows


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "expected"),
    [
        # fused.forward of mc_vit_4_4_32 in bf16: 228 KiB / (38 KiB + 1 KiB) = 5 programs; registers would allow 7.
        (90, 71, 38 * 1024, 4, (5, "shared memory", 20 / 64)),
        # muon.update: 255 registers are 8 KiB of 32 bits per warp, so two warps on each of the four schedulers.
        (80, 255, 64 * 1024, 8, (1, "registers", 8 / 64)),
        # fused.backward_x in fp32 on a T4, which reserves no shared memory: 204 registers leave two warps a scheduler.
        (75, 204, 60 * 1024, 8, (1, "registers", 8 / 32)),
        # Without shared memory: 48 warps on an RTX 4090, 24 programs of one warp.
        (89, 32, 0, 8, (6, "warps", 1.0)),
        (89, 32, 0, 1, (24, "programs", 0.5)),
        # 120 registers are 3,840 per warp: four warps on each scheduler, although 65,536 / 3,840 = 17.
        (90, 120, 0, 1, (16, "registers", 16 / 64)),
    ],
)
def test_occupancy_computed_by_hand(
    capability: int, registers: int, shared: int, warps: int, expected: tuple[int, str, float]
) -> None:
    assert occupancy(CHIPS[capability], registers, shared, warps) == expected


LISTING = [
    Instruction(0x00, "LDG.E.128", "R4, desc[UR6][R2.64]"),
    Instruction(0x10, "HMMA.16816.F32.BF16", "R4, R8, R12, R4"),
    Instruction(0x20, "MUFU.EX2", "R3, R3"),
    Instruction(0x30, "BRA", "0x10"),
    Instruction(0x40, "STS.64", "[R2], R4"),
    Instruction(0x50, "BRA", "0x50"),
]


def test_a_loop_counts_as_often_as_it_is_executed() -> None:
    nothing = dict.fromkeys(PIPES, 0)
    expected = {
        **nothing,
        "tensor": 5,
        "special": 5,
        "memory": 2,
        "control": 6,
        "products": 5 * 2048,
        "transactions": 6,
    }
    assert work(LISTING, (5,)) == (expected, True)


def test_loops_count_once_if_the_compiler_made_others() -> None:
    expected = {"tensor": 1, "special": 1, "memory": 2, "control": 2, "products": 2048, "transactions": 6}
    for trips in ((), (5, 3)):
        counts, known = work(LISTING, trips)
        assert not known
        assert {name: count for name, count in counts.items() if count} == expected


def test_a_loop_of_one_iteration_may_have_been_dropped() -> None:
    assert work(LISTING, (1,))[1]
    assert work(LISTING, (5, 1)) == work(LISTING, (5,))


def test_the_busiest_unit_bounds_the_time() -> None:
    counts = dict.fromkeys((*PIPES, "control", "products", "transactions"), 0)
    chip = CHIPS[90]  # 132 multiprocessors, 1,830 MHz, 3,350 GB/s
    assert microseconds(chip, counts, 4, 1, 3_350_000) == (pytest.approx(1.0), "bandwidth")
    # two programs of four warps per multiprocessor, each with 183 exponentials of 32 threads on 16 lanes
    assert microseconds(chip, counts | {"special": 183}, 4, 133, 0) == (pytest.approx(8 * 366 / 1830), "special")


def test_every_shape_compiles_for_every_chip(rows: list[dict[str, Any]], plan: Plan) -> None:
    limits = {75: 64, 80: 256, 86: 128, 89: 128, 90: 256, 120: 128}
    for chip, dtypes in plan.items():
        shapes = {shape for shape, (tokens, _, _) in SHAPES.items() if tokens <= limits[chip]}
        seen = {(row["shape"], row["dtype"]) for row in rows if row["capability"] == chip}
        assert seen == {(shape, dtype) for shape in shapes for dtype in dtypes}


def test_shared_memory_is_within_the_limit_of_each_chip(rows: list[dict[str, Any]]) -> None:
    assert not [row for row in rows if not 0 < row["shared"] <= row["shared_limit"]]


def test_low_precision_runs_on_the_tensor_cores(rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if (row["dtype"] != "fp32" or "muon" in row["kernel"]) and row["capability"] >= 80]
    assert not [row for row in rows if not row["work"]["tensor"]]


def test_spilled_registers(rows: list[dict[str, Any]]) -> None:
    """The default model spills next to nothing in low precision, and the others a bounded number of bytes."""
    for row in rows:
        print({key: row[key] for key in ("shape", "kernel", "dtype", "capability", "dropout", "registers", "spilled")})
    low = [row for row in rows if row["dtype"] != "fp32" and row["capability"] >= 80]
    assert not [row for row in low if row["shape"] == "mc_vit_4_4_32" and not row["dropout"] and row["spilled"] > 64]
    assert max(row["spilled"] for row in low) <= 640  # 608 by Triton 3.8: two heads of 32 on sm_80


def test_no_two_warps_compute_the_same_product(rows: list[dict[str, Any]]) -> None:
    """On an A100 the multiply-adds of the tensor cores are those of the padded products, for a batch of 256."""
    scores, projection = 64 * 64 * 16, 64 * 64 * 16  # of one head, 12 channels padded to 16 and 48 to 64
    forward, backward = 3 * projection + 2 * scores, 6 * projection + 5 * scores
    expected = {
        ("mc_vit_4_4_32", "fused.forward"): 256 * 4 * forward,
        ("mc_vit_4_4_32", "fused.backward_x"): 256 * 4 * backward,
        # 108 multiprocessors are 54 groups, of at most 5 samples each
        ("mc_vit_4_4_32", "fused.backward_weight"): 54 * 5 * 4 * backward,
        ("mc_vit_4_4_32", "mlp.forward"): 256 * 64 * 2 * 64 * 192,
        ("cct_7_3x1_32", "packed.forward"): 256 * 4 * 2 * 256 * 256 * 64,
        ("cct_7_3x1_32", "packed.backward"): 256 * 4 * 5 * 256 * 256 * 64,
    }
    for dropout in (False, True):
        found = {
            (row["shape"], row["kernel"]): row["work"]["products"] * row["warps"] * row["programs"]
            for row in rows
            if row["capability"] == 80 and row["dtype"] == "bf16" and row["dropout"] == dropout
        }
        keys = [key for key in expected if not (dropout and "mlp" in key[1])]
        assert {key: found[key] for key in keys} == {key: expected[key] for key in keys}


def test_no_kernel_is_faster_than_memory_allows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert 0 < row["occupancy"] <= 1
        assert row["min_microseconds"] >= row["bytes"] / CHIPS[row["capability"]].bandwidth / 1e3 > 0


@pytest.mark.slow
def test_words_that_no_kernel_has_are_named() -> None:
    done = run([sys.executable, "-m", "fastvit_kernels.resources", "mc_vit_4_4_32", "sm_70"])
    assert done.returncode == 2
    assert re.fullmatch(r"[^\n]*no kernel has all of: mc_vit_4_4_32 sm_70; words: [^\n]*sm_75[^\n]*\n", done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_may_stop_reading(flags: list[str]) -> None:
    words = ["mc_vit_4_4_32", "fused.forward", "bf16", "sm_90", "dropout"]
    command = [sys.executable, "-m", "fastvit_kernels.resources", *words, *flags]
    with Popen(command, stdout=PIPE, stderr=PIPE, text=True, env=environment()) as process:
        process.stdout.close()
        assert "Error" not in process.stderr.read()
    assert process.returncode == 141


@pytest.mark.slow
def test_the_table_shows_what_the_rows_hold() -> None:
    words = ["mc_vit_4_4_32", "fused.forward", "bf16", "sm_90", "dropout"]
    command = [sys.executable, "-m", "fastvit_kernels.resources", *words]
    [row] = json.loads(run([*command, "--json"]).stdout)
    done = run(command)
    assert done.returncode == 0, done.stderr
    _, line = done.stdout.splitlines()
    assert f"{row['registers']} registers" in line
    assert f"{row['spilled']} spilled" in line
    assert f"{row['work']['tensor']} tensor" in line
    assert f"at least {row['min_microseconds']:.1f} us" in line
