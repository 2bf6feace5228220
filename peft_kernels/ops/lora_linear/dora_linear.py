"""DoRA in three calls: lora_linear makes z = x W^T + s x A^T B^T, dora_norm ||W + s B A||, dora_scale y."""

import torch
from torch import Tensor

from peft_kernels.ops.common.dropout import keep_scale
from peft_kernels.ops.common.projections import check_seed
from peft_kernels.ops.lora_linear.dora import check_norm, check_scale
from peft_kernels.ops.lora_linear.op import check


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """||W + s B A|| of every row, without B A (DoRA: Liu et al. 2024, arXiv:2402.09353, eq. 5)

    Args:
        weight: W `[N, K]`, float32, float16, bfloat16 or float64, any strides.
        lora_A, lora_B: `[r, K]` and `[N, r]`, 1 <= r <= 512, of one dtype, their own.
        scaling: s.

    Returns:
        `[N]` in float32 (float64 for float64), not differentiable: the paper takes it as a constant (section 4.3). Of a
        row that s B A nearly takes away, digits are lost, as in any difference; it is never less than 0.

    Raises:
        ValueError, TypeError: a shape, a rank, a dtype, a layout or a device does not fit.

    Example:
        >>> weight, lora_A, lora_B = torch.randn(32, 64), torch.randn(8, 64), torch.zeros(32, 8)
        >>> magnitude = torch.nn.Parameter(peft_kernels.dora_norm(weight, lora_A, lora_B, 2.0))
    """
    arguments = (weight, lora_A, lora_B, scaling)
    try:
        with torch.no_grad():
            return torch.ops.peft_kernels.dora_norm.default(*arguments)
    except (RuntimeError, TypeError):
        check_norm(*arguments)  # says in words what the operator refused
        raise


def dora_scale(
    z: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """y = r + b + (m / norm) z, in a mixed batch with the m and the norm of each row's adapter

    Args:
        z: `[..., N]`, M rows, what the layer and its adapter give without the layer's bias; float32, float16, bfloat16
            or float64, any strides.
        magnitude: m `[N]`, or `[L, N]` with ids; its own dtype.
        norm: `[N]` or `[L, N]`, as `dora_norm` returns it. Not differentiable.
        bias: b `[N]` in z's dtype, or None.
        residual: r of z's shape and dtype, or None.
        ids: int32 `[M]`, or of z's leading shape: the adapter of each row, below L, or -1, where m / norm is 1.

    Returns:
        y of z's shape and dtype; the arithmetic is in float32 (float64 for float64).

    Differentiable in z, magnitude, bias and residual. Kept for the backward: z, if magnitude needs a gradient.

    Raises:
        ValueError, TypeError: a shape, a dtype, a layout or a device does not fit.
        RuntimeError: an id on the CPU is out of range. On a GPU, which is not waited for, such a row counts as -1.

    Example:
        >>> z, norm = torch.randn(4, 32), torch.rand(2, 32) + 1
        >>> magnitude = torch.ones(2, 32, requires_grad=True)
        >>> y = peft_kernels.dora_scale(z, magnitude, norm, ids=torch.tensor([1, 0, -1, 1], dtype=torch.int32))
    """
    arguments = (z, magnitude, norm, bias, residual, ids)
    try:
        return torch.ops.peft_kernels.dora_scale.default(*arguments)
    except (RuntimeError, TypeError):
        check_scale(*arguments)  # says in words what the operator refused
        raise


class _Dropped(torch.autograd.Function):
    """drop(x), whose mask is replayed in the backward."""

    @staticmethod
    def forward(ctx, x, seed, p):
        ctx.save_for_backward(seed)
        ctx.p = p
        return _drop(x, seed, p)

    @staticmethod
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        return _drop(dy, seed, ctx.p), None, None


def _drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    K = x.shape[-1]
    mask = torch.ops.peft_kernels.lora_dropout_mask.default(seed, x.numel() // K, K, p, 0).view(x.shape)
    return torch.where(mask, x * keep_scale(p), 0)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    lora_bias: Tensor | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """y = g (x W^T + s (x A^T B^T + b_B)) + b,  g = m / ||W + s B A||      (DoRA: Liu et al. 2024, arXiv:2402.09353)

    With d = drop(x), as HF PEFT: y = x W^T + b + (g - 1) d W^T + g s (d A^T B^T + b_B), which is the same where nothing
    is dropped, and takes the product of a second activation with W. d has x's dtype, as PEFT's: a float16 x past 65504
    (1 - dropout_p) overflows in it.

    Args:
        x: `[..., K]`; weight: `[N, K]`; bias: `[N]` or None; lora_A: `[r, K]`; lora_B: `[N, r]`; scaling, dropout_p,
            seed, lora_bias: as in `lora_linear`.
        magnitude: m `[N]`; its own dtype.
        norm: what `dora_norm(weight, lora_A, lora_B, scaling)` returned, if nothing of it has changed since: once for
            all calls of an inference. None: it is computed.

    Returns:
        y `[..., N]` in x's dtype.

    Differentiable in x, weight, bias, lora_A, lora_B, lora_bias and magnitude, the norm taken as a constant. Kept for
    the backward: what `lora_linear` keeps, and z, which is m's gradient's, in x's dtype; no mask, no `[N, K]` tensor.

    Raises:
        ValueError, TypeError: as `lora_linear`, `dora_norm` or `dora_scale`, which the message names.

    Example:
        >>> x, weight = torch.randn(4, 64), torch.randn(32, 64)
        >>> lora_A, lora_B = torch.randn(8, 64, requires_grad=True), torch.zeros(32, 8, requires_grad=True)
        >>> magnitude = torch.nn.Parameter(peft_kernels.dora_norm(weight, lora_A, lora_B, 2.0))
        >>> y = peft_kernels.dora_linear(x, weight, None, lora_A, lora_B, magnitude, scaling=2.0)
        >>> y.sum().backward()
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dora_linear: dropout_p must lie in [0, 1), got {dropout_p}")
    check_seed("dora_linear", x, seed, [dropout_p])
    adapter = ([lora_A], [lora_B], [lora_bias], [0], [scaling])
    residual, rest = None, bias  # of the bias
    try:
        dropped = _Dropped.apply(x, seed, dropout_p) if dropout_p else x
        z = torch.ops.peft_kernels.lora_linear.default(dropped, [weight], [None], *adapter, [0.0], None)[0][0]
        if dropout_p:
            residual, rest = torch.nn.functional.linear(x - dropped, weight, bias), None
    except (RuntimeError, TypeError, IndexError, ZeroDivisionError):  # the last two: x without features
        check(x, [weight], [bias], *adapter, [dropout_p], seed)  # says in words what the operator refused
        raise
    if norm is None:
        norm = dora_norm(weight, lora_A, lora_B, scaling)
    return dora_scale(z, magnitude, norm, rest, residual)
