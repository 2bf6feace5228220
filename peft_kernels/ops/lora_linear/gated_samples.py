"""Inputs for gated_product: samples at the edges, each with the reason it is there, and inputs that must be refused."""

import math

import torch
from torch import Tensor

from peft_kernels.registry import BadInput, Sample

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
PAIRS = tuple((dtype, dtype) for dtype in (F32, F16, BF16, F64))
KINKED = PAIRS[:3]  # not for a derivative by differences


def problem(device, dtype: torch.dtype, shape=(12, 48), activation: str = "silu", scale: float = 1.0) -> dict:
    """Arguments of the op; gate is `scale` times a normal number."""
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(size):
        return (torch.randn(shape, generator=generator, dtype=F64) * size).to(device, dtype)

    return {"gate": draw(scale), "up": draw(1.0), "activation": activation}


def _plain(id: str, why: str, dtypes=PAIRS, busy=False, **options) -> Sample:
    return Sample(id, why, lambda device, dtype, _: problem(device, dtype, **options), dtypes, busy)


def _changed(id: str, why: str, change, dtypes=PAIRS, **options) -> Sample:
    """`change(tensor)` lays gate and up out differently, or puts other numbers into them."""

    def make(device, dtype, _):
        arguments = problem(device, dtype, **options)
        return arguments | {name: change(arguments[name]) for name in ("gate", "up")}

    return Sample(id, why, make, dtypes)


def _inside(tensor: Tensor) -> Tensor:
    """The same values inside a wider buffer of NaN."""
    buffer = tensor.new_full((tensor.shape[0], tensor.shape[1] + 5), math.nan)
    buffer[:, 3:-2] = tensor
    return buffer[:, 3:-2]


def _shifted(tensor: Tensor) -> Tensor:
    """The same values side by side, one number past where an allocation begins."""
    buffer = tensor.new_full((tensor.numel() + 1,), math.nan)
    buffer[1:] = tensor.flatten()
    return buffer[1:].view(tensor.shape)


def _special(values: list[float]):
    """Those numbers in the first column of gate, in the second of up, and at the end of both."""

    def make(device, dtype, activation):
        arguments = problem(device, dtype, (len(values), 21), activation)
        numbers = torch.tensor(values, device=device).to(dtype)
        arguments["gate"][:, 0], arguments["up"][:, 1] = numbers, numbers
        arguments["gate"][:, -1], arguments["up"][:, -1] = numbers, numbers
        return arguments

    return make


def _specials(id: str, why: str, values: list[float]) -> list[Sample]:
    make = _special(values)
    return [
        Sample(f"{id}-{f}", why, lambda device, dtype, _, f=f: make(device, dtype, f), KINKED)
        for f in ("silu", "gelu", "gelu_tanh", "relu")
    ]


def samples() -> list[Sample]:
    """Each for an edge that has broken a kernel somewhere, or would."""
    gates = ("gelu", "gelu_tanh", "relu")
    return [
        _plain("ones", "one number", shape=(1, 1)),
        _plain("vector", "one row, no batch dimension", shape=(7,)),
        _plain("aligned", "whole vectors in whole blocks", shape=(16, 512)),
        _plain("block", "as many as a block takes of 16 bits", shape=(1, 2048)),
        _plain("block-more", "one more than that", shape=(1, 2049)),
        _plain("block-less", "one less", shape=(1, 2047)),
        _plain("ragged", "no size is a multiple of anything", shape=(37, 131)),
        _plain("batch", "several batch dimensions", shape=(2, 3, 35)),
        _plain("empty", "no rows", shape=(0, 48)),
        *(_plain(f, f"{f} for the gate", shape=(19, 67), activation=f) for f in gates),
        *(
            _plain(f"{f}-far", f"gates where {f} saturates", shape=(19, 67), activation=f, scale=40.0)
            for f in ("silu", *gates)
        ),
        _plain("far", "gates whose exponential overflows", ((F32, F32), (BF16, BF16)), shape=(9, 67), scale=1e4),
        _plain("near", "gates near 0, where f is a line", shape=(9, 67), scale=1e-4, activation="gelu_tanh"),
        _changed("offset", "inside of wider buffers", _inside, shape=(19, 67)),
        _changed("shifted", "side by side, but not at a multiple of 16 bytes", _shifted, shape=(19, 264)),
        _changed("columns", "stored column by column", lambda t: t.t().contiguous().t(), shape=(21, 40)),
        _changed("expanded", "one row seen many times", lambda t: t[:1].expand(19, -1), shape=(21, 40)),
        *_specials("not-finite", "NaN and infinities among others", [math.nan, math.inf, -math.inf, 1.0]),
        *_specials("zeros", "both zeros, where relu has a kink", [0.0, -0.0, 1.0]),
        _plain("busy", "work for several threads", ((BF16, BF16), (F32, F32)), shape=(130, 1100), busy=True),
    ]


def evaluate(forward, backward, arguments: dict, dy) -> dict[str, Tensor]:
    """Every output and every gradient, by name."""
    dgate, dup = backward(dy[0], *arguments.values())
    return {"y[0]": forward(*arguments.values()), "grad gate[0]": dgate, "grad up[0]": dup}


def _bad(id: str, error: type[Exception], text: str, **changes) -> BadInput:
    """`changes[name]` makes a bad argument from a good one."""

    def make(device):
        arguments = problem(device, F32)
        return arguments | {name: change(arguments[name]) for name, change in changes.items()}

    return BadInput(id, make, error, text)


def bad_inputs() -> list[BadInput]:
    """What must be refused with words, before anything happens."""
    return [
        _bad("gate-int", TypeError, "gate must have dtype float32, float16, bfloat16 or float64, got int32",
             gate=lambda t: t.int()),
        _bad("gate-sparse", TypeError, "gate must be a dense", gate=lambda t: t.to_sparse()),
        _bad("up-dtype", TypeError, "up must have dtype float32, as gate, got bfloat16", up=lambda t: t.to(BF16)),
        _bad("up-sparse", TypeError, "up must be a dense", up=lambda t: t.to_sparse()),
        _bad("up-device", TypeError, "up must be on gate's device", up=lambda t: t.to("meta")),
        _bad("up-rows", ValueError, "up must have gate's shape [12, 48], got [11, 48]", up=lambda t: t[:11]),
        _bad("up-dims", ValueError, "up must have gate's shape [12, 48], got [576]", up=lambda t: t.flatten()),
        _bad("activation", ValueError, "activation must be one of silu, gelu, gelu_tanh, relu, got 'tanh'",
             activation=lambda _: "tanh"),
    ]  # fmt: skip
