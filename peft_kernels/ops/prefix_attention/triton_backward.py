"""The backward of prefix_attention in Triton (reference.py derives it), from o and the log-sum-exps alone.

    query kernel   grid (rows x key heads x tiles of S G): D = rowsum(dO o), what own weights are reduced by, dq, and of
                   each query the gates' parts, rowsum(w_P drop(dO P_v^T)) and rowsum(dl_P scale q P_k^T)
    key kernel     grid (rows x key heads x tiles of T): dK and dV, over the queries that see a tile
    the prefixes'  triton_gradients.py
The weights of a tile are made again from q, K and the log-sum-exp in each of them. No atomics: every sum has one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.common.triton_products import as_number, product
from peft_kernels.ops.prefix_attention.op import check_backward
from peft_kernels.ops.prefix_attention.triton_gradients import gate_gradient, prefix_gradients, prefix_tile
from peft_kernels.ops.prefix_attention.triton_tiles import (
    Problem,
    backward_tile,
    by_token,
    inside,
    keep_factor,
    kept,
    key_pointers,
    key_rows,
    keys_seen,
    load_exponent,
    load_gate,
    options,
    own_logits,
    problem,
    query_pointers,
    query_rows,
    scores,
    sequence,
    strided,
    tile_rows,
)


@triton.jit
def _own_tile(
    q, do, k, v, exponent, total, place, tile, offs_t, start, mask, numbers,
    CAUSAL: tl.constexpr, BOOL: tl.constexpr, ACCUMULATOR: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Of a tile: drop(w_X), and the gradient of q K^T."""
    x = scores(q, k, numbers, D, False, 1, ACCUMULATOR)
    logits, t = own_logits(x, place, tile, offs_t, mask, numbers, CAUSAL, BOOL)
    weights = tl.exp(logits - exponent[:, None])
    factor = keep_factor(numbers, ACCUMULATOR)
    dw = kept(scores(do, v, numbers, D, False, 1, ACCUMULATOR), tile, start, 0, numbers) * factor
    dl = tl.where(weights == 0, 0.0, weights * (dw - total[:, None]))  # no part, even of what is NaN
    if numbers[1] is not None:
        dl *= 1.0 - t * t
    return kept(weights, tile, start, 0, numbers) * factor, dl * as_number(numbers[0], ACCUMULATOR)


@triton.jit
def _prefix_part(
    query, do, pk, pv, kv, n, length, g, c, exponent, total, place, tile, bias, numbers,
    COMPOSITION: tl.constexpr, OVER_PREFIX: tl.constexpr, PARTS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq by the prefix, rowsum(w_P dw_P), and rowsum(dl_P raw)."""
    acc = tl.zeros((query[0].shape[0], BLOCK_D), ACCUMULATOR)
    share, of_key_gate = tl.zeros_like(g), tl.zeros_like(g)
    if COMPOSITION == "add":
        for p in range(0, length, BLOCK_N):
            offs_p = p + tl.arange(0, BLOCK_N)
            keys = key_rows(pk, n, kv, offs_p, offs_p < length, D, BLOCK_D)
            values = key_rows(pv, n, kv, offs_p, offs_p < length, D, BLOCK_D)
            _raw, weights, dw, _dl = prefix_tile(
                query, do, keys, values, length, g, c, exponent, total, place, tile, offs_p, p, bias, numbers,
                COMPOSITION, OVER_PREFIX, PARTS, ACCUMULATOR, D,
            )  # fmt: skip
            share += tl.sum(weights * dw, 1)
        total = share * g
    for p in range(0, length, BLOCK_N):
        offs_p = p + tl.arange(0, BLOCK_N)
        keys = key_rows(pk, n, kv, offs_p, offs_p < length, D, BLOCK_D)
        values = key_rows(pv, n, kv, offs_p, offs_p < length, D, BLOCK_D)
        raw, weights, dw, dl = prefix_tile(
            query, do, keys, values, length, g, c, exponent, total, place, tile, offs_p, p, bias, numbers,
            COMPOSITION, OVER_PREFIX, PARTS, ACCUMULATOR, D,
        )  # fmt: skip
        if COMPOSITION != "add":
            share += tl.sum(weights * dw, 1)
        of_key_gate += tl.sum(dl * raw, 1)
        dl *= c[:, None]
        if COMPOSITION != "linear":
            dl *= as_number(numbers[0], ACCUMULATOR)
        acc = product(dl.to(keys[0].dtype), keys[0], acc)
    if COMPOSITION == "linear":
        x = query[0].to(ACCUMULATOR)
        acc *= tl.where(x > 0, 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    return acc, share, of_key_gate


@triton.jit(do_not_specialize=["S", "T", "P", "prefixes", "tiles"])
def _query_kernel(
    dq, total_ptr, share_ptr, of_key_gate_ptr, dout, out, lse_ptr, prefix_lse_ptr, q, k, v, pk, pv,
    mask, bias, gate, key_gate, rows, numbers, S, T, P, prefixes, heads, tiles,
    COMPOSITION: tl.constexpr, CAUSAL: tl.constexpr, OVER_PREFIX: tl.constexpr, BOOL: tl.constexpr,
    PARTS: tl.constexpr, ACCUMULATOR: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """total = D, less g D_P where the own keys have a softmax of their own; share = D_P; dq; what c's gradient sums."""
    start = tl.program_id(0) % tiles * BLOCK_M
    kv, row = tl.program_id(0) // tiles % heads, tl.program_id(0) // tiles // heads
    sizes = (S, T, P, prefixes, heads)
    place, n, length = sequence(row, rows, sizes)
    if start >= place[2] * GROUP:
        return
    tile = tile_rows(start, kv, place, sizes, GROUP, BLOCK_M)
    g, c = load_gate(gate, row, tile[1], ACCUMULATOR), load_gate(key_gate, row, tile[1], ACCUMULATOR)
    query, do = query_rows(q, place, tile, D, BLOCK_D), query_rows(dout, place, tile, D, BLOCK_D)
    o = query_rows(out, place, tile, D, BLOCK_D)[0]
    total = tl.sum(do[0].to(ACCUMULATOR) * o.to(ACCUMULATOR), 1)
    exponent, of_prefix = load_exponent(lse_ptr, tile), load_exponent(lse_ptr, tile)
    if COMPOSITION == "add":
        of_prefix = load_exponent(prefix_lse_ptr, tile)
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACCUMULATOR)
    if dq[0] is not None or share_ptr is not None or of_key_gate_ptr is not None or COMPOSITION != "merge":
        acc, share, of_key_gate = _prefix_part(
            query, do, pk, pv, kv, n, length, g, c, of_prefix, total, place, tile, bias, numbers,
            COMPOSITION, OVER_PREFIX, PARTS, ACCUMULATOR, D, BLOCK_D, BLOCK_N,
        )  # fmt: skip
        if COMPOSITION != "merge":
            total -= g * share
        if share_ptr is not None:
            tl.store(share_ptr + tile[3], share, mask=tile[2])
        if of_key_gate_ptr is not None:
            tl.store(of_key_gate_ptr + tile[3], of_key_gate, mask=tile[2])
    tl.store(total_ptr + tile[3], total, mask=tile[2])
    if dq[0] is not None:
        b, first_key, keys = place[0], place[3], place[4]
        begin, end = keys_seen(start, place, numbers, CAUSAL, GROUP, BLOCK_M, BLOCK_N)
        for t in range(begin, end, BLOCK_N):
            offs_t = t + tl.arange(0, BLOCK_N)
            key = key_rows(k, b, kv, first_key + offs_t, offs_t < keys, D, BLOCK_D)
            value = key_rows(v, b, kv, first_key + offs_t, offs_t < keys, D, BLOCK_D)
            _weights, dl = _own_tile(query, do, key, value, exponent, total, place, tile, offs_t, t, mask,
                                     numbers, CAUSAL, BOOL, ACCUMULATOR, D)  # fmt: skip
            acc = product(dl.to(key[0].dtype), key[0], acc)
        dq_pointers = query_pointers(dq, place, tile, BLOCK_D)
        tl.store(dq_pointers, acc.to(dq[0].dtype.element_ty), mask=inside(tile[2], D, BLOCK_D))


@triton.jit
def _queries_that_see(start, place, numbers, CAUSAL: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
                      BLOCK_N: tl.constexpr):  # fmt: skip
    """From which row to which any query sees a tile of own keys; the first is a multiple of BLOCK_M."""
    _, _, queries, _, keys = place
    begin, end = 0, queries * GROUP
    if CAUSAL:
        begin = max(0, start - keys + queries) * GROUP // BLOCK_M * BLOCK_M
    if numbers[2] is not None:
        last = min(start + BLOCK_N, keys) - 1
        end = min(end, (last + numbers[2] - keys + queries) * GROUP)
    return begin, end


@triton.jit(do_not_specialize=["S", "T", "P", "prefixes", "tiles"])
def _key_kernel(
    dk, dv, dout, lse_ptr, total_ptr, q, k, v, mask, rows, numbers, S, T, P, prefixes, heads, tiles,
    CAUSAL: tl.constexpr, BOOL: tl.constexpr, ACCUMULATOR: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of own keys."""
    start_t = tl.program_id(0) % tiles * BLOCK_N
    kv, row = tl.program_id(0) // tiles % heads, tl.program_id(0) // tiles // heads
    sizes = (S, T, P, prefixes, heads)
    place, _, _ = sequence(row, rows, sizes)
    if start_t >= place[4]:
        return
    offs_t = start_t + tl.arange(0, BLOCK_N)
    there, offs = offs_t < place[4], place[3] + offs_t
    key = key_rows(k, place[0], kv, offs, there, D, BLOCK_D)
    value = key_rows(v, place[0], kv, offs, there, D, BLOCK_D)
    of_key, of_value = tl.zeros((BLOCK_N, BLOCK_D), ACCUMULATOR), tl.zeros((BLOCK_N, BLOCK_D), ACCUMULATOR)
    begin, end = _queries_that_see(start_t, place, numbers, CAUSAL, GROUP, BLOCK_M, BLOCK_N)
    for start in range(begin, end, BLOCK_M):
        tile = tile_rows(start, kv, place, sizes, GROUP, BLOCK_M)
        query, do = query_rows(q, place, tile, D, BLOCK_D), query_rows(dout, place, tile, D, BLOCK_D)
        total = tl.load(total_ptr + tile[3], mask=tile[2], other=0.0)
        weights, dl = _own_tile(query, do, key, value, load_exponent(lse_ptr, tile), total, place, tile, offs_t,
                                start_t, mask, numbers, CAUSAL, BOOL, ACCUMULATOR, D)  # fmt: skip
        if dk[0] is not None:
            of_key = product(tl.trans(dl.to(query[0].dtype)), query[0], of_key)
        if dv[0] is not None:
            of_value = product(tl.trans(weights.to(do[0].dtype)), do[0], of_value)
    written = inside(there, D, BLOCK_D)
    if dk[0] is not None:
        tl.store(key_pointers(dk, place[0], kv, offs, BLOCK_D), of_key.to(dk[0].dtype.element_ty), mask=written)
    if dv[0] is not None:
        tl.store(key_pointers(dv, place[0], kv, offs, BLOCK_D), of_value.to(dv[0].dtype.element_ty), mask=written)


NOTHING = (None, 0, 0, 0)


def _query_gradient(dq, dout, out, sums, tensors, given: Problem, *, gated: tuple[bool, bool]):
    """Fills dq; total, share and what c's gradient sums, [B, Hq, S], the latter two where they are wanted."""
    lse, prefix_lse = sums
    q, added = tensors[0], given.constants["COMPOSITION"] == "add"
    total = torch.empty_like(lse)
    share = torch.empty_like(lse) if gated[0] or added else None
    of_key_gate = torch.empty_like(lse) if gated[1] else None
    group, heads = given.constants["GROUP"], given.sizes[4]
    tile = backward_tile(q, group, extra=given.extra)
    tiles = triton.cdiv(q.shape[2] * group, tile.M)
    if q.numel() > 0:
        _query_kernel[(given.count * heads * tiles,)](
            NOTHING if dq is None else strided(dq), total, share, of_key_gate, strided(dout), strided(out),
            lse, prefix_lse if added else None, *map(strided, tensors),
            *given.masks, given.rows, given.numbers, *given.sizes, tiles,
            **given.constants, BLOCK_M=tile.M, BLOCK_N=tile.N, **options(tile),
        )  # fmt: skip
    return total, share, of_key_gate


def _key_gradients(dk, dv, dout, lse, total, tensors, given: Problem) -> None:
    """Fills dk and dv, those that are not None."""
    q, k, v = tensors[:3]
    group, heads = given.constants["GROUP"], given.sizes[4]
    tile = backward_tile(q, group, extra=given.extra)
    tiles = triton.cdiv(k.shape[2], tile.N)
    names = ("CAUSAL", "BOOL", "ACCUMULATOR", "GROUP", "D", "BLOCK_D")
    if k.numel() > 0:
        _key_kernel[(given.count * heads * tiles,)](
            NOTHING if dk is None else strided(dk), NOTHING if dv is None else strided(dv), strided(dout), lse, total,
            *map(strided, (q, k, v)), given.masks[0], given.rows, given.numbers, *given.sizes, tiles,
            **{name: given.constants[name] for name in names}, BLOCK_M=tile.M, BLOCK_N=tile.N, **options(tile),
        )  # fmt: skip


def backward(
    dout: Tensor,
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
    out: Tensor,
    lse: Tensor,
    prefix_lse: Tensor,
    *numbers_seed_and_needs,
) -> list[Tensor]:
    """Gradients of (query, key, value, prefix_key, prefix_value, gate, key_gate)."""
    *numbers, needs = numbers_seed_and_needs
    others = (prefix_ids, prefix_lengths, attn_mask, prefix_bias, gate, key_gate, cu_seqlens_q, cu_seqlens_k)
    tensors = (query, key, value, prefix_key, prefix_value)
    check_backward(dout, *tensors, *others, out, lse, prefix_lse, *numbers, needs)
    given = problem(query, key, prefix_key, *others, *numbers)
    grads = [by_token(t) if need else None for t, need in zip(tensors[:3], needs[:3], strict=True)]
    grads += [t.new_empty(t.shape) if need else None for t, need in zip(tensors[3:], needs[3:5], strict=True)]
    lse, prefix_lse = lse.contiguous(), prefix_lse.contiguous()
    with torch.cuda.device_of(query):
        total, share, of_key_gate = _query_gradient(
            grads[0], dout, out, (lse, prefix_lse), tensors, given, gated=(needs[5], needs[6])
        )
        if needs[1] or needs[2]:
            _key_gradients(*grads[1:3], dout, lse, total, tensors, given)
        if needs[3] or needs[4]:
            sums = (lse, total) if prefix_lse.numel() == 0 else (prefix_lse, share)
            prefix_gradients(*grads[3:5], dout, *sums, query, prefix_key, prefix_value, given)
        for parts, like, need in zip((share, of_key_gate), (gate, key_gate), needs[5:], strict=True):
            grads.append(gate_gradient(parts, like, given) if need else None)
    return [query.new_empty(0) if grad is None else grad for grad in grads]
