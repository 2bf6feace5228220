"""What adapters a model has, and how they come into it.

Bottleneck adapters are parameters of the model, `<owner of the block>.bottleneck.<name>.<parameter>`, and prefixes
likewise, `<attention>.prefixes.<name>.<parameter>`; all other keys of its state dict stay. BitFit and heads are values
of its own parameters (`own_parameters.py`). The config of each adapter is noted by name at the model itself, as PEFT
does.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from peft_kernels.integrations.blocks import (
    CHILD,
    Site,
    chosen_sites,
    file_key,
    require_module,
    shapes,
    stream_owner,
    unfit,
)
from peft_kernels.integrations.checkpoints import PREFIX
from peft_kernels.integrations.own_parameters import NOTE, OwnParameters, Slot, at, biases_of, own_parameters
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
from peft_kernels.modules import OF_STREAM, BottleneckAdapter, BottleneckAdapters, Prefixes

Places = dict[str, Site | PrefixSite | Slot]  # blocks by the names of their owners, attentions and biases by their own
Made = list[tuple[nn.Module, BottleneckAdapter]]  # adapters, with the owners of their blocks

MADE = "FSDP or a parametrization has made its class, or its forward was replaced"


@dataclass
class Attached:
    """What a model has: configs by name, the names of the parameters that `attach` has frozen, and the values that
    BitFit and modules_to_save have."""

    configs: dict[str, Config] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    own: OwnParameters = field(default_factory=OwnParameters)


def root_of(model: nn.Module) -> nn.Module:
    """The transformers model inside of what torch.compile, DDP, DataParallel and PEFT put around it."""
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return root_of(model.module)
    if isinstance(model, OptimizedModule):
        return root_of(model._orig_mod)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def require_unwrapped(model: nn.Module, function: str) -> None:
    """DDP averages the gradients of the parameters that were trained when it was made, and of no others."""
    require_module(model, function)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{function}: the model is in a DistributedDataParallel, which would not average the gradients of what is "
            f"trained from now on: call {function} before, and DistributedDataParallel(model) after it"
        )


def require_one_root(root: nn.Module, function: str) -> None:
    """What adapters a model has is noted at one module, that which they were attached to."""
    require_module(root, function)
    for name, module in root.named_modules():
        if name and NOTE in module.__dict__:
            raise ValueError(
                f"{function}: {name} has adapters that were attached to it; pass that module to {function}"
            )
    known = root.__dict__[NOTE].configs if NOTE in root.__dict__ else {}
    for owner, adapters in (*adapters_in(root), *prefixes_in(root)):
        if strangers := [name for name in adapters if name not in known]:
            raise ValueError(
                f"{function}: {owner} has an adapter {strangers[0]!r} that was attached to another module, of which "
                f"this {type(root).__name__} is a part; pass that module to {function}"
            )


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
    values = {PREFIX + key: tensor for key, tensor in note_of(root).own.values(name).items()}
    return (
        values
        | prefix_tensors(root, name)
        | {
            f"{PREFIX}{owner}.{CHILD}.{key}": parameter
            for owner, adapters in adapters_in(root)
            if name in adapters
            for key, parameter in adapters[name].named_parameters()
        }
    )


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
    require_one_root(root, "attach")
    require_unwidened(root, "attach")
    own_parameters(root, config)  # raises where there are none of a name
    if NOTE in root.__dict__:
        root.__dict__[NOTE].own.switch(root, (), None, "attach")  # raises where the active ones' cannot be given back
    if isinstance(config, BitFitConfig):
        return biases_of(root, config)
    prefix, blocks = prefix_of(config), blocks_of(config)
    places = plan_prefixes(root, prefix) if prefix else {}
    return places | plan_blocks(root, blocks) if blocks else places


def plan_blocks(root: nn.Module, config: BottleneckConfig) -> dict[str, Site]:
    """The blocks that get an adapter."""
    sites = {site.name: site for site in chosen_sites(root, config)}
    for name in sites:
        if reason := _obstacle(root.get_submodule(name)):
            raise ValueError(f"attach: {name} cannot have an adapter: {reason}")
        if config.reads in OF_STREAM:
            _check_stream(root, name, config.reads)
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


def file_shapes(root: nn.Module, config: Config, places: Places) -> dict[str, list[int]]:
    """Of the tensors that a file of an adapter has, by their keys."""
    found = {PREFIX + key: list(at(slot).shape) for key, slot in own_parameters(root, config).items()}
    if prefix := prefix_of(config):
        found |= prefix_shapes(prefix, _attentions(places))
    return found | shapes(blocks_of(config), _blocks(places))


def _blocks(places: Places) -> list[Site]:
    return [place for place in places.values() if isinstance(place, Site)]


def _attentions(places: Places) -> list[PrefixSite]:
    return [place for place in places.values() if isinstance(place, PrefixSite)]


def add(root: nn.Module, config: Config, name: str, places: Places, tensors: dict[str, Tensor] | None = None) -> None:
    """Puts an adapter in, a new one or that of a file; it does not run yet."""
    own, blocks = own_parameters(root, config), blocks_of(config)
    made = _made_for_blocks(root, blocks, _blocks(places), tensors) if blocks else []
    if prefix := prefix_of(config):
        add_prefixes(root, prefix, name, _attentions(places), tensors)
    if blocks:
        _add_to_blocks(root, blocks, name, made)
    note = note_of(root)
    if own:
        note.own.keep(name, own, tensors and {key: tensors[PREFIX + key] for key in own})
    note.configs[name] = config


def _made_for_blocks(root: nn.Module, config: BottleneckConfig, sites: Iterable[Site], tensors) -> Made:
    """The adapters, all of them before anything is put in: what fails leaves the model as it was."""
    made = []
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
    return made


def _add_to_blocks(root: nn.Module, config: BottleneckConfig, name: str, made: Made) -> None:
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
    were = note_of(root).own.freeze()
    for key, parameter in root.named_parameters():
        if were.get(id(parameter), parameter.requires_grad) and id(parameter) not in ours:
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
