"""Inputs for dora_norm and dora_scale: samples at the edges, each with the reason it is there, and inputs that must be
refused."""

import math
from functools import partial

import torch
from torch import Tensor

from peft_kernels.ops.common.projection_samples import BF16, F16, F32, F64, ODD_PAIRS, PAIRS, inside, refused
from peft_kernels.registry import BadInput, Sample


def _drawing(device, seed: int):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, to, scale=1.0, offset=0.0):
        return (torch.randn(shape, generator=generator, dtype=F64) * scale + offset).to(device, to)

    return draw


def _sample(problem, id: str, why: str, change=None, dtypes=PAIRS, busy=False, **sizes) -> Sample:
    """A problem; `change(arguments)` gives those that are laid out or scaled differently."""

    def make(device, dtype, factor_dtype):
        arguments = problem(device, dtype, factor_dtype, **sizes)
        return arguments | (change(arguments) if change else {})

    return Sample(id, why, make, dtypes, busy)


def _columns(tensor: Tensor) -> Tensor:
    """The same values, stored column by column."""
    return tensor.t().contiguous().t()


def _strided(tensor: Tensor) -> Tensor:
    """The same values, two apart inside a wider buffer."""
    return inside(tensor.repeat_interleave(2, -1))[..., ::2]


# -- dora_norm --------------------------------------------------------------------------------------------------------


def norm_problem(device, dtype, factor_dtype, *, N=48, K=32, R=4, scaling=-1.5) -> dict:
    """Arguments of dora_norm. The factors are scaled so that s B A is as large as W."""
    draw = _drawing(device, N * 1009 + K * 31 + R)
    return {
        "weight": draw(N, K, to=dtype, scale=K**-0.5),
        "lora_A": draw(R, K, to=factor_dtype, scale=K**-0.5),
        "lora_B": draw(N, R, to=factor_dtype, scale=R**-0.5),
        "scaling": scaling,
    }


def norm_size(weight, lora_A, lora_B, scaling) -> Tensor:
    """S: what the squares add up to without their signs, under the derivative of the root."""
    norm = torch.linalg.vector_norm(weight + scaling * (lora_B @ lora_A), dim=1)
    most = torch.linalg.vector_norm(weight.abs() + abs(scaling) * (lora_B.abs() @ lora_A.abs()), dim=1)
    return most * most / norm


def _cancelling(arguments: dict) -> dict:
    """s B A nearly takes W away."""
    weight, a, b = (arguments[name].double() for name in ("weight", "lora_A", "lora_B"))
    return {"weight": (0.03 * weight - arguments["scaling"] * (b @ a)).to(arguments["weight"].dtype)}


def _nan_row(arguments: dict) -> dict:
    weight = arguments["weight"].clone()
    weight[3, 5] = math.nan
    return {"weight": weight}


def norm_samples() -> list[Sample]:
    """Each for an edge that could break a kernel."""
    sample = partial(_sample, norm_problem)
    far = dict(dtypes=((F16, F16), (F16, F32)), N=37, K=67)
    return [
        sample("ones", "every size is 1", N=1, K=1, R=1),
        sample("aligned", "every size fills whole tiles", N=128, K=256, R=16),
        sample("ragged", "no size is a multiple of anything", N=37, K=67, R=5),
        sample("ragged-wide", "more than one block in every direction", N=283, K=531, R=19),
        sample("row", "one row, cut along K", N=1, K=1100, R=16),
        sample("column", "one input", N=67, K=1, R=3),
        sample("rank-1", "the smallest rank", N=19, K=40, R=1),
        sample("rank-33", "one more than two vectors", N=70, K=40, R=33),
        sample("rank-65", "one more than a tile", N=40, K=72, R=65),
        sample("rank-512", "the largest rank, larger than K and N", N=24, K=40, R=512),
        sample("scaling-0", "W alone", N=21, K=67, scaling=0.0),
        sample("cancelling", "s B A takes nearly all of W away", _cancelling, N=37, K=67, R=5),
        sample("conv1d", "weight stored [K, N]", lambda a: {"weight": _columns(a["weight"])}, N=131, K=35),
        sample("weight-strided", "no unit stride in weight", lambda a: {"weight": _strided(a["weight"])}, N=20, K=35),
        sample("weight-inside", "weight inside a wider buffer", lambda a: {"weight": inside(a["weight"])}, N=21, K=67),
        sample("weight-expanded", "one row seen many times", lambda a: {"weight": a["weight"][:1].expand(48, -1)}),
        sample("factors-columns", "factors stored column by column",
               lambda a: {name: _columns(a[name]) for name in ("lora_A", "lora_B")}, N=21, K=67, R=9),
        sample("factors-strided", "no unit stride in the factors",
               lambda a: {name: _strided(a[name]) for name in ("lora_A", "lora_B")}, N=21, K=67, R=9),
        sample("factors", "16-bit factors of another type", dtypes=ODD_PAIRS, N=21, K=67, R=6),
        sample("beyond-fp16", "W A^T past the largest fp16, before a small B",
               lambda a: {"lora_A": a["lora_A"] * 1e5, "lora_B": a["lora_B"] * 1e-4}, **far),
        sample("beyond-fp16-square", "squares of W past the largest fp16", lambda a: {"weight": a["weight"] * 2e4},
               **far),
        sample("nan-row", "NaN in one row of weight", _nan_row, N=21, K=67),
        sample("busy", "work for several threads", dtypes=((BF16, BF16), (BF16, F32), (F32, F32)), busy=True, N=700,
               K=1000, R=16),
        sample("busy-rank", "the same at a large rank", dtypes=((BF16, BF16), (F32, F32)), busy=True, N=300, K=1000,
               R=130),
    ]  # fmt: skip


def evaluate_norm(forward, backward, arguments: dict, dy) -> dict[str, Tensor]:
    return {"y[0]": forward(*arguments.values())}


def bad_norms() -> list[BadInput]:
    """What must be refused with words, before anything happens."""
    bad = partial(refused, lambda device: norm_problem(device, F32, F32, N=48, K=64))
    return [
        bad("weight-int", TypeError, "weight must have dtype", weight=lambda w: w.to(torch.int32)),
        bad("weight-packed", TypeError, "weight must have dtype", weight=lambda w: w.to(torch.uint8)),
        bad("weight-sparse", TypeError, "weight must be a dense", weight=lambda w: w.to_sparse()),
        bad("weight-1d", ValueError, "weight must have shape [out_features, in_features], got [64]",
            weight=lambda w: w[0]),
        bad("weight-empty", ValueError, "weight must have shape [out_features, in_features], got [0, 64]",
            weight=lambda w: w[:0]),
        bad("lora_A-shape", ValueError, "lora_A must have shape [r, in_features=64], got [4, 63]",
            lora_A=lambda a: a[:, :63]),
        bad("lora_A-double", TypeError, "lora_A must have dtype float32, float16 or bfloat16, got float64",
            lora_A=lambda a: a.double()),
        bad("lora_A-single", TypeError, "lora_A must have dtype float64, as weight, got float32",
            weight=lambda w: w.double()),
        bad("lora_A-device", TypeError, "lora_A must be on weight's device", lora_A=lambda a: a.to("meta")),
        bad("rank-0", ValueError, "lora_A must have a rank r from 1 to 512, got 0",
            lora_A=lambda a: a[:0], lora_B=lambda b: b[:, :0]),
        bad("rank-513", ValueError, "lora_A must have a rank r from 1 to 512, got 513",
            lora_A=lambda a: a.new_zeros(513, 64), lora_B=lambda b: b.new_zeros(48, 513)),
        bad("lora_B-shape", ValueError, "lora_B must have shape [out_features=48, r=4], got [48, 3]",
            lora_B=lambda b: b[:, :3]),
        bad("lora_B-dtype", TypeError, "lora_B must have dtype float32, as lora_A, got bfloat16",
            lora_B=lambda b: b.to(BF16)),
        bad("scaling-inf", ValueError, "scaling must be finite, got inf", scaling=lambda s: math.inf),
        bad("scaling-nan", ValueError, "scaling must be finite, got nan", scaling=lambda s: math.nan),
    ]  # fmt: skip


# -- dora_scale -------------------------------------------------------------------------------------------------------


def scale_problem(
    device, dtype, factor_dtype, *, rows=(12,), N=48, biased=False, residual=False, adapters=0, ids=None
) -> dict:
    """Arguments of dora_scale. adapters: of a mixed batch, 0 for one that all rows have. ids: of the rows; by default
    none and every adapter in turn."""
    draw = _drawing(device, (rows[-1] if rows else 1) * 1009 + N * 31 + adapters)
    M, lead = math.prod(rows), (adapters,) if adapters else ()
    numbers = [i % (adapters + 1) - 1 for i in range(M)] if ids is None else ids
    return {
        "z": draw(*rows, N, to=dtype),
        "magnitude": draw(*lead, N, to=factor_dtype, scale=0.5, offset=2.0),
        "norm": draw(*lead, N, to=F64 if dtype is F64 else F32, scale=0.2).abs() + 1,
        "bias": draw(N, to=dtype) if biased else None,
        "residual": draw(*rows, N, to=dtype) if residual else None,
        "ids": torch.tensor(numbers, dtype=torch.int32, device=device).reshape(rows) if adapters else None,
    }


def _inside_all(arguments: dict) -> dict:
    return {name: inside(arguments[name]) for name in ("z", "residual")}


def _vectors_strided(arguments: dict) -> dict:
    return {name: _strided(arguments[name]) for name in ("magnitude", "norm", "bias")}


def _ids_strided(arguments: dict) -> dict:
    return {"ids": arguments["ids"].repeat_interleave(2)[::2]}


def _nan_adapter(arguments: dict) -> dict:
    """Of no other row."""
    magnitude = arguments["magnitude"].clone()
    magnitude[1] = math.nan
    return {"magnitude": magnitude}


def _nan_unused(arguments: dict) -> dict:
    """What no row has is not read."""
    magnitude = arguments["magnitude"].clone()
    magnitude[2] = math.nan
    return {"magnitude": magnitude}


def scale_samples() -> list[Sample]:
    """Each for an edge that could break a kernel."""
    sample = partial(_sample, scale_problem)
    everything = dict(biased=True, residual=True)
    far = dict(dtypes=((F16, F16), (F16, F32)), rows=(37,), N=67)
    return [
        sample("ones", "every size is 1", rows=(1,), N=1),
        sample("aligned", "every size fills whole tiles", rows=(64,), N=256),
        sample("ragged", "no size is a multiple of anything", rows=(37,), N=67, **everything),
        sample("ragged-wide", "more than one block in both directions", rows=(300,), N=1031, biased=True),
        sample("row", "one token", rows=(1,), N=1031, residual=True),
        sample("column", "one feature", rows=(67,), N=1, **everything),
        sample("batch", "several batch dimensions", rows=(2, 3, 5), N=33, residual=True),
        sample("vector", "no batch dimension", rows=(), N=33, biased=True),
        sample("empty", "no rows", rows=(0,), **everything),
        sample("empty-batch", "no rows in a batch of sequences", rows=(2, 0), adapters=3, biased=True),
        sample("inside", "activations inside wider buffers", _inside_all, rows=(4, 9), N=67, residual=True),
        sample("columns", "z stored column by column", lambda a: {"z": _columns(a["z"])}, rows=(21,), N=67),
        sample("expanded", "one row seen many times", lambda a: {"z": a["z"][:1].expand(19, -1)}, rows=(19,), N=67),
        sample("residual-over-z", "z is its own residual", lambda a: {"residual": a["z"]}, rows=(21,), N=67),
        sample("vectors-strided", "no unit stride in the vectors", _vectors_strided, rows=(21,), N=67, biased=True),
        sample("factors", "16-bit magnitudes of another type", dtypes=ODD_PAIRS, rows=(21,), N=67, **everything),
        sample("adapters", "every adapter and none in one batch", rows=(37,), N=67, adapters=5, **everything),
        sample("adapters-batch", "sequences of them", rows=(3, 11), N=40, adapters=3),
        sample("adapters-row", "one token of the last adapter", rows=(1,), N=1031, adapters=3, ids=[2]),
        sample("adapters-none", "no row has one", rows=(9,), N=67, adapters=2, ids=[-1] * 9, biased=True),
        sample("adapters-many", "more adapters than rows", rows=(7,), N=67, adapters=40, ids=[39, 0, 7, 7, -1, 20, 3]),
        sample("adapters-1d", "ids of a batch, flat", lambda a: {"ids": a["ids"].flatten()}, rows=(3, 7), adapters=2),
        sample("ids-strided", "no unit stride in ids", _ids_strided, rows=(21,), N=67, adapters=4),
        sample("nan-adapter", "NaN in one adapter", _nan_adapter, rows=(24,), N=67, adapters=3, **everything),
        sample("nan-unused", "NaN in an adapter that no row has", _nan_unused, rows=(6,), adapters=3,
               ids=[0, 1, -1, 1, 0, 0]),
        sample("beyond-fp16", "m / norm past the largest fp16, over a small z",
               lambda a: {"z": a["z"] * 1e-5, "norm": a["norm"] * 1e-5}, **far),
        sample("busy", "work for several threads", dtypes=((BF16, BF16), (BF16, F32), (F32, F32)), busy=True,
               rows=(700,), N=1031, **everything),
        sample("busy-adapters", "the same in a mixed batch", dtypes=((BF16, F32), (F32, F32)), busy=True, rows=(700,),
               N=1031, adapters=7, **everything),
    ]  # fmt: skip


def evaluate_scale(forward, backward, arguments: dict, dy: list[Tensor]) -> dict[str, Tensor]:
    """y and every gradient of one problem, by name."""
    z, magnitude, norm, bias, _, ids = arguments.values()
    needs = [True, True, bias is not None]
    grads = backward(dy[0], z, magnitude, norm, ids, needs)
    named = zip(("grad z[0]", "grad magnitude[0]", "grad bias[0]"), grads, needs, strict=True)
    return {"y[0]": forward(*arguments.values())} | {name: grad for name, grad, need in named if need}


def bad_scales() -> list[BadInput]:
    """What must be refused with words, before anything happens."""
    bad = partial(refused, lambda device: scale_problem(device, F32, F32, biased=True, residual=True))
    mixed = partial(refused, lambda device: scale_problem(device, F32, F32, adapters=3))
    return [
        bad("z-int", TypeError, "z must have dtype", z=lambda z: z.to(torch.int32)),
        bad("z-sparse", TypeError, "z must be a dense", z=lambda z: z.to_sparse()),
        bad("z-scalar", ValueError, "z must have shape [..., out_features]", z=lambda z: z[0, 0]),
        bad("z-empty", ValueError, "z must have at least one feature, got shape [12, 0]", z=lambda z: z[:, :0]),
        bad("norm-shape", ValueError, "norm must have shape [out_features=47], got [48]", z=lambda z: z[:, :47]),
        bad("norm-dtype", TypeError, "norm must have dtype float32, as dora_norm returns it, got bfloat16",
            norm=lambda n: n.to(BF16)),
        bad("norm-device", TypeError, "norm must be on z's device", norm=lambda n: n.to("meta")),
        bad("magnitude-shape", ValueError, "magnitude must have shape [48], as norm, got [1, 48]",
            magnitude=lambda m: m[None]),
        bad("magnitude-dtype", TypeError, "magnitude must have dtype float32, float16 or bfloat16, got float64",
            magnitude=lambda m: m.double()),
        bad("magnitude-single", TypeError, "magnitude must have dtype float64, as z, got float32",
            z=lambda z: z.double(), norm=lambda n: n.double()),
        bad("bias-shape", ValueError, "bias must have shape [out_features=48], got [47]", bias=lambda b: b[:47]),
        bad("bias-dtype", TypeError, "bias must have dtype float32, as z, got float16", bias=lambda b: b.half()),
        bad("residual-shape", ValueError, "residual must have shape [12, 48], as z, got [11, 48]",
            residual=lambda r: r[:11]),
        bad("residual-dtype", TypeError, "residual must have dtype float32, as z, got bfloat16",
            residual=lambda r: r.to(BF16)),
        mixed("ids-dtype", TypeError, "ids must have dtype int32, got int64", ids=lambda i: i.long()),
        mixed("ids-shape", ValueError, "ids must have shape [12], as z without its features, or [12], got [11]",
              ids=lambda i: i[:11]),
        mixed("ids-device", TypeError, "ids must be on z's device", ids=lambda i: i.to("meta")),
        mixed("norm-adapters", ValueError, "norm must have shape [adapters, out_features=48] beside ids, got [48]",
              norm=lambda n: n[0]),
        mixed("norm-none", ValueError, "norm must have shape [adapters, out_features=48] beside ids, got [0, 48]",
              norm=lambda n: n[:0], magnitude=lambda m: m[:0]),
        mixed("magnitude-adapters", ValueError, "magnitude must have shape [3, 48], as norm, got [2, 48]",
              magnitude=lambda m: m[:2]),
    ]  # fmt: skip
