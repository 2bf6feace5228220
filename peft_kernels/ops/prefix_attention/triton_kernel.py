"""prefix_attention on CUDA tensors in Triton: the same signatures and results as reference.py.

One kernel, grid (rows x key heads x tiles of S G): BLOCK_M queries of one sequence and of all G heads that read one key
head meet the keys of their prefix, in place and shared by all rows that have it, and then their own, up to the last
that they see. Softmax in one pass: o and the sum are scaled down whenever the maximum rises. merge carries one sum
through both loops; the others end their own keys first and add the prefix to o. Sums in fp32 (fp64 for fp64).
Backward: triton_backward.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.common.triton_products import accumulator, product
from peft_kernels.ops.prefix_attention.op import check
from peft_kernels.ops.prefix_attention.triton_backward import backward
from peft_kernels.ops.prefix_attention.triton_tiles import (
    by_token,
    forward_tile,
    inside,
    keep_factor,
    kept,
    key_rows,
    keys_seen,
    load_gate,
    options,
    own_logits,
    prefix_logits,
    prefix_scores,
    problem,
    query_pointers,
    query_rows,
    scores,
    sequence,
    strided,
    tile_rows,
)


@triton.jit
def _step(top, total, acc, logits):
    """The maximum, the sum and o after a tile of logits, and the weights of the tile."""
    top_now = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(top_now == float("-inf"), 0.0, top_now)
    weights = tl.exp(logits - base[:, None])
    shrink = tl.exp(top - base)
    return top_now, total * shrink + tl.sum(weights, 1), acc * shrink[:, None], weights


@triton.jit
def _own_keys(
    top, total, acc, q, k, v, kv, start, place, tile, mask, numbers,
    CAUSAL: tl.constexpr, BOOL: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """The softmax of a tile of queries over its own keys."""
    b, first_key, keys = place[0], place[3], place[4]
    begin, end = keys_seen(start, place, numbers, CAUSAL, GROUP, BLOCK_M, BLOCK_N)
    for t in range(begin, end, BLOCK_N):
        offs_t = t + tl.arange(0, BLOCK_N)
        of_keys = key_rows(k, b, kv, first_key + offs_t, offs_t < keys, D, BLOCK_D)
        x = scores(q, of_keys, numbers, D, False, 1, ACCUMULATOR)
        logits, _ = own_logits(x, place, tile, offs_t, mask, numbers, CAUSAL, BOOL)
        top, total, acc, weights = _step(top, total, acc, logits)
        values = key_rows(v, b, kv, first_key + offs_t, offs_t < keys, D, BLOCK_D)[0]
        acc = product(kept(weights, tile, t, 0, numbers).to(values.dtype), values, acc)
    return top, total, acc


@triton.jit
def _prefix_keys(
    top, total, acc, q, pk, pv, kv, n, length, g, c, place, tile, bias, numbers,
    COMPOSITION: tl.constexpr, OVER_PREFIX: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """The softmax over a prefix, or the sum of what relu and linear make of it."""
    for p in range(0, length, BLOCK_N):
        offs_p = p + tl.arange(0, BLOCK_N)
        keys = key_rows(pk, n, kv, offs_p, offs_p < length, D, BLOCK_D)
        raw = prefix_scores(q, keys, numbers, COMPOSITION, PARTS, ACCUMULATOR, D)
        weights, _, _ = prefix_logits(raw, c, length, place, tile, offs_p, bias, numbers, COMPOSITION, OVER_PREFIX)
        if COMPOSITION == "merge" or COMPOSITION == "add":
            top, total, acc, weights = _step(top, total, acc, weights)
        weights = kept(weights, tile, p, 1, numbers) * g[:, None]
        values = key_rows(pv, n, kv, offs_p, offs_p < length, D, BLOCK_D)[0]
        acc = product(weights.to(values.dtype), values, acc)
    return top, total, acc


@triton.jit
def _ended(top, total, acc):
    """o and its log-sum-exp; 0 and -inf where nothing was seen."""
    nothing = total == 0
    lse = tl.where(nothing, float("-inf"), top + tl.log(tl.where(nothing, 1.0, total)))
    return tl.where(nothing[:, None], 0.0, acc / tl.where(nothing, 1.0, total)[:, None]), lse


@triton.jit(do_not_specialize=["S", "T", "P", "prefixes", "tiles"])
def _forward_kernel(
    out, lse_ptr, prefix_lse_ptr, q, k, v, pk, pv, mask, bias, gate, key_gate, rows, numbers,
    S, T, P, prefixes, heads, tiles,
    COMPOSITION: tl.constexpr, CAUSAL: tl.constexpr, OVER_PREFIX: tl.constexpr, BOOL: tl.constexpr,
    PARTS: tl.constexpr, ACCUMULATOR: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o, lse and, where the prefix has its own, prefix_lse of a tile of queries."""
    start = tl.program_id(0) % tiles * BLOCK_M
    kv, row = tl.program_id(0) // tiles % heads, tl.program_id(0) // tiles // heads
    sizes = (S, T, P, prefixes, heads)
    place, n, length = sequence(row, rows, sizes)
    if start >= place[2] * GROUP:
        return
    tile = tile_rows(start, kv, place, sizes, GROUP, BLOCK_M)
    g, c = load_gate(gate, row, tile[1], ACCUMULATOR), load_gate(key_gate, row, tile[1], ACCUMULATOR)
    query = query_rows(q, place, tile, D, BLOCK_D)
    top = tl.full((BLOCK_M,), float("-inf"), ACCUMULATOR)
    total = tl.zeros((BLOCK_M,), ACCUMULATOR)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACCUMULATOR)
    if COMPOSITION == "merge":
        top, total, acc = _prefix_keys(
            top, total, acc, query, pk, pv, kv, n, length, g, c, place, tile, bias, numbers,
            COMPOSITION, OVER_PREFIX, PARTS, D, BLOCK_D, BLOCK_N, ACCUMULATOR,
        )  # fmt: skip
    top, total, acc = _own_keys(
        top, total, acc, query, k, v, kv, start, place, tile, mask, numbers,
        CAUSAL, BOOL, GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N, ACCUMULATOR,
    )  # fmt: skip
    acc, lse = _ended(top, total, acc)
    tl.store(lse_ptr + tile[3], lse, mask=tile[2])
    if COMPOSITION == "add":
        top, total, of_prefix = _prefix_keys(
            tl.full((BLOCK_M,), float("-inf"), ACCUMULATOR), tl.zeros((BLOCK_M,), ACCUMULATOR), tl.zeros_like(acc),
            query, pk, pv, kv, n, length, g, c, place, tile, bias, numbers,
            COMPOSITION, OVER_PREFIX, PARTS, D, BLOCK_D, BLOCK_N, ACCUMULATOR,
        )  # fmt: skip
        of_prefix, lse = _ended(top, total, of_prefix)
        tl.store(prefix_lse_ptr + tile[3], lse, mask=tile[2])
        acc += of_prefix
    elif COMPOSITION != "merge":
        top, total, acc = _prefix_keys(
            top, total, acc, query, pk, pv, kv, n, length, g, c, place, tile, bias, numbers,
            COMPOSITION, OVER_PREFIX, PARTS, D, BLOCK_D, BLOCK_N, ACCUMULATOR,
        )  # fmt: skip
    acc = (acc * keep_factor(numbers, ACCUMULATOR)).to(out[0].dtype.element_ty)
    tl.store(query_pointers(out, place, tile, BLOCK_D), acc, mask=inside(tile[2], D, BLOCK_D))


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_ids: Tensor | None,
    prefix_lengths: Tensor | None,
    attn_mask: Tensor | None,
    prefix_bias: Tensor | None,
    gate: Tensor | None,
    key_gate: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    *numbers_and_seed,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and prefix_lse."""
    others = (prefix_ids, prefix_lengths, attn_mask, prefix_bias, gate, key_gate, cu_seqlens_q, cu_seqlens_k)
    check(query, key, value, prefix_key, prefix_value, *others, *numbers_and_seed)
    given = problem(query, key, prefix_key, *others, *numbers_and_seed)
    out, lse = by_token(query), query.new_empty(query.shape[:3], dtype=accumulator(query.dtype))
    added = numbers_and_seed[0] == "add"
    prefix_lse = torch.empty_like(lse) if added else lse.new_empty(0)
    group = given.constants["GROUP"]
    tile = forward_tile(query, group, extra=given.extra)
    tiles = triton.cdiv(query.shape[2] * group, tile.M)
    if query.numel() > 0:
        with torch.cuda.device_of(query):
            _forward_kernel[(given.count * key.shape[1] * tiles,)](
                strided(out), lse, prefix_lse if added else None,
                *(strided(t) for t in (query, key, value, prefix_key, prefix_value)),
                *given.masks, given.rows, given.numbers, *given.sizes, tiles,
                **given.constants, BLOCK_M=tile.M, BLOCK_N=tile.N, **options(tile),
            )  # fmt: skip
    return out, lse, prefix_lse


FUNCTIONS = {"prefix_attention": forward, "prefix_attention_backward": backward}
