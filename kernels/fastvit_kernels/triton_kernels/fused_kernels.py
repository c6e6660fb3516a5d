"""The Triton kernels that fuse the QKV projection with the attention; see fused.py.

Shape suffixes: B batch, N tokens, D dim, H heads, C channels of one head, M query rows (here all N tokens).
"""

import triton
import triton.language as tl

from fastvit_kernels.triton_kernels.parts import cast, dot, dropout_factor, softmax, softmax_backward


@triton.jit
def _load_tokens(ptr, row_N, column_D, stride_n, stride_d, N: tl.constexpr, D: tl.constexpr):
    """Load the rows of one sample, padded with zeros."""
    exists_ND = (row_N < N)[:, None] & (column_D < D)[None, :]
    return tl.load(ptr + row_N[:, None] * stride_n + column_D[None, :] * stride_d, mask=exists_ND, other=0.0)


@triton.jit
def _load_weight(w_ptr, first_row, column_D, channel_C, dtype: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Load C rows of the weight, transposed and converted to `dtype`."""
    exists_DC = (column_D < D)[:, None] & (channel_C < C)[None, :]
    w_DC = tl.load(w_ptr + (first_row + channel_C)[None, :] * D + column_D[:, None], mask=exists_DC, other=0.0)
    return w_DC if w_DC.dtype == dtype else cast(w_DC, dtype)


@triton.jit
def _load_head_weights(w_ptr, head, column_D, channel_C, dtype: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Load one head's query, key and value weights, each transposed and converted to `dtype`."""
    wq_DC = _load_weight(w_ptr, head * C, column_D, channel_C, dtype, C, D)
    wk_DC = _load_weight(w_ptr, D + head * C, column_D, channel_C, dtype, C, D)
    wv_DC = _load_weight(w_ptr, 2 * D + head * C, column_D, channel_C, dtype, C, D)
    return wq_DC, wk_DC, wv_DC


@triton.jit
def _project(
    x_ND, w_DC, bias_ptr, first_row, channel_C, C: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr
):
    out_NC = dot(x_ND, w_DC, PRECISION)
    if HAS_BIAS:
        out_NC += tl.load(bias_ptr + first_row + channel_C, mask=channel_C < C, other=0.0).to(tl.float32)[None, :]
    return cast(out_NC, x_ND.dtype)


@triton.jit
def _probabilities(
    x_ND, wq_DC, wk_DC, wv_DC, bias_ptr, head, row_N, channel_C, scale_log2,
    N: tl.constexpr, D: tl.constexpr, C: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one head's query, key and value, and its attention probabilities in float32."""
    q_MC = _project(x_ND, wq_DC, bias_ptr, head * C, channel_C, C, HAS_BIAS, PRECISION)
    k_NC = _project(x_ND, wk_DC, bias_ptr, D + head * C, channel_C, C, HAS_BIAS, PRECISION)
    v_NC = _project(x_ND, wv_DC, bias_ptr, 2 * D + head * C, channel_C, C, HAS_BIAS, PRECISION)
    return q_MC, k_NC, v_NC, softmax(dot(q_MC, tl.trans(k_NC), PRECISION), row_N < N, scale_log2)


@triton.jit
def _head_gradients(
    x_ND, wq_DC, wk_DC, wv_DC, bias_ptr, dout_MC, seed_ptr, sample, head, row_N, channel_C,
    scale, scale_log2, dropout_p,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one head's query, key and value, in x's dtype."""
    q_MC, k_NC, v_NC, probs_MN = _probabilities(
        x_ND, wq_DC, wk_DC, wv_DC, bias_ptr, head, row_N, channel_C, scale_log2, N, D, C, HAS_BIAS, PRECISION
    )
    dprobs_MN = dot(dout_MC, tl.trans(v_NC), PRECISION)
    dropped_MN = probs_MN
    if DROPOUT:
        factor_MN = dropout_factor(tl.load(seed_ptr), sample * H + head, row_N, dropout_p, row_N.shape[0])
        dropped_MN = probs_MN * factor_MN
        dprobs_MN *= factor_MN
    dv_NC = dot(tl.trans(cast(dropped_MN, x_ND.dtype)), dout_MC, PRECISION)
    dscores_MN = cast(softmax_backward(probs_MN, dprobs_MN) * scale, x_ND.dtype)
    dq_MC = dot(dscores_MN, k_NC, PRECISION)
    dk_NC = dot(tl.trans(dscores_MN), q_MC, PRECISION)
    return cast(dq_MC, x_ND.dtype), cast(dk_NC, x_ND.dtype), cast(dv_NC, x_ND.dtype)


@triton.jit
def forward_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, seed_ptr, stride_xb, stride_xn, stride_xd, scale_log2, dropout_p,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    N_PAD: tl.constexpr, D_PAD: tl.constexpr, C_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sample."""
    C: tl.constexpr = D // H
    sample = tl.program_id(0).to(tl.int64)
    row_N = tl.arange(0, N_PAD)
    column_D = tl.arange(0, D_PAD)
    channel_C = tl.arange(0, C_PAD)
    x_ND = _load_tokens(x_ptr + sample * stride_xb, row_N, column_D, stride_xn, stride_xd, N, D)
    for head in range(H):
        wq_DC, wk_DC, wv_DC = _load_head_weights(w_ptr, head, column_D, channel_C, x_ptr.dtype.element_ty, C, D)
        _, _, v_NC, probs_MN = _probabilities(
            x_ND, wq_DC, wk_DC, wv_DC, bias_ptr, head, row_N, channel_C, scale_log2, N, D, C, HAS_BIAS, PRECISION
        )
        if DROPOUT:
            probs_MN *= dropout_factor(tl.load(seed_ptr), sample * H + head, row_N, dropout_p, row_N.shape[0])
        out_MC = dot(cast(probs_MN, v_NC.dtype), v_NC, PRECISION)
        pointers_MC = out_ptr + sample * N * D + row_N[:, None] * D + (head * C + channel_C)[None, :]
        exists_MC = (row_N < N)[:, None] & (channel_C < C)[None, :]
        tl.store(pointers_MC, cast(out_MC, out_ptr.dtype.element_ty), mask=exists_MC)


@triton.jit
def backward_x_kernel(
    x_ptr, w_ptr, bias_ptr, dout_ptr, dx_ptr, seed_ptr,
    stride_xb, stride_xn, stride_xd, stride_ob, stride_on, stride_od, scale, scale_log2, dropout_p,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    N_PAD: tl.constexpr, D_PAD: tl.constexpr, C_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per sample."""
    C: tl.constexpr = D // H
    sample = tl.program_id(0).to(tl.int64)
    row_N = tl.arange(0, N_PAD)
    column_D = tl.arange(0, D_PAD)
    channel_C = tl.arange(0, C_PAD)
    x_ND = _load_tokens(x_ptr + sample * stride_xb, row_N, column_D, stride_xn, stride_xd, N, D)
    dx_ND = tl.zeros((N_PAD, D_PAD), tl.float32)
    for head in range(H):
        wq_DC, wk_DC, wv_DC = _load_head_weights(w_ptr, head, column_D, channel_C, x_ptr.dtype.element_ty, C, D)
        head_dout_ptr = dout_ptr + sample * stride_ob + head * C * stride_od
        dout_MC = _load_tokens(head_dout_ptr, row_N, channel_C, stride_on, stride_od, N, C)
        dq_MC, dk_NC, dv_NC = _head_gradients(
            x_ND, wq_DC, wk_DC, wv_DC, bias_ptr, dout_MC, seed_ptr, sample, head, row_N, channel_C,
            scale, scale_log2, dropout_p, N, D, H, C, HAS_BIAS, DROPOUT, PRECISION,
        )  # fmt: skip
        dx_ND += dot(dq_MC, tl.trans(wq_DC), PRECISION)
        dx_ND += dot(dk_NC, tl.trans(wk_DC), PRECISION)
        dx_ND += dot(dv_NC, tl.trans(wv_DC), PRECISION)
    pointers_ND = dx_ptr + sample * N * D + row_N[:, None] * D + column_D[None, :]
    tl.store(pointers_ND, cast(dx_ND, dx_ptr.dtype.element_ty), mask=(row_N < N)[:, None] & (column_D < D)[None, :])


@triton.jit
def backward_weight_kernel(
    x_ptr, w_ptr, bias_ptr, dout_ptr, dparameters_ptr, seed_ptr,
    stride_xb, stride_xn, stride_xd, stride_ob, stride_on, stride_od, batch, scale, scale_log2, dropout_p,
    N: tl.constexpr, D: tl.constexpr, H: tl.constexpr,
    N_PAD: tl.constexpr, D_PAD: tl.constexpr, C_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per head and group of samples: sample `program`, then every `num_programs`-th sample.

    Each program writes its own row of dparameters, float32: the gradient of the weight, (3*D, D), then the bias.
    """
    C: tl.constexpr = D // H
    program = tl.program_id(0)
    head = tl.program_id(1)
    row_N = tl.arange(0, N_PAD)
    column_D = tl.arange(0, D_PAD)
    channel_C = tl.arange(0, C_PAD)
    wq_DC, wk_DC, wv_DC = _load_head_weights(w_ptr, head, column_D, channel_C, x_ptr.dtype.element_ty, C, D)
    dwq_DC = tl.zeros((D_PAD, C_PAD), tl.float32)
    dwk_DC = tl.zeros((D_PAD, C_PAD), tl.float32)
    dwv_DC = tl.zeros((D_PAD, C_PAD), tl.float32)
    dbq_C = tl.zeros((C_PAD,), tl.float32)
    dbk_C = tl.zeros((C_PAD,), tl.float32)
    dbv_C = tl.zeros((C_PAD,), tl.float32)
    for index in range(program, batch, tl.num_programs(0)):
        sample = tl.cast(index, tl.int64)
        x_ND = _load_tokens(x_ptr + sample * stride_xb, row_N, column_D, stride_xn, stride_xd, N, D)
        head_dout_ptr = dout_ptr + sample * stride_ob + head * C * stride_od
        dout_MC = _load_tokens(head_dout_ptr, row_N, channel_C, stride_on, stride_od, N, C)
        dq_MC, dk_NC, dv_NC = _head_gradients(
            x_ND, wq_DC, wk_DC, wv_DC, bias_ptr, dout_MC, seed_ptr, sample, head, row_N, channel_C,
            scale, scale_log2, dropout_p, N, D, H, C, HAS_BIAS, DROPOUT, PRECISION,
        )  # fmt: skip
        x_DN = tl.trans(x_ND)
        dwq_DC += dot(x_DN, dq_MC, PRECISION)
        dwk_DC += dot(x_DN, dk_NC, PRECISION)
        dwv_DC += dot(x_DN, dv_NC, PRECISION)
        if HAS_BIAS:
            dbq_C += tl.sum(dq_MC.to(tl.float32), 0)
            dbk_C += tl.sum(dk_NC.to(tl.float32), 0)
            dbv_C += tl.sum(dv_NC.to(tl.float32), 0)
    weight_row_C = head * C + channel_C
    dw_ptr = dparameters_ptr + program * 3 * D * (D + 1 if HAS_BIAS else D)
    pointers_DC = dw_ptr + weight_row_C[None, :] * D + column_D[:, None]
    exists_DC = (column_D < D)[:, None] & (channel_C < C)[None, :]
    tl.store(pointers_DC, dwq_DC, mask=exists_DC)
    tl.store(pointers_DC + D * D, dwk_DC, mask=exists_DC)
    tl.store(pointers_DC + 2 * D * D, dwv_DC, mask=exists_DC)
    if HAS_BIAS:
        pointers_C = dw_ptr + 3 * D * D + weight_row_C
        tl.store(pointers_C, dbq_C, mask=channel_C < C)
        tl.store(pointers_C + D, dbk_C, mask=channel_C < C)
        tl.store(pointers_C + 2 * D, dbv_C, mask=channel_C < C)
