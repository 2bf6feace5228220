"""batched_lora_ on a GPU: route and launches in one graph, replayed with other ids; rows alone; large routes."""

import pytest
import torch
from cuda_calls import captured

import peft_kernels
from peft_kernels import backends, registry, testing
from peft_kernels.ops.batched_lora import pooled_samples, route

OP = registry.ops()["batched_lora_"]
F32, BF16 = torch.float32, torch.bfloat16
M, SIZES = 37, dict(K=520, N=(264, 40), ranks=((1, 70), (8, 62), (17, 53), (0, 70), (64, 6)), biased=True, gained=True)
SIZES |= dict(activations=("gelu", "identity", "sigmoid", "relu"), down_biased=True)
BATCHES = {
    "none": [-1] * M,
    "one": [2] * M,
    "first rows": [0, 1, 2] + [-1] * (M - 3),
    "out of range": [i % 7 - 2 for i in range(M)],
    "mixed": [(i * i) % 5 for i in range(M)],
}

on_gpu = pytest.mark.skipif(
    not backends.all_backends()["cuda"].available, reason=f"cuda: {backends.all_backends()['cuda'].missing}"
)
each_pair = pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F32, F32)], ids=str)


def make_route(ids):
    return torch.ops.peft_kernels_cuda.batched_lora_route.default(ids, len(SIZES["ranks"]))


@on_gpu
@each_pair
def test_graph_replays_other_ids(pair):
    forward = testing.operators("cuda", OP)[0]
    held = pooled_samples.problem("cuda", *pair, rows=M, **SIZES)
    y, rest = [t.clone() for t in held["y"]], [held[n] for n in list(held)[3:]]
    ids = torch.full((M,), -1, dtype=torch.int32, device="cuda")

    def run():
        forward(held["y"], held["x"], make_route(ids), *rest)

    graph, _ = captured(run)
    for name, batch in BATCHES.items():
        results = []
        for step in (graph.replay, run):
            ids.copy_(torch.tensor(batch))
            for to, start in zip(held["y"], y, strict=True):
                to.copy_(start)
            step()
            results.append([t.clone() for t in held["y"]])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


@on_gpu
def test_ids_out_of_range_raise_at_a_later_call():
    peft_kernels.batched_lora_route(torch.tensor([0, 7, -1], device="cuda"), 5)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="1 rows were out of range"):
        peft_kernels.batched_lora_route(torch.tensor([0], device="cuda"), 5)
    peft_kernels.batched_lora_route(torch.tensor([0], device="cuda"), 5)


@on_gpu
@each_pair
def test_a_row_of_a_batch_has_the_bits_of_the_row_alone(pair):
    forward = testing.operators("cuda", OP)[0]
    arguments = pooled_samples.problem("cuda", *pair, rows=M, **SIZES)
    whole = OP.evaluate(forward, None, arguments, None)
    ids = route.row_ids(arguments["route"], M)
    for row in range(M):
        alone = {"x": arguments["x"][row : row + 1], "route": make_route(ids[row : row + 1])}
        alone["y"] = [y[row : row + 1] for y in arguments["y"]]
        alone = OP.evaluate(forward, None, arguments | alone, None)
        assert all(torch.equal(alone[name][0], whole[name][row]) for name in whole), row


@on_gpu
@each_pair
def test_x_may_be_y(pair):
    forward = testing.operators("cuda", OP)[0]
    sizes = dict(ranks=((3,) * 9, (0, 8) * 4 + (1,)), activations=("gelu", "identity"))
    arguments = pooled_samples.problem("cuda", *pair, rows=4096, K=520, N=(520, *(24,) * 8), **sizes)
    arguments["y"][0] = arguments["x"].clone()
    wanted, got = OP.evaluate(forward, None, arguments, None).values(), [y.clone() for y in arguments["y"]]
    forward(*(arguments | {"x": got[0], "y": got}).values())
    assert all(torch.equal(*both) for both in zip(got, wanted, strict=True))


@on_gpu
@pytest.mark.parametrize("rows,adapters", [(0, 3), (1, 1), (64, 64), (70, 5000), (4096, 20000), (100_000, 65536)])
def test_route_is_equal(rows, adapters):
    ids = torch.randint(-2, adapters + 1, (rows,), generator=torch.Generator().manual_seed(rows))
    got = torch.ops.peft_kernels_cuda.batched_lora_route.default(ids.cuda(), adapters)
    assert torch.equal(got.cpu(), route.reference(ids, adapters))
