"""Adapters of our own on a model: attach them, say which run, take them off."""

from collections.abc import Iterable, Sequence

from torch import nn

from peft_kernels.integrations.attachments import (
    adapters_in,
    add,
    freeze_base,
    note_of,
    plan,
    require_attached,
    require_one_root,
    require_unwrapped,
    root_of,
    unfreeze_base,
)
from peft_kernels.integrations.blocks import CHILD, check_layers, sites_of, stream_owner, unfit
from peft_kernels.integrations.own_parameters import NOTE, at
from peft_kernels.integrations.prefixes import (
    activate_prefixes,
    prefix_sites,
    prefixes_in,
    remove_prefix,
    require_own_classes,
)
from peft_kernels.integrations.transformers import keeps_its_class, swap
from peft_kernels.integrations.widened import require_unwidened
from peft_kernels.methods import Config, prefix_of
from peft_kernels.modules import OF_STREAM, BottleneckAdapters


def attach(model: nn.Module, config: Config, name: str = "default", *, freeze: bool = True) -> tuple[str, ...]:
    """Gives a model an adapter, active and ready to be trained; returns the names of the blocks, attentions or biases
    it is at.

    Args:
        model: a transformers model, or a PeftModel around one: its LoRA stays as it is and both work together.
        config: a `BottleneckConfig`, `PrefixTuningConfig`, `PTuningV2Config`, `MAMConfig` or `BitFitConfig`.
        name: by which `set_active`, `detach` and `save_pretrained` know the adapter. Others that the model has stop
            being active: `set_active(model, [other, name])` stacks them.
        freeze: whether the model's own parameters stop being trained; `detach` of the last adapter undoes it. PEFT's
            adapters, and the model under them, keep what PEFT has set.

    The owners of the blocks change class (instances only); no key of the model's state dict changes. Adapters are
    float32 (float64 in a float64 model) on the device of their block, whatever the base is stored in. A new head is
    frozen with the rest unless the config's `modules_to_save` names it: then it is trained, and saved with the adapter.
    After `get_peft_model`, which freezes what it does not know, `set_active` makes the adapters trainable again.

    While a model has prefixes, its attention implementation is "peft_kernels", which gives no attention weights
    (output_attentions), and goes back with the last one; set_attn_implementation in between takes the prefixes out.
    Those of layers that FSDP shards one by one cannot have prefix_projection.

    BitFit and modules_to_save train parameters of the model, in its dtype (a bfloat16 model's head in bfloat16). While
    the adapter is active they have its values, under the model's own keys in the state dict. The values of adapters
    that are not active are in no state dict, and so in no checkpoint of a Trainer: `save_pretrained` writes them. A
    switch drops gradients. What is returned does not name the parameters of modules_to_save.

    Raises:
        ValueError: the name is taken or has a dot; the model has no block that is known, no bias, no attention that
            prefixes can reach, or not the layers or modules that the config names; a block cannot change class (FSDP,
            parametrizations, a forward of its own); what BitFit or modules_to_save train is offloaded, tied to more, or
            served by a pool; the model is in a DistributedDataParallel, or in part of it adapters were attached to.
            Nothing has changed then.

    Example:
        >>> peft_kernels.attach(model, peft_kernels.BottleneckConfig.pfeiffer(reduction_factor=16))
        >>> peft_kernels.print_trainable_parameters(model)
        >>> trainer.train()
        >>> peft_kernels.save_pretrained(model, "checkpoints/adapter")
    """
    require_unwrapped(model, "attach")
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
        names: serial ones run in this order, each on what the one before gave; parallel ones are summed; of prefixes,
            and of those that train the same parameters of the model (BitFit, modules_to_save), there may be one. []
            stands for the model without adapters.
        skip_layers: layers that go without adapters from now on (AdapterDrop, arXiv:2010.11918).
        trainable: whether the active ones are trained, or the names of those that are trained.

    Raises:
        ValueError: the model has no adapter of a name, or no layer of an index; a name comes twice; two are
            prefixes, or have values for one parameter of the model, or it is offloaded, or served by a pool; the model
            is in a DistributedDataParallel and more would be trained than now. Nothing has changed then.

    Example:
        >>> peft_kernels.set_active(model, ["language", "task"], trainable=["task"])
        >>> peft_kernels.set_active(model, "task", skip_layers=range(4))
    """
    root = root_of(model)
    require_one_root(root, "set_active")
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
    if skip_layers:
        attentions = prefix_sites(root) if prefixes_in(root) else []
        check_layers("set_active: skip_layers", skip_layers, [*sites, *attentions])
    prefixes = [name for name in names if prefix_of(note.configs[name])]
    if len(prefixes) > 1:
        raise ValueError(
            f"set_active: a model attends to one prefix, got {' and '.join(prefixes)}; adapter_ids gives each row its "
            "own"
        )
    give = note.own.switch(root, names, trained, "set_active")
    if _would_train(root, trained, sites, skip_layers):
        require_unwrapped(model, "set_active")
    give()
    note.own.warn_of_idle(root, names)
    activate_prefixes(root, prefixes, trained, skip_layers)
    for site in sites:
        adapters = root.get_submodule(site.name)._modules.get(CHILD)
        if isinstance(adapters, BottleneckAdapters):
            here = () if site.layer in skip_layers else names
            adapters.active_names = tuple(name for name in here if name in adapters)
            for name, adapter in adapters.items():
                adapter.requires_grad_(name in trained and name in adapters.active_names)


def _would_train(root: nn.Module, trained: Sequence[str], sites: list, skip_layers: Sequence) -> bool:
    """Whether parameters would be trained that are not now."""
    own = note_of(root).own.slots
    found = [at(slot) for name in trained for slot in own.get(name, {}).values()]
    for site in sites:
        adapters = root.get_submodule(site.name)._modules.get(CHILD)
        if isinstance(adapters, BottleneckAdapters) and site.layer not in skip_layers:
            found += [p for name in trained if name in adapters for p in adapters[name].parameters()]
    for _, prefixes in prefixes_in(root):
        found += [p for name in trained if name in prefixes for p in prefixes[name].parameters()]
    return not all(parameter.requires_grad for parameter in found)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that some block of a model runs, and of those whose values its own parameters have.

    >>> peft_kernels.active_adapters(model)
    """
    root = root_of(model)
    names = [name for _, adapters in adapters_in(root) for name in adapters.active_names]
    names += [prefixes.active_name for _, prefixes in prefixes_in(root) if prefixes.active_name]
    return tuple(dict.fromkeys([*names, *(root.__dict__[NOTE].own.base if NOTE in root.__dict__ else ())]))


def detach(model: nn.Module, name: str = "default") -> None:
    """Takes an adapter off. With the last one, the model is bit for bit what it was, frozen parameters too.

    Raises:
        ValueError: the model has no adapter of that name, or a part of it cannot be changed back. Nothing has changed
            then.

    Example:
        >>> peft_kernels.detach(model, "task")
    """
    root = root_of(model)
    require_one_root(root, "detach")
    require_attached(root, name, "detach")
    require_unwidened(root, "detach")
    if prefix_of(note_of(root).configs[name]):
        require_own_classes(root)
    for owner_name, adapters in adapters_in(root):
        changed = [owner_name] if list(adapters) == [name] else []
        if adapters.reads_by_name.get(name) in OF_STREAM:
            changed.append(stream_owner(root, owner_name))
        if made := [module for module in changed if keeps_its_class(root.get_submodule(module))]:
            raise ValueError(f"detach: {made[0]} has a class that was made after attach; undo that before")
    note = note_of(root)
    give_back = note.own.switch(root, [other for other in note.own.base if other != name], None, "detach")
    for owner_name, adapters in adapters_in(root):
        if name in adapters:
            del adapters[name], adapters.reads_by_name[name]
            adapters.active_names = tuple(other for other in adapters.active_names if other != name)
        if not adapters:
            del root.get_submodule(owner_name)._modules[CHILD]
    swap(unfit(root))
    remove_prefix(root, name)
    give_back()
    note.own.drop(name)
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
