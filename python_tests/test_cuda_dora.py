"""dora_norm and dora_scale on a GPU: graphs that replay new inputs, another stream, no waiting, ids out of range."""

import pytest
import torch
from cuda_calls import assert_replays, nothing_waits, on_another_stream, same

from peft_kernels import backends, registry, testing
from peft_kernels.ops.lora_linear.dora_samples import norm_problem, scale_problem

NORM, SCALE = registry.ops()["dora_norm"], registry.ops()["dora_scale"]
F32, BF16 = torch.float32, torch.bfloat16
BACKENDS = [b for b in ("cuda", "triton") if b in SCALE.backends and backends.all_backends()[b].available]
on_gpu = pytest.mark.skipif(not BACKENDS, reason=f"cuda: {backends.all_backends()['cuda'].missing}")
each = pytest.mark.parametrize("backend", BACKENDS or ["cuda"])
each_pair = pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F32, F32)], ids=str)
each_case = pytest.mark.parametrize("case", ["norm", "scale", "mixed"])


def problem_of(case, pair):
    """An op, its arguments, and the one that a graph is given anew."""
    if case == "norm":
        return NORM, norm_problem("cuda", *pair, N=136, K=264, R=20), "weight"
    adapters = 3 if case == "mixed" else 0
    sizes = dict(rows=(300,), N=136, biased=True, residual=True, adapters=adapters)
    return SCALE, scale_problem("cuda", *pair, **sizes), "z"


def evaluation(backend, case, pair):
    """A function that evaluates the op, and the argument."""
    op, arguments, name = problem_of(case, pair)
    dy = testing.gradients_for(op, arguments)
    return lambda: op.evaluate(*testing.operators(backend, op), arguments, dy), arguments[name]


@on_gpu
@each
@each_case
@each_pair
def test_graph_replays_new_inputs(backend, pair, case):
    run, held = evaluation(backend, case, pair)
    assert_replays(run, lambda: held.copy_(2 * held.flip(0)))


@on_gpu
@each
@each_case
def test_another_stream(backend, case):
    run, held = evaluation(backend, case, (BF16, BF16))
    expected = run()
    assert same(on_another_stream(run, held), expected)


@on_gpu
@each
@each_case
@each_pair
def test_nothing_waits_for_the_device(backend, pair, case):
    run, _ = evaluation(backend, case, pair)
    with nothing_waits():
        run()


@on_gpu
@each
def test_an_id_out_of_range_counts_as_none(backend):
    run, _ = evaluation(backend, "mixed", (BF16, F32))
    op, arguments, _ = problem_of("mixed", (BF16, F32))
    dy = testing.gradients_for(op, arguments)
    none = arguments["ids"] == -1
    arguments["ids"][none] = torch.where(torch.arange(int(none.sum()), device="cuda") % 2 == 0, 3, -7).to(torch.int32)
    assert same(op.evaluate(*testing.operators(backend, op), arguments, dy), run())
