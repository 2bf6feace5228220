"""batched_lora in plain PyTorch: the definition that every backend is measured against. Never optimised.

y_g[i] = x[i] W_g^T + b_g + s_l ((drop_l(x)[i] A_l^T) B_l^T + b_Bl),  l the entry of projection g for the adapter of i
x [..., K], W_g [N_g, K], A_l [R_l, K], B_l [N_g, R_l]; many LoRAs in one batch: Chen et al. 2023, arXiv:2310.18547.
h [M, sum_g H_g], H_g the largest rank among the entries of projection g: row i holds s_l drop_l(x)[i] A_l^T in the
first R_l columns of g's block, zeros elsewhere. Arithmetic in fp32 for all 16- and 32-bit inputs, in fp64 for fp64.
"""

from torch import Tensor

from peft_kernels.ops.batched_lora.route import row_ids
from peft_kernels.ops.common.dropout import drop, scaled_mask
from peft_kernels.ops.common.projections import accumulator


def h_columns(lora_A: list[Tensor], member: list[int], G: int) -> list[int]:
    """Where each projection's block of h begins, and last the width of h."""
    begins = [0]
    for g in range(G):
        begins.append(
            begins[-1] + max((a.shape[0] for a, owner in zip(lora_A, member, strict=True) if owner == g), default=0)
        )
    return begins


def forward(
    x: Tensor,
    route: Tensor,
    weight: list[Tensor],
    bias: list[Tensor | None],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    lora_bias: list[Tensor | None],
    member: list[int],
    adapter: list[int],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    dtype = accumulator(x.dtype)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)  # [M, K]
    M, K = rows.shape
    ids = row_ids(route, M)
    column = h_columns(lora_A, member, len(weight))
    h = rows.new_zeros(M, column[-1])
    y = [rows @ w.to(dtype).mT + (0 if b is None else b.to(dtype)) for w, b in zip(weight, bias, strict=True)]
    for i, (a, b, g, s, p) in enumerate(zip(lora_A, lora_B, member, scaling, dropout_p, strict=True)):
        own = (ids == adapter[i]).nonzero()[:, 0]
        low_rank = s * (drop(rows, scaled_mask(seed, M, K, p, i, dtype))[own] @ a.to(dtype).mT)  # [rows of i, R_l]
        h[own, column[g] : column[g] + a.shape[0]] = low_rank
        added = low_rank @ b.to(dtype).mT
        y[g][own] += added if lora_bias[i] is None else added + s * lora_bias[i].to(dtype)
    return [out.to(x.dtype).reshape(*x.shape[:-1], out.shape[1]) for out in y], h


def backward(
    dy: list[Tensor],
    x: Tensor | None,
    h: Tensor | None,
    route: Tensor,
    weight: list[Tensor],
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    member: list[int],
    adapter: list[int],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of (x, *weight, *bias, *lora_A, *lora_B, *lora_bias); an empty tensor where `needs` says no.

    With the rows of entry l's adapter alone in every product of the second column:

    dx  = sum_g dy_g W_g                    dx += mask_l * (ds_l A_l) / (1 - p),  ds_l = s_l dy_g B_l
    dW_g = dy_g^T x                         dA_l = ds_l^T drop_l(x)
    db_g = colsum(dy_g)                     dB_l = dy_g^T h_l,  db_Bl = s_l colsum(dy_g)
    """
    dtype, G, L, K = accumulator(dy[0].dtype), len(weight), len(lora_A), weight[0].shape[1]
    rows = None if x is None else x.reshape(-1, K).to(dtype)
    dys = [d.reshape(-1, d.shape[-1]).to(dtype) for d in dy]
    M = dys[0].shape[0]
    ids = row_ids(route, M)
    own = [(ids == a).nonzero()[:, 0] for a in adapter]
    own_dy = [dys[member[i]][own[i]] for i in range(L)]
    ds = [scaling[i] * (own_dy[i] @ lora_B[i].to(dtype)) for i in range(L)]  # [rows of i, R_l]
    masks = [scaled_mask(seed, M, K, dropout_p[i], i, dtype) for i in range(L)]
    masks = [mask if mask is None else mask[own[i]] for i, mask in enumerate(masks)]
    column = h_columns(lora_A, member, G)

    def dx():
        out = sum(d @ w.to(dtype) for d, w in zip(dys, weight, strict=True))
        for i in range(L):
            out[own[i]] += drop(ds[i] @ lora_A[i].to(dtype), masks[i])
        return out.to(dy[0].dtype).reshape(*dy[0].shape[:-1], K)

    def db(i):
        begin = column[member[i]]
        return own_dy[i].mT @ h[own[i], begin : begin + lora_A[i].shape[0]]

    makers = [dx]
    makers += [lambda g=g: (dys[g].mT @ rows).to(weight[g].dtype) for g in range(G)]
    makers += [lambda g=g: dys[g].sum(0).to(weight[g].dtype) for g in range(G)]
    makers += [lambda i=i: (ds[i].mT @ drop(rows[own[i]], masks[i])).to(lora_A[i].dtype) for i in range(L)]
    makers += [lambda i=i: db(i).to(lora_B[i].dtype) for i in range(L)]
    makers += [lambda i=i: (scaling[i] * own_dy[i].sum(0)).to(lora_B[i].dtype) for i in range(L)]
    like = [dy[0], *weight, *weight, *lora_A, *lora_B, *lora_B]
    return [make() if need else tensor.new_empty(0) for make, need, tensor in zip(makers, needs, like, strict=True)]
