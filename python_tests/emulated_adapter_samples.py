"""The CUDA operators of bottleneck_adapter on the emulator beyond the samples that emulated_samples.py runs."""

import math

import bad_bottlenecks
import pytest
import torch
from emulated import (
    BF16,
    BOTTLENECK,
    BUILD,
    EARLY,
    F16,
    F32,
    LATE,
    RANDOM,
    in_order,  # noqa: F401  (a fixture of every test)
    of_schedules,
    operators,
    set_schedule,
)

from peft_kernels import testing
from peft_kernels.ops.bottleneck_adapter import samples as bottleneck_samples
from peft_kernels.ops.bottleneck_adapter.op import GRADIENTS

EVERYTHING = dict(K=264, N=136, E=40, scale="channel", gated=True, p=0.1)
BOTTLENECKS = {
    "everything": EVERYTHING,
    "serial": dict(K=136, N=None, E=20, scale="scalar", p=0.1),
    "output": EVERYTHING | {"dropout_on": "output"},
    "normed": dict(K=136, N=None, E=20, norm="layer_norm", gated=True),
}
each_bottleneck = pytest.mark.parametrize("case", BOTTLENECKS)
each_pair = pytest.mark.parametrize("pair", [(BF16, BF16), (BF16, F32), (F16, F16), (F32, F32)], ids=str)


def bottleneck(case, pair, rows):
    arguments = bottleneck_samples.problem("cpu", *pair, rows=(rows,), **BOTTLENECKS[case])
    return arguments, testing.gradients_for(BOTTLENECK, arguments)


@pytest.mark.skipif(BUILD != "plain", reason="half a minute each; the kernel's own test runs in every build")
@pytest.mark.parametrize("pair", [(BF16, BF16), pytest.param((F16, F16), marks=pytest.mark.slow)], ids=str)
def test_many_rows_of_a_bottleneck_match_the_oracle(pair):
    """The cheapest of the busy samples that meet the fused kernel."""
    (sample,) = [sample for sample in BOTTLENECK.samples() if sample.id == "rows-8129-bottleneck-1"]
    with testing.poisoned_memory():
        arguments = sample.make("cpu", *pair)
        testing.assert_matches_oracle(BOTTLENECK, arguments, *operators(BOTTLENECK))


@of_schedules
@each_pair
@each_bottleneck
def test_a_bottleneck_has_the_same_bits_for_every_schedule(case, pair):
    arguments, dy = bottleneck(case, pair, 70)
    runs = []
    for schedule in [(0, LATE), (1, EARLY), (3, RANDOM)]:
        set_schedule(*schedule)
        runs.append(BOTTLENECK.evaluate(*operators(BOTTLENECK), arguments, dy))
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])


@pytest.mark.parametrize("pair", [(BF16, BF16), (F32, F32)], ids=str)
@each_bottleneck
def test_only_needed_gradients_of_a_bottleneck_are_written(case, pair):
    arguments, dy = bottleneck(case, pair, 20)
    forward, backward = operators(BOTTLENECK)
    h = forward(*arguments.values())[1]
    rest = [value for name, value in arguments.items() if name not in ("x", "residual", "down_bias")]
    rest.append(arguments["residual"] is None)
    given = [arguments[name] is not None for name in GRADIENTS]
    full = backward(dy[0], arguments["x"], h, *rest, given)
    for i, gradient in enumerate(full):
        if given[i]:
            with testing.poisoned_memory():
                alone = backward(dy[0], arguments["x"], h, *rest, [j == i for j in range(9)])
            assert torch.equal(alone[i], gradient), GRADIENTS[i]
            assert all(alone[j].numel() == 0 for j in range(9) if j != i)


@pytest.mark.parametrize("pair", [(BF16, BF16), (F32, F32)], ids=str)
@each_bottleneck
def test_nan_stays_in_its_row_of_a_bottleneck(case, pair):
    arguments, dy = bottleneck(case, pair, 20)
    results = []
    for value in (None, math.nan):
        if value is not None:
            arguments["x"][1] = value
        results.append(BOTTLENECK.evaluate(*operators(BOTTLENECK), arguments, dy))
    for name in ("y[0]", "h", "grad x[0]"):
        assert torch.equal(*(each[name][torch.arange(20) != 1] for each in results)), name
    assert results[1]["h"][1].isnan().all()


@pytest.mark.parametrize("changes,text", [pytest.param(*case[1:], id=case[0]) for case in bad_bottlenecks.cases()])
def test_bad_input_of_a_bottlenecks_backward_is_refused_in_words(changes, text):
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        operators(BOTTLENECK)[1](*(bad_bottlenecks.good() | changes).values())
    assert text in str(caught.value)
