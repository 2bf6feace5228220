"""Adapters on layers whose product is another kernel's: 4-bit and 8-bit weights, tensor subclasses, packed formats.

y = base(x) + s (drop(x) A^T) B^T: the base layer is called as a module, once, and its output is read once and written
once (`lora_add`), in inference in place where nobody else can see it. With DoRA, g (base(x) - b + s x A^T B^T) + b; its
norms are of a dequantised scratch. One layer is one call: projections of one x cannot be one.
"""

import contextlib
import functools
import sys
from collections.abc import Callable

import torch
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import VeraLayer
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from peft_kernels.integrations.dora import ForgetsNorms
from peft_kernels.integrations.gathering import (
    PLAIN,
    UNMERGES,
    WITHOUT_KERNEL,
    Call,
    add_adapter,
    intercepted,
)
from peft_kernels.integrations.named import subclass
from peft_kernels.integrations.other_methods import FUSED, add_svd, add_vera, in_dtype_of_x
from peft_kernels.integrations.peft import add_active, forward_over_base
from peft_kernels.ops import new_seed
from peft_kernels.ops.common.in_place import call_in_place

LORA_ADD = torch.ops.peft_kernels.lora_add.default
LORA_ADD_ = torch.ops.peft_kernels.lora_add_.default
MIXED = "rows with adapters of their own on a base that is another kernel"
FRESH = {("bitsandbytes.nn.modules", "Linear4bit")}  # whose outputs have memory of their own

# PEFT's layers whose forward is base(x) + the sum of the adapters, by the module below peft.tuners. Some of them exist
# only where what they are for is installed.
FAMILIES = {
    ("lora.bnb", "Linear4bit"),
    ("lora.bnb", "Linear8bitLt"),
    ("lora.torchao", "TorchaoLoraLinear"),
    ("lora.gptq", "GPTQLoraLinear"),
    ("lora.awq", "AwqLoraLinear"),
    ("lora.hqq", "HqqLoraLinear"),
    ("lora.eetq", "EetqLoraLinear"),
    ("lora.aqlm", "AqlmLoraLinear"),
    ("lora.inc", "IncLoraLinear"),
    ("adalora.bnb", "SVDLinear4bit"),
    ("adalora.bnb", "SVDLinear8bitLt"),
    ("adalora.gptq", "SVDQuantLinear"),
}


def has_foreign_base(layer: nn.Module, kind: type) -> bool:
    """Whether a layer of PEFT's class `kind` is one whose base layer is called."""
    if kind in FUSED:  # over a subclass of nn.Linear, which may compute something else
        base = layer._modules["base_layer"]
        return isinstance(base, nn.Linear) and type(base) is not nn.Linear
    return (kind.__module__.removeprefix("peft.tuners."), kind.__name__) in FAMILIES


def _adapters(layer: BaseTunerLayer) -> tuple[nn.Module, dict, Callable]:
    """Where the adapters of a layer are, by name, and what adds one of them."""
    if isinstance(layer, VeraLayer):
        place = layer._modules["vera_lambda_d"]
        return place, place._parameters, add_vera
    place = layer._modules["lora_A"]
    if isinstance(layer, AdaLoraLayer):
        return place, place._parameters, add_svd
    return place, place._modules, add_adapter


def stand_in(layer: BaseTunerLayer) -> Tensor:
    """A tensor of a dtype that the adapters of a layer take, on their device."""
    factor = next(_adapters(layer)[0].parameters(), torch.empty(0))
    return torch.empty(0, dtype=factor.dtype, device=factor.device)


def add_adapters(call: Call, layer: BaseTunerLayer, x: Tensor, types=PLAIN) -> str:
    """Adds the active adapters of a layer to a call without projections; returns why that cannot be, or nothing."""
    if x.device.type in WITHOUT_KERNEL["lora_add"]:
        return WITHOUT_KERNEL["lora_add"][x.device.type]
    if layer._disable_adapters or layer.merged_adapters:
        return UNMERGES if layer._disable_adapters and layer.merged_adapters else ""
    _, known, add_one = _adapters(layer)
    return add_active(call, layer, known, layer.__dict__.get("lora_variant", ()), add_one, x, types)


def _without_autocast(device: str):
    """The base has run in the dtype that autocast gave it; its output stays as it is."""
    enabled = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if enabled else contextlib.nullcontext()


def _run(call: Call, layer: BaseTunerLayer, x: Tensor) -> Tensor:
    base = layer._modules["base_layer"]
    y = base(x)
    arguments = call.lora_A, call.lora_B, call.lora_bias, call.scaling, call.dropout_p
    seed = new_seed(x.device) if call.drops else None
    with _without_autocast(x.device.type):
        x = x.to(y.dtype)
        if call.gains is not None:
            (gain,) = call.gains.values()
            z = y if gain.bias is None else y - gain.bias.to(y.dtype)
            return gain.scale(LORA_ADD(z, x, *arguments, seed)[0], None, None)
        may_write = not torch.is_grad_enabled() and not is_compiling() and _is_own(y, base, x)
        if may_write and sys.getrefcount(y) == HOLDERS[0] and _holders_of_storage(y) == HOLDERS[1]:
            call_in_place(LORA_ADD_, y, x, *arguments, seed)
            return y
        return LORA_ADD(y, x, *arguments, seed)[0]


def _is_own(y: Tensor, base: nn.Module, x: Tensor) -> bool:
    """Whether y has memory of its own, that of no parameter, input or view, and no hook was shown it."""
    kind = type(base)
    if (kind.__module__, kind.__name__) not in FRESH or intercepted(base, x) or _has_any_global_hook():
        return False
    return y._base is None and y.is_contiguous() and y.data_ptr() != x.data_ptr()


def _holders_of_storage(y: Tensor) -> int:
    return torch._C._storage_Use_Count(y.untyped_storage()._cdata)


def _holders_of_a_local() -> tuple[int, int]:
    """How many hold a tensor and its storage where one variable does: versions of Python count differently."""
    y = torch.empty(1)
    return sys.getrefcount(y), _holders_of_storage(y)


HOLDERS = _holders_of_a_local()


@functools.cache
def foreign_class(family_class: type[BaseTunerLayer]) -> type:
    """A PEFT layer whose adapters are one op on its base layer's output."""
    forward = forward_over_base(family_class, add_adapters, _run, MIXED)
    if issubclass(family_class, VeraLayer):
        forward = in_dtype_of_x(forward)
    members = {"forward": forward, "asks_for_rows": True}
    return subclass(foreign_class, family_class, members, ForgetsNorms)
