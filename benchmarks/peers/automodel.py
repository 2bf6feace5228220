"""NeMo Automodel's Triton kernels for the adapter's part (`_peft.lora_kernel`; tried with 0.7.0), on top of F.linear.

The kernels are called as its own autograd function calls them; that function's module would import the whole framework.
"""

import torch
from torch.nn.functional import dropout, linear

from benchmarks.peers.isolated import import_isolated

NAME = "automodel"


def load(device):
    """f(x, weight, lora_A, lora_B, scaling, p) with x [M, K]."""
    if device.type != "cuda":
        raise ImportError("its kernels need a CUDA device")
    function = adapter_function(import_isolated("nemo_automodel.components._peft.lora_kernel", {}, ("triton",)))

    def call(x, weight, a, b, scaling, p):
        return function.apply(dropout(x, p) if p else x, a, b, scaling, linear(x, weight))

    return call


def adapter_function(kernels) -> type[torch.autograd.Function]:
    """base + scaling (x A^T) B^T, added in place as Automodel does."""

    class Adapter(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, a, b, scaling, base):
            ctx.save_for_backward(x, a, b)
            ctx.scaling = scaling
            return kernels.lora_forward_wrapper(x, a.t(), b.t(), res=None, scale=scaling, dtype=x.dtype).add_(base)

        @staticmethod
        def backward(ctx, dy):
            x, a, b = ctx.saved_tensors
            da, dx = kernels.lora_da_dx_update_wrapper(x.t(), dy, b, a, ctx.scaling, dtype=x.dtype)
            db = kernels.lora_db_update_wrapper(a, x.t(), dy, ctx.scaling, x.dtype)
            return dx, da.t(), db, None, dy

    return Adapter
