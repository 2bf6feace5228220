"""Bottleneck adapters on a model: attach, set_active, detach, save_pretrained, load.

Adapters are parameters of the model, `<owner of the block>.bottleneck.<name>.<parameter>`; all other keys of its state
dict stay. What the model has is noted once, at the model itself, as PEFT does: the config of each adapter by name. The
files are PEFT's two, adapter_config.json (with a peft_type of our own) and adapter_model.safetensors.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from peft_kernels.integrations.blocks import CHILD, Site, adapted_class, sites_of
from peft_kernels.integrations.named import beneath
from peft_kernels.integrations.transformers import keeps_its_class, swap
from peft_kernels.methods import BottleneckConfig
from peft_kernels.modules import BottleneckAdapters

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every key in PEFT's files
NOTE = "bottleneck_adapters"


@dataclass
class Attached:
    """What a model has: configs by name, and the names of the parameters that `attach` has frozen."""

    configs: dict[str, BottleneckConfig] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)


def attach(
    model: nn.Module, config: BottleneckConfig, name: str = "default", *, freeze: bool = True
) -> tuple[str, ...]:
    """Gives a model bottleneck adapters, active and ready to be trained; returns the names of the blocks that have one.

    Args:
        model: a transformers model, or a PeftModel around one: its LoRA stays as it is and both work together.
        config: a `BottleneckConfig`.
        name: by which `set_active`, `detach` and `save_pretrained` know the adapter. Others that the model has stop
            being active: `set_active(model, [other, name])` stacks them.
        freeze: whether the model's own parameters stop being trained; `detach` of the last adapter undoes it. PEFT's
            adapters, and the model under them, keep what PEFT has set.

    The owners of the blocks change class (instances only); no key of the model's state dict changes. Adapters are
    float32 (float64 in a float64 model) on the device of their block, whatever the base is stored in.

    Raises:
        ValueError: the name is taken or has a dot; the model has no block that is known, or not the layers that the
            config names; a block cannot change class (FSDP, parametrizations, a forward of its own). Nothing is changed.

    Example:
        >>> peft_kernels.attach(model, peft_kernels.BottleneckConfig.pfeiffer(reduction_factor=16))
        >>> peft_kernels.print_trainable_parameters(model)
        >>> trainer.train()
        >>> peft_kernels.save_pretrained(model, "checkpoints/adapter")
    """
    root = _root(model)
    sites = _plan(root, config, name)
    _add(root, config, name, sites)
    if freeze:
        _freeze(root)
    set_active(root, name)
    return tuple(site.name for site in sites)


def set_active(
    model: nn.Module, names: str | Sequence[str], *, skip_layers: Sequence[int] = (), trainable: bool = True
) -> None:
    """Says which adapters run; the others stop being trained.

    Args:
        names: serial ones run in this order, each on what the one before gave; parallel ones are summed. [] stands
            for the model without adapters.
        skip_layers: layers that go without adapters from now on (AdapterDrop, arXiv:2010.11918).
        trainable: whether the active ones are trained.

    Raises:
        ValueError: the model has no adapter of a name, or no layer of an index; a name comes twice.

    Example:
        >>> peft_kernels.set_active(model, ["language", "task"])
        >>> peft_kernels.set_active(model, "task", skip_layers=range(4))
    """
    root = _root(model)
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        _require_attached(root, name, "set_active")
    if len(set(names)) < len(names):
        raise ValueError(f"set_active: names must differ from each other, got {list(names)}")
    sites = sites_of(root)
    _check_layers("set_active: skip_layers", skip_layers, sites)
    for site in sites:
        adapters = root.get_submodule(site.name)._modules.get(CHILD)
        if adapters is not None:
            here = () if site.layer in skip_layers else names
            adapters.active = tuple(name for name in here if name in adapters)
            for name, adapter in adapters.items():
                adapter.requires_grad_(trainable and name in adapters.active)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that some block of a model runs.

    >>> peft_kernels.active_adapters(model)
    """
    return tuple(dict.fromkeys(name for _, adapters in _adapters(_root(model)) for name in adapters.active))


def detach(model: nn.Module, name: str = "default") -> None:
    """Takes an adapter off. With the last one, the model is bit for bit what it was, frozen parameters too.

    Raises:
        ValueError: the model has no adapter of that name.

    Example:
        >>> peft_kernels.detach(model, "task")
    """
    root = _root(model)
    _require_attached(root, name, "detach")
    swaps = []
    for owner_name, adapters in _adapters(root):
        if list(adapters) == [name] and keeps_its_class(root.get_submodule(owner_name)):
            raise ValueError(f"detach: {owner_name} has a class that was made after attach; undo that before")
    for owner_name, adapters in _adapters(root):
        if name in adapters:
            del adapters[name]
            adapters.active = tuple(other for other in adapters.active if other != name)
            adapters.serial -= {name}
        if not adapters:
            owner = root.get_submodule(owner_name)
            del owner._modules[CHILD]
            swaps.append((owner, beneath(type(owner))))
    swap(swaps)
    note = _note(root)
    del note.configs[name]
    if not note.configs:
        for key, parameter in root.named_parameters():
            if key in note.frozen:
                parameter.requires_grad_(True)
        del root.__dict__[NOTE]


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many parameters are trained, of how many, in PEFT's words.

    >>> peft_kernels.print_trainable_parameters(model)
    """
    every = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in every), sum(n for n, trains in every if trains)
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")


# -- files ------------------------------------------------------------------------------------------------------------


def save_pretrained(model: nn.Module, folder: str | PathLike, name: str = "default") -> None:
    """Writes an adapter in PEFT's form: adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: the model has no adapter of that name.

    Example:
        >>> peft_kernels.save_pretrained(model, "checkpoints/task", "task")
    """
    root = _root(model)
    _require_attached(root, name, "save_pretrained")
    base = getattr(getattr(root, "config", None), "_name_or_path", None)
    about = _note(root).configs[name].to_dict() | {"base_model_name_or_path": base or None}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: t.detach().cpu().contiguous() for key, t in _tensors(root, name).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")


def load(
    model: nn.Module, source: str | PathLike, name: str = "default", *, trainable: bool = False, freeze: bool = True
) -> tuple[str, ...]:
    """Attaches an adapter that `save_pretrained` has written; returns the names of the blocks that have one.

    Args:
        source: a folder, or an id of the Hugging Face Hub.
        name: what the adapter is called here, whatever it was called when it was saved. It becomes the active one.
        trainable: whether it is to be trained on.
        freeze: as in `attach`.

    Raises:
        ValueError: a file is missing or of another kind, or does not fit the model; it says which tensor. The model is
            not changed then.

    Example:
        >>> peft_kernels.load(model, "checkpoints/task", "task")
    """
    root = _root(model)
    config, tensors = _read(source)
    sites = _plan(root, config, name)
    _check_tensors(config, sites, tensors, source)
    _add(root, config, name, sites, tensors)
    if freeze:
        _freeze(root)
    set_active(root, name, trainable=trainable)
    return tuple(site.name for site in sites)


def _read(source: str | PathLike) -> tuple[BottleneckConfig, dict[str, Tensor]]:
    try:
        about = json.loads(Path(cached_file(source, CONFIG)).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"load: {source} has no {CONFIG} that can be read: {str(error).splitlines()[0]}") from error
    kind = about.get("peft_type") if isinstance(about, dict) else None
    if kind != BottleneckConfig.peft_type:
        raise ValueError(
            f"load: the peft_type in {source} must be {BottleneckConfig.peft_type}, got {kind}; what PEFT has saved is "
            "loaded by PeftModel.from_pretrained"
        )
    about.pop("base_model_name_or_path", None)
    config = BottleneckConfig.from_dict(about)
    try:
        return config, load_file(cached_file(source, WEIGHTS))
    except OSError as error:
        raise ValueError(
            f"load: {source} has no {WEIGHTS}; a .bin file is a pickle and is not read: save it again as .safetensors"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"load: {WEIGHTS} in {source} cannot be read: {error}") from error


def _check_tensors(config: BottleneckConfig, sites: list[Site], tensors: dict[str, Tensor], source) -> None:
    expected = {}
    for site in sites:
        for key, tensor in config.adapter(site.width, "meta").state_dict().items():
            expected[_key(site, key)] = list(tensor.shape)
    if strangers := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"load: the model has no place for {strangers[0]} of {source} ({len(strangers)} such tensors)")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"load: {source} has no {missing[0]}, which its config needs ({len(missing)} such tensors)")
    for key, shape in expected.items():
        if list(tensors[key].shape) != shape:
            raise ValueError(f"load: {key} must have shape {shape} in this model, got {list(tensors[key].shape)}")


def _key(site: Site, parameter: str) -> str:
    """Of a tensor in the file."""
    return f"{PREFIX}{site.name}.{CHILD}.{parameter}"


# -- the model --------------------------------------------------------------------------------------------------------


def _root(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _note(root: nn.Module) -> Attached:
    return root.__dict__.setdefault(NOTE, Attached())


def _require_attached(root: nn.Module, name: str, function: str) -> None:
    configs = root.__dict__[NOTE].configs if NOTE in root.__dict__ else {}
    if name not in configs:
        has = ", ".join(map(repr, configs)) or "none"
        raise ValueError(f"{function}: the model has no bottleneck adapter {name!r}; it has {has}")


def _adapters(root: nn.Module) -> list[tuple[str, BottleneckAdapters]]:
    """The adapters of each block that has any, with the name of its owner."""
    return [
        (name.rpartition(".")[0], module)
        for name, module in root.named_modules()
        if isinstance(module, BottleneckAdapters)
    ]


def _tensors(root: nn.Module, name: str) -> dict[str, Tensor]:
    """The parameters of an adapter, by their keys in the file."""
    return {
        f"{PREFIX}{owner}.{CHILD}.{key}": parameter
        for owner, adapters in _adapters(root)
        if name in adapters
        for key, parameter in adapters[name].named_parameters()
    }


def _plan(root: nn.Module, config: BottleneckConfig, name: str) -> list[Site]:
    """The blocks that get an adapter. Raises for what cannot be done."""
    if not isinstance(config, BottleneckConfig):
        raise TypeError(
            f"attach: config must be a peft_kernels.BottleneckConfig, got a {type(config).__name__}; PEFT's methods are "
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
    _check_layers("attach: layers", config.layers or (), every)
    sites = [
        site
        for site in every
        if site.block.representation in config.representations
        and (config.layers is None or site.layer in config.layers)
    ]
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


def _check_layers(what: str, layers: Sequence[int], sites: list[Site]) -> None:
    count = 1 + max(site.layer for site in sites) if sites else 0
    if outside := [layer for layer in layers if not 0 <= layer < count]:
        raise ValueError(f"{what} must lie in [0, {count}), the layers of this model, got {outside[0]}")


def _add(root: nn.Module, config: BottleneckConfig, name: str, sites: list[Site], tensors=None) -> None:
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
                    parameter.copy_(tensors[_key(site, key)])
        if CHILD not in owner._modules:
            owner.add_module(CHILD, BottleneckAdapters())
            swaps.append((owner, adapted_class(site.block, type(owner))))
        adapters = owner._modules[CHILD]
        adapters[name] = adapter.train(owner.training)
        if config.insertion == "serial":
            adapters.serial |= {name}
    swap(swaps)
    _note(root).configs[name] = config


def _freeze(root: nn.Module) -> None:
    """The model's own parameters stop being trained. Where PEFT is, it has seen to that."""
    if any(isinstance(module, BaseTunerLayer) for module in root.modules()):
        return
    ours = {id(p) for _, adapters in _adapters(root) for p in adapters.parameters()}
    for key, parameter in root.named_parameters():
        if parameter.requires_grad and id(parameter) not in ours:
            parameter.requires_grad_(False)
            _note(root).frozen.add(key)
