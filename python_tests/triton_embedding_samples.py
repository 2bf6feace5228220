"""lora_embedding's Triton kernels interpreted on CPU tensors: every sample of the registry against the oracle, ids that
are in no table, and each gradient alone.

Not collected by itself: test_triton.py runs it in a process of its own with TRITON_INTERPRET=1, which must be set
before triton is imported.
"""

import interpreted_samples
import pytest
import torch
import triton_interpreter

triton_interpreter.install()

from peft_kernels import registry, testing  # noqa: E402
from peft_kernels.ops.lora_linear.embedding_samples import PAIRS, problem  # noqa: E402
from peft_kernels.ops.lora_linear.triton_embedding import FUNCTIONS  # noqa: E402

OP = registry.ops()["lora_embedding"]
FORWARD, BACKWARD = (FUNCTIONS[function.name] for function in OP.functions)
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def gradients(arguments, dy, h, needs):
    rest = [arguments[name] for name in ("lora_A", "lora_B", "scaling", "padding_idx")]
    return BACKWARD(dy, arguments["ids"], h, *rest, needs)


@pytest.mark.parametrize("sample,pair", interpreted_samples.in_turns(OP))
def test_matches_oracle(sample, pair):
    with testing.poisoned_memory():
        testing.assert_matches_oracle(OP, sample.make("cpu", *pair), FORWARD, BACKWARD)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_an_id_of_no_table_adds_nothing(ids_dtype):
    """The interpreter refuses an access to what no tensor of the launch holds."""
    arguments = problem("cpu", F32, F32, rows=(40,), V=9, ranks=(5, 3), ids_dtype=ids_dtype)
    outside = torch.arange(40) % 3 == 1
    strange = torch.tensor([-1, 9, torch.iinfo(ids_dtype).max, torch.iinfo(ids_dtype).min], dtype=ids_dtype)
    dy, needs = testing.gradients_for(OP, arguments)[0], [True] * 4
    of_none = arguments | {"ids": arguments["ids"].masked_scatter(outside, strange.repeat(10)), "padding_idx": None}
    y, h = FORWARD(*of_none.values())
    expected = [t.masked_fill(outside[:, None], 0) for t in FORWARD(*arguments.values())]
    assert torch.equal(y[outside], arguments["residual"][outside])
    assert torch.equal(y[~outside], expected[0][~outside]) and torch.equal(h, expected[1])
    inside = {name: arguments[name] for name in arguments} | {"ids": arguments["ids"][~outside]}
    got, wanted = gradients(of_none, dy, h, needs), gradients(inside, dy[~outside], h[~outside].contiguous(), needs)
    assert all(torch.equal(*pair) for pair in zip(got[:2], wanted[:2], strict=True))
    assert torch.equal(got[2], gradients(arguments, dy, h, needs)[2])


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_each_gradient_alone_is_the_same(pair):
    arguments = problem("cpu", *pair, rows=(2, 19), V=7, N=24, ranks=(5, 3), padding_idx=6)
    dy, h = testing.gradients_for(OP, arguments)[0], FORWARD(*arguments.values())[1]
    together = gradients(arguments, dy, h, [True] * 4)
    for i in range(4):
        with testing.poisoned_memory():
            alone = gradients(arguments, dy, h if i > 1 else None, [j == i for j in range(4)])
        assert torch.equal(alone[i], together[i])
        assert all(t.numel() == 0 for j, t in enumerate(alone) if j != i)


def test_factors_more_than_2_31_elements_apart():
    arguments = problem("cpu", BF16, BF16, rows=(6,), V=3, N=16, ranks=(3,))
    expected = FORWARD(*arguments.values())
    for strides in ((2**30 + 8, 1), (1, 2**30 + 8)):
        buffer = torch.empty(2 * (2**30 + 8) + 3, dtype=BF16)
        far = buffer.as_strided((3, 3), strides).copy_(arguments["lora_A"][0])
        got = FORWARD(*(arguments | {"lora_A": [far]}).values())
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("bad", [pytest.param(b, id=b.id) for b in OP.bad_inputs()])
def test_bad_input_is_refused_in_words(bad):
    with pytest.raises(bad.error) as caught:
        FORWARD(*bad.make("cpu").values())
    assert bad.text in str(caught.value)
