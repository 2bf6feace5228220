"""The CUDA operators on the emulator: every sample of the registry, through the binding and the kernels that ship.

Not collected by itself: test_emulated.py runs it in one process per build of the emulator, which PK_EMULATED names
(plain, asan, race) and PK_EMULATED_LIBRARY locates. A bug that the emulator names ends the process.
"""

import ctypes
import math
import os

import bad_bottlenecks
import interpreted_samples
import pytest
import torch
from pools import partly_over

from peft_kernels import registry, testing
from peft_kernels.ops.batched_lora import pooled_samples, route
from peft_kernels.ops.bottleneck_adapter import samples as bottleneck_samples
from peft_kernels.ops.bottleneck_adapter.op import GRADIENTS
from peft_kernels.ops.lora_linear.samples import problem
from peft_kernels.ops.prefix_attention import samples as prefix_samples

BUILD, LIBRARY = os.environ["PK_EMULATED"], ctypes.CDLL(os.environ["PK_EMULATED_LIBRARY"])
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LATE, EARLY, RANDOM = 0, 1, 2  # when a cp.async lands
# (order of threads and blocks, copies)
SCHEDULES = [(0, LATE), (1, RANDOM), (2, EARLY)] if BUILD == "plain" else [(3, RANDOM)]

OPS = [op for op in registry.ops().values() if "cuda" in op.backends]
registry._define(f"peft_kernels_emulated_{BUILD}", OPS)
LIBRARY.peft_kernels_bind(f"peft_kernels_emulated_{BUILD}".encode(), b"CPU")
LIBRARY.peft_kernels_poison.restype = ctypes.c_float
POISON = LIBRARY.peft_kernels_poison(1)  # for all that follows: it is a library of tests
NAMES = ("lora_linear", "batched_lora_", "bottleneck_adapter", "prefix_attention")
OP, POOLED, BOTTLENECK, ATTENTION = (registry.ops()[name] for name in NAMES)
FORWARD, BACKWARD = testing.operators(f"emulated_{BUILD}", OP)
MASK = getattr(torch.ops, f"peft_kernels_emulated_{BUILD}").lora_dropout_mask.default
ROUTE = getattr(torch.ops, f"peft_kernels_emulated_{BUILD}").batched_lora_route.default
FIRST = {"plain": 0, "asan": 2, "race": 1}[BUILD]  # each build meets a sample in another pair of dtypes


def _runs():
    """Every sample in turns of dtypes, those of attention also of schedules; what is not in its turn is slow."""
    for op in OPS:
        for place, run in enumerate(interpreted_samples.in_turns(op, first=FIRST)):
            for i, schedule in enumerate(SCHEDULES):
                late = op is ATTENTION and (place + i) % len(SCHEDULES) != 0
                marks = [pytest.mark.slow] if late else run.marks
                yield pytest.param(op, *run.values, schedule, id=f"{op.name}-{run.id}-{schedule[0]}", marks=marks)


def of_schedules(test):
    """What asan and race find does not hang on the schedule: in these builds such a test is slow."""
    return test if BUILD == "plain" else pytest.mark.slow(test)


@pytest.fixture(autouse=True)
def _in_order():
    set_schedule(0, LATE)


def set_schedule(seed, copies):
    LIBRARY.peft_kernels_emulator_schedule(ctypes.c_uint64(seed), copies)


def test_what_the_operators_allocate_is_poisoned():
    assert math.isnan(POISON)


@pytest.mark.parametrize("op,sample,pair,schedule", _runs())
def test_matches_oracle(op, sample, pair, schedule, count_sample):
    set_schedule(*schedule)
    with testing.poisoned_memory():
        testing.assert_matches_oracle(op, sample.make("cpu", *pair), *testing.operators(f"emulated_{BUILD}", op))
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
        testing.operators(f"emulated_{BUILD}", op)[0](*bad.make("cpu").values())
    if "sparse" not in bad.id and "device" not in bad.id:  # those two PyTorch's dispatcher refuses before the kernel
        assert bad.text in str(caught.value)


@pytest.mark.parametrize("changes,text", [pytest.param(*case[1:], id=case[0]) for case in bad_bottlenecks.cases()])
def test_bad_input_of_a_bottlenecks_backward_is_refused_in_words(changes, text):
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        testing.operators(f"emulated_{BUILD}", BOTTLENECK)[1](*(bad_bottlenecks.good() | changes).values())
    assert text in str(caught.value)


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
    forward = testing.operators(f"emulated_{BUILD}", POOLED)[0]
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
    testing.assert_matches_oracle(POOLED, arguments, *testing.operators(f"emulated_{BUILD}", POOLED))


@pytest.mark.parametrize("pair", pooled_samples.PAIRS, ids=str)
@pytest.mark.parametrize("K", [520, 67])
def test_x_may_be_y(K, pair):
    """Of the first slice; the last of nine is launched behind it and reads x as well."""
    sizes = dict(N=(K, *(24,) * 8), ranks=((3,) * 9, (0, 8) * 4 + (1,)), activations=("gelu", "identity"))
    arguments = pooled_samples.problem("cpu", *pair, rows=19, K=K, **sizes)
    arguments["y"][0] = arguments["x"].clone()
    forward, (x, *others) = testing.operators(f"emulated_{BUILD}", POOLED)[0], (y.clone() for y in arguments["y"])
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
    forward = testing.operators(f"emulated_{BUILD}", POOLED)[0]
    results = []
    for schedule in [SCHEDULES[0], *SCHEDULES]:
        set_schedule(*schedule)
        (x, y), (apart, _) = (partly_over(arguments["x"], arguments["y"][0], *shift) for _ in range(2))
        got = [y, *(other.clone() for other in arguments["y"][1:])]
        forward(*(arguments | {"x": x if results else apart, "y": got}).values())
        results.append(got)
    for got in results[1:]:
        assert all(torch.equal(*both) for both in zip(got, results[0], strict=True))


# -- bottleneck adapters ----------------------------------------------------------------------------------------------

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
        testing.assert_matches_oracle(BOTTLENECK, arguments, *testing.operators(f"emulated_{BUILD}", BOTTLENECK))


@of_schedules
@each_pair
@each_bottleneck
def test_a_bottleneck_has_the_same_bits_for_every_schedule(case, pair):
    arguments, dy = bottleneck(case, pair, 70)
    runs = []
    for schedule in [(0, LATE), (1, EARLY), (3, RANDOM)]:
        set_schedule(*schedule)
        runs.append(BOTTLENECK.evaluate(*testing.operators(f"emulated_{BUILD}", BOTTLENECK), arguments, dy))
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])


@pytest.mark.parametrize("pair", [(BF16, BF16), (F32, F32)], ids=str)
@each_bottleneck
def test_only_needed_gradients_of_a_bottleneck_are_written(case, pair):
    arguments, dy = bottleneck(case, pair, 20)
    forward, backward = testing.operators(f"emulated_{BUILD}", BOTTLENECK)
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
        results.append(BOTTLENECK.evaluate(*testing.operators(f"emulated_{BUILD}", BOTTLENECK), arguments, dy))
    for name in ("y[0]", "h", "grad x[0]"):
        assert torch.equal(*(each[name][torch.arange(20) != 1] for each in results)), name
    assert results[1]["h"][1].isnan().all()


# -- attention over prefixes ------------------------------------------------------------------------------------------

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
    return testing.operators(f"emulated_{BUILD}", ATTENTION)[0](*(arguments | changes).values())[:2]


def attention_gradients(arguments, needs=None, **changes):
    forward, backward = testing.operators(f"emulated_{BUILD}", ATTENTION)
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
