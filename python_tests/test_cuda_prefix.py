"""prefix_attention on a GPU: graphs that replay new inputs and other prefixes for the rows, and no waiting."""

import pytest
import torch

from peft_kernels import backends, registry, testing
from peft_kernels.ops.prefix_attention.samples import problem

OP = registry.ops()["prefix_attention"]
F32, BF16 = torch.float32, torch.bfloat16
SEVERAL = dict(B=5, n=3, ids=(2, -1, 0, 2, 2), lengths=(40, 30, 9), P=40, gates=(1, 1), p=0.1)
CASES = {
    "rows": dict(S=37, **SEVERAL),
    "decode": dict(S=1, T=300, **SEVERAL),
    "add": dict(S=37, composition="add", **SEVERAL),
    "linear": dict(S=1, T=23, composition="linear", **SEVERAL),
}

BACKENDS = [b for b in ("cuda", "triton") if b in OP.backends and backends.all_backends()[b].available]
on_gpu = pytest.mark.skipif(not BACKENDS, reason=f"cuda: {backends.all_backends()['cuda'].missing}")
each = pytest.mark.parametrize("backend", BACKENDS or ["cuda"])
each_case = pytest.mark.parametrize("case", CASES)
each_dtype = pytest.mark.parametrize("dtype", [BF16, F32], ids=str)


def evaluated(backend, arguments, dy):
    return OP.evaluate(*testing.operators(backend, OP), arguments, dy)


@on_gpu
@each
@each_case
@each_dtype
def test_graph_replays_other_prefixes_and_a_new_seed(backend, dtype, case):
    held = problem("cuda", dtype, **CASES[case])
    dy = testing.gradients_for(OP, held)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a library sets up at its first call must not be captured
        evaluated(backend, held, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluated(backend, held, dy)
    graph.replay()
    before = {name: out.clone() for name, out in captured.items()}
    assert all(torch.equal(before[name], out) for name, out in evaluated(backend, held, dy).items())
    held["query"].neg_()
    held["prefix_ids"].copy_(torch.tensor([-1, 1, 1, 0, 2], dtype=torch.int32))
    held["seed"].fill_(1234)
    graph.replay()
    assert all(torch.equal(captured[name], out) for name, out in evaluated(backend, held, dy).items())
    assert not torch.equal(before["y[0]"], captured["y[0]"])


@on_gpu
@each
@each_case
@each_dtype
def test_nothing_waits_for_the_device(backend, dtype, case):
    arguments = problem("cuda", dtype, **CASES[case])
    dy = testing.gradients_for(OP, arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluated(backend, arguments, dy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
