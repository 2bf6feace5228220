"""lora_linear as a torch operator: schema, check, fake, autograd, autocast, cost, registration.

One operator serves a single projection (a group of one), groups that share x, and several adapters per projection.
Legend: M rows of x, K in_features, N out_features, R rank; G projections (index g), L adapters (index i).
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels.ops.common.dropout import DROPOUT_MASK
from peft_kernels.ops.lora_linear import reference
from peft_kernels.ops.lora_linear.samples import bad_inputs, evaluate, samples
from peft_kernels.registry import Cost, Function, Op, below_autograd, register

SCHEMA = (
    "(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor[] lora_A, Tensor[] lora_B, Tensor?[] lora_bias, "
    "int[] member, float[] scaling, float[] dropout_p, Tensor? seed) -> (Tensor[] y, Tensor h)"
)
BACKWARD_SCHEMA = (
    "(Tensor[] dy, Tensor? x, Tensor? h, Tensor[] weight, Tensor[] lora_A, Tensor[] lora_B, "
    "int[] member, float[] scaling, float[] dropout_p, Tensor? seed, bool[] needs) -> Tensor[]"
)
MAX_RANK = 512
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


# -- check ------------------------------------------------------------------------------------------------------------


def _require(condition: bool, text: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(f"lora_linear: {text}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensor(name: str, tensor: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...], rule: str) -> None:
    """Type, layout, dtype and device of one tensor; `rule` names the dtypes allowed."""
    _require(isinstance(tensor, Tensor), f"{name} must be a Tensor, got {type(tensor).__name__}", TypeError)
    _require(
        tensor.layout is torch.strided,
        f"{name} must be a dense (strided) tensor, got layout {tensor.layout}",
        TypeError,
    )
    _require(tensor.dtype in dtypes, f"{name} must have dtype {rule}, got {_name(tensor.dtype)}", TypeError)
    _require(tensor.device == x.device, f"{name} must be on x's device {x.device}, got {tensor.device}", TypeError)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], words: str) -> None:
    _require(tuple(tensor.shape) == shape, f"{name} must have shape [{words}], got {list(tensor.shape)}")


def _check_base(x: Tensor, weight: list[Tensor], bias: list[Tensor | None]) -> int:
    """x and the frozen projections; returns K."""
    _check_tensor("x", x, x, FLOATS, "float32, float16, bfloat16 or float64")
    _require(x.dim() >= 1, "x must have shape [..., in_features], got a 0-d tensor")
    _require(len(weight) >= 1, "weight must name at least one projection, got none")
    _require(len(bias) == len(weight), f"bias must have one entry per weight ({len(weight)}), got {len(bias)}")
    K = x.shape[-1]
    _require(K >= 1, f"x must have at least one feature, got shape {list(x.shape)}")
    for g, (w, b) in enumerate(zip(weight, bias, strict=True)):
        _check_tensor(f"weight[{g}]", w, x, (x.dtype,), f"{_name(x.dtype)}, as x")
        _require(
            w.dim() == 2 and w.shape[1] == K and w.shape[0] >= 1,
            f"weight[{g}] must have shape [out_features, in_features={K}], got {list(w.shape)}",
        )
        if b is not None:
            _check_tensor(f"bias[{g}]", b, x, (x.dtype,), f"{_name(x.dtype)}, as weight")
            _check_shape(f"bias[{g}]", b, (w.shape[0],), f"out_features={w.shape[0]}")
    return K


def _check_factors(
    x: Tensor, weight: list[Tensor], lora_A: list[Tensor], lora_B: list[Tensor], lora_bias: list, member: list[int]
) -> None:
    """The adapters' tensors against x and their projections."""
    allowed = (torch.float64,) if x.dtype is torch.float64 else FLOATS[:3]
    rule = "float64, as x" if x.dtype is torch.float64 else "float32, float16 or bfloat16"
    K = x.shape[-1]
    for i, (a, b, c, g) in enumerate(zip(lora_A, lora_B, lora_bias, member, strict=True)):
        _require(0 <= g < len(weight), f"member[{i}] must lie in [0, {len(weight)}), got {g}")
        _check_tensor(f"lora_A[{i}]", a, x, allowed, rule)
        if i == 0:
            allowed, rule = (a.dtype,), f"{_name(a.dtype)}, as lora_A[0]"
        _require(
            a.dim() == 2 and a.shape[1] == K,
            f"lora_A[{i}] must have shape [r, in_features={K}], got {list(a.shape)}",
        )
        r, N = a.shape[0], weight[g].shape[0]
        _require(1 <= r <= MAX_RANK, f"lora_A[{i}] must have a rank r from 1 to {MAX_RANK}, got {r}")
        _check_tensor(f"lora_B[{i}]", b, x, allowed, rule)
        _check_shape(f"lora_B[{i}]", b, (N, r), f"out_features={N}, r={r}")
        if c is not None:
            _check_tensor(f"lora_bias[{i}]", c, x, allowed, rule)
            _check_shape(f"lora_bias[{i}]", c, (N,), f"out_features={N}")


def check(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed) -> None:
    """Refuses what the op cannot take, in words. The C++ bindings repeat the rules and the texts."""
    _check_base(x, weight, bias)
    L = len(lora_A)
    _require(L >= 1, "lora_A must name at least one adapter, got none")
    lists = {"lora_B": lora_B, "lora_bias": lora_bias, "member": member, "scaling": scaling, "dropout_p": dropout_p}
    for name, entries in lists.items():
        _require(len(entries) == L, f"{name} must have one entry per lora_A ({L}), got {len(entries)}")
    _check_factors(x, weight, lora_A, lora_B, lora_bias, member)
    for i, (s, p) in enumerate(zip(scaling, dropout_p, strict=True)):
        _require(math.isfinite(s), f"scaling[{i}] must be finite, got {s}")
        _require(0 <= p < 1, f"dropout_p[{i}] must lie in [0, 1), got {p}")
    if any(p > 0 for p in dropout_p):
        _require(seed is not None, "seed must be given where dropout_p > 0; peft_kernels.new_seed(x.device) makes one")
    if seed is not None:  # read even where nothing is dropped
        _check_tensor("seed", seed, x, (torch.int64,), "int64")
        _require(seed.dim() == 0, f"seed must be a 0-d tensor, got shape {list(seed.shape)}")


# -- fake -------------------------------------------------------------------------------------------------------------


def _factor_accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def fake(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed):
    check(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed)
    rows = math.prod(x.shape[:-1])
    h = x.new_empty((rows, sum(a.shape[0] for a in lora_A)), dtype=_factor_accumulator(x))
    return [x.new_empty((*x.shape[:-1], w.shape[0])) for w in weight], h


def backward_fake(dy, x, h, weight, lora_A, lora_B, member, scaling, dropout_p, seed, needs):
    dx = dy[0].new_empty((*dy[0].shape[:-1], weight[0].shape[1]))
    bias = [w.new_empty(w.shape[0]) for w in weight]
    lora_bias = [b.new_empty(b.shape[0]) for b in lora_B]
    weights, a, b = ([t.new_empty(t.shape) for t in group] for group in (weight, lora_A, lora_B))
    full = [dx, *weights, *bias, *a, *b, *lora_bias]
    return [tensor if need else tensor.new_empty(0) for tensor, need in zip(full, needs, strict=True)]


def forward_reference(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed):
    check(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed)
    return reference.forward(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed)


# -- autograd and autocast --------------------------------------------------------------------------------------------


def autograd(namespace):
    """The kernel of a namespace's Autograd key: a plain call where nothing needs a gradient, else one Function.

    A Function on the key costs 25-40 us less per call than torch.library.register_autograd.
    """
    forward_op, backward_op = namespace.lora_linear.default, namespace.lora_linear_backward.default

    class LoraLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, lists, seed, x, *tensors):
            # tensors: G weight, G bias, L lora_A, L lora_B, L lora_bias
            member, scaling, dropout_p = lists
            L = len(member)
            G = (len(tensors) - 3 * L) // 2
            weight, bias, a, b, c = _split(tensors, G, L)
            with below_autograd():
                y, h = forward_op(x, weight, bias, a, b, c, member, scaling, dropout_p, seed)
            needs = ctx.needs_input_grad[2:]
            reads_x = any(needs[1 : 1 + G]) or any(needs[1 + 2 * G : 1 + 2 * G + L])
            reads_h = any(needs[1 + 2 * G + L : 1 + 2 * G + 2 * L])
            ctx.save_for_backward(x if reads_x else None, h if reads_h else None, seed, *weight, *a, *b)
            ctx.lists = lists
            ctx.mark_non_differentiable(h)
            ctx.set_materialize_grads(False)
            return (*y, h)

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            dy = grads[:-1]
            needs = ctx.needs_input_grad[2:]
            if all(d is None for d in dy):
                return (None,) * (2 + len(needs))
            x, h, seed, *tensors = ctx.saved_tensors
            member, scaling, dropout_p = ctx.lists
            G, L = len(dy), len(member)
            weight, a, b = tensors[:G], tensors[G : G + L], tensors[G + L :]
            if any(d is None for d in dy):  # a projection whose output was not used
                like = next(d for d in dy if d is not None)
                dy = [
                    like.new_zeros((*like.shape[:-1], w.shape[0])) if d is None else d
                    for d, w in zip(dy, weight, strict=True)
                ]
            out = backward_op(dy, x, h, weight, a, b, member, scaling, dropout_p, seed, needs)
            return (None, None, *(grad if need else None for grad, need in zip(out, needs, strict=True)))

    def kernel(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed):
        if torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, lora_A, lora_B, lora_bias):
            tensors = (*weight, *bias, *lora_A, *lora_B, *lora_bias)
            *y, h = LoraLinear.apply((member, scaling, dropout_p), seed, x, *tensors)
            return y, h
        with below_autograd():
            return forward_op(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed)

    return kernel


def _split(tensors, G: int, L: int):
    return (
        tensors[:G],
        tensors[G : 2 * G],
        tensors[2 * G : 2 * G + L],
        tensors[2 * G + L : 2 * G + 2 * L],
        tensors[2 * G + 2 * L :],
    )


def _any_requires_grad(x, *lists) -> bool:
    if x.requires_grad:
        return True
    for tensors in lists:
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def autocast(namespace, device_type: str):
    """Under autocast x, weight and bias take the autocast dtype, as in F.linear; the factors keep their own."""
    forward_op = namespace.lora_linear.default
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def kernel(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed):
        dtype = torch.get_autocast_dtype(device_type)

        def cast(tensor):
            eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
            return tensor.to(dtype) if eligible else tensor

        with torch._C._ExcludeDispatchKeyGuard(key):
            return forward_op(
                cast(x), [cast(w) for w in weight], [cast(b) for b in bias],
                lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed,
            )  # fmt: skip

    return kernel


# -- cost and registration --------------------------------------------------------------------------------------------


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
        backends=("reference", "cpu", "triton"),
        python_backends={"triton": "peft_kernels.ops.lora_linear.triton_kernel"},
    )
)
