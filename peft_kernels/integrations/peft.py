"""HF PEFT's LoRA layer, fused: y = x W^T + b + sum over the active adapters of s (drop(x) A^T) B^T, in one call.

`FusedLinear` is `peft.tuners.lora.Linear` with another forward and no state of its own, so that an instance can change
class and back. PEFT's switches are read at every call, in PEFT's order: disabled, adapter names, merged, the active
adapters, training, a variant of the maths. What the kernel does not compute is left to PEFT's forward and counted.

A call costs its reading of the layer in Python, so that reading goes to the dictionaries behind nn.Module's attributes.
"""

from types import MethodType

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers.pytorch_utils import Conv1D

from peft_kernels import backends, registry
from peft_kernels.integrations.counts import count_fallback, count_fused
from peft_kernels.integrations.rows import OUTSIDE, RowAdapters, by_peft, current, outside_graph
from peft_kernels.ops import new_seed

LORA_LINEAR = torch.ops.peft_kernels.lora_linear.default
BATCHED_LORA = torch.ops.peft_kernels.batched_lora.default
MAX_RANK = 512
PLAIN = frozenset({nn.Parameter, Tensor, FakeTensor})  # not DTensor, not a quantised subclass
HALVES = (torch.float16, torch.bfloat16)
DTYPES = frozenset(
    {(torch.float64, torch.float64)}
    | {(x, factor) for x in (torch.float32, *HALVES) for factor in (torch.float32, *HALVES)}
)  # of (base, factors)

# By op, devices that only the reference serves, and why: PEFT's own forward is faster there.
WITHOUT_KERNEL = {
    name: {
        device: why
        for device in backends.all_backends()["reference"].devices
        if (why := backends.without_kernel(device, registry.ops()[name].backends))
    }
    for name in ("lora_linear", "batched_lora")
}

DISABLED = "adapters disabled: the base layer alone"
MERGED = "merged: the base layer alone"
MERGED_ROWS = "merged, and rows with adapters of their own: PEFT refuses"
INACTIVE = "no active adapter here: the base layer alone"
UNMERGES = "disabled while merged: PEFT unmerges"
NAMED = "arguments of the call (adapter_names, alora_offsets)"
SHARDED = "a parameter is a DTensor"
HOOKED_BASE = "hook on base_layer"


class Call:
    """The arguments of one op call, as they are gathered from one or several layers.

    `lora_linear` for the active adapters; `batched_lora` where `rows` says which adapter each row has.
    """

    def __init__(self, rows: RowAdapters | None = None):
        self.rows = rows
        self.adapter = []  # by entry, where there are rows
        self.weight, self.bias = [], []
        self.lora_A, self.lora_B, self.lora_bias = [], [], []
        self.member, self.scaling, self.dropout_p = [], [], []
        self.drops = False

    def keep(self, module: nn.Module, x: Tensor) -> None:
        """Keeps the call of a module for the other tokens of a generation: gathering costs as much as computing.

        Not a view that somebody makes anew for each forward (FSDP1's), only parameters."""
        tensors = (*self.weight, *self.bias, *self.lora_A, *self.lora_B, *self.lora_bias)
        generating = self.rows is not None and self.rows.calls is not None and not torch.is_grad_enabled()
        if generating and all(t is None or type(t) is nn.Parameter for t in tensors):
            self.rows.calls[module, x.dtype] = self

    def run(self, x: Tensor) -> list[Tensor]:
        seed = new_seed(x.device) if self.drops else None
        if self.rows is not None:
            return BATCHED_LORA(
                x, self.rows.route(x.shape[:-1], x.device), self.weight, self.bias,
                self.lora_A, self.lora_B, self.lora_bias, self.member, self.adapter, self.scaling, self.dropout_p, seed,
            )[0]  # fmt: skip
        return LORA_LINEAR(
            x, self.weight, self.bias, self.lora_A, self.lora_B, self.lora_bias,
            self.member, self.scaling, self.dropout_p, seed,
        )[0]  # fmt: skip


def kept(rows: RowAdapters | None, module: nn.Module, x: Tensor) -> Call | None:
    """What `Call.keep` kept."""
    return rows.calls.get((module, x.dtype)) if rows is not None and rows.calls else None


def intercepted(module: nn.Module, x: Tensor) -> bool:
    """Whether calling the module means more than the forward of its class: hooks, or a forward of its own."""
    state = module.__dict__
    if (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    ):
        return True
    return "forward" in state and not _does_nothing_more(module, x)


def _does_nothing_more(module: nn.Module, x: Tensor) -> bool:
    """Accelerate's leftovers: a bound forward after its hooks left, or a hook that moves x where x already is."""
    state = module.__dict__
    if own_method(module, "forward"):
        return True
    hook = state.get("_hf_hook")
    if type(hook).__name__ != "AlignDevicesHook" or hook.offload or not own_method(module, "_old_forward"):
        return False
    return hook.execution_device is None or torch.device(hook.execution_device) == x.device


def own_method(module: nn.Module, attribute: str) -> bool:
    """Whether an instance's attribute is just the forward of its class, bound to it."""
    method = module.__dict__.get(attribute)
    return type(method) is MethodType and method.__self__ is module and method.__func__ is type(module).forward


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    parameters = module._parameters
    return parameters[name] if name in parameters else module.__dict__.get(name)  # where FSDP1 puts a gathered one


def _describe_type(tensor: Tensor | None) -> str:
    name = type(tensor).__name__
    return SHARDED if name == "DTensor" else f"a parameter is a {name}"


def add_base(call: Call, base: nn.Module, x: Tensor, types=PLAIN) -> str:
    """Adds a frozen layer as the call's next projection; returns why it cannot be one, or nothing."""
    device, kind = x.device.type, type(base)
    without = WITHOUT_KERNEL["lora_linear" if call.rows is None else "batched_lora"]
    if device in without:
        return without[device]
    if kind is not nn.Linear and kind is not Conv1D:
        return f"the base layer is a {kind.__name__}"
    weight, bias = _tensor(base, "weight"), _tensor(base, "bias")
    if type(weight) not in types:
        return _describe_type(weight)
    if bias is not None and type(bias) not in types:
        return _describe_type(bias)
    if weight.dtype is not x.dtype and not torch.is_autocast_enabled(device):
        return f"x is {x.dtype} and the base layer {weight.dtype}"  # PEFT's forward raises what the base layer raises
    if intercepted(base, x):
        return HOOKED_BASE
    call.weight.append(weight if kind is nn.Linear else weight.t())
    call.bias.append(bias)
    return ""


def add_layer(call: Call, layer: Linear, x: Tensor, types=PLAIN) -> str:
    """Adds a LoRA layer in its present state: its base as the next projection, and the adapters that are active, or
    those that the rows have."""
    modules = layer._modules
    base = modules["base_layer"]
    if reason := add_base(call, base, x, types):
        return reason
    if layer._disable_adapters:
        return UNMERGES if layer.merged_adapters else ""
    if layer.merged_adapters:
        return MERGED_ROWS if call.rows else ""
    known = modules["lora_A"]._modules
    if call.rows:
        return _add_rows_adapters(call, layer, known, x, types)
    active = layer._active_adapter
    for name in (active,) if type(active) is str else active:
        if name in known and (reason := _add_adapter(call, layer, name, x, types)):
            return reason
    return ""


def _add_rows_adapters(call: Call, layer: Linear, known: dict, x: Tensor, types) -> str:
    call.rows.look(known)
    for i, name in enumerate(call.rows.adapters):
        if name in known:
            if reason := _add_adapter(call, layer, name, x, types):
                return reason
            call.adapter.append(i)
    return ""


def _add_adapter(call: Call, layer: Linear, name: str, x: Tensor, types) -> str:
    modules = layer._modules
    lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    if name in layer.lora_variant:
        return (
            type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant").replace("Dora", "DoRA")
            + " changes the maths"
        )
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return f"lora_A is a {type(lora_A).__name__}, lora_B a {type(lora_B).__name__}"
    if intercepted(lora_A, x) or intercepted(lora_B, x) or intercepted(dropout, x):
        return "hook on lora_A, lora_B or lora_dropout"
    if type(dropout) is nn.Dropout:
        p = dropout.p if dropout.training else 0.0
    elif type(dropout) is nn.Identity:
        p = 0.0
    else:
        return f"lora_dropout is a {type(dropout).__name__}"
    a, b, lora_bias = _tensor(lora_A, "weight"), _tensor(lora_B, "weight"), _tensor(lora_B, "bias")
    if type(a) not in types or type(b) not in types:
        return _describe_type(a if type(a) not in types else b)
    if lora_bias is not None and type(lora_bias) not in types:
        return _describe_type(lora_bias)
    scaling = layer.scaling[name]
    if reason := _unfit(call, layer, a, b, layer.r[name], scaling, p, x):
        return reason
    if p:
        call.drops = True
    call.lora_A.append(a)
    call.lora_B.append(b)
    call.lora_bias.append(lora_bias)
    call.member.append(len(call.weight) - 1)
    call.scaling.append(scaling)
    call.dropout_p.append(p)
    return ""


def _unfit(call: Call, layer: Linear, a: Tensor, b: Tensor, rank: int, scaling: float, p: float, x: Tensor) -> str:
    """Values that the op does not take, beside the adapters that are already in the call."""
    dtype = a.dtype
    if (call.weight[-1].dtype, dtype) not in DTYPES:
        return f"factors in {dtype} on a base in {call.weight[-1].dtype}"
    if b.dtype is not dtype or (call.lora_A and call.lora_A[0].dtype is not dtype):
        return "factors of several dtypes in one call"
    if dtype is not x.dtype and not layer.__dict__.get("cast_input_dtype_enabled", True):
        return "cast_input_dtype_enabled is off"
    if rank > MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}"
    if type(scaling) is not float and type(scaling) is not int:
        return f"the scaling is a {type(scaling).__name__}"
    return "lora_dropout drops everything" if p >= 1 else ""


class FusedLinear(Linear):
    """`peft.tuners.lora.Linear` whose forward is one op; `peft_kernels.patch` gives the class to instances."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        rows = current(self)
        if rows is OUTSIDE:
            return outside_graph(FusedLinear.forward, self, x, *args, **kwargs)
        if args or kwargs or type(x) not in PLAIN:
            count_fallback(self, NAMED if args or kwargs else f"x is a {type(x).__name__}")
            return by_peft(Linear.forward, self, rows, x, *args, **kwargs)
        disabled, merged = self._disable_adapters, self.merged_adapters
        if disabled or merged:
            if merged and (disabled or rows):
                count_fallback(self, UNMERGES if disabled else MERGED_ROWS)
                return by_peft(Linear.forward, self, rows, x)
            count_fallback(self, DISABLED if disabled else MERGED)
            return self._modules["base_layer"](x)
        call = kept(rows, self, x)
        if call is None:
            call = Call(rows)
            if reason := add_layer(call, self, x):
                count_fallback(self, reason)
                return by_peft(Linear.forward, self, rows, x)
            if not call.lora_A:
                count_fallback(self, INACTIVE)
                return self._modules["base_layer"](x)
            call.keep(self, x)
        count_fused(self)
        return call.run(x)[0]
