"""lora_linear as a torch operator: schema, check, fake, autograd, autocast, cost, registration.

One operator serves a single projection (a group of one), groups that share x, and several adapters per projection.
Legend: M rows of x, K in_features, N out_features, R rank; G projections (index g), L adapters (index i).
"""

from peft_kernels.ops.common.dropout import DROPOUT_MASK
from peft_kernels.ops.common.projections import (
    autocasting,
    check_gradients,
    check_projections,
    differentiable,
    fake_gradients,
    fake_outputs,
)
from peft_kernels.ops.lora_linear import reference
from peft_kernels.ops.lora_linear.samples import bad_inputs, evaluate, samples
from peft_kernels.registry import Cost, Function, Op, register

SCHEMA = (
    "(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor[] lora_A, Tensor[] lora_B, Tensor?[] lora_bias, "
    "int[] member, float[] scaling, float[] dropout_p, Tensor? seed) -> (Tensor[] y, Tensor h)"
)
BACKWARD_SCHEMA = (
    "(Tensor[] dy, Tensor? x, Tensor? h, Tensor[] weight, Tensor[] lora_A, Tensor[] lora_B, "
    "int[] member, float[] scaling, float[] dropout_p, Tensor? seed, bool[] needs) -> Tensor[]"
)


def check(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed) -> None:
    """Refuses what the op cannot take, in words. The C++ bindings repeat the rules and the texts."""
    lists = {"member": member, "scaling": scaling, "dropout_p": dropout_p}
    check_projections("lora_linear", x, weight, bias, lora_A, lora_B, lora_bias, lists, seed)


def check_backward(dy, x, h, weight, lora_A, lora_B, member, scaling, dropout_p, seed, needs) -> None:
    """The same for the backward. x and h may be None where nothing that is needed reads them."""

    def check_x(like):
        check(
            like, weight, [None] * len(weight), lora_A, lora_B, [None] * len(lora_A), member, scaling, dropout_p, seed
        )

    check_gradients(
        "lora_linear_backward", dy, x, h, weight, lora_A, lambda: sum(a.shape[0] for a in lora_A), needs, check_x
    )


def fake(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed):
    check(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed)
    return fake_outputs(x, weight, sum(a.shape[0] for a in lora_A))


def backward_fake(dy, x, h, weight, lora_A, lora_B, member, scaling, dropout_p, seed, needs):
    return fake_gradients(dy, weight, lora_A, lora_B, needs)


def forward_reference(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed):
    check(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed)
    return reference.forward(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed)


def autograd(namespace):
    """The kernel of a namespace's Autograd key."""
    run = differentiable("lora_linear", namespace.lora_linear.default, namespace.lora_linear_backward.default)

    def kernel(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed):
        return run(x, None, (weight, bias, lora_A, lora_B, lora_bias), (member, scaling, dropout_p), seed)

    return kernel


def autocast(namespace, device_type: str):
    """The kernel of a namespace's Autocast key."""
    return autocasting(namespace.lora_linear.default, device_type)


def cost(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed) -> dict[str, Cost]:
    """Least flops and bytes. Forward: x, W, A, B in, y and h out. Backward (dx, dA, dB): dy, x, W, A, B, h in."""
    K, M = x.shape[-1], x.numel() // x.shape[-1]
    N, base = sum(w.shape[0] for w in weight), sum(w.numel() for w in weight)
    factors = sum(t.numel() for t in (*lora_A, *lora_B))
    low_rank = sum(2 * M * t.numel() for t in (*lora_A, *lora_B))
    h = 4 * M * sum(a.shape[0] for a in lora_A)
    size, factor_size = x.element_size(), lora_A[0].element_size()
    return {
        "forward": Cost(2 * M * base + low_rank, size * (M * K + base + M * N) + factor_size * factors + h),
        "backward": Cost(
            2 * M * base + 2 * low_rank, size * (M * N + 2 * M * K + base) + 2 * factor_size * factors + h
        ),
    }


LORA_LINEAR = register(
    Op(
        name="lora_linear",
        formula="y = x W^T + b + s (drop(x) A^T) B^T",
        functions=(
            Function("lora_linear", SCHEMA, fake, forward_reference),
            Function("lora_linear_backward", BACKWARD_SCHEMA, backward_fake, reference.backward),
            DROPOUT_MASK,
        ),
        samples=samples,
        bad_inputs=bad_inputs,
        evaluate=evaluate,
        cost=cost,
        check=check,
        public="lora_linear_group",
        autograd=autograd,
        autocast=autocast,
        backends=("reference", "cpu", "cuda", "triton"),
        python_backends={"triton": "peft_kernels.ops.lora_linear.triton_kernel"},
    )
)
