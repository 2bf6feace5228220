"""batched_lora's Triton kernels interpreted on CPU tensors: every sample against the oracle, and what else must hold.

Not collected by itself: test_triton.py runs it in a process of its own with TRITON_INTERPRET=1, which must be set
before triton is imported.
"""

import math
from dataclasses import replace

import interpreted_samples
import pytest
import torch
import triton_interpreter
from triton.runtime import interpreter

triton_interpreter.install()

from peft_kernels import registry, testing  # noqa: E402
from peft_kernels.ops.batched_lora import triton_entries, triton_training  # noqa: E402
from peft_kernels.ops.batched_lora.samples import problem  # noqa: E402

OP = registry.ops()["batched_lora"]
FORWARD, BACKWARD = (triton_training.FUNCTIONS[function.name] for function in OP.functions)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LONG = ("tiles", "row", "distinct", "zipf", "interleaved", "sites")  # many seconds in each pair of dtypes
triton_interpreter.follow(triton_entries, "address")


@pytest.fixture(autouse=True)
def _alone():
    torch.set_num_threads(1)
    interpreter._interpreter.named.clear()


def check(arguments):
    with testing.poisoned_memory():
        testing.assert_matches_oracle(OP, arguments, FORWARD, BACKWARD)


@pytest.mark.parametrize("sample,pair", interpreted_samples.in_turns(OP, LONG))
def test_matches_oracle(sample, pair):
    check(sample.make("cpu", *pair))


@pytest.mark.parametrize(
    "pair,programs,ids,N",
    [
        ((BF16, F32), 1, [0, -1, 1, 1] * 20, (700,)),  # two tiles and several blocks of columns for a program
        ((F32, F32), 2**20, [-1, 0] * 130, (24,)),  # an entry's rows in pieces
    ],
    ids=["wide", "pieces"],
)
def test_how_work_is_cut(pair, programs, ids, N, monkeypatch):
    monkeypatch.setattr(triton_training, "PROGRAMS", programs)
    entries = tuple((0, adapter, 8) for adapter in range(1 + max(ids)))
    check(problem("cpu", *pair, ids=ids, entries=entries, K=24, N=N, p=0.1, biased=True, lora_biased=True))


def test_many_entries_fill_several_tables():
    entries = tuple((0, adapter, 2 + adapter % 2) for adapter in range(70))
    forward_alone = replace(OP, evaluate=lambda forward, _, arguments, dy: {"y": forward(*arguments.values())[0][0]})
    sample = problem("cpu", F32, F32, ids=[3, 69, 0, 64, 3], entries=entries)
    testing.assert_matches_oracle(forward_alone, sample, FORWARD, BACKWARD)


def gradients(arguments, h, dy, needs):
    rest = [value for name, value in arguments.items() if name not in ("x", "bias", "lora_bias")]
    return BACKWARD(dy, arguments["x"], h, *rest, needs)


def test_each_gradient_alone_is_the_same():
    sites = ((0, 0, 8), (0, 2, 3))
    arguments = problem("cpu", F32, F32, ids=[0, 1, 2, 2, -1, 0, 1], entries=sites, K=24, N=(24,), p=0.1)
    y, h = FORWARD(*arguments.values())
    dy, count = testing.output_gradients(y), 1 + 2 * 1 + 3 * 2
    together = gradients(arguments, h, dy, [True] * count)
    for i in range(count):
        reads_x, reads_h = i in (1, 3, 4), i in (5, 6)
        given = arguments | {"x": arguments["x"] if reads_x else None}
        alone = gradients(given, h if reads_h else None, dy, [j == i for j in range(count)])
        assert torch.equal(alone[i], together[i])
        assert all(t.numel() == 0 for j, t in enumerate(alone) if j != i)


@pytest.mark.parametrize("place", ["x", "dy"])
def test_nan_of_a_row_reaches_no_other_adapter(place):
    ids = [0, 1, -1, 1, 0, 2]
    arguments = problem("cpu", F32, F32, ids=ids, entries=((0, 0, 4), (0, 1, 5), (0, 2, 3)), p=0.1)
    runs = []
    for value in (1.0, math.nan):
        arguments["x"][3] = value if place == "x" else 1.0
        y, h = FORWARD(*arguments.values())
        dy = testing.output_gradients(y)
        dy[0][3] = value if place == "dy" else 1.0
        needs = [True] + [False] * 2 + [True] * 6 + [False] * 3
        dx, _, _, *factors = gradients(arguments, h, dy, needs)[:9]
        others = [m for m in range(len(ids)) if m != 3]
        runs.append([y[0][others], dx[others], factors[0], factors[2], factors[3], factors[5], factors[1]])
    for clean, dirty in zip(*(run[:-1] for run in runs), strict=True):
        assert torch.equal(clean, dirty)
    assert runs[1][-1].isnan().any()


def test_more_than_2_31_elements_apart():
    arguments = problem("cpu", BF16, BF16, ids=[1, 0, 1], entries=((0, 0, 4), (0, 1, 5)), K=8, N=(16,))
    stride = 2**30 + 8
    far = torch.empty(2 * stride + 8, dtype=BF16).as_strided((3, 8), (stride, 1))
    far.copy_(arguments["x"])
    near = FORWARD(*arguments.values())[0][0]
    assert torch.equal(FORWARD(*(arguments | {"x": far}).values())[0][0], near)


def test_a_number_of_every_size_arrives_in_the_table():
    a, b = torch.zeros(512, 3), torch.zeros(7, 512)
    scaling = [-1e-300, 0.1]
    table = triton_entries.entry_table(
        torch.device("cpu"), [a, a], [b, b], [None, a], [0, 1], [2**31 + 5, 0], scaling, [0.0, 0.9999999], 2
    )
    fields = table[: triton_entries.FIELDS * 2].view(-1, 2).tolist()
    addresses = [[a.data_ptr()] * 2, [b.data_ptr()] * 2, [0, a.data_ptr()], [0, 0], [0, 0]]
    halves = torch.tensor(scaling, dtype=torch.float64).view(torch.int64)
    assert fields[:5] == [[2**31 + 5, 0], [0, 1], [512, 512], [0, 512], [65536, 1]]
    assert [(high << 32) | low for low, high in zip(*fields[5:7], strict=True)] == [h % 2**64 for h in halves.tolist()]
    assert fields[7:] == [*addresses, [0, 512 * 3], [0, 0]]


@pytest.mark.parametrize("bad", [pytest.param(b, id=b.id) for b in OP.bad_inputs()])
def test_bad_input_is_refused_in_words(bad):
    with pytest.raises(bad.error) as caught:
        FORWARD(*bad.make("cpu").values())
    assert bad.text in str(caught.value)


@pytest.mark.parametrize(
    "text,changes",
    [
        ("dy[0] must be of y[0]'s shape, dtype and device", {"dy": lambda dy: [dy[0][:, 1:]]}),
        ("x must have as many rows as dy", {"x": lambda x: x[1:]}),
        ("h must be the contiguous [M, R] that the forward returned", {"h": lambda h: h[:, 1:]}),
        ("h must be given for gradients of lora_B", {"h": lambda h: None}),
        ("needs must have 9 entries, got 8", {"needs": lambda needs: needs[1:]}),
        ("route must come from batched_lora_route for the 3 rows", {"route": lambda r: r[:-1]}),
        ("adapter must have one entry per lora_A (2), got 1", {"adapter": lambda adapter: adapter[1:]}),
    ],
    ids=str,
)
def test_bad_input_of_the_backward_is_refused_in_words(text, changes):
    forward = problem("cpu", F32, F32, ids=[0, 1, 0], entries=((0, 0, 2), (0, 1, 3)))
    y, h = FORWARD(*forward.values())
    rest = {name: value for name, value in forward.items() if name not in ("x", "bias", "lora_bias")}
    good = {"dy": testing.output_gradients(y), "x": forward["x"], "h": h, **rest, "needs": [True] * 9}
    with pytest.raises(ValueError) as caught:
        BACKWARD(*(good | {name: change(good[name]) for name, change in changes.items()}).values())
    assert text in str(caught.value)
