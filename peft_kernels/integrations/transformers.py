"""patch and unpatch: the LoRA layers of a transformers model change class, and nothing else about it changes.

`patch` decides for each layer whether the op can ever compute it; each call then looks at PEFT's switches and hooks. A
layer with no kernel keeps its class and gets a reason in the report; one that is only in a state without a kernel
(merged, a hook on a factor) changes class, with that state as a note. Modules that own several projections of
one input (`targets.py`) change class as well, so that the projections become one call, and so does what has to know
which adapter each row of a call has (`named.py`).
"""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import MethodType
from weakref import ref

import torch
from peft.tuners.lora import Embedding, Linear, LoraLayer, LoraModel, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrize import is_parametrized
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_kernels import backends
from peft_kernels.integrations.blocks import CHILD, require_module
from peft_kernels.integrations.dora import forget_norms
from peft_kernels.integrations.embeddings import unfit_table
from peft_kernels.integrations.foreign_bases import add_adapters, foreign_class, has_foreign_base, stand_in
from peft_kernels.integrations.gathering import (
    HOOKED_BASE,
    MERGED,
    PLAIN,
    WITHOUT_KERNEL,
    Call,
    add_base,
    own_method,
)
from peft_kernels.integrations.groups import add_member, fused_class
from peft_kernels.integrations.named import (
    CHECKPOINT,
    FusedLoraModel,
    again_over,
    asking_class,
    asks_for_rows,
    beneath,
    keeping_class,
    takes_names,
)
from peft_kernels.integrations.other_methods import ADDS, FUSED
from peft_kernels.integrations.recomputed import KIND, recomputed_class, why_not
from peft_kernels.integrations.report import PatchReport, Row
from peft_kernels.integrations.targets import forward_is_known, group_of
from peft_kernels.integrations.variants import NO_PLACE
from peft_kernels.modules import Prefixes

SHARDABLE = PLAIN | {DTensor}  # a layer-wise FSDP unit holds plain parameters again when its forward runs
PLAIN_CLASS = {fused: plain for plain, fused in FUSED.items()} | {FusedLoraModel: LoraModel}
POOL_SITE = "pool_site"  # what `attach_pool` gives a layer beside its class
OWN_FORWARD = "the instance has a forward of its own"


def patch(model: nn.Module, strict: bool = False, *, recompute_mlp: bool = False) -> PatchReport:
    """Lets the adapter layers of a model run fused; returns what was done to each of them.

    LoRA with PEFT's variants (DoRA, aLoRA, KaSA, MiCA, ...), on linear layers and on quantised ones, on embeddings,
    AdaLoRA and VeRA; the README's table says what each runs, and what stays PEFT's.

    Args:
        model: a PeftModel, or a transformers model with PEFT adapters loaded, or any module that holds such layers.
        strict: raise if any adapter layer would not run fused as it is now; nothing is changed then.
        recompute_mlp: in training an MLP with LoRA on its gate and up projections (Llama, Qwen, Mistral, Gemma) becomes
            one call, `lora_mlp`, that keeps x, gate and up for the backward and computes the activation again. Its
            row is of the kind "mlp". Evaluated without gradients it runs as it does otherwise.

    Only instances are touched: a layer's class becomes a subclass without state. State dict, isinstance, pickling,
    copying, saving, merging and switching adapters are as before. No forward is run. Patching again picks up what
    came since. As a context manager: patched inside, as before afterwards.

    Raises:
        TypeError: the model is no nn.Module.
        ValueError: there is no adapter layer in the model.
        RuntimeError: strict, and a layer has no kernel, or none in its present state.

    Example:
        >>> report = peft_kernels.patch(model)
        >>> print(report)
        >>> with peft_kernels.patch(model):
        ...     model(input_ids=input_ids)
    """
    require_module(model, "patch")
    rows, swaps = _plan_layers(model)
    if not rows and any(POOL_SITE in module.__dict__ for module in model.modules()):
        raise ValueError(
            "patch: the model serves a pool, whose adapters run fused without patch; to patch PEFT's layers instead, "
            "take the pool off with peft_kernels.unpatch(model) and make them"
        )
    if not rows:
        raise ValueError(
            "patch: the model has no PEFT layer; make them first with peft.get_peft_model(model, LoraConfig(...)), "
            "PeftModel.from_pretrained(model, path) or model.load_adapter(path)"
        )
    if strict and any(row.reason for row in rows):
        reasons = "\n  ".join(f"{row.name} ({row.kind}): {row.reason}" for row in rows if row.reason)
        raise RuntimeError(f"patch(strict=True): nothing was changed, for these would not run fused:\n  {reasons}")
    rows, group_swaps, notes = _plan_groups(model, rows, recompute_mlp)
    row_swaps = _plan_rows_adapters(model, {id(module) for module, _ in swaps})
    return PatchReport(model, rows, notes, swap([*swaps, *group_swaps, *row_swaps]))


def unpatch(model: nn.Module) -> contextlib.AbstractContextManager:
    """Gives every module of a model the class back that it had before `patch`, bit for bit.

    Returns a context manager for those who want the plain model only for a while. Modules that FSDP has taken over
    since (`fully_shard` on the layer itself) keep their class, with a warning.

        >>> peft_kernels.unpatch(model)
        >>> with peft_kernels.unpatch(model):
        ...     model(input_ids=input_ids)  # plain PEFT; patched again afterwards
    """
    require_module(model, "unpatch")
    swaps, restore = [], contextlib.ExitStack()
    for name, module in model.named_modules():
        kind = type(module)
        if _serves_a_pool(module._modules.get(CHILD)):
            restore.callback(_give_back, module, module._modules.pop(CHILD), kind)
            swaps.append((module, _plain_class(beneath(kind))))
        elif _is_for_prefixes(module):
            continue
        elif _plain_class(kind) is not kind:
            swaps.append((module, _plain_class(kind)))
        elif isinstance(module, tuple(PLAIN_CLASS)) or hasattr(beneath(kind), "family_class"):
            warnings.warn(f"unpatch: {name} keeps its class, {kind.__name__}, which was made after patch", stacklevel=2)
    for module in model.modules():
        if POOL_SITE in module.__dict__:
            restore.callback(module.__dict__.__setitem__, POOL_SITE, module.__dict__.pop(POOL_SITE))
    restore.callback(swap(swaps))
    return restore


def _is_for_prefixes(module: nn.Module) -> bool:
    """Whether a layer or a model has its class for the sake of prefixes, and not of patching."""
    kind = beneath(type(module))
    if hasattr(kind, "for_prefixes"):
        return True
    keeps = isinstance(getattr(kind, CHECKPOINT, None), property)
    return keeps and any(isinstance(child, Prefixes) for child in module.modules())


def _serves_a_pool(child: nn.Module | None) -> bool:
    return child is not None and any(POOL_SITE in place.__dict__ for place in child.children())


def _give_back(owner: nn.Module, child: nn.Module, kind: type) -> None:
    owner._modules[CHILD] = child
    swap([(owner, kind)])


def _plain_class(kind: type) -> type:
    """The class that an instance of `kind` had before it was patched."""
    patched = beneath(kind)
    return again_over(kind, PLAIN_CLASS.get(patched) or patched.__dict__.get("family_class", patched))


def swap(swaps: list[tuple[nn.Module, type]]) -> Callable[[], None]:
    """Changes classes; returns what changes them back. A forward that accelerate has saved follows its class."""
    done = []
    for module, kind in swaps:
        done.append((ref(module), type(module), kind))
        bound = [name for name in ("_old_forward", "forward") if own_method(module, name)]
        module.__class__ = kind
        forget_norms(module)
        for name in bound:
            module.__dict__[name] = MethodType(kind.forward, module)

    def restore():
        alive = [(module(), beneath(before), beneath(after)) for module, before, after in done]
        unchanged = ((module, before) for module, before, after in alive if beneath(type(module)) is after)
        swap([(module, again_over(type(module), before)) for module, before in unchanged])

    return restore


# -- layers -----------------------------------------------------------------------------------------------------------


def _plan_layers(model: nn.Module) -> tuple[list[Row], list[tuple[nn.Module, type]]]:
    rows, swaps = [], []
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        kind = _method(module)
        if kind is None:
            rows.append(Row(name, type(module).__name__, reason=_no_kernel_for(module)))
            continue
        shown = f"{kind.__module__.split('.')[2]}.{kind.__name__}"  # peft.tuners.lora.layer: lora.Linear
        foreign = has_foreign_base(module, kind)
        if reason := _obstacle(module, foreign):
            rows.append(Row(name, shown, reason=reason))
            continue
        device = stand_in(module).device if foreign else module.weight.device
        rows.append(Row(name, shown, backends.bound(device.type), _state(module, kind, foreign)))
        fused = foreign_class(kind) if foreign else FUSED[kind]
        if type(module) is not fused and _plain_class(type(module)) is kind:
            swaps.append((module, fused))
    return rows, swaps


def _method(layer: BaseTunerLayer) -> type | None:
    """The class of PEFT's whose forward a layer has, fused or not, if it is one that can be fused."""
    kind = _plain_class(type(layer))
    if kind in FUSED or has_foreign_base(layer, kind):
        return kind
    patched = (PLAIN_CLASS[fused] for fused in PLAIN_CLASS if isinstance(layer, fused))  # and wrapped by others since
    return next(patched, None)


def _obstacle(layer: BaseTunerLayer, foreign: bool) -> str:
    """Why this layer can be fused in no state, or nothing. `foreign`: its base layer is called, whatever it is."""
    if forward_was_replaced(layer):
        return OWN_FORWARD
    base = layer._modules["base_layer"]
    if any(parameter.is_meta for parameter in base.parameters()):
        return "its weights are on meta: offloaded, or not loaded yet"
    if foreign:
        return WITHOUT_KERNEL["lora_add"].get(stand_in(layer).device.type, "")
    if isinstance(layer, Embedding):
        return unfit_table(layer.get_base_layer(), _input_of(base))
    reason = add_base(Call(), base, _input_of(base), SHARDABLE)
    return "" if reason == HOOKED_BASE else reason


def _state(layer: BaseTunerLayer, kind: type, foreign: bool) -> str:
    """Why the next call of a layer would not be fused, or nothing. A disabled or inactive adapter is no reason."""
    if layer.merged_adapters and not layer._disable_adapters:
        return MERGED
    if foreign:
        return add_adapters(Call(), layer, stand_in(layer), SHARDABLE)
    reason = ADDS[kind](Call(), layer, _input_of(layer._modules["base_layer"]), SHARDABLE)
    return "" if reason == NO_PLACE and len(layer.active_adapters) == 1 else reason  # PEFT finds the place in a call


def _input_of(base: nn.Module) -> torch.Tensor:
    """A tensor of the dtype and on the device of what a layer expects."""
    weight = getattr(base, "weight", None)
    return weight if isinstance(weight, torch.Tensor) else torch.empty(0)


def forward_was_replaced(module: nn.Module) -> bool:
    return "forward" in module.__dict__ and not (own_method(module, "forward") or own_method(module, "_old_forward"))


def made_by_fsdp(module: nn.Module) -> bool:
    return type(module).__name__.startswith("FSDP")


def _no_kernel_for(layer: BaseTunerLayer) -> str:
    name = type(layer).__name__
    if made_by_fsdp(layer):
        return "its class was made by FSDP; patch before sharding"
    if is_parametrized(layer):
        return "its class was made by torch.nn.utils.parametrize"
    if not isinstance(layer, LoraLayer):
        return f"{name} is of a method that has no kernel"
    if isinstance(layer, ParamWrapper):
        return "it adapts a parameter of its module (MoE experts), not a linear layer"
    if isinstance(layer, (Linear, Embedding)):
        return f"{name} has a forward of its own"
    base = type(layer.get_base_layer())
    if layer.quantization_backend is not None or "quant" in base.__module__ or "bitsandbytes" in base.__module__:
        return f"the base layer is a quantised {base.__name__}"
    return f"LoRA on {base.__name__} has no kernel"


# -- groups -----------------------------------------------------------------------------------------------------------


def _plan_groups(model: nn.Module, rows: list[Row], recompute_mlp: bool):
    """Rows and swaps of the modules that own several LoRA projections, and a note where a model has none."""
    layers = {row.name: row for row in rows}
    swaps, known = [], False
    for name, owner in model.named_modules():
        kind = beneath(type(owner))
        plain = getattr(kind, "family_class", kind)
        group = group_of(plain)
        if group is None:
            continue
        known = True
        children = {f"{name}.{p}" if name else p: owner._modules.get(p) for p in group.projections}
        lora = {path: layers[path] for path in children if path in layers}
        if len(lora) < 2 or None in children.values():
            continue
        if reason := _group_obstacle(group, owner, plain, children, lora):
            rows.append(Row(name, group.kind, reason=reason))
            continue
        wanted, shown, state = fused_class(group), group.kind, _group_state(children, lora)
        if group.kind == KIND and (recompute_mlp or kind is recomputed_class(group)):
            wanted, shown = recomputed_class(group), "mlp"
            state = state or why_not(owner, SHARDABLE)
        rows.append(Row(name, shown, next(iter(lora.values())).kernel, state))
        for path, row in lora.items():
            layers[path] = replace(row, group=name)
        if kind is not wanted and kind in (plain, fused_class(group)):
            swaps.append((owner, again_over(type(owner), wanted)))
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    notes = [] if known else [f"{family}: no module with several projections of one input is known; one call per layer"]
    return sorted((layers.get(row.name, row) for row in rows), key=_order(model)), swaps, notes


def _order(model: nn.Module):
    place = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return lambda row: place[row.name]


def _group_obstacle(group, owner, plain, children, lora) -> str:
    """Why the projections can be one call in no state, or nothing."""
    if not forward_is_known(group, plain):
        return f"{plain.__name__}.forward is not the one that is known: another version of transformers, or replaced"
    if forward_was_replaced(owner):
        return OWN_FORWARD
    for path, child in children.items():
        if path not in lora:
            reason = add_base(Call(), child, _input_of(child), SHARDABLE)
        else:
            reason = "its base layer is another kernel" if is_foreign(child) else ""
            reason = reason if lora[path].kernel else lora[path].reason
        if reason and reason != HOOKED_BASE:
            return f"{path.rpartition('.')[2]}: {reason}"
    return ""


def is_foreign(layer: nn.Module) -> bool:
    return has_foreign_base(layer, _plain_class(type(layer)))


def _group_state(children, lora) -> str:
    """Why the next call of a group would not be one, or nothing."""
    call, x = Call(), next(iter(children.values())).weight
    for path, child in children.items():
        reason = lora[path].reason if path in lora else ""
        if not reason and (reason := add_member(call, child, x, SHARDABLE)) == NO_PLACE:
            reason = ""
        if reason:
            return f"{path.rpartition('.')[2]}: {reason}"
    return ""


# -- adapters by row --------------------------------------------------------------------------------------------------


def _plan_rows_adapters(model: nn.Module, fused: set[int]) -> list[tuple[nn.Module, type]]:
    """Swaps of what else has to know which adapter each row has; `fused` are the layers that become fused."""
    swaps, above = [], set()
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if type(module) is LoraModel:
            swaps.append((module, FusedLoraModel))
        if not (takes_names(module) or asks_for_rows(module) or id(module) in fused):
            continue
        parts = name.split(".")
        above.update(".".join(parts[:i]) for i in range(len(parts)))
        if not (asks_for_rows(module) or id(module) in fused or keeps_its_class(module)):
            swaps.append((module, asking_class(type(module))))
    for name in above:
        module, kind = modules[name], beneath(type(modules[name]))
        checkpointed = isinstance(module, GradientCheckpointingLayer)
        if checkpointed and not hasattr(kind, "family_class") and not keeps_its_class(module):
            swaps.append((module, again_over(type(module), keeping_class(kind))))
    return swaps


def keeps_its_class(module: nn.Module) -> bool:
    return made_by_fsdp(module) or is_parametrized(module) or forward_was_replaced(module)


class PeftKernelsCallback(TrainerCallback):
    """Patches the model when a Trainer starts to train, and takes that back at the end.

    Args:
        strict, recompute_mlp: as in `peft_kernels.patch`.
        unpatch_at_end: False leaves the model patched after training; what was patched before stays so anyway.

    `report` is the PatchReport of the last training.

        >>> trainer = Trainer(model, args, callbacks=[peft_kernels.PeftKernelsCallback()])
    """

    def __init__(self, strict: bool = False, unpatch_at_end: bool = True, *, recompute_mlp: bool = False):
        self.strict = strict
        self.recompute_mlp = recompute_mlp
        self.unpatch_at_end = unpatch_at_end
        self.report: PatchReport | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.report = patch(model, self.strict, recompute_mlp=self.recompute_mlp)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.unpatch_at_end:
            self.report.restore()
