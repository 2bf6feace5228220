"""lora_linear: y = x W^T + b + s (drop(x) A^T) B^T, the frozen layer and its LoRA adapters in one call; and lora_add,
the adapters alone, for a frozen layer that is somebody else's kernel; and what is beside them in files of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_kernels.ops.common.in_place import call_in_place
from peft_kernels.ops.common.projections import as_list, as_numbers
from peft_kernels.ops.lora_linear import add
from peft_kernels.ops.lora_linear.dora_linear import dora_linear, dora_norm, dora_scale
from peft_kernels.ops.lora_linear.embedding import lora_embedding
from peft_kernels.ops.lora_linear.mlp import lora_mlp
from peft_kernels.ops.lora_linear.op import check

__all__ = [
    "dora_linear",
    "dora_norm",
    "dora_scale",
    "lora_add",
    "lora_add_",
    "lora_embedding",
    "lora_linear",
    "lora_linear_group",
    "lora_mlp",
]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    lora_bias: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b + s ((drop(x) A^T) B^T + b_B)          (LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3)

    Args:
        x: `[..., K]` (K = in_features), float32, float16, bfloat16 or float64, any strides.
        weight: `[N, K]` (N = out_features), x's dtype, any strides: a Conv1D weight `[K, N]` is passed as `weight.t()`.
        bias: `[N]` in weight's dtype, or None.
        lora_A: `[r, K]`, 1 <= r <= 512; its own dtype. float32 factors on a 16-bit x are used as they are, without a
            float32 copy of x.
        lora_B: `[N, r]`, lora_A's dtype.
        scaling: s, alpha / r in HF PEFT.
        dropout_p: probability of dropping an element of x on its way to A, in [0, 1).
        seed: 0-d int64 on x's device, from `new_seed`; needed where dropout_p > 0.
        lora_bias: b_B `[N]` in lora_A's dtype, or None.

    Returns:
        y `[..., N]` in x's dtype, accumulated in float32 (float64 for float64).

    Differentiable in x, weight, bias, lora_A, lora_B and lora_bias; only gradients that are needed are computed.
    Kept for the backward: x itself, h = s drop(x) A^T in float32 `[M, r]`, and the seed. No mask, no dropped copy of x.

    Raises:
        ValueError: a shape, a rank, a probability or a scaling is out of range, or the seed is missing.
        TypeError: a dtype, a layout or a device does not fit.

    Example:
        >>> x, weight = torch.randn(4, 64), torch.randn(32, 64)
        >>> lora_A, lora_B = torch.randn(8, 64, requires_grad=True), torch.zeros(32, 8, requires_grad=True)
        >>> y = peft_kernels.lora_linear(x, weight, None, lora_A, lora_B, scaling=2.0)
        >>> y.sum().backward()
    """
    arguments = (x, [weight], [bias], [lora_A], [lora_B], [lora_bias], [0], [scaling], [dropout_p], seed)
    try:
        return torch.ops.peft_kernels.lora_linear.default(*arguments)[0][0]
    except (RuntimeError, TypeError):
        check(*arguments)  # says in words what the operator refused
        raise


def lora_linear_group(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    *,
    member: Sequence[int],
    scaling: Sequence[float],
    dropout_p: Sequence[float] | None = None,
    seed: Tensor | None = None,
    lora_bias: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Several projections of one x, each with any number of adapters: q, k and v, or gate and up, in one call.

    y_g = x W_g^T + b_g + sum over the adapters l with member[l] = g of s_l ((drop_l(x) A_l^T) B_l^T + b_Bl)

    x is read once for all adapters; in the backward dx is one sum over all members. Two adapters with the same
    member are two active adapters of one layer. Each adapter has its own dropout mask (stream l of the one seed).

    Args:
        x: `[..., K]`; weight: G tensors `[N_g, K]`; bias: G of `[N_g]` or None.
        lora_A, lora_B: L tensors `[r_l, K]` and `[N_member[l], r_l]`, all of one dtype; ranks may differ.
        member: L projection indices; a projection without an adapter is a plain linear layer.
        scaling, dropout_p: L floats (dropout_p None: no dropout); lora_bias: L of `[N_member[l]]` or None, or None.
        seed: as in `lora_linear`.

    Returns:
        G tensors `[..., N_g]`.

    Raises:
        ValueError, TypeError: as `lora_linear`, naming the entry, or because two lists differ in length.

    Example:
        >>> q, v = peft_kernels.lora_linear_group(
        ...     x, [w_q, w_v], [None, None], [a_q, a_v], [b_q, b_v], member=[0, 1], scaling=[2.0, 2.0])
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
    )
    try:
        return torch.ops.peft_kernels.lora_linear.default(*arguments)[0]
    except (RuntimeError, TypeError):
        check(*arguments)
        raise


def lora_add(
    residual: Tensor,
    x: Tensor,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    *,
    scaling: float | Sequence[float] = 1.0,
    dropout_p: float | Sequence[float] = 0.0,
    seed: Tensor | None = None,
    lora_bias: Tensor | Sequence[Tensor | None] | None = None,
) -> Tensor:
    """y = r + sum over the adapters l of s_l ((drop_l(x) A_l^T) B_l^T + b_Bl),  r = base(x)

    LoRA (arXiv:2106.09685) on a frozen layer that is somebody else's kernel: 4-bit, 8-bit, a tensor subclass. The
    residual r is read once and y written once; x is not copied to another dtype, and nothing is cloned, except that
    "cuda" copies r into y first for dtypes that the tensor cores do not serve (float32, float64, float16 beside
    bfloat16).

    Args:
        residual: `[..., N]`, what the frozen layer made of x; x's leading sizes and dtype, any strides.
        x: `[..., K]`, float32, float16, bfloat16 or float64, any strides.
        lora_A: `[r, K]`, 1 <= r <= 512, its own dtype; or a sequence of them, with sequences for what follows: several
            active adapters, whose ranks may differ.
        lora_B: `[N, r]`, lora_A's dtype.
        scaling, dropout_p: s and the probability of dropping an element of x, as in `lora_linear`; a number stands for
            all adapters.
        seed: 0-d int64 on x's device, from `new_seed`; needed where dropout_p > 0.
        lora_bias: b_B `[N]` in lora_A's dtype, or None.

    Returns:
        y `[..., N]` in x's dtype, accumulated in float32 (float64 for float64) and rounded once; on "cuda" once per 32
        adapters.

    Differentiable in residual, x, lora_A, lora_B and lora_bias. Kept for the backward: x itself, h = s drop(x) A^T in
    float32 `[M, r]`, and the seed; the residual is not kept.

    Raises:
        ValueError: a shape, a rank, a probability or a scaling is out of range, or the seed is missing.
        TypeError: a dtype, a layout or a device does not fit.

    Example:
        >>> x, base = torch.randn(4, 64), torch.nn.Linear(64, 32)
        >>> lora_A, lora_B = torch.randn(8, 64, requires_grad=True), torch.zeros(32, 8, requires_grad=True)
        >>> y = peft_kernels.lora_add(base(x), x, lora_A, lora_B, scaling=2.0)
    """
    arguments = (residual, x, *_adapters("lora_add", lora_A, lora_B, lora_bias, scaling, dropout_p), seed)
    try:
        return torch.ops.peft_kernels.lora_add.default(*arguments)[0]
    except (RuntimeError, TypeError, AttributeError):
        add.check(*arguments)  # says in words what the operator refused
        raise


def lora_add_(
    residual: Tensor,
    x: Tensor,
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    *,
    scaling: float | Sequence[float] = 1.0,
    dropout_p: float | Sequence[float] = 0.0,
    seed: Tensor | None = None,
    lora_bias: Tensor | Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The same written into the residual, for inference: no memory but h.

    Arguments as in `lora_add`; the residual must be contiguous. x may be the residual itself, or overlap it: it is read
    before anything is written. Not under autocast, which cannot change the dtype of what is written to.

    Returns:
        The residual.

    Raises:
        RuntimeError: a tensor requires a gradient, which this form does not have.
        ValueError, TypeError: as `lora_add`.

    Example:
        >>> with torch.no_grad():
        ...     y = peft_kernels.lora_add_(base(x), x, lora_A, lora_B, scaling=2.0)
    """
    arguments = (residual, x, *_adapters("lora_add_", lora_A, lora_B, lora_bias, scaling, dropout_p), seed)
    try:
        call_in_place(torch.ops.peft_kernels.lora_add_.default, *arguments)
    except (RuntimeError, TypeError, AttributeError):
        add.check_in_place(*arguments)
        raise
    return residual


def _adapters(op: str, lora_A, lora_B, lora_bias, scaling, dropout_p) -> tuple[list, ...]:
    """One adapter or several as the lists of the operator."""
    a, b = (as_list(op, *named) for named in (("lora_A", lora_A), ("lora_B", lora_B)))
    c = [None] * len(a) if lora_bias is None else as_list(op, "lora_bias", lora_bias)
    numbers = {"scaling": scaling, "dropout_p": dropout_p}
    return a, b, c, *(as_numbers(op, name, given, len(a)) for name, given in numbers.items())
