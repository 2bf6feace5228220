"""What the serving engines' LoRA kernels take, made of the factors of every adapter at projections that share an x."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# add(x, base) -> base() [M, all N] with the adapters' part of x [M, K] added in place
Add = Callable[[Tensor, Callable[[], Tensor]], Tensor]


@dataclass(frozen=True)
class Batch:
    """L adapters, padded to the largest rank R, at S projections whose outputs lie side by side."""

    lora_A: Tensor  # [L, S R, K]; of an adapter of rank r, that of projection s is at rows s r to (s + 1) r
    lora_B: Tensor  # [L, sum of N, R]
    offsets: tuple[int, ...]  # where the outputs of each projection begin; last, the sum of N
    slots: Tensor  # int32 [M], the adapter of each row or -1
    ranks: Tensor  # int32 [L]
    scalings: Tensor  # fp32 [L]


def batch_of(factors: list[list[tuple[Tensor, Tensor]]], slots: Tensor, scaling: float) -> Batch:
    """factors: of each adapter, (lora_A [r, K], lora_B [N, r]) of each projection."""
    first = factors[0][0][0]
    ranks = [len(parts[0][0]) for parts in factors]
    widths = [len(b) for _, b in factors[0]]
    offsets = tuple(sum(widths[:i]) for i in range(len(widths) + 1))
    L, S, R, K = len(factors), len(widths), max(ranks), first.shape[1]
    a_all, b_all = first.new_zeros(L, S * R, K), first.new_zeros(L, offsets[-1], R)
    for i, parts in enumerate(factors):
        a_all[i, : S * ranks[i]] = torch.cat([a for a, _ in parts])
        for start, (_, b) in zip(offsets, parts, strict=False):
            b_all[i, start : start + len(b), : ranks[i]] = b
    numbers = torch.tensor(ranks, dtype=torch.int32, device=first.device)
    return Batch(a_all, b_all, offsets, slots, numbers, torch.full((L,), scaling, device=first.device))


def require_device(device: torch.device) -> None:
    """Raises ImportError where Triton's kernels cannot run: they need a GPU, or Triton's interpreter."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ImportError("its kernels need a CUDA device")
