"""gated_product in plain PyTorch: the definition that every backend is measured against. Never optimised.

y = f(gate) up,   dgate = dy up f'(gate),   dup = dy f(gate)
element by element; SwiGLU and GEGLU: Shazeer 2020, arXiv:2002.05202, eq. 5 and 6, without their products. Arithmetic in
fp32 for all 16- and 32-bit inputs, in fp64 for fp64; every result is rounded once.
"""

from torch import Tensor

from peft_kernels.ops.common.activations import EXACT, SLOPES
from peft_kernels.ops.common.projections import accumulator


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    dtype = accumulator(gate.dtype)
    return (EXACT[activation](gate.to(dtype)) * up.to(dtype)).to(gate.dtype).contiguous()


def backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    dtype = accumulator(gate.dtype)
    g, d = gate.to(dtype), dy.to(dtype)
    dgate, dup = d * up.to(dtype) * SLOPES[activation](g), d * EXACT[activation](g)
    return dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()
