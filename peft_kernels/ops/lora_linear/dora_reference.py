"""DoRA in plain PyTorch: the definition that every backend is measured against. Never optimised.

norm = ||W + s B A|| along K [N], which takes part in no gradient                   (Liu et al. 2024, arXiv:2402.09353)
y = r + b + g z,  g = m / norm,  or m[a] / norm[a] of the adapter a of a row, and 1 for a row without one
dz = g dy, dm = sum over the rows (of an adapter) of dy z / norm, db = sum over the rows of dy; dr is dy itself
z [..., N], W [N, K], A [R, K], B [N, R], m and norm [N], or [L, N] with ids. Arithmetic in fp32 for all 16- and 32-bit
inputs, in fp64 for fp64; the norm stays so, and every other result is rounded once.
"""

import torch
from torch import Tensor

from peft_kernels.ops.common.projections import accumulator, require


def norm(weight, lora_A, lora_B, scaling) -> Tensor:
    wide = accumulator(weight.dtype)
    dense = weight.to(wide) + scaling * (lora_B.to(wide) @ lora_A.to(wide))  # [N, K]
    return torch.linalg.vector_norm(dense, dim=1)


def _adapters(ids: Tensor, adapters: int, op: str) -> tuple[Tensor, Tensor]:
    """The adapter of each row, and which rows have one. A GPU is not waited for: there an id that is out of range
    counts as none."""
    flat = ids.reshape(-1).long()
    if not flat.is_cuda:
        outside = flat[(flat < -1) | (flat >= adapters)].tolist()
        first = outside[0] if outside else 0
        text = f"ids must be -1 or lie in [0, {adapters}), got {first} ({len(outside)} of {len(flat)} rows)"
        require(op, not outside, text)
    valid = (flat >= 0) & (flat < adapters)
    return torch.where(valid, flat, 0), valid


def _gain(magnitude, norm, ids, op: str) -> Tensor:
    """[N], or [M, N] with ids."""
    gain = magnitude.to(norm.dtype) / norm
    if ids is None:
        return gain
    own, valid = _adapters(ids, norm.shape[0], op)
    return torch.where(valid[:, None], gain[own], 1)


def scale(z, magnitude, norm, bias, residual, ids) -> Tensor:
    wide, N = norm.dtype, z.shape[-1]
    y = z.to(wide).reshape(-1, N) * _gain(magnitude, norm, ids, "dora_scale")
    if bias is not None:
        y = y + bias.to(wide)
    if residual is not None:
        y = y + residual.to(wide).reshape(-1, N)
    return y.to(z.dtype).reshape(z.shape).contiguous()


def _magnitude_gradient(dy, z, norm, ids) -> Tensor:
    products = dy * z.to(norm.dtype).reshape(dy.shape)
    if ids is None:
        return products.sum(0) / norm
    own, valid = _adapters(ids, norm.shape[0], "dora_scale_backward")
    sums = torch.zeros_like(norm, memory_format=torch.contiguous_format)
    return sums.index_add(0, own[valid], products[valid]) / norm


def scale_backward(dy, z, magnitude, norm, ids, needs) -> list[Tensor]:
    wide = dy.to(norm.dtype).reshape(-1, dy.shape[-1])
    grads = [dy.new_empty(0), norm.new_empty(0), dy.new_empty(0)]
    if needs[0]:
        dz = wide * _gain(magnitude, norm, ids, "dora_scale_backward")
        grads[0] = dz.to(dy.dtype).reshape(dy.shape).contiguous()
    if magnitude is not None:
        dm = _magnitude_gradient(wide, z, norm, ids) if needs[1] else grads[1]
        grads[1] = dm.to(magnitude.dtype).contiguous()
    if needs[2]:
        grads[2] = wide.sum(0).to(dy.dtype)
    return grads
