"""bottleneck_adapter in plain PyTorch: the definition that every backend is measured against. Never optimised.

y = r + g s drop_o(t),   t = u B^T + b,   u = drop_b(f(h)),   h = n(x) A^T + a
x [..., K] of M rows, r [..., N] (x itself where it is not given), A [E, K], a [E], B [N, E], b [N]; s a float times a
learned number or channel vector [N], g [...] one gate per row, n nothing, a LayerNorm or an RMSNorm over K, f the
activation; one of the two dropouts at most. h [M, E] is kept for the backward, which draws masks and norms again.
Houlsby et al. 2019 (arXiv:1902.00751), He et al. 2022 (arXiv:2110.04366, table 1). Arithmetic in fp32 for all 16- and
32-bit inputs, in fp64 for fp64.
"""

from torch import Tensor

from peft_kernels.ops.common.activations import EXACT, SLOPES
from peft_kernels.ops.common.dropout import drop, scaled_mask
from peft_kernels.ops.common.projections import accumulator


def _normed(rows: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """Rows before the norm's weight and bias, and the reciprocal of their deviation [M, 1]."""
    if norm == "none":
        return rows, rows.new_ones(len(rows), 1)
    centred = rows - rows.mean(1, keepdim=True) if norm == "layer_norm" else rows
    reciprocal = (centred.square().mean(1, keepdim=True) + eps).rsqrt()
    return centred * reciprocal, reciprocal


def _affine(normed: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
    weighted = normed if norm_weight is None else normed * norm_weight.to(normed.dtype)
    return weighted if norm_bias is None else weighted + norm_bias.to(normed.dtype)


def _scale(scaling: float, scale: Tensor | None, like: Tensor) -> Tensor:
    """s: [1] or [N]."""
    return like.new_full((1,), scaling) if scale is None else scaling * scale.to(like.dtype)


def _mask(on: str, wanted: str, seed, like: Tensor, p: float) -> Tensor | None:
    return scaled_mask(seed, *like.shape, p, 0, like.dtype) if on == wanted else None


def forward(
    x: Tensor,
    residual: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    scaling: float,
    norm: str,
    eps: float,
    dropout_p: float,
    dropout_on: str,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and h."""
    dtype, N = accumulator(x.dtype), up_weight.shape[0]
    rows = x.reshape(-1, x.shape[-1]).to(dtype)  # [M, K]
    normed = _affine(_normed(rows, norm, eps)[0], norm_weight, norm_bias)
    h = normed @ down_weight.to(dtype).mT  # [M, E]
    if down_bias is not None:
        h += down_bias.to(dtype)
    u = drop(EXACT[activation](h), _mask(dropout_on, "bottleneck", seed, h, dropout_p))
    t = u @ up_weight.to(dtype).mT  # [M, N]
    if up_bias is not None:
        t += up_bias.to(dtype)
    t = drop(t, _mask(dropout_on, "output", seed, t, dropout_p)) * _scale(scaling, scale, t)
    if gate is not None:
        t *= gate.reshape(-1, 1).to(dtype)
    y = (x if residual is None else residual).reshape(-1, N).to(dtype) + t
    return y.to(x.dtype).reshape(*x.shape[:-1], N), h


def backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    activation: str,
    scaling: float,
    norm: str,
    eps: float,
    dropout_p: float,
    dropout_on: str,
    seed: Tensor | None,
    serial: bool,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (x, down_weight, down_bias, up_weight, up_bias, scale, gate, norm_weight, norm_bias); an empty
    tensor where `needs` says no. r's is dy; where x is r too (`serial`), dx has it.

    d = drop_o(dy)                          dB = s . (d^T (g u)),  db = s . colsum(g d)
    v = (d . s) B                           ds = rowsum(B . (d^T (g u))) + b . colsum(g d), summed if s is one number
    dh = f'(h) . drop_b(g v)                dg = rowsum(v . u) + d (s . b)
    dx = n'(x)(dh A) [+ dy]                 dA = dh^T n(x),  da = colsum(dh)
    """
    dtype, K, N = accumulator(x.dtype), x.shape[-1], up_weight.shape[0]
    dys = dy.reshape(-1, N).to(dtype)
    rows = x.reshape(-1, K).to(dtype)
    B, s = up_weight.to(dtype), _scale(scaling, scale, dys)
    b = dys.new_zeros(N) if up_bias is None else up_bias.to(dtype)
    g = dys.new_ones(len(dys), 1) if gate is None else gate.reshape(-1, 1).to(dtype)
    d = drop(dys, _mask(dropout_on, "output", seed, dys, dropout_p))
    mask = _mask(dropout_on, "bottleneck", seed, h, dropout_p)
    u = drop(EXACT[activation](h), mask)
    v = (d * s) @ B  # [M, E]
    dh = SLOPES[activation](h) * drop(g * v, mask)
    unscaled_B, unscaled_b = d.mT @ (g * u), (g * d).sum(0)  # [N, E], [N]
    normed, reciprocal = _normed(rows, norm, eps)

    def dx():
        out = dh @ down_weight.to(dtype)  # [M, K]
        if norm != "none":
            out = out if norm_weight is None else out * norm_weight.to(dtype)
            mean = out.mean(1, keepdim=True) if norm == "layer_norm" else 0
            out = reciprocal * (out - mean - normed * (out * normed).mean(1, keepdim=True))
        return (out + dys if serial else out).to(x.dtype).reshape(x.shape)

    def dscale():
        channels = scaling * ((B * unscaled_B).sum(1) + b * unscaled_b)
        return channels if scale.shape[0] == N else channels.sum(0, keepdim=True)

    makers = [
        dx,
        lambda: dh.mT @ _affine(normed, norm_weight, norm_bias),
        lambda: dh.sum(0),
        lambda: s[:, None] * unscaled_B,
        lambda: s * unscaled_b,
        dscale,
        lambda: ((v * u).sum(1) + d @ (s * b)).reshape(x.shape[:-1]),
        lambda: ((dh @ down_weight.to(dtype)) * normed).sum(0),
        lambda: (dh @ down_weight.to(dtype)).sum(0),
    ]
    like = [x] + [down_weight] * 8
    return [(make() if need else t.new_empty(0)).to(t.dtype) for make, t, need in zip(makers, like, needs, strict=True)]
