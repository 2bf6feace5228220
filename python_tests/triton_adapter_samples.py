"""bottleneck_adapter's Triton kernels interpreted on CPU tensors: every sample against the oracle, and what else must
hold.

Not collected by itself: test_triton.py runs it in a process of its own with TRITON_INTERPRET=1, which must be set
before triton is imported.
"""

import math

import interpreted_samples
import pytest
import torch
import triton_interpreter

triton_interpreter.install()

from peft_kernels import registry, testing  # noqa: E402
from peft_kernels.ops.bottleneck_adapter import triton_kernel  # noqa: E402
from peft_kernels.ops.bottleneck_adapter.samples import problem  # noqa: E402
from peft_kernels.ops.common.activations import EXACT, NAMES  # noqa: E402

OP = registry.ops()["bottleneck_adapter"]
FORWARD, BACKWARD = (triton_kernel.FUNCTIONS[function.name] for function in OP.functions)
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
ALL = {"norm": "layer_norm", "scale": "channel", "gated": True, "p": 0.1}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def check(arguments):
    with testing.poisoned_memory():
        testing.assert_matches_oracle(OP, arguments, FORWARD, BACKWARD)


@pytest.mark.parametrize("sample,pair", interpreted_samples.in_turns(OP))
def test_matches_oracle(sample, pair):
    check(sample.make("cpu", *pair))


@pytest.mark.parametrize(
    "pair,options",
    [
        ((BF16, BF16), {"N": None}),
        ((BF16, F32), {"activation": "gelu", **ALL}),
        ((F16, F16), {"norm": "rms_norm", "scale": "scalar", "p": 0.1, "dropout_on": "output"}),
        ((F32, F32), {"biased": False, "gated": True}),
        ((F64, F64), {"activation": "tanh", **ALL}),
    ],
    ids=str,
)
def test_many_rows_take_one_kernel(pair, options, monkeypatch):
    monkeypatch.setattr(triton_kernel, "PROGRAMS", 1)
    monkeypatch.setattr(triton_kernel, "_shrink_kernel", None)
    check(problem("cpu", *pair, rows=(45,), K=67, E=20, **options))


@pytest.mark.parametrize("options", [{"E": 40, "N": 24}, {"E": 8, "N": None, **ALL}], ids=["two", "serial"])
@pytest.mark.parametrize("pair", [(BF16, F32), (F32, F32)], ids=str)
def test_rows_are_cut_into_pieces(pair, options):
    check(problem("cpu", *pair, rows=(150,), K=24, **options))


@pytest.mark.parametrize("activation", NAMES)
def test_large_and_tiny_bottlenecks(activation):
    """h from -10000 to 10000, and so small that f keeps its digits only if it is made with care."""
    sizes = torch.logspace(-30, 4, 60, dtype=F64)
    arguments = problem("cpu", F32, F32, rows=(121,), K=1, N=1, E=1, activation=activation, biased=False)
    h = torch.cat((-sizes, torch.zeros(1), sizes)).float()
    arguments |= {"x": h[:, None], "residual": torch.zeros(121, 1), "scaling": 1.0}
    arguments |= {"down_weight": torch.ones(1, 1), "up_weight": torch.ones(1, 1)}
    check(arguments)
    if activation in ("tanh", "sigmoid", "silu"):
        exact = EXACT[activation](h.double())
        error = (FORWARD(*arguments.values())[0][:, 0].double() - exact).abs()
        normal = exact.abs() > torch.finfo(F32).tiny
        assert (error <= 16 * torch.finfo(F32).eps * exact.abs())[normal].all()


def gradients(arguments, h, dy, needs):
    rest = [value for name, value in arguments.items() if name not in ("x", "residual", "down_bias")]
    return BACKWARD(dy, arguments["x"], h, *rest, arguments["residual"] is None, needs)


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, BF16)], ids=str)
def test_each_gradient_alone_is_the_same(pair):
    arguments = problem("cpu", *pair, rows=(21,), K=67, N=None, activation="gelu", **ALL)
    y, h = FORWARD(*arguments.values())
    dy = testing.output_gradients([y])[0]
    together = gradients(arguments, h, dy, [True] * 9)
    for i in range(9):
        alone = gradients(arguments, h, dy, [j == i for j in range(9)])
        assert torch.equal(alone[i], together[i])
        assert all(t.numel() == 0 for j, t in enumerate(alone) if j != i)


@pytest.mark.parametrize("rows,activation", [(3, activation) for activation in NAMES] + [(40, "relu")])
def test_nan_stays_in_its_row_and_is_not_lost(rows, activation):
    arguments = problem("cpu", F32, F32, rows=(rows,), K=67, N=None, activation=activation, norm="layer_norm")
    runs = []
    for value in (1.0, math.nan):
        arguments["x"][1, 5] = value
        y, h = FORWARD(*arguments.values())
        runs.append((y, h, gradients(arguments, h, testing.output_gradients([y])[0], [True] + [False] * 8)[0]))
    others = [m for m in range(rows) if m != 1]
    for clean, dirty in zip(*runs, strict=True):
        assert dirty[1].isnan().all() and torch.equal(dirty[others], clean[others])


@pytest.mark.parametrize("on", ["bottleneck", "output"])
def test_what_is_dropped_counts_as_nothing(on):
    """An infinite B reaches y, and a NaN dy the gradients, only where they are kept."""
    arguments = problem("cpu", F32, F32, rows=(20,), K=24, N=40, E=33, p=0.5, dropout_on=on)
    y, h = FORWARD(*arguments.values())
    mask = torch.ops.peft_kernels.lora_dropout_mask(arguments["seed"], 20, 33 if on == "bottleneck" else 40, 0.5, 0)
    if on == "bottleneck":
        m = int((~mask[:, 7]).nonzero()[0, 0])
        h[m, 7] = math.nan
        m_kept = [row for row in range(20) if row != m]
        dx, _, _, db = gradients(arguments, h, torch.ones_like(y), [True, False, False, True] + [False] * 5)[:4]
        assert not db.isnan().any() and not dx[m_kept].isnan().any()
    else:
        m = int((~mask[:, 7]).nonzero()[0, 0])
        dy = torch.ones_like(y)
        dy[m, 7] = math.nan
        assert not any(t.isnan().any() for t in gradients(arguments, h, dy, [True] * 5 + [False] * 4))


def test_more_than_2_31_elements_apart():
    arguments = problem("cpu", BF16, BF16, rows=(3,), K=8, N=16)
    stride = 2**30 + 8
    far = torch.empty(2 * stride + 8, dtype=BF16).as_strided((3, 8), (stride, 1))
    far.copy_(arguments["x"])
    near = FORWARD(*arguments.values())[0]
    assert torch.equal(FORWARD(*(arguments | {"x": far}).values())[0], near)


@pytest.mark.parametrize("bad", [pytest.param(b, id=b.id) for b in OP.bad_inputs()])
def test_bad_input_is_refused_in_words(bad):
    with pytest.raises(bad.error) as caught:
        FORWARD(*bad.make("cpu").values())
    assert bad.text in str(caught.value)


@pytest.mark.parametrize(
    "text,changes",
    [
        ("dy must have shape [12, 32], as x with out_features=32, got [12, 31]", {"dy": lambda dy: dy[:, 1:]}),
        ("h must be the contiguous [M, bottleneck] that the forward returned", {"h": lambda h: h[:, 1:]}),
        ("needs must have 9 entries, got 8", {"needs": lambda needs: needs[1:]}),
        ("scale must be given for its gradient", {"needs": lambda needs: [True] * 9}),
    ],
    ids=str,
)
def test_bad_input_of_the_backward_is_refused_in_words(text, changes):
    arguments = problem("cpu", F32, F32, N=None, E=5)
    y, h = FORWARD(*arguments.values())
    given = {"h": h, "dy": y, "needs": [True] * 5 + [False] * 4}
    with pytest.raises(ValueError) as caught:
        gradients(arguments, **{name: changes.get(name, lambda v: v)(value) for name, value in given.items()})
    assert text in str(caught.value)
