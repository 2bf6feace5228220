"""The CUDA operators on the emulator: every sample of the registry, through the binding and the kernels that ship.

Not collected by itself: test_emulated.py runs it in one process per build of the emulator, which PK_EMULATED names
(plain, asan, race) and PK_EMULATED_LIBRARY locates. A bug that the emulator names ends the process.
"""

import ctypes
import math
import os

import pytest
import torch

from peft_kernels import registry, testing
from peft_kernels.ops.lora_linear.samples import problem

BUILD, LIBRARY = os.environ["PK_EMULATED"], ctypes.CDLL(os.environ["PK_EMULATED_LIBRARY"])
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LATE, EARLY, RANDOM = 0, 1, 2  # when a cp.async lands
# (order of threads and blocks, copies). What asan and race find does not hang on the schedule.
SCHEDULES = [(0, LATE), (1, RANDOM), (2, EARLY)] if BUILD == "plain" else [(3, RANDOM)]

registry._define(f"peft_kernels_emulated_{BUILD}", [op for op in registry.ops().values() if "cuda" in op.backends])
LIBRARY.peft_kernels_bind(f"peft_kernels_emulated_{BUILD}".encode(), b"CPU")
OP = registry.ops()["lora_linear"]
FORWARD, BACKWARD = testing.operators(f"emulated_{BUILD}", OP)
MASK = getattr(torch.ops, f"peft_kernels_emulated_{BUILD}").lora_dropout_mask.default
RUNS = [
    pytest.param(sample, pair, schedule, id=f"{sample.id}-{'/'.join(str(d)[6:] for d in pair)}-{schedule[0]}")
    for sample in OP.samples()
    if not sample.busy  # minutes each
    for pair in sample.dtypes
    for schedule in SCHEDULES
]


@pytest.fixture(autouse=True)
def _in_order():
    set_schedule(0, LATE)


def set_schedule(seed, copies):
    LIBRARY.peft_kernels_emulator_schedule(ctypes.c_uint64(seed), copies)


@pytest.mark.parametrize("sample,pair,schedule", RUNS)
def test_matches_oracle(sample, pair, schedule, count_sample):
    set_schedule(*schedule)
    with testing.poisoned_memory():
        testing.assert_matches_oracle(OP, sample.make("cpu", *pair), FORWARD, BACKWARD)
    count_sample((f"emulated-{BUILD}", "cpu"))


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


@pytest.mark.parametrize("bad", [pytest.param(b, id=b.id) for b in OP.bad_inputs()])
def test_bad_input_is_refused_in_words(bad):
    with pytest.raises((RuntimeError, ValueError, TypeError)) as caught:
        FORWARD(*bad.make("cpu").values())
    if "sparse" not in bad.id and "device" not in bad.id:  # those two PyTorch's dispatcher refuses before the kernel
        assert bad.text in str(caught.value)
