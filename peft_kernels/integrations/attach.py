"""Adapters of our own on a model: attach them, say which run, take them off."""

from collections.abc import Iterable, Sequence

from torch import nn

from peft_kernels.integrations.attachments import (
    NOTE,
    adapters_in,
    add,
    check_layers,
    freeze_base,
    note_of,
    plan,
    require_attached,
    root_of,
    unfreeze_base,
)
from peft_kernels.integrations.biases import activate, biases_of, deactivate
from peft_kernels.integrations.blocks import CHILD, sites_of, stream_owner, unfit
from peft_kernels.integrations.prefixes import activate_prefixes, prefixes_in, remove_prefix
from peft_kernels.integrations.transformers import keeps_its_class, swap
from peft_kernels.integrations.widened import require_unwidened
from peft_kernels.methods import BitFitConfig, Config, prefix_of
from peft_kernels.modules import OF_STREAM, BottleneckAdapters


def attach(model: nn.Module, config: Config, name: str = "default", *, freeze: bool = True) -> tuple[str, ...]:
    """Gives a model an adapter, active and ready to be trained; returns the names of the blocks, or biases, it is at.

    Args:
        model: a transformers model, or a PeftModel around one: its LoRA stays as it is and both work together.
        config: a `BottleneckConfig`, `PrefixTuningConfig`, `PTuningV2Config`, `MAMConfig` or `BitFitConfig`.
        name: by which `set_active`, `detach` and `save_pretrained` know the adapter. Others that the model has stop
            being active: `set_active(model, [other, name])` stacks them.
        freeze: whether the model's own parameters stop being trained; `detach` of the last adapter undoes it. PEFT's
            adapters, and the model under them, keep what PEFT has set.

    The owners of the blocks change class (instances only); no key of the model's state dict changes. Adapters are
    float32 (float64 in a float64 model) on the device of their block, whatever the base is stored in. Heads are frozen
    with the rest and are not saved with an adapter: set `requires_grad_` on a new one afterwards, and save it yourself.
    After `get_peft_model`, which freezes what it does not know, `set_active` makes the adapters trainable again. BitFit
    trains the model's own biases: while its adapter is active, they have its values.

    Raises:
        ValueError: the name is taken or has a dot; the model has no block that is known, no bias, or not the layers
            that the config names; a block cannot change class (FSDP, parametrizations, a forward of its own). Nothing
            has changed then.

    Example:
        >>> peft_kernels.attach(model, peft_kernels.BottleneckConfig.pfeiffer(reduction_factor=16))
        >>> peft_kernels.print_trainable_parameters(model)
        >>> trainer.train()
        >>> peft_kernels.save_pretrained(model, "checkpoints/adapter")
    """
    root = root_of(model)
    places = plan(root, config, name)
    add(root, config, name, places)
    if freeze:
        freeze_base(root)
    set_active(root, name)
    return tuple(places)


def set_active(
    model: nn.Module,
    names: str | Sequence[str],
    *,
    skip_layers: Iterable[int] = (),
    trainable: bool | str | Sequence[str] = True,
) -> None:
    """Says which adapters run; the others stop being trained.

    Args:
        names: serial ones run in this order, each on what the one before gave; parallel ones are summed; of BitFit's
            and of prefixes there may be one. [] stands for the model without adapters.
        skip_layers: layers that go without adapters from now on (AdapterDrop, arXiv:2010.11918).
        trainable: whether the active ones are trained, or the names of those that are trained.

    Raises:
        ValueError: the model has no adapter of a name, or no layer of an index; a name comes twice; two are BitFit's
            or prefixes.

    Example:
        >>> peft_kernels.set_active(model, ["language", "task"], trainable=["task"])
        >>> peft_kernels.set_active(model, "task", skip_layers=range(4))
    """
    root = root_of(model)
    require_unwidened(root, "set_active")
    names = (names,) if isinstance(names, str) else tuple(names)
    trained = (trainable,) if isinstance(trainable, str) else names if trainable is True else tuple(trainable or ())
    skip_layers = tuple(skip_layers)
    for name in names:
        require_attached(root, name, "set_active")
    if strangers := [name for name in trained if name not in names]:
        raise ValueError(f"set_active: trainable must name active adapters, got {strangers[0]!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"set_active: names must differ from each other, got {list(names)}")
    if NOTE not in root.__dict__:
        return
    note, sites = note_of(root), sites_of(root)
    fits = [name for name in names if isinstance(note.configs[name], BitFitConfig)]
    if len(fits) > 1:
        raise ValueError(f"set_active: the model's biases have the values of one adapter, got {' and '.join(fits)}")
    prefixes = [name for name in names if prefix_of(note.configs[name])]
    if len(prefixes) > 1:
        raise ValueError(
            f"set_active: a model attends to one prefix, got {' and '.join(prefixes)}; adapter_ids gives each row its "
            "own"
        )
    if skip_layers:
        check_layers("set_active: skip_layers", skip_layers, sites)
    if note.biases.active is not None:
        deactivate(note.biases, biases_of(root, note.configs[note.biases.active]))
    for name in fits:
        activate(note.biases, name, biases_of(root, note.configs[name]), name in trained)
    activate_prefixes(root, prefixes, trained, skip_layers)
    for site in sites:
        adapters = root.get_submodule(site.name)._modules.get(CHILD)
        if isinstance(adapters, BottleneckAdapters):
            here = () if site.layer in skip_layers else names
            adapters.active_names = tuple(name for name in here if name in adapters)
            for name, adapter in adapters.items():
                adapter.requires_grad_(name in trained and name in adapters.active_names)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that some block of a model runs, and of the one whose values its biases have.

    >>> peft_kernels.active_adapters(model)
    """
    root = root_of(model)
    names = [name for _, adapters in adapters_in(root) for name in adapters.active_names]
    names += [prefixes.active_name for _, prefixes in prefixes_in(root) if prefixes.active_name]
    fit = root.__dict__[NOTE].biases.active if NOTE in root.__dict__ else None
    return tuple(dict.fromkeys(names if fit is None else [*names, fit]))


def detach(model: nn.Module, name: str = "default") -> None:
    """Takes an adapter off. With the last one, the model is bit for bit what it was, frozen parameters too.

    Raises:
        ValueError: the model has no adapter of that name.

    Example:
        >>> peft_kernels.detach(model, "task")
    """
    root = root_of(model)
    require_attached(root, name, "detach")
    require_unwidened(root, "detach")
    for owner_name, adapters in adapters_in(root):
        changed = [owner_name] if list(adapters) == [name] else []
        if adapters.reads_by_name.get(name) in OF_STREAM:
            changed.append(stream_owner(root, owner_name))
        if made := [module for module in changed if keeps_its_class(root.get_submodule(module))]:
            raise ValueError(f"detach: {made[0]} has a class that was made after attach; undo that before")
    for owner_name, adapters in adapters_in(root):
        if name in adapters:
            del adapters[name], adapters.reads_by_name[name]
            adapters.active_names = tuple(other for other in adapters.active_names if other != name)
        if not adapters:
            del root.get_submodule(owner_name)._modules[CHILD]
    swap(unfit(root))
    remove_prefix(root, name)
    note = note_of(root)
    if name == note.biases.active:
        deactivate(note.biases, biases_of(root, note.configs[name]))
    note.biases.kept.pop(name, None)
    del note.configs[name]
    if not note.configs:
        unfreeze_base(root)
        del root.__dict__[NOTE]


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many parameters are trained, of how many, in PEFT's words.

    >>> peft_kernels.print_trainable_parameters(model)
    """
    every = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total, trained = sum(n for n, _ in every), sum(n for n, trains in every if trains)
    print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")
