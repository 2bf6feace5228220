"""prefix_attention in plain PyTorch: the definition that every backend is measured against. Never optimised.

o = drop(w_X) V + g drop(w_P) P_v     with logits   l_X = cap(scale q K^T) + mask,   l_P = cap(c scale q P_k^T) + bias
    merge   w = softmax of [l_P, l_X] together          Li and Liang 2021 (arXiv:2101.00190)
    add     w_X = softmax(l_X), w_P = softmax(l_P)      Zhang et al. 2023 (arXiv:2303.16199), gate by gate
    relu    w_X = softmax(l_X), w_P = relu(c scale q P_k^T)     multi-head adapter, He et al. 2022 (arXiv:2110.04366)
    linear  w_X = softmax(l_X), w_P = c (elu(q) + 1) P_k^T          Wang et al. 2025 (arXiv:2506.13674)
q [B, Hq, S, D], K and V [B, Hkv, T, D], prefixes [n, Hkv, P, D], of which a row has one or none; g and c a number per
row and head; cap(l) = softcap tanh(l / softcap). lse [B, Hq, S] is the natural logarithm of the sum that w_X is divided
by, prefix_lse that of w_P where it has its own. Arithmetic in fp32 for 16- and 32-bit inputs, in fp64 for fp64.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from peft_kernels.ops.common.dropout import keep_scale, mask_reference, threshold
from peft_kernels.ops.common.projections import accumulator


@dataclass(frozen=True)
class Numbers:
    """The arguments of the op that are not tensors."""

    composition: str
    scale: float
    is_causal: bool
    sliding_window: int
    window_over_prefix: bool
    softcap: float
    dropout_p: float


@dataclass
class Row:
    """One sequence: where it lies in the batch, and its tensors in the accumulator's dtype, heads of K repeated."""

    place: tuple[int, slice, slice]  # batch index, its queries, its keys
    prefix: int  # -1: none
    q: Tensor  # [Hq, S, D]
    k: Tensor  # [Hq, T, D]
    v: Tensor
    pk: Tensor  # [Hq, P, D]
    pv: Tensor
    mask: Tensor | None  # [1|Hq, 1|S, T]
    bias: Tensor | None  # [1|Hq, 1|S, P]
    g: Tensor  # [1|Hq, 1, 1]
    c: Tensor
    keep_own: Tensor | None  # [Hq, S, T]
    keep_prefix: Tensor | None  # [Hq, S, P]


def _of_row(tensor: Tensor | None, r: int) -> Tensor | None:
    return None if tensor is None else tensor[r if tensor.shape[0] > 1 else 0]


def _dropout(seed, shape: tuple[int, ...], p: float, stream: int, dtype) -> Tensor | None:
    """Scaled mask over [B, Hq, S, columns]; a row of it is a query of a head."""
    if threshold(p) == 65536:
        return None
    mask = mask_reference(seed, shape[0] * shape[1] * shape[2], shape[3], p, stream)
    return (mask.to(dtype) * keep_scale(p)).view(shape)


def places(query, key, cu_seqlens_q, cu_seqlens_k) -> list[tuple[int, slice, slice]]:
    """Batch index, queries and keys of every row: one for each batch index, or one for each packed sequence."""
    if cu_seqlens_q is None:
        return [(b, slice(0, query.shape[2]), slice(0, key.shape[2])) for b in range(query.shape[0])]
    queries, keys = ([slice(*pair) for pair in pairwise(ends.tolist())] for ends in (cu_seqlens_q, cu_seqlens_k))
    return [(0, qs, ks) for qs, ks in zip(queries, keys, strict=True)]


def rows(
    query, key, value, prefix_key, prefix_value, prefix_ids, prefix_lengths,
    attn_mask, prefix_bias, gate, key_gate, cu_seqlens_q, cu_seqlens_k, numbers: Numbers, seed,
) -> Iterator[Row]:  # fmt: skip
    """The sequences one by one; a prefix is cut to its true length, so that nothing pads it."""
    dtype, group = accumulator(query.dtype), query.shape[1] // key.shape[1]
    (B, Hq, S, _), T, P = query.shape, key.shape[2], prefix_key.shape[2]
    keep_own = _dropout(seed, (B, Hq, S, T), numbers.dropout_p, 0, dtype)
    keep_prefix = _dropout(seed, (B, Hq, S, P), numbers.dropout_p, 1, dtype)
    one = query.new_ones((1, 1), dtype=dtype)
    for r, (b, qs, ks) in enumerate(places(query, key, cu_seqlens_q, cu_seqlens_k)):
        n = 0 if prefix_ids is None else int(prefix_ids[r])
        P = 0 if n < 0 else prefix_key.shape[2] if prefix_lengths is None else int(prefix_lengths[n])
        heads = lambda tensor, i, part: tensor[i][:, part].to(dtype).repeat_interleave(group, 0)  # noqa: E731
        prefix = [t[:, :, :0] if n < 0 else t for t in (prefix_key, prefix_value)]
        if not len(prefix_key):  # no prefix at all: rows of none
            prefix = [t.new_zeros((1, *t.shape[1:]))[:, :, :0] for t in prefix]
        mask, bias = _of_row(attn_mask, r), _of_row(prefix_bias, r)
        yield Row(
            (b, qs, ks), n,
            query[b][:, qs].to(dtype), heads(key, b, ks), heads(value, b, ks),
            *(heads(t, max(n, 0), slice(0, P)) for t in prefix),
            mask if mask is None or mask.dtype is torch.bool else mask.to(dtype),
            None if bias is None else bias[..., :P].to(dtype),
            *((one if t is None else _of_row(t, r).to(dtype)).reshape(-1, 1, 1) for t in (gate, key_gate)),
            None if keep_own is None else keep_own[b][:, qs, : ks.stop - ks.start],
            None if keep_prefix is None else keep_prefix[b][:, qs, :P],
        )  # fmt: skip


def _visible(row: Row, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """Which own keys [S, T] and which of the prefix [S, P] a query sees: the last query is at the last key."""
    S, T, P = row.q.shape[1], row.k.shape[1], row.pk.shape[1]
    at = torch.arange(S, device=row.q.device)[:, None] + T - S
    own, prefix = (torch.arange(n, device=row.q.device)[None] for n in (T, P))
    sees, sees_prefix = torch.ones_like(at + own, dtype=torch.bool), torch.ones_like(at + prefix, dtype=torch.bool)
    if numbers.is_causal:
        sees = own <= at
    if numbers.sliding_window:
        sees = sees & (own > at - numbers.sliding_window)
        if numbers.window_over_prefix:  # the prefix ends where the own keys begin
            sees_prefix = prefix - P > at - numbers.sliding_window
    return sees, sees_prefix


def _capped(logits: Tensor, softcap: float) -> tuple[Tensor, Tensor | None]:
    """cap(l), and its derivative; None for 1."""
    if not softcap:
        return logits, None
    tanh = torch.tanh(logits / softcap)
    return softcap * tanh, 1 - tanh * tanh


@dataclass
class Weights:
    """w_X and w_P of one row, with what their gradients need."""

    own: Tensor  # [Hq, S, T]
    prefix: Tensor  # [Hq, S, P]
    own_slope: Tensor | None  # of the cap
    prefix_slope: Tensor | None  # of what stands between the raw prefix logits and w_P, or its softmax
    raw_prefix: Tensor  # scale q P_k^T, or (elu(q) + 1) P_k^T: what c multiplies
    lse: Tensor  # [Hq, S]
    prefix_lse: Tensor | None


def _normalised(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp; where nothing is seen, zeros and -inf."""
    lse = torch.logsumexp(logits, -1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -torch.inf)
    weights = torch.where(lse[..., None] == -torch.inf, 0, torch.exp(logits - lse[..., None]))
    return weights, lse


def _weights(row: Row, numbers: Numbers) -> Weights:
    sees, sees_prefix = _visible(row, numbers)
    own, own_slope = _capped(numbers.scale * row.q @ row.k.mT, numbers.softcap)
    if row.mask is not None and row.mask.dtype is torch.bool:
        sees = sees & row.mask
    elif row.mask is not None:
        own = own + row.mask
    own = own.masked_fill(~sees, -torch.inf)
    linear = numbers.composition == "linear"
    raw = (torch.nn.functional.elu(row.q) + 1 if linear else numbers.scale * row.q) @ row.pk.mT
    prefix, slope = row.c * raw, None
    if numbers.composition in ("merge", "add"):
        prefix, slope = _capped(prefix, numbers.softcap)
        prefix = prefix if row.bias is None else prefix + row.bias
        prefix = prefix.masked_fill(~sees_prefix, -torch.inf)
        if numbers.composition == "merge":
            together, lse = _normalised(torch.cat([prefix, own], -1))
            prefix, own = together.split([raw.shape[-1], own.shape[-1]], -1)
            return Weights(own, prefix, own_slope, slope, raw, lse, None)
        (own, lse), (prefix, prefix_lse) = _normalised(own), _normalised(prefix)
        return Weights(own, prefix, own_slope, slope, raw, lse, prefix_lse)
    slope = sees_prefix.to(prefix.dtype)
    if numbers.composition == "relu":
        slope = torch.where(prefix.isnan(), prefix, (prefix > 0) * slope)
        prefix = torch.relu(prefix)
    weights, lse = _normalised(own)
    return Weights(weights, prefix.masked_fill(~sees_prefix, 0), own_slope, slope, raw, lse, None)


def _sizes(row: Row, w: Weights, numbers: Numbers) -> tuple[Row, Weights]:
    """Absolute values, for the oracle's S. What a softmax's weight may lose grows with the products in its logits."""
    row = replace(row, **{name: getattr(row, name).abs() for name in ("q", "k", "v", "pk", "pv", "g", "c")})
    own = numbers.scale * row.q @ row.k.mT
    prefix = row.c * (w.raw_prefix if numbers.composition == "linear" else numbers.scale * row.q @ row.pk.mT)
    both = torch.cat([own, prefix, torch.zeros_like(row.q[..., :1])], -1)
    growth = 1 + both.amax(-1, keepdim=True)
    softmax = numbers.composition in ("merge", "add")
    return row, Weights(
        own=w.own * growth, prefix=w.prefix * growth if softmax else prefix, own_slope=None, prefix_slope=None,
        raw_prefix=prefix, lse=w.lse.abs() + growth[..., 0],
        prefix_lse=None if w.prefix_lse is None else w.prefix_lse.abs() + growth[..., 0],
    )  # fmt: skip


def _dropped(weights: Tensor, keep: Tensor | None) -> Tensor:
    return weights if keep is None else torch.where(keep > 0, weights * keep, 0)


def by_token(like: Tensor, dtype=None) -> Tensor:
    """Zeros [B, H, S, D] that lie in memory as [B, S, H, D], as the projections around attention read and write."""
    B, H, S, D = like.shape
    return like.new_zeros((B, S, H, D), dtype=dtype).transpose(1, 2)


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
    size: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and prefix_lse (empty where w_P has no sum of its own). `size`: the oracle's S of them."""
    numbers, seed = Numbers(*numbers_and_seed[:-1]), numbers_and_seed[-1]
    dtype, (B, Hq, S, _) = accumulator(query.dtype), query.shape
    out, lse = by_token(query), query.new_full((B, Hq, S), -torch.inf, dtype=dtype)
    prefix_lse = torch.full_like(lse, -torch.inf) if numbers.composition == "add" else lse.new_empty(0)
    for row in rows(
        query, key, value, prefix_key, prefix_value, prefix_ids, prefix_lengths,
        attn_mask, prefix_bias, gate, key_gate, cu_seqlens_q, cu_seqlens_k, numbers, seed,
    ):  # fmt: skip
        weights = _weights(row, numbers)
        if size:
            row, weights = _sizes(row, weights, numbers)
        b, qs, _ = row.place
        own = _dropped(weights.own, row.keep_own) @ row.v
        out[b][:, qs] = (own + row.g * (_dropped(weights.prefix, row.keep_prefix) @ row.pv)).to(out.dtype)
        lse[b][:, qs] = weights.lse
        if weights.prefix_lse is not None:
            prefix_lse[b][:, qs] = weights.prefix_lse
    return out, lse, prefix_lse


def _logit_gradients(row: Row, w: Weights, d: Tensor, out: Tensor, numbers: Numbers, minus: int):
    """Gradients of the raw own logits and of c times the raw prefix logits, and rowsum(w_P dw_P): what g multiplies."""
    d_own = _dropped(d @ row.v.mT, row.keep_own)  # of w_X
    share = _dropped(d @ row.pv.mT, row.keep_prefix)
    d_prefix, share = row.g * share, (w.prefix * share).sum(-1, keepdim=True)
    total = (d * out).sum(-1, keepdim=True)
    if numbers.composition == "merge":
        own, prefix = w.own * (d_own + minus * total), w.prefix * (d_prefix + minus * total)
    else:
        own, prefix = w.own * (d_own + minus * (total + minus * row.g * share)), d_prefix
        if numbers.composition == "add":
            prefix = w.prefix * (d_prefix + minus * row.g * share)
    own = torch.where(w.own == 0, 0, own)  # no part, even of what is NaN
    own = own if w.own_slope is None else own * w.own_slope
    return own, prefix if w.prefix_slope is None else prefix * w.prefix_slope, share


def _gradients_of_row(row: Row, d: Tensor, out: Tensor, numbers: Numbers, size: bool) -> dict[str, Tensor]:
    """Of one sequence; keys and values still per query head."""
    w = _weights(row, numbers)
    if size:
        row, w = _sizes(row, w, numbers)
        d, out = d.abs(), out.abs()
    own, prefix, share = _logit_gradients(row, w, d, out, numbers, minus=1 if size else -1)
    scaled = row.c * prefix  # of the raw prefix logits
    if numbers.composition == "linear":
        phi = torch.nn.functional.elu(row.q) + 1
        dq, dpk = (scaled @ row.pk) * torch.where(row.q > 0, 1, torch.exp(row.q)), scaled.mT @ phi
    else:
        dq, dpk = numbers.scale * (scaled @ row.pk), numbers.scale * (scaled.mT @ row.q)
    return {
        "query": dq + numbers.scale * (own @ row.k),
        "key": numbers.scale * (own.mT @ row.q),
        "value": _dropped(w.own, row.keep_own).mT @ d,
        "prefix_key": dpk,
        "prefix_value": row.g * (_dropped(w.prefix, row.keep_prefix).mT @ d),
        "gate": share.sum((1, 2)),
        "key_gate": (prefix * w.raw_prefix).sum((1, 2)),
    }


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
    size: bool = False,
) -> list[Tensor]:
    """Gradients of (query, key, value, prefix_key, prefix_value, gate, key_gate); an empty tensor where `needs` says
    no. Those of a prefix are summed over the rows that have it; the first three lie in memory as out does.

    D = rowsum(dO o), D_P = rowsum(w_P drop(dO P_v^T))
    merge   dl_X = w_X (drop(dO V^T) - D)             dl_P = w_P (g drop(dO P_v^T) - D)
    else    dl_X = w_X (drop(dO V^T) - (D - g D_P))   dl_P = w_P g (drop(dO P_v^T) - D_P), relu: g [l_P > 0] drop(..)
    dq = scale (dl_X K + c dl_P P_k)   dK = scale dl_X^T q   dV = drop(w_X)^T dO    dP_k, dP_v likewise
    dg = sum of D_P                    dc = sum of dl_P scale q P_k^T
    `size`: the oracle's S of them, sums of absolute values in place of the differences.
    """
    *numbers, seed, needs = numbers_seed_and_needs
    numbers, dtype = Numbers(*numbers), accumulator(query.dtype)
    inputs = {
        "query": query, "key": key, "value": value, "prefix_key": prefix_key, "prefix_value": prefix_value,
        "gate": gate, "key_gate": key_gate,
    }  # fmt: skip
    totals = {name: by_token(t, dtype) for name, t in list(inputs.items())[:3]}
    totals |= {n: None if t is None else t.new_zeros(t.shape, dtype=dtype) for n, t in list(inputs.items())[3:]}
    group = query.shape[1] // key.shape[1]
    for r, row in enumerate(rows(
        query, key, value, prefix_key, prefix_value, prefix_ids, prefix_lengths,
        attn_mask, prefix_bias, gate, key_gate, cu_seqlens_q, cu_seqlens_k, numbers, seed,
    )):  # fmt: skip
        b, qs, ks = row.place
        of_row = _gradients_of_row(row, dout[b][:, qs].to(dtype), out[b][:, qs].to(dtype), numbers, size)
        for name, grad in of_row.items():
            if name.endswith("gate"):
                if totals[name] is not None:
                    total = totals[name][r if len(totals[name]) > 1 else 0]  # [1|Hq]
                    total += grad if len(total) > 1 else grad.sum()
            elif name == "query":
                totals[name][b][:, qs] = grad
            else:
                grad = grad.unflatten(0, (-1, group)).sum(1)  # [Hkv, ...]
                if name in ("key", "value"):
                    totals[name][b][:, ks] += grad
                elif row.prefix >= 0:
                    totals[name][row.prefix][:, : grad.shape[1]] += grad
    grads = zip(inputs.items(), totals.values(), needs, strict=True)
    return [total.to(t.dtype) if need else query.new_empty(0) for (_, t), total, need in grads]
