"""Inputs for lora_embedding: samples at the edges, each with the reason it is there, and inputs to be refused."""

import math
from functools import partial

import torch

from peft_kernels.ops.common.projection_samples import BF16, F32, F64, ODD_PAIRS, PAIRS, inside, refused
from peft_kernels.registry import BadInput, Sample

NO_F64 = PAIRS[:-1]  # the gradient at padding_idx is no derivative, which gradcheck would look for


def problem(
    device,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    *,
    rows: tuple[int, ...] = (12,),
    V: int = 40,
    N: int = 48,
    ranks: tuple[int, ...] = (4,),
    distinct: int | None = None,
    padding_idx: int | None = None,
    ids_dtype: torch.dtype = torch.int64,
) -> dict:
    """Arguments of the op: one adapter per rank, scaled to contribute as much as the residual holds. The ids are drawn
    from `distinct` ones, spread over the table with both its ends."""
    generator = torch.Generator().manual_seed(sum(rows) * 1009 + V * 31 + N)

    def draw(*shape, scale=1.0, to=dtype):
        return (torch.randn(*shape, generator=generator, dtype=F64) * scale).to(device, to)

    known = torch.linspace(0, V - 1, distinct or V).long()
    ids = known[torch.randint(len(known), rows, generator=generator)]
    return {
        "residual": draw(*rows, N),
        "ids": ids.to(device, ids_dtype),
        "lora_A": [draw(r, V, to=factor_dtype) for r in ranks],
        "lora_B": [draw(N, r, scale=r**-0.5, to=factor_dtype) for r in ranks],
        "scaling": [(-1.0) ** i * (1.0 + 0.25 * i) for i in range(len(ranks))],
        "padding_idx": padding_idx,
    }


def _plain(id: str, why: str, dtypes=PAIRS, busy=False, **sizes) -> Sample:
    return Sample(id, why, lambda device, dtype, factor: problem(device, dtype, factor, **sizes), dtypes, busy)


def _changed(id: str, why: str, change, **sizes) -> Sample:
    """A problem with some arguments laid out differently; `change(arguments)` returns the new ones."""

    def make(device, dtype, factor_dtype):
        arguments = problem(device, dtype, factor_dtype, **sizes)
        return arguments | change(arguments)

    return Sample(id, why, make, PAIRS)


def _strided(arguments: dict) -> dict:
    ids = arguments["ids"]
    return {"residual": inside(arguments["residual"]), "ids": torch.stack([ids, ids + 1], -1)[..., 0]}


def _transposed(arguments: dict) -> dict:
    """A stored [V, r], as a table that is looked up is."""
    return {"lora_A": [a.t().contiguous().t() for a in arguments["lora_A"]]}


def samples() -> list[Sample]:
    """Each for an edge that has broken a kernel somewhere, or would."""
    wide = dict(V=5000, N=1024, ranks=(16, 3), padding_idx=2)
    return [
        _plain("ones", "every size is 1", rows=(1,), V=1, N=1, ranks=(1,)),
        _plain("aligned", "every size fills whole tiles", rows=(64,), V=128, N=256, ranks=(16,)),
        _plain("ragged", "no size is a multiple of anything", rows=(37,), V=67, N=131, ranks=(5,)),
        _plain("ragged-wide", "more than one block in every direction", rows=(150,), V=531, N=283, ranks=(19,)),
        _plain("one-id", "every row has the same id: one long run", rows=(150,), V=9, ranks=(8,), distinct=1),
        _plain("ends", "the first and the last row of the table alone", rows=(33,), V=1001, distinct=2),
        _plain("padding", "half of the ids are padding", NO_F64, rows=(33,), V=5, distinct=2, padding_idx=0),
        _plain("all-padding", "padding alone: no gradient of A", NO_F64, rows=(9,), V=5, distinct=1, padding_idx=0),
        _plain("int32", "ids of 4 bytes", rows=(33,), V=70, ids_dtype=torch.int32),
        _plain("rank-1", "the smallest rank", rows=(19,), N=24, ranks=(1,)),
        _plain("rank-33", "one more than two vectors", rows=(19,), N=70, ranks=(33,)),
        _plain("rank-70", "more than one tile of ranks", rows=(19,), N=80, ranks=(70,)),
        _plain("rank-512", "the largest rank, larger than V and N", rows=(9,), N=24, ranks=(512,)),
        _plain("batch", "several batch dimensions", rows=(2, 3, 5)),
        _plain("scalar", "one id without a batch dimension", rows=()),
        _plain("empty", "no rows", rows=(0,), padding_idx=0),
        _plain("empty-batch", "no rows in a batch of sequences", rows=(2, 0)),
        _plain("stacked", "adapters of several ranks", rows=(21,), ranks=(3, 6, 1)),
        _plain("stacked-33", "one more than a CUDA launch takes", rows=(5,), V=16, ranks=(1,) * 33),
        _changed("inside", "residual inside a wider buffer, ids apart", _strided, rows=(4, 9), V=67, N=35),
        _changed("transposed", "A stored column by column", _transposed, rows=(21,), ranks=(6, 3)),
        _plain("factors", "16-bit factors of another type", ODD_PAIRS, rows=(21,), V=67, ranks=(6,), padding_idx=3),
        _plain("busy", "many rows, work for several threads", ((BF16, BF16),), busy=True, rows=(300,), **wide),
    ]  # fmt: skip


def evaluate(forward, backward, arguments: dict, dy: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Both outputs and every gradient but the residual's, which is dy, by name."""
    y, h = forward(*arguments.values())
    names = [f"grad {name}[{i}]" for name in ("lora_A", "lora_B") for i in range(len(arguments[name]))]
    rest = [arguments[name] for name in ("lora_A", "lora_B", "scaling", "padding_idx")]
    grads = backward(dy[0], arguments["ids"], h, *rest, [True] * len(names))
    return {"y[0]": y, "h": h} | dict(zip(names, grads, strict=True))


def bad_inputs() -> list[BadInput]:
    """What must be refused with words, before anything happens."""
    bad = partial(refused, lambda device: problem(device, F32, F32, V=64))

    def first(change):
        return lambda entries: [change(entries[0])]

    def zeros(*shape):
        return first(lambda tensor: tensor.new_zeros(shape))

    return [
        bad("residual-rows", ValueError, "residual must have the sizes of ids [12] and then embedding_dim, got shape",
            residual=lambda r: r[:11]),
        bad("residual-scalar", ValueError, "got shape []", residual=lambda r: r[0, 0]),
        bad("residual-empty", ValueError, "got shape [12, 0]", residual=lambda r: r[:, :0]),
        bad("residual-int", TypeError, "residual must have dtype float32, float16, bfloat16 or float64, got int32",
            residual=lambda r: r.to(torch.int32)),
        bad("residual-sparse", TypeError, "residual must be a dense", residual=lambda r: r.to_sparse()),
        bad("ids-float", TypeError, "ids must have dtype int64 or int32, got float32", ids=lambda i: i.float()),
        bad("ids-device", TypeError, "ids must be on residual's device", ids=lambda i: i.to("meta")),
        bad("lora_A-none", ValueError, "lora_A must name at least one adapter", lora_A=lambda a: []),
        bad("lora_A-double", TypeError, "lora_A[0] must have dtype float32, float16 or bfloat16, got float64",
            lora_A=first(lambda a: a.double())),
        bad("lora_A-1d", ValueError, "lora_A[0] must have shape [r, num_embeddings], got [64]",
            lora_A=first(lambda a: a[0])),
        bad("lora_A-several", ValueError, "lora_A[1] must have shape [r, num_embeddings=64], got [4, 63]",
            lora_A=lambda a: [a[0], a[0][:, :63]], lora_B=lambda b: b * 2, scaling=lambda s: s * 2),
        bad("rank-0", ValueError, "lora_A[0] must have a rank r from 1 to 512, got 0",
            lora_A=zeros(0, 64), lora_B=zeros(48, 0)),
        bad("rank-513", ValueError, "lora_A[0] must have a rank r from 1 to 512, got 513",
            lora_A=zeros(513, 64), lora_B=zeros(48, 513)),
        bad("lora_B-shape", ValueError, "lora_B[0] must have shape [embedding_dim=48, r=4], got [48, 5]",
            lora_B=zeros(48, 5)),
        bad("lora_B-dtype", TypeError, "lora_B[0] must have dtype float32, as lora_A[0], got bfloat16",
            lora_B=first(lambda b: b.to(BF16))),
        bad("lora_B-count", ValueError, "lora_B must have one entry per lora_A (1), got 2", lora_B=lambda b: b * 2),
        bad("scaling-inf", ValueError, "scaling[0] must be finite, got inf", scaling=lambda s: [math.inf]),
        bad("scaling-count", ValueError, "scaling must have one entry per lora_A (1), got 2", scaling=lambda s: s * 2),
        bad("padding-below", ValueError, "padding_idx must lie in [0, 64), got -1", padding_idx=lambda p: -1),
        bad("padding-above", ValueError, "padding_idx must lie in [0, 64), got 64", padding_idx=lambda p: 64),
    ]  # fmt: skip
