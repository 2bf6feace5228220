"""lora_mlp: a gated MLP with LoRA on any of its three projections, whose activation is computed again in the backward.

    g, u = x W_g^T + b_g + lora_g(x), x W_u^T + b_u + lora_u(x);   a = f(g) u;   y = a W_d^T + b_d + lora_d(a)
    backward:  a again;  (da, dA_d, dB_d) from dy and a;  (dg, du) = da (u f'(g), f(g));  (dx, ...) from dg and du

An operator and its backward, made of lora_linear and gated_product as they are bound: they have no kernel of their own.
The backward is one operator so that a compiler, which would find f(g) u in forward and backward and keep it, does not
see it. Legend: M rows of x, K its features, I intermediate features, N features of y; L adapters, of which those of
gate and up are "outer", those of down "inner".
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels.ops.common.projections import (
    accumulator,
    any_requires_grad,
    autocasting,
    check_base,
    check_projections,
    fake_gradients,
    refuse_tangents,
    require,
)
from peft_kernels.ops.lora_linear.gated import check_activation
from peft_kernels.registry import below_autograd

NAME = "lora_mlp"
_LISTS = "int[] member, float[] scaling, float[] dropout_p, Tensor? seed, str activation"
SCHEMA = (
    "(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor[] lora_A, Tensor[] lora_B, Tensor?[] lora_bias, "
    f"{_LISTS}) -> (Tensor y, Tensor gate, Tensor up, Tensor h_outer, Tensor h_inner)"
)
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor? x, Tensor? gate, Tensor? up, Tensor? h_outer, Tensor? h_inner, Tensor[] weight, "
    f"Tensor[] lora_A, Tensor[] lora_B, {_LISTS}, bool[] needs) -> Tensor[]"
)


class Adapters(NamedTuple):
    """Those of one lora_linear call, in the order of its arguments; `places`: where they stand among all."""

    lora_A: list[Tensor]
    lora_B: list[Tensor]
    lora_bias: list[Tensor | None]
    member: list[int]
    scaling: list[float]
    dropout_p: list[float]
    places: list[int]

    @property
    def factors(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.lora_A, self.lora_B

    @property
    def lists(self) -> tuple[list[int], list[float], list[float]]:
        return self.member, self.scaling, self.dropout_p


def _adapters(member, lora_A, lora_B, lora_bias, scaling, dropout_p) -> tuple[Adapters, Adapters]:
    """Those of gate and up, members 0 and 1, and those of down, member 0 of a call of its own."""
    halves = [i for i, g in enumerate(member) if g != 2], [i for i, g in enumerate(member) if g == 2]
    return tuple(
        Adapters(
            *([entries[i] for i in places] for entries in (lora_A, lora_B, lora_bias)),
            [member[i] % 2 for i in places],
            *([entries[i] for i in places] for entries in (scaling, dropout_p)),
            places,
        )
        for places in halves
    )


def _inner_seed(seed: Tensor | None, inner: Adapters) -> Tensor | None:
    """Another key than that of gate and up, whose streams have the same numbers."""
    return ~seed if seed is not None and any(inner.dropout_p) else None


# -- check and fake ---------------------------------------------------------------------------------------------------


def _check_half(op: str, x: Tensor, weight, bias, adapters: Adapters, seed) -> None:
    if adapters.lora_A:
        lists = dict(zip(("member", "scaling", "dropout_p"), adapters.lists, strict=True))
        return check_projections(op, x, weight, bias, *adapters[:3], lists, seed)
    check_base(op, x, weight, bias)


def _check_lists(weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p) -> None:
    """What the operators beneath cannot see."""
    for name, entries in {"weight": weight, "bias": bias}.items():
        require(NAME, len(entries) == 3, f"{name} must have three entries, of gate, up and down, got {len(entries)}")
    lists = {"lora_B": lora_B, "lora_bias": lora_bias, "member": member, "scaling": scaling, "dropout_p": dropout_p}
    for name, entries in lists.items():
        text = f"{name} must have one entry per lora_A ({len(lora_A)}), got {len(entries)}"
        require(NAME, len(entries) == len(lora_A), text)
    for i, g in enumerate(member):
        require(NAME, g in (0, 1, 2), f"member[{i}] must be 0 (gate), 1 (up) or 2 (down), got {g}")


def check(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed, activation) -> None:
    """Refuses what the op cannot take, in words."""
    _check_lists(weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p)
    check_activation(NAME, activation)
    outer, inner = _adapters(member, lora_A, lora_B, lora_bias, scaling, dropout_p)
    _check_half(f"{NAME}, gate and up", x, weight[:2], bias[:2], outer, seed)
    text = f"weight[1] must have as many rows as weight[0] ({weight[0].shape[0]}), got {weight[1].shape[0]}"
    require(NAME, weight[0].shape[0] == weight[1].shape[0], text)
    like_a = weight[0].t()  # what has a's features, dtype and device
    _check_half(f"{NAME}, down", like_a, weight[2:], bias[2:], inner, seed)


def fake(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed, activation):
    check(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed, activation)
    M, batch = math.prod(x.shape[:-1]), x.shape[:-1]
    widths = [sum(a.shape[0] for a, g in zip(lora_A, member, strict=True) if (g == 2) == down) for down in (0, 1)]
    y, gate, up = (x.new_empty((*batch, weight[g].shape[0])) for g in (2, 0, 1))
    return y, gate, up, *(x.new_empty((M, width), dtype=accumulator(x.dtype)) for width in widths)


def backward_fake(dy, x, gate, up, h_outer, h_inner, weight, lora_A, lora_B, *rest):
    return fake_gradients([dy], weight, lora_A, lora_B, rest[-1])


# -- made of other operators ------------------------------------------------------------------------------------------


def _project(op: str, x: Tensor, weight, bias, adapters: Adapters, seed) -> tuple[list[Tensor], Tensor]:
    """y of some projections of x, and h."""
    if adapters.lora_A:
        arguments = (*adapters[:3], *adapters.lists, seed)
        return torch.ops.peft_kernels.lora_linear.default(x, weight, bias, *arguments)
    check_base(op, x, weight, bias)  # F.linear would broadcast a bias
    h = x.new_empty((math.prod(x.shape[:-1]), 0), dtype=accumulator(x.dtype))
    return [torch.nn.functional.linear(x, w, b) for w, b in zip(weight, bias, strict=True)], h


def _gradients(dy: list[Tensor], x: Tensor | None, h: Tensor | None, weight, adapters: Adapters, seed, needs):
    """Gradients of (x, *weight, *bias, *lora_A, *lora_B, *lora_bias), empty where `needs` says no."""
    if adapters.lora_A:
        arguments = (*adapters.factors, *adapters.lists, seed, needs)
        return torch.ops.peft_kernels.lora_linear_backward.default(dy, x, h, weight, *arguments)
    G, K = len(weight), weight[0].shape[1]
    rows = [d.reshape(-1, d.shape[-1]) for d in dy]
    of = [d.new_empty(0) for d in dy for _ in range(2)]
    dx = dy[0].new_empty(0)
    with torch.autocast(dx.device.type, enabled=False):
        if needs[0]:
            dx = rows[0] @ weight[0]
            for d, w in zip(rows[1:], weight[1:], strict=True):
                dx = torch.addmm(dx, d, w)
            dx = dx.view(*dy[0].shape[:-1], K)
        for g, d in enumerate(rows):
            if needs[1 + g]:
                of[g] = d.t() @ x.reshape(-1, K)
            if needs[1 + G + g]:
                of[G + g] = d.sum(0)
    return [dx, *of]


def forward(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed, activation):
    _check_lists(weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p)
    outer, inner = _adapters(member, lora_A, lora_B, lora_bias, scaling, dropout_p)
    (gate, up), h_outer = _project(f"{NAME}, gate and up", x, weight[:2], bias[:2], outer, seed)
    a = torch.ops.peft_kernels.gated_product.default(gate, up, activation)
    (y,), h_inner = _project(f"{NAME}, down", a, weight[2:], bias[2:], inner, _inner_seed(seed, inner))
    return y, gate, up, h_outer, h_inner


def _half_of(needs: list[bool], adapters: Adapters, members: slice, dx: bool, L: int) -> list[bool]:
    """`needs` of one of the two calls."""
    of_adapters = (needs[7 + which * L + i] for which in range(3) for i in adapters.places)
    return [dx, *needs[1:4][members], *needs[4:7][members], *of_adapters]


def _plan(needs: list[bool], outer: Adapters, inner: Adapters, L: int) -> tuple[list[bool], list[bool], bool]:
    """`needs` of both calls, and whether the second one reads a."""
    needs_outer = _half_of(needs, outer, slice(0, 2), needs[0], L)
    needs_inner = _half_of(needs, inner, slice(2, 3), any(needs_outer), L)
    return needs_outer, needs_inner, any((needs_inner[1], *needs_inner[3 : 3 + len(inner.places)]))


def backward(
    dy, x, gate, up, h_outer, h_inner, weight, lora_A, lora_B, member, scaling, dropout_p, seed, activation, needs,
):  # fmt: skip
    """Gradients of (x, *weight, *bias, *lora_A, *lora_B, *lora_bias), empty where `needs` says no. What nothing that is
    needed reads may be None."""
    L = len(lora_A)
    outer, inner = _adapters(member, lora_A, lora_B, lora_B, scaling, dropout_p)
    needs_outer, needs_inner, reads_a = _plan(needs, outer, inner, L)
    a = torch.ops.peft_kernels.gated_product.default(gate, up, activation) if reads_a else None
    da, *of_inner = _gradients([dy], a, h_inner, weight[2:], inner, _inner_seed(seed, inner), needs_inner)
    del a
    if any(needs_outer):
        dgate, dup = torch.ops.peft_kernels.gated_product_backward.default(da, gate, up, activation)
        del da
        of_outer = _gradients([dgate, dup], x, h_outer, weight[:2], outer, seed, needs_outer)
    else:  # nothing, in the dtypes of what it would be
        like = (dy, *weight[:2], *weight[:2], *outer.lora_A, *outer.lora_B, *outer.lora_B)
        of_outer = [t.new_empty(0) for t in like]
    dx, *of_outer = of_outer
    out = [dx, *of_outer[:2], of_inner[0], *of_outer[2:4], of_inner[1]] + [dy.new_empty(0)] * (3 * L)
    for grads, adapters in ((of_outer[4:], outer), (of_inner[2:], inner)):
        for which in range(3):
            for place, i in enumerate(adapters.places):
                out[7 + which * L + i] = grads[which * len(adapters.places) + place]
    return out


# -- autograd and registration ----------------------------------------------------------------------------------------


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lists, seed, activation, x, *tensors):
        # tensors: 3 weight, 3 bias, L lora_A, L lora_B, L lora_bias
        L = len(lists[0])
        weight, bias, a, b, c = (
            tensors[:3], tensors[3:6], tensors[6 : 6 + L], tensors[6 + L : 6 + 2 * L], tensors[6 + 2 * L :],
        )  # fmt: skip
        with below_autograd():
            y, gate, up, h_outer, h_inner = _forward_op(x, weight, bias, a, b, c, *lists, seed, activation)
        needs = ctx.needs_input_grad[3:]
        outer, inner = _adapters(lists[0], a, b, c, *lists[1:])
        needs_outer, _, reads_a = _plan(needs, outer, inner, L)
        reads_x = any((*needs_outer[1:3], *needs_outer[5 : 5 + len(outer.places)]))
        reads_gate = any(needs_outer) or reads_a
        reads_h = [any(needs[7 + L + i] for i in half.places) for half in (outer, inner)]
        kept = ((x, reads_x), (gate, reads_gate), (up, reads_gate), (h_outer, reads_h[0]), (h_inner, reads_h[1]))
        ctx.save_for_backward(*(t if reads else None for t, reads in kept), seed, *weight, *a, *b)
        ctx.lists, ctx.activation = lists, activation
        ctx.mark_non_differentiable(gate, up, h_outer, h_inner)
        ctx.set_materialize_grads(False)
        return y, gate, up, h_outer, h_inner

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        needs = ctx.needs_input_grad[3:]
        if dy is None:
            return (None,) * (3 + len(needs))
        x, gate, up, h_outer, h_inner, seed, *tensors = ctx.saved_tensors
        L = len(ctx.lists[0])
        weight, a, b = tensors[:3], tensors[3 : 3 + L], tensors[3 + L :]
        kept = (x, gate, up, h_outer, h_inner)
        out = _backward_op(dy, *kept, weight, a, b, *ctx.lists, seed, ctx.activation, needs)
        return (None, None, None, *(grad if need else None for grad, need in zip(out, needs, strict=True)))


def _autograd(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed, activation):
    """The kernel of the Autograd key: a plain call where nothing needs a gradient, else one Function."""
    tensors, lists = (weight, bias, lora_A, lora_B, lora_bias), (member, scaling, dropout_p)
    refuse_tangents(NAME, x, tensors)
    if torch.is_grad_enabled() and any_requires_grad(x, tensors):
        _check_lists(*tensors, *lists)  # the Function tells the lists apart by their lengths
        return _MLP.apply(lists, seed, activation, x, *(t for group in tensors for t in group))
    with below_autograd():
        return _forward_op(x, *tensors, *lists, seed, activation)


def _define() -> torch.library.Library:
    """Both operators, in the namespace of the bound ones alone."""
    library = torch.library.Library("peft_kernels", "FRAGMENT")
    for name, schema, kernel, of_fakes in (
        (NAME, SCHEMA, forward, fake),
        (f"{NAME}_backward", BACKWARD_SCHEMA, backward, backward_fake),
    ):
        library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"peft_kernels::{name}", of_fakes, lib=library)
    library.impl(NAME, _autograd, "Autograd")
    return library


_LIBRARY = _define()  # an operator lives as long as its Library object
_forward_op = torch.ops.peft_kernels.lora_mlp.default
_backward_op = torch.ops.peft_kernels.lora_mlp_backward.default
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl(NAME, autocasting(_forward_op, _device.lower()), f"Autocast{_device}")


# -- the function -----------------------------------------------------------------------------------------------------


def lora_mlp(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    *,
    member: Sequence[int],
    scaling: Sequence[float],
    activation: str = "silu",
    dropout_p: Sequence[float] | None = None,
    seed: Tensor | None = None,
    lora_bias: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """y = down(f(gate(x)) up(x)), each projection with its adapters; f(gate(x)) up(x) is not kept for the backward.

    g, u = x W_g^T + b_g + lora_g(x), x W_u^T + b_u + lora_u(x);   y = a W_d^T + b_d + lora_d(a),   a = f(g) u
    lora(x) is the sum over a projection's adapters l of s_l ((drop_l(x) A_l^T) B_l^T + b_Bl). SwiGLU with "silu", GEGLU
    with "gelu" and "gelu_tanh", ReGLU with "relu" (Shazeer 2020, arXiv:2002.05202, section 2).

    Args:
        x: `[..., K]`, float32, float16, bfloat16 or float64, any strides.
        weight: gate `[I, K]`, up `[I, K]`, down `[N, I]`, in x's dtype; bias: of each `[I]`, `[I]`, `[N]`, or None.
        lora_A, lora_B: L tensors `[r_l, in_features]` and `[out_features, r_l]` of the projection that each belongs to,
            of one dtype for gate and up, of one for down; ranks may differ. L may be 0.
        member: of each adapter the projection: 0 gate, 1 up, 2 down. One may have several adapters, or none.
        scaling, dropout_p: L floats (dropout_p None: no dropout); lora_bias: L of `[out_features]` or None, or None.
        activation: f: "silu", "gelu", "gelu_tanh" or "relu".
        seed: 0-d int64 on x's device, from `new_seed`; needed where a dropout_p > 0. The adapters of gate and up, in
            their order, are streams 0, 1, ... of the seed, those of down of `~seed`.

    Returns:
        y `[..., N]` in x's dtype.

    Differentiable in x and every tensor but the seed; only gradients that are needed are computed. Kept for the
    backward: x, g and u, the h of each adapter in float32 `[M, r_l]`, and the seed; not f(g), not a, which a backward
    computes again in one pass.

    Raises:
        ValueError, TypeError: as `lora_linear`, naming the projections and the entry.

    Example:
        >>> x = torch.randn(4, 64)
        >>> weight = [torch.randn(96, 64), torch.randn(96, 64), torch.randn(64, 96)]
        >>> lora_A = [torch.randn(8, 64, requires_grad=True), torch.randn(8, 96, requires_grad=True)]
        >>> lora_B = [torch.zeros(96, 8, requires_grad=True), torch.zeros(64, 8, requires_grad=True)]
        >>> y = peft_kernels.lora_mlp(x, weight, [None] * 3, lora_A, lora_B, member=[0, 2], scaling=[2.0, 2.0])
        >>> y.sum().backward()
    """
    count = len(lora_A)
    arguments = (
        x,
        list(weight),
        list(bias),
        list(lora_A),
        list(lora_B),
        [None] * count if lora_bias is None else list(lora_bias),
        list(member),
        list(scaling),
        [0.0] * count if dropout_p is None else list(dropout_p),
        seed,
        activation,
    )
    try:
        return torch.ops.peft_kernels.lora_mlp.default(*arguments)[0]
    except (RuntimeError, TypeError):
        check(*arguments)
        raise
