"""gated_product on CUDA tensors in Triton: the same signatures and results as gated_reference.py.

y = f(gate) up,   dgate = dy up f'(gate),   dup = dy f(gate), element by element in fp32 (fp64 for fp64).
Grid: blocks of BLOCK numbers side by side; what does not lie so is copied before. n is specialised: of a multiple of 16
the compiler makes loads of 16 bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_kernels.ops.common.activations import NAMES
from peft_kernels.ops.common.projections import accumulator
from peft_kernels.ops.common.triton_activations import activated, slope
from peft_kernels.ops.common.triton_products import TYPES
from peft_kernels.ops.lora_linear.gated import check, check_backward

BLOCK = 2048


@triton.jit
def _product_kernel(
    y_ptr, gate_ptr, up_ptr, n, ACCUMULATOR: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    gate = tl.load(gate_ptr + offs, mask=mask, other=0.0).to(ACCUMULATOR)
    up = tl.load(up_ptr + offs, mask=mask, other=0.0).to(ACCUMULATOR)
    tl.store(y_ptr + offs, (activated(gate, F) * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gradients_kernel(
    dgate_ptr, dup_ptr, dy_ptr, gate_ptr, up_ptr, n,
    ACCUMULATOR: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(ACCUMULATOR)
    gate = tl.load(gate_ptr + offs, mask=mask, other=0.0).to(ACCUMULATOR)
    up = tl.load(up_ptr + offs, mask=mask, other=0.0).to(ACCUMULATOR)
    tl.store(dgate_ptr + offs, (dy * up * slope(gate, F)).to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptr + offs, (dy * activated(gate, F)).to(dup_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, outputs: list[Tensor], inputs: list[Tensor], activation: str) -> None:
    n = outputs[0].numel()
    if n:
        with torch.cuda.device_of(outputs[0]):
            kernel[(triton.cdiv(n, BLOCK),)](
                *outputs, *(t.contiguous() for t in inputs), n,
                ACCUMULATOR=TYPES[accumulator(outputs[0].dtype)], F=NAMES.index(activation), BLOCK=BLOCK, num_warps=8,
                enable_fp_fusion=True,
            )  # fmt: skip


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    check(gate, up, activation)
    y = gate.new_empty(gate.shape)
    _launch(_product_kernel, [y], [gate, up], activation)
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    check_backward(dy, gate, up, activation)
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    _launch(_gradients_kernel, [dgate, dup], [dy, gate, up], activation)
    return dgate, dup


FUNCTIONS = {"gated_product": forward, "gated_product_backward": backward}
