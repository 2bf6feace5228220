"""What the families that add adapters to frozen projections share: checks, autograd, autocast.

y_g = x W_g^T + b_g + what the adapters l of projection g add. M rows of x, K in_features, N out_features, R rank;
G projections (index g), L adapters (index i). `op` is the name that a message begins with.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from peft_kernels.registry import below_autograd

MAX_RANK = 512
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# -- check ------------------------------------------------------------------------------------------------------------


def require(op: str, condition: bool, text: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(f"{op}: {text}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(
    op: str, name: str, tensor: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...], rule: str, of: str = "x"
) -> None:
    """Type, layout, dtype and device of one tensor; `rule` names the dtypes allowed, `of` the argument x."""
    require(op, isinstance(tensor, Tensor), f"{name} must be a Tensor, got {type(tensor).__name__}", TypeError)
    require(
        op,
        tensor.layout is torch.strided,
        f"{name} must be a dense (strided) tensor, got layout {tensor.layout}",
        TypeError,
    )
    require(op, tensor.dtype in dtypes, f"{name} must have dtype {rule}, got {dtype_name(tensor.dtype)}", TypeError)
    require(
        op, tensor.device == x.device, f"{name} must be on {of}'s device {x.device}, got {tensor.device}", TypeError
    )


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], words: str) -> None:
    require(op, tuple(tensor.shape) == shape, f"{name} must have shape {words}, got {list(tensor.shape)}")


def as_list(op: str, name: str, tensors) -> list:
    """One tensor, or those of several adapters, as an operator takes them."""
    if isinstance(tensors, Tensor):
        return [tensors]
    text = f"{name} must be a Tensor or a sequence of them, got {type(tensors).__name__}"
    require(op, isinstance(tensors, Sequence), text, TypeError)
    return list(tensors)


def as_numbers(op: str, name: str, numbers, count: int) -> list[float]:
    """The same of a number, which stands for all `count` adapters."""
    if isinstance(numbers, int | float):
        return [numbers] * count
    text = f"{name} must be a number or a sequence of them, got {type(numbers).__name__}"
    require(op, isinstance(numbers, Sequence), text, TypeError)
    return list(numbers)


def check_input(op: str, x: Tensor) -> None:
    check_tensor(op, "x", x, x, FLOATS, "float32, float16, bfloat16 or float64")
    require(op, x.dim() >= 1, "x must have shape [..., in_features], got a 0-d tensor")
    require(op, x.shape[-1] >= 1, f"x must have at least one feature, got shape {list(x.shape)}")


def check_base(op: str, x: Tensor, weight: list[Tensor], bias: list[Tensor | None]) -> None:
    """x and frozen projections, with adapters or without."""
    check_input(op, x)
    require(op, len(weight) >= 1, "weight must name at least one projection, got none")
    require(op, len(bias) == len(weight), f"bias must have one entry per weight ({len(weight)}), got {len(bias)}")
    K = x.shape[-1]
    for g, (w, b) in enumerate(zip(weight, bias, strict=True)):
        check_tensor(op, f"weight[{g}]", w, x, (x.dtype,), f"{dtype_name(x.dtype)}, as x")
        require(
            op,
            w.dim() == 2 and w.shape[1] == K and w.shape[0] >= 1,
            f"weight[{g}] must have shape [out_features, in_features={K}], got {list(w.shape)}",
        )
        if b is not None:
            check_tensor(op, f"bias[{g}]", b, x, (x.dtype,), f"{dtype_name(x.dtype)}, as weight")
            check_shape(op, f"bias[{g}]", b, (w.shape[0],), f"[out_features={w.shape[0]}]")


def _check_factors(op: str, x: Tensor, widths: list[int], lora_A, lora_B, lora_bias, member: list[int]) -> None:
    """The adapters' tensors against x and the out_features of their projections."""
    allowed = (torch.float64,) if x.dtype is torch.float64 else FLOATS[:3]
    rule = "float64, as x" if x.dtype is torch.float64 else "float32, float16 or bfloat16"
    K = x.shape[-1]
    for i, (a, b, c, g) in enumerate(zip(lora_A, lora_B, lora_bias, member, strict=True)):
        require(op, 0 <= g < len(widths), f"member[{i}] must lie in [0, {len(widths)}), got {g}")
        check_tensor(op, f"lora_A[{i}]", a, x, allowed, rule)
        if i == 0:
            allowed, rule = (a.dtype,), f"{dtype_name(a.dtype)}, as lora_A[0]"
        require(
            op,
            a.dim() == 2 and a.shape[1] == K,
            f"lora_A[{i}] must have shape [r, in_features={K}], got {list(a.shape)}",
        )
        r, N = a.shape[0], widths[g]
        require(op, 1 <= r <= MAX_RANK, f"lora_A[{i}] must have a rank r from 1 to {MAX_RANK}, got {r}")
        check_tensor(op, f"lora_B[{i}]", b, x, allowed, rule)
        check_shape(op, f"lora_B[{i}]", b, (N, r), f"[out_features={N}, r={r}]")
        if c is not None:
            check_tensor(op, f"lora_bias[{i}]", c, x, allowed, rule)
            check_shape(op, f"lora_bias[{i}]", c, (N,), f"[out_features={N}]")


def check_projections(op: str, x, weight, bias, lora_A, lora_B, lora_bias, lists: dict[str, list], seed) -> None:
    """Refuses what no family takes, in words. `lists`: what else has one entry per adapter, by name."""
    check_base(op, x, weight, bias)
    check_adapters(op, x, [w.shape[0] for w in weight], lora_A, lora_B, lora_bias, lists, seed)


def check_adapters(op: str, x, widths: list[int], lora_A, lora_B, lora_bias, lists: dict[str, list], seed) -> None:
    """The same for the adapters alone; `widths`: out_features of each projection."""
    L = len(lora_A)
    require(op, L >= 1, "lora_A must name at least one adapter, got none")
    for name, entries in {"lora_B": lora_B, "lora_bias": lora_bias, **lists}.items():
        require(op, len(entries) == L, f"{name} must have one entry per lora_A ({L}), got {len(entries)}")
    _check_factors(op, x, widths, lora_A, lora_B, lora_bias, lists["member"])
    for i, (s, p) in enumerate(zip(lists["scaling"], lists["dropout_p"], strict=True)):
        require(op, math.isfinite(s), f"scaling[{i}] must be finite, got {s}")
        require(op, 0 <= p < 1, f"dropout_p[{i}] must lie in [0, 1), got {p}")
    check_seed(op, x, seed, lists["dropout_p"])


def check_seed(op: str, x: Tensor, seed: Tensor | None, dropout_p: list[float]) -> None:
    """The seed of a call whose dropouts have these probabilities."""
    if any(p > 0 for p in dropout_p):
        text = "seed must be given where dropout_p > 0; peft_kernels.new_seed(x.device) makes one"
        require(op, seed is not None, text)
    if seed is not None:  # read even where nothing is dropped
        check_tensor(op, "seed", seed, x, (torch.int64,), "int64")
        require(op, seed.dim() == 0, f"seed must be a 0-d tensor, got shape {list(seed.shape)}")


def check_gradients(op: str, dy, x, h, weight, lora_A, width: Callable, needs, check_x: Callable) -> None:
    """The same for a backward. `check_x(x)` checks what the forward had too; then `width()` is how many columns h has.
    x and h may be None where nothing that is needed reads them."""
    G, L = len(weight), len(lora_A)
    require(op, len(dy) == G and G >= 1, f"dy must have one entry per weight ({G}), got {len(dy)}")
    count = 1 + 2 * G + 3 * L
    require(op, len(needs) == count, f"needs must have {count} entries, got {len(needs)}")
    # Without x its rows are judged by dy's: weight[0] stands in, whose last size is K and whose dtype is x's.
    check_x(weight[0] if x is None else x)
    M = dy[0].numel() // weight[0].shape[0]
    for g, (d, w) in enumerate(zip(dy, weight, strict=True)):
        fits = d.device == w.device and d.dtype is w.dtype and d.shape[-1:] == w.shape[:1]
        require(op, fits and d.numel() == M * w.shape[0], f"dy[{g}] must be of y[{g}]'s shape, dtype and device")
    require(op, x is None or x.numel() == M * weight[0].shape[1], "x must have as many rows as dy")
    if h is not None:
        fits = h.device == weight[0].device and h.dtype is accumulator(weight[0].dtype) and h.is_contiguous()
        fits = fits and tuple(h.shape) == (M, width())
        require(op, fits, "h must be the contiguous [M, R] that the forward returned")
    reads_x = any(needs[1 : 1 + G]) or any(needs[1 + 2 * G : 1 + 2 * G + L])
    require(op, x is not None or not reads_x, "x must be given for gradients of weight or lora_A")
    reads_h = any(needs[1 + 2 * G + L : 1 + 2 * G + 2 * L])
    require(op, h is not None or not reads_h, "h must be given for gradients of lora_B")


# -- fake -------------------------------------------------------------------------------------------------------------


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def fake_outputs(x: Tensor, weight: list[Tensor], width: int) -> tuple[list[Tensor], Tensor]:
    """y and h, `width` columns wide."""
    h = x.new_empty((math.prod(x.shape[:-1]), width), dtype=accumulator(x.dtype))
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weight], h


def fake_gradients(dy, weight, lora_A, lora_B, needs) -> list[Tensor]:
    """Gradients of (x, *weight, *bias, *lora_A, *lora_B, *lora_bias); empty where `needs` says no."""
    dx = dy[0].new_empty((*dy[0].shape[:-1], weight[0].shape[1]))
    bias = [w.new_empty(w.shape[0]) for w in weight]
    lora_bias = [b.new_empty(b.shape[0]) for b in lora_B]
    weights, a, b = ([t.new_empty(t.shape) for t in group] for group in (weight, lora_A, lora_B))
    full = [dx, *weights, *bias, *a, *b, *lora_bias]
    return [tensor if need else tensor.new_empty(0) for tensor, need in zip(full, needs, strict=True)]


# -- autograd and autocast --------------------------------------------------------------------------------------------


def differentiable(op: str, forward_op: Callable, backward_op: Callable) -> Callable:
    """`run(x, route, tensors, lists, seed)`: a plain call where nothing needs a gradient, else one Function.

    The operators take (x, [route,] weight, bias, lora_A, lora_B, lora_bias, *lists, seed) and (dy, x, h, [route,]
    weight, lora_A, lora_B, *lists, seed, needs); lists[0] is `member`, `tensors` the five lists of tensors, and a route
    of None is left out. A Function on the Autograd key costs 25-40 us less per call than
    torch.library.register_autograd.
    """

    class Projections(torch.autograd.Function):
        @staticmethod
        def forward(ctx, lists, seed, route, x, *tensors):
            # tensors: G weight, G bias, L lora_A, L lora_B, L lora_bias
            L = len(lists[0])
            G = (len(tensors) - 3 * L) // 2
            weight, bias, a, b, c = _split(tensors, G, L)
            routed = () if route is None else (route,)
            with below_autograd():
                y, h = forward_op(x, *routed, weight, bias, a, b, c, *lists, seed)
            needs = ctx.needs_input_grad[3:]
            reads_x = any(needs[1 : 1 + G]) or any(needs[1 + 2 * G : 1 + 2 * G + L])
            reads_h = any(needs[1 + 2 * G + L : 1 + 2 * G + 2 * L])
            ctx.save_for_backward(x if reads_x else None, h if reads_h else None, seed, route, *weight, *a, *b)
            ctx.lists = lists
            ctx.mark_non_differentiable(h)
            ctx.set_materialize_grads(False)
            return (*y, h)

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            dy = grads[:-1]
            needs = ctx.needs_input_grad[3:]
            if all(d is None for d in dy):
                return (None,) * (3 + len(needs))
            x, h, seed, route, *tensors = ctx.saved_tensors
            G, L = len(dy), len(ctx.lists[0])
            weight, a, b = tensors[:G], tensors[G : G + L], tensors[G + L :]
            if any(d is None for d in dy):  # a projection whose output was not used
                like = next(d for d in dy if d is not None)
                dy = [
                    like.new_zeros((*like.shape[:-1], w.shape[0])) if d is None else d
                    for d, w in zip(dy, weight, strict=True)
                ]
            routed = () if route is None else (route,)
            out = backward_op(dy, x, h, *routed, weight, a, b, *ctx.lists, seed, needs)
            return (None, None, None, *(grad if need else None for grad, need in zip(out, needs, strict=True)))

    def run(x, route, tensors, lists, seed):
        refuse_tangents(op, x, tensors)
        if torch.is_grad_enabled() and any_requires_grad(x, tensors):
            *y, h = Projections.apply(lists, seed, route, x, *(t for group in tensors for t in group))
            return y, h
        routed = () if route is None else (route,)
        with below_autograd():
            return forward_op(x, *routed, *tensors, *lists, seed)

    return run


def _split(tensors, G: int, L: int):
    return (
        tensors[:G],
        tensors[G : 2 * G],
        tensors[2 * G : 2 * G + L],
        tensors[2 * G + L : 2 * G + 2 * L],
        tensors[2 * G + 2 * L :],
    )


def refuse_tangents(op: str, x, lists) -> None:
    """Raises for dual tensors."""
    if forward_ad._current_level < 0:
        return
    for tensor in (x, *(t for tensors in lists for t in tensors)):
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"{op}: no forward-mode derivative (jvp, dual tensors); use reverse mode")


def any_requires_grad(x, lists) -> bool:
    """Of x and the tensors of some lists."""
    if x.requires_grad:
        return True
    for tensors in lists:
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def autocasting(forward_op: Callable, device_type: str, routed: int = 0) -> Callable:
    """The kernel of an operator's Autocast key. x and, after `routed` arguments more, weight and bias take the autocast
    dtype, as in F.linear; the factors keep their own."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def kernel(x, *arguments):
        dtype = torch.get_autocast_dtype(device_type)
        route, (weight, bias), rest = arguments[:routed], arguments[routed : routed + 2], arguments[routed + 2 :]

        weight, bias = ([autocast_to(dtype, t) for t in tensors] for tensors in (weight, bias))
        with torch._C._ExcludeDispatchKeyGuard(key):
            return forward_op(autocast_to(dtype, x), *route, weight, bias, *rest)

    return kernel


def autocast_to(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    """A tensor in the dtype of autocast, where autocast casts it."""
    eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
    return tensor.to(dtype) if eligible else tensor
