"""Packed sequences that begin behind tokens of nobody. The CPU refuses them, a GPU is not asked first."""

import math

import torch
from torch import Tensor

from peft_kernels import testing
from peft_kernels.ops.prefix_attention.samples import GRADIENTS, problem

NOBODYS = 3  # tokens before the first sequence, NaN


def behind(own: Tensor) -> Tensor:
    """[.., tokens, D] behind those of nobody."""
    return torch.cat([own.new_full((*own.shape[:2], NOBODYS, own.shape[3]), math.nan), own], 2)


def check(forward, backward, S: int, dtype: torch.dtype) -> None:
    """What sequences have, forward and backward, is bit for bit what they have from the first token on."""
    ends = (0, 1, 3, S), (0, 2, 5, S + 2)
    near = problem("cpu", dtype, B=1, S=S, T=S + 2, packed=ends, n=3, ids=(2, -1, 0), lengths=(5, 3, 4), gates=(1, 1))
    far = near | {name: behind(near[name]) for name in ("query", "key", "value")}
    far |= {name: near[name] + NOBODYS for name in ("cu_seqlens_q", "cu_seqlens_k")}
    (dout,) = testing.output_gradients([torch.zeros_like(near["query"])])
    needs = [near[name] is not None for name in GRADIENTS]
    results = []
    for arguments, of_out, skipped in ((near, dout, 0), (far, behind(dout), NOBODYS)):
        values = list(arguments.values())
        out, lse, prefix_lse = forward(*values)
        gradients = backward(of_out, *values[:13], out, lse, prefix_lse, *values[13:], needs)
        by_token = [tensor[:, :, skipped:] for tensor in (out, lse, *gradients[:3])]
        results.append([*by_token, *gradients[3:]])
    assert all(tensor.isfinite().all() for tensor in results[0])
    for i, (expected, found) in enumerate(zip(*results, strict=True)):
        assert torch.equal(found, expected), i
