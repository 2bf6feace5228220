"""lora_add in plain PyTorch: the definition that every backend is measured against. Never optimised.

y = r + sum_l s_l ((drop_l(x) A_l^T) B_l^T + b_Bl)                            (LoRA: Hu et al. 2021, arXiv:2106.09685)
r [..., N] is what a frozen layer made of x [..., K], by whatever kernel; A_l [R_l, K], B_l [N, R_l];
h = [s_l drop_l(x) A_l^T]_l [M, sum R_l], kept for the backward. dr is dy itself; the other gradients are lora_linear's
without its base. Sums are kept in fp32 (fp64 for fp64), y is rounded once. lora_add_ reads x before it writes y over r.
"""

import torch

from peft_kernels.ops.common import projection_reference
from peft_kernels.ops.common.projections import accumulator
from peft_kernels.ops.lora_linear.reference import places


def forward(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed):
    dtype, member = accumulator(x.dtype), [0] * len(lora_A)
    y = residual.reshape(-1, residual.shape[-1]).to(dtype, copy=True, memory_format=torch.contiguous_format)  # [M, N]
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    factors = (lora_A, lora_B, lora_bias, member, scaling, dropout_p, seed)
    h = projection_reference.add_([y], rows, *factors, *places(lora_A))
    return y.to(x.dtype).reshape(residual.shape), h


def forward_(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed):
    residual.copy_(forward(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)[0])


def backward(dy, x, h, lora_A, lora_B, scaling, dropout_p, seed, needs):
    """Gradients of (x, *lora_A, *lora_B, *lora_bias); an empty tensor where `needs` says no."""
    own, begins, _ = places(lora_A)
    lists = ([], lora_A, lora_B, [0] * len(lora_A), scaling, dropout_p, seed, needs)
    return projection_reference.backward([dy], x, h, *lists, own, begins)
