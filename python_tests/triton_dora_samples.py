"""DoRA's Triton kernels interpreted on CPU tensors: every sample of dora_norm and dora_scale, bounds checked.

Not collected by itself: test_triton.py runs it in a process of its own with TRITON_INTERPRET=1, which must be set
before triton is imported.
"""

import interpreted_samples
import pytest
import torch
import triton_interpreter

triton_interpreter.install()

from peft_kernels import registry, testing  # noqa: E402
from peft_kernels.ops.lora_linear.dora_samples import norm_problem, scale_problem  # noqa: E402
from peft_kernels.ops.lora_linear.triton_dora_norm import FUNCTIONS as NORM_FUNCTIONS  # noqa: E402
from peft_kernels.ops.lora_linear.triton_dora_scale import FUNCTIONS as SCALE_FUNCTIONS  # noqa: E402

NORM, SCALE = registry.ops()["dora_norm"], registry.ops()["dora_scale"]
FUNCTIONS = {NORM.name: (NORM_FUNCTIONS["dora_norm"], None)}
FUNCTIONS |= {SCALE.name: tuple(SCALE_FUNCTIONS[function.name] for function in SCALE.functions)}
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _runs():
    for op in (NORM, SCALE):
        for run in interpreted_samples.in_turns(op):
            yield pytest.param(op, *run.values, marks=run.marks, id=f"{op.name}-{run.id}")


@pytest.mark.parametrize("op,sample,pair", _runs())
def test_matches_oracle(op, sample, pair):
    with testing.poisoned_memory():
        testing.assert_matches_oracle(op, sample.make("cpu", *pair), *FUNCTIONS[op.name])


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, F32)], ids=str)
def test_a_weight_in_pieces_along_k(pair):
    """Few rows and a long K: several pieces of every product."""
    with testing.poisoned_memory():
        testing.assert_matches_oracle(NORM, norm_problem("cpu", *pair, N=20, K=1300, R=20), *FUNCTIONS[NORM.name])


@pytest.mark.parametrize("adapters", [0, 3])
def test_each_gradient_alone_is_the_same(adapters):
    backward = SCALE_FUNCTIONS["dora_scale_backward"]
    arguments = scale_problem("cpu", BF16, F32, rows=(300,), N=40, adapters=adapters)
    z, magnitude, norm, _, _, ids = arguments.values()
    together = backward(z, z, magnitude, norm, ids, [True] * 3)
    for i in range(3):
        needs = [j == i for j in range(3)]
        given = z if i == 1 else None, None if i == 2 else magnitude
        alone = backward(z, *given, norm, ids, needs)
        assert torch.equal(alone[i], together[i])
        assert all(t.numel() == 0 for j, t in enumerate(alone) if j != i)


def test_an_id_out_of_range_counts_as_none():
    arguments = scale_problem("cpu", F32, F32, rows=(40,), N=40, adapters=3)
    dy = testing.gradients_for(SCALE, arguments)
    wanted = SCALE.evaluate(*FUNCTIONS[SCALE.name], arguments, dy)
    none = (arguments["ids"] == -1).nonzero().flatten().tolist()
    for i, row in enumerate(none):
        arguments["ids"][row] = (3, -7, 2**31 - 1)[i % 3]
    got = SCALE.evaluate(*FUNCTIONS[SCALE.name], arguments, dy)
    assert len(none) >= 3 and all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "op,bad", [pytest.param(op, bad, id=f"{op.name}-{bad.id}") for op in (NORM, SCALE) for bad in op.bad_inputs()]
)
def test_bad_input_is_refused_in_words(op, bad):
    with pytest.raises(bad.error) as caught:
        FUNCTIONS[op.name][0](*bad.make("cpu").values())
    assert bad.text in str(caught.value)
