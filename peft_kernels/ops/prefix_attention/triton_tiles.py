"""What the Triton kernels of prefix_attention share: which rows a tile has, its logits and weights, and tile sizes.

A row is a sequence: a batch index, or one of the packed. The G query heads of a key head are rows of one tile: row m of
a sequence's S G is query m // G of head m % G, so that one query a sequence fills G rows. Ids, lengths and ends are
read on the device and bounded there: an id that is out of range has no prefix.
Arguments travel in tuples: a tensor with its strides, (scale, softcap, window, keep_below, seed, D), None for what is
not there. P and the gradients of logits go into products rounded to the type of q, which for 16-bit types is what o and
the gradients are rounded to; fp32 sums elsewhere (fp64 for fp64).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.common.dropout import threshold
from peft_kernels.ops.common.triton_activations import tanh
from peft_kernels.ops.common.triton_dropout import keep_rows
from peft_kernels.ops.common.triton_products import (
    OPTIONS,
    TYPES,
    accumulator,
    as_number,
    exact_parts,
    number,
    product,
    product_of_splits,
)

CHUNK = tl.constexpr(16)


class Tile(NamedTuple):
    """Rows and keys of one program's tile, and how it is run."""

    M: int
    N: int
    num_warps: int
    num_stages: int


def _wide_tile(D: int, size: int) -> Tile:
    """For scalar products, which take the registers."""
    return Tile(16, 32, 8, 1) if size == 4 or D <= 64 else Tile(16, 16, 16 if D > 128 else 8, 1)


def forward_tile(q: Tensor, group: int, *, extra: int) -> Tile:
    """A pipelined wgmma must not take its left operand, the weights, from registers (triton issue 9433): 32 rows and
    fewer are multiplied by mma.sync, more than that are not pipelined."""
    M, D, size = group * q.shape[2], q.shape[3], q.element_size()
    rows, keys = 16 if M <= 16 else 32, 64 if D <= 128 and not extra else 32
    if size > 2:
        return Tile(rows, 32, 8 if extra else 4, 1) if size == 4 and D <= 64 else _wide_tile(D, size)
    if D > 128 and extra:
        return Tile(rows, keys, 8, 1)
    return Tile(rows, keys, 4, 2) if M <= 32 else Tile(64, keys, 4 if D <= 64 else 8, 1)


def backward_tile(q: Tensor, group: int, *, extra: int) -> Tile:
    """Likewise; what has more than scores and a softmax to keep in registers takes small tiles, or it would spill, as
    64 keys of 64 numbers do on sm_80."""
    M, D, size = group * q.shape[2], q.shape[3], q.element_size()
    if size > 2:
        return _wide_tile(D, size)
    if M > 32 and D <= 128 and not extra:
        return Tile(64, 32 if 32 < D <= 64 else 64, 4 if D <= 32 else 8, 1)
    return Tile(16 if D > 128 or extra > 1 else 32, 32, 4 if D <= 64 else 8, 1)


def strided(tensor: Tensor) -> tuple:
    """A tensor [.., .., .., D] whose D are neighbours, and its other strides; copied only where they are not."""
    tensor = tensor if tensor.stride(3) == 1 else tensor.contiguous()
    return tensor, *tensor.stride()[:3]


def by_token(like: Tensor) -> Tensor:
    """[B, H, S, D] that lies in memory as [B, S, H, D]."""
    B, H, S, D = like.shape
    return like.new_empty((B, S, H, D)).transpose(1, 2)


def broadcast(tensor: Tensor | None, shape: tuple[int, ...]) -> tuple:
    """A mask, bias or gate, which may have sizes of 1, and its strides over a whole shape."""
    if tensor is None:
        return None, *(0 for _ in shape)
    whole = tensor.expand(shape)
    return whole.view(torch.int8) if whole.dtype is torch.bool else whole, *whole.stride()


class Problem(NamedTuple):
    """What every kernel is given."""

    masks: tuple  # attn_mask and prefix_bias, gate and key_gate, each with its strides
    rows: tuple  # ids, lengths, ends of queries and of keys
    numbers: tuple
    sizes: tuple[int, ...]  # S, T, P, prefixes, key heads
    count: int  # rows
    extra: int  # what takes registers beside scores and softmaxes: 0 nothing, 1 masks or such, 2 features of q in parts
    constants: dict


def problem(
    query, key, prefix_key, prefix_ids, prefix_lengths, attn_mask, prefix_bias, gate, key_gate, cu_seqlens_q,
    cu_seqlens_k, composition, scale, is_causal, sliding_window, window_over_prefix, softcap, dropout_p, seed,
) -> Problem:  # fmt: skip
    """The arguments of an op as kernels take them."""
    (B, Hq, S, D), (_, Hkv, T, _), P = query.shape, key.shape, prefix_key.shape[2]
    rows, dtype = B if cu_seqlens_q is None else len(cu_seqlens_q) - 1, accumulator(query.dtype)
    vectors = (prefix_ids, prefix_lengths, cu_seqlens_q, cu_seqlens_k)
    drop = threshold(dropout_p) < 65536
    masked = any(t is not None for t in (attn_mask, prefix_bias, gate, key_gate))
    return Problem(
        (
            broadcast(attn_mask, (B, Hq, S, T)), broadcast(prefix_bias, (B, Hq, S, P)),
            broadcast(gate, (rows, Hq)), broadcast(key_gate, (rows, Hq)),
        ),
        tuple(None if t is None else t.contiguous() for t in vectors),
        (
            number(scale, dtype), number(softcap, dtype) if softcap else None, min(sliding_window, T + P + 1) or None,
            threshold(dropout_p) if drop else None, seed if drop else None, D,
        ),
        (S, T, P, len(prefix_key), Hkv),
        rows,
        2 if composition == "linear" else int(drop or softcap > 0 or composition != "merge" or masked),
        {
            "COMPOSITION": composition,
            "CAUSAL": is_causal,
            "OVER_PREFIX": window_over_prefix and sliding_window > 0,
            "BOOL": attn_mask is not None and attn_mask.dtype is torch.bool,
            "PARTS": exact_parts(query.dtype, dtype),
            "ACCUMULATOR": TYPES[dtype],
            "GROUP": Hq // Hkv,
            "D": D,
            "BLOCK_D": max(16, triton.next_power_of_2(D)),
        },
    )  # fmt: skip


def options(tile: Tile) -> dict:
    """What of a tile is no constant of the kernel."""
    registers = min(OPTIONS["maxnreg"], 65536 // (32 * tile.num_warps))
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **OPTIONS, "maxnreg": registers}


@triton.jit
def sequence(row, rows, sizes):
    """Of a row: (batch index, first query, queries, first key, keys), its prefix and that prefix's length."""
    ids_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr = rows
    S, T, P, prefixes, _ = sizes
    b, first, queries, first_key, keys = row, 0, S, 0, T
    if cu_q_ptr is not None:
        b = 0
        first = min(max(tl.load(cu_q_ptr + row), 0), S)
        queries = min(max(tl.load(cu_q_ptr + row + 1), first), S) - first
        first_key = min(max(tl.load(cu_k_ptr + row), 0), T)
        keys = min(max(tl.load(cu_k_ptr + row + 1), first_key), T) - first_key
    n = tl.full((), 0, tl.int32)
    if ids_ptr is not None:
        n = tl.load(ids_ptr + row)
    there = (n >= 0) & (n < prefixes)
    length = tl.where(there, P, 0)
    if lengths_ptr is not None:
        length = min(max(tl.load(lengths_ptr + n, mask=there, other=0), 0), P)
    return (b, first, queries, first_key, keys), n, length


@triton.jit
def tile_rows(start, kv, place, sizes, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of BLOCK_M rows: query in its sequence, head, whether it is there, and its place in [B, Hq, S]."""
    b, first, queries, _, _ = place
    S, _, _, _, heads = sizes
    offs_m = start + tl.arange(0, BLOCK_M)
    s, h = offs_m // GROUP, kv * GROUP + offs_m % GROUP
    there = s < queries
    return s, h, there, (tl.cast(b, tl.int64) * heads * GROUP + h) * S + first + s


@triton.jit
def query_pointers(tensor, place, tile, BLOCK_D: tl.constexpr):
    """Of the rows of a tile in a tensor [B, Hq, S, D]."""
    pointer, stride_b, stride_h, stride_s = tensor
    s, h, _, _ = tile
    rows = tl.cast(place[0], tl.int64) * stride_b + h.to(tl.int64) * stride_h
    rows += tl.cast(place[1] + s, tl.int64) * stride_s
    return pointer + rows[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def key_pointers(tensor, b, kv, offs_t, BLOCK_D: tl.constexpr):
    """Of keys in a tensor [B, Hkv, T, D]."""
    pointer, stride_b, stride_h, stride_t = tensor
    rows = tl.cast(b, tl.int64) * stride_b + tl.cast(kv, tl.int64) * stride_h + offs_t.to(tl.int64) * stride_t
    return pointer + rows[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def inside(mask, D, BLOCK_D: tl.constexpr):
    """Of the rows of a tile those that are there, and D of its columns."""
    return mask[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]


@triton.jit
def query_rows(tensor, place, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of a tile for `scores`: their numbers, pointers to the first CHUNK of each, and which are there."""
    numbers = tl.load(query_pointers(tensor, place, tile, BLOCK_D), mask=inside(tile[2], D, BLOCK_D), other=0.0)
    return numbers, query_pointers(tensor, place, tile, CHUNK), tile[2]


@triton.jit
def key_rows(tensor, b, kv, offs_t, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same of keys."""
    numbers = tl.load(key_pointers(tensor, b, kv, offs_t, BLOCK_D), mask=inside(there, D, BLOCK_D), other=0.0)
    return numbers, key_pointers(tensor, b, kv, offs_t, CHUNK), there


@triton.jit
def features(q, ACCUMULATOR: tl.constexpr):
    """elu(q) + 1."""
    q = q.to(ACCUMULATOR)
    return tl.where(q > 0, q + 1.0, tl.exp(tl.where(q > 0, 0.0, q)))


@triton.jit
def scores(a, b, numbers, D: tl.constexpr, FEATURES: tl.constexpr, PARTS: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """a b^T of two sets of rows, FEATURES: elu(a) + 1 for a. Wide numbers and features are read CHUNK columns at a
    time: whole rows of them, which a product takes from registers, would spill."""
    acc = tl.zeros((a[0].shape[0], b[0].shape[0]), ACCUMULATOR)
    if FEATURES or a[0].dtype == ACCUMULATOR:
        for d in range(0, numbers[5], CHUNK):  # not the constant, with which LLVM would unroll the loop, and spill
            left = tl.load(a[1] + d, mask=inside(a[2], D - d, CHUNK), other=0.0)
            right = tl.load(b[1] + d, mask=inside(b[2], D - d, CHUNK), other=0.0)
            if FEATURES:
                left = features(left, ACCUMULATOR)
            acc = product_of_splits(left, tl.trans(right), acc, b[0].dtype, PARTS, 1, PARTS)
    else:
        acc = product(a[0], tl.trans(b[0]), acc)
    return acc


@triton.jit
def load_gate(gate, row, h, DTYPE: tl.constexpr):
    """g or c of the rows of a tile."""
    pointer, stride_r, stride_h = gate
    if pointer is None:
        return tl.full(h.shape, 1.0, DTYPE)
    else:
        return tl.load(pointer + tl.cast(row, tl.int64) * stride_r + h.to(tl.int64) * stride_h).to(DTYPE)


@triton.jit
def load_exponent(lse_ptr, tile):
    """What logits are reduced by: the log-sum-exp of the rows of a tile, 0 where nothing was seen."""
    lse = tl.load(lse_ptr + tile[3], mask=tile[2], other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit
def keys_seen(start, place, numbers, CAUSAL: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """From which own key to which a tile of queries sees any; the first is a multiple of BLOCK_N."""
    _, _, queries, _, keys = place
    begin, end = 0, keys
    if CAUSAL:
        last = min(start + BLOCK_M, queries * GROUP) - 1
        end = min(keys, last // GROUP + keys - queries + 1)
    if numbers[2] is not None:
        begin = max(0, start // GROUP + keys - queries - numbers[2] + 1) // BLOCK_N * BLOCK_N
    return begin, end


@triton.jit
def _capped(logits, softcap):
    """cap(l), and the tanh that gives its derivative."""
    if softcap is None:
        return logits, logits
    else:
        cap = as_number(softcap, logits.dtype)
        t = tanh(logits / cap)
        return cap * t, t


@triton.jit
def _mask_pointers(mask, place, tile, offs_t):
    """Of a tile in [B, Hq, S, columns]; there are no packed sequences where there is a mask."""
    pointer, stride_b, stride_h, stride_s, stride_t = mask
    rows = tl.cast(place[0], tl.int64) * stride_b + tile[1].to(tl.int64) * stride_h + tile[0].to(tl.int64) * stride_s
    return pointer + rows[:, None] + (offs_t.to(tl.int64) * stride_t)[None, :]


@triton.jit
def own_logits(x, place, tile, offs_t, mask, numbers, CAUSAL: tl.constexpr, BOOL: tl.constexpr):
    """From a tile x of q K^T: logits, -inf for what is not seen, and the tanh of the cap."""
    scale, softcap, window, _, _, _ = numbers
    _, _, queries, _, keys = place
    s, _, there, _ = tile
    logits, t = _capped(x * as_number(scale, x.dtype), softcap)
    at = (s + keys - queries)[:, None]
    sees = there[:, None] & (offs_t < keys)[None, :]
    if mask[0] is not None:
        added = tl.load(_mask_pointers(mask, place, tile, offs_t), mask=sees, other=0)
        if BOOL:
            sees &= added != 0
        else:
            logits += added.to(logits.dtype)
    if CAUSAL:
        sees &= offs_t[None, :] <= at
    if window is not None:
        sees &= offs_t[None, :] > at - window
    return tl.where(sees, logits, float("-inf")), t


@triton.jit
def prefix_scores(q, pk, numbers, COMPOSITION: tl.constexpr, PARTS: tl.constexpr, ACCUMULATOR: tl.constexpr,
                  D: tl.constexpr):  # fmt: skip
    """What c multiplies: scale q P_k^T, or (elu(q) + 1) P_k^T."""
    raw = scores(q, pk, numbers, D, COMPOSITION == "linear", PARTS, ACCUMULATOR)
    if COMPOSITION != "linear":
        raw *= as_number(numbers[0], ACCUMULATOR)
    return raw


@triton.jit
def prefix_logits(
    raw, c, length, place, tile, offs_p, bias, numbers, COMPOSITION: tl.constexpr, OVER_PREFIX: tl.constexpr
):
    """Logits, -inf for what is not seen, the tanh of the cap, and what is seen; of relu and linear w_P."""
    _, softcap, window, _, _, _ = numbers
    s, _, there, _ = tile
    logits, t = raw * c[:, None], raw
    sees = there[:, None] & (offs_p < length)[None, :]
    if OVER_PREFIX:  # the prefix ends where the own keys begin
        sees &= (offs_p - length)[None, :] > (s + place[4] - place[2] - window)[:, None]
    if COMPOSITION == "merge" or COMPOSITION == "add":
        logits, t = _capped(logits, softcap)
        if bias[0] is not None:
            added = tl.load(_mask_pointers(bias, place, tile, offs_p), mask=sees, other=0.0)
            logits += added.to(logits.dtype)
        logits = tl.where(sees, logits, float("-inf"))
    else:
        if COMPOSITION == "relu":
            logits = tl.where(logits <= 0, 0.0, logits)
        logits = tl.where(sees, logits, 0.0)
    return logits, t, sees


@triton.jit
def kept(weights, tile, start, stream, numbers):
    """The weights of a tile that dropout keeps, not scaled yet; `start` is a multiple of 16."""
    if numbers[3] is None:
        return weights
    else:
        M: tl.constexpr = weights.shape[0]
        if weights.shape[1] >= 32:
            keep = keep_rows(numbers[4], tile[3], start, stream, numbers[3], M, weights.shape[1])
        else:  # a half of what is drawn together
            both = keep_rows(numbers[4], tile[3], start // 32 * 32, stream, numbers[3], M, 32).to(tl.int8)
            low, high = tl.split(tl.permute(tl.reshape(both, (M, 2, 16)), (0, 2, 1)))
            keep = tl.where(start % 32 == 0, low, high) != 0
        return tl.where(keep, weights, 0.0)


@triton.jit
def keep_factor(numbers, DTYPE: tl.constexpr):
    """What kept weights are multiplied by."""
    if numbers[3] is None:
        return tl.full((), 1.0, DTYPE)
    else:
        return 65536.0 / tl.cast(numbers[3], DTYPE)
