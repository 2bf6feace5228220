"""Prefix tuning: P trained keys and values that every query of an attention sees, and what there is to choose.

    o = softmax(scale q [P_k ; K]^T + mask) [P_v ; V]

Li and Liang 2021 (arXiv:2101.00190).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from peft_kernels.methods.config import MethodConfig
from peft_kernels.methods.names import checked
from peft_kernels.ops.prefix_attention.op import COMPOSITIONS

SLOTS = ("encoder", "decoder", "cross")
INITS = ("random", "zero", "text")
MAX_P = 8192


@dataclass(frozen=True)
class PrefixTuningConfig(MethodConfig):
    """What a prefix is and where it goes. HF PEFT's names where it has one.

    Args:
        num_virtual_tokens: P, from 1 to 8192.
        prefix_projection: whether an MLP gives the keys and values in training. `save_pretrained` writes what the MLP
            gives and not the MLP. It belongs to no layer: FSDP must shard the model as one unit then.
        encoder_hidden_size: the width inside of the MLP; None: the model's.
        slots: of "encoder" (self-attention that looks both ways), "decoder" (causal) and "cross"; None: all that the
            model has. Each slot has a prefix of its own: [PREFIX, x, PREFIX', y].
        layers: indices of the layers that get prefixes, in the order of the model (those of an encoder come first);
            None: all.
        init: "random"; "zero", a start at which the model gives what it gave before, which a prefix that shares the
            softmax ("merge") cannot have; "text", the keys and values of `text` in the model.
        text: ids of the P tokens for init="text", of decoder-only models.
        prefix_dropout: probability of dropping an element of the prefix in training.
        composition: how the prefix joins in: "merge", "add", "relu" or "linear", as in `peft_kernels.prefix_attention`.
        gate: whether each head has a trained factor of the prefix's part.
        shift_positions: whether the tokens' positions start at P, behind the prefix, as in HF PEFT; else at 0. In
            decoders whose positions are learned, or rotary: there only the text of init="text" makes a difference.
        modules_to_save: as in `BottleneckConfig`: a head that is trained whole.

    Raises:
        ValueError: a field is out of range; it says which, what is expected, and what came instead.

    Example:
        >>> config = PrefixTuningConfig(num_virtual_tokens=30, prefix_projection=True, encoder_hidden_size=512)
        >>> config = PrefixTuningConfig(num_virtual_tokens=10, composition="add", gate=True, init="zero")
    """

    peft_type: ClassVar[str] = "PREFIX"

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    slots: Sequence[str] | None = None
    layers: Sequence[int] | None = None
    init: str = "random"
    text: Sequence[int] | None = None
    prefix_dropout: float = 0.0
    composition: str = "merge"
    gate: bool = False
    shift_positions: bool = False
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self):
        P, hidden, p = self.num_virtual_tokens, self.encoder_hidden_size, self.prefix_dropout
        self._require(_is_integer(P) and 1 <= P <= MAX_P, "num_virtual_tokens", f"an integer from 1 to {MAX_P}", P)
        for name in ("prefix_projection", "gate", "shift_positions"):
            value = getattr(self, name)
            self._require(isinstance(value, bool), name, "True or False", value)
        fits = hidden is None or (_is_integer(hidden) and hidden >= 1)
        self._require(fits, "encoder_hidden_size", "an integer of 1 or more, or None", hidden)
        number = isinstance(p, (int, float)) and not isinstance(p, bool)
        self._require(number and 0 <= p < 1, "prefix_dropout", "a probability in [0, 1)", p)
        self._require(self.init in INITS, "init", f"one of {', '.join(INITS)}", self.init)
        expected = f"one of {', '.join(COMPOSITIONS)}"
        self._require(self.composition in COMPOSITIONS, "composition", expected, self.composition)
        self._check_places()
        self._check_start()
        saved = checked(type(self).__name__, "modules_to_save", self.modules_to_save, "none")
        object.__setattr__(self, "modules_to_save", saved)

    def _check_places(self) -> None:
        if self.slots is not None:
            fits = isinstance(self.slots, Sequence) and not isinstance(self.slots, str) and len(self.slots) > 0
            fits = fits and all(slot in SLOTS for slot in self.slots)
            self._require(fits, "slots", f"a list of {', '.join(SLOTS)}, or None for all", self.slots)
            object.__setattr__(self, "slots", tuple(slot for slot in SLOTS if slot in self.slots))
        if self.layers is not None:
            fits = isinstance(self.layers, Sequence) and not isinstance(self.layers, str) and len(self.layers) > 0
            fits = fits and all(_is_integer(layer) and layer >= 0 for layer in self.layers)
            self._require(fits, "layers", "a list or range of layer indices from 0, or None for all", self.layers)
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))

    def _check_start(self) -> None:
        zero = self.init == "zero" and self.composition == "merge"
        self._require(
            not zero, "composition", "add, relu or linear where init is 'zero'", self.composition,
            "a prefix that shares the softmax takes weight from the tokens, whatever its keys and values are",
        )  # fmt: skip
        P, text = self.num_virtual_tokens, self.text
        if self.init != "text":
            self._require(text is None, "text", "None where init is not 'text'", text)
            return
        fits = isinstance(text, Sequence) and len(text) == P and all(_is_integer(token) for token in text)
        self._require(fits, "text", f"the ids of num_virtual_tokens={P} tokens where init is 'text'", text)
        object.__setattr__(self, "text", tuple(text))
        expected = "False where init is 'text', which gives keys and values"
        self._require(not self.prefix_projection, "prefix_projection", expected, True)

    def _require(self, condition: bool, name: str, expected: str, got: Any, why: str = "") -> None:
        if not condition:
            why = why and f"; {why}"
            raise ValueError(f"{type(self).__name__}: {name} must be {expected}, got {got!r}{why}")

    def parameters(self, heads: int, head_dim: int, query_heads: int) -> int:
        """Numbers that an attention has of a prefix without its MLP: 2 P Hkv D, and the gate."""
        return 2 * self.num_virtual_tokens * heads * head_dim + (query_heads if self.gate else 0)

    def baked(self) -> "PrefixTuningConfig":
        """The same without the MLP, and without the text that it began with: what a file has."""
        start = {"init": "random", "text": None} if self.init == "text" else {}
        return replace(self, prefix_projection=False, encoder_hidden_size=None, **start)

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json says of it: of the baked one."""
        return MethodConfig.to_dict(self.baked())


@dataclass(frozen=True)
class PTuningV2Config(PrefixTuningConfig):
    """P-tuning v2: deep prompts for language understanding, without an MLP, with dropout (arXiv:2110.07602).

    The fields are those of `PrefixTuningConfig`. Heads for sequences and for tokens are the model's own, trained where
    modules_to_save names them; one prefix serves several tasks where their heads share one model.

    Example:
        >>> config = PTuningV2Config(num_virtual_tokens=20, modules_to_save=["classifier"])
        >>> peft_kernels.attach(bert_for_token_classification, config)
    """

    peft_type: ClassVar[str] = "P_TUNING_V2"

    prefix_dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        self._require(not self.prefix_projection, "prefix_projection", "False, there is no MLP", True)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
