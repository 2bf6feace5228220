"""The blocks of a model that bottleneck adapters go to, and the subclasses whose instances run them.

y = block(x), then the adapters on (x, y), before what the model does next (dropout, residual, norm). The adapters are a
child of the module that owns the block; its class becomes a subclass without state. Where the block's output leaves the
owner as it is, the owner's own forward runs and then the adapters. Where something follows inside, the owner's forward
runs on a stand-in for the owner: an object of this one call, which passes everything on, and at the last projection
runs the adapters. So x is never kept on a module, and a checkpointed layer makes a stand-in of its own in the backward.

An adapter may read the residual stream, which passes the block by. Where the owner does not have it, the layer above it
does: it too runs on a stand-in then, which sees the stream on its way into the norm and hands it on with the call.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_kernels.integrations.checkpoints import PREFIX
from peft_kernels.integrations.named import beneath, subclass
from peft_kernels.integrations.targets import MULTIPLIERS, Block, Stream, block_of, stream_is_known, stream_of
from peft_kernels.methods import BottleneckConfig
from peft_kernels.modules import OF_STREAM, BottleneckAdapters

CHILD = "bottleneck"


@dataclass(frozen=True)
class Site:
    """A block in a model: `name` of its owner, `layer` in which it is and the name of that, and the features of its
    input and output."""

    name: str
    layer: int
    block: Block
    width: int
    layer_name: str


def sites_of(model: nn.Module) -> list[Site]:
    """All blocks, in the order of the model. Layers count from 0 through the whole model, an encoder's first."""
    found, inside = {}, {"ffn": (), "attention": ()}
    for name, owner in model.named_modules():
        block = block_of(name, owner._modules)
        if block is None or CHILD in name.split(".") or name.startswith(inside[block.representation]):
            continue  # what is inside of a block (the experts of a mixture) belongs to it
        inside[block.representation] += (f"{name}.",)
        found[name] = block
    layers = layers_of(model, {name: block.representation for name, block in found.items()})
    index = {layer: i for i, layer in enumerate(dict.fromkeys(layers.values()))}
    return [
        Site(name, index[layers[name]], block, _width(model, model.get_submodule(name), block), layers[name])
        for name, block in found.items()
    ]


def require_module(model: nn.Module, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def layers_of(model: nn.Module, blocks: dict[str, str]) -> dict[str, str]:
    """The name of the layer that each block is in, from their representations by name: what ends in a number, in the
    innermost of transformers' models, and has one block of some representation (an encoder's layer two FFNs, but one
    attention). Where a model lies in nn.Sequential or its layers in stages, what has more is no layer."""
    models = [f"{name}." for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)]
    starts, counts = {}, defaultdict(Counter)
    for name, representation in blocks.items():
        ends = [number.end() for number in re.finditer(r"(?<![^.])\d+(?![^.])", name)]
        within = max((len(inner) for inner in models if name.startswith(inner)), default=0)
        starts[name] = [name[:end] for end in [end for end in ends if end > within] or ends] or [name]
        for start in starts[name]:
            counts[start][representation] += 1
    return {name: next((s for s in parts if 1 in counts[s].values()), parts[-1]) for name, parts in starts.items()}


def chosen_sites(model: nn.Module, config: BottleneckConfig) -> list[Site]:
    """The blocks that a config means. Raises ValueError where the model has not what it names."""
    every = sites_of(model)
    for representation in config.representations:
        if not any(site.block.representation == representation for site in every):
            whole = any(isinstance(module, PreTrainedModel) for module in model.modules())
            remedy = (
                "those that are have the children that peft_kernels/integrations/targets.py lists"
                if whole
                else "adapters go into the layers of transformers' models: pass the model that it is a part of"
            )
            raise ValueError(f"attach: no {representation} block is known in a {type(model).__name__}; {remedy}")
    check_layers("attach: layers", config.layers or (), every)
    sites = [site for site in every if site.block.representation in config.representations]
    if config.layers is not None:
        sites = [site for site in sites if site.layer in config.layers]
        if not sites:
            raise ValueError(f"attach: there is no {config.representation} block in the layers {list(config.layers)}")
    for site in sites:
        config.bottleneck(site.width)  # raises where it is too wide
    return sites


def check_layers(what: str, layers: Sequence[int], sites: Sequence) -> None:
    """Raises ValueError for what is no layer of the model; `sites` are all of its blocks, or of its attentions."""
    count = 1 + max(site.layer for site in sites) if sites else 0
    if outside := [layer for layer in layers if not 0 <= layer < count]:
        raise ValueError(f"{what} must lie in [0, {count}), the layers of this model, got {outside[0]}")


def file_key(site: Site, parameter: str) -> str:
    """Of a tensor of an adapter at a block, in the file."""
    return f"{PREFIX}{site.name}.{CHILD}.{parameter}"


def shapes(config: BottleneckConfig, sites: Iterable[Site]) -> dict[str, list[int]]:
    """Of the tensors of adapters at some blocks, by their keys in the file."""
    return {
        file_key(site, key): list(parameter.shape)
        for site in sites
        for key, parameter in config.adapter(site.width, "meta").named_parameters()
    }


def _width(model: nn.Module, owner: nn.Module, block: Block) -> int:
    if not block.output:
        return model.config.get_text_config().hidden_size
    output = owner._modules[block.output]
    return output.out_features if hasattr(output, "out_features") else output.nf  # transformers' Conv1D


def stream_owner(model: nn.Module, name: str) -> str | None:
    """The module that has the residual stream around a block: its owner, of that name, or the layer above that."""
    if _has_stream(name, model.get_submodule(name)):
        return name
    layer, _, child = name.rpartition(".")
    return layer if stream_of(child, model.get_submodule(layer)) else None


def _has_stream(name: str, owner: nn.Module) -> bool:
    return block_of(name, owner._modules).norm in owner._modules and stream_is_known(type(owner))


def unfit(model: nn.Module) -> list[tuple[nn.Module, type]]:
    """Modules of a class that does not fit the adapters that the model has, and the class that does."""
    found = []
    for name, module in model.named_modules():
        kind = type(module)
        if any("over" in base.__dict__ for base in kind.__mro__[1:]):
            continue  # others have made a class over ours, which stays
        block = block_of(name, module._modules) if CHILD in module._modules else None
        children = module._modules
        streams = tuple(stream_of(c, module) for c in children if _needs_layer(f"{name}.{c}", children[c]))
        fits = _adapted_class(block, streams, beneath(kind)) if block or streams else beneath(kind)
        if fits is not kind:
            found.append((module, fits))
    return found


def _needs_layer(name: str, owner: nn.Module | None) -> bool:
    """Whether a block has an adapter, active or not, that reads a stream which its owner does not have."""
    adapters = owner._modules.get(CHILD) if owner is not None else None
    if not isinstance(adapters, BottleneckAdapters) or OF_STREAM.isdisjoint(adapters.reads_by_name.values()):
        return False
    return not _has_stream(name, owner)


# -- classes ----------------------------------------------------------------------------------------------------------


def _input(place: int, args: tuple, kwargs: dict) -> Tensor:
    return args[place] if place < len(args) else [*kwargs.values()][place - len(args)]


def _reads_stream(owner: nn.Module) -> bool:
    """Whether an adapter of a block is active that reads the residual stream."""
    adapters = owner._modules.get(CHILD)
    return isinstance(adapters, BottleneckAdapters) and adapters.needs_stream


def _around(self, *args, residual_stream: tuple = (), **kwargs):
    """The forward of an owner that returns y, or y and more."""
    family_class = type(self).family_class
    y = family_class.forward(self, *args, **kwargs)
    adapters = self._modules[CHILD]
    if not adapters.active_names:
        return y
    x, r = _input(self.block.x, args, kwargs), y[0] if isinstance(y, tuple) else y
    adapted = _like(adapters, x, r, x.shape, residual_stream)
    return (adapted, *y[1:]) if isinstance(y, tuple) else adapted


def _within(self, *args, residual_stream: tuple = (), **kwargs):
    """The forward of an owner in which something follows y, or of a layer whose blocks need the residual stream."""
    family_class, block = type(self).family_class, self.block
    runs = block is not None and self._modules[CHILD].active_names
    if not runs and not any(_reads_stream(self._modules[stream.child]) for stream in self.streams):
        return family_class.forward(self, *args, **kwargs)
    first = _input(0, args, kwargs)
    x = None if block is None or isinstance(block.x, str) else _input(block.x, args, kwargs)
    stand_in = self.stand_in(self, first.shape[0], x, residual_stream)
    result = family_class.forward(stand_in, *args, **kwargs)
    if runs and not stand_in.ran:
        raise RuntimeError(f"bottleneck adapters: {family_class.__name__}.forward has not called its {block.output}")
    return result


class StandIn:
    """An owner during one of its calls, whose last projection has the adapters after it."""

    forward = None  # transformers' layers ask whose forward is the outermost: the owner's, which is running already

    def __init__(self, owner: nn.Module, samples: int, x: Tensor | None, residual_stream: tuple):
        self.owner, self.samples, self.x, self.ran = owner, samples, x, False
        self.residual_stream = residual_stream
        self.normed = {}  # by the name of a norm: what it was called with

    def __getattr__(self, name: str):
        return getattr(self.owner, name)

    def enter(self, x: Tensor) -> Tensor:
        self.x = x
        return getattr(self.owner, self.block.x)(x)

    def leave(self, h: Tensor) -> Tensor:
        y = getattr(self.owner, self.block.output)(h)
        self.ran = True
        beside = self.residual_stream
        if not beside and _reads_stream(self.owner):
            beside = self.stream_beside(self.block.norm, self.x)
        shape = y.shape if y.dim() > 2 else (self.samples, -1, y.shape[-1])
        return _like(self.owner._modules[CHILD], self.x, y, shape, beside)

    def stream_beside(self, norm: str, x: Tensor, adds: str = "") -> tuple[Tensor, nn.Module | None, Callable | None]:
        """The residual stream beside a block with an input x, the norm of the sum if that comes after the block, and
        what makes of the block's output what is added to the stream, if it is not that itself."""
        added = getattr(self.owner, adds) if adds else _multiplied(self.owner)
        return (self.normed[norm], None, added) if norm in self.normed else (x, getattr(self.owner, norm), added)


def _multiplied(layer: nn.Module) -> Callable | None:
    factor = next((getattr(layer, name) for name in MULTIPLIERS if hasattr(layer, name)), None)
    return None if factor is None else lambda y: y * factor


def _like(adapters: nn.Module, x: Tensor, r: Tensor, shape: tuple[int, ...], beside: tuple) -> Tensor:
    """The adapters on tensors of a shape that has the samples apart, which OPT and Llama 4's experts give as one."""
    if r.shape == shape:  # a view of the result would be in the way of a model that adds to it in place
        return adapters(x, r, *beside)
    if beside:
        beside = beside[0].reshape(shape), *beside[1:]
    return adapters(x.reshape(shape), r.reshape(shape), *beside).reshape(r.shape)


def _noting(name: str) -> Callable:
    def norm(self, x: Tensor) -> Tensor:
        self.normed[name] = x
        return getattr(self.owner, name)(x)

    return norm


def _handing_on(child: str, norm: str, adds: str) -> Callable:
    def call(self, *args, **kwargs):
        block = getattr(self.owner, child)
        if _reads_stream(block):
            kwargs["residual_stream"] = self.stream_beside(norm, _input(0, args, kwargs), adds)
        return block(*args, **kwargs)

    return call


def _stand_in_class(block: Block | None, streams: tuple[Stream, ...], notes: bool) -> type:
    """`notes`: whether the block's norm says what it is called with."""
    members = {"block": block}
    for stream in streams:
        members[stream.norm] = _noting(stream.norm)
        members[stream.child] = _handing_on(stream.child, stream.norm, stream.adds)  # torch.compile knows no Stream
    if block is not None:
        members[block.output] = StandIn.leave
        if isinstance(block.x, str):
            members[block.x] = StandIn.enter
        if block.norm and notes:
            members[block.norm] = _noting(block.norm)
    return type("StandIn", (StandIn,), members)


def adapted_class(block: Block, family_class: type) -> type:
    """An owner of some class, with what its bottleneck adapters do. `over` makes it of another class."""
    return _adapted_class(block, (), family_class)


@functools.cache
def _adapted_class(block: Block | None, streams: tuple[Stream, ...], family_class: type) -> type:
    make = functools.partial(_adapted_class, block, streams)
    members = {"block": block, "streams": streams, "over": staticmethod(make)}
    if streams or block.inside:
        members |= {"forward": _within, "stand_in": _stand_in_class(block, streams, stream_is_known(family_class))}
    else:
        members["forward"] = _around
    return subclass(make, family_class, members)
