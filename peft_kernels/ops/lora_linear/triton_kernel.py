"""lora_linear on CUDA tensors in Triton: the same signatures and results as reference.py.

Forward, two kernels for a layer: h = s drop(x) A^T (below), then the GEMM over [x | h] and [W | B] (triton_gemm.py).
Backward: triton_backward.py. x [M, K], A_l [R_l, K], h [M, sum R_l] in fp32 (fp64 for fp64), dropout replayed inside.
Shrink: grid (row tiles, rank blocks, pieces of K). A program takes the adapters of the call in turn for its rows, so
that x comes from memory once and from the L2 cache after that. Where row tiles are few, K is cut into pieces, whose
sums are added by a second kernel in a fixed order. A is fp32 next to a 16-bit x: it goes in as 16-bit parts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.common.dropout import threshold
from peft_kernels.ops.common.triton_dropout import dropout_mask, keep_tile
from peft_kernels.ops.common.triton_products import (
    accumulator,
    exact_parts,
    low_type,
    product_of_parts,
    split,
    unit_rows,
)
from peft_kernels.ops.lora_linear.op import check
from peft_kernels.ops.lora_linear.triton_backward import backward
from peft_kernels.ops.lora_linear.triton_gemm import Base, LowRank, concat_gemm
from peft_kernels.ops.lora_linear.triton_tiles import (
    MOST_ADAPTERS,
    shrink_tile,
    store_parts,
    sum_partials,
)


@triton.jit(do_not_specialize=["first", "M", "K_blocks"])
def _shrink_kernel(
    h_ptr, parts_ptr, x_ptr, seed_ptr, adapters, first, M, K, K_blocks,
    stride_xm, stride_hm, stride_piece, stride_part,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, ACCUMULATOR: tl.constexpr,
    EVEN_K: tl.constexpr, DROPOUT: tl.constexpr, FACTOR: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """h[:, offset : offset + R] = scaling drop(x) A^T for each adapter from `first` on; of one piece of K, if cut."""
    start_m = tl.program_id(0) * BLOCK_M
    start_r = tl.program_id(1) * BLOCK_R
    begin = tl.program_id(2) * K_blocks * BLOCK_K  # a multiple that the compiler knows: loads are 16 bytes wide
    end = min(begin + K_blocks * BLOCK_K, K)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    offs_r = start_r + tl.arange(0, BLOCK_R)
    for i in tl.static_range(len(adapters)):
        a_ptr, stride_ar, stride_ak, R, offset, scaling, keep_below = adapters[i]
        if start_r < R:
            acc = tl.zeros((BLOCK_M, BLOCK_R), ACCUMULATOR)
            for k in range(begin, end, BLOCK_K):
                offs_k = k + tl.arange(0, BLOCK_K)
                x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
                a_ptrs = a_ptr + offs_k.to(tl.int64)[:, None] * stride_ak + offs_r.to(tl.int64)[None, :] * stride_ar
                if EVEN_K:
                    x = tl.load(x_ptrs)
                    a = tl.load(a_ptrs, mask=(offs_r < R)[None, :], other=0.0)
                else:
                    x = tl.load(x_ptrs, mask=(offs_k < end)[None, :], other=0.0)
                    a = tl.load(a_ptrs, mask=(offs_k < end)[:, None] & (offs_r < R)[None, :], other=0.0)
                if DROPOUT:
                    keep = keep_tile(seed_ptr, start_m, k, first + i, keep_below, BLOCK_M, BLOCK_K)
                    x = tl.where(keep, x, 0.0)
                acc = product_of_parts(x, a, acc, FACTOR)
            if DROPOUT:
                acc *= 65536.0 / tl.cast(keep_below, ACCUMULATOR)
            acc *= scaling
            where = offs_m.to(tl.int64)[:, None] * stride_hm + offset + offs_r[None, :]
            mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
            tl.store(h_ptr + tl.program_id(2).to(tl.int64) * stride_piece + where, acc, mask=mask)
            if PARTS > 0:
                store_parts(acc, parts_ptr + where, stride_part, mask, PARTS)


def shrink(
    x: Tensor, lora_A: list[Tensor], scaling: list[float], dropout_p: list[float], seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h [M, R] and what the GEMM takes of it: two bf16 parts of h [2, M, R], or itself as [1, M, R]."""
    (M, K), ranks, dtype = x.shape, [a.shape[0] for a in lora_A], accumulator(x.dtype)
    R, widest, dropout = sum(ranks), max(ranks), any(threshold(p) < 65536 for p in dropout_p)
    h = x.new_empty((M, R), dtype=dtype)
    parts = x.new_empty((2, M, R), dtype=low_type(x.dtype)) if x.dtype.itemsize == 2 else None
    tile = shrink_tile(x.dtype, M, widest, dropout=dropout)
    grid = triton.cdiv(M, tile.M), triton.cdiv(widest, tile.N)
    pieces, K_piece = split(K, tile.K, grid[0] * grid[1])
    direct = pieces == 1
    out = h[None] if direct else x.new_empty((pieces, M, R), dtype=dtype)
    double = dtype is torch.float64  # Triton takes a Python float as fp32
    for first in range(0, len(lora_A), MOST_ADAPTERS):
        group = range(first, min(first + MOST_ADAPTERS, len(lora_A)))
        columns = slice(sum(ranks[:first]), None)
        adapters = tuple(
            (lora_A[i], *lora_A[i].stride(), ranks[i], sum(ranks[first:i]), 1.0 if double else scaling[i],
             threshold(dropout_p[i]))
            for i in group
        )  # fmt: skip
        _shrink_kernel[(*grid, pieces)](
            out[..., columns], parts[..., columns] if direct and parts is not None else None, x, seed, adapters, first,
            M, K, K_piece // tile.K, x.stride(0), R, M * R, M * R,
            BLOCK_M=tile.M, BLOCK_R=tile.N, BLOCK_K=tile.K, ACCUMULATOR=tl.float64 if double else tl.float32,
            EVEN_K=K % tile.K == 0, DROPOUT=dropout, FACTOR=exact_parts(x.dtype, lora_A[0].dtype),
            PARTS=2 if direct and parts is not None else 0,
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    if not direct:
        sum_partials(h, out, parts)
    if double:
        for i, block in enumerate(h.split(ranks, dim=1)):
            block.mul_(scaling[i])
    return h, h[None] if parts is None else parts


def forward(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor | None],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    lora_bias: list[Tensor | None],
    member: list[int],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    check(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed)
    rows = unit_rows(x.reshape(-1, x.shape[-1]))  # [M, K]
    M = rows.shape[0]
    y = [x.new_empty((M, w.shape[0])) for w in weight]
    ranks = [a.shape[0] for a in lora_A]
    if M == 0:
        h = x.new_empty((0, sum(ranks)), dtype=accumulator(x.dtype))
    else:
        with torch.cuda.device_of(x):
            h, parts = shrink(rows, lora_A, scaling, dropout_p, seed)
            of = parts.split(ranks, dim=2)
            for g, (out, w) in enumerate(zip(y, weight, strict=True)):
                mine = [i for i, owner in enumerate(member) if owner == g]
                low_rank = [LowRank(of[i], lora_B[i].t(), i, 65536) for i in mine]
                added = sum_biases(bias[g], [(scaling[i], lora_bias[i]) for i in mine], x.dtype)
                concat_gemm(out, added, None, [Base(rows, w.t())], low_rank)
    return [out.reshape(*x.shape[:-1], out.shape[1]) for out in y], h


def sum_biases(bias: Tensor | None, adapters: list[tuple[float, Tensor | None]], dtype: torch.dtype) -> Tensor | None:
    """b_g + the sum of s_l b_Bl over the adapters that have one; contiguous."""
    for s, b in adapters:
        if b is not None:
            scaled = s * b.to(accumulator(dtype))
            bias = scaled if bias is None else bias + scaled
    return None if bias is None else bias.contiguous()


FUNCTIONS = {"lora_linear": forward, "lora_linear_backward": backward, "lora_dropout_mask": dropout_mask}
