"""What bottleneck adapters a model has, and how they come into it.

Adapters are parameters of the model, `<owner of the block>.bottleneck.<name>.<parameter>`; all other keys of its state
dict stay. The config of each adapter is noted by name at the model itself, as PEFT does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_kernels.integrations.blocks import CHILD, Site, adapted_class, sites_of
from peft_kernels.integrations.transformers import keeps_its_class, swap
from peft_kernels.methods import BottleneckConfig
from peft_kernels.modules import BottleneckAdapters

NOTE = "bottleneck_adapters"
PREFIX = "base_model.model."  # of every key in PEFT's files


@dataclass
class Attached:
    """What a model has: configs by name, and the names of the parameters that `attach` has frozen."""

    configs: dict[str, BottleneckConfig] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)


def root_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def note_of(root: nn.Module) -> Attached:
    return root.__dict__.setdefault(NOTE, Attached())


def require_attached(root: nn.Module, name: str, function: str) -> None:
    configs = root.__dict__[NOTE].configs if NOTE in root.__dict__ else {}
    if name not in configs:
        has = ", ".join(map(repr, configs)) or "none"
        raise ValueError(f"{function}: the model has no bottleneck adapter {name!r}; it has {has}")


def adapters_in(root: nn.Module) -> list[tuple[str, BottleneckAdapters]]:
    """The adapters of each block that has any, with the name of its owner."""
    return [
        (name.rpartition(".")[0], module)
        for name, module in root.named_modules()
        if isinstance(module, BottleneckAdapters)
    ]


def tensors_of(root: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters of an adapter, by their keys in the file."""
    return {
        f"{PREFIX}{owner}.{CHILD}.{key}": parameter
        for owner, adapters in adapters_in(root)
        if name in adapters
        for key, parameter in adapters[name].named_parameters()
    }


def plan(root: nn.Module, config: BottleneckConfig, name: str) -> list[Site]:
    """The blocks that get an adapter. Raises for what cannot be done."""
    if not isinstance(config, BottleneckConfig):
        raise TypeError(
            f"attach: config must be a peft_kernels.BottleneckConfig, got a {type(config).__name__}; what PEFT has is "
            "attached by peft.get_peft_model, before or after"
        )
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"attach: name must be a str without dots, got {name!r}")
    if NOTE in root.__dict__ and name in root.__dict__[NOTE].configs:
        raise ValueError(f"attach: the model has an adapter {name!r}; choose another name, or detach(model, {name!r})")
    every = sites_of(root)
    for representation in config.representations:
        if not any(site.block.representation == representation for site in every):
            raise ValueError(
                f"attach: no {representation} block is known in a {type(root).__name__}; those that are have the "
                "children that peft_kernels/integrations/targets.py lists"
            )
    check_layers("attach: layers", config.layers or (), every)
    sites = [site for site in every if site.block.representation in config.representations]
    if config.layers is not None:
        sites = [site for site in sites if site.layer in config.layers]
    for site in sites:
        owner = root.get_submodule(site.name)
        if reason := _obstacle(owner):
            raise ValueError(f"attach: {site.name} cannot change class: {reason}")
        config.bottleneck(site.width)  # raises where it is too wide
    return sites


def _obstacle(owner: nn.Module) -> str:
    if CHILD in owner._modules:
        return "" if isinstance(owner._modules[CHILD], BottleneckAdapters) else f"it has a {CHILD} of its own"
    return "FSDP or a parametrization has made its class, or its forward was replaced" if keeps_its_class(owner) else ""


def check_layers(what: str, layers: Sequence[int], sites: list[Site]) -> None:
    count = 1 + max(site.layer for site in sites) if sites else 0
    if outside := [layer for layer in layers if not 0 <= layer < count]:
        raise ValueError(f"{what} must lie in [0, {count}), the layers of this model, got {outside[0]}")


def add(root: nn.Module, config: BottleneckConfig, name: str, sites: list[Site], tensors=None) -> None:
    """Puts the adapters in, new ones or those of a file; none runs yet."""
    swaps = []
    for site in sites:
        owner = root.get_submodule(site.name)
        base = next(owner.parameters())
        dtype = torch.float64 if base.dtype is torch.float64 else torch.float32
        if tensors is None:
            adapter = config.adapter(site.width, base.device, dtype)
        else:
            adapter = config.adapter(site.width, "meta", dtype).to_empty(device=base.device)
            with torch.no_grad():
                for key, parameter in adapter.named_parameters():
                    parameter.copy_(tensors[file_key(site, key)])
        if CHILD not in owner._modules:
            owner.add_module(CHILD, BottleneckAdapters().train(owner.training))
            swaps.append((owner, adapted_class(site.block, type(owner))))
        adapters = owner._modules[CHILD]
        adapters[name] = adapter.train(owner.training)
        if config.insertion == "serial":
            adapters.serial |= {name}
    swap(swaps)
    note_of(root).configs[name] = config


def freeze_base(root: nn.Module) -> None:
    """The model's own parameters stop being trained. Where PEFT is, it has seen to that."""
    if _has_peft(root):
        return
    ours = {id(p) for _, adapters in adapters_in(root) for p in adapters.parameters()}
    for key, parameter in root.named_parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            parameter.requires_grad_(False)
            note_of(root).frozen.add(key)


def unfreeze_base(root: nn.Module) -> None:
    """Undoes that, for the parameters that were trained before. Where PEFT has come since, they are its matter."""
    frozen = note_of(root).frozen if not _has_peft(root) else ()
    for key, parameter in root.named_parameters():
        if key in frozen:
            parameter.requires_grad_(True)


def _has_peft(root: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in root.modules())


def file_key(site: Site, parameter: str) -> str:
    """Of a tensor in the file."""
    return f"{PREFIX}{site.name}.{CHILD}.{parameter}"
