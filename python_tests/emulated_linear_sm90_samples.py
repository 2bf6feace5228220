"""The kernels for sm_90a on the emulator, by the operators that PEFT_KERNELS_SM90=1 has take them: lora_linear.

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

from peft_kernels import testing
from peft_kernels.ops.lora_linear.samples import problem

FORWARD, BACKWARD = operators(OP)
EVERYTHING = dict(biased=True, lora_biased=True)
PROBLEMS = {
    "dropout": dict(rows=(136,), K=72, N=(264,), ranks=((8,),), p=0.1, **EVERYTHING),
    "stacked": dict(rows=(2, 68), K=136, N=(40,), ranks=((3, 16),), **EVERYTHING),
    "group": dict(rows=(150,), K=72, N=(136, 24, 40), ranks=((5,), (), (16, 1)), biased=True),
    "group-dropout": dict(rows=(150,), K=72, N=(136, 40), ranks=((5,), (3,)), p=0.1),
}


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_SM90", "1")


@pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F16, F16)], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_matches_oracle(name, pair, monkeypatch):
    """And has other bits than the kernels that it replaces, which round y and dx twice: it has been there."""
    arguments = problem("cpu", *pair, **PROBLEMS[name])
    with testing.poisoned_memory():
        testing.assert_matches_oracle(OP, arguments, FORWARD, BACKWARD)
    dy = testing.output_gradients(OP.functions[0].reference(*arguments.values())[0])
    got = OP.evaluate(FORWARD, BACKWARD, arguments, dy)
    monkeypatch.delenv("PEFT_KERNELS_SM90")
    other = OP.evaluate(FORWARD, BACKWARD, arguments, dy)
    changed = {key for key in got if not torch.equal(got[key], other[key])}
    assert changed and all(key.startswith(("y", "grad x")) for key in changed), changed


@of_schedules
@pytest.mark.parametrize("name", PROBLEMS)
def test_same_bits_for_every_schedule(name):
    arguments = problem("cpu", BF16, BF16, **PROBLEMS[name])
    dy = testing.output_gradients(OP.functions[0].reference(*arguments.values())[0])
    runs = []
    for schedule in [(0, LATE), (1, RANDOM), (2, LATE)]:
        set_schedule(*schedule)
        runs.append(OP.evaluate(FORWARD, BACKWARD, arguments, dy))
    for other in runs[1:]:
        assert all(torch.equal(runs[0][key], other[key]) for key in runs[0])


def test_nan_stays_in_its_row():
    arguments = problem("cpu", BF16, BF16, **PROBLEMS["dropout"])
    clean = FORWARD(*arguments.values())[0][0]
    arguments["x"][1] = math.nan
    dirty = FORWARD(*arguments.values())[0][0]
    others = [m for m in range(136) if m != 1]
    assert dirty[1].isnan().all() and torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("unaligned", ["x", "weight"])
def test_rows_that_tma_cannot_take_go_the_other_way(unaligned, monkeypatch):
    arguments = problem("cpu", BF16, BF16, **PROBLEMS["dropout"])
    tensor = arguments["x"] if unaligned == "x" else arguments["weight"][0]
    shifted = torch.empty(tensor.numel() + 1, dtype=BF16)[1:].view_as(tensor).copy_(tensor)
    arguments |= {"x": shifted} if unaligned == "x" else {"weight": [shifted]}
    got = FORWARD(*arguments.values())[0][0]
    monkeypatch.delenv("PEFT_KERNELS_SM90")
    assert torch.equal(got, FORWARD(*arguments.values())[0][0])
