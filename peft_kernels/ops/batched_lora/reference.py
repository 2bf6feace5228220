"""batched_lora in plain PyTorch: the definition that every backend is measured against. Never optimised.

y_g[i] = x[i] W_g^T + b_g + s_l ((drop_l(x)[i] A_l^T) B_l^T + b_Bl),  l the entry of projection g for the adapter of i
x [..., K], W_g [N_g, K], A_l [R_l, K], B_l [N_g, R_l]; many LoRAs in one batch: Chen et al. 2023, arXiv:2310.18547.
h [M, sum_g H_g], H_g the largest rank among the entries of projection g: row i holds s_l drop_l(x)[i] A_l^T in the
first R_l columns of g's block, zeros elsewhere. The sums and their backward are ops/common/projection_reference.py's.
"""

from torch import Tensor

from peft_kernels.ops.batched_lora.route import row_ids
from peft_kernels.ops.common import projection_reference


def h_columns(lora_A: list[Tensor], member: list[int], G: int) -> list[int]:
    """Where each projection's block of h begins, and last the width of h."""
    begins = [0]
    for g in range(G):
        begins.append(
            begins[-1] + max((a.shape[0] for a, owner in zip(lora_A, member, strict=True) if owner == g), default=0)
        )
    return begins


def _places(M: int, G: int, route, lora_A, member, adapter) -> tuple[list[Tensor], list[int], int]:
    """The rows of each entry, its first column of h, and the width of h."""
    ids, columns = row_ids(route, M), h_columns(lora_A, member, G)
    return [(ids == a).nonzero()[:, 0] for a in adapter], [columns[g] for g in member], columns[-1]


def forward(x, route, weight, bias, lora_A, lora_B, lora_bias, member, adapter, scaling, dropout_p, seed):
    places = _places(x.numel() // x.shape[-1], len(weight), route, lora_A, member, adapter)
    return projection_reference.forward(
        x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed, *places
    )


def backward(dy, x, h, route, weight, lora_A, lora_B, member, adapter, scaling, dropout_p, seed, needs):
    M = dy[0].numel() // weight[0].shape[0]
    own, begins, _ = _places(M, len(weight), route, lora_A, member, adapter)
    return projection_reference.backward(
        dy, x, h, weight, lora_A, lora_B, member, scaling, dropout_p, seed, needs, own, begins
    )
