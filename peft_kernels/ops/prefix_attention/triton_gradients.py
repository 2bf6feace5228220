"""Gradients of prefix_attention that are sums over the rows: of the prefixes, and of the gates.

    dP_k[n] = sum over the rows of prefix n of scale (c dl_P)^T q      dP_v[n] = sum of g drop(w_P)^T dO
Grid (pieces x prefixes x key heads x tiles of P). The rows, each cut into chunks of queries, are one list; a piece is a
span of it, of which a program takes what belongs to its prefix, in order. Pieces are added in their order, so results
repeat bit for bit; how many there are depends on shapes only. A prefix that no row has gets zeros.
"""

import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.common.triton_products import PROGRAMS, as_number, product
from peft_kernels.ops.prefix_attention.triton_tiles import (
    Problem,
    backward_tile,
    features,
    inside,
    keep_factor,
    kept,
    key_rows,
    load_exponent,
    load_gate,
    options,
    prefix_logits,
    prefix_scores,
    query_rows,
    scores,
    sequence,
    strided,
    tile_rows,
)


@triton.jit
def prefix_tile(
    q, do, pk, pv, length, g, c, exponent, total, place, tile, offs_p, start, bias, numbers,
    COMPOSITION: tl.constexpr, OVER_PREFIX: tl.constexpr, PARTS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Of a tile: what c multiplies, w_P, drop(dO P_v^T), and the gradient of c times the former; `total` is D of a
    merged softmax and g D_P of one of its own."""
    raw = prefix_scores(q, pk, numbers, COMPOSITION, PARTS, ACCUMULATOR, D)
    weights, t, sees = prefix_logits(raw, c, length, place, tile, offs_p, bias, numbers, COMPOSITION, OVER_PREFIX)
    dw = kept(scores(do, pv, numbers, D, False, 1, ACCUMULATOR), tile, start, 1, numbers) * keep_factor(
        numbers, ACCUMULATOR
    )
    if COMPOSITION == "merge" or COMPOSITION == "add":
        weights = tl.exp(weights - exponent[:, None])
        dl = tl.where(weights == 0, 0.0, weights * (g[:, None] * dw - total[:, None]))
        if numbers[1] is not None:
            dl *= 1.0 - t * t
    elif COMPOSITION == "relu":
        dl = tl.where(weights > 0, g[:, None] * dw, weights)  # 0, or NaN
    else:
        dl = tl.where(sees, g[:, None] * dw, 0.0)
    return raw, weights, dw, dl


@triton.jit(do_not_specialize=["S", "T", "P", "prefixes", "tiles", "units", "piece", "chunks", "chunk"])
def _prefix_kernel(
    dpk_ptr, dpv_ptr, dout, exponent_ptr, total_ptr, q, pk, pv, bias, gate, key_gate, rows, numbers,
    S, T, P, prefixes, heads, tiles, units, piece, chunks, chunk,
    COMPOSITION: tl.constexpr, OVER_PREFIX: tl.constexpr, PARTS: tl.constexpr, ACCUMULATOR: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dP_k and dP_v [pieces, n, Hkv, P, D] of a tile of a prefix, over `piece` chunks of queries."""
    start_p = tl.program_id(0) % tiles * BLOCK_N
    kv, number = tl.program_id(0) // tiles % heads, tl.program_id(0) // tiles // heads % prefixes
    first = tl.program_id(0) // tiles // heads // prefixes * piece
    sizes = (S, T, P, prefixes, heads)
    length = tl.cast(P, tl.int32)
    if rows[1] is not None:
        length = min(max(tl.load(rows[1] + number), 0), P)
    offs_p = start_p + tl.arange(0, BLOCK_N)
    there = offs_p < length
    keys = key_rows(pk, number, kv, offs_p, there, D, BLOCK_D)
    values = key_rows(pv, number, kv, offs_p, there, D, BLOCK_D)
    of_key, of_value = tl.zeros((BLOCK_N, BLOCK_D), ACCUMULATOR), tl.zeros((BLOCK_N, BLOCK_D), ACCUMULATOR)
    for unit in range(first, min(first + piece, units)):
        row, begin = unit // chunks, unit % chunks * chunk
        place, n, _length = sequence(row, rows, sizes)
        end = tl.where((n == number) & (start_p < length), min(begin + chunk, place[2] * GROUP), 0)
        for start in range(begin, end, BLOCK_M):
            tile = tile_rows(start, kv, place, sizes, GROUP, BLOCK_M)
            g, c = load_gate(gate, row, tile[1], ACCUMULATOR), load_gate(key_gate, row, tile[1], ACCUMULATOR)
            query, do = query_rows(q, place, tile, D, BLOCK_D), query_rows(dout, place, tile, D, BLOCK_D)
            total = tl.load(total_ptr + tile[3], mask=tile[2], other=0.0)
            if COMPOSITION == "add":
                total *= g
            _raw, weights, _dw, dl = prefix_tile(
                query, do, keys, values, length, g, c, load_exponent(exponent_ptr, tile), total, place, tile, offs_p,
                start_p, bias, numbers, COMPOSITION, OVER_PREFIX, PARTS, ACCUMULATOR, D,
            )  # fmt: skip
            if dpk_ptr is not None:
                dl *= c[:, None]
                if COMPOSITION == "linear":
                    phi = features(query[0], ACCUMULATOR).to(query[0].dtype)
                    of_key = product(tl.trans(dl.to(query[0].dtype)), phi, of_key)
                else:
                    dl *= as_number(numbers[0], ACCUMULATOR)
                    of_key = product(tl.trans(dl.to(query[0].dtype)), query[0], of_key)
            if dpv_ptr is not None:
                weights = kept(weights, tile, start_p, 1, numbers) * keep_factor(numbers, ACCUMULATOR) * g[:, None]
                of_value = product(tl.trans(weights.to(do[0].dtype)), do[0], of_value)
    place_p = (tl.cast(tl.program_id(0) // tiles, tl.int64) * P + offs_p)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]
    written = inside(offs_p < P, D, BLOCK_D)
    if dpk_ptr is not None:
        of_key = tl.where(there[:, None], of_key, 0.0)
        tl.store(dpk_ptr + place_p, of_key.to(dpk_ptr.dtype.element_ty), mask=written)
    if dpv_ptr is not None:
        of_value = tl.where(there[:, None], of_value, 0.0)
        tl.store(dpv_ptr + place_p, of_value.to(dpv_ptr.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["S", "T", "P", "prefixes"])
def _gate_kernel(
    sums_ptr, parts_ptr, rows, S, T, P, prefixes, heads, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums [rows, Hq] of parts [B, Hq, S]."""
    row, h = tl.program_id(0) // (heads * GROUP), tl.program_id(0) % (heads * GROUP)
    place, _, _ = sequence(row, rows, (S, T, P, prefixes, heads))
    total = tl.zeros((BLOCK,), parts_ptr.dtype.element_ty)
    parts_ptr += (tl.cast(place[0], tl.int64) * heads * GROUP + h) * S + place[1]
    for s in range(0, place[2], BLOCK):
        offs = s + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + offs, mask=offs < place[2], other=0.0)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


def _pieces(S: int, P: int, programs: int, count: int, group: int, block: int) -> tuple[int, int, int, int]:
    """How the rows are cut: (chunks of a row, rows of a tile in a chunk, chunks in a piece, pieces)."""
    chunk = 8 * block
    chunks = max(1, triton.cdiv(S * group, chunk))
    units = max(1, count * chunks)
    piece = triton.cdiv(units, min(units, triton.cdiv(PROGRAMS, max(programs, 1))))
    return chunks, chunk, piece, triton.cdiv(units, piece)


def prefix_gradients(dpk, dpv, dout, exponent, total, query, prefix_key, prefix_value, given: Problem) -> None:
    """Fills dpk and dpv, those that are not None; `total` is D of a merged softmax, D_P of one of its own."""
    if prefix_key.numel() == 0:
        return
    (prefixes, heads, P, _), group = prefix_key.shape, given.constants["GROUP"]
    tile = backward_tile(query, group, extra=given.extra)
    tiles = triton.cdiv(P, tile.N)
    programs = prefixes * heads * tiles
    chunks, chunk, piece, pieces = _pieces(query.shape[2], P, programs, given.count, group, tile.M)
    parts = [
        None if grad is None else grad if pieces == 1 else exponent.new_empty((pieces, *grad.shape))
        for grad in (dpk, dpv)
    ]
    names = ("COMPOSITION", "OVER_PREFIX", "PARTS", "ACCUMULATOR", "GROUP", "D", "BLOCK_D")
    _prefix_kernel[(pieces * programs,)](
        *parts, strided(dout), exponent, total, *map(strided, (query, prefix_key, prefix_value)),
        *given.masks[1:], given.rows, given.numbers, *given.sizes, tiles, given.count * chunks, piece, chunks, chunk,
        **{name: given.constants[name] for name in names}, BLOCK_M=tile.M, BLOCK_N=tile.N, **options(tile),
    )  # fmt: skip
    for grad, part in zip((dpk, dpv), parts, strict=True):
        if part is not grad:
            grad.copy_(part.sum(0))


def gate_gradient(parts: Tensor, gate: Tensor, given: Problem) -> Tensor:
    """Of a gate, from what each query adds to it."""
    heads, group = given.sizes[4], given.constants["GROUP"]
    sums = parts.new_empty((given.count, heads * group))
    if sums.numel() > 0:
        _gate_kernel[(sums.numel(),)](sums, parts, given.rows, *given.sizes, GROUP=group, BLOCK=128, num_warps=4)
    for dim in (0, 1):
        if gate.shape[dim] == 1:
            sums = sums.sum(dim, keepdim=True)
    return sums.to(gate.dtype)
