"""lora_linear in plain PyTorch: the definition that every backend is measured against. Never optimised.

y_g = x W_g^T + b_g + sum_{l in g} s_l ((drop_l(x) A_l^T) B_l^T + b_Bl)       (LoRA: Hu et al. 2021, arXiv:2106.09685)
x [..., K], W_g [N_g, K], A_l [R_l, K], B_l [N_g, R_l]; h = [s_l drop_l(x) A_l^T]_l [M, sum R_l], kept for the backward.
Arithmetic in fp32 for all 16- and 32-bit inputs, in fp64 for fp64.
"""

import torch
from torch import Tensor

from peft_kernels.ops.common.dropout import drop, scaled_mask
from peft_kernels.ops.common.projections import accumulator


def forward(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor | None],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    lora_bias: list[Tensor | None],
    member: list[int],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    dtype = accumulator(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)  # [M, K]
    M, K = rows.shape
    h = [
        s * (drop(rows, scaled_mask(seed, M, K, p, i, dtype)) @ a.to(dtype).mT)  # [M, R_l]
        for i, (a, s, p) in enumerate(zip(lora_A, scaling, dropout_p, strict=True))
    ]
    y = []
    for g, w in enumerate(weight):
        out = rows @ w.to(dtype).mT  # [M, N_g]
        if bias[g] is not None:
            out = out + bias[g].to(dtype)
        for i in (i for i, owner in enumerate(member) if owner == g):
            out = out + h[i] @ lora_B[i].to(dtype).mT
            if lora_bias[i] is not None:
                out = out + scaling[i] * lora_bias[i].to(dtype)
        y.append(out.to(x.dtype).reshape(*x.shape[:-1], w.shape[0]))
    return y, torch.cat(h, dim=1) if h else rows.new_empty(M, 0)


def backward(
    dy: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    weight: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    member: list[int],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (x, *weight, *bias, *lora_A, *lora_B, *lora_bias); an empty tensor where `needs` says no.

    ds_l = s_l dy_g B_l              dx  = sum_g dy_g W_g + sum_l mask_l * (ds_l A_l) / (1 - p)
    dA_l = ds_l^T drop_l(x)          dB_l = dy_g^T h_l
    dW_g = dy_g^T x,  db_g = colsum(dy_g),  db_Bl = s_l colsum(dy_g)
    """
    dtype, G, L, K = accumulator(dy[0].dtype), len(weight), len(lora_A), weight[0].shape[1]
    rows = None if x is None else x.reshape(-1, K).to(dtype)
    dys = [d.reshape(-1, d.shape[-1]).to(dtype) for d in dy]
    M = dys[0].shape[0]
    ds = [scaling[i] * (dys[member[i]] @ lora_B[i].to(dtype)) for i in range(L)]  # [M, R_l]
    masks = [scaled_mask(seed, M, K, dropout_p[i], i, dtype) for i in range(L)]
    offset = [sum(a.shape[0] for a in lora_A[:i]) for i in range(L)]  # where h_l starts in h

    def dx():
        out = sum(d @ w.to(dtype) for d, w in zip(dys, weight, strict=True))
        for i in range(L):
            out = out + drop(ds[i] @ lora_A[i].to(dtype), masks[i])
        return out.to(dy[0].dtype).reshape(*dy[0].shape[:-1], K)

    makers = [dx]
    makers += [lambda g=g: (dys[g].mT @ rows).to(weight[g].dtype) for g in range(G)]
    makers += [lambda g=g: dys[g].sum(0).to(weight[g].dtype) for g in range(G)]
    makers += [lambda i=i: (ds[i].mT @ drop(rows, masks[i])).to(lora_A[i].dtype) for i in range(L)]
    makers += [
        lambda i=i: (dys[member[i]].mT @ h[:, offset[i] : offset[i] + lora_A[i].shape[0]]).to(lora_B[i].dtype)
        for i in range(L)
    ]
    makers += [lambda i=i: (scaling[i] * dys[member[i]].sum(0)).to(lora_B[i].dtype) for i in range(L)]
    like = [dy[0], *weight, *weight, *lora_A, *lora_B, *lora_B]
    return [make() if need else tensor.new_empty(0) for make, need, tensor in zip(makers, needs, like, strict=True)]
