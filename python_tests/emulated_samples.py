"""The CUDA operators on the emulator: every sample of the registry, through the binding and the kernels that ship; and
what is asked of LoRA, of one weight and over a pool.

Not collected by itself: test_emulated.py runs it, and the emulated_*_samples.py beside it, in one process per build of
the emulator. A bug that the emulator names ends the process.
"""

import math

import interpreted_samples
import pytest
import torch
from emulated import (
    ATTENTION,
    BF16,
    BUILD,
    EARLY,
    EMULATED,
    F16,
    F32,
    LATE,
    OP,
    OPS,
    POISON,
    POOLED,
    RANDOM,
    SCHEDULES,
    in_order,  # noqa: F401  (a fixture of every test)
    of_schedules,
    operators,
    set_schedule,
)
from pools import partly_over

from peft_kernels import testing
from peft_kernels.ops.batched_lora import pooled_samples, route
from peft_kernels.ops.lora_linear.samples import problem

FORWARD, BACKWARD = operators(OP)
MASK, ROUTE = EMULATED.lora_dropout_mask.default, EMULATED.batched_lora_route.default
FIRST = {"plain": 0, "asan": 2, "race": 1}[BUILD]  # each build meets a sample in another pair of dtypes


def _runs():
    """Every sample in turns of dtypes, those of attention also of schedules; what is not in its turn is slow."""
    for op in OPS:
        for place, run in enumerate(interpreted_samples.in_turns(op, first=FIRST)):
            for i, schedule in enumerate(SCHEDULES):
                late = op is ATTENTION and (place + i) % len(SCHEDULES) != 0
                late = late or (BUILD == "race" and op.name == "lora_add")  # it has no kernel of its own
                marks = [pytest.mark.slow] if late else run.marks
                yield pytest.param(op, *run.values, schedule, id=f"{op.name}-{run.id}-{schedule[0]}", marks=marks)


def test_what_the_operators_allocate_is_poisoned():
    assert math.isnan(POISON)


@pytest.mark.parametrize("op,sample,pair,schedule", _runs())
def test_matches_oracle(op, sample, pair, schedule, count_sample):
    set_schedule(*schedule)
    with testing.poisoned_memory():
        testing.assert_matches_oracle(op, sample.make("cpu", *pair), *operators(op))
    count_sample((f"emulated-{BUILD}", "cpu"))


@of_schedules
@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F16, F16), (F32, F32)], ids=str)
@pytest.mark.parametrize("rows", [5, 150])
def test_same_bits_for_every_schedule(rows, pair):
    sizes = dict(K=264, N=(136, 40), ranks=((16, 3), (8,)))
    arguments = problem("cpu", *pair, rows=(rows,), p=0.1, biased=True, lora_biased=True, **sizes)
    dy = testing.output_gradients(OP.functions[0].reference(*arguments.values())[0])
    runs = []
    for schedule in [(0, LATE), (1, EARLY), (2, LATE), (3, RANDOM)]:
        set_schedule(*schedule)
        runs.append(OP.evaluate(FORWARD, BACKWARD, arguments, dy))
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 0x0123_4567_89AB_CDEF])
@pytest.mark.parametrize(
    "shape", [(5, 100, 0.1, 0), (3, 7, 0.5, 2), (40, 300, 0.999999, 1), (2, 64, 0.0, 0), (0, 4, 0.1, 0)]
)
def test_dropout_mask_is_bit_equal(seed, shape):
    seed = torch.tensor(seed)
    assert torch.equal(MASK(seed, *shape), OP.functions[2].reference(seed, *shape))


@pytest.mark.parametrize("pair", [(BF16, BF16), (F32, F32)], ids=str)
@pytest.mark.parametrize("rows,K", [(3, 64), (3, 67), (40, 67)])
def test_nan_stays_in_its_row(rows, K, pair):
    arguments = problem("cpu", *pair, rows=(rows,), K=K, N=(131,), p=0.1)
    clean = FORWARD(*arguments.values())[0][0]
    arguments["x"][1] = math.nan
    dirty = FORWARD(*arguments.values())[0][0]
    others = [m for m in range(rows) if m != 1]
    assert dirty[1].isnan().all() and torch.equal(dirty[others], clean[others])


@pytest.mark.skipif(BUILD != "plain", reason="the other builds keep records of all that memory")
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_more_than_2_31_elements_apart(dtype):
    arguments = problem("cpu", dtype, dtype, rows=(3,), K=8, N=(16,))
    stride = 2**30 + 8
    far = torch.empty(2 * stride + 8, dtype=dtype).as_strided((3, 8), (stride, 1))  # untouched pages cost nothing
    far.copy_(arguments["x"])
    near = FORWARD(*arguments.values())[0][0]
    assert torch.equal(FORWARD(*(arguments | {"x": far}).values())[0][0], near)


def test_only_needed_gradients_are_written():
    arguments = problem("cpu", BF16, BF16, rows=(20,), K=40, N=(24, 40), ranks=((3,), (5, 4)), p=0.1)
    y, h = FORWARD(*arguments.values())
    dy = testing.output_gradients(y)
    rest = [arguments[n] for n in ("weight", "lora_A", "lora_B", "member", "scaling", "dropout_p", "seed")]
    full = BACKWARD(dy, arguments["x"], h, *rest, [True] * 14)
    for i, gradient in enumerate(full):
        needs = [j == i for j in range(14)]
        reads_x, reads_h = any(needs[1:3]) or any(needs[5:8]), any(needs[8:11])
        with testing.poisoned_memory():
            alone = BACKWARD(dy, arguments["x"] if reads_x else None, h if reads_h else None, *rest, needs)
        assert torch.equal(alone[i], gradient), i
        assert all(alone[j].numel() == 0 for j in range(14) if j != i)


@pytest.mark.parametrize("op,bad", [pytest.param(op, b, id=f"{op.name}-{b.id}") for op in OPS for b in op.bad_inputs()])
def test_bad_input_is_refused_in_words(op, bad):
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        operators(op)[0](*bad.make("cpu").values())
    if "sparse" not in bad.id and "device" not in bad.id:  # those two PyTorch's dispatcher refuses before the kernel
        assert bad.text in str(caught.value)


# -- batches over a pool ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("M,adapters", [(0, 3), (1, 1), (33, 2), (64, 64), (70, 5000), (1500, 20000)])
def test_route_is_equal(M, adapters, dtype):
    ids = torch.randint(-2, adapters + 1, (M,), generator=torch.Generator().manual_seed(M)).to(dtype)
    with testing.poisoned_memory():
        assert torch.equal(ROUTE(ids, adapters), route.reference(ids, adapters))


@pytest.mark.parametrize("pair", pooled_samples.PAIRS, ids=str)
@pytest.mark.parametrize("K,N", [(520, (264, 40)), (67, (131,))])
def test_a_row_of_a_batch_has_the_bits_of_the_row_alone(K, N, pair):
    ranks = tuple((r, 70 - r)[: len(N)] for r in (1, 8, 17, 0, 64))
    kinds = dict(
        biased=True, gained=True, down_biased=True, activations=("gelu", "identity", "sigmoid", "relu", "tanh")
    )
    arguments = pooled_samples.problem("cpu", *pair, rows=37, K=K, N=N, ranks=ranks, **kinds)
    forward = operators(POOLED)[0]
    whole = POOLED.evaluate(forward, None, arguments, None)
    ids = route.row_ids(arguments["route"], 37)
    for row in (0, 1, 18, 36):
        alone = {"x": arguments["x"][row : row + 1], "route": ROUTE(ids[row : row + 1], len(ranks))}
        alone["y"] = [y[row : row + 1] for y in arguments["y"]]
        alone = POOLED.evaluate(forward, None, arguments | alone, None)
        assert all(torch.equal(alone[name][0], whole[name][row]) for name in whole)


def test_nine_slices_go_in_two_turns():
    sizes = dict(rows=5, K=40, N=(24,) * 9, ranks=((3,) * 9, (0, 8) * 4 + (1,)))
    arguments = pooled_samples.problem("cpu", BF16, BF16, **sizes)
    testing.assert_matches_oracle(POOLED, arguments, *operators(POOLED))


@pytest.mark.parametrize("pair", pooled_samples.PAIRS, ids=str)
@pytest.mark.parametrize("K", [520, 67])
def test_x_may_be_y(K, pair):
    """Of the first slice; the last of nine is launched behind it and reads x as well."""
    sizes = dict(N=(K, *(24,) * 8), ranks=((3,) * 9, (0, 8) * 4 + (1,)), activations=("gelu", "identity"))
    arguments = pooled_samples.problem("cpu", *pair, rows=19, K=K, **sizes)
    arguments["y"][0] = arguments["x"].clone()
    forward, (x, *others) = operators(POOLED)[0], (y.clone() for y in arguments["y"])
    wanted = POOLED.evaluate(forward, None, arguments, None).values()
    for schedule in SCHEDULES:
        set_schedule(*schedule)
        got = [x.clone(), *(y.clone() for y in others)]
        forward(*(arguments | {"x": got[0], "y": got}).values())
        assert all(torch.equal(*both) for both in zip(got, wanted, strict=True))


@pytest.mark.parametrize("shift", [(0, 8), (0, 3), (5, 16)], ids=str)
@pytest.mark.parametrize("pair", pooled_samples.PAIRS, ids=str)
def test_x_may_lie_partly_over_y(pair, shift):
    sizes = dict(N=(72, *(24,) * 8), ranks=((3,) * 9, (0, 8) * 4 + (1,)), activations=("gelu", "identity"))
    arguments = pooled_samples.problem("cpu", *pair, rows=19, K=64, **sizes)
    forward = operators(POOLED)[0]
    results = []
    for schedule in [SCHEDULES[0], *SCHEDULES]:
        set_schedule(*schedule)
        (x, y), (apart, _) = (partly_over(arguments["x"], arguments["y"][0], *shift) for _ in range(2))
        got = [y, *(other.clone() for other in arguments["y"][1:])]
        forward(*(arguments | {"x": x if results else apart, "y": got}).values())
        results.append(got)
    for got in results[1:]:
        assert all(torch.equal(*both) for both in zip(got, results[0], strict=True))
