"""Bottleneck adapters: y = r + g s (drop(f(n(x) A^T + a)) B^T + b) at blocks of a model, and what there is to choose.

The four dimensions of the unified view (He et al. 2022, arXiv:2110.04366, table 1) are fields of the config:

    functional form            activation                  f
    insertion form             insertion, reads            serial: x is the block's output; parallel: its input
    modified representation    representation              the FFN block, the attention block, or both
    composition                scaling, gate               s and g

The presets are points in that space: Houlsby et al. 2019 (arXiv:1902.00751), Pfeiffer et al. 2021 (arXiv:2005.00247),
He et al. 2022, and Adapter+ (Steitz and Roth 2024, arXiv:2406.06820).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peft_kernels.methods.config import MethodConfig
from peft_kernels.methods.names import checked
from peft_kernels.modules import INITS, READS, BottleneckAdapter
from peft_kernels.ops.bottleneck_adapter.op import DROPOUTS, NORMS
from peft_kernels.ops.bottleneck_adapter.op import MAX_BOTTLENECK as MAX_R
from peft_kernels.ops.common.activations import ACTIVATIONS

ALIASES = {  # names of transformers' ACT2FN and of AdapterHub for the same functions
    "linear": "identity",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
    "leakyrelu": "leaky_relu",
}
REDUCTION = 16  # where neither r nor reduction_factor is given


@dataclass(frozen=True)
class BottleneckConfig(MethodConfig):
    """What bottleneck adapters are and where they go.

    Args:
        r: width E of the bottleneck, from 1 to 1024; or
        reduction_factor: E is the block's width over this, rounded down, at least 1. With neither it is 16.
        activation: f: identity, relu, gelu, gelu_tanh, silu, tanh, sigmoid, leaky_relu, or another name that
            transformers or AdapterHub has for one of them (gelu_new, gelu_pytorch_tanh, swish, leakyrelu, ...).
        insertion: "serial", the adapter reads and replaces the block's output; "parallel", it reads the block's input
            and adds to its output. Both are before dropout, residual and norm of the model.
        reads: what the adapter reads where that is not the block's output or input. "sum" (serial): the sum that the
            model will make of its residual stream and the output, which is scaled (Granite) or normed (Gemma 2, GLM-4)
            in it where the model does that, and normed by the model's own norm where one comes next (BERT); "stream"
            (parallel): that stream, before the norm in front of the block. Of models whose layers are known. What the
            adapter gives is added to the block's output itself, before all of that.
        representation: "ffn", "attention" (self-attention), or "both".
        scaling: s: a number, "learned" (one trained number) or "channel" (one for each feature).
        gate: whether each token has a trained gate g = sigmoid(x w + c).
        norm: "none", "layer_norm" or "rms_norm" of what the adapter reads.
        dropout_p, dropout_on: probability, and where: "bottleneck" (He et al.) or "output" (AdapterHub).
        drop_path: the probability with which a sample goes without an adapter in training (stochastic depth).
        init: "mam" or "lora" (B = 0: the start is the base model, bit for bit), "bert" or "houlsby".
        layers: indices of the layers that get adapters, in the order of the model (those of an encoder come first);
            None: all.
        modules_to_save: names of modules, or ends of names ("classifier"), that are trained whole and saved with the
            adapter, as in PEFT: a head. Each adapter has values of its own for them, which the model has while the
            adapter is active, in its dtype; of several active adapters one may have the same such module.

    Raises:
        ValueError: a field is out of range; it says which, what is expected, and what came instead.

    Example:
        >>> config = BottleneckConfig(r=64, activation="gelu", insertion="parallel", scaling="learned")
        >>> config = BottleneckConfig.pfeiffer(reduction_factor=32, layers=range(4, 12))
    """

    peft_type: ClassVar[str] = "BOTTLENECK"

    r: int | None = None
    reduction_factor: float | None = None
    activation: str = "relu"
    insertion: str = "serial"
    reads: str | None = None
    representation: str = "ffn"
    scaling: float | str = 1.0
    gate: bool = False
    norm: str = "none"
    dropout_p: float = 0.0
    dropout_on: str = "bottleneck"
    drop_path: float = 0.0
    init: str = "mam"
    layers: Sequence[int] | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self):
        self._check_width()
        _one_of("insertion", self.insertion, tuple(READS))
        if self.reads is None:
            object.__setattr__(self, "reads", READS[self.insertion][0])
        _one_of(f"reads of a {self.insertion} adapter", self.reads, READS[self.insertion])
        _one_of("representation", self.representation, ("ffn", "attention", "both"))
        _one_of("norm", self.norm, NORMS)
        _one_of("dropout_on", self.dropout_on, DROPOUTS)
        _one_of("init", self.init, INITS)
        _require(isinstance(self.gate, bool), "gate", "True or False", self.gate)
        for name in ("dropout_p", "drop_path"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 <= value < 1, name, "a probability in [0, 1)", value)
        scales = _is_number(self.scaling) or self.scaling in ("learned", "channel")
        _require(scales, "scaling", "a finite number, 'learned' or 'channel'", self.scaling)
        activation = ALIASES.get(self.activation, self.activation) if isinstance(self.activation, str) else None
        names = ", ".join((*ACTIVATIONS, *ALIASES))
        _require(activation in ACTIVATIONS, "activation", f"one of {names}", self.activation)
        object.__setattr__(self, "activation", activation)
        if self.layers is not None:
            indices = isinstance(self.layers, Sequence) and not isinstance(self.layers, str)
            indices = indices and all(_is_integer(layer) and layer >= 0 for layer in self.layers)
            expected = "a list or range of layer indices from 0, or None for all layers"
            _require(indices and len(self.layers) > 0, "layers", expected, self.layers)
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        saved = checked("BottleneckConfig", "modules_to_save", self.modules_to_save, "none")
        object.__setattr__(self, "modules_to_save", saved)

    def _check_width(self) -> None:
        r, factor = self.r, self.reduction_factor
        if r is not None and factor is not None:
            raise ValueError(
                f"BottleneckConfig: r and reduction_factor both say how wide the bottleneck is, got {r} and {factor}; "
                "give one of them"
            )
        remedy = "reduction_factor=16 makes it a part of the model's width" if not _is_integer(r) else ""
        fits = r is None or (_is_integer(r) and 1 <= r <= MAX_R)
        _require(fits, "r", f"an integer from 1 to {MAX_R}", r, remedy)
        fits = factor is None or (_is_number(factor) and factor > 0)
        _require(fits, "reduction_factor", "a number above 0", factor)

    # -- presets --------------------------------------------------------------------------------------------------

    @classmethod
    def houlsby(cls, **changes) -> "BottleneckConfig":
        """Two serial adapters in each layer, after the attention and after the FFN (Houlsby et al. 2019)."""
        return cls(**{"representation": "both", "activation": "gelu", "init": "houlsby"} | changes)

    @classmethod
    def pfeiffer(cls, **changes) -> "BottleneckConfig":
        """One serial adapter in each layer, after the FFN (Pfeiffer et al. 2021).

        It reads the FFN's output, which works in every model and in pools. Theirs, and seq_bn of AdapterHub, reads the
        sum of that and the residual stream: `pfeiffer(reads="sum")`.
        """
        return cls(**{"activation": "relu", "init": "bert"} | changes)

    @classmethod
    def parallel(cls, **changes) -> "BottleneckConfig":
        """One adapter in each layer beside the FFN (He et al. 2022). par_bn of AdapterHub has reads="stream"."""
        return cls(**{"insertion": "parallel", "init": "mam"} | changes)

    @classmethod
    def scaled_parallel(cls, **changes) -> "BottleneckConfig":
        """The same with s = 4: the FFN half of the MAM adapter, there with r=512 (He et al. 2022)."""
        return cls.parallel(**{"scaling": 4.0} | changes)

    @classmethod
    def adapter_plus(cls, **changes) -> "BottleneckConfig":
        """Serial behind the FFN and its residual, a scale for each channel, stochastic depth (Steitz and Roth 2024)."""
        plus = {"activation": "gelu", "scaling": "channel", "drop_path": 0.1, "init": "houlsby", "reads": "sum"}
        width = {} if "r" in changes else {"reduction_factor": 96}
        return cls(**plus | width | changes)

    # -- what it makes --------------------------------------------------------------------------------------------

    @property
    def representations(self) -> tuple[str, ...]:
        return ("attention", "ffn") if self.representation == "both" else (self.representation,)

    def bottleneck(self, width: int) -> int:
        """E at a block of a width. Raises ValueError if that is above 1024."""
        E = self.r or max(1, int(width / (self.reduction_factor or REDUCTION)))
        _require(
            E <= MAX_R, "reduction_factor", f"{width / MAX_R:g} or more at a width of {width}", self.reduction_factor
        )
        return E

    def parameters(self, width: int) -> int:
        """Trainable numbers of one adapter: 2 d r + r + d, and what scale, gate and norm have."""
        r, d = self.bottleneck(width), width
        scale = {"learned": 1, "channel": d}.get(self.scaling, 0)
        norm = {"none": 0, "rms_norm": d, "layer_norm": 2 * d}[self.norm]
        return 2 * d * r + r + d + scale + norm + (d + 1 if self.gate else 0)

    def adapter(self, width: int, device=None, dtype=None) -> BottleneckAdapter:
        """The module for a block of a width."""
        return BottleneckAdapter(
            width, self.bottleneck(width), activation=self.activation, scaling=self.scaling, gate=self.gate,
            norm=self.norm, dropout_p=self.dropout_p, dropout_on=self.dropout_on, drop_path=self.drop_path,
            init=self.init, device=device, dtype=dtype,
        )  # fmt: skip


def _require(condition: bool, field: str, expected: str, got: Any, remedy: str = "") -> None:
    if not condition:
        raise ValueError(
            f"BottleneckConfig: {field} must be {expected}, got {got!r}" + (f"; {remedy}" if remedy else "")
        )


def _one_of(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    _require(isinstance(value, str) and value in allowed, field, f"one of {', '.join(allowed)}", value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
