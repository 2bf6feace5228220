"""Inputs for lora_add: samples at the edges, each with the reason it is there, and inputs that must be refused."""

import math
from functools import partial

import torch

from peft_kernels.ops.common.projection_samples import (
    BF16,
    F16,
    F32,
    F64,
    ODD_PAIRS,
    PAIRS,
    bad_factors,
    bad_input,
    bad_numbers,
    inside,
    refused,
)
from peft_kernels.registry import BadInput, Sample


def problem(
    device,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    *,
    rows: tuple[int, ...] = (12,),
    K: int = 32,
    N: int = 48,
    ranks: tuple[int, ...] = (4,),
    p: tuple[float, ...] | float = 0.0,
    lora_biased: bool = False,
) -> dict:
    """Arguments of the op: one adapter per rank, scaled to contribute as much as the residual holds."""
    generator = torch.Generator().manual_seed(rows[-1] * 1009 + K * 31 + N if rows else K)

    def draw(*shape, scale=1.0, to=dtype):
        return (torch.randn(*shape, generator=generator, dtype=F64) * scale).to(device, to)

    return {
        "residual": draw(*rows, N),
        "x": draw(*rows, K),
        "lora_A": [draw(r, K, scale=K**-0.5, to=factor_dtype) for r in ranks],
        "lora_B": [draw(N, r, scale=r**-0.5, to=factor_dtype) for r in ranks],
        "lora_bias": [draw(N, to=factor_dtype) if lora_biased else None for _ in ranks],
        "scaling": [(-1.0) ** i * (1.0 + 0.25 * i) for i in range(len(ranks))],
        "dropout_p": list(p) if isinstance(p, tuple) else [p] * len(ranks),
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


def _columns(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, stored column by column."""
    return tensor.t().contiguous().t()


def _nan_row(arguments: dict) -> dict:
    arguments["residual"][3] = math.nan
    return {}


def _beyond_fp16(arguments: dict) -> dict:
    """h of the first adapter and ds of the second exceed 65504, from factors and to results that do not."""
    (first_A, second_A), (first_B, second_B) = arguments["lora_A"], arguments["lora_B"]
    return {
        "lora_A": [first_A * 3e4, second_A * 1e-3],
        "lora_B": [first_B * 1e-4, second_B * 3e4],
        "scaling": [4.0, 2.0],
    }


def samples() -> list[Sample]:
    """Each for an edge that has broken a kernel somewhere, or would."""
    wide = dict(K=1000, N=1024, ranks=(16, 3), p=0.1, lora_biased=True)
    out_of_fp16 = dict(dtypes=((F16, F16), (F16, F32)), rows=(21,), K=67, N=131, ranks=(3, 3), p=0.1)
    both = lambda a: {name: inside(a[name]) for name in ("residual", "x")}  # noqa: E731
    across = lambda a: {name: _columns(a[name]) for name in ("residual", "x")}  # noqa: E731
    one_row = lambda a: {name: a[name][:1].expand(19, -1) for name in ("residual", "x")}  # noqa: E731
    return [
        _plain("ones", "every size is 1", rows=(1,), K=1, N=1, ranks=(1,)),
        _plain("aligned", "every size fills whole tiles", rows=(64,), K=128, N=256, ranks=(16,)),
        _plain("ragged", "no size is a multiple of anything", rows=(37,), K=67, N=131, ranks=(5,), p=0.1),
        _plain("ragged-wide", "more than one block in every direction", rows=(150,), K=531, N=283, ranks=(19,)),
        _plain("row", "one token: the decode path", rows=(1,), K=515, N=130, ranks=(16,), lora_biased=True),
        _plain("rows-17", "one row past a tile of rows", rows=(17,), K=67, N=131, ranks=(8,), p=0.5),
        _plain("rank-1", "the smallest rank", rows=(19,), K=40, N=24, ranks=(1,)),
        _plain("rank-33", "one more than two vectors", rows=(19,), K=40, N=70, ranks=(33,), p=0.1),
        _plain("rank-70", "more than one tile of ranks", rows=(19,), K=72, N=80, ranks=(70,), p=0.1),
        _plain("rank-512", "the largest rank, larger than K and N", rows=(9,), K=40, N=24, ranks=(512,)),
        _plain("batch", "several batch dimensions", rows=(2, 3, 5), K=33, p=0.1, lora_biased=True),
        _plain("vector", "no batch dimension", rows=(), K=33),
        _plain("empty", "no rows", rows=(0,), p=0.1, lora_biased=True),
        _plain("empty-batch", "no rows in a batch of sequences", rows=(2, 0)),
        _plain("stacked", "adapters of several ranks and dropouts", rows=(21,), ranks=(3, 6, 1), p=(0.2, 0.0, 0.5),
               lora_biased=True),
        _plain("stacked-33", "one more than a CUDA launch takes", rows=(5,), K=16, ranks=(1,) * 33, p=0.1),
        _changed("inside", "residual and x inside wider buffers", both, rows=(4, 9), K=67, N=35, p=0.1),
        _changed("columns", "residual and x stored column by column", across, rows=(21,), lora_biased=True),
        _changed("expanded", "one row of residual and x seen many times", one_row, rows=(21,), p=0.1),
        _changed("nan-residual", "NaN in one row of the residual", _nan_row, rows=(21,), K=67, N=131),
        _changed("beyond-fp16", "s x A^T and s dy B past the largest fp16", _beyond_fp16, **out_of_fp16),
        _plain("factors", "16-bit factors of another type", ODD_PAIRS, rows=(21,), K=67, N=40, ranks=(6,), p=0.1),
        _plain("busy-row", "few rows, work for several threads", ((BF16, BF16),), busy=True, rows=(16,), **wide),
        _plain("busy", "many rows, work for several threads", ((BF16, BF16),), busy=True, rows=(200,), **wide),
    ]  # fmt: skip


def evaluate(forward, backward, arguments: dict, dy: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Both outputs and every gradient but the residual's, which is dy, by name."""
    y, h = forward(*arguments.values())
    differentiable = {"x": [arguments["x"]]} | {name: arguments[name] for name in ("lora_A", "lora_B", "lora_bias")}
    names = [f"grad {name}[{i}]" for name, tensors in differentiable.items() for i in range(len(tensors))]
    needs = [tensor is not None for tensors in differentiable.values() for tensor in tensors]
    rest = [arguments[name] for name in ("lora_A", "lora_B", "scaling", "dropout_p", "seed")]
    grads = backward(dy[0], arguments["x"], h, *rest, needs)
    gradients = {name: grad for name, grad, need in zip(names, grads, needs, strict=True) if need}
    return {"y[0]": y, "h": h} | gradients


def bad_inputs() -> list[BadInput]:
    """What must be refused with words, before anything happens."""
    bad = partial(refused, lambda device: problem(device, F32, F32, K=64, p=0.1))
    of_residual = [
        bad("residual-rows", ValueError, "residual must have x's leading sizes [12] and then out_features, got shape",
            residual=lambda r: r[:11]),
        bad("residual-batch", ValueError, "got shape [3, 4, 48]", residual=lambda r: r.view(3, 4, 48)),
        bad("residual-scalar", ValueError, "got shape []", residual=lambda r: r[0, 0]),
        bad("residual-empty", ValueError, "got shape [12, 0]", residual=lambda r: r[:, :0]),
        bad("residual-width", ValueError, "lora_B[0] must have shape [out_features=47, r=4], got [48, 4]",
            residual=lambda r: r[:, :47]),
        bad("residual-dtype", TypeError, "residual must have dtype float32, as x, got bfloat16",
            residual=lambda r: r.to(BF16)),
        bad("residual-device", TypeError, "residual must be on x's device", residual=lambda r: r.to("meta")),
        bad("residual-sparse", TypeError, "residual must be a dense", residual=lambda r: r.to_sparse()),
        bad("x-features", ValueError, "lora_A[0] must have shape [r, in_features=63], got [4, 64]",
            x=lambda x: x[:, :63]),
    ]  # fmt: skip
    return of_residual + bad_input(bad) + bad_factors(bad) + bad_numbers(bad)
