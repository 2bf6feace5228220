"""lora_embedding on CUDA tensors in Triton: the same signatures and results as embedding_reference.py.

Forward, two kernels: h = s A[:, ids]^T [M, R] in fp32 (fp64 for fp64), gathered column by column (below), then
r + h B^T by the GEMM over [x | h] and [W | B] without its base (triton_gemm.py). An id outside of [0, V) gives zeros.
Backward: ds = s dy B and dB = dy^T h (triton_backward.py), then dA: ids are sorted, stably, and the program at the
first place of a run of equal ids adds the rows of ds that have it and stores the column once. Sums depend on the ids
alone, nothing is atomic: results repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.common.triton_products import (
    TYPES,
    accumulator,
    as_number,
    low_type,
    number,
    rank_block,
    unit_rows,
)
from peft_kernels.ops.lora_linear.embedding import check, check_backward
from peft_kernels.ops.lora_linear.triton_backward import factor_gradients
from peft_kernels.ops.lora_linear.triton_gemm import LowRank, concat_gemm
from peft_kernels.ops.lora_linear.triton_tiles import MOST_ADAPTERS, store_parts


@triton.jit(do_not_specialize=["M"])
def _gather_kernel(
    h_ptr, parts_ptr, ids_ptr, adapters, M, V, stride_hm, stride_part,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, ACCUMULATOR: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """h[:, offset : offset + R] = scaling A[:, ids]^T for each adapter."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start_r = tl.program_id(1) * BLOCK_R
    offs_r = start_r + tl.arange(0, BLOCK_R)
    ids = tl.load(ids_ptr + offs_m, mask=offs_m < M, other=-1).to(tl.int64)
    known = (ids >= 0) & (ids < V)
    for i in tl.static_range(len(adapters)):
        a_ptr, stride_ar, stride_av, R, offset, scaling = adapters[i]
        if start_r < R:
            a_ptrs = a_ptr + ids[:, None] * stride_av + offs_r.to(tl.int64)[None, :] * stride_ar
            a = tl.load(a_ptrs, mask=known[:, None] & (offs_r < R)[None, :], other=0.0)
            h = a.to(ACCUMULATOR) * as_number(scaling, ACCUMULATOR)
            where = offs_m.to(tl.int64)[:, None] * stride_hm + offset + offs_r[None, :]
            mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
            tl.store(h_ptr + where, h, mask=mask)
            if PARTS > 0:
                store_parts(h, parts_ptr + where, stride_part, mask, PARTS)


@triton.jit(do_not_specialize=["M", "padding_idx"])
def _columns_kernel(
    da_ptr, ds_ptr, tokens_ptr, order_ptr, M, V, R, padding_idx, stride_dsm,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """da[:, v] = the sum of ds over the run of v in the sorted tokens, which begins at this program's place."""
    place = tl.program_id(0)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    token = tl.load(tokens_ptr + place).to(tl.int64)
    before = tl.load(tokens_ptr + place - 1, mask=place > 0, other=-1).to(tl.int64)
    if (before != token) & (token >= 0) & (token < V) & (token != padding_idx):
        total = tl.zeros((BLOCK_R,), ACCUMULATOR)
        found = tl.full((), BLOCK_M, tl.int32)
        start = place
        while found == BLOCK_M:
            offs = start + tl.arange(0, BLOCK_M)
            mine = tl.load(tokens_ptr + offs, mask=offs < M, other=-1).to(tl.int64) == token
            rows = tl.load(order_ptr + offs, mask=mine, other=0)
            ds_ptrs = ds_ptr + rows[:, None] * stride_dsm + offs_r[None, :]
            total += tl.sum(tl.load(ds_ptrs, mask=mine[:, None] & (offs_r < R)[None, :], other=0.0), 0)
            found = tl.sum(mine.to(tl.int32), 0)
            start += BLOCK_M
        da_ptrs = da_ptr + offs_r.to(tl.int64) * V + token
        tl.store(da_ptrs, total.to(da_ptr.dtype.element_ty), mask=offs_r < R)


def _gather(residual: Tensor, ids: Tensor, lora_A: list[Tensor], scaling: list[float]) -> tuple[Tensor, Tensor]:
    """h [M, R] of ids [M], contiguous, and what the GEMM takes of it: two bf16 parts [2, M, R], or itself [1, M, R]."""
    M, V, ranks, dtype = ids.shape[0], lora_A[0].shape[1], [a.shape[0] for a in lora_A], accumulator(residual.dtype)
    R, widest = sum(ranks), max(ranks)
    h = residual.new_empty((M, R), dtype=dtype)
    parts = residual.new_empty((2, M, R), dtype=low_type(residual.dtype)) if residual.dtype.itemsize == 2 else None
    rows, columns = 512 // rank_block(widest), rank_block(widest)
    for first in range(0, len(lora_A), MOST_ADAPTERS):
        group = range(first, min(first + MOST_ADAPTERS, len(lora_A)))
        begin = sum(ranks[:first])
        adapters = tuple(
            (lora_A[i], *lora_A[i].stride(), ranks[i], sum(ranks[first:i]), number(scaling[i], dtype)) for i in group
        )
        _gather_kernel[(triton.cdiv(M, rows), triton.cdiv(widest, columns))](
            h[:, begin:], None if parts is None else parts[..., begin:], ids, adapters, M, V, R, M * R,
            BLOCK_M=rows, BLOCK_R=columns, ACCUMULATOR=TYPES[dtype], PARTS=0 if parts is None else 2,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return h, h[None] if parts is None else parts


def forward(
    residual: Tensor,
    ids: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    padding_idx: int | None,
) -> tuple[Tensor, Tensor]:
    check(residual, ids, lora_A, lora_B, scaling, padding_idx)
    y, ranks = residual.new_empty(residual.shape), [a.shape[0] for a in lora_A]
    if ids.numel() == 0:
        return y, residual.new_empty((0, sum(ranks)), dtype=accumulator(residual.dtype))
    rows = y.view(-1, y.shape[-1])
    with torch.cuda.device_of(residual):
        h, parts = _gather(residual, ids.reshape(-1).contiguous(), lora_A, scaling)
        of = parts.split(ranks, dim=2)
        low_rank = [LowRank(low, b.t(), i, 65536) for i, (low, b) in enumerate(zip(of, lora_B, strict=True))]
        concat_gemm(rows, None, None, [], low_rank, unit_rows(residual.reshape(rows.shape)))
    return y, h


def _columns(like: Tensor, ds: Tensor, tokens: Tensor, order: Tensor, padding_idx: int | None) -> Tensor:
    """dA [R, V] in the dtype of `like`, from ds [M, R] and the sorted tokens with the rows that they came from."""
    (R, V), M = like.shape, tokens.shape[0]
    da = like.new_zeros((R, V))
    _columns_kernel[(M, triton.cdiv(R, rank_block(R)))](
        da, ds, tokens, order, M, V, R, -1 if padding_idx is None else padding_idx, ds.stride(0),
        BLOCK_M=32, BLOCK_R=rank_block(R), ACCUMULATOR=TYPES[ds.dtype], num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return da


def backward(
    dy: Tensor,
    ids: Tensor,
    h: Tensor | None,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    padding_idx: int | None,
    needs: list[bool],
) -> list[Tensor]:
    check_backward(dy, ids, h, lora_A, lora_B, scaling, padding_idx, needs)
    like, L = [*lora_A, *lora_B], len(lora_A)
    if ids.numel() == 0:
        return [t.new_zeros(t.shape if need else 0) for t, need in zip(like, needs, strict=True)]
    rows, grads, begin = unit_rows(dy.reshape(-1, dy.shape[-1])), [t.new_empty(0) for t in like], 0
    with torch.cuda.device_of(dy):
        if any(needs[:L]):
            tokens, order = ids.reshape(-1).contiguous().sort(stable=True)
        for i, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
            R, needs_a, needs_b = a.shape[0], needs[i], needs[L + i]
            ds = dy.new_empty((rows.shape[0], R), dtype=accumulator(dy.dtype)) if needs_a else None
            if needs_a or needs_b:
                low = h[:, begin : begin + R] if needs_b else None
                db = factor_gradients(rows, low, b, scaling[i], ds, None, needs_db=needs_b)
            if needs_b:
                grads[L + i] = db
            if needs_a:
                grads[i] = _columns(a, ds, tokens, order, padding_idx)
            begin += R
    return grads


FUNCTIONS = {"lora_embedding": forward, "lora_embedding_backward": backward}
