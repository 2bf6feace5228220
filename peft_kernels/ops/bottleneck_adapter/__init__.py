"""bottleneck_adapter: y = r + s (drop(f(norm(x) A^T + a)) B^T + b), serial and parallel adapters in one call."""

import torch
from torch import Tensor

from peft_kernels.ops.bottleneck_adapter.op import check


def bottleneck_adapter(
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    activation: str = "relu",
    scaling: float = 1.0,
    scale: Tensor | None = None,
    gate: Tensor | None = None,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    dropout_on: str = "bottleneck",
    seed: Tensor | None = None,
) -> Tensor:
    """y = r + g s (drop(f(norm(x) A^T + a)) B^T + b)

    Serial adapters (Houlsby et al. 2019, arXiv:1902.00751) read the output of a block, which is r too; parallel ones
    (He et al. 2022, arXiv:2110.04366, table 1) read the block's input x and add to its output r.

    Args:
        x: `[..., K]`, float32, float16, bfloat16 or float64, any strides.
        residual: r `[..., N]` in x's dtype; None: x itself, the serial form, and N = K.
        down_weight: A `[E, K]`, 1 <= E <= 1024; its own dtype, which all that follows has too. float32 adapters on a
            16-bit x are used as they are.
        down_bias: a `[E]`, or None.
        up_weight: B `[N, E]`; up_bias: b `[N]`, or None.
        activation: f: identity, relu, gelu (erf), gelu_tanh, silu, tanh, sigmoid or leaky_relu (slope 0.01).
        scaling: a number that s has as a factor.
        scale: a learned factor of s: `[1]`, or `[N]`, one for each channel; or None.
        gate: g, one number per row of x, `[...]`; or None. 0 or 1 / keep of a whole sample is stochastic depth.
        norm: "none", "layer_norm" or "rms_norm" of x over its K features, on the way to A.
        norm_weight, norm_bias: `[K]` or None; an rms_norm has no bias.
        eps: what the norm adds to the variance.
        dropout_p: probability of dropping an element, in [0, 1).
        dropout_on: "bottleneck", the elements of f(.) (He et al.), or "output", those of (.) B^T + b (AdapterHub).
        seed: 0-d int64 on x's device, from `new_seed`; needed where dropout_p > 0.

    Returns:
        y `[..., N]` in x's dtype, accumulated in float32 (float64 for float64).

    Differentiable in every tensor but the seed. Kept for the backward: x, the bottleneck before f in float32 `[M, E]`,
    and the seed. No mask, no normalised copy of x.

    Raises:
        ValueError: a shape, a size, a name or a number is out of range, or the seed is missing.
        TypeError: a dtype, a layout or a device does not fit.

    Example:
        >>> x, ffn_output = torch.randn(4, 64), torch.randn(4, 64)
        >>> down, up = torch.randn(8, 64, requires_grad=True), torch.zeros(64, 8, requires_grad=True)
        >>> y = peft_kernels.bottleneck_adapter(x, ffn_output, down, None, up, None, activation="relu", scaling=4.0)
        >>> y.sum().backward()
    """
    tensors = (x, residual, down_weight, down_bias, up_weight, up_bias, scale, gate, norm_weight, norm_bias)
    numbers = (activation, scaling, norm, eps, dropout_p, dropout_on, seed)
    try:
        return torch.ops.peft_kernels.bottleneck_adapter.default(*tensors, *numbers)[0]
    except (RuntimeError, TypeError):
        check(*tensors, *numbers)  # says in words what the operator refused
        raise
