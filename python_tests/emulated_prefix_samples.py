"""The CUDA operators of prefix_attention on the emulator beyond the samples that emulated_samples.py runs."""

import math

import packed_sequences
import pytest
import torch
from emulated import (
    ATTENTION,
    BF16,
    BUILD,
    EARLY,
    F32,
    LATE,
    RANDOM,
    in_order,  # noqa: F401  (a fixture of every test)
    operators,
    set_schedule,
)

from peft_kernels import testing
from peft_kernels.ops.prefix_attention import samples as prefix_samples

SEVERAL = dict(B=5, n=3, ids=(2, -1, 0, 2, 2), lengths=(5, 3, 4), gates=(1, 1))
ATTENTIONS = {
    "rows": dict(S=37, **SEVERAL),
    "decode": dict(S=1, T=23, **SEVERAL),
    "decode-split": dict(B=2, S=2, T=300, P=200, D=64),
    "add": dict(S=19, composition="add", **SEVERAL),
    "linear-decode": dict(S=1, T=23, composition="linear", **SEVERAL),
}
each_attention = pytest.mark.parametrize("case", ATTENTIONS)
of_values = pytest.mark.skipif(BUILD != "plain", reason="the same values; what these builds look for is in the samples")
each_dtype = pytest.mark.parametrize("dtype", [pytest.param(d, id=str(d), marks=of_values) for d in (BF16, F32)])


def attend(arguments, **changes):
    return operators(ATTENTION)[0](*(arguments | changes).values())[:2]


def attention_gradients(arguments, needs=None, **changes):
    forward, backward = operators(ATTENTION)
    values = list((arguments | changes).values())
    out, *sums = forward(*values)
    dout = testing.output_gradients([torch.zeros_like(out)])[0]
    needs = needs or [arguments[name] is not None for name in prefix_samples.GRADIENTS]
    return backward(dout, *values[:13], out, *sums, *values[13:], needs)


@each_dtype
@each_attention
def test_an_attention_has_the_same_bits_for_every_schedule(case, dtype):
    arguments = prefix_samples.problem("cpu", dtype, **ATTENTIONS[case], p=0.1)
    runs = []
    for schedule in [(0, LATE), (1, EARLY), (3, RANDOM)]:
        set_schedule(*schedule)
        runs.append([*attend(arguments), *attention_gradients(arguments)])
    assert all(torch.equal(*both) for other in runs[1:] for both in zip(runs[0], other, strict=True))


@each_dtype
@each_attention
def test_nan_stays_in_its_row_of_an_attention(case, dtype):
    arguments = prefix_samples.problem("cpu", dtype, **ATTENTIONS[case])
    clean = attend(arguments)
    query = arguments["query"].clone()
    query[1, 2, 0] = math.nan
    for before, after in zip(clean, attend(arguments, query=query), strict=True):
        assert after[1, 2, 0].isnan().all() and not before.isnan().any()
        after[1, 2, 0] = before[1, 2, 0]
        assert torch.equal(before, after)


@each_dtype
@pytest.mark.parametrize("case", ["rows", "decode", "add", "linear-decode"])
def test_nan_stays_in_its_row_of_an_attentions_gradients(case, dtype):
    """Row 1 has no prefix: its keys and values have NaN too, for the head that reads them, and nothing else."""
    arguments = prefix_samples.problem("cpu", dtype, **ATTENTIONS[case])
    clean = attention_gradients(arguments)
    query = arguments["query"].clone()
    query[1, 2, 0] = math.nan
    dirty = attention_gradients(arguments, query=query)
    assert dirty[0][1, 2, 0].isnan().all() and dirty[1][1, 1, 0].isnan().all()
    for i, place in enumerate([(1, 2, 0), (1, 1), (1, 1)]):
        dirty[i][place] = clean[i][place]
    for before, after in zip(clean[:5], dirty[:5], strict=True):
        assert not before.isnan().any() and torch.equal(before, after)


@each_dtype
@each_attention
def test_only_needed_gradients_of_an_attention_are_written(case, dtype):
    arguments = prefix_samples.problem("cpu", dtype, **ATTENTIONS[case])
    for i, gradient in enumerate(attention_gradients(arguments)):
        if arguments[prefix_samples.GRADIENTS[i]] is not None:
            with testing.poisoned_memory():
                alone = attention_gradients(arguments, [j == i for j in range(7)])
            assert torch.equal(alone[i], gradient), prefix_samples.GRADIENTS[i]
            assert all(alone[j].numel() == 0 for j in range(7) if j != i)


@each_dtype
@pytest.mark.parametrize("case", [case for case in ATTENTIONS if "B" in ATTENTIONS[case] and case != "decode-split"])
def test_a_row_of_an_attention_has_the_bits_of_the_row_alone(case, dtype):
    arguments = prefix_samples.problem("cpu", dtype, **ATTENTIONS[case])
    whole = attend(arguments)
    for b in range(5):
        rows = ("query", "key", "value", "prefix_ids", "gate", "key_gate")
        alone = attend(arguments, **{name: arguments[name][b : b + 1] for name in rows})
        assert all(torch.equal(row[0], out[b]) for row, out in zip(alone, whole, strict=True))


@each_dtype
@pytest.mark.parametrize("S", [1, 19])
def test_what_is_out_of_range_is_bounded(S, dtype):
    """On a GPU nobody reads these before the kernels do."""
    arguments = prefix_samples.problem("cpu", dtype, B=4, S=S, T=S + 4, n=3, ids=(-1, -1, 0, 1), lengths=(5, 0, 5))
    ids, lengths = torch.tensor([-7, 3, 0, 1]).int(), torch.tensor([99, -2, 5]).int()
    for run in (attend, attention_gradients):
        assert all(map(torch.equal, run(arguments, prefix_ids=ids, prefix_lengths=lengths), run(arguments)))
    packed = ((0, 0, 4, 9), (0, 2, 6, 9))
    arguments = prefix_samples.problem("cpu", dtype, B=1, S=9, packed=packed, ids=(0, 0, 0))
    ends = [torch.tensor(values).int() for values in ((-3, 0, 4, 50), (-1, 2, 6, 50))]
    for run in (attend, attention_gradients):
        wild = run(arguments, cu_seqlens_q=ends[0], cu_seqlens_k=ends[1])
        assert all(torch.equal(*both) for both in zip(wild, run(arguments), strict=True))


@each_dtype
@pytest.mark.parametrize("S", [4, 40])
def test_sequences_need_not_begin_with_the_first_token(S, dtype):
    packed_sequences.check(*operators(ATTENTION), S, dtype)
