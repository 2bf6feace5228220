"""batched_lora beyond what every op must keep: the route, and a mixed batch against each adapter alone."""

import contextlib
import math

import pytest
import torch

import peft_kernels
from peft_kernels import backends, registry, testing
from peft_kernels.ops.batched_lora import route as layout
from peft_kernels.ops.batched_lora.samples import problem
from peft_kernels.ops.batched_lora.watch import Watch

OP = registry.ops()["batched_lora"]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PLACES = [
    pytest.param(backend, device, id=f"{backend}-{device}")
    for device in DEVICES
    for backend in backends.linked("batched_lora", device)
]
BATCHES = {
    "none": ([], 3),
    "one row": ([0], 1),
    "base only": ([-1] * 40, 5),
    "one adapter": ([2] * 40, 3),
    "distinct": (list(range(50)), 50),
    "whole tiles": ([0] * 16 + [1] * 32, 2),
    "ragged tiles": ([1, 0] * 17 + [1] * 7 + [-1], 4),
    "more adapters than rows": ([900, 3, -1, 900], 1000),
    "out of range": ([0, 7, -2, 1, 2**31 - 1, -(2**31)], 2),
}


def route_operator(backend):
    return getattr(torch.ops, f"peft_kernels_{backend}").batched_lora_route.default


@pytest.mark.parametrize("backend,device", PLACES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", BATCHES)
def test_route(backend, device, dtype, name):
    ids, adapters = BATCHES[name]
    tensor = torch.tensor(ids, dtype=dtype, device=device)
    with testing.poisoned_memory():
        route = route_operator(backend)(tensor, adapters).cpu()
    M, clean = len(ids), [i if 0 <= i < adapters else -1 for i in ids]
    used, routed, outside, *rest = route[: layout.HEADER].tolist()
    order = route[layout.HEADER + M : layout.HEADER + 2 * M].tolist()
    tiles = route[layout.HEADER + 2 * M :].view(-1, 3).tolist()
    assert route.dtype is torch.int32 and route.numel() == layout.length(M, adapters)
    assert rest == [M, adapters, 0, 0, 0] and layout.row_ids(route, M).tolist() == clean
    assert order == sorted(range(M), key=lambda row: (clean[row] < 0, clean[row]))
    assert routed == sum(i >= 0 for i in clean) and outside == sum(i != j for i, j in zip(ids, clean, strict=True))
    assert tiles[used:] == [[0, 0, 0]] * (len(tiles) - used)
    position = 0
    for adapter, first, rows in tiles[:used]:
        assert first == position and 1 <= rows <= layout.TILE
        assert all(clean[row] == adapter for row in order[first : first + rows])
        position += rows
    assert position == routed
    torch.library.opcheck(route_operator(backend), (tensor, adapters))


@pytest.mark.parametrize("bad", [5, -2, 2**40])
def test_ids_out_of_range_are_refused_on_the_cpu(bad):
    ids = torch.tensor([0, -1, bad, 4])
    with pytest.raises(
        ValueError, match=rf"^batched_lora_route: adapter_ids must be -1 or lie in \[0, 5\), got {bad} "
    ):
        peft_kernels.batched_lora_route(ids, 5)


@pytest.mark.parametrize(
    "ids,adapters,error,text",
    [
        (torch.zeros(3), 2, TypeError, "adapter_ids must be an int32 or int64 tensor, got torch.float32"),
        ([0, 1], 2, TypeError, "adapter_ids must be an int32 or int64 tensor, got list"),
        (torch.zeros(3, dtype=torch.int32), 0, ValueError, "adapters must be from 1"),
    ],
)
def test_bad_ids_are_refused_in_words(ids, adapters, error, text):
    with pytest.raises(error) as caught:
        peft_kernels.batched_lora_route(ids, adapters)
    assert str(caught.value).startswith(f"batched_lora_route: {text}")


def test_ids_out_of_range_raise_later_where_a_device_is_not_waited_for():
    watched = Watch(torch.device("cpu"))
    for ids, words in [([0, 4, -1], None), ([5, -2, 1], "2 rows were out of range"), ([0], None), ([9], "1 rows")]:
        watched.note(route_operator("reference")(torch.tensor(ids), 5))
        with contextlib.nullcontext() if words is None else pytest.raises(ValueError, match=words):
            watched.check()
    watched.check()


def test_ids_or_route_and_not_both():
    arguments = problem("cpu", torch.float32, torch.float32, ids=[0, 1, -1], entries=((0, 0, 2), (0, 1, 3)))
    ids = torch.tensor([0, 1, -1])
    (y,) = peft_kernels.batched_lora(**arguments)
    del arguments["route"]
    assert torch.equal(peft_kernels.batched_lora(**arguments, adapter_ids=ids)[0], y)
    for given in ({}, {"adapter_ids": ids, "route": peft_kernels.batched_lora_route(ids, 2)}):
        with pytest.raises(ValueError, match="adapter_ids or route must be given, and not both"):
            peft_kernels.batched_lora(**arguments, **given)


READERS = [place for place in PLACES if place.values[0] in ("reference", "cpu")]  # a GPU's kernels read no route back


@pytest.mark.parametrize("backend,device", READERS)
def test_a_route_of_other_rows_is_refused(backend, device):
    """Its length fits, what stands in it does not."""
    arguments = problem(device, torch.float32, torch.float32, ids=[0, 1, -1], entries=((0, 0, 2), (0, 1, 3)))
    changes = [(3, 2), (layout.HEADER + 3, -5), (layout.HEADER + 3, 3)] if backend == "cpu" else [(3, 2)]
    for place, number in changes:
        route = arguments["route"].clone()
        route[place] = number
        with pytest.raises((RuntimeError, ValueError), match="route must come from batched_lora_route for the 3 rows"):
            testing.operators(backend, OP)[0](*(arguments | {"route": route}).values())


def mixed(p, device="cpu", dtype=torch.float64):
    """Three adapters on q, k and v, some projections untouched, rows in no order; enough for several tiles of one."""
    ids = [2, 0, -1, 1, 2, 2, -1, 0, 1, 2, 0] + [2, 0] * 20
    entries = ((0, 0, 4), (1, 0, 3), (0, 1, 5), (2, 1, 2), (0, 2, 6), (1, 2, 1), (2, 2, 8))
    sizes = dict(K=37, N=(24, 16, 20), p=p, biased=True, lora_biased=True)
    return problem(device, dtype, dtype, ids=ids, entries=entries, **sizes), torch.tensor(ids, device=device)


def alone(arguments, chosen):
    """The arguments of lora_linear_group with the chosen entries only, in their places: the others add nothing."""
    off = [i for i in range(len(arguments["member"])) if i not in chosen]
    rest = {name: value for name, value in arguments.items() if name not in ("route", "adapter")}
    for name in ("lora_B", "lora_bias"):
        rest[name] = [t.detach() * 0 if i in off else t for i, t in enumerate(arguments[name])]
    return rest


@pytest.mark.parametrize("backend,device", PLACES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_mixed_batch_equals_each_adapter_alone(backend, device, p):
    """Outputs row by row, the same masks included; gradients when each adapter's loss is its own mean, summed."""
    arguments, ids = mixed(p, device)
    forward = testing.operators(backend, OP)[0]
    trained = [t.requires_grad_() for name in ("lora_A", "lora_B", "lora_bias") for t in arguments[name]]
    trained.append(arguments["x"].requires_grad_())

    def loss(y, adapter):
        return sum((out[ids == adapter].sin() * 3).mean() for out in y)

    y = forward(*arguments.values())[0]
    grads = torch.autograd.grad(sum(loss(y, adapter) for adapter in range(3)), trained)
    sums = [torch.zeros_like(t) for t in trained]
    for adapter in (-1, 0, 1, 2):
        chosen = [i for i, owner in enumerate(arguments["adapter"]) if owner == adapter]
        y_alone = peft_kernels.lora_linear_group(**alone(arguments, chosen))
        for got, wanted in zip(y, y_alone, strict=True):
            torch.testing.assert_close(got[ids == adapter], wanted[ids == adapter])
        if adapter >= 0:
            found = torch.autograd.grad(loss(y_alone, adapter), trained, allow_unused=True)
            for total, grad in zip(sums, found, strict=True):
                total += 0 if grad is None else grad
    for got, wanted in zip(grads, sums, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend,device", PLACES)
def test_gradients_of_absent_adapters_are_zeros(backend, device):
    with testing.poisoned_memory():
        arguments = problem(
            device, torch.bfloat16, torch.float16, ids=[1, 1, -1], entries=((0, 0, 4), (0, 1, 4)), lora_biased=True
        )
        results = OP.evaluate(*testing.operators(backend, OP), arguments, testing.gradients_for(OP, arguments))
    for name in ("lora_A", "lora_B", "lora_bias"):
        assert results[f"grad {name}[0]"].count_nonzero() == 0 < results[f"grad {name}[1]"].count_nonzero()


@pytest.mark.parametrize("backend,device", PLACES)
def test_nan_in_an_adapter_changes_no_bit_elsewhere(backend, device):
    entries = tuple((g, adapter, 4 + adapter) for adapter in range(3) for g in range(2))
    ids = [2, 0, -1, 1, 2, 2, -1, 0, 1, 2, 0]
    runs = []
    for value in (1.0, math.nan):
        arguments = problem(device, torch.float32, torch.float32, ids=ids, entries=entries, N=(48, 32), p=0.1)
        for i, adapter in enumerate(arguments["adapter"]):
            if adapter == 1:
                arguments["lora_A"][i].fill_(value)
                arguments["lora_B"][i].fill_(value)
        runs.append(OP.evaluate(*testing.operators(backend, OP), arguments, testing.gradients_for(OP, arguments)))
    clean, dirty = runs
    others = torch.tensor(ids) != 1
    for name in clean:
        if name.startswith(("y[", "h", "grad x")):
            assert torch.equal(clean[name][others], dirty[name][others]), name
        elif name.startswith("grad lora"):
            adapter = arguments["adapter"][int(name.split("[")[1][:-1])] if "bias" not in name else 0
            assert adapter == 1 or torch.equal(clean[name], dirty[name]), name
        else:
            assert torch.equal(clean[name], dirty[name]), name


def test_compile_fullgraph():
    arguments, _ = mixed(0.0, dtype=torch.float32)
    weights = [t.requires_grad_() for t in arguments["lora_B"]]
    x = arguments.pop("x")
    compiled = torch.compile(lambda x: peft_kernels.batched_lora(x, **arguments)[0].relu(), fullgraph=True)
    expected = peft_kernels.batched_lora(x, **arguments)[0].relu()
    torch.testing.assert_close(compiled(x), expected)
    got = torch.autograd.grad(compiled(x).sum(), weights, allow_unused=True)
    for grad, wanted in zip(got, torch.autograd.grad(expected.sum(), weights, allow_unused=True), strict=True):
        torch.testing.assert_close(grad, wanted)


def test_autocast_takes_the_autocast_dtype_and_keeps_gradient_dtypes():
    x = torch.randn(6, 48, requires_grad=True)
    weight, bias = torch.randn(32, 48), torch.randn(32)
    a = [torch.randn(r, 48, requires_grad=True) for r in (4, 2)]
    b = [torch.randn(32, r, requires_grad=True) for r in (4, 2)]
    given = dict(member=[0, 0], adapter=[0, 1], scaling=[0.5, 2.0], adapter_ids=torch.tensor([1, 0, -1, 1, 1, 0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y,) = peft_kernels.batched_lora(x, [weight], [bias], a, b, **given)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert {t.grad.dtype for t in (x, *a, *b)} == {torch.float32}
    half = x.detach().bfloat16(), [weight.bfloat16()], [bias.bfloat16()]
    assert torch.equal(y, peft_kernels.batched_lora(*half, a, b, **given)[0])
