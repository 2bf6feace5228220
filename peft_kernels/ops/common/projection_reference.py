"""Adapters on frozen projections in plain PyTorch: what defines the families that have them. Never optimised.

y_g = x W_g^T + b_g, and for every adapter l of projection g, in its rows: y_g += s_l ((drop_l(x) A_l^T) B_l^T + b_Bl)
x [..., K] of M rows, W_g [N_g, K], A_l [R_l, K], B_l [N_g, R_l]. h [M, H] holds s_l drop_l(x) A_l^T in l's rows and
columns, zeros elsewhere. `own` are the rows of each adapter, `begins` its first columns of h: they differ by family.
Arithmetic in fp32 for all 16- and 32-bit inputs, in fp64 for fp64.
"""

from torch import Tensor

from peft_kernels.ops.common.dropout import drop, scaled_mask
from peft_kernels.ops.common.projections import accumulator

Rows = list[slice] | list[Tensor]


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
    own: Rows,
    begins: list[int],
    width: int,
) -> tuple[list[Tensor], Tensor]:
    """y of each projection, and h of `width` columns."""
    dtype = accumulator(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)  # [M, K]
    y = [rows @ w.to(dtype).mT + (0 if b is None else b.to(dtype)) for w, b in zip(weight, bias, strict=True)]
    h = add_(y, rows, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed, own, begins, width)
    return [out.to(x.dtype).reshape(*x.shape[:-1], out.shape[1]) for out in y], h


def add_(
    y: list[Tensor],
    rows: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    lora_bias: list[Tensor | None],
    member: list[int],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    own: Rows,
    begins: list[int],
    width: int,
) -> Tensor:
    """Adds to y [M, N_g] what the adapters make of rows [M, K]; all of the dtype that sums are kept in. Returns h."""
    M, K = rows.shape
    dtype, h = rows.dtype, rows.new_zeros(M, width)
    for i, (a, b, g, s, p) in enumerate(zip(lora_A, lora_B, member, scaling, dropout_p, strict=True)):
        low_rank = s * (drop(rows, scaled_mask(seed, M, K, p, i, dtype))[own[i]] @ a.to(dtype).mT)  # [rows of i, R_l]
        h[own[i], begins[i] : begins[i] + a.shape[0]] = low_rank
        y[g][own[i]] += low_rank @ b.to(dtype).mT
        if lora_bias[i] is not None:
            y[g][own[i]] += s * lora_bias[i].to(dtype)
    return h


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
    own: Rows,
    begins: list[int],
) -> list[Tensor]:
    """Gradients of (x, *weight, *bias, *lora_A, *lora_B, *lora_bias); an empty tensor where `needs` says no. Without
    weights the adapters alone have gradients.

    With the rows of adapter l alone in every product of the second column:

    dx  = sum_g dy_g W_g                    dx += mask_l * (ds_l A_l) / (1 - p),  ds_l = s_l dy_g B_l
    dW_g = dy_g^T x                         dA_l = ds_l^T drop_l(x)
    db_g = colsum(dy_g)                     dB_l = dy_g^T h_l,  db_Bl = s_l colsum(dy_g)
    """
    dtype, G, L, K = accumulator(dy[0].dtype), len(weight), len(lora_A), lora_A[0].shape[1]
    rows = None if x is None else x.reshape(-1, K).to(dtype)
    dys = [d.reshape(-1, d.shape[-1]).to(dtype) for d in dy]
    M = dys[0].shape[0]
    own_dy = [dys[member[i]][own[i]] for i in range(L)]
    ds = [scaling[i] * (own_dy[i] @ lora_B[i].to(dtype)) for i in range(L)]  # [rows of i, R_l]
    masks = [scaled_mask(seed, M, K, dropout_p[i], i, dtype) for i in range(L)]
    masks = [mask if mask is None else mask[own[i]] for i, mask in enumerate(masks)]

    def dx():
        out = dys[0].new_zeros(M, K)
        for g in range(G):
            out += dys[g] @ weight[g].to(dtype)
        for i in range(L):
            out[own[i]] += drop(ds[i] @ lora_A[i].to(dtype), masks[i])
        return out.to(dy[0].dtype).reshape(*dy[0].shape[:-1], K)

    def db(i):
        return own_dy[i].mT @ h[own[i], begins[i] : begins[i] + lora_A[i].shape[0]]

    makers = [dx]
    makers += [lambda g=g: (dys[g].mT @ rows).to(weight[g].dtype) for g in range(G)]
    makers += [lambda g=g: dys[g].sum(0).to(weight[g].dtype) for g in range(G)]
    makers += [lambda i=i: (ds[i].mT @ drop(rows[own[i]], masks[i])).to(lora_A[i].dtype) for i in range(L)]
    makers += [lambda i=i: db(i).to(lora_B[i].dtype) for i in range(L)]
    makers += [lambda i=i: (scaling[i] * own_dy[i].sum(0)).to(lora_B[i].dtype) for i in range(L)]
    like = [dy[0], *weight, *weight, *lora_A, *lora_B, *lora_B]
    return [make() if need else tensor.new_empty(0) for make, need, tensor in zip(makers, needs, like, strict=True)]
