"""lora_add's Triton kernels interpreted on CPU tensors: every sample of the registry against the oracle, the form in
place, and each gradient alone.

Not collected by itself: test_triton.py runs it in a process of its own with TRITON_INTERPRET=1, which must be set
before triton is imported.
"""

import interpreted_samples
import pytest
import torch
import triton_interpreter

triton_interpreter.install()

from peft_kernels import registry, testing  # noqa: E402
from peft_kernels.ops.lora_linear import triton_backward, triton_gemm  # noqa: E402
from peft_kernels.ops.lora_linear.add_samples import PAIRS, problem  # noqa: E402
from peft_kernels.ops.lora_linear.triton_add import FUNCTIONS  # noqa: E402

OP = registry.ops()["lora_add"]
FORWARD, BACKWARD, FORWARD_ = (FUNCTIONS[function.name] for function in OP.functions)
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def check(arguments):
    with testing.poisoned_memory():
        testing.assert_matches_oracle(OP, arguments, FORWARD, BACKWARD)


@pytest.mark.parametrize("sample,pair", interpreted_samples.in_turns(OP))
def test_matches_oracle(sample, pair):
    check(sample.make("cpu", *pair))


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_the_large_tiles_and_the_pieces_of_long_reductions(arch, monkeypatch):
    for module in (triton_gemm, triton_backward):
        monkeypatch.setattr(module, "architecture", lambda tensor: arch)
    check(problem("cpu", BF16, F32, rows=(530,), K=200, N=1050, ranks=(40,), p=0.1, lora_biased=True))
    check(problem("cpu", BF16, BF16, rows=(600,), K=40, N=300, ranks=(3, 70), p=0.1))


@pytest.mark.parametrize("pair,count", [*((pair, 2) for pair in PAIRS), ((BF16, F32), 9)], ids=str)
def test_in_place_has_the_same_bits(pair, count):
    """Also where x is the residual; nine adapters are more than one launch takes."""
    arguments = problem("cpu", *pair, rows=(2, 19), K=72, N=72, ranks=(3,) * count, p=0.1, lora_biased=True)
    residual, x, *rest = arguments.values()
    expected = [FORWARD(residual, of, *rest)[0] for of in (x, residual)]
    first, second = residual.clone(), residual.clone()
    FORWARD_(first, x, *rest)
    FORWARD_(second, second, *rest)
    assert torch.equal(first, expected[0]) and torch.equal(second, expected[1])


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, F32)], ids=str)
def test_each_gradient_alone_is_the_same(pair):
    arguments = problem("cpu", *pair, rows=(2, 9), K=40, N=24, ranks=(5, 3), p=0.2)
    dy, h = testing.gradients_for(OP, arguments)[0], FORWARD(*arguments.values())[1]
    rest = [arguments[name] for name in ("lora_A", "lora_B", "scaling", "dropout_p", "seed")]
    together = BACKWARD(dy, arguments["x"], h, *rest, [True] * 7)
    for i in range(7):
        x, low_rank = arguments["x"] if i in (1, 2) else None, h if i in (3, 4) else None
        alone = BACKWARD(dy, x, low_rank, *rest, [j == i for j in range(7)])
        assert torch.equal(alone[i], together[i])
        assert all(t.numel() == 0 for j, t in enumerate(alone) if j != i)


@pytest.mark.parametrize("bad", [pytest.param(b, id=b.id) for b in OP.bad_inputs()])
def test_bad_input_is_refused_in_words(bad):
    with pytest.raises(bad.error) as caught:
        FORWARD(*bad.make("cpu").values())
    assert bad.text in str(caught.value)
