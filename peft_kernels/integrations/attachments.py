"""What adapters a model has, and how they come into it.

Bottleneck adapters are parameters of the model, `<owner of the block>.bottleneck.<name>.<parameter>`; all other keys of
its state dict stay. BitFit adapters are values of its biases (`biases.py`). The config of each is noted by name at the
model itself, as PEFT does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from peft_kernels.integrations.biases import Biases, biases_of, keep, values_of
from peft_kernels.integrations.blocks import CHILD, Site, sites_of, stream_owner, unfit
from peft_kernels.integrations.pooled import PooledBlock
from peft_kernels.integrations.prefixes import (
    PrefixSite,
    add_prefixes,
    plan_prefixes,
    prefix_shapes,
    prefix_tensors,
    prefixes_in,
)
from peft_kernels.integrations.transformers import keeps_its_class, swap
from peft_kernels.integrations.widened import require_unwidened
from peft_kernels.methods import BitFitConfig, BottleneckConfig, Config, blocks_of, prefix_of
from peft_kernels.modules import OF_STREAM, BottleneckAdapters, Prefixes

Places = dict[str, Site | PrefixSite | nn.Parameter]  # of blocks or attentions, or biases, by name

NOTE = "attached_adapters"
PREFIX = "base_model.model."  # of every key in PEFT's files
MADE = "FSDP or a parametrization has made its class, or its forward was replaced"


@dataclass
class Attached:
    """What a model has: configs by name, the names of the parameters that `attach` has frozen, and BitFit's values."""

    configs: dict[str, Config] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    biases: Biases = field(default_factory=Biases)


def root_of(model: nn.Module) -> nn.Module:
    """The transformers model inside of what torch.compile, DDP, DataParallel and PEFT put around it."""
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return root_of(model.module)
    if isinstance(model, OptimizedModule):
        return root_of(model._orig_mod)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def note_of(root: nn.Module) -> Attached:
    return root.__dict__.setdefault(NOTE, Attached())


def require_attached(root: nn.Module, name: str, function: str) -> None:
    configs = root.__dict__[NOTE].configs if NOTE in root.__dict__ else {}
    if name not in configs:
        has = ", ".join(map(repr, configs)) or "none"
        raise ValueError(f"{function}: the model has no adapter {name!r}; it has {has}")


def adapters_in(root: nn.Module) -> list[tuple[str, BottleneckAdapters]]:
    """The adapters of each block that has any, with the name of its owner."""
    return [
        (name.rpartition(".")[0], module)
        for name, module in root.named_modules()
        if isinstance(module, BottleneckAdapters)
    ]


def tensors_of(root: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters of an adapter, by their keys in the file."""
    note = note_of(root)
    if isinstance(config := note.configs[name], BitFitConfig):
        values = values_of(note.biases, name, biases_of(root, config))
        return {PREFIX + key: tensor for key, tensor in values.items()}
    return prefix_tensors(root, name) | {
        f"{PREFIX}{owner}.{CHILD}.{key}": parameter
        for owner, adapters in adapters_in(root)
        if name in adapters
        for key, parameter in adapters[name].named_parameters()
    }


def plan(root: nn.Module, config: Config, name: str) -> Places:
    """Where an adapter goes. Raises for what cannot be done."""
    if not isinstance(config, Config):
        raise TypeError(
            "attach: config must be a BottleneckConfig, BitFitConfig, PrefixTuningConfig, PTuningV2Config or MAMConfig,"
            f" got a {type(config).__name__}; what PEFT has is attached by peft.get_peft_model, before or after"
        )
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"attach: name must be a str without dots, got {name!r}")
    if hasattr(BottleneckAdapters(), name) or hasattr(Prefixes("", "", set()), name):
        raise ValueError(f"attach: name must not be that of an attribute of torch's modules, got {name!r}")
    if NOTE in root.__dict__ and name in root.__dict__[NOTE].configs:
        raise ValueError(f"attach: the model has an adapter {name!r}; choose another name, or detach(model, {name!r})")
    require_unwidened(root, "attach")
    if isinstance(config, BitFitConfig):
        return biases_of(root, config)
    prefix, blocks = prefix_of(config), blocks_of(config)
    places = plan_prefixes(root, prefix) if prefix else {}
    return places | plan_blocks(root, blocks) if blocks else places


def plan_blocks(root: nn.Module, config: BottleneckConfig) -> dict[str, Site]:
    """The blocks that get an adapter."""
    every = sites_of(root)
    for representation in config.representations:
        if not any(site.block.representation == representation for site in every):
            raise ValueError(
                f"attach: no {representation} block is known in a {type(root).__name__}; those that are have the "
                "children that peft_kernels/integrations/targets.py lists"
            )
    check_layers("attach: layers", config.layers or (), every)
    sites = {site.name: site for site in every if site.block.representation in config.representations}
    if config.layers is not None:
        sites = {name: site for name, site in sites.items() if site.layer in config.layers}
        if not sites:
            raise ValueError(f"attach: there is no {config.representation} block in the layers {list(config.layers)}")
    for name, site in sites.items():
        if reason := _obstacle(root.get_submodule(name)):
            raise ValueError(f"attach: {name} cannot have an adapter: {reason}")
        if config.reads in OF_STREAM:
            _check_stream(root, name, config.reads)
        config.bottleneck(site.width)  # raises where it is too wide
    return sites


def _obstacle(owner: nn.Module) -> str:
    child = owner._modules.get(CHILD)
    if isinstance(child, PooledBlock):
        return "the model's pool has bottleneck adapters there" if child.active_names else ""
    if child is not None:
        return "" if isinstance(child, BottleneckAdapters) else f"it has a {CHILD} of its own"
    return MADE if keeps_its_class(owner) else ""


def _check_stream(root: nn.Module, block: str, reads: str) -> None:
    layer = stream_owner(root, block)
    if layer is None:
        raise ValueError(
            f"attach: the residual stream around {block} is not known, which reads={reads!r} needs; reads='output' or, "
            "for a parallel adapter, 'input' does without"
        )
    if keeps_its_class(root.get_submodule(layer)):
        raise ValueError(f"attach: {layer} has to hand on its residual stream and cannot change class: {MADE}")


def check_layers(what: str, layers: Sequence[int], sites: list[Site]) -> None:
    count = 1 + max(site.layer for site in sites) if sites else 0
    if outside := [layer for layer in layers if not 0 <= layer < count]:
        raise ValueError(f"{what} must lie in [0, {count}), the layers of this model, got {outside[0]}")


def shapes(config: Config, places: Places) -> dict[str, list[int]]:
    """Of the tensors in a file, by their keys."""
    if isinstance(config, BitFitConfig):
        return {PREFIX + key: list(bias.shape) for key, bias in places.items()}
    prefix, blocks = prefix_of(config), blocks_of(config)
    found = prefix_shapes(prefix, _attentions(places)) if prefix else {}
    return found | {
        file_key(site, key): list(parameter.shape)
        for site in _blocks(places)
        for key, parameter in blocks.adapter(site.width, "meta").named_parameters()
    }


def _blocks(places: Places) -> list[Site]:
    return [place for place in places.values() if isinstance(place, Site)]


def _attentions(places: Places) -> list[PrefixSite]:
    return [place for place in places.values() if isinstance(place, PrefixSite)]


def add(root: nn.Module, config: Config, name: str, places: Places, tensors: dict[str, Tensor] | None = None) -> None:
    """Puts an adapter in, a new one or that of a file; it does not run yet."""
    note = note_of(root)
    if isinstance(config, BitFitConfig):
        values = tensors and {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        keep(note.biases, name, places, values)
    if prefix := prefix_of(config):
        add_prefixes(root, prefix, name, _attentions(places), tensors)
    if blocks := blocks_of(config):
        _add_to_blocks(root, blocks, name, _blocks(places), tensors)
    note.configs[name] = config


def _add_to_blocks(root: nn.Module, config: BottleneckConfig, name: str, sites: Iterable[Site], tensors) -> None:
    made = []  # all of them before any is put in: what fails leaves the model as it was
    for site in sites:
        owner = root.get_submodule(site.name)
        base = next(owner.parameters())
        dtype = torch.float64 if base.dtype is torch.float64 else torch.float32
        if tensors is None:
            adapter = config.adapter(site.width, base.device, dtype)
        elif base.is_meta:
            raise ValueError(
                f"load: the parameters of {site.name} are not there (meta, or offloaded); move them to a device first"
            )
        else:
            adapter = config.adapter(site.width, "meta", dtype).to_empty(device=base.device)
            with torch.no_grad():
                for key, parameter in adapter.named_parameters():
                    parameter.copy_(tensors[file_key(site, key)])
        made.append((owner, adapter))
    for owner, adapter in made:
        if not isinstance(owner._modules.get(CHILD), BottleneckAdapters):  # a pool's place makes room, if nothing has
            owner._modules[CHILD] = BottleneckAdapters().train(owner.training)  # touched it
        adapters = owner._modules[CHILD]
        adapters[name] = adapter.train(owner.training)
        adapters.reads_by_name[name] = config.reads
    swap(unfit(root))


def freeze_base(root: nn.Module) -> None:
    """The model's own parameters stop being trained. Where PEFT is, it has seen to that."""
    if _has_peft(root):
        return
    ours = {id(p) for _, m in (*adapters_in(root), *prefixes_in(root)) for p in m.parameters()}
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
