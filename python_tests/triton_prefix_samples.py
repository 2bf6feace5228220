"""prefix_attention's Triton kernels interpreted on CPU tensors: every sample against the oracle, and what else must
hold.

Not collected by itself: test_triton.py runs it in a process of its own with TRITON_INTERPRET=1, which must be set
before triton is imported.
"""

import math
from itertools import cycle

import pytest
import torch
import triton_interpreter

triton_interpreter.install()

from peft_kernels import registry, testing  # noqa: E402
from peft_kernels.ops.prefix_attention import triton_gradients  # noqa: E402
from peft_kernels.ops.prefix_attention.samples import GRADIENTS, problem  # noqa: E402
from peft_kernels.ops.prefix_attention.triton_kernel import FUNCTIONS  # noqa: E402

OP = registry.ops()["prefix_attention"]
FORWARD, BACKWARD = (FUNCTIONS[function.name] for function in OP.functions)
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
PLACES = cycle(range(12))
SEVERAL = dict(B=4, n=3, ids=(2, -1, 0, 2), lengths=(5, 3, 4))


def _runs():
    """Every sample in every dtype; by default in one of them, another for each sample."""
    for sample in OP.samples():
        if sample.busy:  # hours of interpretation
            continue
        chosen = sample.dtypes[next(PLACES) % len(sample.dtypes)]
        for pair in sample.dtypes:
            name = str(pair[0]).removeprefix("torch.")
            yield pytest.param(sample, pair, id=f"{sample.id}-{name}", marks=[pytest.mark.slow] * (pair != chosen))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def check(arguments):
    with testing.poisoned_memory():
        testing.assert_matches_oracle(OP, arguments, FORWARD, BACKWARD)


@pytest.mark.parametrize("sample,pair", _runs())
def test_matches_oracle(sample, pair):
    check(sample.make("cpu", *pair))


def test_dropout_where_tiles_are_half_of_what_is_drawn():
    check(problem("cpu", F64, D=72, S=5, T=37, P=35, p=0.3, B=1))


def run(arguments):
    """Everything that comes out, by name."""
    return OP.evaluate(FORWARD, BACKWARD, arguments, testing.gradients_for(OP, arguments))


@pytest.mark.parametrize("programs", [1, 14])
def test_rows_of_a_prefix_are_summed_in_pieces(programs, monkeypatch):
    """All rows in one piece, and in pieces of more than one chunk."""
    monkeypatch.setattr(triton_gradients, "PROGRAMS", programs)
    check(problem("cpu", F64, composition="add", gates=(1, 1), S=70, D=8, Hq=2, Hkv=1, **SEVERAL))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("composition", ["merge", "add"])
def test_each_gradient_alone_is_the_same(composition, dtype):
    arguments = problem("cpu", dtype, composition=composition, gates=(1, 1), p=0.1, **SEVERAL)
    values, dout = list(arguments.values()), testing.gradients_for(OP, arguments)[0]
    out, *sums = FORWARD(*values)
    together = BACKWARD(dout, *values[:13], out, *sums, *values[13:], [True] * 7)
    for i in range(7):
        alone = BACKWARD(dout, *values[:13], out, *sums, *values[13:], [j == i for j in range(7)])
        assert torch.equal(alone[i], together[i]), GRADIENTS[i]
        assert all(t.numel() == 0 for j, t in enumerate(alone) if j != i)


@pytest.mark.parametrize("sizes", [dict(), dict(composition="relu"), dict(composition="add", softcap=2.0)], ids=str)
def test_nan_stays_in_its_row(sizes):
    arguments = problem("cpu", F32, **sizes)
    dout = testing.gradients_for(OP, arguments)
    runs = []
    for value in (0.5, math.nan):
        arguments["query"][1, 2, 3] = value
        dout[0][1, 2, 3] = value
        runs.append(OP.evaluate(FORWARD, BACKWARD, arguments, dout))
    for name in ("y[0]", "lse", "grad query[0]"):
        clean, dirty = (t[name].clone() for t in runs)
        assert dirty[1, 2, 3].isnan().all()
        clean[1, 2, 3], dirty[1, 2, 3] = 0, 0
        assert torch.equal(dirty, clean), name


def test_keys_that_no_query_sees_have_no_part():
    arguments = problem("cpu", F32, mask="right", causal=False)  # the last two keys of row 1 are padding
    clean = run(arguments)
    arguments["key"][1, :, 7:] = math.inf
    dirty = run(arguments)
    assert all(torch.equal(clean[name], dirty[name]) for name in ("y[0]", "lse", "grad prefix_key[0]"))


def test_ids_and_lengths_out_of_range_read_nothing():
    """A device's values cannot be refused without waiting for it."""
    arguments = problem("cpu", F32, **SEVERAL)
    far, none = (arguments | {"prefix_ids": torch.tensor((2, i, 0, j), dtype=torch.int32)}
                 for i, j in ((7, -9), (-1, -1)))  # fmt: skip
    dout = testing.gradients_for(OP, none)  # the reference refuses the others
    runs = [OP.evaluate(FORWARD, BACKWARD, of, dout) for of in (far, none)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[1])
    far, none = (
        problem("cpu", F32, n=2, ids=(0, 1)) | {"prefix_lengths": torch.tensor(lengths, dtype=torch.int32)}
        for lengths in ((99, -3), (5, 0))
    )
    assert all(torch.equal(a, b) for a, b in zip(FORWARD(*far.values()), FORWARD(*none.values()), strict=True))


def test_more_than_2_31_elements_apart():
    arguments = problem("cpu", BF16, B=3, S=2, Hq=2, Hkv=1, D=8)
    stride = 2**30 + 8
    near = FORWARD(*arguments.values())[0]
    for name in ("query", "key"):
        of_row = arguments[name].transpose(1, 2)  # [B, S, H, D]
        far = torch.empty(2 * stride + of_row[0].numel(), dtype=BF16)
        far = far.as_strided(of_row.shape, (stride, *of_row[0].contiguous().stride()))
        far.copy_(of_row)
        assert torch.equal(FORWARD(*(arguments | {name: far.transpose(1, 2)}).values())[0], near)


@pytest.mark.parametrize("bad", [pytest.param(b, id=b.id) for b in OP.bad_inputs()])
def test_bad_input_is_refused_in_words(bad):
    with pytest.raises(bad.error) as caught:
        FORWARD(*bad.make("cpu").values())
    assert bad.text in str(caught.value)
