"""Inputs for lora_linear: samples at the edges, each with the reason it is there, and inputs that must be refused."""

import math

import torch

from peft_kernels.registry import BadInput, Sample

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
PAIRS = ((F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F64, F64))  # (activations, factors)
ODD_PAIRS = ((F32, BF16), (F32, F16), (F16, BF16), (BF16, F16))  # factors that no backend has a kernel of its own for


def problem(
    device,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    *,
    rows: tuple[int, ...] = (12,),
    K: int = 32,
    N: tuple[int, ...] = (48,),
    ranks: tuple[tuple[int, ...], ...] = ((4,),),
    p: float = 0.0,
    biased: bool = False,
    lora_biased: bool = False,
) -> dict:
    """Arguments of the op: one projection per entry of N, one adapter per entry of `ranks[g]`.

    The factors are scaled so that each adapter contributes as much as the frozen projection.
    """
    generator = torch.Generator().manual_seed(rows[-1] * 1009 + K * 31 + sum(N) if rows else K)

    def draw(*shape, scale=1.0, to=dtype):
        return (torch.randn(*shape, generator=generator, dtype=F64) * scale).to(device, to)

    owners = [g for g, group in enumerate(ranks) for _ in group]
    flat = [r for group in ranks for r in group]
    return {
        "x": draw(*rows, K),
        "weight": [draw(n, K, scale=K**-0.5) for n in N],
        "bias": [draw(n) if biased else None for n in N],
        "lora_A": [draw(r, K, scale=K**-0.5, to=factor_dtype) for r in flat],
        "lora_B": [draw(N[g], r, scale=r**-0.5, to=factor_dtype) for g, r in zip(owners, flat, strict=True)],
        "lora_bias": [draw(N[g], to=factor_dtype) if lora_biased else None for g in owners],
        "member": owners,
        "scaling": [(-1.0) ** i * (1.0 + 0.25 * i) for i in range(len(flat))],
        "dropout_p": [p] * len(flat),
        "seed": torch.tensor(0x5EED_0123_4567_89AB - K, device=device) if p else None,
    }


def _plain(id: str, why: str, dtypes=PAIRS, busy=False, **sizes) -> Sample:
    return Sample(id, why, lambda device, dtype, factor: problem(device, dtype, factor, **sizes), dtypes, busy)


def _changed(id: str, why: str, change, dtypes=PAIRS, **sizes) -> Sample:
    """A problem with some arguments laid out differently; `change(arguments)` returns the new ones."""

    def make(device, dtype, factor_dtype):
        arguments = problem(device, dtype, factor_dtype, **sizes)
        return arguments | change(arguments)

    return Sample(id, why, make, dtypes)


def _inside(tensor: torch.Tensor) -> torch.Tensor:
    """The same values inside a wider buffer, at an odd storage offset, rows apart by an odd stride."""
    buffer = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), math.nan)
    buffer[..., 3:-2] = tensor
    return buffer[..., 3:-2]


def _conv1d(arguments):
    return {"weight": [w.t().contiguous().t() for w in arguments["weight"]]}


def _strided_weight(arguments):
    return {"weight": [_inside(w.repeat_interleave(2, 1))[:, ::2] for w in arguments["weight"]]}


def samples() -> list[Sample]:
    """About twenty, each for an edge that has broken a kernel somewhere."""
    qkv = dict(N=(64, 16, 16), ranks=((8,), (2,), (5,)))
    wide = dict(K=1000, N=(1024, 300), ranks=((16, 3), (8,)), p=0.1, biased=True)
    return [
        _plain("ones", "every size is 1", rows=(1,), K=1, N=(1,), ranks=((1,),)),
        _plain("aligned", "every size fills whole tiles", rows=(64,), K=128, N=(256,), ranks=((16,),)),
        _plain("ragged", "no size is a multiple of anything", rows=(37,), K=67, N=(131,), ranks=((5,),)),
        _plain("ragged-wide", "more than one block in every direction", rows=(70,), K=531, N=(283,), ranks=((19,),)),
        _plain("row", "one token: the decode path", rows=(1,), K=515, N=(130,), ranks=((16,),), biased=True),
        _plain("rows-16", "the last row count of the few-row path", rows=(16,), K=67, N=(131,), ranks=((8,),)),
        _plain("rows-17", "the first row count past it", rows=(17,), K=67, N=(131,), ranks=((8,),)),
        _plain("rank-1", "the smallest rank", rows=(19,), K=40, N=(24,), ranks=((1,),)),
        _plain("rank-33", "one more than two vectors", rows=(19,), K=40, N=(70,), ranks=((33,),), p=0.1),
        _plain("rank-512", "the largest rank, larger than K and N", rows=(9,), K=40, N=(24,), ranks=((512,),)),
        _plain("batch", "several batch dimensions", rows=(2, 3, 5), K=33, biased=True),
        _plain("vector", "no batch dimension", rows=(), K=33),
        _plain("empty", "no rows", rows=(0,), p=0.1),
        _plain("empty-batch", "no rows in a batch of sequences", rows=(2, 0), biased=True),
        _plain("bias", "base bias and adapter bias", rows=(20,), K=35, biased=True, lora_biased=True),
        _plain("dropout", "mask replay over ragged blocks", rows=(37,), K=331, N=(131,), ranks=((5,),), p=0.1),
        _plain("dropout-row", "mask replay on the few-row path", rows=(3,), K=331, N=(70,), ranks=((16,),), p=0.5),
        _plain("dropout-tiny", "p rounds to no dropout at 16 bits", p=1e-6),
        _plain("dropout-most", "nearly everything dropped", rows=(40,), p=0.9999),
        _changed("conv1d", "weight stored [K, N]", _conv1d, rows=(20,), K=35, N=(131,), p=0.1),
        _changed("conv1d-row", "weight stored [K, N], few rows", _conv1d, rows=(3,), K=135, N=(131,), biased=True),
        _changed("weight-strided", "no unit stride in weight", _strided_weight, rows=(5,), K=35, N=(20,)),
        _changed("x-offset", "x inside a wider buffer", lambda a: {"x": _inside(a["x"])}, rows=(4, 9), K=67, p=0.1),
        _changed("x-columns", "x stored column by column", lambda a: {"x": a["x"].t().contiguous().t()}, rows=(21,)),
        _changed(
            "x-expanded", "one row seen many times", lambda a: {"x": a["x"][:1].expand(19, -1)}, rows=(21,), p=0.1
        ),
        _plain("group", "q, k, v of different widths and ranks", rows=(2, 11), K=67, p=0.1, biased=True, **qkv),
        _plain("group-row", "the same for one token", rows=(1,), K=67, p=0.1, **qkv),
        _plain("group-frozen", "a member without an adapter", rows=(21,), N=(24, 40, 24), ranks=((3,), (), (5,))),
        _plain("stacked", "two active adapters on one layer", rows=(21,), ranks=((3, 6),), p=0.2, lora_biased=True),
        _plain("factors", "16-bit factors of another type", ODD_PAIRS, rows=(21,), K=67, N=(40,), ranks=((6,),), p=0.1),
        _plain("busy-row", "few rows, work for several threads", ((BF16, BF16),), busy=True, rows=(16,), **wide),
        _plain("busy", "a GEMM, work for several threads", ((BF16, BF16),), busy=True, rows=(200,), **wide),
    ]


def evaluate(forward, backward, arguments: dict, dy: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every output and every gradient of one problem, by name."""
    y, h = forward(*arguments.values())
    results = {f"y[{g}]": out for g, out in enumerate(y)} | {"h": h}
    differentiable = {"x": [arguments["x"]]} | {
        name: arguments[name] for name in ("weight", "bias", "lora_A", "lora_B", "lora_bias")
    }
    names = [f"grad {name}[{i}]" for name, tensors in differentiable.items() for i in range(len(tensors))]
    needs = [tensor is not None for tensors in differentiable.values() for tensor in tensors]
    rest = [arguments[n] for n in ("weight", "lora_A", "lora_B", "member", "scaling", "dropout_p", "seed")]
    grads = backward(dy, arguments["x"], h, *rest, needs)
    return results | {name: grad for name, grad, need in zip(names, grads, needs, strict=True) if need}


def _bad(id: str, error: type[Exception], text: str, **changes) -> BadInput:
    """A good problem with some arguments changed for the worse."""

    def make(device):
        arguments = problem(device, F32, F32, K=64, p=0.1)
        return arguments | {key: change(arguments[key]) for key, change in changes.items()}

    return BadInput(id, make, error, text)


def _first(change):
    return lambda entries: [change(entries[0])]


def _like(*shape):
    return lambda tensor: tensor.new_zeros(shape)


def _bad_base() -> list[BadInput]:
    """x and the frozen projections."""
    return [
        _bad("x-int", TypeError, "x must have dtype", x=lambda x: x.to(torch.int32)),
        _bad("x-complex", TypeError, "x must have dtype", x=lambda x: x.to(torch.complex64)),
        _bad("x-sparse", TypeError, "x must be a dense", x=lambda x: x.to_sparse()),
        _bad("x-features", ValueError, "weight[0] must have shape [out_features, in_features=63], got [48, 64]",
            x=lambda x: x[:, :63]),
        _bad("x-scalar", ValueError, "x must have shape [..., in_features]", x=lambda x: x[0, 0]),
        _bad("weight-1d", ValueError, "weight[0] must have shape", weight=_first(lambda w: w[0])),
        _bad("weight-dtype", TypeError, "weight[0] must have dtype float32, as x, got bfloat16",
            weight=_first(lambda w: w.to(BF16))),
        _bad("weight-packed", TypeError, "weight[0] must have dtype float32, as x, got uint8",
            weight=_first(lambda w: w.to(torch.uint8))),
        _bad("weight-none", ValueError, "weight must name at least one projection",
            weight=lambda w: [], bias=lambda b: []),
        _bad("weight-device", TypeError, "weight[0] must be on x's device", weight=_first(lambda w: w.to("meta"))),
        _bad("bias-shape", ValueError, "bias[0] must have shape [out_features=48], got [47]",
            bias=lambda b: [torch.zeros(47)]),
        _bad("bias-dtype", TypeError, "bias[0] must have dtype float32", bias=lambda b: [torch.zeros(48, dtype=F64)]),
        _bad("bias-count", ValueError, "bias must have one entry per weight (1), got 2", bias=lambda b: [None, None]),
    ]  # fmt: skip


def _bad_factors() -> list[BadInput]:
    """The adapters' tensors."""
    return [
        _bad("lora_A-shape", ValueError, "lora_A[0] must have shape [r, in_features=64], got [4, 63]",
            lora_A=_first(_like(4, 63))),
        _bad("lora_A-none", ValueError, "lora_A must name at least one adapter", lora_A=lambda a: []),
        _bad("lora_A-double", TypeError, "lora_A[0] must have dtype float32, float16 or bfloat16, got float64",
            lora_A=_first(lambda a: a.double())),
        _bad("rank-0", ValueError, "lora_A[0] must have a rank r from 1 to 512, got 0",
            lora_A=_first(_like(0, 64)), lora_B=_first(_like(48, 0))),
        _bad("rank-513", ValueError, "lora_A[0] must have a rank r from 1 to 512, got 513",
            lora_A=_first(_like(513, 64)), lora_B=_first(_like(48, 513))),
        _bad("lora_B-shape", ValueError, "lora_B[0] must have shape [out_features=48, r=4], got [48, 5]",
            lora_B=_first(_like(48, 5))),
        _bad("lora_B-dtype", TypeError, "lora_B[0] must have dtype float32, as lora_A[0], got bfloat16",
            lora_B=_first(lambda b: b.to(BF16))),
        _bad("lora_B-count", ValueError, "lora_B must have one entry per lora_A (1), got 2", lora_B=lambda b: b * 2),
        _bad("lora_bias-shape", ValueError, "lora_bias[0] must have shape [out_features=48], got [4]",
            lora_bias=lambda c: [torch.zeros(4)]),
    ]  # fmt: skip


def _bad_numbers() -> list[BadInput]:
    """Indices, scalings, probabilities and the seed."""
    return [
        _bad("member-range", ValueError, "member[0] must lie in [0, 1), got 1", member=lambda m: [1]),
        _bad("member-negative", ValueError, "member[0] must lie in [0, 1), got -1", member=lambda m: [-1]),
        _bad("scaling-inf", ValueError, "scaling[0] must be finite, got inf", scaling=lambda s: [math.inf]),
        _bad("scaling-nan", ValueError, "scaling[0] must be finite, got nan", scaling=lambda s: [math.nan]),
        _bad("p-one", ValueError, "dropout_p[0] must lie in [0, 1), got 1", dropout_p=lambda p: [1.0]),
        _bad("p-negative", ValueError, "dropout_p[0] must lie in [0, 1), got -0.1", dropout_p=lambda p: [-0.1]),
        _bad("seed-missing", ValueError, "seed must be given where dropout_p > 0", seed=lambda s: None),
        _bad("seed-dtype", TypeError, "seed must have dtype int64, got int32", seed=lambda s: s.to(torch.int32)),
        _bad("seed-empty", ValueError, "seed must be a 0-d tensor, got shape [0]",
             dropout_p=lambda p: [0.0], seed=lambda s: s.new_empty(0)),
        _bad("seed-shape", ValueError, "seed must be a 0-d tensor, got shape [1]", seed=lambda s: s[None]),
    ]  # fmt: skip


def bad_inputs() -> list[BadInput]:
    """What must be refused with words, before anything happens."""
    return _bad_base() + _bad_factors() + _bad_numbers()
