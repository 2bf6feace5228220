"""lora_linear in plain PyTorch: the definition that every backend is measured against. Never optimised.

y_g = x W_g^T + b_g + sum_{l in g} s_l ((drop_l(x) A_l^T) B_l^T + b_Bl)       (LoRA: Hu et al. 2021, arXiv:2106.09685)
x [..., K], W_g [N_g, K], A_l [R_l, K], B_l [N_g, R_l]; h = [s_l drop_l(x) A_l^T]_l [M, sum R_l], kept for the backward.
The sums and their backward are in ops/common/projection_reference.py; every adapter has all rows, and its own columns.
"""

from itertools import accumulate

from torch import Tensor

from peft_kernels.ops.common import projection_reference


def places(lora_A: list[Tensor]) -> tuple[list[slice], list[int], int]:
    """The rows of each adapter, its first column of h, and the width of h."""
    *begins, width = accumulate((a.shape[0] for a in lora_A), initial=0)
    return [slice(None)] * len(lora_A), begins, width


def forward(x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed):
    return projection_reference.forward(
        x, weight, bias, lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed, *places(lora_A)
    )


def backward(dy, x, h, weight, lora_A, lora_B, member, scaling, dropout_p, seed, needs):
    own, begins, _ = places(lora_A)
    return projection_reference.backward(
        dy, x, h, weight, lora_A, lora_B, member, scaling, dropout_p, seed, needs, own, begins
    )
