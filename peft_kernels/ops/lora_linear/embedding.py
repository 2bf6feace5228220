"""lora_embedding as a torch operator: what LoRA adapters add to rows of a frozen table of embeddings. Public function,
schema, check, fake, autograd, autocast, cost, registration. Nothing is cast under autocast: F.embedding is not either.

Legend: M ids, V rows of the table, N their size (embedding_dim), R rank; L adapters (index i).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peft_kernels.ops.common.projections import (
    FLOATS,
    MAX_RANK,
    accumulator,
    any_requires_grad,
    as_list,
    as_numbers,
    check_shape,
    check_tensor,
    dtype_name,
    refuse_tangents,
    require,
)
from peft_kernels.ops.lora_linear import embedding_reference
from peft_kernels.ops.lora_linear.embedding_samples import bad_inputs, evaluate, samples
from peft_kernels.registry import Cost, Function, Op, below_autograd, register

NAME = "lora_embedding"
ARGUMENTS = "Tensor[] lora_A, Tensor[] lora_B, float[] scaling, int? padding_idx"
SCHEMA = f"(Tensor residual, Tensor ids, {ARGUMENTS}) -> (Tensor y, Tensor h)"
BACKWARD_SCHEMA = f"(Tensor dy, Tensor ids, Tensor? h, {ARGUMENTS}, bool[] needs) -> Tensor[]"


def lora_embedding(
    residual: Tensor,
    ids: Tensor,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    *,
    scaling: float | Sequence[float] = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """y = r + sum over the adapters l of s_l A_l[:, ids]^T B_l^T,  r = embedding(ids)

    LoRA (arXiv:2106.09685) on a frozen table of embeddings: columns of A are gathered, the residual r is read once and
    y written once. A contiguous A is not copied, and nothing has the size of the table but the gradient of A.

    Args:
        residual: `[..., N]`, float32, float16, bfloat16 or float64, any strides: what the frozen table gave for ids.
        ids: `[...]`, int64 or int32, in [0, V). On "cpu" and "reference" another one is refused; on a GPU, where the
            table itself has refused it, nothing is added for it.
        lora_A: `[r, V]`, 1 <= r <= 512, its own dtype; or a sequence of them, with sequences for what follows: several
            active adapters, whose ranks may differ.
        lora_B: `[N, r]`, lora_A's dtype.
        scaling: s, alpha / r in HF PEFT, times what the table's rows are multiplied by where they are (Gemma).
        padding_idx: the id in [0, V) whose column of A has no gradient, as the table's row has none; or None.

    Returns:
        y `[..., N]` in the residual's dtype, accumulated in float32 (float64 for float64) and rounded once; on "cuda"
        once per 32 adapters.

    Differentiable in residual, lora_A and lora_B. Kept for the backward: ids, B where A is
    trained, and h = s A[:, ids]^T in float32 `[M, r]` where B is.
    The gradient of A is dense; every column is a sum over sorted ids, the same in every run.

    Raises:
        ValueError: a shape, a rank, a scaling or padding_idx is out of range.
        TypeError: a dtype, a layout or a device does not fit.
        IndexError: an id is out of range, on "cpu" and "reference".

    Example:
        >>> table, ids = torch.nn.Embedding(100, 32), torch.randint(100, (2, 7))
        >>> lora_A, lora_B = torch.zeros(8, 100, requires_grad=True), torch.randn(32, 8, requires_grad=True)
        >>> y = peft_kernels.lora_embedding(table(ids), ids, lora_A, lora_B, scaling=2.0)
        >>> y.sum().backward()
    """
    lora_A, lora_B = (as_list(NAME, *named) for named in (("lora_A", lora_A), ("lora_B", lora_B)))
    arguments = (residual, ids, lora_A, lora_B, as_numbers(NAME, "scaling", scaling, len(lora_A)), padding_idx)
    try:
        return torch.ops.peft_kernels.lora_embedding.default(*arguments)[0]
    except (RuntimeError, TypeError, AttributeError, IndexError):
        check(*arguments)  # says in words what the operator refused
        _check_range(ids, lora_A[0].shape[1])
        raise


def check(residual, ids, lora_A, lora_B, scaling, padding_idx, op=NAME, rows="residual") -> None:
    """Refuses what the op cannot take, in words. The C++ bindings repeat the rules and the texts."""
    check_tensor(op, rows, residual, residual, FLOATS, "float32, float16, bfloat16 or float64")
    check_tensor(op, "ids", ids, residual, (torch.int64, torch.int32), "int64 or int32", rows)
    lead = list(ids.shape)
    require(
        op,
        residual.dim() == len(lead) + 1 and list(residual.shape[:-1]) == lead and residual.shape[-1] >= 1,
        f"{rows} must have the sizes of ids {lead} and then embedding_dim, got shape {list(residual.shape)}",
    )
    require(op, len(lora_A) >= 1, "lora_A must name at least one adapter, got none")
    for name, entries in {"lora_B": lora_B, "scaling": scaling}.items():
        text = f"{name} must have one entry per lora_A ({len(lora_A)}), got {len(entries)}"
        require(op, len(entries) == len(lora_A), text)
    _check_factors(op, rows, residual, lora_A, lora_B)
    for i, s in enumerate(scaling):
        require(op, math.isfinite(s), f"scaling[{i}] must be finite, got {s}")
    V, kind = lora_A[0].shape[1], type(padding_idx).__name__
    require(op, isinstance(padding_idx, int | None), f"padding_idx must be an int or None, got {kind}", TypeError)
    require(op, padding_idx is None or 0 <= padding_idx < V, f"padding_idx must lie in [0, {V}), got {padding_idx}")


def _check_range(ids, V: int) -> None:
    """Reads the ids: for a call that was refused. On a GPU none is for its ids."""
    outside = ids[(ids < 0) | (ids >= V)] if ids.is_cpu else ()
    if len(outside):
        raise IndexError(f"{NAME}: ids must lie in [0, {V}), got {outside[0].item()}")


def _check_factors(op: str, rows: str, residual, lora_A, lora_B) -> None:
    is_double, N, V = residual.dtype is torch.float64, residual.shape[-1], None
    allowed = (torch.float64,) if is_double else FLOATS[:3]
    rule = f"float64, as {rows}" if is_double else "float32, float16 or bfloat16"
    for i, (a, b) in enumerate(zip(lora_A, lora_B, strict=True)):
        check_tensor(op, f"lora_A[{i}]", a, residual, allowed, rule, rows)
        if i == 0:
            allowed, rule = (a.dtype,), f"{dtype_name(a.dtype)}, as lora_A[0]"
        words = "num_embeddings" if V is None else f"num_embeddings={V}"
        fits = a.dim() == 2 and a.shape[1] >= 1 and V in (None, a.shape[1])
        require(op, fits, f"lora_A[{i}] must have shape [r, {words}], got {list(a.shape)}")
        r, V = a.shape
        require(op, 1 <= r <= MAX_RANK, f"lora_A[{i}] must have a rank r from 1 to {MAX_RANK}, got {r}")
        check_tensor(op, f"lora_B[{i}]", b, residual, allowed, rule, rows)
        check_shape(op, f"lora_B[{i}]", b, (N, r), f"[embedding_dim={N}, r={r}]")


def check_backward(dy, ids, h, lora_A, lora_B, scaling, padding_idx, needs) -> None:
    """The same for the backward. h may be None where no gradient of lora_B is needed."""
    op, L = "lora_embedding_backward", len(lora_A)
    require(op, len(needs) == 2 * L, f"needs must have {2 * L} entries, got {len(needs)}")
    check(dy, ids, lora_A, lora_B, scaling, padding_idx, op, "dy")
    if h is not None:
        shape = (ids.numel(), sum(a.shape[0] for a in lora_A))
        fits = h.device == dy.device and h.dtype is accumulator(dy.dtype) and h.is_contiguous()
        require(op, fits and tuple(h.shape) == shape, "h must be the contiguous [M, R] that the forward returned")
    require(op, h is not None or not any(needs[L:]), "h must be given for gradients of lora_B")


# -- fake and reference -----------------------------------------------------------------------------------------------


def fake(residual, ids, lora_A, lora_B, scaling, padding_idx):
    check(residual, ids, lora_A, lora_B, scaling, padding_idx)
    width = sum(a.shape[0] for a in lora_A)
    return (
        residual.new_empty(residual.shape),
        residual.new_empty((math.prod(ids.shape), width), dtype=accumulator(residual.dtype)),
    )


def backward_fake(dy, ids, h, lora_A, lora_B, scaling, padding_idx, needs):
    full = [t.new_empty(t.shape) for t in (*lora_A, *lora_B)]
    return [tensor if need else tensor.new_empty(0) for tensor, need in zip(full, needs, strict=True)]


def forward_reference(residual, ids, lora_A, lora_B, scaling, padding_idx):
    check(residual, ids, lora_A, lora_B, scaling, padding_idx)
    return embedding_reference.forward(residual, ids, lora_A, lora_B, scaling, padding_idx)


# -- autograd and autocast --------------------------------------------------------------------------------------------


def autograd(namespace):
    """The kernel of a namespace's Autograd key: a plain call where nothing needs a gradient, else one Function."""
    forward_op, backward_op = namespace.lora_embedding.default, namespace.lora_embedding_backward.default

    class Embedded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, scaling, padding_idx, ids, residual, *factors):
            L = len(scaling)
            with below_autograd():
                y, h = forward_op(residual, ids, factors[:L], factors[L:], scaling, padding_idx)
            needs = ctx.needs_input_grad[4:]
            if any(needs):
                read = factors[L:] if any(needs[:L]) else ()
                ctx.save_for_backward(ids, h if any(needs[L:]) else None, *read)
            ctx.unread = [t.detach() for t in factors]  # A, and B where it is not read, give their shapes alone
            ctx.rest = scaling, padding_idx
            ctx.mark_non_differentiable(h)
            ctx.set_materialize_grads(False)
            return y, h

        @staticmethod
        @once_differentiable
        def backward(ctx, dy, _):
            needs = ctx.needs_input_grad[4:]
            if dy is None or not any(needs):
                return (None, None, None, dy, *(None for _ in needs))
            ids, h, *read = ctx.saved_tensors
            L = len(needs) // 2
            out = backward_op(dy, ids, h, ctx.unread[:L], read or ctx.unread[L:], *ctx.rest, needs)
            return (None, None, None, dy, *(grad if need else None for grad, need in zip(out, needs, strict=True)))

    def kernel(residual, ids, lora_A, lora_B, scaling, padding_idx):
        tensors = (lora_A, lora_B)
        refuse_tangents(NAME, residual, tensors)
        if torch.is_grad_enabled() and any_requires_grad(residual, tensors):
            return Embedded.apply(scaling, padding_idx, ids, residual, *lora_A, *lora_B)
        with below_autograd():
            return forward_op(residual, ids, lora_A, lora_B, scaling, padding_idx)

    return kernel


def _uncast(operator, device_type: str):
    """The kernel of an operator's Autocast key: neither its arguments nor the products inside are cast."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def kernel(*arguments):
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operator(*arguments)

    return kernel


def autocast(namespace, device_type: str):
    return _uncast(namespace.lora_embedding.default, device_type)


def above_backward(namespace) -> dict:
    operator = namespace.lora_embedding_backward.default
    return {f"Autocast{device}": _uncast(operator, device.lower()) for device in ("CPU", "CUDA")}


# -- cost and registration --------------------------------------------------------------------------------------------


def cost(residual, ids, lora_A, lora_B, scaling, padding_idx) -> dict[str, Cost]:
    """Least flops and bytes. Forward: r, ids, a column of A per id, B in, y and h out. Backward (dA, dB): dy, ids, h, B
    in, dA and dB out, dA whole."""
    M, size, factor_size = ids.numel(), residual.element_size(), lora_A[0].element_size()
    R, b, a = sum(a.shape[0] for a in lora_A), sum(b.numel() for b in lora_B), sum(a.numel() for a in lora_A)
    flops, rows = 2 * M * b, ids.element_size() * M + 4 * M * R
    return {
        "forward": Cost(flops, 2 * size * residual.numel() + factor_size * (M * R + b) + rows),
        "backward": Cost(2 * flops, size * residual.numel() + factor_size * (a + 2 * b) + rows),
    }


LORA_EMBEDDING = register(
    Op(
        name=NAME,
        formula="y = r + s A[:, ids]^T B^T",
        functions=(
            Function(NAME, SCHEMA, fake, forward_reference),
            Function(
                "lora_embedding_backward", BACKWARD_SCHEMA, backward_fake, embedding_reference.backward, above_backward
            ),
        ),
        samples=samples,
        bad_inputs=bad_inputs,
        evaluate=evaluate,
        cost=cost,
        check=check,
        public=NAME,
        rows="residual",
        autograd=autograd,
        autocast=autocast,
        backends=("reference", "cpu", "cuda", "triton"),
        python_backends={"triton": "peft_kernels.ops.lora_linear.triton_embedding"},
    )
)
