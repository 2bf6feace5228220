"""What the samples of the families that add adapters to frozen projections share: layouts, the evaluation of a problem
with every gradient, and inputs that must be refused."""

import math
from collections.abc import Callable
from functools import partial

import torch

from peft_kernels.registry import BadInput

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
PAIRS = ((F32, F32), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F64, F64))  # (activations, factors)
ODD_PAIRS = ((F32, BF16), (F32, F16), (F16, BF16), (BF16, F16))  # factors that no backend has a kernel of its own for


def inside(tensor: torch.Tensor) -> torch.Tensor:
    """The same values inside a wider buffer, at an odd storage offset, rows apart by an odd stride."""
    buffer = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), math.nan)
    buffer[..., 3:-2] = tensor
    return buffer[..., 3:-2]


def conv1d(arguments):
    return {"weight": [w.t().contiguous().t() for w in arguments["weight"]]}


def strided_weight(arguments):
    return {"weight": [inside(w.repeat_interleave(2, 1))[:, ::2] for w in arguments["weight"]]}


def evaluate(forward, backward, arguments: dict, dy: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every output and every gradient of one problem, by name."""
    y, h = forward(*arguments.values())
    results = {f"y[{g}]": out for g, out in enumerate(y)} | {"h": h}
    differentiable = {"x": [arguments["x"]]} | {
        name: arguments[name] for name in ("weight", "bias", "lora_A", "lora_B", "lora_bias")
    }
    names = [f"grad {name}[{i}]" for name, tensors in differentiable.items() for i in range(len(tensors))]
    needs = [tensor is not None for tensors in differentiable.values() for tensor in tensors]
    rest = [value for name, value in arguments.items() if name not in ("x", "bias", "lora_bias")]
    grads = backward(dy, arguments["x"], h, *rest, needs)
    return results | {name: grad for name, grad, need in zip(names, grads, needs, strict=True) if need}


def refused(make: Callable, id: str, error: type[Exception], text: str, **changes) -> BadInput:
    """The good problem `make(device)` with some arguments changed for the worse."""

    def changed(device):
        arguments = make(device)
        return arguments | {key: change(arguments[key]) for key, change in changes.items()}

    return BadInput(id, changed, error, text)


def _first(change):
    return lambda entries: [change(entries[0])]


def _like(*shape):
    return lambda tensor: tensor.new_zeros(shape)


def bad_input(bad: Callable) -> list[BadInput]:
    """x alone."""
    return [
        bad("x-int", TypeError, "x must have dtype", x=lambda x: x.to(torch.int32)),
        bad("x-complex", TypeError, "x must have dtype", x=lambda x: x.to(torch.complex64)),
        bad("x-sparse", TypeError, "x must be a dense", x=lambda x: x.to_sparse()),
        bad("x-scalar", ValueError, "x must have shape [..., in_features]", x=lambda x: x[0, 0]),
    ]


def _bad_base(bad: Callable) -> list[BadInput]:
    """x against the frozen projections, these, and the indices that name them."""
    return [
        bad("x-features", ValueError, "weight[0] must have shape [out_features, in_features=63], got [48, 64]",
            x=lambda x: x[:, :63]),
        bad("weight-1d", ValueError, "weight[0] must have shape", weight=_first(lambda w: w[0])),
        bad("weight-dtype", TypeError, "weight[0] must have dtype float32, as x, got bfloat16",
            weight=_first(lambda w: w.to(BF16))),
        bad("weight-packed", TypeError, "weight[0] must have dtype float32, as x, got uint8",
            weight=_first(lambda w: w.to(torch.uint8))),
        bad("weight-none", ValueError, "weight must name at least one projection",
            weight=lambda w: [], bias=lambda b: []),
        bad("weight-device", TypeError, "weight[0] must be on x's device", weight=_first(lambda w: w.to("meta"))),
        bad("bias-shape", ValueError, "bias[0] must have shape [out_features=48], got [47]",
            bias=lambda b: [torch.zeros(47)]),
        bad("bias-dtype", TypeError, "bias[0] must have dtype float32", bias=lambda b: [torch.zeros(48, dtype=F64)]),
        bad("bias-count", ValueError, "bias must have one entry per weight (1), got 2", bias=lambda b: [None, None]),
        bad("member-range", ValueError, "member[0] must lie in [0, 1), got 1", member=lambda m: [1]),
        bad("member-negative", ValueError, "member[0] must lie in [0, 1), got -1", member=lambda m: [-1]),
    ]  # fmt: skip


def bad_factors(bad: Callable) -> list[BadInput]:
    """The adapters' tensors."""
    return [
        bad("lora_A-shape", ValueError, "lora_A[0] must have shape [r, in_features=64], got [4, 63]",
            lora_A=_first(_like(4, 63))),
        bad("lora_A-none", ValueError, "lora_A must name at least one adapter", lora_A=lambda a: []),
        bad("lora_A-double", TypeError, "lora_A[0] must have dtype float32, float16 or bfloat16, got float64",
            lora_A=_first(lambda a: a.double())),
        bad("rank-0", ValueError, "lora_A[0] must have a rank r from 1 to 512, got 0",
            lora_A=_first(_like(0, 64)), lora_B=_first(_like(48, 0))),
        bad("rank-513", ValueError, "lora_A[0] must have a rank r from 1 to 512, got 513",
            lora_A=_first(_like(513, 64)), lora_B=_first(_like(48, 513))),
        bad("lora_B-shape", ValueError, "lora_B[0] must have shape [out_features=48, r=4], got [48, 5]",
            lora_B=_first(_like(48, 5))),
        bad("lora_B-dtype", TypeError, "lora_B[0] must have dtype float32, as lora_A[0], got bfloat16",
            lora_B=_first(lambda b: b.to(BF16))),
        bad("lora_B-count", ValueError, "lora_B must have one entry per lora_A (1), got 2", lora_B=lambda b: b * 2),
        bad("lora_bias-shape", ValueError, "lora_bias[0] must have shape [out_features=48], got [4]",
            lora_bias=lambda c: [torch.zeros(4)]),
    ]  # fmt: skip


def bad_numbers(bad: Callable) -> list[BadInput]:
    """Scalings, probabilities and the seed."""
    return [
        bad("scaling-inf", ValueError, "scaling[0] must be finite, got inf", scaling=lambda s: [math.inf]),
        bad("scaling-nan", ValueError, "scaling[0] must be finite, got nan", scaling=lambda s: [math.nan]),
        bad("p-one", ValueError, "dropout_p[0] must lie in [0, 1), got 1", dropout_p=lambda p: [1.0]),
        bad("p-negative", ValueError, "dropout_p[0] must lie in [0, 1), got -0.1", dropout_p=lambda p: [-0.1]),
        bad("seed-missing", ValueError, "seed must be given where dropout_p > 0", seed=lambda s: None),
        bad("seed-dtype", TypeError, "seed must have dtype int64, got int32", seed=lambda s: s.to(torch.int32)),
        bad("seed-empty", ValueError, "seed must be a 0-d tensor, got shape [0]",
             dropout_p=lambda p: [0.0], seed=lambda s: s.new_empty(0)),
        bad("seed-shape", ValueError, "seed must be a 0-d tensor, got shape [1]", seed=lambda s: s[None]),
    ]  # fmt: skip


def bad_projections(make: Callable) -> list[BadInput]:
    """What every family refuses with words, before anything happens. `make(device)`: one projection, K = 64, N = 48,
    rank 4, in fp32, with dropout."""
    bad = partial(refused, make)
    return bad_input(bad) + _bad_base(bad) + bad_factors(bad) + bad_numbers(bad)
