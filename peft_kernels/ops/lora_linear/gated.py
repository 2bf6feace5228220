"""gated_product as a torch operator: y = f(gate) up, what lies between the projections of a gated MLP.

Schema, check, fake, autograd, cost, registration. `mlp.py` calls it forward and, to have y again, backward. gate and up
are of one shape and dtype, of any strides; n is how many numbers each holds.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels.ops.common.projections import FLOATS, check_tensor, dtype_name, refuse_tangents, require
from peft_kernels.ops.lora_linear import gated_reference
from peft_kernels.ops.lora_linear.gated_samples import bad_inputs, evaluate, samples
from peft_kernels.registry import Cost, Function, Op, below_autograd, register

NAME = "gated_product"
GATES = ("silu", "gelu", "gelu_tanh", "relu")
SCHEMA = "(Tensor gate, Tensor up, str activation) -> Tensor"
BACKWARD_SCHEMA = "(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)"


# -- check ------------------------------------------------------------------------------------------------------------


def check_activation(op: str, activation: str) -> None:
    require(op, activation in GATES, f"activation must be one of {', '.join(GATES)}, got '{activation}'")


def _check(op: str, gate: Tensor, others: dict[str, Tensor], activation: str) -> None:
    check_tensor(op, "gate", gate, gate, FLOATS, "float32, float16, bfloat16 or float64", of="gate")
    for name, tensor in others.items():
        check_tensor(op, name, tensor, gate, (gate.dtype,), f"{dtype_name(gate.dtype)}, as gate", of="gate")
        text = f"{name} must have gate's shape {list(gate.shape)}, got {list(tensor.shape)}"
        require(op, tensor.shape == gate.shape, text)
    check_activation(op, activation)


def check(gate: Tensor, up: Tensor, activation: str) -> None:
    """Refuses what the op cannot take, in words. The C++ bindings repeat the rules and the texts."""
    _check(NAME, gate, {"up": up}, activation)


def check_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """The same for the backward."""
    _check(f"{NAME}_backward", gate, {"up": up, "dy": dy}, activation)


# -- fake and reference -----------------------------------------------------------------------------------------------


def fake(gate, up, activation):
    check(gate, up, activation)
    return gate.new_empty(gate.shape)


def backward_fake(dy, gate, up, activation):
    check_backward(dy, gate, up, activation)
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def forward_reference(gate, up, activation):
    check(gate, up, activation)
    return gated_reference.forward(gate, up, activation)


def backward_reference(dy, gate, up, activation):
    check_backward(dy, gate, up, activation)
    return gated_reference.backward(dy, gate, up, activation)


# -- autograd ---------------------------------------------------------------------------------------------------------


def autograd(namespace):
    """The kernel of a namespace's Autograd key: a plain call where nothing needs a gradient, else one Function."""
    forward_op, backward_op = namespace.gated_product.default, namespace.gated_product_backward.default

    class GatedProduct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, activation, gate, up):
            ctx.save_for_backward(gate, up)
            ctx.activation = activation
            with below_autograd():
                return forward_op(gate, up, activation)

        @staticmethod
        @once_differentiable
        def backward(ctx, dy):
            grads = backward_op(dy, *ctx.saved_tensors, ctx.activation)
            return None, *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[1:], strict=True))

    def kernel(gate, up, activation):
        refuse_tangents(NAME, gate, ((up,),))
        if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
            return GatedProduct.apply(activation, gate, up)
        with below_autograd():
            return forward_op(gate, up, activation)

    return kernel


# -- cost and registration --------------------------------------------------------------------------------------------


def cost(gate, up, activation) -> dict[str, Cost]:
    """Least flops, f and f' counted as one each, and bytes. Forward: gate, up in, y out. Backward: dy, gate, up in."""
    n, size = gate.numel(), gate.element_size()
    return {"forward": Cost(2 * n, 3 * size * n), "backward": Cost(5 * n, 5 * size * n)}


GATED_PRODUCT = register(
    Op(
        name=NAME,
        formula="y = f(gate) up",
        functions=(
            Function(NAME, SCHEMA, fake, forward_reference),
            Function(f"{NAME}_backward", BACKWARD_SCHEMA, backward_fake, backward_reference),
        ),
        samples=samples,
        bad_inputs=bad_inputs,
        evaluate=evaluate,
        cost=cost,
        check=check,
        rows="gate",
        autograd=autograd,
        backends=("reference", "cpu", "cuda", "triton"),
        python_backends={"triton": "peft_kernels.ops.lora_linear.triton_gated"},
    )
)
