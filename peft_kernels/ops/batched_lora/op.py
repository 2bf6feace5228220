"""batched_lora as torch operators: schema, check, fake, autograd, autocast, cost, registration.

One operator routes a batch once per step; one, with its backward, adds to G projections of x what each row's adapter
adds. Legend: M rows of x, K in_features, N out_features, R rank; G projections (index g), L entries (index i): the
factors of one adapter for one projection.
"""

from torch import Tensor, int32

from peft_kernels.ops.batched_lora import reference
from peft_kernels.ops.batched_lora.route import HEADER, TILE, row_ids
from peft_kernels.ops.batched_lora.samples import bad_inputs, evaluate, samples
from peft_kernels.ops.common.projections import (
    autocasting,
    check_gradients,
    check_projections,
    check_tensor,
    differentiable,
    fake_gradients,
    fake_outputs,
    require,
)
from peft_kernels.registry import Cost, Function, Op, register

NAME = "batched_lora"
SCHEMA = (
    "(Tensor x, Tensor route, Tensor[] weight, Tensor?[] bias, Tensor[] lora_A, Tensor[] lora_B, Tensor?[] lora_bias, "
    "int[] member, int[] adapter, float[] scaling, float[] dropout_p, Tensor? seed) -> (Tensor[] y, Tensor h)"
)
BACKWARD_SCHEMA = (
    "(Tensor[] dy, Tensor? x, Tensor? h, Tensor route, Tensor[] weight, Tensor[] lora_A, Tensor[] lora_B, "
    "int[] member, int[] adapter, float[] scaling, float[] dropout_p, Tensor? seed, bool[] needs) -> Tensor[]"
)


def _check_route(like: Tensor, M: int, route: Tensor) -> None:
    """A route that M rows can have; what stands in it, only those who read it can check."""
    check_tensor(NAME, "route", route, like, (int32,), "int32")
    tiles = (route.numel() - HEADER - 2 * M) // 3  # no divmod, which symbolic sizes do not have
    whole = route.numel() == HEADER + 2 * M + 3 * tiles
    fits = route.dim() == 1 and route.is_contiguous() and whole and min(M, 1) <= tiles - M // TILE <= M
    require(NAME, fits, f"route must come from batched_lora_route for the {M} rows of x, got shape {list(route.shape)}")


def _check_places(member: list[int], adapter: list[int]) -> None:
    """At most one entry for each adapter and projection."""
    places = {}
    for i, place in enumerate(zip(member, adapter, strict=True)):
        require(NAME, place[1] >= 0, f"adapter[{i}] must be 0 or more, got {place[1]}")
        before = places.setdefault(place, i)
        text = (
            f"an adapter must have one entry per member, got entries {before} and {i} of adapter {place[1]} for member"
        )
        require(NAME, before == i, f"{text} {place[0]}")


def check(x, route, weight, bias, lora_A, lora_B, lora_bias, member, adapter, scaling, dropout_p, seed) -> None:
    """Refuses what the op cannot take, in words. The C++ bindings repeat the rules and the texts."""
    lists = {"member": member, "adapter": adapter, "scaling": scaling, "dropout_p": dropout_p}
    check_projections(NAME, x, weight, bias, lora_A, lora_B, lora_bias, lists, seed)
    _check_route(x, x.numel() // x.shape[-1], route)
    _check_places(member, adapter)


def check_backward(dy, x, h, route, weight, lora_A, lora_B, member, adapter, scaling, dropout_p, seed, needs) -> None:
    """The same for the backward. x and h may be None where nothing that is needed reads them."""
    nothing, lists = [None] * len(weight), {"member": member, "adapter": adapter}
    lists |= {"scaling": scaling, "dropout_p": dropout_p}

    def check_x(like):
        check_projections(NAME, like, weight, nothing, lora_A, lora_B, [None] * len(lora_A), lists, seed)

    def width():
        return reference.h_columns(lora_A, member, len(weight))[-1]

    check_gradients(f"{NAME}_backward", dy, x, h, weight, lora_A, width, needs, check_x)
    _check_route(dy[0], dy[0].numel() // weight[0].shape[0], route)
    _check_places(member, adapter)


def fake(x, route, weight, bias, lora_A, lora_B, lora_bias, member, adapter, scaling, dropout_p, seed):
    check(x, route, weight, bias, lora_A, lora_B, lora_bias, member, adapter, scaling, dropout_p, seed)
    return fake_outputs(x, weight, reference.h_columns(lora_A, member, len(weight))[-1])


def backward_fake(dy, x, h, route, weight, lora_A, lora_B, member, adapter, scaling, dropout_p, seed, needs):
    return fake_gradients(dy, weight, lora_A, lora_B, needs)


def forward_reference(x, route, *rest):
    check(x, route, *rest)
    M = x.numel() // x.shape[-1]
    require(
        NAME, int(route[3]) == M, f"route must come from batched_lora_route for the {M} rows of x, got {int(route[3])}"
    )
    return reference.forward(x, route, *rest)


def autograd(namespace):
    """The kernel of a namespace's Autograd key."""
    run = differentiable(NAME, namespace.batched_lora.default, namespace.batched_lora_backward.default)

    def kernel(x, route, weight, bias, lora_A, lora_B, lora_bias, member, adapter, scaling, dropout_p, seed):
        tensors = (weight, bias, lora_A, lora_B, lora_bias)
        return run(x, route, tensors, (member, adapter, scaling, dropout_p), seed)

    return kernel


def autocast(namespace, device_type: str):
    """The kernel of a namespace's Autocast key."""
    return autocasting(namespace.batched_lora.default, device_type, routed=1)


def cost(
    x, route, weight, bias, lora_A, lora_B, lora_bias, member, adapter, scaling, dropout_p, seed
) -> dict[str, Cost]:
    """Least flops and bytes; of the adapters only those that some row has, for their rows.

    Forward: x, W, A, B in, y and h out. Backward (dx, dA, dB): dy, x, W, A, B, h in."""
    K, M = x.shape[-1], x.numel() // x.shape[-1]
    N, base = sum(w.shape[0] for w in weight), sum(w.numel() for w in weight)
    rows = [int((row_ids(route, M) == a).sum()) for a in adapter]
    sizes = [a.numel() + b.numel() for a, b in zip(lora_A, lora_B, strict=True)]
    factors = sum(size for size, count in zip(sizes, rows, strict=True) if count)
    low_rank = sum(2 * count * size for size, count in zip(sizes, rows, strict=True))
    h = 4 * sum(count * a.shape[0] for count, a in zip(rows, lora_A, strict=True))
    size, factor_size = x.element_size(), lora_A[0].element_size()
    return {
        "forward": Cost(2 * M * base + low_rank, size * (M * K + base + M * N) + factor_size * factors + h),
        "backward": Cost(
            2 * M * base + 2 * low_rank, size * (M * N + 2 * M * K + base) + 2 * factor_size * factors + h
        ),
    }


BATCHED_LORA = register(
    Op(
        name=NAME,
        formula="y[i] = x[i] W^T + b + s (drop(x)[i] A^T) B^T of the adapter of row i",
        functions=(
            Function("batched_lora", SCHEMA, fake, forward_reference),
            Function("batched_lora_backward", BACKWARD_SCHEMA, backward_fake, reference.backward),
        ),
        samples=samples,
        bad_inputs=bad_inputs,
        evaluate=evaluate,
        cost=cost,
        check=check,
        public="batched_lora",
        autograd=autograd,
        autocast=autocast,
        backends=("reference", "cpu", "triton"),
        python_backends={"triton": "peft_kernels.ops.batched_lora.triton_training"},
    )
)
