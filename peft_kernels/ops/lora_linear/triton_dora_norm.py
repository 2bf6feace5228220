"""dora_norm on CUDA tensors in Triton: the same signature and results as dora_reference.py.

norm = sqrt(max(0, ||W||^2 + <B, 2 s W A^T + s^2 B (A A^T)>)) of every row of W [N, K], A [R, K], B [N, R]; no B A.
Products: rows right^T [N, R] and the squares of the rows, W being read once for both; grid (row tiles, rank blocks,
pieces of K), whose sums are added by the last kernel in a fixed order. A A^T and B (A A^T) are the same kernel. fp32
factors beside a 16-bit W go in as 16-bit parts. Finish: grid (row tiles). fp32 sums, fp64 for fp64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.common.triton_products import (
    OPTIONS,
    TYPES,
    accumulator,
    as_number,
    exact_parts,
    number,
    product_of_parts,
    split,
)
from peft_kernels.ops.lora_linear.dora import check_norm
from peft_kernels.ops.lora_linear.triton_tiles import shrink_tile


@triton.jit(do_not_specialize=["N", "K_piece"])
def _products_kernel(
    low_ptr, squares_ptr, rows_ptr, right_ptr, N, K, R, K_piece, stride_n, stride_k, stride_rr, stride_rk,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, ACCUMULATOR: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Of each piece of K: low [N, R] = rows right^T, squares [N] = the sums of the squares of the rows."""
    start_r, piece = tl.program_id(1) * BLOCK_R, tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = start_r + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    acc = tl.zeros((BLOCK_N, BLOCK_R), ACCUMULATOR)
    squares = tl.zeros((BLOCK_N,), ACCUMULATOR)
    begin = piece * K_piece
    end = min(begin + K_piece, K)
    for k in range(begin, end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k, columns = offs_k < end, offs_k.to(tl.int64)
        row_ptrs = rows_ptr + offs_n.to(tl.int64)[:, None] * stride_n + columns[None, :] * stride_k
        rows = tl.load(row_ptrs, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        right_ptrs = right_ptr + offs_r.to(tl.int64)[None, :] * stride_rr + columns[:, None] * stride_rk
        right = tl.load(right_ptrs, mask=mask_r[None, :] & mask_k[:, None], other=0.0)
        acc = product_of_parts(rows, right, acc, PARTS)
        if squares_ptr is not None:
            wide = rows.to(ACCUMULATOR)
            squares += tl.sum(wide * wide, 1)
    row = piece.to(tl.int64) * N + offs_n
    tl.store(low_ptr + row[:, None] * R + offs_r[None, :], acc, mask=mask_n[:, None] & mask_r[None, :])
    if squares_ptr is not None:  # noqa: SIM102 (the first is decided by the compiler)
        if start_r == 0:
            tl.store(squares_ptr + row, squares, mask=mask_n)


@triton.jit(do_not_specialize=["N", "pieces", "cross_pieces", "scaling"])
def _finish_kernel(
    norm_ptr, low_ptr, squares_ptr, cross_ptr, cross_pieces, b_ptr, N, R, pieces, scaling, stride_bn, stride_br,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """norm of BLOCK_N rows; low and cross = B (A A^T) in pieces [., N, R]."""
    DTYPE: tl.constexpr = norm_ptr.dtype.element_ty
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, rows = offs_n < N, offs_n.to(tl.int64)
    s = as_number(scaling, DTYPE)
    square = tl.zeros((BLOCK_N,), DTYPE)
    for piece in range(pieces):
        square += tl.load(squares_ptr + tl.cast(piece, tl.int64) * N + offs_n, mask=mask_n, other=0.0)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask = mask_n[:, None] & (offs_r < R)[None, :]
        where = rows[:, None] * R + offs_r[None, :]
        low = tl.zeros((BLOCK_N, BLOCK_R), DTYPE)
        for piece in range(pieces):
            low += tl.load(low_ptr + tl.cast(piece, tl.int64) * N * R + where, mask=mask, other=0.0)
        cross = tl.zeros((BLOCK_N, BLOCK_R), DTYPE)
        for piece in range(cross_pieces):
            cross += tl.load(cross_ptr + tl.cast(piece, tl.int64) * N * R + where, mask=mask, other=0.0)
        b_ptrs = b_ptr + rows[:, None] * stride_bn + offs_r.to(tl.int64)[None, :] * stride_br
        b = tl.load(b_ptrs, mask=mask, other=0.0).to(DTYPE)
        square += tl.sum(b * (2 * s * low + s * s * cross), 1)
    square = tl.where(square < 0, 0.0, square)  # NaN stays NaN
    tl.store(norm_ptr + offs_n, tl.sqrt(square), mask=mask_n)


def _products(rows: Tensor, right: Tensor, squares: bool) -> tuple[Tensor, Tensor | None]:
    """Pieces [pieces, N, R] of rows right^T, and [pieces, N] of the squares of the rows."""
    (N, K), R, dtype = rows.shape, right.shape[0], accumulator(rows.dtype)
    parts = exact_parts(rows.dtype, right.dtype)
    tile = shrink_tile(rows.dtype, N, R, dropout=False)
    block_k = tile.K if parts == 1 else min(tile.K // 2, 32)  # parts beside wider tiles spill
    grid = triton.cdiv(N, tile.M), triton.cdiv(R, tile.N)
    pieces, K_piece = split(K, block_k, grid[0] * grid[1])
    low = rows.new_empty((pieces, N, R), dtype=dtype)
    sums = rows.new_empty((pieces, N), dtype=dtype) if squares else None
    _products_kernel[(*grid, pieces)](
        low, sums, rows, right, N, K, R, K_piece, *rows.stride(), *right.stride(),
        BLOCK_N=tile.M, BLOCK_R=tile.N, BLOCK_K=block_k, ACCUMULATOR=TYPES[dtype],
        PARTS=parts, num_warps=tile.num_warps, num_stages=tile.num_stages, **OPTIONS,
    )  # fmt: skip
    return low, sums


def norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    check_norm(weight, lora_A, lora_B, scaling)
    N, R, dtype = weight.shape[0], lora_A.shape[0], accumulator(weight.dtype)
    out = weight.new_empty(N, dtype=dtype)
    with torch.cuda.device_of(weight):
        low, squares = _products(weight, lora_A, squares=True)
        gram, _ = _products(lora_A, lora_A, squares=False)
        cross, _ = _products(lora_B.to(dtype), gram.sum(0), squares=False)  # A A^T is symmetric
        _finish_kernel[(triton.cdiv(N, 32),)](
            out, low, squares, cross, cross.shape[0], lora_B, N, R, low.shape[0], number(scaling, dtype),
            *lora_B.stride(), BLOCK_N=32, BLOCK_R=32, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out


FUNCTIONS = {"dora_norm": norm}
