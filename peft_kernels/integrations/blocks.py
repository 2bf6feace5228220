"""The blocks of a model that bottleneck adapters go to, and the subclasses whose instances run them.

y = block(x), then the adapters on (x, y), before what the model does next (dropout, residual, norm). The adapters are a
child of the module that owns the block; its class becomes a subclass without state. Where the block's output leaves the
owner as it is, the owner's own forward runs and then the adapters. Where something follows inside, the owner's forward
runs on a stand-in for the owner: an object of this one call, which passes everything on, and at the last projection
runs the adapters. So x is never kept on a module, and a checkpointed layer makes a stand-in of its own in the backward.
"""

import functools
import re
from dataclasses import dataclass

from torch import Tensor, nn

from peft_kernels.integrations.named import beneath, subclass
from peft_kernels.integrations.targets import Block, block_of

CHILD = "bottleneck"


@dataclass(frozen=True)
class Site:
    """A block in a model: `name` of its owner, `layer` in which it is, and the features of its input and output."""

    name: str
    layer: int
    block: Block
    width: int


def sites_of(model: nn.Module) -> list[Site]:
    """All blocks, in the order of the model. Layers count from 0 through the whole model, an encoder's first."""
    found, layers, inside = [], {}, {"ffn": (), "attention": ()}
    for name, owner in model.named_modules():
        block = block_of(name, owner._modules)
        if block is None or CHILD in name.split(".") or name.startswith(inside[block.representation]):
            continue  # what is inside of a block (the experts of a mixture) belongs to it
        number = re.search(r"(?<![^.])\d+(?![^.])", name)
        layer = layers.setdefault(name[: number.end()] if number else name, len(layers))
        inside[block.representation] += (f"{name}.",)
        found.append(Site(name, layer, block, _width(model, owner, block)))
    return found


def _width(model: nn.Module, owner: nn.Module, block: Block) -> int:
    if not block.output:
        return model.config.get_text_config().hidden_size
    output = owner._modules[block.output]
    return output.out_features if hasattr(output, "out_features") else output.nf  # transformers' Conv1D


# -- classes ----------------------------------------------------------------------------------------------------------


def _input(place: int, args: tuple, kwargs: dict) -> Tensor:
    return args[place] if place < len(args) else [*kwargs.values()][place - len(args)]


def _around(self, *args, **kwargs):
    """The forward of an owner that returns y, or y and more."""
    kind = beneath(type(self))
    y = kind.forward(self, *args, **kwargs)
    adapters = self._modules[CHILD]
    if not adapters.active:
        return y
    x = _input(self.block.x, args, kwargs)
    return (adapters(x, y[0]), *y[1:]) if isinstance(y, tuple) else adapters(x, y)


def _within(self, *args, **kwargs):
    """The forward of an owner in which something follows y."""
    kind = beneath(type(self))
    if not self._modules[CHILD].active:
        return kind.forward(self, *args, **kwargs)
    first = _input(0, args, kwargs)
    x = None if isinstance(self.block.x, str) else _input(self.block.x, args, kwargs)
    stand_in = self.stand_in(self, first.shape[0], x)
    result = kind.forward(stand_in, *args, **kwargs)
    if not stand_in.ran:
        raise RuntimeError(f"bottleneck adapters: {kind.__name__}.forward has not called its {self.block.output}")
    return result


class StandIn:
    """An owner during one of its calls, whose last projection has the adapters after it."""

    forward = None  # transformers' layers ask whose forward is the outermost: the owner's, which is running already

    def __init__(self, owner: nn.Module, samples: int, x: Tensor | None):
        self.owner, self.samples, self.x, self.ran = owner, samples, x, False

    def __getattr__(self, name: str):
        return getattr(self.owner, name)

    def enter(self, x: Tensor) -> Tensor:
        self.x = x
        return getattr(self.owner, self.block.x)(x)

    def leave(self, h: Tensor) -> Tensor:
        y = getattr(self.owner, self.block.output)(h)
        self.ran = True
        by_sample = (self.samples, -1, y.shape[-1])  # OPT gives all samples as one
        x, r = (t.reshape(by_sample) if t.dim() == 2 else t for t in (self.x, y))
        return self.owner._modules[CHILD](x, r).reshape(y.shape)


@functools.cache
def _stand_in_class(block: Block) -> type:
    members = {"block": block, block.output: StandIn.leave}
    if isinstance(block.x, str):
        members[block.x] = StandIn.enter
    return type("StandIn", (StandIn,), members)


@functools.cache
def adapted_class(block: Block, family_class: type) -> type:
    """An owner of some class, with what its bottleneck adapters do. `over` makes it of another class."""
    make = functools.partial(adapted_class, block)
    members = {"block": block, "over": staticmethod(make)}
    members |= {"forward": _within, "stand_in": _stand_in_class(block)} if block.inside else {"forward": _around}
    return subclass(make, family_class, members)
