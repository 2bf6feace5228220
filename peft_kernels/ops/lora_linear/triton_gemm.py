"""out = sum_j L_j R_j + sum_l mask_l * (S_l F_l) + bias: one GEMM whose contraction runs over base and adapters.

Forward:  y_g = [x | h_g] [W_g | B_g]^T + b_g         j: one pair (x, W_g^T);     l: the adapters of member g, no mask
Backward: dx  = [dy | ds] [W ; A], A's part masked    j: (dy_g, W_g) for all g;   l: all adapters, with their masks
An adapter costs r more columns of contraction: no second read of out, no epilogue. Its part comes first, since dropout
masks it (Philox, dropout.py) before the base is added. S_l is fp32: next to 16-bit operands it comes in as two bf16
parts, and a factor of another type goes in as two. Accumulation in fp32 (fp64 for fp64). Grid: BLOCK_M x BLOCK_N tiles
of out, row tiles of a GROUP_M next to each other so that the right operand stays in the L2 cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.common.triton_dropout import keep_tile
from peft_kernels.ops.common.triton_products import accumulator, parts_beside_low, product, product_of_parts
from peft_kernels.ops.lora_linear.triton_tiles import (
    MOST_ADAPTERS,
    architecture,
    gemm_tile,
    has_tensor_memory,
    low_rank_tile,
)


class Base(NamedTuple):
    """A large pair: left [M, K] with unit inner stride, right [K, N] with any strides."""

    left: Tensor
    right: Tensor

    def arguments(self):
        left, right = self
        return left, left.stride(0), right, right.stride(0), right.stride(1), right.shape[0]


class LowRank(NamedTuple):
    """An adapter's pair: left [parts, M, R] with unit inner stride, right [R, N]; its mask's stream and threshold."""

    left: Tensor
    right: Tensor
    stream: int
    keep_below: int

    def arguments(self, first: int):
        """`first`: the stream that the launch counts from, so that its kernel is the same for all."""
        left, right, stream, keep_below = self
        strides = (*left.stride()[:2], *right.stride())
        return left, right, *strides, right.shape[0], stream - first, keep_below


@triton.jit
def _add_base(
    acc, pair, offs_m, offs_n, mask_n, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    left_ptr, stride_lm, right_ptr, stride_rk, stride_rn, K = pair
    offs_k = tl.arange(0, BLOCK_K)
    left_ptrs = left_ptr + offs_m[:, None] * stride_lm + offs_k[None, :]
    right_ptrs = right_ptr + offs_k.to(tl.int64)[:, None] * stride_rk + offs_n[None, :] * stride_rn
    step = tl.full((), BLOCK_K, tl.int64) * stride_rk
    for k in range(0, K, BLOCK_K):
        if EVEN_K:  # noqa: SIM108
            left = tl.load(left_ptrs)
        else:
            left = tl.load(left_ptrs, mask=(offs_k < K - k)[None, :], other=0.0)
        if EVEN_K and EVEN_N:
            right = tl.load(right_ptrs)
        else:
            right = tl.load(right_ptrs, mask=(offs_k < K - k)[:, None] & mask_n[None, :], other=0.0)
        acc = product(left, right, acc)
        left_ptrs += BLOCK_K
        right_ptrs += step
    return acc


@triton.jit
def _add_low_rank(acc, pair, offs_m, offs_n, mask_n, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr, FACTOR: tl.constexpr):
    left_ptr, right_ptr, stride_part, stride_lm, stride_rr, stride_rn, R, _, _ = pair
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        left_ptrs = left_ptr + offs_m[:, None] * stride_lm + offs_r[None, :]
        right_ptrs = right_ptr + offs_r.to(tl.int64)[:, None] * stride_rr + offs_n[None, :] * stride_rn
        right = tl.load(right_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        high = tl.load(left_ptrs, mask=mask_r[None, :], other=0.0)
        acc = product_of_parts(high, right, acc, FACTOR)
        if SPLIT:
            low = tl.load(left_ptrs + tl.cast(stride_part, tl.int64), mask=mask_r[None, :], other=0.0)
            acc = product(low, right.to(low.dtype), acc)
    return acc


@triton.jit(do_not_specialize=["first", "M"])
def _concat_gemm_kernel(
    out_ptr, before_ptr, bias_ptr, seed_ptr, base, low_rank, first, M, N, stride_om, stride_bm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    ACCUMULATOR: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, HAS_BEFORE: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, SPLIT: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """SPLIT: the low-rank left operand has a second part. FACTOR: parts that a factor goes in as."""
    pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP_M * tiles_n) * GROUP_M
    rows_of_tiles = min(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    start_m = (first_m + within % rows_of_tiles) * BLOCK_M
    start_n = within // rows_of_tiles * BLOCK_N
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)  # rows past the end repeat the last one and are not stored
    columns = offs_n.to(tl.int64)
    where, inside = offs_m.to(tl.int64)[:, None] * stride_om + offs_n[None, :], mask_m[:, None] & mask_n[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    for i in tl.static_range(len(low_rank)):
        if DROPOUT:
            part = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
            part = _add_low_rank(part, low_rank[i], rows, columns, mask_n, BLOCK_R, SPLIT, FACTOR)
            stream, keep_below = first + low_rank[i][7], low_rank[i][8]
            keep = keep_tile(seed_ptr, start_m, start_n, stream, keep_below, BLOCK_M, BLOCK_N)
            part = tl.where(keep, part * (65536.0 / tl.cast(keep_below, ACCUMULATOR)), 0.0)
            if i == 0:
                acc = part
            else:
                acc += part
        else:
            acc = _add_low_rank(acc, low_rank[i], rows, columns, mask_n, BLOCK_R, SPLIT, FACTOR)
    if HAS_BEFORE:
        before_ptrs = before_ptr + offs_m.to(tl.int64)[:, None] * stride_bm + offs_n[None, :]
        acc += tl.load(before_ptrs, mask=inside, other=0.0).to(ACCUMULATOR)
    for j in tl.static_range(len(base)):
        acc = _add_base(acc, base[j], rows, columns, mask_n, BLOCK_K, EVEN_K, EVEN_N)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACCUMULATOR)[None, :]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=inside)


def concat_gemm(
    out: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    base: list[Base],
    low_rank: list[LowRank],
    residual: Tensor | None = None,
) -> None:
    """out [M, N], contiguous, written whole; a residual [M, N] with unit inner stride, which out may be, is added. One
    kernel; with many adapters one for every MOST_ADAPTERS of them, which leave the sum so far in the accumulator's
    dtype."""
    groups = [low_rank[i : i + MOST_ADAPTERS] for i in range(0, len(low_rank), MOST_ADAPTERS)] or [[]]
    before = residual
    for group in groups[:-1]:
        so_far = out.new_empty(out.shape, dtype=accumulator(out.dtype)) if before is residual else before
        _launch(so_far, before, None, seed, [], group, out.dtype)
        before = so_far
    _launch(out, before, bias, seed, base, groups[-1], out.dtype)


def _launch(out, before, bias, seed, base: list[Base], low_rank: list[LowRank], dtype) -> None:
    """out = before + the two sums + bias, the activations being of `dtype`; out may be `before`."""
    M, N = out.shape
    dropout = any(pair.keep_below < 65536 for pair in low_rank)
    factor = low_rank[0].right.dtype if low_rank else dtype
    parts, arch = parts_beside_low(dtype, factor), architecture(out)
    several = (dropout and len(low_rank) > 1) or (parts > 1 and has_tensor_memory(arch))
    tile = gemm_tile(arch, dtype, M, N, 2 if several else 1) if base else low_rank_tile(dtype, M, N)
    first = low_rank[0].stream if low_rank else 0
    ranks = [pair.right.shape[0] for pair in low_rank]
    _concat_gemm_kernel[(triton.cdiv(M, tile.M) * triton.cdiv(N, tile.N),)](
        out, before, bias, seed,
        tuple(pair.arguments() for pair in base), tuple(pair.arguments(first) for pair in low_rank), first,
        M, N, out.stride(0), 0 if before is None else before.stride(0),
        BLOCK_M=tile.M, BLOCK_N=tile.N, BLOCK_K=tile.K, GROUP_M=8,
        BLOCK_R=min(16 if parts > 1 or factor != dtype else 32, max(16, triton.next_power_of_2(max(ranks, default=1)))),
        ACCUMULATOR=tl.float64 if dtype is torch.float64 else tl.float32,
        EVEN_K=all(pair.right.shape[0] % tile.K == 0 for pair in base), EVEN_N=N % tile.N == 0,
        HAS_BEFORE=before is not None, HAS_BIAS=bias is not None, DROPOUT=dropout,
        SPLIT=dtype.itemsize == 2, FACTOR=parts,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
