"""Choose an implementation: from memory, from the cache file, or by measurement."""

import sys

import torch

from fastvit_kernels.autotune import cache
from fastvit_kernels.autotune.choice import Case, Choice, Mode
from fastvit_kernels.autotune.measurement import measure

_choices: dict[Case, Choice] = {}


def choose(
    shape: tuple[int, int, int],
    num_heads: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    weight_dtype: torch.dtype | None = None,
    has_bias: bool = True,
    dropout_p: float = 0.0,
    mode: Mode = "eager",
) -> Choice:
    """Time the forward and backward pass of each implementation that can run here, on random tokens.

    Each implementation is first compared with `fused`; if it fails, it is left out with a warning. The result is
    remembered for each combination of the arguments and of the enabled autocast dtype, in this process and in a file
    in the user's cache folder. The file is valid for the same machine, versions and number of threads, so that only the
    first process measures. torch's random state does not change.

    The implementations are timed as they will run. On a CPU, and in eager mode on a GPU, the host's clock times plain
    calls: there, the host's time is part of each step. In the other modes on a GPU, each implementation is captured in
    a CUDA graph, and CUDA events time its replays: the kernels alone. One that cannot be captured is left out.

    Args:
        shape: (batch, tokens, dim) of x.
        num_heads: number of heads; must divide dim.
        dtype: dtype of x.
        device: device of x.
        weight_dtype: dtype of the parameters; by default that of x.
        has_bias: whether the projections of query, key and value have a bias.
        dropout_p: dropout probability, as in `attention`.
        mode: "eager" for calls one by one; "compiled" for calls inside a model that will be compiled, for which a GPU
            times each implementation compiled; "traced" for calls that torch.compile is tracing at this moment, when
            nothing else can be compiled. The latter two leave out `compiled`, which is `fused` there.

    Raises:
        RuntimeError: if no implementation supports the shape.
    """
    device = torch.device(device)
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    if mode == "compiled" and device.type != "cuda":
        mode = "eager"  # to compile each one would take longer than it could save
    case = Case(shape, num_heads, dtype, weight_dtype or dtype, has_bias, dropout_p, device, autocast, mode)
    if case not in _choices:
        _choices[case] = cache.read(case) or cache.write(case, measure(case))
    return _choices[case]


@torch.compiler.assume_constant_result
def auto_name(
    shape: tuple[int, int, int],
    num_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    weight_dtype: torch.dtype,
    has_bias: bool,
    dropout_p: float,
    mode: Mode,
) -> str:
    """Return the name that `choose` selects; the first time, print the measurements to standard error.

    Under torch.compile this runs once, during tracing, and needs static shapes.
    """
    known_before = len(_choices)
    choice = choose(
        shape,
        num_heads,
        dtype=dtype,
        device=device,
        weight_dtype=weight_dtype,
        has_bias=has_bias,
        dropout_p=dropout_p,
        mode=mode,
    )
    if len(_choices) > known_before:
        print(choice, file=sys.stderr)
    return choice.name
