"""prefix_attention's Triton kernels interpreted on CPU tensors: every sample against the oracle, and what else must
hold.

Not collected by itself: test_triton.py runs it in a process of its own with TRITON_INTERPRET=1, which must be set
before triton is imported.
"""

import math

import interpreted_samples
import packed_sequences
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
SEVERAL = dict(B=4, n=3, ids=(2, -1, 0, 2), lengths=(5, 3, 4))
LONG = ("decode-rows", "dim-128", "dropout", "relu-plain")  # up to half a minute
WIDE = ("ones", "chunk", "more-queries", "no-keys", "cross", "window-decode", "softcap", "gates-head", "linear-decode")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def check(arguments):
    with testing.poisoned_memory():
        testing.assert_matches_oracle(OP, arguments, FORWARD, BACKWARD)


@pytest.mark.parametrize("sample,pair", interpreted_samples.in_turns(OP, LONG, WIDE))
def test_matches_oracle(sample, pair):
    check(sample.make("cpu", *pair))


def test_dropout_where_tiles_are_half_of_what_is_drawn():
    check(problem("cpu", F64, D=72, Hq=1, Hkv=1, S=2, T=19, P=19, p=0.3, B=1))


@pytest.mark.parametrize("composition", ["merge", "relu"])
def test_dropout_over_two_tiles_of_a_prefix_and_of_keys(composition):
    """What the samples that are `LONG` have at sizes of their own."""
    check(problem("cpu", F32, composition=composition, B=1, Hq=1, Hkv=1, S=2, T=35, P=35, D=8, p=0.1))


def run(arguments):
    """Everything that comes out, by name."""
    return OP.evaluate(FORWARD, BACKWARD, arguments, testing.gradients_for(OP, arguments))


@pytest.mark.parametrize("programs", [1, 6])
def test_rows_of_a_prefix_are_summed_in_pieces(programs, monkeypatch):
    """All rows in one piece, and in pieces of more than one chunk."""
    monkeypatch.setattr(triton_gradients, "PROGRAMS", programs)
    check(problem("cpu", BF16, composition="add", gates=(1, 1), S=134, D=8, Hq=2, Hkv=1, n=2, ids=(1, 1)))


@pytest.mark.parametrize("composition", ["merge", "add"])
def test_each_gradient_alone_is_the_same(composition):
    arguments = problem("cpu", BF16, composition=composition, Hq=2, Hkv=1, S=5, D=16, n=1, gates=(1, 1), p=0.1)
    values, dout = list(arguments.values()), testing.gradients_for(OP, arguments)[0]
    out, *sums = FORWARD(*values)
    together = BACKWARD(dout, *values[:13], out, *sums, *values[13:], [True] * 7)
    for i in range(7):
        alone = BACKWARD(dout, *values[:13], out, *sums, *values[13:], [j == i for j in range(7)])
        assert torch.equal(alone[i], together[i]), GRADIENTS[i]
        assert all(t.numel() == 0 for j, t in enumerate(alone) if j != i)


@pytest.mark.parametrize("sizes", [dict(), dict(composition="relu"), dict(composition="add", softcap=2.0)], ids=str)
def test_nan_stays_in_its_row(sizes):
    arguments = problem("cpu", BF16, **sizes)
    dout = testing.gradients_for(OP, arguments)
    of_query, of_dout = (1, 2, 3), (0, 1, 4)
    runs = []
    for value in (0.5, math.nan):
        arguments["query"][of_query] = value
        dout[0][of_dout] = value
        runs.append(OP.evaluate(FORWARD, BACKWARD, arguments, dout))
    for name, places in (("y[0]", [of_query]), ("lse", [of_query]), ("grad query[0]", [of_query, of_dout])):
        clean, dirty = (t[name].clone() for t in runs)
        for place in places:
            assert dirty[place].isnan().all(), (name, place)
            clean[place], dirty[place] = 0, 0
        assert torch.equal(dirty, clean), name


def test_keys_that_no_query_sees_have_no_part():
    arguments = problem("cpu", BF16, mask="right", causal=False)  # the last two keys of row 1 are padding
    clean = run(arguments)
    arguments["key"][1, :, 7:] = math.inf
    dirty = run(arguments)
    assert all(torch.equal(clean[name], dirty[name]) for name in ("y[0]", "lse", "grad prefix_key[0]"))


def test_ids_and_lengths_out_of_range_read_nothing():
    """A device's values cannot be refused without waiting for it."""
    arguments = problem("cpu", BF16, **SEVERAL)
    far, none = (arguments | {"prefix_ids": torch.tensor((2, i, 0, j), dtype=torch.int32)}
                 for i, j in ((7, -9), (-1, -1)))  # fmt: skip
    dout = testing.gradients_for(OP, none)  # the reference refuses the others
    runs = [OP.evaluate(FORWARD, BACKWARD, of, dout) for of in (far, none)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[1])
    far, none = (
        problem("cpu", BF16, n=2, ids=(0, 1)) | {"prefix_lengths": torch.tensor(lengths, dtype=torch.int32)}
        for lengths in ((99, -3), (5, 0))
    )
    assert all(torch.equal(a, b) for a, b in zip(FORWARD(*far.values()), FORWARD(*none.values()), strict=True))


def test_sequences_need_not_begin_with_the_first_token():
    packed_sequences.check(FORWARD, BACKWARD, 4, BF16)


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
