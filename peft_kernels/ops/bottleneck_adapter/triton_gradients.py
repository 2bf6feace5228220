"""Gradients of bottleneck_adapter that are sums over the rows.

    P = dh^T n(x) [E, K] without the norm's weight w and bias c, and da = colsum(dh):
        dA = P . w + da c,     dw = colsum(A . P),    dc = da A
    Q = (g u)^T d [E, N], d = drop(dy), and q = colsum(g d) [N]:
        dB = (s . Q)^T,        db = s . q,            ds = scaling (colsum(B^T . Q) + b . q), summed if s is one number
One kernel makes P or Q: grid (K or N tiles, E blocks, pieces of M), fp32 (fp64) sums for each piece; another adds the
pieces in their order and finishes: grid (K or N tiles).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.bottleneck_adapter.triton_tiles import (
    OPTIONS,
    TYPES,
    as_number,
    cut,
    gradient_tile,
    normed,
    number,
)
from peft_kernels.ops.common.triton_dropout import keep_tile
from peft_kernels.ops.common.triton_products import product_of_splits, split


@triton.jit(do_not_specialize=["M", "M_piece", "keep_below"])
def _sum_kernel(
    product_ptr, of_low_ptr, of_wide_ptr, low_ptr, wide_ptr, stats_ptr, gate_ptr, seed_ptr,
    M, W, E, M_piece, keep_below, stride_wm,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_W: tl.constexpr, ACCUMULATOR: tl.constexpr,
    NORMED: tl.constexpr, DROP_OUT: tl.constexpr,
    PRODUCT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Of each piece of M: product [E, W] = low^T wide, of_low [E] = colsum(low), of_wide [W] = colsum(g wide)."""
    start_w, start_e, piece = tl.program_id(0) * BLOCK_W, tl.program_id(1) * BLOCK_E, tl.program_id(2)
    offs_w, offs_e = start_w + tl.arange(0, BLOCK_W), start_e + tl.arange(0, BLOCK_E)
    mask_w, mask_e = offs_w < W, offs_e < E
    acc = tl.zeros((BLOCK_E, BLOCK_W), ACCUMULATOR)
    of_low, of_wide = tl.zeros((BLOCK_E,), ACCUMULATOR), tl.zeros((BLOCK_W,), ACCUMULATOR)
    begin = piece * M_piece
    end = min(begin + M_piece, M)
    for m in range(begin, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m, rows = offs_m < end, offs_m.to(tl.int64)
        low_ptrs = low_ptr + rows[None, :] * E + offs_e[:, None]
        low = tl.load(low_ptrs, mask=mask_m[None, :] & mask_e[:, None], other=0.0)
        wide_ptrs = wide_ptr + rows[:, None] * stride_wm + offs_w[None, :]
        wide = tl.load(wide_ptrs, mask=mask_m[:, None] & mask_w[None, :], other=0.0)
        if NORMED:
            mean = tl.load(stats_ptr + rows, mask=mask_m, other=0.0)
            wide = normed(wide, mean, tl.load(stats_ptr + M + rows, mask=mask_m, other=0.0), ACCUMULATOR)
        if DROP_OUT:
            wide = tl.where(keep_tile(seed_ptr, m, start_w, 0, keep_below, BLOCK_M, BLOCK_W), wide, 0.0)
        acc = product_of_splits(low, wide, acc, PRODUCT, LEFT, RIGHT, LIMIT)
        if of_low_ptr is not None:
            of_low += tl.sum(low, 1)
        if of_wide_ptr is not None:
            weighted = wide.to(ACCUMULATOR)
            if gate_ptr is not None:
                weighted *= tl.load(gate_ptr + offs_m, mask=mask_m, other=0.0).to(ACCUMULATOR)[:, None]
            of_wide += tl.sum(weighted, 0)
    if DROP_OUT:
        acc *= 65536.0 / tl.cast(keep_below, ACCUMULATOR)
        of_wide *= 65536.0 / tl.cast(keep_below, ACCUMULATOR)
    product_ptrs = product_ptr + (piece.to(tl.int64) * E + offs_e[:, None]) * W + offs_w[None, :]
    tl.store(product_ptrs, acc, mask=mask_e[:, None] & mask_w[None, :])
    if of_low_ptr is not None:  # noqa: SIM102 (the first is decided by the compiler)
        if start_w == 0:
            tl.store(of_low_ptr + piece.to(tl.int64) * E + offs_e, of_low, mask=mask_e)
    if of_wide_ptr is not None:  # noqa: SIM102 (the first is decided by the compiler)
        if start_e == 0:
            tl.store(of_wide_ptr + piece.to(tl.int64) * W + offs_w, of_wide, mask=mask_w)


@triton.jit
def _summed(ptrs, mask, pieces, stride):
    """The sum over the pieces, in their order."""
    total = tl.load(ptrs, mask=mask, other=0.0)
    for piece in range(1, pieces):
        total += tl.load(ptrs + tl.cast(piece, tl.int64) * stride, mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["pieces"])
def _down_kernel(
    da_weight_ptr, da_ptr, dw_ptr, dc_ptr, product_ptr, of_low_ptr, a_ptr, norm_weight_ptr, norm_bias_ptr, K, E, pieces,
    stride_ae, stride_ak, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dA, da, dw and dc, what is asked for, of BLOCK_K features."""
    offs_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_k, columns = offs_k < K, offs_k.to(tl.int64)
    DTYPE: tl.constexpr = product_ptr.dtype.element_ty
    dw, dc = tl.zeros((BLOCK_K,), DTYPE), tl.zeros((BLOCK_K,), DTYPE)
    for e in range(0, E, BLOCK_E):
        offs_e = e + tl.arange(0, BLOCK_E)
        mask_e, ranks = offs_e < E, offs_e.to(tl.int64)
        mask = mask_e[:, None] & mask_k[None, :]
        where = ranks[:, None] * K + offs_k[None, :]
        total = _summed(product_ptr + where, mask, pieces, tl.cast(E, tl.int64) * K)
        da = _summed(of_low_ptr + offs_e, mask_e, pieces, E)
        if dw_ptr is not None or dc_ptr is not None:
            a = tl.load(a_ptr + ranks[:, None] * stride_ae + columns[None, :] * stride_ak, mask=mask, other=0.0)
            dw += tl.sum(a.to(DTYPE) * total, 0)
            dc += tl.sum(a.to(DTYPE) * da[:, None], 0)
        if da_weight_ptr is not None:
            if norm_weight_ptr is not None:
                total *= tl.load(norm_weight_ptr + offs_k, mask=mask_k, other=0.0).to(DTYPE)[None, :]
            if norm_bias_ptr is not None:
                bias = tl.load(norm_bias_ptr + offs_k, mask=mask_k, other=0.0).to(DTYPE)
                total += da[:, None] * bias[None, :]
            tl.store(da_weight_ptr + where, total.to(da_weight_ptr.dtype.element_ty), mask=mask)
        if da_ptr is not None:  # noqa: SIM102 (the first is decided by the compiler)
            if tl.program_id(0) == 0:
                tl.store(da_ptr + offs_e, da.to(da_ptr.dtype.element_ty), mask=mask_e)
    if dw_ptr is not None:
        tl.store(dw_ptr + offs_k, dw.to(dw_ptr.dtype.element_ty), mask=mask_k)
    if dc_ptr is not None:
        tl.store(dc_ptr + offs_k, dc.to(dc_ptr.dtype.element_ty), mask=mask_k)


@triton.jit(do_not_specialize=["pieces", "scaling"])
def _up_kernel(
    db_weight_ptr, db_ptr, ds_ptr, product_ptr, of_wide_ptr, b_ptr, up_bias_ptr, scale_ptr, N, E, pieces, scaling,
    stride_bn, stride_be, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dB, db and, of each channel, ds, what is asked for, of BLOCK_N channels."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, channels = offs_n < N, offs_n.to(tl.int64)
    DTYPE: tl.constexpr = product_ptr.dtype.element_ty
    factor = as_number(scaling, DTYPE) * tl.full((BLOCK_N,), 1.0, DTYPE)
    s = factor
    if scale_ptr is not None:
        if CHANNELS:
            s = factor * tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0).to(DTYPE)
        else:
            s = factor * tl.load(scale_ptr).to(DTYPE)
    ds = tl.zeros((BLOCK_N,), DTYPE)
    for e in range(0, E, BLOCK_E):
        offs_e = e + tl.arange(0, BLOCK_E)
        mask_e, ranks = offs_e < E, offs_e.to(tl.int64)
        mask = mask_e[:, None] & mask_n[None, :]
        where = ranks[:, None] * N + offs_n[None, :]
        total = _summed(product_ptr + where, mask, pieces, tl.cast(E, tl.int64) * N)
        if ds_ptr is not None:
            b = tl.load(b_ptr + ranks[:, None] * stride_be + channels[None, :] * stride_bn, mask=mask, other=0.0)
            ds += tl.sum(b.to(DTYPE) * total, 0)
        if db_weight_ptr is not None:
            where = channels[None, :] * E + offs_e[:, None]
            tl.store(db_weight_ptr + where, (total * s[None, :]).to(db_weight_ptr.dtype.element_ty), mask=mask)
    q = _summed(of_wide_ptr + offs_n, mask_n, pieces, N)
    if db_ptr is not None:
        tl.store(db_ptr + offs_n, (s * q).to(db_ptr.dtype.element_ty), mask=mask_n)
    if ds_ptr is not None:
        if up_bias_ptr is not None:
            ds += q * tl.load(up_bias_ptr + offs_n, mask=mask_n, other=0.0).to(DTYPE)
        tl.store(ds_ptr + offs_n, (ds * factor).to(ds_ptr.dtype.element_ty), mask=mask_n)


def _sums(low: Tensor, wide: Tensor, stats, gate, dropped: int, seed, factor: torch.dtype, *, of_low: bool):
    """(low^T wide [pieces, E, W], colsum(low) [pieces, E] if `of_low` or else colsum(g wide) [pieces, W])."""
    (M, E), W, dtype = low.shape, wide.shape[1], low.dtype
    of = gradient_tile(wide.dtype, factor, W)
    grid = triton.cdiv(W, of.W), triton.cdiv(E, of.E)
    pieces, M_piece = split(M, of.M, grid[0] * grid[1])
    product, vectors = low.new_empty((pieces, E, W)), low.new_empty((pieces, E if of_low else W))
    _sum_kernel[(*grid, pieces)](
        product, vectors if of_low else None, None if of_low else vectors, low, wide, stats, gate, seed,
        M, W, E, M_piece, dropped, wide.stride(0),
        BLOCK_M=of.M, BLOCK_E=of.E, BLOCK_W=of.W, ACCUMULATOR=TYPES[dtype], NORMED=stats is not None,
        DROP_OUT=dropped < 65536,
        **cut(wide.dtype, dtype, wide.dtype if stats is None else dtype, 3 if factor.itemsize > 2 else 2),
        num_warps=of.num_warps, num_stages=of.num_stages, **OPTIONS,
    )  # fmt: skip
    return product, vectors


def down_gradients(
    grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, dh, x, stats, down_weight, norm_weight, norm_bias
) -> None:
    """Fills dA, da, dw and dc, those that are not None."""
    product, of_low = _sums(dh, x, stats, None, 65536, None, down_weight.dtype, of_low=True)
    pieces, E, K = product.shape
    _down_kernel[(triton.cdiv(K, 64),)](
        grad_weight, grad_bias, grad_norm_weight, grad_norm_bias, product, of_low, down_weight, norm_weight, norm_bias,
        K, E, pieces, *down_weight.stride(), BLOCK_E=32, BLOCK_K=64, num_warps=8, **OPTIONS,
    )  # fmt: skip


def up_gradients(
    grad_weight, grad_bias, grad_scale, low, dys, gate, up_weight, up_bias, scale, scaling, dropped, seed
) -> None:
    """Fills dB, db and ds, those that are not None."""
    product, of_wide = _sums(low, dys, None, gate, dropped, seed, up_weight.dtype, of_low=False)
    pieces, E, N = product.shape
    channels = scale is not None and scale.shape[0] == N
    whole = grad_scale if grad_scale is None or channels else product.new_empty(N)
    _up_kernel[(triton.cdiv(N, 64),)](
        grad_weight, grad_bias, whole, product, of_wide, up_weight, up_bias, scale, N, E, pieces,
        number(scaling, product.dtype), *up_weight.stride(),
        BLOCK_E=32, BLOCK_N=64, CHANNELS=channels, num_warps=8, **OPTIONS,
    )  # fmt: skip
    if whole is not grad_scale:
        grad_scale.copy_(whole.sum(0, keepdim=True))
