"""batched_lora_ and few rows of bottleneck_adapter in one launch, by the kernels for sm_90 that PEFT_KERNELS_SM90=1
asks for, on the emulator.

Not collected by itself: test_emulated.py runs it.
"""

import pytest
import sm90_problems
import torch
from emulated import (
    BF16,
    BOTTLENECK,
    F16,
    F32,
    POOLED,
    SCHEDULES,
    in_order,  # noqa: F401  (a fixture of every test)
    of_schedules,
    operators,
    set_schedule,
)

from peft_kernels import testing
from peft_kernels.ops.batched_lora import pooled_samples
from peft_kernels.ops.bottleneck_adapter import samples as bottleneck_samples

FORWARD = operators(POOLED)[0]
SAMPLES = [sample for sample in POOLED.samples() if not sample.busy]


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_SM90", "1")


def filled(operator, arguments):
    """Calls, and counts the tensors that the binding allocates: here they are filled with NaN."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        operator(*arguments.values())
    return sum(event.name == "aten::fill_" for event in profile.events())


def allocates(arguments):
    """Whether batched_lora_ takes scratch, as the two launches do for h."""
    return filled(FORWARD, arguments) > 0


@of_schedules
@pytest.mark.parametrize("place", range(len(SAMPLES)), ids=[sample.id for sample in SAMPLES])
def test_every_sample_has_the_same_bits(place, monkeypatch):
    arguments = SAMPLES[place].make("cpu", *((BF16, F16)[place % 2],) * 2)
    one = POOLED.evaluate(FORWARD, None, arguments, None)
    monkeypatch.delenv("PEFT_KERNELS_SM90")
    two = POOLED.evaluate(FORWARD, None, arguments, None)
    assert all(torch.equal(one[name].view(torch.int16), two[name].view(torch.int16)) for name in one)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", sm90_problems.POOLED)
def test_one_launch_matches_the_oracle_and_has_the_bits_of_two(name, dtype, monkeypatch):
    arguments = pooled_samples.problem("cpu", dtype, dtype, **sm90_problems.POOLED[name])
    with testing.poisoned_memory():
        testing.assert_matches_oracle(POOLED, arguments, *operators(POOLED))
    runs = []
    for schedule in SCHEDULES:
        set_schedule(*schedule)
        runs.append(POOLED.evaluate(FORWARD, None, arguments, None))
    monkeypatch.delenv("PEFT_KERNELS_SM90")
    two = POOLED.evaluate(FORWARD, None, arguments, None)
    assert all(torch.equal(one[key], two[key]) for one in runs for key in two)
    assert allocates(arguments)
    monkeypatch.setenv("PEFT_KERNELS_SM90", "1")
    assert not allocates(arguments)


def test_x_may_be_y(monkeypatch):
    sizes = dict(rows=19, K=520, N=(520,), ranks=((3,), (20,)), activations=("gelu", "identity"))
    arguments = pooled_samples.problem("cpu", BF16, BF16, **sizes)
    arguments["y"] = [arguments["x"].clone()]
    (want,) = POOLED.evaluate(FORWARD, None, arguments, None).values()
    for schedule in SCHEDULES:
        set_schedule(*schedule)
        x = arguments["x"].clone()
        in_place = arguments | {"x": x, "y": [x]}
        FORWARD(*in_place.values())
        assert torch.equal(x, want)
    assert not allocates(in_place)


def pair_of_slices(dtype=BF16, pages=BF16, **changes):
    sizes = dict(rows=19, K=72, N=(72, 24), ranks=((3, 9), (20, 3)))
    return pooled_samples.problem("cpu", dtype, pages, **(sizes | changes))


def x_in_one_y_of_two():
    arguments = pair_of_slices()
    return arguments | {"x": arguments["y"][0]}


def x_not_aligned():
    arguments = pair_of_slices()
    return arguments | {"x": torch.cat([arguments["x"]] * 2, 1)[:, 3:75]}


@pytest.mark.parametrize(
    "make,one",
    [
        (pair_of_slices, True),
        (x_in_one_y_of_two, False),
        (x_not_aligned, False),
        (lambda: pair_of_slices(BF16, F32), False),
        (lambda: pair_of_slices(F32, F32), False),
        (lambda: pair_of_slices(N=(24,) * 9, ranks=((3,) * 9,)), False),
    ],
    ids=["taken", "x in one y of two", "x not aligned", "fp32 pages", "fp32", "nine slices"],
)
def test_what_it_does_not_take_goes_in_two_launches(make, one):
    assert allocates(make()) is not one


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("name", sm90_problems.BOTTLENECKS)
def test_few_rows_of_a_bottleneck_match_the_oracle_in_one_launch(name, dtype, monkeypatch):
    arguments = bottleneck_samples.problem("cpu", dtype, dtype, **sm90_problems.BOTTLENECKS[name])
    with testing.poisoned_memory():
        testing.assert_matches_oracle(BOTTLENECK, arguments, *operators(BOTTLENECK))
    forward, runs = operators(BOTTLENECK)[0], []
    for schedule in SCHEDULES:
        set_schedule(*schedule)
        runs.append(forward(*arguments.values()))
    for y, h in runs[1:]:
        assert torch.equal(y, runs[0][0]) and torch.equal(h, runs[0][1])
    assert filled(forward, arguments) == 2  # y and h
    monkeypatch.delenv("PEFT_KERNELS_SM90")
    assert filled(forward, arguments) == 3
