"""DoRA's two operators beside lora_linear: dora_norm, the norms of the rows of W + s B A, and dora_scale, which puts
learned magnitudes over them on what lora_linear returned. Schemas, checks, fakes, autograd, cost, registration.

Legend: M rows of z, K in_features, N out_features, R rank, L adapters of a mixed batch. dora_norm has no autograd: the
paper takes the norm as a constant.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels.ops.common.projections import (
    FLOATS,
    MAX_RANK,
    accumulator,
    any_requires_grad,
    autocast_to,
    check_shape,
    check_tensor,
    dtype_name,
    refuse_tangents,
    require,
)
from peft_kernels.ops.lora_linear import dora_reference, dora_samples
from peft_kernels.registry import Cost, Function, Op, below_autograd, register

NORM, SCALE = "dora_norm", "dora_scale"
NORM_SCHEMA = "(Tensor weight, Tensor lora_A, Tensor lora_B, float scaling) -> Tensor"
SCALE_SCHEMA = "(Tensor z, Tensor magnitude, Tensor norm, Tensor? bias, Tensor? residual, Tensor? ids) -> Tensor"
SCALE_BACKWARD_SCHEMA = "(Tensor dy, Tensor? z, Tensor? magnitude, Tensor norm, Tensor? ids, bool[] needs) -> Tensor[]"
GRADIENTS = ("z", "magnitude", "bias")


# -- check ------------------------------------------------------------------------------------------------------------


def _factor_dtypes(like: Tensor, name: str) -> tuple[tuple[torch.dtype, ...], str]:
    """What an adapter's own tensors may be, beside activations or weights of `like`'s dtype."""
    if like.dtype is torch.float64:
        return (torch.float64,), f"float64, as {name}"
    return FLOATS[:3], "float32, float16 or bfloat16"


def check_norm(weight, lora_A, lora_B, scaling) -> None:
    """Refuses what the op cannot take, in words. The C++ bindings repeat the rules and the texts."""
    check_tensor(NORM, "weight", weight, weight, FLOATS, "float32, float16, bfloat16 or float64")
    shaped = weight.dim() == 2 and weight.shape[0] >= 1 and weight.shape[1] >= 1
    require(NORM, shaped, f"weight must have shape [out_features, in_features], got {list(weight.shape)}")
    N, K = weight.shape
    check_tensor(NORM, "lora_A", lora_A, weight, *_factor_dtypes(weight, "weight"), "weight")
    fits = lora_A.dim() == 2 and lora_A.shape[1] == K
    require(NORM, fits, f"lora_A must have shape [r, in_features={K}], got {list(lora_A.shape)}")
    r = lora_A.shape[0]
    require(NORM, 1 <= r <= MAX_RANK, f"lora_A must have a rank r from 1 to {MAX_RANK}, got {r}")
    rule = f"{dtype_name(lora_A.dtype)}, as lora_A"
    check_tensor(NORM, "lora_B", lora_B, weight, (lora_A.dtype,), rule, "weight")
    check_shape(NORM, "lora_B", lora_B, (N, r), f"[out_features={N}, r={r}]")
    require(NORM, math.isfinite(scaling), f"scaling must be finite, got {scaling}")


def _check_ids(op: str, ids: Tensor, z: Tensor, name: str) -> None:
    check_tensor(op, "ids", ids, z, (torch.int32,), "int32", name)
    lead, M = tuple(z.shape[:-1]), math.prod(z.shape[:-1])
    text = f"ids must have shape {list(lead)}, as {name} without its features, or [{M}], got {list(ids.shape)}"
    require(op, tuple(ids.shape) in (lead, (M,)), text)


def _check_gains(op: str, z: Tensor, magnitude: Tensor | None, norm: Tensor, ids: Tensor | None, name: str) -> None:
    """What dora_scale and its backward both have; `name` is how they call z."""
    check_tensor(op, name, z, z, FLOATS, "float32, float16, bfloat16 or float64")
    require(op, z.dim() >= 1, f"{name} must have shape [..., out_features], got a 0-d tensor")
    N = z.shape[-1]
    require(op, N >= 1, f"{name} must have at least one feature, got shape {list(z.shape)}")
    wide = accumulator(z.dtype)
    check_tensor(op, "norm", norm, z, (wide,), f"{dtype_name(wide)}, as dora_norm returns it", name)
    if ids is None:
        check_shape(op, "norm", norm, (N,), f"[out_features={N}]")
    else:
        _check_ids(op, ids, z, name)
        fits = norm.dim() == 2 and norm.shape[0] >= 1 and norm.shape[1] == N
        require(op, fits, f"norm must have shape [adapters, out_features={N}] beside ids, got {list(norm.shape)}")
    if magnitude is not None:
        check_tensor(op, "magnitude", magnitude, z, *_factor_dtypes(z, name), name)
        check_shape(op, "magnitude", magnitude, tuple(norm.shape), f"{list(norm.shape)}, as norm")


def check_scale(z, magnitude, norm, bias, residual, ids) -> None:
    """The same for dora_scale. Numbers in ids that are out of range the kernels for the CPU refuse."""
    _check_gains(SCALE, z, magnitude, norm, ids, "z")
    rule, N = f"{dtype_name(z.dtype)}, as z", z.shape[-1]
    if bias is not None:
        check_tensor(SCALE, "bias", bias, z, (z.dtype,), rule, "z")
        check_shape(SCALE, "bias", bias, (N,), f"[out_features={N}]")
    if residual is not None:
        check_tensor(SCALE, "residual", residual, z, (z.dtype,), rule, "z")
        check_shape(SCALE, "residual", residual, tuple(z.shape), f"{list(z.shape)}, as z")


def check_scale_backward(dy, z, magnitude, norm, ids, needs) -> None:
    """The same for its backward. z and magnitude may be None where nothing that is needed reads them."""
    op = f"{SCALE}_backward"
    require(op, len(needs) == len(GRADIENTS), f"needs must have {len(GRADIENTS)} entries, got {len(needs)}")
    _check_gains(op, dy, magnitude, norm, ids, "dy")
    text = "magnitude must be given for gradients of z or magnitude"
    require(op, magnitude is not None or not (needs[0] or needs[1]), text)
    require(op, z is not None or not needs[1], "z must be given for the gradient of magnitude")
    if z is not None:
        check_tensor(op, "z", z, dy, (dy.dtype,), f"{dtype_name(dy.dtype)}, as dy", "dy")
        check_shape(op, "z", z, tuple(dy.shape), f"{list(dy.shape)}, as dy")


# -- fake and reference -----------------------------------------------------------------------------------------------


def fake_norm(weight, lora_A, lora_B, scaling) -> Tensor:
    check_norm(weight, lora_A, lora_B, scaling)
    return weight.new_empty(weight.shape[0], dtype=accumulator(weight.dtype))


def fake_scale(z, magnitude, norm, bias, residual, ids) -> Tensor:
    check_scale(z, magnitude, norm, bias, residual, ids)
    return z.new_empty(z.shape)


def fake_scale_backward(dy, z, magnitude, norm, ids, needs) -> list[Tensor]:
    check_scale_backward(dy, z, magnitude, norm, ids, needs)
    of_magnitude = (norm if magnitude is None else magnitude).new_empty(norm.shape)
    full = [dy.new_empty(dy.shape), of_magnitude, dy.new_empty(dy.shape[-1])]
    return [tensor if need else tensor.new_empty(0) for tensor, need in zip(full, needs, strict=True)]


def norm_reference(*arguments) -> Tensor:
    check_norm(*arguments)
    return dora_reference.norm(*arguments)


def scale_reference(*arguments) -> Tensor:
    check_scale(*arguments)
    return dora_reference.scale(*arguments)


def scale_backward_reference(*arguments) -> list[Tensor]:
    check_scale_backward(*arguments)
    return dora_reference.scale_backward(*arguments)


# -- autograd and autocast --------------------------------------------------------------------------------------------


def autograd(namespace):
    """The kernel of a namespace's Autograd key: a plain call where nothing needs a gradient, else one Function."""
    forward_op, backward_op = namespace.dora_scale.default, namespace.dora_scale_backward.default

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z, magnitude, norm, bias, residual, ids):
            with below_autograd():
                y = forward_op(z, magnitude, norm, bias, residual, ids)
            ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, magnitude, norm, ids)
            return y

        @staticmethod
        @once_differentiable
        def backward(ctx, dy):
            of_z, of_magnitude, _, of_bias, of_residual, _ = ctx.needs_input_grad
            needs, grads = [of_z, of_magnitude, of_bias], [None] * 3
            if any(needs):
                grads = backward_op(dy, *ctx.saved_tensors, needs)
            dz, dm, db = (grad if need else None for grad, need in zip(grads, needs, strict=True))
            return dz, dm, None, db, dy if of_residual else None, None

    def kernel(z, magnitude, norm, bias, residual, ids):
        others = (magnitude, bias, residual)
        refuse_tangents(SCALE, z, ((*others, norm),))
        if torch.is_grad_enabled() and any_requires_grad(z, (others,)):
            return Scale.apply(z, magnitude, norm, bias, residual, ids)
        with below_autograd():
            return forward_op(z, magnitude, norm, bias, residual, ids)

    return kernel


def autocast(namespace, device_type: str):
    """The kernel of a namespace's Autocast key: activations and bias take the autocast dtype, the adapter keeps its
    own."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))
    forward_op = namespace.dora_scale.default

    def kernel(z, magnitude, norm, bias, residual, ids):
        dtype = torch.get_autocast_dtype(device_type)
        z, bias, residual = (autocast_to(dtype, tensor) for tensor in (z, bias, residual))
        with torch._C._ExcludeDispatchKeyGuard(key):
            return forward_op(z, magnitude, norm, bias, residual, ids)

    return kernel


# -- cost and registration --------------------------------------------------------------------------------------------


def cost_norm(weight, lora_A, lora_B, scaling) -> dict[str, Cost]:
    """Least flops and bytes: W, A and B in once."""
    (N, K), R = weight.shape, lora_A.shape[0]
    flops = 2 * N * K * (1 + R) + 2 * R * R * (K + N) + 4 * N * R
    factors = lora_A.element_size() * R * (N + K)
    return {"forward": Cost(flops, weight.element_size() * N * K + factors + 4 * N)}


def cost_scale(z, magnitude, norm, bias, residual, ids) -> dict[str, Cost]:
    """Least flops and bytes. Forward: z and r in, y out. Backward (dz, dm): dy and z in, dz out."""
    passes = 2 if residual is None else 3
    vectors = norm.numel() * (norm.element_size() + magnitude.element_size())
    size, rows = z.numel() * z.element_size(), 0 if ids is None else 4 * ids.numel()
    return {
        "forward": Cost(passes * z.numel(), passes * size + vectors + rows),
        "backward": Cost(3 * z.numel(), 3 * size + 2 * vectors + rows),
    }


DORA_NORM = register(
    Op(
        name=NORM,
        formula="norm of each row of W + s B A",
        functions=(Function(NORM, NORM_SCHEMA, fake_norm, norm_reference),),
        samples=dora_samples.norm_samples,
        bad_inputs=dora_samples.bad_norms,
        evaluate=dora_samples.evaluate_norm,
        cost=cost_norm,
        check=check_norm,
        public=NORM,
        size=(dora_samples.norm_size, None),
        rows="weight",
        backends=("reference", "cpu", "cuda", "triton"),
        python_backends={"triton": "peft_kernels.ops.lora_linear.triton_dora_norm"},
    )
)

DORA_SCALE = register(
    Op(
        name=SCALE,
        formula="y = r + b + (m / norm) z",
        functions=(
            Function(SCALE, SCALE_SCHEMA, fake_scale, scale_reference),
            Function(f"{SCALE}_backward", SCALE_BACKWARD_SCHEMA, fake_scale_backward, scale_backward_reference),
        ),
        samples=dora_samples.scale_samples,
        bad_inputs=dora_samples.bad_scales,
        evaluate=dora_samples.evaluate_scale,
        cost=cost_scale,
        check=check_scale,
        public=SCALE,
        rows="z",
        constants=("norm",),
        autograd=autograd,
        autocast=autocast,
        backends=("reference", "cpu", "cuda", "triton"),
        python_backends={"triton": "peft_kernels.ops.lora_linear.triton_dora_scale"},
    )
)
