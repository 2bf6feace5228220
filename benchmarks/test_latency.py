"""The same arms under pytest-benchmark: `pytest benchmarks/test_latency.py`.

For a quick look and for its comparisons between runs; the README's numbers come from run.py, which interleaves.
"""

import pytest
import torch

from benchmarks import arms as contenders
from benchmarks import shapes
from benchmarks.measure import clear_gradients

CPU = torch.device("cpu")
CELLS = [cell for cell in shapes.cells("lora_linear", "quick") if cell.M == 64]
KINDS = ("peft", "patched", "op")


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("kind", ["frozen", *KINDS])
@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: str(cell.dtype).removeprefix("torch."))
def test_latency(benchmark, cell, kind, p, direction):
    if kind == "frozen" and p:
        pytest.skip("a frozen layer has no dropout")
    arms, left_out = contenders.build(cell, CPU, (kind,) if kind in KINDS else ())
    chosen = [arm for arm in arms if arm.name == kind and (arm.variant is None or arm.variant.p == p)]
    if not chosen:
        pytest.skip("; ".join(left_out))
    x = torch.randn(cell.M, cell.K).to(cell.dtype).requires_grad_()
    dy = torch.randn(cell.M, cell.N).to(cell.dtype)

    def step():
        y = chosen[0].call(x)
        if direction == "forward+backward":
            y.backward(dy)

    benchmark.pedantic(step, setup=lambda: clear_gradients(chosen[0], x), rounds=50, warmup_rounds=3)
