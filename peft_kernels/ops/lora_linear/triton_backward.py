"""The backward of lora_linear in Triton.

    ds_l = s_l dy B_l   and   dB_l = dy^T h_l     one pass over dy for each adapter
    dx   = sum_g dy_g W_g + sum_l mask_l * (ds_l A_l) / (1 - p)     one GEMM (triton_gemm.py)
    dA_l = ds_l^T drop_l(x)                       one pass over x, the mask replayed
    dW, db: PyTorch (a LoRA's base is frozen)
Every pass is cut into pieces along the rows, and ds along N; pieces are added in a fixed order by a second kernel, so
nothing is atomic and results repeat. ds is fp32; next to 16-bit operands it and h go in as bf16 parts, and fp16 too.
Left operands are tiles as they were loaded, what is computed (masked x, parts of h, B and x) stands on the right, in
shared memory; beside parts of dy, those of h stand on the left, with 32 rows at most, for which Triton has mma.sync.
Grids: (N tiles, rank blocks, pieces of M) and (K tiles, rank blocks, pieces of M).
"""

from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.common.dropout import threshold
from peft_kernels.ops.common.triton_dropout import keep_tile
from peft_kernels.ops.common.triton_products import (
    accumulator,
    exact_parts,
    low_parts,
    low_type,
    parts_beside_low,
    product_of_parts,
    product_of_splits,
    split,
    unit_rows,
)
from peft_kernels.ops.lora_linear.op import check_backward
from peft_kernels.ops.lora_linear.triton_gemm import Base, LowRank, concat_gemm
from peft_kernels.ops.lora_linear.triton_tiles import (
    MOST_ADAPTERS,
    architecture,
    factor_tile,
    input_tile,
    sum_partials,
)


@triton.jit(do_not_specialize=["M", "M_piece"])
def _factor_kernel(
    ds_ptr, db_ptr, dy_ptr, b_ptr, h_ptr, M, N, R, M_piece, scaling,
    stride_dym, stride_bn, stride_br, stride_hm, stride_hr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ACCUMULATOR: tl.constexpr,
    NEEDS_DS: tl.constexpr, NEEDS_DB: tl.constexpr, FACTOR: tl.constexpr, PARTS: tl.constexpr,
    DY_PARTS: tl.constexpr,
):  # fmt: skip
    """ds [N tiles, M, R] and db [pieces of M, N, R], partial sums. FACTOR: parts of B; PARTS, DY_PARTS: of h and dy."""
    tile_n, start_r, piece = tl.program_id(0), tl.program_id(1) * BLOCK_R, tl.program_id(2)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = start_r + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    columns, ranks = offs_n.to(tl.int64), offs_r.to(tl.int64)
    if NEEDS_DS:
        b_ptrs = b_ptr + columns[:, None] * stride_bn + ranks[None, :] * stride_br
        b = tl.load(b_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
    if DY_PARTS > 1:  # noqa: SIM108
        db = tl.zeros((BLOCK_R, BLOCK_N), ACCUMULATOR)
    else:
        db = tl.zeros((BLOCK_N, BLOCK_R), ACCUMULATOR)
    begin = piece * M_piece
    end = min(begin + M_piece, M)
    for m in range(begin, end, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m, rows = offs_m < end, offs_m.to(tl.int64)
        dy_ptrs = dy_ptr + rows[:, None] * stride_dym + offs_n[None, :]
        dy = tl.load(dy_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        if NEEDS_DS:
            ds = product_of_parts(dy, b, tl.zeros((BLOCK_M, BLOCK_R), ACCUMULATOR), FACTOR) * scaling
            ds_ptrs = ds_ptr + (tile_n.to(tl.int64) * M + rows[:, None]) * R + offs_r[None, :]
            tl.store(ds_ptrs, ds, mask=mask_m[:, None] & mask_r[None, :])
        if NEEDS_DB:
            h_ptrs = h_ptr + rows[:, None] * stride_hm + ranks[None, :] * stride_hr
            h = tl.load(h_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
            if DY_PARTS > 1:
                db = product_of_splits(tl.trans(h), dy, db, tl.bfloat16, PARTS, DY_PARTS, PARTS)
            else:
                db = product_of_parts(tl.trans(dy), h, db, PARTS)
    if NEEDS_DB:
        if DY_PARTS > 1:
            db = tl.trans(db)
        db_ptrs = db_ptr + (piece.to(tl.int64) * N + columns[:, None]) * R + offs_r[None, :]
        tl.store(db_ptrs, db, mask=mask_n[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["first", "M", "M_piece"])
def _input_kernel(
    da_ptr, x_ptr, seed_ptr, adapters, first, M, K, M_piece, stride_xm, stride_dsm, stride_piece, stride_part,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, ACCUMULATOR: tl.constexpr,
    DROPOUT: tl.constexpr, PARTS: tl.constexpr, X_PARTS: tl.constexpr,
):  # fmt: skip
    """da [pieces of M, R, K] for each adapter, R rows from `offset` on; its mask's stream counts from `first`."""
    start_k, start_r, piece = tl.program_id(0) * BLOCK_K, tl.program_id(1) * BLOCK_R, tl.program_id(2)
    offs_k = start_k + tl.arange(0, BLOCK_K)
    offs_r = start_r + tl.arange(0, BLOCK_R)
    begin = piece * M_piece
    end = min(begin + M_piece, M)
    for i in tl.static_range(len(adapters)):
        ds_ptr, R, offset, stream, keep_below = adapters[i]
        if start_r < R:
            da = tl.zeros((BLOCK_R, BLOCK_K), ACCUMULATOR)
            for m in range(begin, end, BLOCK_M):
                offs_m = m + tl.arange(0, BLOCK_M)
                mask_m, rows = offs_m < end, offs_m.to(tl.int64)
                x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k[None, :]
                x = tl.load(x_ptrs, mask=mask_m[:, None] & (offs_k < K)[None, :], other=0.0)
                if DROPOUT:
                    keep = keep_tile(seed_ptr, m, start_k, first + stream, keep_below, BLOCK_M, BLOCK_K)
                    x = tl.where(keep, x, 0.0)
                for p in tl.static_range(PARTS):
                    ds_ptrs = ds_ptr + tl.cast(stride_part, tl.int64) * p
                    ds_ptrs += rows[None, :] * stride_dsm + offs_r[:, None]
                    ds = tl.load(ds_ptrs, mask=mask_m[None, :] & (offs_r < R)[:, None], other=0.0)
                    da = product_of_parts(ds, x, da, X_PARTS if p + X_PARTS <= PARTS else PARTS - p)
            if DROPOUT:
                da *= 65536.0 / tl.cast(keep_below, ACCUMULATOR)
            da_ptrs = da_ptr + piece.to(tl.int64) * stride_piece
            da_ptrs += (offset + offs_r).to(tl.int64)[:, None] * K + offs_k[None, :]
            tl.store(da_ptrs, da, mask=(offs_r < R)[:, None] & (offs_k < K)[None, :])


def factor_gradients(
    dy: Tensor, h: Tensor | None, lora_B: Tensor, scaling: float, ds: Tensor | None, ds_parts: Tensor | None,
    *, needs_db: bool,
) -> Tensor | None:  # fmt: skip
    """Fills ds [M, R] and the parts of ds, where given; returns dB [N, R]. One pass over dy [M, N]."""
    (M, N), R, dtype = dy.shape, lora_B.shape[1], accumulator(dy.dtype)
    tile = factor_tile(architecture(dy), dy.dtype, R, N)
    grid = triton.cdiv(N, tile.N), triton.cdiv(R, tile.K)
    pieces, M_piece = split(M, tile.M, grid[0] * grid[1])
    partial_ds = None if ds is None else dy.new_empty((grid[0], M, R), dtype=dtype)
    partial_db = dy.new_empty((pieces, N, R), dtype=dtype) if needs_db else None
    double = dtype is torch.float64  # Triton takes a Python float as fp32
    _factor_kernel[(*grid, pieces)](
        partial_ds, partial_db, dy, lora_B, h, M, N, R, M_piece, 1.0 if double else scaling,
        dy.stride(0), *lora_B.stride(), *(h.stride() if needs_db else (0, 0)),
        BLOCK_M=tile.M, BLOCK_N=tile.N, BLOCK_R=tile.K, ACCUMULATOR=tl.float64 if double else tl.float32,
        NEEDS_DS=ds is not None, NEEDS_DB=needs_db,
        FACTOR=exact_parts(dy.dtype, lora_B.dtype), PARTS=low_parts(dy.dtype, lora_B.dtype),
        DY_PARTS=parts_beside_low(dy.dtype, dy.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if ds is not None:
        sum_partials(ds, partial_ds.mul_(scaling) if double else partial_ds, ds_parts)
    if not needs_db:
        return None
    db = lora_B.new_empty((N, R))
    sum_partials(db, partial_db)
    return db


def _input_gradients(
    x: Tensor, ds: list[Tensor], dropout_p: list[float], streams: list[int], seed: Tensor | None,
    like: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """dA_l [R_l, K] in the dtype of `like[l]`, from parts of ds_l [parts, M, R_l]; x is read once for all."""
    (M, K), ranks, dtype = x.shape, [d.shape[2] for d in ds], accumulator(x.dtype)
    tile = input_tile(x.dtype, max(ranks))
    grid = triton.cdiv(K, tile.K), triton.cdiv(max(ranks), tile.N)
    pieces, M_piece = split(M, tile.M, grid[0] * grid[1])
    partial = x.new_empty((pieces, sum(ranks), K), dtype=dtype)
    for start in range(0, len(ds), MOST_ADAPTERS):
        group, first = range(start, min(start + MOST_ADAPTERS, len(ds))), streams[start]
        adapters = tuple(
            (ds[i], ranks[i], sum(ranks[start:i]), streams[i] - first, threshold(dropout_p[i])) for i in group
        )
        _input_kernel[(*grid, pieces)](
            partial[:, sum(ranks[:start]) :], x, seed, adapters, first, M, K, M_piece,
            x.stride(0), ds[0].stride(1), partial.stride(0), ds[0].stride(0),
            BLOCK_M=tile.M, BLOCK_R=tile.N, BLOCK_K=tile.K,
            ACCUMULATOR=tl.float64 if dtype is torch.float64 else tl.float32,
            DROPOUT=any(threshold(p) < 65536 for p in dropout_p), PARTS=ds[0].shape[0],
            X_PARTS=parts_beside_low(x.dtype, x.dtype),
            num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    out = [tensor.new_empty(tensor.shape) for tensor in like]
    for da, block in zip(out, partial.split(ranks, dim=1), strict=True):
        sum_partials(da, block)
    return out


def _low_rank_gradients(dys, x, h, lora_A, lora_B, member, scaling, dropout_p, seed, needs_x, needs_a, needs_b):
    """(ds_l [parts, M, R_l] or None, dA or None, dB or None) of every adapter; booleans say what is needed."""
    M, L, ranks = dys[0].shape[0], len(lora_A), [a.shape[0] for a in lora_A]
    narrow = dys[0].dtype.itemsize == 2
    wanted = [needs_x or a for a in needs_a]
    ds = parts = None
    if any(wanted):
        ds = dys[0].new_empty((M, sum(ranks)), dtype=accumulator(dys[0].dtype))
        if narrow:
            count = low_parts(dys[0].dtype, lora_A[0].dtype)
            parts = dys[0].new_empty((count, M, sum(ranks)), dtype=low_type(dys[0].dtype))
    starts = [sum(ranks[:i]) for i in range(L)]
    db: list[Tensor | None] = [None] * L
    for i in range(L):
        if wanted[i] or needs_b[i]:
            mine = slice(starts[i], starts[i] + ranks[i])
            db[i] = factor_gradients(
                dys[member[i]], h[:, mine] if needs_b[i] else None, lora_B[i], scaling[i],
                ds[:, mine] if wanted[i] else None, parts[:, :, mine] if wanted[i] and narrow else None,
                needs_db=needs_b[i],
            )  # fmt: skip
    if ds is None:
        return [None] * L, [None] * L, db
    of = list((parts if narrow else ds[None]).split(ranks, dim=2))
    da: list[Tensor | None] = [None] * L
    chosen = [i for i in range(L) if needs_a[i]]
    if chosen:
        few = _input_gradients(
            unit_rows(x), [of[i] for i in chosen], [dropout_p[i] for i in chosen], chosen, seed,
            [lora_A[i] for i in chosen],
        )  # fmt: skip
        for i, gradient in zip(chosen, few, strict=True):
            da[i] = gradient
    return of, da, db


def backward(
    dy: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    weight: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    member: list[int],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    check_backward(dy, x, h, weight, lora_A, lora_B, member, scaling, dropout_p, seed, needs)
    return gradients(dy, x, h, weight, lora_A, lora_B, member, scaling, dropout_p, seed, needs)


def gradients(dy, x, h, weight, lora_A, lora_B, member, scaling, dropout_p, seed, needs) -> list[Tensor]:
    """The same for arguments that have been checked. Without weights (lora_add) those of the adapters and x alone."""
    G, L, K = len(weight), len(lora_A), lora_A[0].shape[1]
    likes = [weight, weight, lora_A, lora_B, lora_B]
    like = [dy[0], *chain.from_iterable(likes)]
    shapes = [[t.shape for t in weight], [t.shape[:1] for t in weight], [t.shape for t in lora_A]]
    shapes += [[t.shape for t in lora_B], [t.shape[:1] for t in lora_B]]
    dx_shape = (*dy[0].shape[:-1], K)
    if dy[0].numel() == 0:
        shape = [dx_shape, *chain.from_iterable(shapes)]
        return [t.new_zeros(s if need else 0) for t, s, need in zip(like, shape, needs, strict=True)]
    dys = [unit_rows(d.reshape(-1, d.shape[-1])) for d in dy]
    rows = None if x is None else x.reshape(-1, K)
    ends = [1, 1 + G, 1 + 2 * G, 1 + 2 * G + L, 1 + 2 * G + 2 * L]
    needs_w, needs_bias, needs_a, needs_b, needs_c = (
        needs[start : start + len(group)] for start, group in zip(ends, likes, strict=True)
    )
    with torch.cuda.device_of(dy[0]):
        ds, da, db = _low_rank_gradients(
            dys, rows, h, lora_A, lora_B, member, scaling, dropout_p, seed, needs[0], needs_a, needs_b
        )
        dx = None
        if needs[0]:
            dx = dy[0].new_empty((dys[0].shape[0], K))
            low_rank = [LowRank(ds[i], lora_A[i], i, threshold(dropout_p[i])) for i in range(L)]
            concat_gemm(dx, None, seed, [Base(dys[g], weight[g]) for g in range(G)], low_rank)
            dx = dx.view(dx_shape)
    summed = _members_to_sum(needs_bias or [False] * len(dys), needs_c, member)
    sums = [_column_sum(d) if need else None for d, need in zip(dys, summed, strict=True)]
    grads = [dx, *(dys[g].mT @ rows if needs_w[g] else None for g in range(G))]
    grads += [sums[g].to(weight[g].dtype) if needs_bias[g] else None for g in range(G)]
    grads += [*da, *db]
    grads += [(scaling[i] * sums[member[i]]).to(lora_B[i].dtype) if needs_c[i] else None for i in range(L)]
    return [t.new_empty(0) if grad is None else grad for grad, t in zip(grads, like, strict=True)]


def _members_to_sum(needs_bias: list[bool], needs_lora_bias: list[bool], member: list[int]) -> list[bool]:
    """Which projections need the column sums of their dy."""
    return [
        need or any(needs_lora_bias[i] and owner == g for i, owner in enumerate(member))
        for g, need in enumerate(needs_bias)
    ]


def _column_sum(dy: Tensor) -> Tensor:
    return dy.sum(0, dtype=accumulator(dy.dtype))
