"""lora_embedding in plain PyTorch: the definition that every backend is measured against. Never optimised.

y = r + sum_l s_l A_l[:, ids]^T B_l^T                                        (LoRA: Hu et al. 2021, arXiv:2106.09685)
LoRA on a table of embeddings: x A^T of a one-hot x is a column of A. r [..., N] is what the frozen table gave for
ids [...]; A_l [R_l, V], B_l [N, R_l]; h = [s_l A_l[:, ids]^T]_l [M, sum R_l] is kept for the backward:

dr = dy          dB_l = dy^T h_l          dA_l[:, v] = sum over the rows m with ids[m] = v of s_l B_l^T dy[m]
The row `padding_idx` of a table has no gradient, nor has that column of A_l. Sums are kept in fp32 (fp64 for fp64), y
is rounded once.
"""

import torch

from peft_kernels.ops.common.projections import accumulator


def forward(residual, ids, lora_A, lora_B, scaling, padding_idx):
    dtype, tokens = accumulator(residual.dtype), ids.reshape(-1)
    low = [s * a.to(dtype).index_select(1, tokens).mT for a, s in zip(lora_A, scaling, strict=True)]  # [M, R_l]
    y = residual.reshape(-1, residual.shape[-1]).to(dtype)
    for h, b in zip(low, lora_B, strict=True):
        y = y + h @ b.to(dtype).mT
    return y.to(residual.dtype).reshape(residual.shape).contiguous(), torch.cat(low, 1)


def backward(dy, ids, h, lora_A, lora_B, scaling, padding_idx, needs):
    """Gradients of (*lora_A, *lora_B); an empty tensor where `needs` says no."""
    dtype, tokens = accumulator(dy.dtype), ids.reshape(-1).long()
    rows = dy.reshape(-1, dy.shape[-1]).to(dtype)
    counted = rows if padding_idx is None else rows.masked_fill((tokens == padding_idx)[:, None], 0)

    def da(a, b, s):
        ds = s * (counted @ b.to(dtype))  # [M, R_l]
        return a.new_zeros(a.shape, dtype=dtype).index_add_(1, tokens, ds.mT).to(a.dtype)

    begins = [sum(a.shape[0] for a in lora_A[:i]) for i in range(len(lora_A))]
    makers = [lambda a=a, b=b, s=s: da(a, b, s) for a, b, s in zip(lora_A, lora_B, scaling, strict=True)]
    makers += [
        lambda b=b, begin=begin: (rows.mT @ h[:, begin : begin + b.shape[1]]).to(b.dtype)
        for b, begin in zip(lora_B, begins, strict=True)
    ]
    like = [*lora_A, *lora_B]
    return [make() if need else t.new_empty(0) for make, need, t in zip(makers, needs, like, strict=True)]
