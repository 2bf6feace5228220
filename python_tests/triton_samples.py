"""The Triton kernels interpreted on CPU tensors: every sample of the registry against the oracle, bounds checked.

Not collected by itself: test_triton.py runs it in a process of its own with TRITON_INTERPRET=1, which must be set
before triton is imported.
"""

import math
import re

import interpreted_samples
import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter

triton_interpreter.install()

from peft_kernels import registry, testing  # noqa: E402
from peft_kernels.ops.lora_linear import triton_backward, triton_gemm  # noqa: E402
from peft_kernels.ops.lora_linear.samples import problem  # noqa: E402
from peft_kernels.ops.lora_linear.triton_kernel import FUNCTIONS  # noqa: E402

OP = registry.ops()["lora_linear"]
FORWARD, BACKWARD, MASK = (FUNCTIONS[function.name] for function in OP.functions)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def check(arguments):
    with testing.poisoned_memory():
        testing.assert_matches_oracle(OP, arguments, FORWARD, BACKWARD)


@pytest.mark.parametrize("sample,pair", interpreted_samples.in_turns(OP))
def test_matches_oracle(sample, pair):
    check(sample.make("cpu", *pair))


@pytest.mark.parametrize("arch,p", [pytest.param(80, 0.0, marks=pytest.mark.slow), (80, 0.1), (90, 0.0), (90, 0.1)])
def test_the_large_tiles_and_the_pieces_of_long_reductions(arch, p, monkeypatch):
    for module in (triton_gemm, triton_backward):
        monkeypatch.setattr(module, "architecture", lambda tensor: arch)
    check(problem("cpu", BF16, F32, rows=(600,), K=1100, N=(1050,), ranks=((40,),), p=p, biased=True))
    check(problem("cpu", BF16, BF16, rows=(600,), K=40, N=(24, 300), ranks=((3, 70), (5,)), p=p, lora_biased=True))


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, F32)], ids=str)
@pytest.mark.parametrize("id", ["stacked", "group", "dropout"])
def test_each_gradient_alone_is_the_same(id, pair):
    arguments = next(s for s in OP.samples() if s.id == id).make("cpu", *pair)
    y, h = FORWARD(*arguments.values())
    dy = testing.output_gradients(y)
    rest = [arguments[n] for n in ("weight", "lora_A", "lora_B", "member", "scaling", "dropout_p", "seed")]
    G, L = len(arguments["weight"]), len(arguments["lora_A"])
    count = 1 + 2 * G + 3 * L
    together = BACKWARD(dy, arguments["x"], h, *rest, [True] * count)
    for i in range(count):
        reads_x = 1 <= i < 1 + G or 1 + 2 * G <= i < 1 + 2 * G + L
        reads_h = 1 + 2 * G + L <= i < 1 + 2 * G + 2 * L
        needs = [j == i for j in range(count)]
        alone = BACKWARD(dy, arguments["x"] if reads_x else None, h if reads_h else None, *rest, needs)
        assert torch.equal(alone[i], together[i])
        assert all(t.numel() == 0 for j, t in enumerate(alone) if j != i)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 0x0123_4567_89AB_CDEF])
@pytest.mark.parametrize(
    "shape", [(5, 100, 0.1, 0), (3, 7, 0.5, 2), (40, 300, 0.999999, 1), (2, 64, 0.0, 0), (0, 4, 0.1, 0)]
)
def test_dropout_mask_is_bit_equal(seed, shape):
    seed = torch.tensor(seed)
    assert torch.equal(MASK(seed, *shape), OP.functions[2].reference(seed, *shape))


@pytest.mark.parametrize("rows", [3, 40])
def test_nan_stays_in_its_row(rows):
    arguments = problem("cpu", F32, F32, rows=(rows,), K=67, N=(131,), p=0.1)
    clean = FORWARD(*arguments.values())[0][0]
    arguments["x"][1] = math.nan
    dirty = FORWARD(*arguments.values())[0][0]
    others = [m for m in range(rows) if m != 1]
    assert dirty[1].isnan().all() and torch.equal(dirty[others], clean[others])


def test_more_than_2_31_elements_apart():
    arguments = problem("cpu", BF16, BF16, rows=(3,), K=8, N=(16,))
    stride = 2**30 + 8
    far = torch.empty(2 * stride + 8, dtype=BF16).as_strided((3, 8), (stride, 1))
    far.copy_(arguments["x"])
    near = FORWARD(*arguments.values())[0][0]
    assert torch.equal(FORWARD(*(arguments | {"x": far}).values())[0][0], near)


@pytest.mark.parametrize("bad", [pytest.param(b, id=b.id) for b in OP.bad_inputs()])
def test_bad_input_is_refused_in_words(bad):
    with pytest.raises(bad.error) as caught:
        FORWARD(*bad.make("cpu").values())
    assert bad.text in str(caught.value)


@pytest.mark.parametrize(
    "text,changes",
    [
        ("dy must have one entry per weight (2), got 1", {"dy": lambda dy: dy[:1]}),
        ("dy[1] must be of y[1]'s shape, dtype and device", {"dy": lambda dy: [dy[0], dy[1][:, 1:]]}),
        ("dy[1] must be of y[1]'s shape, dtype and device", {"dy": lambda dy: [dy[0], dy[1][1:]]}),
        ("dy[0] must be of y[0]'s shape, dtype and device", {"dy": lambda dy: [dy[0].double(), dy[1]]}),
        ("x must have as many rows as dy", {"x": lambda x: x[1:]}),
        ("x must be given for gradients of weight or lora_A", {"x": lambda x: None}),
        ("h must be the contiguous [M, R] that the forward returned", {"h": lambda h: h[:, 1:]}),
        ("h must be the contiguous [M, R] that the forward returned", {"h": lambda h: h.double()}),
        ("h must be given for gradients of lora_B", {"h": lambda h: None}),
        ("needs must have 11 entries, got 10", {"needs": lambda needs: needs[1:]}),
        ("lora_B[0] must have shape [out_features=24, r=3]", {"lora_B": lambda b: b[::-1]}),
    ],
    ids=str,
)
def test_bad_input_of_the_backward_is_refused_in_words(text, changes):
    forward = problem("cpu", F32, F32, rows=(20,), K=40, N=(24, 40), ranks=((3,), (5,)), p=0.1)
    y, h = FORWARD(*forward.values())
    rest = {n: forward[n] for n in ("weight", "lora_A", "lora_B", "member", "scaling", "dropout_p", "seed")}
    good = {"dy": testing.output_gradients(y), "x": forward["x"], "h": h, **rest, "needs": [True] * 11}
    bad = good | {name: change(good[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=re.escape(text)):
        BACKWARD(*bad.values())


@triton.jit
def _copy_kernel(out_ptr, in_ptr, count, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(in_ptr + offs, mask=offs < count), mask=offs < count)


def test_the_checker_sees_one_element_too_many():
    buffer = torch.zeros(40)
    _copy_kernel[(1,)](buffer[:20], buffer[20:], 20, BLOCK=32)
    for out, source in [(buffer[:19], buffer[20:]), (buffer[:20], buffer[21:])]:
        with pytest.raises(Exception, match="1 of 20 active lanes out of bounds"):
            _copy_kernel[(1,)](out, source, 20, BLOCK=32)


@triton.jit
def _bfloat16_kernel(out_ptr, in_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a = tl.load(in_ptr + offs)
    b = (a.to(tl.float32) * 1.1).to(tl.bfloat16)
    tl.store(out_ptr + offs, tl.dot(a, b * a + a))


def test_bfloat16_is_computed_right():
    a = torch.randn(16, 16).to(BF16)
    out = torch.empty(16, 16)
    _bfloat16_kernel[(1,)](out, a, BLOCK=16)
    right = ((a.float() * 1.1).to(BF16) * a) + a
    assert torch.equal(out, torch.from_numpy(a.float().numpy() @ right.float().numpy()))
