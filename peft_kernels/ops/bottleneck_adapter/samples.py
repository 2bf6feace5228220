"""Inputs for bottleneck_adapter: samples at the edges, each with the reason it is there, and inputs that must be
refused."""

import math
from functools import partial

import torch

from peft_kernels.ops.common.activations import NAMES
from peft_kernels.ops.common.projection_samples import BF16, F16, F32, F64, ODD_PAIRS, PAIRS, inside, refused
from peft_kernels.registry import BadInput, Sample


def problem(
    device,
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    *,
    rows: tuple[int, ...] = (12,),
    K: int = 32,
    N: int | None = 48,
    E: int = 8,
    activation: str = "relu",
    norm: str = "none",
    affine: bool = True,
    biased: bool = True,
    scale: str = "float",
    gated: bool = False,
    p: float = 0.0,
    dropout_on: str = "bottleneck",
) -> dict:
    """Arguments of the op. N None: serial, the residual is x. `scale`: float, scalar or channel.

    The factors are scaled so that the adapter contributes as much as the residual.
    """
    generator = torch.Generator().manual_seed(rows[-1] * 1009 + K * 31 + E if rows else K + E)
    serial, N = N is None, K if N is None else N

    def draw(*shape, scale=1.0, offset=0.0, to=factor_dtype):
        return (torch.randn(shape, generator=generator, dtype=F64) * scale + offset).to(device, to)

    layer_norm = norm == "layer_norm"
    return {
        "x": draw(*rows, K, to=dtype),
        "residual": None if serial else draw(*rows, N, to=dtype),
        "down_weight": draw(E, K, scale=K**-0.5),
        "down_bias": draw(E, scale=0.5) if biased else None,
        "up_weight": draw(N, E, scale=E**-0.5),
        "up_bias": draw(N) if biased else None,
        "scale": {"float": None, "scalar": draw(1, offset=1.0), "channel": draw(N, offset=1.0)}[scale],
        "gate": draw(*rows).sigmoid() if gated else None,
        "norm_weight": draw(K, scale=0.3, offset=1.0) if norm != "none" and affine else None,
        "norm_bias": draw(K, scale=0.3) if layer_norm and affine else None,
        "activation": activation,
        "scaling": -1.5,
        "norm": norm,
        "eps": 1e-5,
        "dropout_p": p,
        "dropout_on": dropout_on,
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


def _x_and_residual_inside(arguments):
    return {name: inside(arguments[name]) for name in ("x", "residual")}


def _residual_over_x(arguments):
    """Rows of one buffer, the residual's a few columns after x's."""
    x, residual = arguments["x"], arguments["residual"]
    shared = torch.cat((x, residual), 1)
    return {"x": shared[:, : x.shape[1]], "residual": shared[:, 3 : 3 + residual.shape[1]]}


def _times(**factors):
    """A change: some arguments multiplied by a number."""
    return lambda arguments: {name: arguments[name] * factor for name, factor in factors.items()}


def _transposed_weights(arguments):
    return {name: arguments[name].t().contiguous().t() for name in ("down_weight", "up_weight")}


def _far_from_one() -> list[Sample]:
    """What lies between two products is fp32, and may leave the range of fp16 where neither inputs nor results do."""
    return [
        _changed("beyond-fp16-dh", "a learned scale takes dh past 65504",
                 _times(x=1e-3, down_weight=1e-2, up_weight=8, scale=3e4), rows=(21,), biased=False, scale="scalar"),
        _changed("beyond-fp16-u", "f(h) past 65504, dh next to nothing", _times(x=1e3, down_weight=1e3, scaling=1e-6),
                 rows=(21,), K=40, gated=True),
        _changed("beyond-fp16-small-b", "f(h) past 65504 before a small B",
                 _times(x=1e3, down_weight=1e3, up_weight=1e-3, scaling=1e-3), rows=(37,), K=67, N=None, E=40),
        _changed("scaling-large", "s past 65504, and f(h) small", _times(x=1e-3, down_weight=1e-3, scaling=1e5),
                 rows=(21,), biased=False, activation="identity"),
        _changed("gradients-tiny", "dh below the least fp16, x large", _times(x=1e4, down_weight=1e-4, scaling=1e-8),
                 rows=(37,), E=20, activation="gelu"),
        _changed("far", "squares and cubes of h past the largest fp32", _times(x=1e10, down_weight=1e10, scaling=1e-20),
                 ((F32, F32), (BF16, BF16), (BF16, F32)), rows=(21,), E=20, activation="gelu_tanh"),
    ]  # fmt: skip


# More rows than 127 tiles of 64, which is where a backend for 16 bits may take the op in one launch
HALVES = ((BF16, BF16), (F16, F16))
FUSED = [
    (8129, "the first count of them, one row in the last tile", dict(K=67, N=None, E=1, activation="identity")),
    (8191, "a row less than whole tiles, ragged matrices",
     dict(K=67, N=131, E=33, activation="gelu", scale="channel", gated=True, p=0.1)),
    (8192, "whole tiles", dict(K=64, N=64, E=64, activation="silu", biased=False)),
    (8193, "a row more than whole tiles", dict(K=136, N=72, E=65, scale="scalar", p=0.1, dropout_on="output")),
    (8130, "the widest bottleneck of it", dict(K=72, N=None, E=256, activation="sigmoid", gated=True, p=0.1)),
]  # fmt: skip


def samples() -> list[Sample]:
    """Each for an edge that has broken a kernel somewhere, or would."""
    everything = dict(norm="layer_norm", scale="channel", gated=True, p=0.1)
    return [
        _plain("ones", "every size is 1", rows=(1,), K=1, N=1, E=1),
        _plain("aligned", "every size fills whole tiles", rows=(64,), K=128, N=256, E=64),
        _plain("ragged", "no size is a multiple of anything", rows=(37,), K=67, N=131, E=5),
        _plain("ragged-wide", "more than one block in every direction", rows=(70,), K=531, N=283, E=70, gated=True),
        _plain("serial", "x is the residual too", rows=(21,), K=67, N=None),
        _plain("serial-row", "the same for one token", rows=(1,), K=515, N=None, E=16, p=0.1),
        _plain("rows-16", "the last row count of a few-row path", rows=(16,), K=67, N=131, E=24),
        _plain("rows-17", "the first row count past it", rows=(17,), K=67, N=131, E=24),
        _plain("bottleneck-33", "one more than two vectors", rows=(19,), K=40, N=70, E=33, p=0.1),
        _plain("bottleneck-257", "past the widest tile of bottlenecks", rows=(19,), K=40, N=70, E=257, p=0.1),
        _plain("bottleneck-1024", "the widest, larger than K and N", rows=(9,), K=40, N=24, E=1024),
        _plain("batch", "several batch dimensions", rows=(2, 3, 5), K=33, N=None, gated=True),
        _plain("vector", "no batch dimension", rows=(), K=33, gated=True),
        _plain("empty", "no rows", rows=(0,), **everything),
        _plain("empty-batch", "no rows in a batch of sequences", rows=(2, 0), N=None),
        _plain("unbiased", "no biases at all", rows=(20,), K=35, biased=False, scale="channel", gated=True),
        _plain("learned-scale", "one learned number", rows=(21,), K=67, N=None, scale="scalar", activation="silu"),
        _plain("channel-scale", "one learned number per channel", rows=(21,), K=67, scale="channel"),
        _plain("layer-norm", "a norm before, with weight and bias", rows=(21,), K=67, N=None, norm="layer_norm"),
        _plain("layer-norm-plain", "a norm without weight or bias", K=67, norm="layer_norm", affine=False),
        _plain("rms-norm", "a norm that keeps the mean", rows=(21,), K=67, N=None, norm="rms_norm", gated=True),
        _plain("norm-row", "a norm of one token", rows=(1,), K=331, N=None, norm="layer_norm", p=0.1),
        _plain("dropout", "mask replay over ragged blocks", rows=(37,), K=67, N=131, E=75, p=0.1),
        _plain(
            "dropout-output", "the mask on what is added", rows=(37,), K=67, N=331, p=0.1, dropout_on="output",
            scale="channel", gated=True,
        ),
        _plain("dropout-tiny", "p rounds to no dropout at 16 bits", p=1e-6),
        _plain("dropout-most", "nearly everything dropped", rows=(40,), p=0.9999, E=40),
        _changed("strided", "x and residual inside wider buffers", _x_and_residual_inside, rows=(4, 9), K=67, p=0.1),
        _changed("residual-over-x", "x and residual share most of their memory", _residual_over_x, rows=(21,), K=67),
        _changed("transposed", "weights stored column by column", _transposed_weights, rows=(21,), K=67, gated=True),
        _changed(
            "x-expanded", "one row seen many times", lambda a: {"x": a["x"][:1].expand(19, -1)}, rows=(19,),
        ),
        *_far_from_one(),
        # few features: on absolute values, as the oracle takes them, tanh' and sigmoid' of long sums would be next to 0
        *(_plain(name, "the activation and its slope", rows=(70,), K=7, N=40, E=20, activation=name, p=0.1)
          for name in NAMES),
        _plain("everything", "all options together", rows=(3, 11), K=67, N=131, E=19, activation="gelu", **everything),
        _plain("factors", "16-bit factors of another type", ODD_PAIRS, rows=(21,), K=67, N=40, E=6, p=0.1),
        _plain(
            "busy", "work for several threads", ((BF16, BF16), (F32, F32)), busy=True, rows=(200,), K=1000, N=1024,
            E=70, activation="gelu_tanh", **everything,
        ),
        _plain("busy-rows", "many rows of fp32, no norm, work for several threads", ((F32, F32),), busy=True,
               rows=(300,), K=531, N=283, E=70, activation="silu", scale="channel", p=0.1),
        _changed("busy-inside", "the same within wider buffers, x the residual", lambda a: {"x": inside(a["x"])},
                 ((F32, F32),), rows=(70,), K=531, N=None, E=75),
        *(_plain(f"rows-{rows}-bottleneck-{sizes['E']}", f"rows for one fused kernel, {why}", HALVES, busy=True,
                 rows=(rows,), **sizes) for rows, why, sizes in FUSED),
        _plain("busy-row", "few rows, work for several threads", ((BF16, BF16),), busy=True, rows=(8,), K=1000, N=None,
               E=256, p=0.1),
    ]  # fmt: skip


def evaluate(forward, backward, arguments: dict, dy: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """y, h and every gradient of one problem, by name."""
    y, h = forward(*arguments.values())
    names = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "scale", "gate", "norm_weight", "norm_bias")
    needs = [arguments[name] is not None for name in names]
    rest = [value for name, value in arguments.items() if name not in ("x", "residual", "down_bias")]
    grads = backward(dy[0], arguments["x"], h, *rest, arguments["residual"] is None, needs)
    wanted = {f"grad {name}[0]": grad for name, grad, need in zip(names, grads, needs, strict=True) if need}
    return {"y[0]": y, "h": h} | wanted


def _like(*shape):
    return lambda tensor: torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)


def _given(*shape, dtype=F32):
    return lambda tensor: torch.zeros(shape, dtype=dtype)


def bad_inputs() -> list[BadInput]:
    """What must be refused with words, before anything happens."""
    bad = partial(refused, lambda device: problem(device, F32, F32, K=64, N=48, E=4, p=0.1))
    return [
        bad("x-int", TypeError, "x must have dtype", x=lambda x: x.to(torch.int32)),
        bad("x-sparse", TypeError, "x must be a dense", x=lambda x: x.to_sparse()),
        bad("x-scalar", ValueError, "x must have shape [..., in_features]", x=lambda x: x[0, 0]),
        bad("x-features", ValueError, "down_weight must have shape [bottleneck, in_features=63], got [4, 64]",
            x=lambda x: x[:, :63]),
        bad("residual-shape", ValueError, "residual must have shape [12, 48], as x with out_features=48, got [12, 47]",
            residual=_like(12, 47)),
        bad("residual-dtype", TypeError, "residual must have dtype float32, as x, got bfloat16",
            residual=lambda r: r.to(BF16)),
        bad("residual-none", ValueError, "residual must be given where out_features=48 is not in_features=64",
            residual=lambda r: None),
        bad("down-1d", ValueError, "down_weight must have shape", down_weight=lambda w: w[0]),
        bad("down-double", TypeError, "down_weight must have dtype float32, float16 or bfloat16, got float64",
            down_weight=lambda w: w.double()),
        bad("down-packed", TypeError, "down_weight must have dtype", down_weight=lambda w: w.to(torch.uint8)),
        bad("bottleneck-0", ValueError, "down_weight must have from 1 to 1024 rows, got 0",
            down_weight=_like(0, 64), up_weight=_like(48, 0), down_bias=_like(0)),
        bad("bottleneck-1025", ValueError, "down_weight must have from 1 to 1024 rows, got 1025",
            down_weight=_like(1025, 64), up_weight=_like(48, 1025), down_bias=_like(1025)),
        bad("up-shape", ValueError, "up_weight must have shape [out_features, bottleneck=4], got [48, 5]",
            up_weight=_like(48, 5)),
        bad("up-dtype", TypeError, "up_weight must have dtype float32, as down_weight, got bfloat16",
            up_weight=lambda w: w.to(BF16)),
        bad("up-device", TypeError, "up_weight must be on x's device", up_weight=lambda w: w.to("meta")),
        bad("down-bias-shape", ValueError, "down_bias must have shape [bottleneck=4], got [5]", down_bias=_like(5)),
        bad("up-bias-shape", ValueError, "up_bias must have shape [out_features=48], got [4]", up_bias=_like(4)),
        bad("up-bias-dtype", TypeError, "up_bias must have dtype float32, as down_weight, got float64",
            up_bias=lambda b: b.to(F64)),
        bad("scale-shape", ValueError, "scale must have shape [1] or [out_features=48], got [2]", scale=_given(2)),
        bad("scale-0d", ValueError, "scale must have shape [1] or [out_features=48], got []", scale=_given()),
        bad("gate-shape", ValueError, "gate must have shape [12], as x without its features, got [12, 1]",
            gate=_given(12, 1)),
        bad("gate-dtype", TypeError, "gate must have dtype float32, as down_weight, got float16",
            gate=_given(12, dtype=F16)),
        bad("norm-weight-shape", ValueError, "norm_weight must have shape [in_features=64], got [48]",
            norm_weight=_given(48), norm=lambda n: "layer_norm"),
        bad("norm-weight-alone", ValueError, "norm_weight must be None where norm is 'none'", norm_weight=_given(64)),
        bad("norm-bias-rms", ValueError, "norm_bias must be None where norm is 'rms_norm'", norm_bias=_given(64),
            norm=lambda n: "rms_norm"),
        bad("activation", ValueError, "activation must be one of identity, relu, gelu, gelu_tanh, silu, tanh, sigmoid, "
            "leaky_relu, got 'swish'", activation=lambda a: "swish"),
        bad("norm", ValueError, "norm must be one of none, layer_norm, rms_norm, got 'batch_norm'",
            norm=lambda n: "batch_norm"),
        bad("dropout-on", ValueError, "dropout_on must be one of bottleneck, output, got 'x'",
            dropout_on=lambda d: "x"),
        bad("scaling-inf", ValueError, "scaling must be finite, got inf", scaling=lambda s: math.inf),
        bad("eps-negative", ValueError, "eps must be finite and not negative, got -1", eps=lambda e: -1.0),
        bad("p-one", ValueError, "dropout_p must lie in [0, 1), got 1", dropout_p=lambda p: 1.0),
        bad("p-negative", ValueError, "dropout_p must lie in [0, 1), got -0.1", dropout_p=lambda p: -0.1),
        bad("seed-missing", ValueError, "seed must be given where dropout_p > 0", seed=lambda s: None),
        bad("seed-dtype", TypeError, "seed must have dtype int64, got int32", seed=lambda s: s.to(torch.int32)),
        bad("seed-shape", ValueError, "seed must be a 0-d tensor, got shape [1]", seed=lambda s: s[None]),
    ]  # fmt: skip
