"""bottleneck_adapter as a torch operator: schema, check, fake, autograd, autocast, cost, registration.

One operator and its backward; reference.py has the formula. Legend: M rows of x, K in_features, N out_features,
E bottleneck.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels.ops.bottleneck_adapter import reference
from peft_kernels.ops.bottleneck_adapter.samples import bad_inputs, evaluate, samples
from peft_kernels.ops.common.activations import ACTIVATIONS
from peft_kernels.ops.common.projections import (
    FLOATS,
    accumulator,
    any_requires_grad,
    autocast_to,
    check_seed,
    check_shape,
    check_tensor,
    dtype_name,
    refuse_tangents,
    require,
)
from peft_kernels.registry import Cost, Function, Op, below_autograd, register

NAME = "bottleneck_adapter"
MAX_BOTTLENECK = 1024
NORMS = ("none", "layer_norm", "rms_norm")
DROPOUTS = ("bottleneck", "output")
GRADIENTS = (
    "x", "down_weight", "down_bias", "up_weight", "up_bias", "scale", "gate", "norm_weight", "norm_bias",
)  # fmt: skip
_NUMBERS = "str activation, float scaling, str norm, float eps, float dropout_p, str dropout_on, Tensor? seed"
SCHEMA = (
    "(Tensor x, Tensor? residual, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, "
    f"Tensor? scale, Tensor? gate, Tensor? norm_weight, Tensor? norm_bias, {_NUMBERS}) -> (Tensor y, Tensor h)"
)
_TENSORS = SCHEMA.partition(_NUMBERS)[0].count("Tensor")  # arguments before the numbers and the seed
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor x, Tensor h, Tensor down_weight, Tensor up_weight, Tensor? up_bias, Tensor? scale, "
    f"Tensor? gate, Tensor? norm_weight, Tensor? norm_bias, {_NUMBERS}, bool serial, bool[] needs) -> Tensor[]"
)


# -- check ------------------------------------------------------------------------------------------------------------


def _check_weights(x: Tensor, down_weight: Tensor, up_weight: Tensor) -> None:
    check_tensor(NAME, "x", x, x, FLOATS, "float32, float16, bfloat16 or float64")
    require(NAME, x.dim() >= 1, "x must have shape [..., in_features], got a 0-d tensor")
    K = x.shape[-1]
    require(NAME, K >= 1, f"x must have at least one feature, got shape {list(x.shape)}")
    double = x.dtype is torch.float64
    rule = "float64, as x" if double else "float32, float16 or bfloat16"
    check_tensor(NAME, "down_weight", down_weight, x, (torch.float64,) if double else FLOATS[:3], rule)
    text = f"down_weight must have shape [bottleneck, in_features={K}], got {list(down_weight.shape)}"
    require(NAME, down_weight.dim() == 2 and down_weight.shape[1] == K, text)
    E = down_weight.shape[0]
    require(NAME, 1 <= E <= MAX_BOTTLENECK, f"down_weight must have from 1 to {MAX_BOTTLENECK} rows, got {E}")
    check_tensor(
        NAME, "up_weight", up_weight, x, (down_weight.dtype,), f"{dtype_name(down_weight.dtype)}, as down_weight"
    )
    text = f"up_weight must have shape [out_features, bottleneck={E}], got {list(up_weight.shape)}"
    require(NAME, up_weight.dim() == 2 and up_weight.shape[1] == E and up_weight.shape[0] >= 1, text)


def _check_vectors(x, down_weight, down_bias, up_weight, up_bias, scale, gate, norm_weight, norm_bias, norm) -> None:
    """What may be left out."""
    (E, K), N = down_weight.shape, up_weight.shape[0]
    rule, batch = f"{dtype_name(down_weight.dtype)}, as down_weight", tuple(x.shape[:-1])
    vectors = (
        ("down_bias", down_bias, (E,), f"[bottleneck={E}]"),
        ("up_bias", up_bias, (N,), f"[out_features={N}]"),
        ("gate", gate, batch, f"{list(batch)}, as x without its features"),
        ("norm_weight", norm_weight, (K,), f"[in_features={K}]"),
        ("norm_bias", norm_bias, (K,), f"[in_features={K}]"),
    )
    for name, tensor, shape, words in vectors:
        if tensor is not None:
            check_tensor(NAME, name, tensor, x, (down_weight.dtype,), rule)
            check_shape(NAME, name, tensor, shape, words)
    if scale is not None:
        check_tensor(NAME, "scale", scale, x, (down_weight.dtype,), rule)
        text = f"scale must have shape [1] or [out_features={N}], got {list(scale.shape)}"
        require(NAME, tuple(scale.shape) in ((1,), (N,)), text)
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        require(NAME, tensor is None or norm != "none", f"{name} must be None where norm is 'none'")
    require(NAME, norm_bias is None or norm != "rms_norm", "norm_bias must be None where norm is 'rms_norm'")


def _one_of(name: str, value: str, allowed) -> None:
    require(NAME, value in allowed, f"{name} must be one of {', '.join(allowed)}, got '{value}'")


def _check_numbers(x, activation, scaling, norm, eps, dropout_p, dropout_on, seed) -> None:
    _one_of("activation", activation, ACTIVATIONS)
    _one_of("norm", norm, NORMS)
    _one_of("dropout_on", dropout_on, DROPOUTS)
    require(NAME, math.isfinite(scaling), f"scaling must be finite, got {scaling}")
    require(NAME, math.isfinite(eps) and eps >= 0, f"eps must be finite and not negative, got {eps}")
    require(NAME, 0 <= dropout_p < 1, f"dropout_p must lie in [0, 1), got {dropout_p}")
    check_seed(NAME, x, seed, [dropout_p])


def _check_adapter(
    x, down_weight, down_bias, up_weight, up_bias, scale, gate, norm_weight, norm_bias,
    activation, scaling, norm, eps, dropout_p, dropout_on, seed,
) -> None:  # fmt: skip
    _check_weights(x, down_weight, up_weight)
    _check_numbers(x, activation, scaling, norm, eps, dropout_p, dropout_on, seed)
    _check_vectors(x, down_weight, down_bias, up_weight, up_bias, scale, gate, norm_weight, norm_bias, norm)


def _check_rows(name: str, tensor: Tensor, x: Tensor, N: int) -> None:
    """What is of y's shape and x's dtype."""
    check_tensor(NAME, name, tensor, x, (x.dtype,), f"{dtype_name(x.dtype)}, as x")
    shape = (*x.shape[:-1], N)
    check_shape(NAME, name, tensor, shape, f"{list(shape)}, as x with out_features={N}")


def _check_serial(x: Tensor, N: int) -> None:
    K = x.shape[-1]
    text = f"residual must be given where out_features={N} is not in_features={K}: x cannot stand for it"
    require(NAME, N == K, text)


def check(
    x, residual, down_weight, down_bias, up_weight, up_bias, scale, gate, norm_weight, norm_bias,
    activation, scaling, norm, eps, dropout_p, dropout_on, seed,
) -> None:  # fmt: skip
    """Refuses what the op cannot take, in words. The C++ bindings repeat the rules and the texts."""
    optional = (up_bias, scale, gate, norm_weight, norm_bias)
    numbers = (activation, scaling, norm, eps, dropout_p, dropout_on, seed)
    _check_adapter(x, down_weight, down_bias, up_weight, *optional, *numbers)
    if residual is None:
        _check_serial(x, up_weight.shape[0])
    else:
        _check_rows("residual", residual, x, up_weight.shape[0])


def check_backward(
    dy, x, h, down_weight, up_weight, up_bias, scale, gate, norm_weight, norm_bias,
    activation, scaling, norm, eps, dropout_p, dropout_on, seed, serial, needs,
) -> None:  # fmt: skip
    """The same for the backward."""
    op = f"{NAME}_backward"
    require(op, len(needs) == len(GRADIENTS), f"needs must have {len(GRADIENTS)} entries, got {len(needs)}")
    optional = (up_bias, scale, gate, norm_weight, norm_bias)
    numbers = (activation, scaling, norm, eps, dropout_p, dropout_on, seed)
    _check_adapter(x, down_weight, None, up_weight, *optional, *numbers)
    _check_rows("dy", dy, x, up_weight.shape[0])
    if serial:
        _check_serial(x, up_weight.shape[0])
    M = x.numel() // x.shape[-1]
    fits = h.device == x.device and h.dtype is accumulator(x.dtype) and h.is_contiguous()
    fits = fits and tuple(h.shape) == (M, down_weight.shape[0])
    require(op, fits, "h must be the contiguous [M, bottleneck] that the forward returned")
    for name, tensor in (("scale", scale), ("gate", gate)):
        wanted = needs[GRADIENTS.index(name)]
        require(op, tensor is not None or not wanted, f"{name} must be given for its gradient")
    text = "norm must not be 'none' for gradients of norm_weight or norm_bias"
    require(op, norm != "none" or not any(needs[-2:]), text)


# -- fake and reference -----------------------------------------------------------------------------------------------


def fake(x, residual, down_weight, down_bias, up_weight, *rest):
    check(x, residual, down_weight, down_bias, up_weight, *rest)
    h = x.new_empty((math.prod(x.shape[:-1]), down_weight.shape[0]), dtype=accumulator(x.dtype))
    return x.new_empty((*x.shape[:-1], up_weight.shape[0])), h


def backward_fake(dy, x, h, down_weight, up_weight, up_bias, scale, gate, norm_weight, norm_bias, *rest):
    check_backward(dy, x, h, down_weight, up_weight, up_bias, scale, gate, norm_weight, norm_bias, *rest)
    (E, K), N = down_weight.shape, up_weight.shape[0]
    factor = down_weight.new_empty
    full = [x.new_empty(x.shape), factor((E, K)), factor(E), factor((N, E)), factor(N)]
    full += [factor(1 if scale is None else scale.shape[0]), factor(x.shape[:-1]), factor(K), factor(K)]
    return [tensor if need else tensor.new_empty(0) for tensor, need in zip(full, rest[-1], strict=True)]


def forward_reference(*arguments):
    check(*arguments)
    return reference.forward(*arguments)


def backward_reference(*arguments):
    check_backward(*arguments)
    return reference.backward(*arguments)


# -- autograd and autocast --------------------------------------------------------------------------------------------


def autograd(namespace):
    """The kernel of a namespace's Autograd key: a plain call where nothing needs a gradient, else one Function."""
    forward_op, backward_op = namespace.bottleneck_adapter.default, namespace.bottleneck_adapter_backward.default

    class Bottleneck(torch.autograd.Function):
        @staticmethod
        def forward(ctx, numbers, seed, x, residual, down_weight, down_bias, up_weight, up_bias, *rest):
            with below_autograd():
                y, h = forward_op(x, residual, down_weight, down_bias, up_weight, up_bias, *rest, *numbers, seed)
            ctx.save_for_backward(seed, x, h, down_weight, up_weight, up_bias, *rest)
            ctx.numbers, ctx.serial = numbers, residual is None
            ctx.mark_non_differentiable(h)
            ctx.set_materialize_grads(False)
            return y, h

        @staticmethod
        @once_differentiable
        def backward(ctx, dy, _):
            if dy is None:
                return (None,) * 12
            seed, *tensors = ctx.saved_tensors
            dx, dresidual, *wanted = ctx.needs_input_grad[2:]
            needs = [dx, *wanted]
            grads = [None] * len(needs)
            if any(needs):
                grads = backward_op(dy, *tensors, *ctx.numbers, seed, ctx.serial, needs)
                grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
            return None, None, grads[0], dy if dresidual else None, *grads[1:]

    def kernel(*arguments):
        x, *others = tensors = arguments[:_TENSORS]
        *numbers, seed = arguments[_TENSORS:]
        refuse_tangents(NAME, x, (others,))
        if torch.is_grad_enabled() and any_requires_grad(x, (others,)):
            return Bottleneck.apply(numbers, seed, *tensors)
        with below_autograd():
            return forward_op(*arguments)

    return kernel


def autocast(namespace, device_type: str):
    """The kernel of a namespace's Autocast key: x and the residual take the autocast dtype, the adapter keeps its
    own."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))
    forward_op = namespace.bottleneck_adapter.default

    def kernel(x, residual, *rest):
        dtype = torch.get_autocast_dtype(device_type)

        with torch._C._ExcludeDispatchKeyGuard(key):
            return forward_op(autocast_to(dtype, x), autocast_to(dtype, residual), *rest)

    return kernel


# -- cost and registration --------------------------------------------------------------------------------------------


def cost(x, residual, down_weight, down_bias, up_weight, *rest) -> dict[str, Cost]:
    """Least flops and bytes. Forward: x, r, A, B in, y and h out. Backward (dx, dA, dB): dy, x, h, A, B in."""
    (E, K), N = down_weight.shape, up_weight.shape[0]
    M = x.numel() // K
    size, factors, h = x.element_size(), down_weight.element_size() * E * (K + N), 4 * M * E
    read = K + (0 if residual is None else N)
    return {
        "forward": Cost(2 * M * E * (K + N), size * M * (read + N) + factors + h),
        "backward": Cost(4 * M * E * (K + N), size * M * (N + 2 * K) + 2 * factors + h),
    }


BOTTLENECK_ADAPTER = register(
    Op(
        name=NAME,
        formula="y = r + s (drop(f(norm(x) A^T + a)) B^T + b)",
        functions=(
            Function(NAME, SCHEMA, fake, forward_reference),
            Function(f"{NAME}_backward", BACKWARD_SCHEMA, backward_fake, backward_reference),
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
        python_backends={"triton": "peft_kernels.ops.bottleneck_adapter.triton_kernel"},
    )
)
