"""The dropout mask of dropout.py for Triton kernels: Philox4x32-7, one call for eight elements.

Counter (row, k >> 5, (k & 7) >> 1, stream); element k takes word (k >> 3) & 3, its low half if k is even. A tile of
32 b columns costs 4 b calls per row: the words of the calls are computed as [M, b, c], c = (k & 7) >> 1, and put into
the order of the columns, k = 32 b + 8 word + 2 c + half, by joins and one permutation. Grid of the mask kernel: one
program for BLOCK_M rows x BLOCK_K columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.common.dropout import threshold


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Seven rounds on uint32 counters; returns the four words."""
    for _ in tl.static_range(7):
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        high0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        high1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + tl.full((), 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def keep_tile(seed_ptr, row_start, column_start, stream, keep_below, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """bool [BLOCK_M, BLOCK_K], True where an element is kept; column_start and BLOCK_K are multiples of 32."""
    rows = row_start + tl.arange(0, BLOCK_M)
    return keep_rows(seed_ptr, rows, column_start, stream, keep_below, BLOCK_M, BLOCK_K)


@triton.jit
def keep_rows(seed_ptr, numbers, column_start, stream, keep_below, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The same for BLOCK_M rows of any numbers."""
    seed = tl.load(seed_ptr)
    k0 = seed.to(tl.uint32)  # the low word
    k1 = (seed >> 32).to(tl.uint32)
    call = tl.arange(0, BLOCK_K // 8)
    zero = tl.zeros((BLOCK_M, BLOCK_K // 8), tl.uint32)
    rows = zero + numbers.to(tl.uint32)[:, None]
    blocks = zero + (column_start // 32 + call // 4).to(tl.uint32)[None, :]
    pairs = zero + (call % 4).to(tl.uint32)[None, :]
    streams = zero + tl.cast(stream, tl.uint32)
    w0, w1, w2, w3 = _philox(rows, blocks, pairs, streams, k0, k1)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [M, calls, word & 1, word >> 1]
    lanes = tl.join(words & 0xFFFF, words >> 16)  # [..., half]
    keep = (lanes.to(tl.int32) < keep_below).to(tl.int8)
    keep = tl.reshape(keep, (BLOCK_M, BLOCK_K // 32, 4, 2, 2, 2))  # [M, b, c, word & 1, word >> 1, half]
    keep = tl.permute(keep, (0, 1, 4, 3, 2, 5))  # [M, b, word >> 1, word & 1, c, half]
    return tl.reshape(keep, (BLOCK_M, BLOCK_K)) != 0


@triton.jit(do_not_specialize=["M", "K", "stream", "keep_below"])
def _mask_kernel(mask_ptr, seed_ptr, M, K, stream, keep_below, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    row_start = tl.program_id(0) * BLOCK_M
    column_start = tl.program_id(1) * BLOCK_K
    keep = keep_tile(seed_ptr, row_start, column_start, stream, keep_below, BLOCK_M, BLOCK_K)
    offs_m = row_start + tl.arange(0, BLOCK_M)
    offs_k = column_start + tl.arange(0, BLOCK_K)
    mask_ptrs = mask_ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    tl.store(mask_ptrs, keep.to(tl.int8), mask=(offs_m < M)[:, None] & (offs_k < K)[None, :])


def dropout_mask(seed: Tensor, rows: int, cols: int, p: float, stream: int) -> Tensor:
    """bool [rows, cols], as `mask_reference` defines it."""
    mask = seed.new_empty((rows, cols), dtype=torch.bool)
    if mask.numel():
        grid = (triton.cdiv(rows, 32), triton.cdiv(cols, 128))
        with torch.cuda.device_of(seed):
            _mask_kernel[grid](
                mask.view(torch.int8), seed, rows, cols, stream, threshold(p),
                BLOCK_M=32, BLOCK_K=128, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return mask
