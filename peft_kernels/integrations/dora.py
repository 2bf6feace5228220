"""DoRA adapters (arXiv:2402.09353) of PEFT's layers: y = g (x W^T + s drop(x) A^T B^T) + b, g = m / ||W + s B A||.

The bracket is a projection of the op call; what is done to its output here is one pass (`dora_scale`). With dropout in
training PEFT gives d = drop(x) to W too: y = (x - d) W^T + b + g (d W^T + s d A^T B^T), a call for each layer.

The norms are computed in every call while one of W, A, B requires a gradient, for an optimizer need not leave a trace
on what it changes; of frozen parameters once, for as long as W, A, B and s are the same. They are kept here, weakly by
layer, and not on it. A write to the `.data` of a frozen parameter leaves no trace either; `train`, `eval`, merging,
patching and unpatching forget what is kept. A graph (torch.compile, CUDA) computes them in every call.
"""

import copy
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_bnb_weight, dequantize_module_weight
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.multiprocessing.reductions import StorageWeakRef

from peft_kernels.integrations.gathering import (
    DTYPES,
    HOOKED_ADAPTER,
    WITHOUT_KERNEL,
    Call,
    add_adapter,
    describe_type,
    intercepted,
    tensor_of,
)
from peft_kernels.integrations.rows import RowAdapters

DORA_NORM = torch.ops.peft_kernels.dora_norm.default
DORA_SCALE = torch.ops.peft_kernels.dora_scale.default
TOGETHER = "DoRA together with another active adapter"


@dataclass(frozen=True)
class KeptNorm:
    """A norm, and what it is of."""

    norm: Tensor
    storages: tuple[StorageWeakRef, ...]  # of W, A, B: Module.to refuses to swap a tensor that is weakly referred to
    state: tuple

    def is_of(self, sources: tuple[Tensor, ...], state: tuple) -> bool:
        pairs = zip(self.storages, sources, strict=True)
        return self.state == state and all(kept.cdata == t.untyped_storage()._cdata for kept, t in pairs)


_NORMS: WeakKeyDictionary[nn.Module, dict[str, KeptNorm]] = WeakKeyDictionary()


def forget_norms(layer: nn.Module) -> None:
    _NORMS.pop(layer, None)


class ForgetsNorms:
    """For a fused layer: what changes its weights, or announces that they change."""

    def train(self, mode: bool = True):
        forget_norms(self)
        return super().train(mode)

    def merge(self, *args, **kwargs) -> None:
        forget_norms(self)
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        forget_norms(self)
        super().unmerge()


@dataclass
class Adapter:
    """What a norm is of: s, A, B; the magnitude m; `index` among the adapters of the rows."""

    name: str
    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor
    index: int


@dataclass
class Gain:
    """What DoRA does to the output of one projection of a call."""

    layer: Linear
    weight: Tensor | None  # None: the base layer's, which is quantised
    bias: Tensor | None
    dropout: nn.Module | None = None  # what drops x before W
    adapters: list[Adapter] = field(default_factory=list)

    def drop(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the op is given, and what is added to its output after the gain."""
        if self.dropout is None:
            return x, None
        dropped = self.dropout(x)
        return dropped, nn.functional.linear(x - dropped, self.weight, self.bias)

    def scale(self, z: Tensor, residual: Tensor | None, rows: RowAdapters | None) -> Tensor:
        bias = self.bias if residual is None else None
        if self.weight is None and bias is not None:
            bias = bias.to(z.dtype)  # the base's own forward casts it
        norms = [self._norm(adapter) for adapter in self.adapters]
        if rows is None:
            return DORA_SCALE(z, self.adapters[0].magnitude, norms[0], bias, residual, None)
        magnitudes = torch.stack([adapter.magnitude for adapter in self.adapters])
        ids = rows.among(tuple(adapter.index for adapter in self.adapters), z.shape[:-1], z.device)
        return DORA_SCALE(z, magnitudes, torch.stack(norms), bias, residual, ids)

    def _norm(self, adapter: Adapter) -> Tensor:
        if is_compiling():
            with torch.no_grad():
                return self._compute(adapter)
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be saved for a backward later
            sources = tensor_of(self.layer._modules["base_layer"], "weight"), adapter.a, adapter.b
            if not all(map(_is_frozen, sources)):
                forget_norms(self.layer)
                return self._compute(adapter)
            if adapter.a.is_cuda and torch.cuda.is_current_stream_capturing():
                return self._compute(adapter)  # a replay would read what may be gone
            kept = _NORMS.setdefault(self.layer, {})
            found, state = kept.get(adapter.name), self._state(adapter, sources)
            if found is None or not found.is_of(sources, state):
                norm, state = self._compute(adapter), self._state(adapter, sources)
                storages = tuple(StorageWeakRef(t.untyped_storage()) for t in sources)
                found = kept[adapter.name] = KeptNorm(norm, storages, state)
            return found.norm

    def _compute(self, adapter: Adapter) -> Tensor:
        weight = dequantised(self.layer.get_base_layer()) if self.weight is None else self.weight
        return DORA_NORM(weight, adapter.a, adapter.b, adapter.scaling)

    def _state(self, adapter: Adapter, sources: tuple[Tensor, ...]) -> tuple:
        """What tells whether the tensors that a norm is of have changed."""
        return adapter.scaling, *((t.data_ptr(), t._version) for t in sources)


def _is_frozen(tensor: Tensor | None) -> bool:
    """Whether a change leaves a trace: not on an inference tensor, nor on a view made for one forward (FSDP1's)."""
    return isinstance(tensor, nn.Parameter) and not (tensor.requires_grad or tensor.is_inference())


def dequantised(base: nn.Module) -> Tensor:
    """A scratch copy of what the weights of a quantised layer stand for [N, K]."""
    kind = type(getattr(base, "weight", None)).__name__
    if kind == "Params4bit" and getattr(base.weight.quant_state, "packing_format_for_cpu", False):
        return _dequantised_as_packed(base.weight)
    if kind in ("Params4bit", "Int8Params"):  # PEFT's function for any layer replaces a parameter of 8 bits
        return dequantize_bnb_weight(base.weight, state=getattr(base, "state", None))
    return dequantize_module_weight(base)


def _dequantised_as_packed(weight: nn.Parameter) -> Tensor:
    """Of a weight that bitsandbytes has packed anew for a processor with AVX512_BF16, at its first inference. Scales
    are transposed then and no longer nested, which bitsandbytes' own way back does not undo."""
    from bitsandbytes import functional

    state = copy.copy(weight.quant_state)
    state.original_nested, state.absmax = False, state.absmax.T.reshape(-1).float()
    packed, state = functional._convert_weight_packed_for_cpu_inverse(weight.detach(), state)
    return functional.dequantize_4bit(packed, state)


def add_dora(call: Call, layer: Linear, name: str, x: Tensor, types) -> str:
    """Adds a DoRA adapter to the call's last projection, and its gain; returns why it cannot be added, or nothing."""
    modules, rows, active = layer._modules, call.rows, layer._active_adapter
    dora, dropout = modules["lora_magnitude_vector"]._modules[name], modules["lora_dropout"]._modules[name]
    if not rows and type(active) is not str and sum(n in modules["lora_A"]._modules for n in active) > 1:
        return TOGETHER
    if type(dora) is not DoraLinearLayer:
        return f"its magnitude is in a {type(dora).__name__}"
    for op in ("dora_norm", "dora_scale"):
        if x.device.type in WITHOUT_KERNEL[op]:
            return WITHOUT_KERNEL[op][x.device.type]
    if intercepted(dora, x):
        return HOOKED_ADAPTER
    magnitude = tensor_of(dora, "weight")
    if type(magnitude) not in types:
        return describe_type(magnitude)
    dtype = call.weight[-1].dtype if call.weight else x.dtype
    if (dtype, magnitude.dtype) not in DTYPES:
        return f"a magnitude in {magnitude.dtype} on a base in {dtype}"
    before = call.drops
    if reason := add_adapter(call, layer, name, x, types):
        return reason
    if call.lora_bias[-1] is not None:
        return "lora_bias of a DoRA adapter"
    drops = call.dropout_p[-1] > 0 and layer.training
    call.dropout_p[-1], call.drops = 0.0, before  # the op drops nothing before A that W is given
    if drops and rows:
        return "DoRA with dropout in a mixed batch"
    if drops and not call.weight:
        return "DoRA with dropout on a base that is another kernel"
    if call.gains is None:
        call.gains = {}
    member = call.member[-1]
    if member not in call.gains:
        if call.weight:
            call.gains[member] = Gain(layer, call.weight[-1], call.bias[-1], dropout if drops else None)
            call.bias[-1] = None
        else:
            call.gains[member] = Gain(layer, None, tensor_of(modules["base_layer"], "bias"))
    index = rows.adapters.index(name) if rows else 0
    adapter = Adapter(name, call.lora_A[-1], call.lora_B[-1], call.scaling[-1], magnitude, index)
    call.gains[member].adapters.append(adapter)
    return ""
