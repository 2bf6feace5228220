"""bottleneck_adapter on a GPU: graphs that replay new inputs and a new seed, another stream, and no waiting."""

import pytest
import torch
from cuda_calls import assert_replays, nothing_waits, on_another_stream, other_inputs, same

from peft_kernels import backends, registry, testing
from peft_kernels.ops.bottleneck_adapter.samples import problem

OP = registry.ops()["bottleneck_adapter"]
F32, BF16 = torch.float32, torch.bfloat16
PARALLEL = dict(K=264, N=136, E=40, scale="channel", gated=True, p=0.1)
CASES = {
    "parallel": PARALLEL,
    "serial": dict(K=264, N=None, E=64, scale="scalar", p=0.1, activation="gelu"),
    "output": PARALLEL | {"dropout_on": "output"},
    "normed": dict(K=264, N=None, E=40, norm="layer_norm", p=0.1),
}

BACKENDS = [b for b in ("cuda", "triton") if b in OP.backends and backends.all_backends()[b].available]
on_gpu = pytest.mark.skipif(not BACKENDS, reason=f"cuda: {backends.all_backends()['cuda'].missing}")
each = pytest.mark.parametrize("backend", BACKENDS or ["cuda"])
each_case = pytest.mark.parametrize("case", CASES)
each_pair = pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F32, F32)], ids=str)


@on_gpu
@each
@each_case
@each_pair
@pytest.mark.parametrize("rows", [5, 150])
def test_graph_replays_new_inputs_and_a_new_seed(backend, rows, pair, case):
    held = problem("cuda", *pair, rows=(rows,), **CASES[case])
    dy = testing.gradients_for(OP, held)

    def run():
        return OP.evaluate(*testing.operators(backend, OP), held, dy)

    assert_replays(run, lambda: other_inputs(held))


@on_gpu
@each
@each_case
def test_another_stream(backend, case):
    arguments = problem("cuda", BF16, BF16, rows=(150,), **CASES[case])
    dy = testing.gradients_for(OP, arguments)
    expected = OP.evaluate(*testing.operators(backend, OP), arguments, dy)
    got = on_another_stream(lambda: OP.evaluate(*testing.operators(backend, OP), arguments, dy), arguments["x"])
    assert same(got, expected)


@on_gpu
@each
@each_case
@each_pair
def test_nothing_waits_for_the_device(backend, pair, case):
    arguments = problem("cuda", *pair, rows=(150,), **CASES[case])
    dy = testing.gradients_for(OP, arguments)
    with nothing_waits():
        OP.evaluate(*testing.operators(backend, OP), arguments, dy)
