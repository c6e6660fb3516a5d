"""The Triton kernels that fuse LayerNorm, MLP and residual connection; see mlp.py.

Shape suffixes: M a block of tokens, D dim, H a block of hidden units, all padded.
"""

import triton
import triton.language as tl

from fastvit_kernels.triton_kernels.parts import cast, dot


@triton.jit
def _load_tokens(ptr, first, row_M, column_D, rows, D: tl.constexpr):
    """Load tokens `first` and following as float32, padded with zeros."""
    exists_MD = (row_M < rows - first)[:, None] & (column_D < D)[None, :]
    pointers_MD = ptr + tl.cast(first, tl.int64) * D + row_M[:, None] * D + column_D[None, :]
    return tl.load(pointers_MD, mask=exists_MD, other=0.0).to(tl.float32)


@triton.jit
def _store_tokens(ptr, value_MD, first, row_M, column_D, rows, D: tl.constexpr):
    exists_MD = (row_M < rows - first)[:, None] & (column_D < D)[None, :]
    pointers_MD = ptr + tl.cast(first, tl.int64) * D + row_M[:, None] * D + column_D[None, :]
    tl.store(pointers_MD, cast(value_MD, ptr.dtype.element_ty), mask=exists_MD)


@triton.jit
def _load_vector(ptr, index, size: tl.constexpr):
    return tl.load(ptr + index, mask=index < size, other=0.0).to(tl.float32)


@triton.jit
def _load_fc1(ptr, unit_H, column_D, D: tl.constexpr, HIDDEN: tl.constexpr):
    exists_HD = (unit_H < HIDDEN)[:, None] & (column_D < D)[None, :]
    return tl.load(ptr + unit_H[:, None] * D + column_D[None, :], mask=exists_HD, other=0.0).to(tl.float32)


@triton.jit
def _load_fc2(ptr, unit_H, column_D, D: tl.constexpr, HIDDEN: tl.constexpr):
    exists_DH = (column_D < D)[:, None] & (unit_H < HIDDEN)[None, :]
    return tl.load(ptr + column_D[:, None] * HIDDEN + unit_H[None, :], mask=exists_DH, other=0.0).to(tl.float32)


@triton.jit
def _normalize(x_MD, column_D, eps, D: tl.constexpr):
    """Return tokens of mean 0 and variance 1, and the reciprocals of their standard deviations."""
    mean_M = tl.sum(x_MD, 1) / D
    centered_MD = tl.where((column_D < D)[None, :], x_MD - mean_M[:, None], 0.0)
    rstd_M = tl.rsqrt(tl.sum(centered_MD * centered_MD, 1) / D + eps)
    return centered_MD * rstd_M[:, None], rstd_M


@triton.jit
def _gelu(hidden_MH, TANH: tl.constexpr):
    """Return GELU and its derivative; the tanh is written as a sigmoid."""
    if TANH:
        square_MH = hidden_MH * hidden_MH
        cdf_MH = tl.sigmoid(1.5957691216057308 * hidden_MH * (1 + 0.044715 * square_MH))
        density_MH = cdf_MH * (1 - cdf_MH) * 1.5957691216057308 * (1 + 0.134145 * square_MH)
    else:
        cdf_MH = 0.5 * (1 + tl.erf(0.7071067811865476 * hidden_MH))
        density_MH = 0.3989422804014327 * tl.exp(-0.5 * hidden_MH * hidden_MH)
    return hidden_MH * cdf_MH, cdf_MH + hidden_MH * density_MH


@triton.jit
def forward_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, out_ptr,
    rows, eps,
    D: tl.constexpr, D_PAD: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    TANH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of tokens."""
    first = tl.program_id(0) * BLOCK_M
    row_M = tl.arange(0, BLOCK_M)
    column_D = tl.arange(0, D_PAD)
    x_MD = _load_tokens(x_ptr, first, row_M, column_D, rows, D)
    normalized_MD = _normalize(x_MD, column_D, eps, D)[0]
    gamma_D = _load_vector(norm_weight_ptr, column_D, D)
    beta_D = _load_vector(norm_bias_ptr, column_D, D)
    input_MD = cast(normalized_MD * gamma_D[None, :] + beta_D[None, :], DTYPE)
    out_MD = x_MD + _load_vector(fc2_bias_ptr, column_D, D)[None, :]
    for start in range(0, HIDDEN, BLOCK_H):
        unit_H = start + tl.arange(0, BLOCK_H)
        fc1_HD = cast(_load_fc1(fc1_weight_ptr, unit_H, column_D, D, HIDDEN), DTYPE)
        fc2_DH = cast(_load_fc2(fc2_weight_ptr, unit_H, column_D, D, HIDDEN), DTYPE)
        hidden_MH = dot(input_MD, tl.trans(fc1_HD), PRECISION)
        active_MH = _gelu(hidden_MH + _load_vector(fc1_bias_ptr, unit_H, HIDDEN)[None, :], TANH)[0]
        out_MD += dot(cast(active_MH, DTYPE), tl.trans(fc2_DH), PRECISION)
    _store_tokens(out_ptr, out_MD, first, row_M, column_D, rows, D)


@triton.jit
def backward_x_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, dout_ptr, dx_ptr,
    rows, eps,
    D: tl.constexpr, D_PAD: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    TANH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per block of tokens."""
    first = tl.program_id(0) * BLOCK_M
    row_M = tl.arange(0, BLOCK_M)
    column_D = tl.arange(0, D_PAD)
    x_MD = _load_tokens(x_ptr, first, row_M, column_D, rows, D)
    normalized_MD, rstd_M = _normalize(x_MD, column_D, eps, D)
    gamma_D = _load_vector(norm_weight_ptr, column_D, D)
    beta_D = _load_vector(norm_bias_ptr, column_D, D)
    input_MD = cast(normalized_MD * gamma_D[None, :] + beta_D[None, :], DTYPE)
    dout_MD = _load_tokens(dout_ptr, first, row_M, column_D, rows, D)
    dinput_MD = tl.zeros((BLOCK_M, D_PAD), tl.float32)
    for start in range(0, HIDDEN, BLOCK_H):
        unit_H = start + tl.arange(0, BLOCK_H)
        fc1_HD = cast(_load_fc1(fc1_weight_ptr, unit_H, column_D, D, HIDDEN), DTYPE)
        fc2_DH = cast(_load_fc2(fc2_weight_ptr, unit_H, column_D, D, HIDDEN), DTYPE)
        hidden_MH = dot(input_MD, tl.trans(fc1_HD), PRECISION)
        slope_MH = _gelu(hidden_MH + _load_vector(fc1_bias_ptr, unit_H, HIDDEN)[None, :], TANH)[1]
        dhidden_MH = dot(cast(dout_MD, DTYPE), fc2_DH, PRECISION) * slope_MH
        dinput_MD += dot(cast(dhidden_MH, DTYPE), fc1_HD, PRECISION)
    dnormalized_MD = dinput_MD * gamma_D[None, :]
    mean_M = tl.sum(dnormalized_MD, 1) / D
    projection_M = tl.sum(dnormalized_MD * normalized_MD, 1) / D
    centered_MD = dnormalized_MD - mean_M[:, None] - normalized_MD * projection_M[:, None]
    _store_tokens(dx_ptr, dout_MD + rstd_M[:, None] * centered_MD, first, row_M, column_D, rows, D)


@triton.jit
def backward_weight_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, dout_ptr,
    dlinear_ptr, dnorm_ptr, rows, eps,
    D: tl.constexpr, D_PAD: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
    TANH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per group of blocks of tokens and block of hidden units: block `program`, then every
    `num_programs`-th block.

    The norm's affine map is folded into the first layer. Then one product with the normalized tokens, z, is enough
    for the gradients of that layer and of the norm: both are sums of z over the tokens.

    Each group writes its own slice of dlinear (groups, H*D + D*H + H + D), and each program its own of
    dnorm (groups, hidden blocks, 2*D); both are float32.
    """
    group = tl.program_id(0)
    block = tl.program_id(1)
    row_M = tl.arange(0, BLOCK_M)
    column_D = tl.arange(0, D_PAD)
    unit_H = block * BLOCK_H + tl.arange(0, BLOCK_H)
    gamma_D = _load_vector(norm_weight_ptr, column_D, D)
    beta_D = _load_vector(norm_bias_ptr, column_D, D)
    fc1_HD = _load_fc1(fc1_weight_ptr, unit_H, column_D, D, HIDDEN)
    bias_H = _load_vector(fc1_bias_ptr, unit_H, HIDDEN) + tl.sum(fc1_HD * beta_D[None, :], 1)
    scaled_HD = cast(fc1_HD * gamma_D[None, :], DTYPE)
    fc2_DH = cast(_load_fc2(fc2_weight_ptr, unit_H, column_D, D, HIDDEN), DTYPE)
    dscaled_HD = tl.zeros((BLOCK_H, D_PAD), tl.float32)
    dfc2_HD = tl.zeros((BLOCK_H, D_PAD), tl.float32)
    dfc1_bias_H = tl.zeros((BLOCK_H,), tl.float32)
    dfc2_bias_D = tl.zeros((D_PAD,), tl.float32)
    for index in range(group, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        first = index * BLOCK_M
        x_MD = _load_tokens(x_ptr, first, row_M, column_D, rows, D)
        normalized_MD = cast(_normalize(x_MD, column_D, eps, D)[0], DTYPE)
        dout_MD = _load_tokens(dout_ptr, first, row_M, column_D, rows, D)
        if block == 0:
            dfc2_bias_D += tl.sum(dout_MD, 0)
        dout_MD = cast(dout_MD, DTYPE)
        active_MH, slope_MH = _gelu(dot(normalized_MD, tl.trans(scaled_HD), PRECISION) + bias_H[None, :], TANH)
        dfc2_HD += dot(tl.trans(cast(active_MH, DTYPE)), dout_MD, PRECISION)
        dhidden_MH = dot(dout_MD, fc2_DH, PRECISION) * slope_MH
        dfc1_bias_H += tl.sum(dhidden_MH, 0)
        dscaled_HD += dot(tl.trans(cast(dhidden_MH, DTYPE)), normalized_MD, PRECISION)

    fc1_HD = _load_fc1(fc1_weight_ptr, unit_H, column_D, D, HIDDEN)  # again, to leave registers to the loop
    dfc1_HD = dscaled_HD * gamma_D[None, :] + dfc1_bias_H[:, None] * beta_D[None, :]
    exists_HD = (unit_H < HIDDEN)[:, None] & (column_D < D)[None, :]
    dlinear_ptr += group * (2 * HIDDEN * D + HIDDEN + D)
    tl.store(dlinear_ptr + unit_H[:, None] * D + column_D[None, :], dfc1_HD, mask=exists_HD)
    dlinear_ptr += HIDDEN * D
    tl.store(dlinear_ptr + column_D[None, :] * HIDDEN + unit_H[:, None], dfc2_HD, mask=exists_HD)
    dlinear_ptr += HIDDEN * D
    tl.store(dlinear_ptr + unit_H, dfc1_bias_H, mask=unit_H < HIDDEN)
    if block == 0:
        tl.store(dlinear_ptr + HIDDEN + column_D, dfc2_bias_D, mask=column_D < D)
    dnorm_ptr += (group * tl.num_programs(1) + block) * 2 * D
    tl.store(dnorm_ptr + column_D, tl.sum(fc1_HD * dscaled_HD, 0), mask=column_D < D)
    tl.store(dnorm_ptr + D + column_D, tl.sum(fc1_HD * dfc1_bias_H[:, None], 0), mask=column_D < D)
