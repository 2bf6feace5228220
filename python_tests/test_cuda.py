"""What only CUDA has: graphs, streams, several devices; and, without a GPU, shapes on a device that is not there."""

import pytest
import torch
from cuda_calls import assert_replays, nothing_waits, on_another_stream, other_inputs, same
from torch._subclasses import FakeTensorMode

from peft_kernels import backends, registry, testing
from peft_kernels.ops.batched_lora import route
from peft_kernels.ops.batched_lora.samples import problem as batched_problem
from peft_kernels.ops.lora_linear.samples import problem

OP = registry.ops()["lora_linear"]
F32, BF16 = torch.float32, torch.bfloat16
BACKENDS = [b for b in ("cuda", "triton") if backends.all_backends()[b].available]
SIZES = dict(K=264, N=(136, 40), ranks=((16, 3), (8,)), p=0.1, biased=True)
CASES = [(rows, pair) for rows in (5, 150) for pair in ((BF16, BF16), (F32, F32))]  # few rows and many, both paths

on_gpu = pytest.mark.skipif(not BACKENDS, reason=f"cuda: {backends.all_backends()['cuda'].missing}")
each = pytest.mark.parametrize("backend", BACKENDS or ["cuda"])
each_case = pytest.mark.parametrize("rows,pair", CASES, ids=str)


def evaluated(backend, arguments):
    y = OP.functions[0].reference(*arguments.values())[0]
    return OP.evaluate(*testing.operators(backend, OP), arguments, testing.output_gradients(y))


@on_gpu
@each
@each_case
@pytest.mark.parametrize("whole", [False, True], ids=["forward", "forward+backward"])
def test_graph_replays_new_inputs_and_a_new_seed(backend, rows, pair, whole):
    forward, backward = testing.operators(backend, OP)
    held = problem("cuda", *pair, rows=(rows,), **SIZES)
    dy = testing.output_gradients(OP.functions[0].reference(*held.values())[0])

    def run():
        return OP.evaluate(forward, backward, held, dy) if whole else {"y": forward(*held.values())[0][0]}

    assert_replays(run, lambda: other_inputs(held))


@on_gpu
@each
@each_case
def test_another_stream(backend, rows, pair):
    arguments = problem("cuda", *pair, rows=(rows,), **SIZES)
    expected = evaluated(backend, arguments)
    got = on_another_stream(lambda: evaluated(backend, arguments), arguments["x"])
    assert same(got, expected)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
@each
@each_case
def test_a_device_that_is_not_the_current_one(backend, rows, pair):
    expected = evaluated(backend, problem("cuda:0", *pair, rows=(rows,), **SIZES))
    with torch.cuda.device(0):
        got = evaluated(backend, problem("cuda:1", *pair, rows=(rows,), **SIZES))
        assert torch.cuda.current_device() == 0
    assert same(got, expected)
    mixed = problem("cuda:1", *pair, rows=(rows,), **SIZES)
    mixed["weight"][0] = mixed["weight"][0].to("cuda:0")
    with pytest.raises(RuntimeError, match=r"weight\[0\] must be on x's device cuda:1, got cuda:0"):
        testing.operators(backend, OP)[0](*mixed.values())


@on_gpu
@each
def test_nothing_waits_for_the_device(backend):
    arguments = problem("cuda", BF16, BF16, rows=(150,), **SIZES)
    y, h = testing.operators(backend, OP)[0](*arguments.values())
    dy = [torch.ones_like(out) for out in y]
    rest = [arguments[n] for n in ("weight", "lora_A", "lora_B", "member", "scaling", "dropout_p", "seed")]
    with nothing_waits():
        testing.operators(backend, OP)[0](*arguments.values())
        testing.operators(backend, OP)[1](dy, arguments["x"], h, *rest, [True] * 14)


BY_ROW = registry.ops()["batched_lora"]
by_row = pytest.mark.parametrize("backend", [b for b in BACKENDS if b in BY_ROW.backends] or ["triton"])


def row_problem(pair):
    """Three adapters on one or two of two projections, in the rows of a batch in no order."""
    entries = ((0, 0, 16), (1, 0, 3), (0, 1, 8), (1, 2, 40))
    ids = [2, 0, -1, 1, 0] * 30
    return batched_problem("cuda", *pair, ids=ids, entries=entries, K=264, N=(136, 40), p=0.1, lora_biased=True)


@on_gpu
@by_row
@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F32, F32)], ids=str)
def test_graph_replays_with_other_adapters_for_the_rows(backend, pair):
    forward, backward = testing.operators(backend, BY_ROW)
    held = row_problem(pair)
    dy = testing.gradients_for(BY_ROW, held)

    def run():
        return BY_ROW.evaluate(forward, backward, held, dy)

    def change():
        ids = route.row_ids(held["route"], 150).flip(0)
        held["route"].copy_(route.reference(ids.where(ids != 1, -1), 3))

    assert_replays(run, change)


@on_gpu
@by_row
def test_nothing_waits_for_the_device_where_rows_have_adapters(backend):
    arguments = row_problem((BF16, F32))
    dy = testing.gradients_for(BY_ROW, arguments)
    with nothing_waits():
        BY_ROW.evaluate(*testing.operators(backend, BY_ROW), arguments, dy)


@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F32, F32)], ids=str)
def test_shapes_on_a_device_that_is_not_there(pair):
    real = problem("cpu", *pair, rows=(2, 7), **(SIZES | {"p": 0.0}))
    y, h = OP.functions[0].reference(*real.values())
    with FakeTensorMode():

        def fake(value):
            if isinstance(value, list):
                return [fake(entry) for entry in value]
            if not isinstance(value, torch.Tensor):
                return value
            return torch.empty(value.shape, dtype=value.dtype, device="cuda")

        arguments = {name: fake(value) for name, value in real.items()}
        fake_y, fake_h = torch.ops.peft_kernels.lora_linear.default(*arguments.values())
        rest = [arguments[n] for n in ("weight", "lora_A", "lora_B", "member", "scaling", "dropout_p", "seed")]
        backward = torch.ops.peft_kernels.lora_linear_backward.default
        dx, *others = backward(fake_y, arguments["x"], fake_h, *rest, [True] + [False] * 13)
    assert all(out.numel() == 0 for out in others)
    for out, like in zip([*fake_y, fake_h, dx], [*y, h, real["x"]], strict=True):
        assert (out.shape, out.dtype, out.device.type) == (like.shape, like.dtype, "cuda")


def test_an_unmeasured_gpu_is_served_by_the_definition(monkeypatch):
    rows = {name: backends.Backend(name, ("cuda",), "") for name in ("cuda", "reference", "triton")}
    monkeypatch.setattr(backends, "all_backends", lambda: rows)
    monkeypatch.setattr(backends, "_capability", lambda: (9, 0))
    monkeypatch.delenv("PEFT_KERNELS_BACKEND", raising=False)
    choose = backends.bound.__wrapped__
    monkeypatch.setattr(backends, "MEASURED", {})
    assert choose("cuda") == "reference"
    monkeypatch.setattr(backends, "bound", choose)
    every = ("reference", "cpu", "cuda", "triton")
    assert "PEFT_KERNELS_BACKEND=cuda uses" in backends.without_kernel("cuda", every)
    monkeypatch.setattr(backends, "MEASURED", {(9, 0): ("triton", "cuda", "reference")})
    assert choose("cuda") == "triton" and not backends.without_kernel("cuda", every)
    monkeypatch.setattr(backends, "MEASURED", {})
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "cuda")
    assert not backends.without_kernel("cuda", every)
    assert choose("cuda") == "cuda"


def test_an_op_that_the_best_backend_lacks_is_served_by_the_next(monkeypatch):
    rows = {name: backends.Backend(name, ("cuda",), "") for name in ("cuda", "reference", "triton")}
    monkeypatch.setattr(backends, "all_backends", lambda: rows)
    monkeypatch.setattr(backends, "_capability", lambda: (9, 0))
    monkeypatch.delenv("PEFT_KERNELS_BACKEND", raising=False)
    monkeypatch.setattr(backends, "bound", backends.bound.__wrapped__)
    some = ("reference", "cpu", "triton")
    for measured, served in [
        (("cuda", "triton", "reference"), "triton"),
        (("cuda", "reference"), "reference"),  # no measurement of the other backend: the definition, and PEFT's forward
        (("cuda", "reference", "triton"), "reference"),
    ]:
        monkeypatch.setattr(backends, "MEASURED", {(9, 0): measured})
        assert backends.serving(some, "cuda") == served
        assert ("=triton uses" in backends.without_kernel("cuda", some)) == (served == "reference")
    monkeypatch.setenv("PEFT_KERNELS_BACKEND", "reference")
    assert backends.serving(some, "cuda") == "reference" and not backends.without_kernel("cuda", some)
