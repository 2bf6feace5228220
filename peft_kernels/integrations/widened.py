"""Bottleneck adapters inside the block's own products, for inference. f is the adapter's activation, act the block's.

    parallel, gated  [g | u | z] = x [W_g; W_u; A]^T + [b_g; b_u; a]     y = [act(g) u | f(z)] [W_d | s B]^T + b_d + s b
    parallel, plain  [g | z] = x [W_u; A]^T + [b_u; a]                   y = [act(g) | f(z)] [W_d | s B]^T + b_d + s b
    serial           [h | z] = u [W_d; A W_d]^T + [b_d + s b; A b_d + a]    y = h + f(z) (s B)^T

The FFN has E more hidden units then: an FFN and a parallel adapter are of one form (He et al. 2022, arXiv:2110.04366).
E counts all active adapters, rounded up by units of weight 0. The same in exact arithmetic; A and s B are rounded to
the block's dtype. Its weights become views into the wide tensors, which are buffers of the projections that use
them and in no state dict. `Widened`, the last child of the owner, makes them, and again after whatever changes what
they are made of.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import leaky_relu, linear, silu
from transformers.pytorch_utils import Conv1D

from peft_kernels.integrations.named import subclass
from peft_kernels.integrations.targets import Block
from peft_kernels.modules import BottleneckAdapter, BottleneckAdapters
from peft_kernels.ops.common.activations import ACTIVATIONS, LEAK
from peft_kernels.ops.common.projections import accumulator

WIDENED = "widened"
WEIGHT, BIAS, EXPAND = "wide_weight", "wide_bias", "wide_expand"
UNITS = 8  # E is a multiple of it: rows of 16-bit tensors stay aligned to the 16 bytes that tensor cores read at once

IN_PLACE = {
    "identity": lambda z: z,
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": functools.partial(torch.ops.aten.gelu_, approximate="tanh"),
    "silu": functools.partial(silu, inplace=True),
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
    "leaky_relu": functools.partial(leaky_relu, negative_slope=LEAK, inplace=True),
}


@dataclass(frozen=True)
class Form:
    """How the forward of an FFN reads: projections of x, `activation`, a product with the second half if it is gated,
    and the block's output projection. Names of children of the owner, or of its sibling `before` (BERT's intermediate).
    """

    up: tuple[str, ...]
    activation: str
    gated: bool = False
    before: str = ""


# -- what runs --------------------------------------------------------------------------------------------------------


def _activated(z: Tensor, parts: tuple[tuple[str, int], ...]) -> Tensor:
    """f of each adapter on its columns; in z itself, unless autograd needs that."""
    columns = z.split([width for _, width in parts], -1)
    if z.requires_grad:
        return torch.cat([ACTIVATIONS[f](part) for (f, _), part in zip(parts, columns, strict=True)], -1)
    for (f, _), part in zip(parts, columns, strict=True):
        IN_PLACE[f](part)
    return z


def _linear(self, x: Tensor) -> Tensor:
    return linear(x, self.wide_weight, self.wide_bias)


def _first(self, x: Tensor) -> Tensor:
    self.widened.ready()
    return linear(x, self.wide_weight, self.wide_bias)


def _folded(self, x: Tensor) -> Tensor:
    """The serial form: the last projection and the adapter after it."""
    self.widened.ready()
    rows = linear(x.reshape(-1, x.shape[-1]), self.wide_weight, self.wide_bias)  # [M, N + E]
    N = self.wide_expand.shape[0]
    z = _activated(rows[:, N:], self.widened.parts)
    return torch.addmm(rows[:, :N], z, self.wide_expand.t()).view(*x.shape[:-1], N)


def _gated(self, x: Tensor) -> Tensor:
    """The forward of an owner with gate and up projections: the launches of the FFN alone, one for each activation."""
    widened, form = self.widened, self.form
    widened.ready()
    down = getattr(self, widened.block.output)
    rows = getattr(self, form.up[0])(x.reshape(-1, x.shape[-1]))  # [M, 2 H + E]
    H = widened.hidden
    gate, hidden = getattr(self, form.activation)(rows[:, :H]), rows[:, H:]
    if rows.requires_grad:
        hidden = torch.cat((gate * hidden[:, :H], _activated(hidden[:, H:], widened.parts)), 1)
    else:
        hidden[:, :H].mul_(gate)
        _activated(hidden[:, H:], widened.parts)
    y = down(hidden.to(down.wide_weight.dtype))  # T5 keeps its last projection in float32
    return y.view(*x.shape[:-1], y.shape[-1])


_FORWARDS = {"linear": _linear, "first": _first, "folded": _folded}


@functools.cache
def wide_class(role: str, family_class: type) -> type:
    """A projection that computes with its wide tensors."""
    make = functools.partial(wide_class, role)
    return subclass(make, family_class, {"forward": _FORWARDS[role], "widens": True, "over": staticmethod(make)})


@functools.cache
def gated_class(form: Form, family_class: type) -> type:
    """An owner of a gated FFN."""
    make = functools.partial(gated_class, form)
    return subclass(make, family_class, {"forward": _gated, "form": form, "over": staticmethod(make)})


@functools.cache
def ranged_class(family_class: type) -> type:
    """An activation of a plain FFN that is not the one of the adapters: each on its columns."""

    def forward(self, rows: Tensor) -> Tensor:
        H = self.widened.hidden
        act = family_class.forward(self, rows[..., :H])
        return torch.cat((act, _activated(rows[..., H:], self.widened.parts)), -1)

    return subclass(
        ranged_class, family_class, {"forward": forward, "widens": True, "over": staticmethod(ranged_class)}
    )


# -- what it is made of -----------------------------------------------------------------------------------------------


def parts_of(adapters: list[BottleneckAdapter]) -> tuple[tuple[str, int], ...]:
    """Activation and hidden units of each adapter, those that fill up E with the last."""
    widths = [len(adapter.down_bias) for adapter in adapters]
    widths[-1] += -sum(widths) % UNITS
    return tuple((adapter.activation, width) for adapter, width in zip(adapters, widths, strict=True))


class Widened(nn.Module):
    """What the wide tensors of one block are made of. It has no tensor of its own and no key in the state dict.

    `held` are the modules by their places: (module around it, its name there, it itself), first the adapters, then the
    projections, `up` of them before the last one (none in the serial form), then the activation if that changes class.
    """

    def __init__(self, name: str, block: Block, held: tuple[tuple[nn.Module, str, nn.Module], ...], up: int):
        super().__init__()
        self.name, self.block, self.held, self.up = name, block, held, up
        adapters = held[0][2]
        self.names = adapters.active_names
        self.parts = parts_of([adapters[n] for n in self.names])
        self.hidden = _rows(held[up + 1][2])[1] if up else 0
        parts = *self.projections, *(adapters[n] for n in self.names)
        self.trained = tuple((m, key) for m in parts for key, p in m.named_parameters() if p.requires_grad)
        self.places: tuple | None = None
        self.scalings = self.tensors = ()

    @property
    def adapters(self) -> BottleneckAdapters:
        return self.held[0][2]

    @property
    def projections(self) -> list[nn.Module]:
        return [module for _, _, module in self.held[1 : self.up + 2]]

    @property
    def E(self) -> int:
        return sum(width for _, width in self.parts)

    def ready(self) -> None:
        """Before each call. A compiled one relies on `to`, `load_state_dict` and the like having come through here."""
        if self.training:
            raise RuntimeError(f"{self.name} is widened, for inference; peft_kernels.unwiden(model) before training")
        if not is_compiling() and not self._unchanged():
            self.build()

    def require_intact(self) -> None:
        for around, name, module in self.held:
            same_class = type(module) is BottleneckAdapters or "widens" in type(module).__dict__
            if around._modules.get(name) is not module or not same_class:
                raise RuntimeError(
                    f"{self.name} is widened, and its {name} was replaced or has changed class since (PEFT, FSDP, "
                    "a pool, ...); undo that, or peft_kernels.unwiden(model) before it"
                )

    def _unchanged(self) -> bool:
        """Whether all that the wide tensors are made of is as `build` found it. Asked by each call: plain loops."""
        if self.places is None or self.adapters.active_names != self.names:
            return False
        for around, name, thing, kind in self.places:
            if around.get(name) is not thing or type(thing) is not kind:
                return False
        for adapter, scaling in self.scalings:
            if adapter.scaling != scaling:
                return False
        for around, name, tensor, address, version in self.tensors:
            if around.get(name) is not tensor or tensor.data_ptr() != address or tensor._version != version:
                return False
        return True

    def _look(self) -> None:
        """Keeps what `_unchanged` compares. Modules with inference tensors never change, and have no version."""
        adapters = [self.adapters[name] for name in self.names]
        parts = [m for m in (*self.projections, *adapters) if not any(p.is_inference() for p in m.parameters())]
        owned = [(m._parameters, key, tensor) for m in parts for key, tensor in m._parameters.items()]
        places = [(around._modules, name, module) for around, name, module in self.held]
        places += [(self.adapters._modules, name, adapter) for name, adapter in zip(self.names, adapters, strict=True)]
        places += [entry for entry in owned if entry[2] is None]
        self.places = tuple((*place, type(place[2])) for place in places)
        self.scalings = tuple((adapter, adapter.scaling) for adapter in adapters)
        self.tensors = tuple((*o, o[2].data_ptr(), o[2]._version) for o in owned if o[2] is not None)

    @torch.inference_mode(False)  # the buffers outlive the call
    @torch.no_grad()
    def build(self) -> None:
        """Makes the wide tensors, or writes what they are made of into them again."""
        self.require_intact()
        if self.adapters.active_names != self.names:
            raise RuntimeError(f"{self.name} is widened by {self.names}; unwiden before other adapters are made active")
        *ups, down = self.projections
        A, a, sB, sb = self._factors()
        N, H = _rows(down)
        e, bias = len(A), 0 if down.bias is None else down.bias.to(sb)
        if ups:
            self._build_up(ups, A, a)
            wide = _wide(down, WEIGHT, N, H + self.E)
            _move(down.weight, _stored(down, wide[:, :H]))
            wide[:, H : H + e] = sB
            _wide(down, BIAS, N).copy_(bias + sb)
        else:
            wide, wide_bias = _wide(down, WEIGHT, N + self.E, H), _wide(down, BIAS, N + self.E)
            _move(down.weight, _stored(down, wide[:N]))
            wide[N : N + e] = A @ wide[:N].to(A)
            wide_bias[:N] = bias + sb
            wide_bias[N : N + e] = a if down.bias is None else A @ bias + a
            _wide(down, EXPAND, N, self.E)[:, :e] = sB
        self._look()

    def _build_up(self, ups: list[nn.Module], A: Tensor, a: Tensor) -> None:
        rows = [_rows(projection)[0] for projection in ups]
        units = sum(rows) + self.E
        wide, bias = _wide(ups[0], WEIGHT, units, _rows(ups[0])[1]), _wide(ups[0], BIAS, units)
        *places, _ = wide.split([*rows, self.E])
        *bias_places, _ = bias.split([*rows, self.E])
        for projection, place, bias_place in zip(ups, places, bias_places, strict=True):
            _move(projection.weight, _stored(projection, place))
            if projection.bias is not None:
                _move(projection.bias, bias_place)
        wide[sum(rows) : sum(rows) + len(A)] = A
        bias[sum(rows) : sum(rows) + len(A)] = a

    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A [E, K], a [E], s B [N, E] and the sum of all s b [N], in the dtype in which the op computes."""
        found = [self.adapters[name] for name in self.names]
        dtype = accumulator(found[0].down_weight.dtype)
        scales = [x.up_bias.new_ones(1).to(dtype) if x.scale is None else x.scale.to(dtype) for x in found]
        scales = [adapter.scaling * scale for adapter, scale in zip(found, scales, strict=True)]  # [1] or [N]
        A, a = (torch.cat([getattr(x, key).to(dtype) for x in found]) for key in ("down_weight", "down_bias"))
        sB = torch.cat([s[:, None] * x.up_weight.to(dtype) for s, x in zip(scales, found, strict=True)], 1)
        sb = sum(s * x.up_bias.to(dtype) for s, x in zip(scales, found, strict=True))
        return A, a, sB, sb

    def _apply(self, fn, recurse: bool = True):  # `to`, `half`, `cuda`: the other children of the owner are through
        super()._apply(fn, recurse)
        self.build()
        return self

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.build()

    @torch.no_grad()
    def clear(self) -> None:
        """Gives the block's parameters memory of their own again."""
        for projection in self.projections:
            for parameter in projection._parameters.values():
                if parameter is not None:
                    parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
            for name in (WEIGHT, BIAS, EXPAND):
                if name in projection._buffers:
                    delattr(projection, name)
        for module, key in self.trained:
            module.get_parameter(key).requires_grad_(True)

    def __getstate__(self) -> dict:  # a copy has memory of its own: what it has seen is not that of the original
        return self.__dict__ | {"places": None, "scalings": (), "tensors": ()}

    def extra_repr(self) -> str:
        return f"{', '.join(self.names)}: {self.E} hidden units"


def _rows(projection: nn.Module) -> tuple[int, int]:
    """Output and input features."""
    shape = tuple(projection.weight.shape)
    return shape[::-1] if isinstance(projection, Conv1D) else shape


def _stored(projection: nn.Module, weight: Tensor) -> Tensor:
    """A weight [out, in] as the projection has it."""
    return weight.t() if isinstance(projection, Conv1D) else weight


def _wide(projection: nn.Module, name: str, *shape: int) -> Tensor:
    """The buffer of a projection, laid out as its weight is; the one that is there if it fits."""
    there, like = projection._buffers.get(name), projection.weight
    if there is None or (there.dtype, there.device, tuple(there.shape)) != (like.dtype, like.device, shape):
        turned = len(shape) == 2 and isinstance(projection, Conv1D)
        there = like.new_zeros(shape[::-1]).t() if turned else like.new_zeros(shape)
        projection.register_buffer(name, there, persistent=False)
    return there


def _move(parameter: nn.Parameter, place: Tensor) -> None:
    """A parameter becomes a view of its place in a wide tensor."""
    if parameter.data_ptr() != place.data_ptr():
        place.copy_(parameter)
        parameter.data = place


def require_unwidened(model: nn.Module, function: str) -> None:
    """Raises ValueError where `widen` has built adapters into a model."""
    if any(isinstance(module, Widened) for module in model.modules()):
        raise ValueError(f"{function}: the model is widened; peft_kernels.unwiden(model) first, widen it again after")
