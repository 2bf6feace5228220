"""One op call, gathered from PEFT's layers: the frozen projections, and the adapters that are added to them.

What a layer is like is read at every call, so reading goes to the dictionaries behind nn.Module's attributes: it costs
as much as a small product. Every function that adds something returns why it cannot be in the call, or "".
"""

from types import MethodType

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers.pytorch_utils import Conv1D

from peft_kernels import backends, registry
from peft_kernels.integrations.rows import RowAdapters
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
    for name in ("lora_linear", "batched_lora", "dora_norm", "dora_scale", "lora_add", "lora_embedding")
}

DISABLED = "adapters disabled: the base layer alone"
MERGED = "merged: the base layer alone"
MERGED_ROWS = "merged, and rows with adapters of their own: PEFT refuses"
INACTIVE = "no active adapter here: the base layer alone"
ONE_EACH = "DoRA with dropout: a call for each projection"
UNMERGES = "disabled while merged: PEFT unmerges"
NAMED = "arguments of the call (adapter_names, alora_offsets)"
SHARDED = "a parameter is a DTensor"
HOOKED_BASE = "hook on base_layer"
HOOKED_ADAPTER = "hook on lora_A, lora_B or lora_dropout"


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
        self.gains = None  # by projection, what is done to its output (`dora.py`)

    def keep(self, module: nn.Module, x: Tensor) -> None:
        """Keeps the call of a module for the other tokens of a generation: gathering costs as much as computing.

        Not a view that somebody makes anew for each forward (FSDP1's), only parameters."""
        generating = self.rows is not None and self.rows.calls is not None and not torch.is_grad_enabled()
        if not generating or self.gains is not None:
            return
        tensors = (*self.weight, *self.bias, *self.lora_A, *self.lora_B, *self.lora_bias)
        if all(t is None or type(t) is nn.Parameter for t in tensors):
            self.rows.calls[module, x.dtype] = self

    def run(self, x: Tensor) -> list[Tensor]:
        residual = None
        if self.gains is not None:
            x, residual = next(iter(self.gains.values())).drop(x)
        seed = new_seed(x.device) if self.drops else None
        if self.rows is not None:
            y = BATCHED_LORA(
                x, self.rows.route(x.shape[:-1], x.device), self.weight, self.bias,
                self.lora_A, self.lora_B, self.lora_bias, self.member, self.adapter, self.scaling, self.dropout_p, seed,
            )[0]  # fmt: skip
        else:
            y = LORA_LINEAR(
                x, self.weight, self.bias, self.lora_A, self.lora_B, self.lora_bias,
                self.member, self.scaling, self.dropout_p, seed,
            )[0]  # fmt: skip
        if self.gains is None:
            return y
        scale = {member: gain.scale for member, gain in self.gains.items()}
        return [scale[g](z, residual, self.rows) if g in scale else z for g, z in enumerate(y)]


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


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    parameters = module._parameters
    return parameters[name] if name in parameters else module.__dict__.get(name)  # where FSDP1 puts a gathered one


def describe_type(tensor: Tensor | None) -> str:
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
    weight, bias = tensor_of(base, "weight"), tensor_of(base, "bias")
    if type(weight) not in types:
        return describe_type(weight)
    if bias is not None and type(bias) not in types:
        return describe_type(bias)
    if weight.dtype is not x.dtype and not torch.is_autocast_enabled(device):
        return f"x is {x.dtype} and the base layer {weight.dtype}"  # PEFT's forward raises what the base layer raises
    if intercepted(base, x):
        return HOOKED_BASE
    call.weight.append(weight if kind is nn.Linear else weight.t())
    call.bias.append(bias)
    return ""


def add_adapter(call: Call, layer: LoraLayer, name: str, x: Tensor, types=PLAIN) -> str:
    """Adds an adapter of a LoRA layer to the call's last projection, as LoRA itself has it."""
    modules = layer._modules
    lora_A, lora_B = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return f"lora_A is a {type(lora_A).__name__}, lora_B a {type(lora_B).__name__}"
    if intercepted(lora_A, x) or intercepted(lora_B, x):
        return HOOKED_ADAPTER
    a, b, lora_bias = tensor_of(lora_A, "weight"), tensor_of(lora_B, "weight"), tensor_of(lora_B, "bias")
    dropout, scaling = modules["lora_dropout"]._modules[name], layer.scaling[name]
    return add_factors(call, layer, dropout, a, b, lora_bias, layer.r[name], scaling, x, types)


def add_factors(
    call: Call, layer: nn.Module, dropout: nn.Module, a: Tensor, b: Tensor, lora_bias: Tensor | None, rank: int,
    scaling: float, x: Tensor, types,
) -> str:  # fmt: skip
    """Adds s ((drop(x) a^T) b^T + lora_bias) to the call's last projection, beside the adapters that it has."""
    if intercepted(dropout, x):
        return HOOKED_ADAPTER
    if type(dropout) is nn.Dropout:
        p = dropout.p if dropout.training else 0.0
    elif type(dropout) is nn.Identity:
        p = 0.0
    else:
        return f"lora_dropout is a {type(dropout).__name__}"
    if type(a) not in types or type(b) not in types:
        return describe_type(a if type(a) not in types else b)
    if lora_bias is not None and type(lora_bias) not in types:
        return describe_type(lora_bias)
    dtype, base = a.dtype, call.weight[-1].dtype if call.weight else x.dtype
    if (base, dtype) not in DTYPES:
        return f"factors in {dtype} on a base in {base}"
    if b.dtype is not dtype or (call.lora_A and call.lora_A[0].dtype is not dtype):
        return "factors of several dtypes in one call"
    if dtype is not x.dtype and not layer.__dict__.get("cast_input_dtype_enabled", True):
        return "cast_input_dtype_enabled is off"
    if not 1 <= rank <= MAX_RANK:
        return f"rank {rank} is above {MAX_RANK}" if rank else "rank 0"
    if type(scaling) is not float and type(scaling) is not int:
        return f"the scaling is a {type(scaling).__name__}"
    if p >= 1:
        return "lora_dropout drops everything"
    if p:
        call.drops = True
    call.lora_A.append(a)
    call.lora_B.append(b)
    call.lora_bias.append(lora_bias)
    call.member.append(len(call.weight) - 1)
    call.scaling.append(scaling)
    call.dropout_p.append(p)
    return ""


def fold(a: Tensor, b: Tensor, by_rank: Tensor) -> tuple[Tensor, Tensor]:
    """a [R, K] and b [N, R] with each rank of their product scaled by `by_rank` [R], in the smaller of the two."""
    return (a * by_rank.unsqueeze(-1), b) if a.numel() < b.numel() else (a, b * by_rank)
