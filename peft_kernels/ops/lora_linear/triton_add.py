"""lora_add on CUDA tensors in Triton: the same signatures and results as add_reference.py.

Forward, two kernels: h = s drop(x) A^T (triton_kernel.py), then r + h B^T by the GEMM over [x | h] and [W | B] without
its base (triton_gemm.py), which reads a tile of r and writes that of y: y may lie where r lies. Backward: lora_linear's
without its base (triton_backward.py).
"""

import torch
from torch import Tensor

from peft_kernels.ops.common.triton_products import accumulator, unit_rows
from peft_kernels.ops.lora_linear.add import check, check_backward, check_in_place
from peft_kernels.ops.lora_linear.triton_backward import gradients
from peft_kernels.ops.lora_linear.triton_gemm import LowRank, concat_gemm
from peft_kernels.ops.lora_linear.triton_kernel import shrink, sum_biases


def _add(y: Tensor, residual: Tensor, x: Tensor, lora_A, lora_B, lora_bias, scaling, dropout_p, seed) -> Tensor:
    """Writes y [M, N], contiguous, and returns h."""
    ranks = [a.shape[0] for a in lora_A]
    if y.shape[0] == 0:
        return x.new_empty((0, sum(ranks)), dtype=accumulator(x.dtype))
    with torch.cuda.device_of(x):
        h, parts = shrink(unit_rows(x.reshape(-1, x.shape[-1])), lora_A, scaling, dropout_p, seed)
        of = parts.split(ranks, dim=2)
        low_rank = [LowRank(low, b.t(), i, 65536) for i, (low, b) in enumerate(zip(of, lora_B, strict=True))]
        bias = sum_biases(None, list(zip(scaling, lora_bias, strict=True)), x.dtype)
        concat_gemm(y, bias, None, [], low_rank, unit_rows(residual.reshape(y.shape)))
    return h


def forward(
    residual: Tensor,
    x: Tensor,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    lora_bias: list[Tensor | None],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)
    y = x.new_empty(residual.shape)
    h = _add(y.view(-1, y.shape[-1]), residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)
    return y, h


def forward_(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed) -> None:
    check_in_place(residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)
    y = residual.view(-1, residual.shape[-1])
    _add(y, residual, x, lora_A, lora_B, lora_bias, scaling, dropout_p, seed)


def backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    scaling: list[float],
    dropout_p: list[float],
    seed: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    check_backward(dy, x, h, lora_A, lora_B, scaling, dropout_p, seed, needs)
    return gradients([dy], x, h, [], lora_A, lora_B, [0] * len(lora_A), scaling, dropout_p, seed, needs)


FUNCTIONS = {"lora_add": forward, "lora_add_": forward_, "lora_add_backward": backward}
