"""Parameters of the model that an adapter trains, and whose values they have: BitFit's biases, and modules_to_save.

They are the model's own, so such an adapter is, or has, a set of values. Those of active ones are in the model; the
base's, and those of the others, are kept beside it. Where they belong is found once, by `attach`, and noted as modules
and names: PEFT puts modules elsewhere, FSDP and accelerate put other parameters into them.
"""

import warnings
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from peft_kernels.integrations.blocks import CHILD, sites_of
from peft_kernels.integrations.transformers import POOL_SITE
from peft_kernels.methods import BitFitConfig, Config
from peft_kernels.methods.names import ends_with
from peft_kernels.modules import BottleneckAdapter, Prefixes

Slot = tuple[nn.Module, str]  # a module and the name of a parameter there
Change = tuple[str, nn.Parameter, Tensor]  # a key, its parameter, and the value that it gets

NOTE = "attached_adapters"  # of a model: what `attachments.Attached` says of it
NOT_THERE = "are not there (meta, or offloaded); move them to a device first"
SERVED = "the model serves a pool, all of whose rows would have these values; peft_kernels.unpatch(model) takes it off"

# -- where they are ---------------------------------------------------------------------------------------------------


def own_parameters(root: nn.Module, config: Config) -> dict[str, Slot]:
    """The parameters of the model, by name, that an adapter is to have values for. Raises where it cannot."""
    biases = biases_of(root, config) if isinstance(config, BitFitConfig) else {}
    found = biases | _saved(root, config.modules_to_save or ())
    if found and _serves_a_pool(root):
        raise ValueError(f"attach: {SERVED}")
    for key, slot in found.items():
        if at(slot).is_meta:
            raise ValueError(f"attach: the parameters of {key.rpartition('.')[0]} {NOT_THERE}")
    return found


def at(slot: Slot) -> nn.Parameter | None:
    module, name = slot
    return module._parameters.get(name)


def require_base_values(model: nn.Module, function: str) -> None:
    """Raises ValueError where parameters of a model have the values of an adapter."""
    for module in model.modules():
        if NOTE in module.__dict__ and (active := list(module.__dict__[NOTE].own.base)):
            raise ValueError(
                f"{function}: the model's own parameters have the values of the adapter {active[0]!r}, with which all "
                f"rows would run; peft_kernels.set_active(model, []), or detach(model, {active[0]!r}), first"
            )


def _serves_a_pool(root: nn.Module) -> bool:
    return any(POOL_SITE in module.__dict__ for module in root.modules())


def _saved(root: nn.Module, names: tuple[str, ...]) -> dict[str, Slot]:
    """The parameters of modules that are trained whole; tied ones once."""
    found, blocks = {}, [f"{site.name}." for site in sites_of(root)] if names else []
    for end in names:
        named = ((name, module) for name, module in root.named_modules() if CHILD not in name.split("."))
        modules = {name: module for name, module in named if name and ends_with(name, end)}
        if not any(True for module in modules.values() for _ in module.parameters()):
            raise ValueError(f"attach: modules_to_save: a {type(root).__name__} has no parameters in a module {end!r}")
        for name, module in modules.items():
            if any(isinstance(inner, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for inner in module.modules()):
                raise ValueError(f"attach: modules_to_save: {name} has adapters of PEFT's, which trains and saves it")
            if any(block.startswith(f"{name}.") or name.startswith(block) for block in blocks):
                raise ValueError(f"attach: modules_to_save: {name} has, or is in, a block for adapters; name a head")
            if any(True for _ in module.buffers()):
                raise ValueError(f"attach: modules_to_save: {name} has buffers, which are not kept for each adapter")
            for path, inner in module.named_modules(prefix=name):
                own = (key for key, parameter in inner._parameters.items() if parameter is not None)
                found |= {f"{path}.{key}": (inner, key) for key in own}
    ours = {id(at(slot)): key for key, slot in reversed(found.items())}
    for key, parameter in root.named_parameters(remove_duplicate=False) if found else ():
        if id(parameter) in ours and key not in found:
            raise ValueError(f"attach: modules_to_save: {key} is tied to one of its parameters and would change too")
    return {key: slot for key, slot in found.items() if ours[id(at(slot))] == key}


def biases_of(root: nn.Module, config: BitFitConfig) -> dict[str, Slot]:
    """The biases that a config means, by name; those of adapters are none of the model's."""
    every, others = {}, set()
    for name, module in root.named_modules():
        kept = {BaseTunerLayer: "base_layer.", AuxiliaryTrainingWrapper: "original_module."}
        if base := next((base for kind, base in kept.items() if isinstance(module, kind)), None):
            others |= {id(p) for key, p in module.named_parameters() if not key.startswith(base)}
        elif isinstance(module, (BottleneckAdapter, Prefixes)):
            others |= {id(p) for p in module.parameters()}
        bias = module._parameters.get("bias")
        if bias is not None and id(bias) not in others:
            inside = f".{name}."  # a layer has the same name under what PEFT puts around it
            plain = inside.replace(".base_layer.", ".").replace(".original_module.", ".").strip(".")
            every[plain] = module, "bias"
    for end in config.target_modules or ():
        if not any(ends_with(plain, end) for plain in every):
            raise ValueError(f"attach: BitFit: target_modules: a {type(root).__name__} has no bias in a module {end!r}")
    taken = {id(at(slot)): (plain, slot) for plain, slot in reversed(every.items()) if config.takes(plain)}
    if not taken:
        raise ValueError(
            f"attach: BitFit trains biases, of which a {type(root).__name__} has none; a BottleneckConfig needs none"
        )
    return {f"{plain}.bias".lstrip("."): slot for plain, slot in reversed(taken.values())}  # tied ones count once


# -- whose values they have -------------------------------------------------------------------------------------------


@dataclass
class OwnParameters:
    """Of each adapter that has any: `slots`, by their keys in its file; `kept`, its values while it is not active;
    `base`, while it is, what the model had there, and whether that was trained."""

    slots: dict[str, dict[str, Slot]] = field(default_factory=dict)
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, dict[str, tuple[Tensor, bool]]] = field(default_factory=dict)

    def keep(self, name: str, slots: dict[str, Slot], values: dict[str, Tensor] | None) -> None:
        """Makes an adapter of values, or of the model's own if there are none; it is not active yet."""
        own = {id(at(self.slots[n][key])): value for n in self.base for key, (value, _) in self.base[n].items()}
        start = values or {key: own.get(id(at(slot)), at(slot)) for key, slot in slots.items()}
        self.slots[name] = slots
        self.kept[name] = {key: start[key].detach().clone() for key in slots}

    def values(self, name: str) -> dict[str, Tensor]:
        """The values of an adapter, wherever they are."""
        if name in self.base:
            return {key: parameter for key, parameter, _ in self._changes(name, {}, "save_pretrained")}
        return self.kept.get(name, {})

    def drop(self, name: str) -> None:
        """Forgets an adapter that is not active."""
        self.slots.pop(name, None)
        self.kept.pop(name, None)

    def freeze(self) -> dict[int, bool]:
        """What the model has under active ones stops being trained; returns, by id of the parameter, whether it was."""
        were = {}
        for name, base in self.base.items():
            were |= {id(at(self.slots[name][key])): trained for key, (_, trained) in base.items()}
            self.base[name] = {key: (value, False) for key, (value, _) in base.items()}
        return were

    def switch(
        self, root: nn.Module, names: Sequence[str], trained: Container[str] | None, function: str
    ) -> Callable[[], None]:
        """What lets the model have the values of these adapters, and of no others. Raises now, and not when it is
        called. `trained`: which of them are to be trained; None leaves that as it is."""
        for module in root.modules():
            if isinstance(module, FSDPModule):  # what is written into gathered parameters would be lost
                module.reshard()
        names = [name for name in names if name in self.slots]
        self._check_apart(names, function)
        entering = [name for name in names if name not in self.base]
        if entering and _serves_a_pool(root):
            raise ValueError(f"{function}: {SERVED}")
        leaves = {
            name: self._changes(name, {key: value for key, (value, _) in base.items()}, function)
            for name, base in self.base.items()
            if name not in names
        }
        enters = {name: self._changes(name, self.kept[name], function) for name in entering}
        return partial(self._switch, leaves, enters, trained)

    def _check_apart(self, names: Sequence[str], function: str) -> None:
        owners = {}
        for name in names:
            for key, slot in self.slots[name].items():
                if (other := owners.setdefault(id(at(slot)), name)) != name:
                    raise ValueError(f"{function}: {key} can have the values of one adapter, got {other} and {name}")

    def warn_of_idle(self, root: nn.Module, names: Sequence[str]) -> None:
        """Warns where the model runs something else than what adapters have values for."""
        runs = {module for name, module in root.named_modules() if "original_module" not in name.split(".")}
        idle = ((name, key) for name in names for key, slot in self.slots.get(name, {}).items() if slot[0] not in runs)
        for name, key in [*idle][:1]:
            warnings.warn(
                f"set_active: the model does not run {key}, which adapter {name!r} has values for, but what has come "
                "in its place: a copy that PEFT trains (modules_to_save, task_type), or a new head",
                stacklevel=3,
            )

    def _changes(self, name: str, values: dict[str, Tensor], function: str) -> list[Change]:
        """What writes these values of an adapter; with none, its parameters as they are."""
        changes = []
        for key, slot in self.slots[name].items():
            parameter = at(slot)
            value = values.get(key, parameter)
            if parameter is None or parameter.shape != value.shape:
                raise ValueError(f"{function}: {key}, which adapter {name!r} has values for, was replaced; undo that")
            if parameter.is_meta:
                raise ValueError(f"{function}: the parameters of {key.rpartition('.')[0]} {NOT_THERE}")
            changes.append((key, parameter, _like(parameter, value)))
        return changes

    @torch.no_grad()
    def _switch(
        self, leaves: dict[str, list[Change]], enters: dict[str, list[Change]], trained: Container[str] | None
    ) -> None:
        for name, changes in leaves.items():
            base = self.base.pop(name)
            self.kept[name] = {key: parameter.detach().clone() for key, parameter, _ in changes}
            for key, parameter, value in changes:
                _put(parameter, value).requires_grad_(base[key][1])
        for name, changes in enters.items():
            self.base[name] = {key: (p.detach().clone(), p.requires_grad) for key, p, _ in changes}
            for _, parameter, value in changes:
                _put(parameter, value)
            del self.kept[name]
        for name in self.base if trained is not None else ():
            for slot in self.slots[name].values():
                at(slot).requires_grad_(name in trained)


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A value that can be copied into a parameter, which FSDP may have sharded since; every process has all of it."""
    if not isinstance(parameter, DTensor) or isinstance(value, DTensor):
        return value
    value = value.detach().to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _put(parameter: nn.Parameter, value: Tensor) -> nn.Parameter:
    parameter.grad = None  # it is of the values that were there
    return parameter.copy_(value)
