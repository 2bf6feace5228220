"""Parameters of the model that an adapter trains, and whose values they have: BitFit's biases, and modules_to_save.

They are the model's own, so such an adapter is, or has, a set of values. Those of the active one are in the model; the
base's, and those of the others, are kept beside it.
"""

from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_kernels.integrations.blocks import CHILD, sites_of
from peft_kernels.methods import BitFitConfig, BottleneckConfig
from peft_kernels.methods.names import ends_with
from peft_kernels.modules import BottleneckAdapter


@dataclass
class Biases:
    """`kept`: values by the name of their adapter, without the active one's. `base`: where the active one has put its
    values, those of the model, and whether they were trained."""

    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base: dict[str, tuple[Tensor, bool]] = field(default_factory=dict)
    active: str | None = None


def own_parameters(root: nn.Module, config: BitFitConfig | BottleneckConfig) -> dict[str, nn.Parameter]:
    """The parameters of the model, by name, that an adapter has values for."""
    biases = biases_of(root, config) if isinstance(config, BitFitConfig) else {}
    return biases | _saved(root, config.modules_to_save or ())


def _saved(root: nn.Module, names: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """The parameters of modules that are trained whole."""
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
            found |= {f"{name}.{key}": parameter for key, parameter in module.named_parameters()}
    ours = {id(parameter) for parameter in found.values()}
    for key, parameter in root.named_parameters(remove_duplicate=False) if found else ():
        if id(parameter) in ours and key not in found:
            raise ValueError(f"attach: modules_to_save: {key} is tied to one of its parameters and would change too")
    return found


def biases_of(root: nn.Module, config: BitFitConfig) -> dict[str, nn.Parameter]:
    """The biases that a config means, by name; those of adapters are none of the model's."""
    found, others = {}, set()
    for name, module in root.named_modules():
        if isinstance(module, BaseTunerLayer):
            others |= {id(p) for key, p in module.named_parameters() if not key.startswith("base_layer.")}
        elif isinstance(module, BottleneckAdapter):
            others |= {id(p) for p in module.parameters()}
        plain = f"{name}.".replace(".base_layer.", ".").rstrip(".")  # a layer has the same name under PEFT's LoRA
        bias = module._parameters.get("bias")
        if bias is not None and id(bias) not in others and config.takes(plain):
            found[f"{plain}.bias"] = bias
            others.add(id(bias))  # tied ones count once
    if not found:
        which = "none" if config.target_modules is None else f"none in {', '.join(config.target_modules)}"
        raise ValueError(
            f"attach: BitFit trains biases, of which a {type(root).__name__} has {which}; a BottleneckConfig needs none"
        )
    return found


def keep(note: Biases, name: str, biases: dict[str, nn.Parameter], values: dict[str, Tensor] | None) -> None:
    """Makes an adapter of values, or of the base's if there are none; it is not active yet."""
    base = {key: note.base[key][0] if key in note.base else p.detach() for key, p in biases.items()}
    note.kept[name] = {key: tensor.clone() for key, tensor in (values or base).items()}


def values_of(note: Biases, name: str, biases: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The values of an adapter, wherever they are."""
    return biases if name == note.active else note.kept[name]


@torch.no_grad()
def activate(note: Biases, name: str, biases: dict[str, nn.Parameter], trainable: bool) -> None:
    """Puts the values of an adapter into the model."""
    note.active, note.base = name, {key: (p.detach().clone(), p.requires_grad) for key, p in biases.items()}
    for key, value in note.kept.pop(name).items():
        biases[key].copy_(value).requires_grad_(trainable)


@torch.no_grad()
def deactivate(note: Biases, biases: dict[str, nn.Parameter]) -> None:
    """Puts the model's own values back, bit for bit. `biases` are those of the active one."""
    note.kept[note.active] = {key: p.detach().clone() for key, p in biases.items()}
    for key, (value, trained) in note.base.items():
        biases[key].copy_(value).requires_grad_(trained)
    note.active, note.base = None, {}
