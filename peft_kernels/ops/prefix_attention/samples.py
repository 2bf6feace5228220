"""Inputs for prefix_attention: samples at the edges, each with the reason it is there, and inputs that must be
refused."""

import math
from functools import partial

import torch

from peft_kernels.ops.common.projection_samples import BF16, F16, F32, F64, inside, refused
from peft_kernels.registry import BadInput, Sample

DTYPES = tuple((dtype, dtype) for dtype in (F32, BF16, F16, F64))
GRADIENTS = ("query", "key", "value", "prefix_key", "prefix_value", "gate", "key_gate")


def problem(
    device,
    dtype: torch.dtype,
    *,
    B: int = 2,
    Hq: int = 4,
    Hkv: int = 2,
    S: int = 9,
    T: int | None = None,
    P: int = 5,
    D: int = 32,
    n: int = 1,
    ids: tuple[int, ...] | None = None,
    lengths: tuple[int, ...] | None = None,
    mask: str = "none",
    bias: bool = False,
    gates: tuple[int, int] | None = None,
    packed: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    **numbers,
) -> dict:
    """Arguments of the op. T None: as many keys as queries. `mask`: none, left, right, least (padding), bool, additive.

    What lies beyond the length of a prefix is NaN: nothing may read it.
    """
    T = S if T is None else T
    generator = torch.Generator().manual_seed(S * 1009 + T * 31 + P * 7 + D)

    def draw(*shape, to=dtype, scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=F64) * scale).to(device, to)

    def integers(values):
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)

    rows = len(packed[0]) - 1 if packed else B
    wide = F64 if dtype is F64 else F32
    gate, key_gate = (
        None if gates is None else draw(rows if gates[0] else 1, Hq if gates[1] else 1, to=wide) for _ in "ab"
    )
    prefix_key, prefix_value = draw(n, Hkv, P, D), draw(n, Hkv, P, D)
    for tensor in (prefix_key, prefix_value):
        for i, length in enumerate(lengths or ()):
            tensor[i, :, length:] = math.nan
    return {
        "query": draw(B, S, Hq, D).transpose(1, 2),  # as a projection leaves them
        "key": draw(B, T, Hkv, D).transpose(1, 2),
        "value": draw(B, T, Hkv, D).transpose(1, 2),
        "prefix_key": prefix_key,
        "prefix_value": prefix_value,
        "prefix_ids": integers(ids),
        "prefix_lengths": integers(lengths),
        "attn_mask": _mask(mask, (B, Hq, S, T), draw, device),
        "prefix_bias": draw(1, Hq, S, P, to=wide) if bias else None,
        "gate": gate,
        "key_gate": key_gate,
        "cu_seqlens_q": integers(packed and packed[0]),
        "cu_seqlens_k": integers(packed and packed[1]),
    } | _numbers(device, S, D, **numbers)


def _numbers(
    device, S: int, D: int, *, composition="merge", causal=True, window=0, over_prefix=False, softcap=0.0, p=0.0
) -> dict:
    """The arguments that are not tensors, and the seed."""
    return {
        "composition": composition,
        "scale": D**-0.5,
        "is_causal": causal,
        "sliding_window": window,
        "window_over_prefix": over_prefix,
        "softcap": softcap,
        "dropout_p": p,
        "seed": torch.tensor(0x5EED_0123_4567_89AB - S, device=device) if p else None,
    }


def _mask(kind: str, shape: tuple[int, ...], draw, device) -> torch.Tensor | None:
    B, _, S, T = shape
    column, row = torch.arange(T, device=device), torch.arange(B, device=device)[:, None]
    if kind in ("left", "right"):  # row b lacks 2 b keys
        seen = column >= 2 * row if kind == "left" else column < T - 2 * row
        return seen[:, None, None]  # [B, 1, 1, T]
    if kind == "least":  # row b lacks 70 + 2 b keys, in the way of transformers' eager attention
        wide = torch.promote_types(draw(1).dtype, F32)
        return torch.where(column >= 70 + 2 * row, 0.0, torch.finfo(F32).min).to(wide)[:, None, None]
    if kind == "bool":
        return draw(B, 1, S, T) > -0.5
    return draw(*shape[1:])[None] if kind == "additive" else None  # [1, Hq, S, T], as T5's


def _plain(id: str, why: str, dtypes=DTYPES, busy=False, **sizes) -> Sample:
    return Sample(id, why, lambda device, dtype, _: problem(device, dtype, **sizes), dtypes, busy)


def _changed(id: str, why: str, change, **sizes) -> Sample:
    """A problem with some arguments laid out differently; `change(arguments)` returns the new ones."""

    def make(device, dtype, _):
        arguments = problem(device, dtype, **sizes)
        return arguments | change(arguments)

    return Sample(id, why, make, DTYPES)


def _everything_inside(arguments):
    return {name: inside(arguments[name]) for name in GRADIENTS[:5]}


def _halves_of_one(arguments):
    """Keys and values of the prefixes are views of one parameter [P, 2, Hkv, D], as PEFT stores a layer."""
    stacked = torch.stack([arguments["prefix_key"][0], arguments["prefix_value"][0]]).permute(2, 0, 1, 3).contiguous()
    return {"prefix_key": stacked[:, 0].transpose(0, 1)[None], "prefix_value": stacked[:, 1].transpose(0, 1)[None]}


def _compositions(several: dict) -> list[Sample]:
    """Those other than merge."""
    return [
        _plain("add", "a softmax of its own for the prefix", composition="add", gates=(0, 1), **several),
        _plain("add-one", "one gate for all, dropout, a window over the prefix", composition="add", gates=(0, 0), p=0.1,
               window=4, over_prefix=True, S=19),
        _plain("add-capped", "both softmaxes capped and biased", composition="add", softcap=1.5, mask="additive",
               bias=True),
        _plain("relu", "relu in place of softmax", composition="relu", gates=(1, 1), **several),
        _plain("relu-plain", "relu without a gate, with dropout", composition="relu", p=0.1, S=37, P=35),
        _plain("linear", "features of q in place of softmax", composition="linear", gates=(1, 1), **several),
        _plain("linear-decode", "the same for one query", composition="linear", S=1, T=23, P=32),
    ]  # fmt: skip


def _windows() -> list[Sample]:
    return [
        _plain("window", "a sliding window, the prefix seen by all", window=4, S=19),
        _plain("window-decode", "a sliding window in a cache", window=4, S=1, T=19),
        _plain("window-over-prefix", "the prefix slides out of the window", window=4, over_prefix=True, S=19, n=2,
               ids=(0, 1), lengths=(5, 2)),
    ]  # fmt: skip


def samples() -> list[Sample]:
    """Each for an edge that has broken a kernel somewhere, or would."""
    several = dict(B=4, n=3, ids=(2, -1, 0, 2), lengths=(5, 3, 4))
    packed = ((0, 3, 4, 4, 9), (0, 5, 6, 8, 15))
    return [
        _plain("ones", "every size is 1", B=1, Hq=1, Hkv=1, S=1, P=1, D=8),
        _plain("aligned", "every size fills whole tiles", B=1, S=64, P=64, D=64),
        _plain("ragged", "no size is a multiple of anything", B=3, S=37, P=19, D=40),
        _plain("tiles", "more than one tile of queries, of keys and of the prefix", B=1, S=131, P=70),
        _plain("decode", "one query, a cache of keys, one prefix for all rows", B=5, S=1, T=23),
        _plain("decode-several", "one query a row, each row its own prefix", S=1, T=23, **several),
        _plain("decode-rows", "more rows of one prefix than a tile has", B=70, S=1, T=3, P=9),
        _plain("chunk", "fewer queries than keys: the last query is at the last key", S=5, T=21),
        _plain("more-queries", "more queries than keys: the first see the prefix alone", S=12, T=7),
        _plain("more-queries-bare", "and without a prefix nothing at all", S=12, T=7, ids=(-1, 0)),
        _plain("nothing", "whole tiles of queries that see nothing at all", S=80, T=5, Hq=2, ids=(-1, 0)),
        _plain("no-keys", "the prefix is all that there is", S=3, T=0),
        _plain("no-prefix", "a prefix of length zero", P=0),
        _plain("no-prefixes", "no prefix anywhere, which is attention", n=0, ids=(-1, -1)),
        _plain("several", "prefixes of several lengths, a row without one, one used twice", **several),
        _plain("empty-length", "a prefix whose true length is zero", B=3, n=2, ids=(1, 0, 1), lengths=(5, 0)),
        _plain("empty", "no rows", B=0),
        _plain("empty-queries", "no queries", S=0, T=4),
        _plain("heads-1", "one key head for all query heads", Hq=8, Hkv=1, D=64),
        _plain("heads-equal", "as many key heads as query heads", Hq=3, Hkv=3, D=64),
        _plain("heads-odd", "a group of three heads", Hq=6, Hkv=2),
        _plain("dim-96", "a head that is no power of two", D=96),
        _plain("dim-128", "a wide head", D=128, S=33),
        _plain("dim-256", "the widest head", D=256, S=17, P=33),
        _plain("bidirectional", "an encoder", causal=False),
        _plain("cross", "queries of another length than the keys, all of which they see", causal=False, S=4, T=17),
        _plain("left-padding", "rows that begin with padding: its queries see the prefix alone", mask="left", B=3),
        _plain("right-padding", "rows that end with padding", mask="right", B=3, causal=False),
        _plain("mask", "any mask of booleans", mask="bool", causal=False, **several),
        _plain("additive", "a bias of positions, own and of the prefix", mask="additive", bias=True, **several),
        _plain("additive-prefix-seen", "a bias for own keys alone", mask="additive", causal=False),
        *_windows(),
        _plain("least", "padding by the least number, longer than a tile of keys",
               mask="least", S=20, T=150, Hq=2, ids=(-1, 0)),
        _plain("least-decode", "the same for one query", mask="least", S=1, T=150, Hq=2, ids=(-1, 0)),
        _plain("softcap", "capped logits, own and of the prefix", softcap=1.5, mask="additive"),
        _plain("window-widest", "a window over everything, to which 32 bits can add nothing", window=2**31 - 1,
               over_prefix=True, Hq=2, S=5, T=9),
        _plain("window-largest", "the largest window that there is, to which 64 bits can add nothing", window=2**63 - 1,
               Hq=2, S=9),
        _plain("gates", "a gate per row and head on values and on logits", gates=(1, 1), **several),
        _plain("gates-row", "a gate per row", gates=(1, 0), softcap=2.0),
        _plain("gates-head", "a gate per head", gates=(0, 1)),
        _plain("packed", "sequences in one row, one of them empty, one decoding", B=1, S=9, T=15, packed=packed, n=3,
               ids=(2, -1, 0, 2), lengths=(5, 3, 4)),
        _plain("packed-gates", "the same with gates and dropout", B=1, S=9, T=15, packed=packed, gates=(1, 1), p=0.1),
        _plain("dropout", "mask replay over ragged tiles, own keys and prefix", S=37, P=35, p=0.1),
        _plain("dropout-most", "nearly everything dropped", p=0.9999),
        *_compositions(several),
        _changed("strided", "everything inside wider buffers", _everything_inside, S=19, gates=(0, 1)),
        _changed("halves", "prefix keys and values are views of one parameter", _halves_of_one, S=19, P=7),
        _plain("busy", "work for several threads", ((BF16, BF16), (F32, F32)), busy=True, B=4, S=150, P=40, D=64, n=2,
               ids=(0, 1, 0, 0), p=0.1),
        _plain("busy-decode", "rows of several prefixes, work for several threads", ((BF16, BF16), (F32, F32)),
               busy=True, B=40, Hq=8, S=1, T=130, P=130, D=64, n=3, ids=tuple(i % 3 for i in range(40))),
    ]  # fmt: skip


def evaluate(forward, backward, arguments: dict, dy: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every output and every gradient of one problem, by name."""
    values = list(arguments.values())
    out, *sums = forward(*values)
    needs = [arguments[name] is not None for name in GRADIENTS]
    grads = backward(dy[0], *values[:13], out, *sums, *values[13:], needs)
    wanted = {f"grad {name}[0]": grad for name, grad, need in zip(GRADIENTS, grads, needs, strict=True) if need}
    return {"y[0]": out, "lse": sums[0], "prefix_lse": sums[1]} | wanted


def _given(*shape, dtype=F32):
    return lambda tensor: torch.zeros(shape, dtype=dtype)


def bad_inputs() -> list[BadInput]:
    """What must be refused with words, before anything happens."""
    bad = partial(refused, lambda device: problem(device, F32, n=2, ids=(0, 1), lengths=(5, 4), p=0.1))
    return [
        bad("query-int", TypeError, "query must have dtype", query=lambda q: q.to(torch.int32)),
        bad("query-sparse", TypeError, "query must be a dense", query=lambda q: q.to_sparse()),
        bad("query-3d", ValueError, "query must have shape [batch, heads, queries, head_dim]", query=lambda q: q[0]),
        bad("head-dim-odd", ValueError, "head_dim must be a multiple of 8 from 8 to 256, got 31",
            query=lambda q: q[..., :31]),
        bad("key-heads", ValueError, "key must have a number of heads that divides query's 4, got 3",
            key=_given(2, 3, 9, 32)),
        bad("key-batch", ValueError, "key must have shape [batch=2, kv_heads, keys, head_dim=32], got [1, 2, 9, 32]",
            key=_given(1, 2, 9, 32)),
        bad("key-dtype", TypeError, "key must have dtype float32, as query, got bfloat16", key=lambda k: k.to(BF16)),
        bad("value-shape", ValueError, "value must have shape [2, 2, 9, 32], as key, got [2, 2, 8, 32]",
            value=_given(2, 2, 8, 32)),
        bad("prefix-heads", ValueError, "prefix_key must have shape [prefixes, kv_heads=2, prefix_length, head_dim=32]"
            ", got [2, 4, 5, 32]", prefix_key=_given(2, 4, 5, 32)),
        bad("prefix-dtype", TypeError, "prefix_key must have dtype float32, as query, got float16",
            prefix_key=lambda k: k.to(F16)),
        bad("prefix-device", TypeError, "prefix_value must be on query's device", prefix_value=lambda v: v.to("meta")),
        bad("prefix-value", ValueError, "prefix_value must have shape [2, 2, 5, 32], as prefix_key, got [2, 2, 4, 32]",
            prefix_value=_given(2, 2, 4, 32)),
        bad("ids-none", ValueError, "prefix_ids must be given where there are 2 prefixes", prefix_ids=lambda i: None),
        bad("ids-dtype", TypeError, "prefix_ids must have dtype int32, got int64", prefix_ids=lambda i: i.long()),
        bad("ids-shape", ValueError, "prefix_ids must have shape [rows=2], got [3]",
            prefix_ids=_given(3, dtype=torch.int32)),
        bad("lengths-shape", ValueError, "prefix_lengths must have shape [prefixes=2], got [1]",
            prefix_lengths=_given(1, dtype=torch.int32)),
        bad("mask-shape", ValueError, "attn_mask must have shape [1 or batch=2, 1 or heads=4, 1 or queries=9, keys=9], "
            "got [2, 9]", attn_mask=_given(2, 9)),
        bad("mask-dtype", TypeError, "attn_mask must have dtype bool or float32, got int64",
            attn_mask=_given(1, 1, 9, 9, dtype=torch.int64)),
        bad("bias-shape", ValueError, "prefix_bias must have shape", prefix_bias=_given(1, 4, 9, 4)),
        bad("bias-linear", ValueError, "prefix_bias must be None where composition is 'linear'",
            prefix_bias=_given(1, 4, 9, 5), composition=lambda c: "linear"),
        bad("gate-shape", ValueError, "gate must have shape [1 or rows=2, 1 or heads=4], got [4]", gate=_given(4)),
        bad("gate-dtype", TypeError, "key_gate must have dtype float32, got float64", key_gate=_given(1, 4, dtype=F64)),
        bad("packed-one", ValueError, "cu_seqlens_q and cu_seqlens_k must be given together",
            cu_seqlens_q=_given(3, dtype=torch.int32)),
        bad("packed-batch", ValueError, "query must have a batch of 1 where sequences are packed, got 2",
            cu_seqlens_q=_given(3, dtype=torch.int32), cu_seqlens_k=_given(3, dtype=torch.int32)),
        bad("composition", ValueError, "composition must be one of merge, add, relu, linear, got 'concat'",
            composition=lambda c: "concat"),
        bad("scale-inf", ValueError, "scale must be finite, got inf", scale=lambda s: math.inf),
        bad("window-negative", ValueError, "sliding_window must not be negative", sliding_window=lambda w: -1),
        bad("softcap-negative", ValueError, "softcap must be finite, not negative, got -1", softcap=lambda c: -1.0),
        bad("p-one", ValueError, "dropout_p must lie in [0, 1), got 1", dropout_p=lambda p: 1.0),
        bad("seed-missing", ValueError, "seed must be given where dropout_p > 0", seed=lambda s: None),
    ]  # fmt: skip
