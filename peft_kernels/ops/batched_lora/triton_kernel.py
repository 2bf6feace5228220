"""batched_lora_ on CUDA tensors in Triton: two launches for all slices (q, k, v) of one x.

    shrink  h[p, i, c] = sum of the chunks of K in part p of x[i] A[c]^T;   program: tile of the route x 16 ranks x part
    expand  y_g[i] += s (sum_c f(h[0, i, c] + h[1, i, c] + ... + a[c]) B^T[c] + b);  program: tile x BLOCK_N columns
            with a gain t = y_g[i] + s sum_c ..., then t + d t, then s b + that: an FMA each
A tile is up to 16 rows of one slot; i counts rows in the route's order, c the ranks of all slices side by side. The
grids cover what the shapes allow, and a program past the tiles in use or the rank of its slot ends at once: nothing is
read back, so a captured graph serves other routes. K is summed in chunks of CHUNK, and their sums in order, however
they are shared out: what is added to a row does not depend on the batch. h is fp32 and meets 16-bit factors as bf16
parts (fp16 ones in two); fp32 factors meet it in fp32. Only rank rows that a routed slot names are read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.batched_lora.pooled import check
from peft_kernels.ops.batched_lora.pooled_reference import FIRST_PAGE, PAGE
from peft_kernels.ops.batched_lora.route import HEADER, TILE, capacity
from peft_kernels.ops.batched_lora.route import reference as route_reference
from peft_kernels.ops.common.triton_activations import activated
from peft_kernels.ops.common.triton_products import (
    PROGRAMS,
    accumulator,
    exact_parts,
    low_parts,
    parts_beside_low,
    product_of_parts,
    product_of_splits,
)

CHUNK = tl.constexpr(512)  # of K; csrc/batched_lora/batched_lora.h has the same
ROWS = tl.constexpr(TILE)
RANKS = tl.constexpr(16)  # of one program of the shrink and one step of the expand: two pages
PAGE_ROWS = tl.constexpr(PAGE)
PAGES_AT = tl.constexpr(FIRST_PAGE)
ROUTE_AT = tl.constexpr(HEADER)


@triton.jit
def _tile_rows(route_ptr, M, capacity_offset):
    """Slot of this program's tile, its rows' places in the order and in x, and which of the 16 there are."""
    fields = route_ptr + capacity_offset + 3 * tl.program_id(0)
    slot, first, count = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    offs = tl.arange(0, ROWS)
    rows = tl.load(route_ptr + ROUTE_AT + M + first + offs, mask=offs < count, other=0)
    return slot, first + offs, rows.to(tl.int64), offs < count


@triton.jit
def _rank_rows(pages_ptr, ranks, rank, width):
    """Where the rank rows begin, in elements; `pages_ptr` points to the first page number of the slot."""
    page = tl.load(pages_ptr + ranks // PAGE_ROWS, mask=ranks < rank, other=0)
    return (page.to(tl.int64) * PAGE_ROWS + ranks % PAGE_ROWS) * width


@triton.jit
def _row_after_ranks(pages_ptr, row, offs_n, N, ACCUMULATOR: tl.constexpr):
    """A bias or gain [1, BLOCK_N]; zeros where there is none."""
    there = tl.where(row >= 0, N, 0)
    return tl.load(pages_ptr + row.to(tl.int64) * N + offs_n, mask=offs_n < there, other=0.0).to(ACCUMULATOR)[None, :]


@triton.jit(do_not_specialize=["M", "capacity_offset", "each", "stride_part"])
def _pool_shrink_kernel(
    h_ptr, x_ptr, pages_ptr, route_ptr, slices, M, capacity_offset, each, K, stride_xm, stride_h, stride_part,
    BLOCK_K: tl.constexpr, ACCUMULATOR: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """h of 16 ranks of a slice, for a tile of rows, over `each` chunks of K."""
    if tl.program_id(0) < tl.load(route_ptr):
        slot, places, rows, valid = _tile_rows(route_ptr, M, capacity_offset)
        block = tl.program_id(1)
        for g in tl.static_range(len(slices)):
            table_ptr, T, column = slices[g]
            row_ptr = table_ptr + slot.to(tl.int64) * (PAGES_AT + 2 * T)
            rank = tl.load(row_ptr)
            ranks = block * RANKS + tl.arange(0, RANKS)
            if block * RANKS < rank:
                a_rows = _rank_rows(row_ptr + PAGES_AT, ranks, rank, K)
                total = tl.zeros((ROWS, RANKS), ACCUMULATOR)
                for chunk in range(tl.program_id(2) * each, min((tl.program_id(2) + 1) * each, tl.cdiv(K, CHUNK))):
                    acc = tl.zeros((ROWS, RANKS), ACCUMULATOR)
                    for k in range(0, CHUNK, BLOCK_K):
                        offs_k = chunk * CHUNK + k + tl.arange(0, BLOCK_K)
                        x = tl.load(
                            x_ptr + rows[:, None] * stride_xm + offs_k[None, :],
                            mask=valid[:, None] & (offs_k < K)[None, :], other=0.0,
                        )  # fmt: skip
                        a = tl.load(
                            pages_ptr + a_rows[None, :] + offs_k[:, None],
                            mask=(ranks < rank)[None, :] & (offs_k < K)[:, None], other=0.0,
                        )  # fmt: skip
                        acc = product_of_parts(x, a, acc, FACTOR)
                    total += acc
                where = places.to(tl.int64)[:, None] * stride_h + column + ranks[None, :]
                mask = valid[:, None] & (ranks < rank)[None, :]
                tl.store(h_ptr + tl.program_id(2).to(tl.int64) * stride_part + where, total, mask=mask)


@triton.jit(do_not_specialize=["M", "capacity_offset", "parts", "stride_part"])
def _pool_expand_kernel(
    h_ptr, route_ptr, slices, M, capacity_offset, parts, stride_h, stride_part,
    BLOCK_N: tl.constexpr, ACCUMULATOR: tl.constexpr, PRODUCT: tl.constexpr,
    PARTS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of a slice, for a tile of rows."""
    if tl.program_id(0) < tl.load(route_ptr):
        slot, places, rows, valid = _tile_rows(route_ptr, M, capacity_offset)
        start = tl.program_id(1) * BLOCK_N
        for g in tl.static_range(len(slices)):
            y_ptr, stride_ym, pages_ptr, table_ptr, scaling_ptr, biases_ptr, biases, T, N, column, begin = slices[g]
            row_ptr = table_ptr + slot.to(tl.int64) * (PAGES_AT + 2 * T)
            rank = tl.load(row_ptr)
            activation = tl.load(row_ptr + 3)
            offs_n = start - begin + tl.arange(0, BLOCK_N)
            if (start >= begin) & (start < begin + tl.cdiv(N, BLOCK_N) * BLOCK_N) & (rank > 0):
                acc = tl.zeros((ROWS, BLOCK_N), ACCUMULATOR)
                for r in range(0, rank, RANKS):
                    ranks = r + tl.arange(0, RANKS)
                    h_ptrs = h_ptr + places.to(tl.int64)[:, None] * stride_h + column + ranks[None, :]
                    mask = valid[:, None] & (ranks < rank)[None, :]
                    h = tl.load(h_ptrs, mask=mask, other=0.0)
                    for part in range(1, parts):
                        h += tl.load(h_ptrs + tl.cast(part, tl.int64) * stride_part, mask=mask, other=0.0)
                    if (activation != 0) | (biases > 0):
                        a_ptrs = biases_ptr + slot.to(tl.int64) * (PAGE_ROWS * T) + ranks
                        h += tl.load(a_ptrs, mask=ranks < tl.minimum(rank, biases), other=0.0)[None, :]
                        h = tl.where(mask, activated(h, activation), 0.0)
                    b_rows = _rank_rows(row_ptr + PAGES_AT + T, ranks, rank, N)
                    b = tl.load(
                        pages_ptr + b_rows[:, None] + offs_n[None, :],
                        mask=(ranks < rank)[:, None] & (offs_n < N)[None, :], other=0.0,
                    )  # fmt: skip
                    acc = product_of_splits(h, b, acc, PRODUCT, PARTS, FACTOR, PARTS)
                bias = _row_after_ranks(pages_ptr, tl.load(row_ptr + 1), offs_n, N, ACCUMULATOR)
                gain_row = tl.load(row_ptr + 2)
                scaling = tl.load(scaling_ptr + slot)
                y_ptrs = y_ptr + rows[:, None] * stride_ym + offs_n[None, :]
                mask = valid[:, None] & (offs_n < N)[None, :]
                total = tl.load(y_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
                if gain_row >= 0:
                    gain = _row_after_ranks(pages_ptr, gain_row, offs_n, N, ACCUMULATOR)
                    total = tl.fma(acc, scaling, total)
                    total = tl.fma(total, gain, total)
                    total = tl.fma(bias, scaling, total)
                else:
                    total += scaling * (acc + bias)
                tl.store(y_ptrs, total.to(y_ptr.dtype.element_ty), mask=mask)


def _depth(x: Tensor, pages_in: Tensor) -> int:
    """Columns of x in one step of the shrink. Where rows lie on no 16 bytes, each element has an address of its own."""
    if x.shape[1] % 16:
        return 32 if x.dtype.itemsize == 2 else 16
    return 128 if x.dtype.itemsize == pages_in.dtype.itemsize == 2 else 32


def _shrink(x: Tensor, route: Tensor, pages_in: Tensor, table: list[Tensor], columns: list[int], tiles: int) -> Tensor:
    """h [parts, M, ranks of all slices]; what no routed slot has is not written."""
    M, K = x.shape
    double = x.dtype is torch.float64
    widths = [(t.shape[1] - FIRST_PAGE) // 2 for t in table]
    chunks, blocks = triton.cdiv(K, CHUNK.value), triton.cdiv(max(widths) * PAGE, RANKS.value)
    each = triton.cdiv(chunks, max(1, min(chunks, triton.cdiv(PROGRAMS, tiles))))
    parts = triton.cdiv(chunks, each)
    h = x.new_empty((parts, M, columns[-1]), dtype=accumulator(x.dtype))
    slices = tuple(zip(table, widths, columns, strict=False))
    _pool_shrink_kernel[(tiles, blocks, parts)](
        h, x, pages_in, route, slices, M, HEADER + 2 * M, each, K, x.stride(0), h.stride(1), h.stride(0),
        BLOCK_K=_depth(x, pages_in),
        ACCUMULATOR=tl.float64 if double else tl.float32, FACTOR=exact_parts(x.dtype, pages_in.dtype),
        num_warps=4, num_stages=2 if double else 3, maxnreg=128, enable_fp_fusion=True,
    )  # fmt: skip
    return h


def forward(
    y: list[Tensor],
    x: Tensor,
    route: Tensor,
    pages_in: Tensor,
    pages_out: list[Tensor],
    table: list[Tensor],
    scaling: list[Tensor],
    down_bias: list[Tensor],
) -> None:
    check(y, x, route, pages_in, pages_out, table, scaling, down_bias)
    M, tiles = x.shape[0], capacity(x.shape[0], table[0].shape[0])
    if tiles == 0:
        return
    double, narrow = x.dtype is torch.float64, pages_in.dtype.itemsize == 2
    wide = tl.float64 if double else tl.float32
    registers = 255 if double else 168  # as many as three blocks can have; fewer spill under Triton 3.6
    block = 128 if narrow and all(out.shape[1] % 16 == 0 for out in y) else 64
    columns, begin = [0], [0]
    for out, numbers in zip(y, table, strict=True):
        columns.append(columns[-1] + (numbers.shape[1] - FIRST_PAGE) // 2 * PAGE)
        begin.append(begin[-1] + triton.cdiv(out.shape[1], block) * block)
    slices = tuple(
        (out, out.stride(0), pages, numbers, s, a, a.numel() // len(s), (numbers.shape[1] - FIRST_PAGE) // 2,
         out.shape[1], column, start)
        for out, pages, numbers, s, a, column, start in zip(
            y, pages_out, table, scaling, down_bias, columns, begin, strict=False)
    )  # fmt: skip
    with torch.cuda.device_of(x):
        h = _shrink(x, route, pages_in, table, columns, tiles)
        _pool_expand_kernel[(tiles, begin[-1] // block)](
            h, route, slices, M, HEADER + 2 * M, h.shape[0], h.stride(1), h.stride(0),
            BLOCK_N=block, ACCUMULATOR=wide, PRODUCT=tl.bfloat16 if narrow else wide,
            PARTS=low_parts(pages_in.dtype, x.dtype), FACTOR=parts_beside_low(pages_in.dtype, pages_in.dtype),
            num_warps=4, num_stages=2, maxnreg=registers, enable_fp_fusion=True,
        )  # fmt: skip


FUNCTIONS = {"batched_lora_": forward, "batched_lora_route": route_reference}
