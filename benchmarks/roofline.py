"""What this machine does at its best, measured in the process that runs the benchmark: a copy and a large GEMM.

Least time of a step = max(flops / GEMM rate, bytes / copy rate), with flops and bytes from the registry's cost.
share = least time / time taken; above 1 where the operands came out of a cache.
"""

import time
from dataclasses import dataclass

import torch

from benchmarks.arms import SCALING
from benchmarks.shapes import Cell, Variant
from peft_kernels import registry
from peft_kernels.registry import Cost


@dataclass(frozen=True)
class Peak:
    bytes_per_s: float
    flops_per_s: float

    def least_ms(self, cost: Cost) -> float:
        return 1e3 * max(cost.flops / self.flops_per_s, cost.bytes / self.bytes_per_s)


def measure(device: torch.device, dtype: torch.dtype) -> Peak:
    """The best of a few copies of a large buffer, and of a few large matrix products in `dtype`."""
    megabytes, size = (1024, 8192) if device.type == "cuda" else (128, 2048)
    source = torch.ones(megabytes << 20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    a = torch.randn(size, size, device=device).to(dtype)
    product = torch.empty_like(a)
    return Peak(
        bytes_per_s=2 * source.numel() / _best(lambda: target.copy_(source), device),
        flops_per_s=2 * size**3 / _best(lambda: torch.mm(a, a, out=product), device),
    )


def read_rate(device: torch.device) -> float:
    """Bytes per second of reading alone: the best of a few sums over a large buffer."""
    source = torch.ones((1024 if device.type == "cuda" else 256) << 18, device=device)
    return source.nbytes / _best(source.sum, device)


def _best(run, device: torch.device, repeats: int = 6) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def cost(cell: Cell, variant: Variant | None) -> dict[str, Cost]:
    """Least flops and bytes of "forward" and "forward+backward"; without a variant, of the frozen linear."""
    if variant is None:
        M, K, N, size = cell.M, cell.K, cell.N, cell.dtype.itemsize
        forward = backward = Cost(2 * M * N * K, size * (M * K + N * K + M * N))
    else:
        costs = registry.ops()["lora_linear"].cost(**_arguments(cell, variant))
        forward, backward = costs["forward"], costs["backward"]
    whole = Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)
    return {"forward": forward, "forward+backward": whole}


def _arguments(cell: Cell, variant: Variant) -> dict:
    """The op's arguments without their data: cost reads shapes and dtypes only."""

    def empty(*shape, dtype=variant.factor_dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    return {
        "x": empty(cell.M, cell.K, dtype=cell.dtype),
        "weight": [empty(cell.N, cell.K, dtype=cell.dtype)],
        "bias": [None],
        "lora_A": [empty(cell.r, cell.K)],
        "lora_B": [empty(cell.N, cell.r)],
        "lora_bias": [None],
        "member": [0],
        "scaling": [SCALING],
        "dropout_p": [variant.p],
        "seed": None,
    }
