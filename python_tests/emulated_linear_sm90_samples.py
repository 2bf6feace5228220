"""lora_linear by the kernels for sm_90 that PEFT_KERNELS_SM90=1 asks for, on the emulator.

Not collected by itself: test_emulated.py runs it.
"""

import math

import pytest
import torch
from emulated import (
    BF16,
    F16,
    F32,
    LATE,
    OP,
    RANDOM,
    in_order,  # noqa: F401  (a fixture of every test)
    of_schedules,
    operators,
    set_schedule,
)
from sm90_problems import LINEAR, assert_all_gemms_differ

from peft_kernels import testing
from peft_kernels.ops.lora_linear.samples import problem

FORWARD, BACKWARD = operators(OP)


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_SM90", "1")


@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F16, F16)], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_matches_oracle(name, pair, monkeypatch):
    """And has been there, in the forward and in the backward."""
    arguments = problem("cpu", *pair, **LINEAR[name])
    with testing.poisoned_memory():
        testing.assert_matches_oracle(OP, arguments, FORWARD, BACKWARD)
    dy = testing.output_gradients(OP.functions[0].reference(*arguments.values())[0])
    got = OP.evaluate(FORWARD, BACKWARD, arguments, dy)
    monkeypatch.delenv("PEFT_KERNELS_SM90")
    other = OP.evaluate(FORWARD, BACKWARD, arguments, dy)
    assert_all_gemms_differ(got, other, LINEAR[name]["ranks"])


@of_schedules
@pytest.mark.parametrize("name", LINEAR)
def test_same_bits_for_every_schedule(name):
    arguments = problem("cpu", BF16, BF16, **LINEAR[name])
    dy = testing.output_gradients(OP.functions[0].reference(*arguments.values())[0])
    runs = []
    for schedule in [(0, LATE), (1, RANDOM), (2, LATE)]:
        set_schedule(*schedule)
        runs.append(OP.evaluate(FORWARD, BACKWARD, arguments, dy))
    for other in runs[1:]:
        assert all(torch.equal(runs[0][key], other[key]) for key in runs[0])


def test_nan_stays_in_its_row():
    arguments = problem("cpu", BF16, BF16, **LINEAR["dropout"])
    clean = FORWARD(*arguments.values())[0][0]
    arguments["x"][1] = math.nan
    dirty = FORWARD(*arguments.values())[0][0]
    others = [m for m in range(136) if m != 1]
    assert dirty[1].isnan().all() and torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("unaligned", ["x", "weight"])
def test_rows_that_tma_cannot_take_go_the_other_way(unaligned, monkeypatch):
    arguments = problem("cpu", BF16, BF16, **LINEAR["dropout"])
    tensor = arguments["x"] if unaligned == "x" else arguments["weight"][0]
    shifted = torch.empty(tensor.numel() + 1, dtype=BF16)[1:].view_as(tensor).copy_(tensor)
    arguments |= {"x": shifted} if unaligned == "x" else {"weight": [shifted]}
    got = FORWARD(*arguments.values())[0][0]
    monkeypatch.delenv("PEFT_KERNELS_SM90")
    assert torch.equal(got, FORWARD(*arguments.values())[0][0])
