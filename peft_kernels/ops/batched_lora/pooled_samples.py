"""Inputs for batched_lora_: samples at the edges, each with the reason it is there, and inputs that must be refused."""

import math

import torch
from torch import Tensor

from peft_kernels.ops.batched_lora import route
from peft_kernels.ops.batched_lora.pooled_reference import FIRST_PAGE, PAGE
from peft_kernels.ops.common.activations import NAMES
from peft_kernels.registry import BadInput, Sample

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
PAIRS = ((F32, F32), (F16, F16), (BF16, BF16), (BF16, F32), (F16, F32), (F64, F64))
MIXED = ((1,), (3,), (8,), (9,), (20,), (0,))  # ranks of the slots


def paged(factors: list[Tensor], others: list[tuple[Tensor | None, ...]], width: int) -> tuple[Tensor, list, list]:
    """Rank rows [R, width] of each slot and its other rows (bias, gain), in pages in a scattered order; all else NaN.

    Returns the pages, the page numbers of each slot and the numbers of its other rows, -1 where there is none.
    """
    counts = [-(-len(f) // PAGE) for f in factors]
    total = sum(counts) + sum(len(rows) for rows in others) + 1
    step = next(s for s in range(total // 2 + 1, 2 * total) if math.gcd(s, total) == 1)
    numbers = iter(i * step % total for i in range(total))
    pages = factors[0].new_full((total, PAGE, width), math.nan)
    rows, taken, other_rows = pages.flatten(0, 1), [], []
    for factor, other, count in zip(factors, others, counts, strict=True):
        taken.append([next(numbers) for _ in range(count)])
        for r in range(len(factor)):
            rows[taken[-1][r // PAGE] * PAGE + r % PAGE] = factor[r]
        other_rows.append([-1 if row is None else next(numbers) * PAGE + 5 for row in other])
        for number, row in zip(other_rows[-1], other, strict=True):
            if row is not None:
                rows[number] = row
    return pages, taken, other_rows


def problem(
    device, dtype, factor_dtype, *, rows=12, K=32, N=(48,), ranks=MIXED, ids=None, biased=False, gained=False,
    activations=("identity",), down_biased=False,
) -> dict:  # fmt: skip
    """Arguments of the op: one slot per entry of `ranks`, which gives its rank in each slice of N.

    ids: of the rows; by default all slots and none in turn. biased, gained: half of the slots have a bias, two of three
    a gain. activations: of the slots, in turn. down_biased: two of three slots have a bias in front of it. The factors
    are scaled so that each slot adds as much as y holds.
    """
    generator = torch.Generator().manual_seed(rows * 1009 + K * 31 + sum(N))

    def draw(*shape, scale=1.0, to=dtype):
        return (torch.randn(*shape, generator=generator, dtype=F64) * scale).to(device, to)

    slots = len(ranks)
    a = [[draw(r, K, scale=K**-0.5, to=factor_dtype) for r in slot] for slot in ranks]
    pages_in, taken, _ = paged([f for slot in a for f in slot], [()] * (slots * len(N)), K)
    table, pages_out, scaling, down_bias = [], [], [], []
    for g, n in enumerate(N):
        b = [draw(slot[g], n, scale=max(slot[g], 1) ** -0.5, to=factor_dtype) for slot in ranks]
        bias = [draw(n, to=factor_dtype) if biased and i % 2 else None for i in range(slots)]
        gain = [draw(n, scale=0.5, to=factor_dtype) if gained and i % 3 < 2 else None for i in range(slots)]
        for row in gain:
            if row is not None:
                row[0] = -1  # of which the bias is left
        pages, numbers, other_rows = paged(b, list(zip(bias, gain, strict=True)), n)
        most = max(1, *(len(p) for p in numbers))
        entries = torch.full((slots, FIRST_PAGE + 2 * most), -7, dtype=torch.int32)  # past a rank: never read
        for i, (slot, of_b) in enumerate(zip(ranks, numbers, strict=True)):
            of_a = taken[i * len(N) + g]
            activation = NAMES.index(activations[i % len(activations)])
            entries[i, :FIRST_PAGE] = torch.tensor([slot[g], *other_rows[i], activation])
            entries[i, FIRST_PAGE : FIRST_PAGE + len(of_a)] = torch.tensor(of_a)
            entries[i, FIRST_PAGE + most : FIRST_PAGE + most + len(of_b)] = torch.tensor(of_b)
        table.append(entries.to(device))
        pages_out.append(pages)
        down_bias.append(
            _down_biases([slot[g] if down_biased else 0 for slot in ranks], draw, PAGE * most, _wide(dtype))
        )
        scaling.append(((-1.0) ** torch.arange(slots) * (1 + torch.arange(slots) / 4)).to(device, _wide(dtype)))
    ids = [i % (slots + 1) - 1 for i in range(rows)] if ids is None else ids
    return {
        "y": [draw(rows, n) for n in N],
        "x": draw(rows, K),
        "route": route.reference(torch.tensor(ids, dtype=torch.int32), slots).to(device),
        "pages_in": pages_in,
        "pages_out": pages_out,
        "table": table,
        "scaling": scaling,
        "down_bias": down_bias,
    }


def _down_biases(ranks: list[int], draw, width: int, wide: torch.dtype) -> Tensor:
    """[slots, width]: zeros where a slot has none; past a rank, NaN. [0] where all ranks are 0."""
    if not any(ranks):
        return draw(0, to=wide)
    there = torch.tensor([[float(i % 3 != 1)] for i in range(len(ranks))])
    biases = draw(len(ranks), width, to=wide)
    past = torch.arange(width) >= torch.tensor(ranks)[:, None]
    return (biases * there.to(biases)).masked_fill(past.to(biases.device), math.nan)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype is F64 else F32


def _inside(tensor: Tensor) -> Tensor:
    """The same values inside a wider buffer, at an odd storage offset, rows apart by an odd stride."""
    buffer = tensor.new_full((tensor.shape[0], tensor.shape[1] + 5), math.nan)
    buffer[:, 3:-2] = tensor
    return buffer[:, 3:-2]


def _side_by_side(arguments: dict) -> dict:
    """q, k and v as columns of one buffer."""
    whole = torch.cat(arguments["y"], 1)
    return {"y": list(whole.split([y.shape[1] for y in arguments["y"]], 1))}


def _beyond_fp16(arguments: dict) -> dict:
    return {"pages_in": arguments["pages_in"] * 1e5, "pages_out": [pages * 1e-4 for pages in arguments["pages_out"]]}


def _nan_slot(arguments: dict) -> dict:
    """Slot 1 holds NaN."""
    for pages, column in ((arguments["pages_in"], FIRST_PAGE), (arguments["pages_out"][0], -1)):
        pages[arguments["table"][0][1, column]] = math.nan
    return {}


def _of(change=None, **sizes):
    def make(device, dtype, factor_dtype):
        arguments = problem(device, dtype, factor_dtype, **sizes)
        return arguments | (change(arguments) if change else {})

    return make


def samples() -> list[Sample]:
    """Each for an edge that has broken a kernel somewhere."""
    qkv = dict(N=(64, 16, 17), ranks=((8, 2, 5), (0, 9, 0), (0, 0, 0), (24, 1, 16)))
    one, many = ((16,),), tuple((r % 24,) for r in range(40))
    pairs = ((1, 20), (3, 0), (8, 8), (9, 17), (20, 3), (0, 9))
    mixed = dict(rows=40, ranks=pairs * 2, activations=("gelu", "identity", *NAMES[1:]), down_biased=True)
    bottleneck = dict(ranks=one, activations=("gelu",), down_biased=True)
    rows = [
        ("ones", "every size is 1", dict(rows=1, K=1, N=(1,), ranks=((1,),), ids=[0])),
        ("aligned", "every size fills whole tiles", dict(rows=64, K=512, N=(512,), ranks=one, ids=[0] * 64)),
        ("ragged", "no size is a multiple of anything", dict(rows=37, K=67, N=(131,))),
        ("ragged-wide", "more than one chunk and block", dict(rows=21, K=1061, N=(1043,), biased=True)),
        ("row", "one token: the decode path, cut along K", dict(rows=1, K=1100, N=(130,), ranks=one, ids=[0])),
        ("rows-16", "the last row count of one tile", dict(rows=16, K=67, N=(131,), ranks=one, ids=[0] * 16)),
        ("rows-17", "the first of two", dict(rows=17, K=67, N=(131,), ranks=one, ids=[0] * 17)),
        ("rank-1", "the smallest rank", dict(rows=19, K=40, N=(24,), ranks=((1,), (1,)))),
        ("rank-1024", "the largest rank, larger than K and N", dict(rows=9, K=40, N=(24,), ranks=((1024,), (4,)))),
        ("none", "no row has an adapter", dict(rows=9, ids=[-1] * 9)),
        ("untouched", "rank 0: a slot that does not touch the slice", dict(rows=9, ids=[5] * 9)),
        ("empty", "no rows", dict(rows=0)),
        ("distinct", "as many adapters as rows", dict(rows=40, K=70, ranks=many, ids=list(range(39, -1, -1)))),
        ("skewed", "one popular adapter", dict(rows=70, ranks=many, ids=[7] * 30 + [3, -1, 9] * 3 + [7] * 31)),
        ("bias", "biases on some slots", dict(rows=20, K=35, biased=True)),
        ("gain", "gains on some slots (DoRA)", dict(rows=40, K=64, N=(264, 40), ranks=pairs, gained=True)),
        ("gain-bias", "gains and biases", dict(rows=23, K=67, N=(131, 9), ranks=pairs, biased=True, gained=True)),
        ("down-bias", "a bias in front of an identity", dict(rows=20, K=35, down_biased=True)),
        *((f, f"{f} on every slot", dict(rows=19, K=67, N=(131,), activations=(f,))) for f in NAMES[1:]),
        ("mixed", "LoRA, bottlenecks of all kinds and no adapter in one batch", dict(mixed, K=64, N=(264, 40))),
        ("mixed-ragged", "no size fits", dict(mixed, K=67, N=(131, 9), biased=True, gained=True)),
        ("mixed-row", "one token of a bottleneck, cut along K", dict(bottleneck, rows=1, K=1100, N=(130,), ids=[0])),
        ("outside", "ids out of range count as none", dict(rows=6, ids=[0, 6, -2, 2**31 - 1, -(2**31), 4])),
        ("group", "q, k, v of different widths and ranks", dict(rows=23, K=67, biased=True, **qkv)),
    ]
    changed = [
        ("x-offset", "x inside a wider buffer", lambda a: {"x": _inside(a["x"])}, dict(rows=19, K=67)),
        ("x-expanded", "one row seen many times", lambda a: {"x": a["x"][:1].expand(19, -1)}, dict(rows=19)),
        ("y-offset", "y inside a wider buffer", lambda a: {"y": [_inside(a["y"][0])]}, dict(rows=19, N=(67,))),
        ("y-columns", "q, k, v side by side in one buffer", _side_by_side, dict(rows=11, **qkv)),
        ("beyond-fp16", "x A^T past the largest fp16, before a small B", _beyond_fp16, dict(rows=21, K=67, N=(131,))),
        ("nan-slot", "NaN in one adapter", _nan_slot, dict(rows=24)),
        ("nan-relu", "NaN in one bottleneck", _nan_slot, dict(rows=24, activations=("relu",), down_biased=True)),
    ]
    wide = dict(K=1000, N=(1024, 300), ranks=((16, 3), (8, 8), (64, 0)))
    return [
        *(Sample(id, why, _of(**sizes), PAIRS) for id, why, sizes in rows),
        *(Sample(id, why, _of(change, **sizes), PAIRS) for id, why, change, sizes in changed),
        Sample("busy-rows", "few rows, work for several threads", _of(rows=9, **wide), ((BF16, BF16),), busy=True),
        Sample("busy", "work for several threads", _of(rows=200, **wide), ((BF16, BF16), (F32, F32)), busy=True),
    ]


def evaluate(forward, backward, arguments: dict, dy) -> dict[str, Tensor]:
    """Every y after the call, by name; the arguments keep what they held."""
    y = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t) for t in arguments["y"]]
    forward(*(arguments | {"y": y}).values())
    return {f"y[{g}]": out for g, out in enumerate(y)}


# -- what must be refused ---------------------------------------------------------------------------------------------


def _bad(id: str, error: type[Exception], text: str, **changes) -> BadInput:
    """`changes[name]` makes a bad argument from a good one."""

    def make(device):
        arguments = problem(device, F32, F32)
        return arguments | {name: change(arguments[name]) for name, change in changes.items()}

    return BadInput(id, make, error, text)


def _first(change):
    return lambda tensors: [change(tensors[0]), *tensors[1:]]


def _bad_activations() -> list[BadInput]:
    """y, x and the route."""
    return [
        _bad("x-int", TypeError, "x must have dtype", x=lambda x: x.to(torch.int32)),
        _bad("x-sparse", TypeError, "x must be a dense", x=lambda x: x.to_sparse()),
        _bad("x-batch", ValueError, "x must have shape [M, in_features], got [3, 4, 32]", x=lambda x: x.view(3, 4, 32)),
        _bad("x-columns", ValueError, "x must have unit stride along in_features", x=lambda x: x.t().contiguous().t()),
        _bad("x-features", ValueError, "pages_in must be contiguous, of shape [pages, 8, in_features=31]",
             x=lambda x: x[:, :31]),
        _bad("y-none", ValueError, "y must name at least one output, got none", y=lambda y: []),
        _bad("y-dtype", TypeError, "y[0] must have dtype float32, as x, got bfloat16", y=_first(lambda y: y.to(BF16))),
        _bad("y-rows", ValueError, "y[0] must have shape [M=12, out_features], got [11, 48]",
             y=_first(lambda y: y[:11])),
        _bad("y-columns", ValueError, "y[0] must have unit stride along out_features",
             y=_first(lambda y: y.t().contiguous().t())),
        _bad("y-expanded", ValueError, "rows that do not overlap, got strides [0, 1]",
             y=_first(lambda y: y[:1].expand(12, -1))),
        _bad("y-device", TypeError, "y[0] must be on x's device", y=_first(lambda y: y.to("meta"))),
        _bad("route-dtype", TypeError, "route must have dtype int32", route=lambda r: r.long()),
        _bad("route-size", ValueError, "route must be contiguous, of shape [50] for M=12 and adapters=6, got [49]",
             route=lambda r: r[:-1]),
        _bad("route-strided", ValueError, "route must be contiguous", route=lambda r: r.repeat_interleave(2)[::2]),
    ]  # fmt: skip


def _bad_pool() -> list[BadInput]:
    """Pages, tables and scalings."""
    wrong_table = "table[0] must be contiguous, of shape [slots, 4 + 2 T]"
    return [
        _bad("pages_in-dtype", TypeError, "pages_in must have dtype float32, as x, or float32, got bfloat16",
             pages_in=lambda p: p.to(BF16)),
        _bad("pages_in-rows", ValueError, "pages_in must be contiguous, of shape [pages, 8, in_features=32]",
             pages_in=lambda p: p[:, :7].contiguous()),
        _bad("pages_out-count", ValueError, "pages_out must have one entry per y (1), got 2",
             pages_out=lambda p: p * 2),
        _bad("pages_out-dtype", TypeError, "pages_out[0] must have dtype float32, as pages_in, got float16",
             pages_out=_first(lambda p: p.half())),
        _bad("pages_out-width", ValueError, "pages_out[0] must be contiguous, of shape [pages, 8, out_features=48]",
             pages_out=_first(lambda p: p[..., :47].contiguous())),
        _bad("pages_out-strided", ValueError, "pages_out[0] must be contiguous", pages_out=_first(lambda p: p[::2])),
        _bad("table-count", ValueError, "table must have one entry per y (1), got 0", table=lambda t: []),
        _bad("table-dtype", TypeError, "table[0] must have dtype int32", table=_first(lambda t: t.long())),
        _bad("table-width", ValueError, wrong_table, table=_first(lambda t: t[:, :4].contiguous())),
        _bad("table-odd", ValueError, wrong_table, table=_first(lambda t: t[:, :7].contiguous())),
        _bad("table-1d", ValueError, wrong_table, table=_first(lambda t: t.flatten())),
        _bad("scaling-count", ValueError, "scaling must have one entry per y (1), got 2", scaling=lambda s: s * 2),
        _bad("scaling-dtype", TypeError, "scaling[0] must have dtype float32, got float64",
             scaling=_first(lambda s: s.double())),
        _bad("scaling-size", ValueError, "scaling[0] must be contiguous, of shape [slots=6], got [5]",
             scaling=_first(lambda s: s[:5])),
        _bad("down_bias-count", ValueError, "down_bias must have one entry per y (1), got 0", down_bias=lambda a: []),
        _bad("down_bias-dtype", TypeError, "down_bias[0] must have dtype float32, got bfloat16",
             down_bias=_first(lambda a: a.to(BF16))),
        _bad("down_bias-ranks", ValueError, "of shape [0] or [slots=6, 8 T=24], got [6, 20]",
             down_bias=_first(lambda a: a.new_zeros(6, 20))),
        _bad("down_bias-slots", ValueError, "got [24]", down_bias=_first(lambda a: a.new_zeros(24))),
        _bad("down_bias-strided", ValueError, "down_bias[0] must be contiguous",
             down_bias=_first(lambda a: a.new_zeros(24, 6).t())),
    ]  # fmt: skip


def bad_inputs() -> list[BadInput]:
    """What must be refused with words, before anything happens."""
    return _bad_activations() + _bad_pool()
