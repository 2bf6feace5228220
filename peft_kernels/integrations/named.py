"""What has to know which adapter each row has, beside the fused layers: PEFT's tuner, adapter layers without a kernel,
and layers that transformers checkpoints. Each is a subclass without state, given to instances by `peft_kernels.patch`.

PEFT tells its layers by forward hooks that it registers for a call; they stay after an exception and are seen by other
threads. The tuner's subclass puts the names where the layers look them up (`rows.py`) instead. The other subclasses are
made when they are first asked for and keep the name of their class, by which others recognise it.
"""

import contextlib
import functools
from collections.abc import Iterator

from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.compiler import is_compiling
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_kernels.integrations.invocations import from_offsets
from peft_kernels.integrations.rows import (
    OUTSIDE,
    adapters_of,
    by_peft,
    current,
    entered,
    expansion,
    from_names,
    in_block,
    keeping,
    outside_graph,
)
from peft_kernels.modules.prefix import keeping_encoded

CHECKPOINT = "_gradient_checkpointing_func"


class FusedLoraModel(LoraModel):
    """`peft.tuners.lora.LoraModel` whose adapter_names and alora_offsets leave no hooks and may be used by threads, the
    names in training too."""

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        names, offsets = kwargs.get("adapter_names"), kwargs.get("alora_offsets")
        if names is None and (offsets is None or in_block()):  # PEFT finds offsets itself where an aLoRA is active
            yield
            return
        rows = None
        if (known := _known_adapters(self.model)) is not None:
            expand = expansion(kwargs, self.model)
            if offsets is None:
                rows = from_names(names, known, expand)
            else:
                rows = from_offsets(names, offsets, self.active_adapters, self.peft_config, known, expand)
        with super()._enable_peft_forward_hooks(*args, **kwargs) if rows is None else entered(rows):
            yield


def _known_adapters(model: nn.Module) -> set[str] | None:
    """Names of the adapters in a model; None if a layer of it would not find its rows' adapters in `rows.py`."""
    known, todo = set(), [model]
    while todo:
        module = todo.pop()
        if takes_names(module):
            if not asks_for_rows(module):
                return None
            if isinstance(module, LoraLayer):
                known.update(adapters_of(module))
                todo.append(module.base_layer)
                continue
        todo.extend(child for child in module._modules.values() if child is not None)
    return known


def takes_names(module: nn.Module) -> bool:
    """Whether PEFT tells such a module the names of the adapters."""
    return isinstance(module, (LoraLayer, AuxiliaryTrainingWrapper))


def asks_for_rows(module: nn.Module) -> bool:
    return hasattr(type(module), "asks_for_rows")


# -- subclasses of any class ------------------------------------------------------------------------------------------


def _rebuild(make, family_class):
    return family_class.__new__(make(family_class))


def subclass(make, family_class: type, members: dict, *before: type) -> type:
    """A subclass without state, that pickle and copy make again from the class; what is `before` it goes first."""
    members |= {
        "__doc__": family_class.__doc__,
        "__module__": family_class.__module__,
        "__reduce_ex__": lambda self, protocol: (_rebuild, (make, family_class), self.__getstate__()),
        "family_class": family_class,
    }
    return type(family_class.__name__, (*before, family_class), members)


def beneath(kind: type) -> type:
    """The class that an instance would have without bottleneck adapters, which lie over whatever else changes it."""
    return kind.family_class if "over" in kind.__dict__ else kind


def again_over(kind: type, family_class: type) -> type:
    """The class in place of `kind` for an instance that is to be of `family_class` beneath its adapters."""
    return kind.over(family_class) if "over" in kind.__dict__ else family_class


@functools.cache
def asking_class(family_class: type) -> type:
    """An adapter layer whose own forward is told the adapters of the rows."""

    def forward(self, *args, **kwargs):
        rows = current(self)
        if rows is OUTSIDE:
            return outside_graph(forward, self, *args, **kwargs)
        return by_peft(family_class.forward, self, rows, *args, **kwargs)

    return subclass(asking_class, family_class, {"forward": forward, "asks_for_rows": True})


def _kept_checkpoint(self):
    checkpoint = self.__dict__.get(CHECKPOINT)
    if checkpoint is None:
        raise AttributeError(f"'{type(self).__name__}' has no attribute '{CHECKPOINT}'")
    if is_compiling():
        return checkpoint
    reentrant = getattr(checkpoint, "keywords", {}).get("use_reentrant", False)
    return lambda function, *args, **kwargs: checkpoint(keeping(keeping_encoded(function, reentrant)), *args, **kwargs)


def _keep_checkpoint(self, checkpoint):
    self.__dict__[CHECKPOINT] = checkpoint


@functools.cache
def keeping_class(family_class: type[GradientCheckpointingLayer]) -> type:
    """A layer whose checkpointed forward is called in the backward with the adapters of the rows of its first call."""
    return subclass(keeping_class, family_class, {CHECKPOINT: property(_kept_checkpoint, _keep_checkpoint)})
