"""batched_lora_'s Triton kernels interpreted on CPU tensors: every sample against the oracle, and the rule of bits.

Not collected by itself: test_triton.py runs it in a process of its own with TRITON_INTERPRET=1, which must be set
before triton is imported.
"""

import math

import interpreted_samples
import pytest
import torch
import triton_interpreter
from triton.runtime import interpreter

triton_interpreter.install()

from peft_kernels import registry, testing  # noqa: E402
from peft_kernels.ops.batched_lora import route, triton_kernel  # noqa: E402
from peft_kernels.ops.batched_lora.pooled_samples import problem  # noqa: E402

OP = registry.ops()["batched_lora_"]
FORWARD = triton_kernel.FUNCTIONS[OP.forward.name]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
F = dict(activations=("gelu", "identity", "sigmoid"), down_biased=True)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def run(arguments):
    """y after the op; the arguments keep what they held."""
    with testing.poisoned_memory():
        return list(OP.evaluate(FORWARD, None, arguments, []).values())


@pytest.mark.parametrize("sample,pair", interpreted_samples.in_turns(OP))
def test_matches_oracle(sample, pair):
    with testing.poisoned_memory():
        testing.assert_matches_oracle(OP, sample.make("cpu", *pair), FORWARD, None)


@pytest.mark.parametrize("pair", [(BF16, BF16), (F16, F32), (F32, F32)], ids=str)
def test_each_row_has_the_bits_of_the_row_alone(pair, monkeypatch):
    """K is more than one chunk, so that few rows share it out among programs and many do not."""
    monkeypatch.setattr(triton_kernel, "PROGRAMS", 4)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", triton_interpreter.dot_in_order)
    ids, ranks = [2, 0, 1, 2, 2, -1, 0, 1] * 5, ((9, 0), (24, 3), (1, 16))
    arguments = problem("cpu", *pair, rows=40, K=1100, N=(70, 40), ranks=ranks, ids=ids, biased=True, gained=True, **F)
    together = run(arguments)
    for m in (0, 1, 2, 5, 37, 39):
        alone = {"y": [y[m : m + 1] for y in arguments["y"]], "x": arguments["x"][m : m + 1]}
        alone["route"] = route.reference(torch.tensor(ids[m : m + 1]), 3)
        for whole, row in zip(together, run(arguments | alone), strict=True):
            assert torch.equal(whole[m : m + 1], row), m
    assert torch.equal(together[0][5], arguments["y"][0][5])  # it has no adapter


@pytest.mark.parametrize("pair", [(BF16, BF16), (F32, F32)], ids=str)
def test_x_may_be_y(pair):
    arguments = problem("cpu", *pair, rows=19, K=67, N=(67, 40), ranks=((9, 3), (16, 1)), **F)
    arguments["y"][0] = arguments["x"].clone()
    wanted, got = run(arguments), [y.clone() for y in arguments["y"]]
    FORWARD(*(arguments | {"x": got[0], "y": got}).values())
    assert all(torch.equal(*both) for both in zip(got, wanted, strict=True))


def test_nan_stays_in_its_row():
    arguments = problem("cpu", F32, F32, rows=12)
    clean = run(arguments)[0]
    arguments["x"][1] = math.nan
    dirty = run(arguments)[0]
    others = [m for m in range(12) if m != 1]
    assert dirty[1].isnan().all() and torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("bad", [pytest.param(b, id=b.id) for b in OP.bad_inputs()])
def test_bad_input_is_refused_in_words(bad):
    with pytest.raises(bad.error) as caught:
        FORWARD(*bad.make("cpu").values())
    assert bad.text in str(caught.value)
