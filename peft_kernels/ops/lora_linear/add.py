"""lora_add as torch operators: what LoRA adapters add to the output of a frozen layer that is somebody else's kernel
(4-bit, 8-bit, a tensor subclass...): schema, check, fake, autograd, autocast, cost, registration.

lora_add is differentiable; lora_add_ writes into the residual, for inference, and refuses what needs a gradient.
Legend: M rows of x and of the residual r, K in_features, N out_features, R rank; L adapters (index i).
"""

import math

import torch
from torch.autograd.function import once_differentiable

from peft_kernels.ops.common.in_place import in_place
from peft_kernels.ops.common.projections import (
    accumulator,
    any_requires_grad,
    autocast_to,
    check_adapters,
    check_input,
    check_tensor,
    dtype_name,
    refuse_tangents,
    require,
)
from peft_kernels.ops.lora_linear import add_reference
from peft_kernels.ops.lora_linear.add_samples import bad_inputs, evaluate, samples
from peft_kernels.registry import Cost, Function, Op, below_autograd, register

NAME = "lora_add"
ARGUMENTS = (
    "Tensor x, Tensor[] lora_A, Tensor[] lora_B, Tensor?[] lora_bias, float[] scaling, float[] dropout_p, Tensor? seed"
)
SCHEMA = f"(Tensor residual, {ARGUMENTS}) -> (Tensor y, Tensor h)"
IN_PLACE_SCHEMA = f"(Tensor(a!) residual, {ARGUMENTS}) -> ()"
NO_GRADIENT = "writes into the residual and has no gradient; lora_add has one, torch.no_grad() needs none"
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor? x, Tensor? h, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, float[] dropout_p, "
    "Tensor? seed, bool[] needs) -> Tensor[]"
)


def check(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed, op=NAME) -> None:
    """Refuses what the op cannot take, in words. The C++ bindings repeat the rules and the texts."""
    check_input(op, x)
    check_tensor(op, "residual", residual, x, (x.dtype,), f"{dtype_name(x.dtype)}, as x")
    lead = list(x.shape[:-1])
    require(
        op,
        residual.dim() == x.dim() and list(residual.shape[:-1]) == lead and residual.shape[-1] >= 1,
        f"residual must have x's leading sizes {lead} and then out_features, got shape {list(residual.shape)}",
    )
    lists = {"member": [0] * len(lora_A), "scaling": scaling, "dropout_p": dropout_p}
    check_adapters(op, x, [residual.shape[-1]], lora_A, lora_B, lora_bias, lists, seed)


def check_in_place(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed) -> None:
    """The same for lora_add_."""
    check(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed, "lora_add_")
    text = f"residual must be contiguous, as it is written to, got strides {list(residual.stride())}"
    require("lora_add_", residual.is_contiguous(), text)


def check_backward(dy, x, h, lora_A, lora_B, scaling, dropout_p, seed, needs) -> None:
    """The same for the backward. x and h may be None where nothing that is needed reads them."""
    op, L = "lora_add_backward", len(lora_A)
    require(op, len(needs) == 1 + 3 * L, f"needs must have {1 + 3 * L} entries, got {len(needs)}")
    fits = dy.dim() >= 1
    if x is not None:
        fits = fits and dy.device == x.device and dy.dtype is x.dtype and dy.shape[:-1] == x.shape[:-1]
    require(op, fits, "dy must be of y's shape, dtype and device")
    like = x
    if x is None:  # one of its shape stands in
        like = dy[..., :1].expand(*dy.shape[:-1], lora_A[0].shape[-1]) if L else dy
    check(dy, like, lora_A, lora_B, [None] * L, scaling, dropout_p, seed, op)
    if h is not None:
        shape = (math.prod(dy.shape[:-1]), sum(a.shape[0] for a in lora_A))
        fits = h.device == dy.device and h.dtype is accumulator(dy.dtype) and h.is_contiguous()
        require(op, fits and tuple(h.shape) == shape, "h must be the contiguous [M, R] that the forward returned")
    require(op, x is not None or not any(needs[1 : 1 + L]), "x must be given for gradients of lora_A")
    require(op, h is not None or not any(needs[1 + L : 1 + 2 * L]), "h must be given for gradients of lora_B")


# -- fake and reference -----------------------------------------------------------------------------------------------


def fake(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed):
    check(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)
    h = x.new_empty((math.prod(x.shape[:-1]), sum(a.shape[0] for a in lora_A)), dtype=accumulator(x.dtype))
    return x.new_empty(residual.shape), h


def backward_fake(dy, x, h, lora_A, lora_B, scaling, dropout_p, seed, needs):
    dx = dy.new_empty((*dy.shape[:-1], lora_A[0].shape[1]))
    lora_bias = [b.new_empty(b.shape[0]) for b in lora_B]
    full = [dx, *(t.new_empty(t.shape) for t in (*lora_A, *lora_B)), *lora_bias]
    return [tensor if need else tensor.new_empty(0) for tensor, need in zip(full, needs, strict=True)]


def in_place_fake(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed) -> None:
    check_in_place(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)


def forward_reference(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed):
    check(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)
    return add_reference.forward(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)


def in_place_reference(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed) -> None:
    check_in_place(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)
    add_reference.forward_(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)


# -- autograd and autocast --------------------------------------------------------------------------------------------


def autograd(namespace):
    """The kernel of a namespace's Autograd key: a plain call where nothing needs a gradient, else one Function."""
    forward_op, backward_op = namespace.lora_add.default, namespace.lora_add_backward.default

    class Add(torch.autograd.Function):
        @staticmethod
        def forward(ctx, scaling, dropout_p, seed, residual, x, *tensors):
            # tensors: L lora_A, L lora_B, L lora_bias
            L = len(scaling)
            a, b, c = tensors[:L], tensors[L : 2 * L], tensors[2 * L :]
            with below_autograd():
                y, h = forward_op(residual, x, a, b, c, scaling, dropout_p, seed)
            needs = ctx.needs_input_grad[4:]
            if any(needs):
                reads_x, reads_h = any(needs[1 : 1 + L]), any(needs[1 + L : 1 + 2 * L])
                ctx.save_for_backward(x if reads_x else None, h if reads_h else None, seed, *a, *b)
            ctx.lists = scaling, dropout_p
            ctx.mark_non_differentiable(h)
            ctx.set_materialize_grads(False)
            return y, h

        @staticmethod
        @once_differentiable
        def backward(ctx, dy, _):
            needs = ctx.needs_input_grad[4:]
            if dy is None or not any(needs):
                return (None, None, None, dy, *(None for _ in needs))
            x, h, seed, *factors = ctx.saved_tensors
            L = len(factors) // 2
            out = backward_op(dy, x, h, factors[:L], factors[L:], *ctx.lists, seed, needs)
            return (None, None, None, dy, *(grad if need else None for grad, need in zip(out, needs, strict=True)))

    def kernel(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed):
        tensors = ([x], lora_A, lora_B, lora_bias)
        refuse_tangents(NAME, residual, tensors)
        if torch.is_grad_enabled() and any_requires_grad(residual, tensors):
            return Add.apply(scaling, dropout_p, seed, residual, x, *lora_A, *lora_B, *lora_bias)
        with below_autograd():
            return forward_op(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)

    return kernel


def autocast(namespace, device_type: str):
    """The kernel of a namespace's Autocast key. Residual and x take the autocast dtype, the factors keep their own."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def kernel(residual, x, *rest):
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(key):
            return namespace.lora_add.default(autocast_to(dtype, residual), autocast_to(dtype, x), *rest)

    return kernel


# -- cost and registration --------------------------------------------------------------------------------------------


def cost(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed) -> dict[str, Cost]:
    """Least flops and bytes. Forward: r, x, A, B in, y and h out. Backward (dx, dA, dB): dy, x, A, B, h in."""
    factors = sum(t.numel() for t in (*lora_A, *lora_B))
    M, size, factor_size = x.numel() // x.shape[-1], x.element_size(), lora_A[0].element_size()
    flops, h = 2 * M * factors, 4 * M * sum(a.shape[0] for a in lora_A)
    return {
        "forward": Cost(flops, size * (x.numel() + 2 * residual.numel()) + factor_size * factors + h),
        "backward": Cost(2 * flops, size * (2 * x.numel() + residual.numel()) + 2 * factor_size * factors + h),
    }


LORA_ADD = register(
    Op(
        name=NAME,
        formula="y = r + s (drop(x) A^T) B^T",
        functions=(
            Function(NAME, SCHEMA, fake, forward_reference),
            Function("lora_add_backward", BACKWARD_SCHEMA, backward_fake, add_reference.backward),
            Function(
                "lora_add_", IN_PLACE_SCHEMA, in_place_fake, in_place_reference, in_place("lora_add_", NO_GRADIENT)
            ),
        ),
        samples=samples,
        bad_inputs=bad_inputs,
        evaluate=evaluate,
        cost=cost,
        check=check,
        public=NAME,
        autograd=autograd,
        autocast=autocast,
        backends=("reference", "cpu", "cuda", "triton"),
        python_backends={"triton": "peft_kernels.ops.lora_linear.triton_add"},
    )
)
