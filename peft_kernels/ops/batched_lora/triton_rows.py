"""The kernels of batched_lora's training form in Triton: three products over the rows of one adapter at a time.

    shrink    low[i] = s drop(wide[i]) F           h = s drop(x) A^T        ds = s dy B
    expand    out[i] = bias + sum mask (low[i] F)  y before x W^T           dx before dy W
    gradient  D = sum_i low[i]^T drop(wide[i])     dB^T = h^T dy (and db)   dA = ds^T drop(x)
wide [M, K], dy_g [M, N_g]; low [M, H], fp32 (fp64): row i holds R_l numbers from its projection's column on. An entry's
rows are found in the route and gathered by number; a program reads rows of one adapter at a time, and of other adapters
neither rows nor factors: NaN stays where it is. low goes into products with 16-bit numbers as bf16 parts, fp16 too.
Grids: shrink (TILES tiles of the route, rank blocks, projections), expand (TILES tiles, spans of columns), gradient
(entries x rank blocks, column blocks, pieces of an entry's rows); what a program finds nothing to do for ends at once.
"""

import triton
import triton.language as tl

from peft_kernels.ops.batched_lora.triton_entries import (
    ADAPTER,
    BIAS,
    COLUMN,
    GRADIENT_A,
    GRADIENT_B,
    KEEP_BELOW,
    MEMBER,
    ORDER_AT,
    RANK,
    ROWS,
    SUMS_A,
    SUMS_B,
    A,
    B,
    entry_of,
    factor,
    field,
    rows_of_adapter,
    run_of_tiles,
    scaling_of,
)
from peft_kernels.ops.common.triton_dropout import keep_rows
from peft_kernels.ops.common.triton_products import product_of_parts, product_of_splits


@triton.jit
def _row_numbers(route_ptr, M, positions, valid, ACCUMULATOR: tl.constexpr):
    """Rows of x that stand at some positions of the order; 0 where not valid."""
    rows = tl.load(route_ptr + ORDER_AT + M + positions, mask=valid, other=0)
    if tl.float64 == ACCUMULATOR:  # Triton 3.6 fails at fp64 products if it sees rows of 4 bytes come into their mask
        rows = tl.sum(rows[:, None], 1)
    return rows.to(tl.int64)


@triton.jit
def _ranks(table_ptr, L, entry, EVEN_R: tl.constexpr):
    """An entry's rank, and where its part of a row of h begins; EVEN_R: all ranks are multiples of 8."""
    rank, column = field(table_ptr, L, entry, RANK).to(tl.int32), field(table_ptr, L, entry, COLUMN)
    if EVEN_R:
        rank, column = tl.multiple_of(rank, 8), tl.multiple_of(column, 8)
    return rank, column


@triton.jit
def _place(start, wide, start_r, ranks, width, rank, OF_A: tl.constexpr):
    """Where (column start + wide of x or y, rank start_r + ranks) stands in A [R, K] or B [N, R], in elements. Inside
    the tile 32 bits do, and save registers."""
    if OF_A:
        return tl.cast(start_r, tl.int64) * width + start + (ranks * width + wide)
    return tl.cast(start, tl.int64) * rank + start_r + (wide * rank + ranks)


@triton.jit(do_not_specialize=["member", "M", "L", "tiles_at"])
def _shrink_kernel(
    low_ptr, wide_ptr, seed_ptr, route_ptr, table_ptr, member, M, K, L, tiles_at, stride_wm, stride_lm,
    TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, ACCUMULATOR: tl.constexpr, OF_A: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNMENT: tl.constexpr, EVEN_R: tl.constexpr, DROPOUT: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """low[rows, column : column + R] = s drop(wide) F for one projection; F is A^T (OF_A) or B, of DTYPE."""
    start_r = tl.program_id(1) * BLOCK_R
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    for which in range(TILES):
        adapter, first, count = run_of_tiles(route_ptr, tiles_at, tl.program_id(0) * TILES, which, TILES)
        if count > 0:
            entry = entry_of(table_ptr, L, adapter, member + tl.program_id(2))
            rank, column = _ranks(table_ptr, L, tl.maximum(entry, 0), EVEN_R)
            if (entry >= 0) & (start_r < rank):
                offs_m = tl.arange(0, TILES * ROWS)
                rows = _row_numbers(route_ptr, M, first + offs_m, offs_m < count, ACCUMULATOR)
                keep_below = field(table_ptr, L, entry, KEEP_BELOW).to(tl.int32)
                acc = tl.zeros((TILES * ROWS, BLOCK_R), ACCUMULATOR)
                f_ptr = factor(table_ptr, L, entry, A if OF_A else B, DTYPE, ALIGNMENT)
                for k in range(0, K, BLOCK_K):
                    mask_k = offs_k < K - k
                    wide_ptrs = wide_ptr + rows[:, None] * stride_wm + (k + offs_k)[None, :]
                    wide = tl.load(wide_ptrs, mask=(offs_m < count)[:, None] & mask_k[None, :], other=0.0)
                    f_ptrs = f_ptr + _place(k, offs_k[:, None], start_r, offs_r[None, :], K, rank, OF_A)
                    f = tl.load(f_ptrs, mask=mask_k[:, None] & (offs_r < rank - start_r)[None, :], other=0.0)
                    if DROPOUT:
                        keep = keep_rows(seed_ptr, rows, k, entry, keep_below, TILES * ROWS, BLOCK_K)
                        wide = tl.where(keep, wide, 0.0)
                    acc = product_of_parts(wide, f, acc, FACTOR)
                if DROPOUT:
                    acc *= 65536.0 / tl.cast(keep_below, ACCUMULATOR)
                acc *= scaling_of(table_ptr, L, entry).to(ACCUMULATOR)
                low_ptrs = low_ptr + rows[:, None] * stride_lm + column + start_r + offs_r[None, :]
                tl.store(low_ptrs, acc, mask=(offs_m < count)[:, None] & (offs_r < rank - start_r)[None, :])


@triton.jit
def _expanded(
    low_ptr, seed_ptr, table_ptr, entry, rows, valid, start_n, N, L, stride_lm,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ACCUMULATOR: tl.constexpr,
    OF_A: tl.constexpr, DTYPE: tl.constexpr, PRODUCT: tl.constexpr, ALIGNMENT: tl.constexpr, EVEN_R: tl.constexpr,
    DROPOUT: tl.constexpr, PARTS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """What an entry adds to BLOCK_N columns of some rows."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N - start_n
    rank, column = _ranks(table_ptr, L, entry, EVEN_R)
    f_ptr = factor(table_ptr, L, entry, A if OF_A else B, DTYPE, ALIGNMENT)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    for r in range(0, rank, BLOCK_R):
        mask_r = offs_r < rank - r
        low_ptrs = low_ptr + rows[:, None] * stride_lm + column + r + offs_r[None, :]
        low = tl.load(low_ptrs, mask=valid[:, None] & mask_r[None, :], other=0.0)
        f_ptrs = f_ptr + _place(start_n, offs_n[None, :], r, offs_r[:, None], N, rank, OF_A)
        f = tl.load(f_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
        acc = product_of_splits(low, f, acc, PRODUCT, PARTS, FACTOR, 2)
    if OF_A:
        if DROPOUT:
            keep_below = field(table_ptr, L, entry, KEEP_BELOW).to(tl.int32)
            keep = keep_rows(seed_ptr, rows, start_n, entry, keep_below, BLOCK_M, BLOCK_N)
            acc = tl.where(keep, acc * (65536.0 / tl.cast(keep_below, ACCUMULATOR)), 0.0)
    else:
        columns = tl.where(field(table_ptr, L, entry, BIAS) != 0, N - start_n, 0)
        bias_ptr = factor(table_ptr, L, entry, BIAS, DTYPE, 1) + start_n
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < columns, other=0.0)
        acc += (scaling_of(table_ptr, L, entry).to(ACCUMULATOR) * bias.to(ACCUMULATOR))[None, :]
    return acc


@triton.jit(do_not_specialize=["member", "members", "M", "L", "tiles_at", "span"])
def _expand_kernel(
    out_ptr, low_ptr, bias_ptr, seed_ptr, route_ptr, table_ptr, member, members, M, N, L, tiles_at, span, stride_lm,
    TILES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ACCUMULATOR: tl.constexpr,
    OF_A: tl.constexpr, DTYPE: tl.constexpr, PRODUCT: tl.constexpr, ALIGNMENT: tl.constexpr, EVEN_R: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, PARTS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """out[rows] = bias + what the entries of `members` projections from `member` on add; F is B^T or A (OF_A)."""
    BLOCK_M: tl.constexpr = TILES * ROWS
    offs_m = tl.arange(0, BLOCK_M)
    begin = tl.program_id(1) * span * BLOCK_N
    end = tl.minimum(begin + span * BLOCK_N, N)
    alone = tl.load(route_ptr + 1) + tl.program_id(0) * BLOCK_M + offs_m  # rows without an adapter stand last
    for which in range(TILES + 1):
        adapter, first, count = run_of_tiles(
            route_ptr, tiles_at, tl.program_id(0) * TILES, tl.minimum(which, TILES - 1), TILES
        )
        own = which < TILES
        positions = tl.where(own, first + offs_m, alone)
        valid = positions < tl.where(own, first + count, M)
        if tl.max(valid.to(tl.int32), 0) > 0:
            rows = _row_numbers(route_ptr, M, positions, valid, ACCUMULATOR)
            for start_n in range(begin, end, BLOCK_N):
                offs_n = start_n + tl.arange(0, BLOCK_N)
                total = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
                if own:
                    for g in range(member, member + members):
                        entry = entry_of(table_ptr, L, adapter, g)
                        if entry >= 0:
                            total += _expanded(
                                low_ptr, seed_ptr, table_ptr, entry, rows, valid, start_n, N, L, stride_lm,
                                BLOCK_M, BLOCK_N, BLOCK_R, ACCUMULATOR, OF_A, DTYPE, PRODUCT, ALIGNMENT, EVEN_R,
                                DROPOUT, PARTS, FACTOR,
                            )  # fmt: skip
                if HAS_BIAS:
                    total += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(ACCUMULATOR)[None, :]
                out_ptrs = out_ptr + rows[:, None] * N + offs_n[None, :]
                mask = valid[:, None] & (offs_n < N)[None, :]
                tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["member", "rank_blocks", "M", "L", "tiles_at", "pieces"])
def _gradient_kernel(
    sums_ptr, wide_ptr, low_ptr, seed_ptr, route_ptr, table_ptr, member, rank_blocks, M, N, L, tiles_at, pieces,
    stride_wm, stride_lm, stride_piece,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ACCUMULATOR: tl.constexpr,
    OF_A: tl.constexpr, DTYPE: tl.constexpr, EVEN_R: tl.constexpr, DROPOUT: tl.constexpr, HAS_LOW: tl.constexpr,
    PRODUCT: tl.constexpr, PARTS: tl.constexpr, WIDE_PARTS: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """dA of every entry from x and ds (OF_A), or dB and db of a projection's entries from dy and h; DIRECT: in DTYPE,
    to the entry's own tensors, else a piece of the sums."""
    entry = tl.program_id(0) // rank_blocks
    start_r = tl.program_id(0) % rank_blocks * BLOCK_R
    out = field(table_ptr, L, entry, GRADIENT_A if OF_A else GRADIENT_B)
    bias = field(table_ptr, L, entry, BIAS)
    rank, column = _ranks(table_ptr, L, entry, EVEN_R)
    wanted = (out != 0) & (start_r < rank)
    if not OF_A:
        wanted = (wanted | (bias != 0) & (start_r == 0)) & (field(table_ptr, L, entry, MEMBER) == member)
    if wanted:
        first, count = rows_of_adapter(route_ptr, tiles_at, field(table_ptr, L, entry, ADAPTER))
        each = tl.cdiv(tl.cdiv(count, pieces), BLOCK_M) * BLOCK_M
        begin = tl.program_id(2) * each
        end = tl.minimum(begin + each, count)
        keep_below = field(table_ptr, L, entry, KEEP_BELOW).to(tl.int32)
        offs_r = tl.arange(0, BLOCK_R)
        mask_r = offs_r < rank - start_r
        start_n = tl.program_id(1) * BLOCK_N
        offs_n = tl.arange(0, BLOCK_N)
        mask_n = offs_n < N - start_n
        acc = tl.zeros((BLOCK_R, BLOCK_N), ACCUMULATOR)
        total = tl.zeros((BLOCK_N,), ACCUMULATOR)
        for m in range(begin, end, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            valid = offs_m < end
            rows = _row_numbers(route_ptr, M, first + offs_m, valid, ACCUMULATOR)
            wide_ptrs = wide_ptr + rows[:, None] * stride_wm + (start_n + offs_n)[None, :]
            wide = tl.load(wide_ptrs, mask=valid[:, None] & mask_n[None, :], other=0.0)
            if not OF_A:
                total += tl.sum(wide.to(ACCUMULATOR), 0)
            if DROPOUT:
                keep = keep_rows(seed_ptr, rows, start_n, entry, keep_below, BLOCK_M, BLOCK_N)
                wide = tl.where(keep, wide, 0.0)
            if HAS_LOW:
                low_ptrs = low_ptr + rows[None, :] * stride_lm + column + start_r + offs_r[:, None]
                low = tl.load(low_ptrs, mask=valid[None, :] & mask_r[:, None], other=0.0)
                acc = product_of_splits(low, wide, acc, PRODUCT, PARTS, WIDE_PARTS, PARTS)
        if DROPOUT:
            acc *= 65536.0 / tl.cast(keep_below, ACCUMULATOR)
        total *= scaling_of(table_ptr, L, entry).to(ACCUMULATOR)
        mask = (offs_r < tl.where(out != 0, rank - start_r, 0))[:, None] & mask_n[None, :]
        mask_bias = offs_n < tl.where((bias != 0) & (start_r == 0), N - start_n, 0)
        where = _place(start_n, offs_n[None, :], start_r, offs_r[:, None], N, rank, OF_A)
        if DIRECT:
            tl.store(out.to(tl.pointer_type(DTYPE)) + where, acc.to(DTYPE), mask=mask)
            if not OF_A:
                tl.store(bias.to(tl.pointer_type(DTYPE)) + start_n + offs_n, total.to(DTYPE), mask=mask_bias)
        else:
            sums_ptr += tl.program_id(2).to(tl.int64) * stride_piece
            sums_ptr += field(table_ptr, L, entry, SUMS_A if OF_A else SUMS_B)
            tl.store(sums_ptr + where, acc, mask=mask)
            if not OF_A:
                tl.store(sums_ptr + rank.to(tl.int64) * N + start_n + offs_n, total, mask=mask_bias)


@triton.jit(do_not_specialize=["member", "L", "pieces"])
def _sum_kernel(
    sums_ptr, table_ptr, member, N, L, pieces, stride_piece,
    BLOCK: tl.constexpr, OF_A: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The pieces of an entry's gradient added up, always in the same order."""
    entry = tl.program_id(0)
    if OF_A | (field(table_ptr, L, entry, MEMBER) == member):
        out = field(table_ptr, L, entry, GRADIENT_A if OF_A else GRADIENT_B)
        bias = field(table_ptr, L, entry, BIAS)
        size = field(table_ptr, L, entry, RANK) * N
        offs = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < tl.where(out != 0, size, 0)
        mask_bias = (offs >= size) & (offs < size + (0 if OF_A else tl.where(bias != 0, N, 0)))
        sums_ptr += field(table_ptr, L, entry, SUMS_A if OF_A else SUMS_B)
        total = tl.load(sums_ptr + offs, mask=mask | mask_bias, other=0.0)
        for piece in range(1, pieces):
            piece_ptr = sums_ptr + tl.cast(piece, tl.int64) * stride_piece
            total += tl.load(piece_ptr + offs, mask=mask | mask_bias, other=0.0)
        tl.store(out.to(tl.pointer_type(DTYPE)) + offs, total.to(DTYPE), mask=mask)
        if not OF_A:
            tl.store(bias.to(tl.pointer_type(DTYPE)) + offs - size, total.to(DTYPE), mask=mask_bias)
