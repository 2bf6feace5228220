"""bottleneck_adapter beyond what every op must keep: the public function against plain PyTorch, what is kept for the
backward, autocast, gradients that nobody asked for, far strides, many rows."""

import doctest
import math

import bad_bottlenecks
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels import backends, memory, registry, testing
from peft_kernels.ops.bottleneck_adapter.op import GRADIENTS
from peft_kernels.ops.bottleneck_adapter.samples import problem

OP = registry.ops()["bottleneck_adapter"]
F = torch.nn.functional
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PLACES = [
    pytest.param(backend, device, id=f"{backend}-{device}")
    for device in DEVICES
    for backend in backends.linked(OP.name, device)
]


def adapter(K=48, N=48, E=8):
    generator = torch.Generator().manual_seed(1)
    shapes = {"down_weight": (E, K), "down_bias": (E,), "up_weight": (N, E), "up_bias": (N,)}
    return {name: torch.randn(s, generator=generator).requires_grad_() for name, s in shapes.items()}


def run(x, residual, weights, **options):
    return peft_kernels.bottleneck_adapter(x, residual, *weights.values(), **options)


def test_the_example_of_the_docstring():
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    text = peft_kernels.bottleneck_adapter.__doc__
    names = {"torch": torch, "peft_kernels": peft_kernels}
    runner.run(parser.get_doctest(text, names, "bottleneck_adapter", None, 0))
    assert runner.summarize().failed == 0 and runner.tries > 0


@pytest.mark.parametrize("serial", [True, False])
def test_plain_pytorch_agrees(serial):
    """In fp64, where PyTorch's other order of sums does not show."""
    weights, x, residual = adapter(), torch.randn(2, 9, 48), torch.randn(2, 9, 48)

    def by_hand(x, residual, down_weight, down_bias, up_weight, up_bias):
        h = F.linear(F.layer_norm(x, (48,)), down_weight, down_bias)
        return (x if serial else residual) + 0.5 * F.linear(F.gelu(h), up_weight, up_bias)

    def ours(x, residual, *weights):
        options = {"activation": "gelu", "scaling": 0.5, "norm": "layer_norm"}
        return peft_kernels.bottleneck_adapter(x, None if serial else residual, *weights, **options)

    results = []
    for function in (ours, by_hand):
        tensors = [t.detach().double().requires_grad_() for t in (x, residual, *weights.values())]
        y = function(*tensors)
        wanted = tensors if not serial else [tensors[0], *tensors[2:]]
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_what_is_kept_for_the_backward():
    weights, x, residual = adapter(), torch.randn(100, 48), torch.randn(100, 48)
    keep = (*weights.values(),)
    x.requires_grad_()
    plain = memory.saved_bytes(lambda: run(x, residual, weights), keep)
    assert plain == x.nbytes + 4 * 100 * 8  # x and h: neither f(h) nor the residual
    options = {"norm": "layer_norm", "dropout_p": 0.5, "seed": peft_kernels.new_seed()}
    everything = memory.saved_bytes(lambda: run(x, None, weights, **options), keep)
    assert everything == x.nbytes + 4 * 100 * 8 + 8  # and the seed: no mask, no normalised copy
    with torch.no_grad():
        assert memory.saved_bytes(lambda: run(x, residual, weights), keep) == 0


def test_autocast_casts_activations_and_leaves_the_adapter():
    weights, x, residual = adapter(), torch.randn(20, 48, requires_grad=True), torch.randn(20, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(x, residual, weights)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert all(t.grad.dtype is torch.float32 for t in (x, *weights.values()))
    assert torch.equal(y, run(x.detach().bfloat16(), residual.bfloat16(), weights))


NORMED = {"K": 67, "N": 131, "E": 40, "norm": "layer_norm", "gated": True, "scale": "scalar"}
SCALES = ("float", "scalar", "channel")
PLAIN = {"K": 300, "N": 283, "E": 70}  # what a backend may leave to a library


@pytest.mark.parametrize("backend,device", PLACES)
@pytest.mark.parametrize(
    "sizes",
    [
        {"rows": (5,)} | NORMED,
        {"rows": (70,)} | NORMED,
        *({"rows": (70,), "scale": scale, "gated": gated} | PLAIN for scale in SCALES for gated in (False, True)),
    ],
    ids=lambda sizes: "-".join(str(value) for value in sizes.values()),
)
def test_each_gradient_alone_is_the_same(backend, device, sizes):
    """What is left out is empty, and no gradient reads room that only another one fills."""
    arguments = problem(device, torch.float32, torch.float32, p=0.1, **sizes)
    forward, backward = testing.operators(backend, OP)
    _, h = forward(*arguments.values())
    (dy,) = testing.gradients_for(OP, arguments)
    rest = [value for name, value in arguments.items() if name not in ("x", "residual", "down_bias")]
    given = [arguments[name] is not None and (name != "gate" or "norm" in sizes) for name in GRADIENTS]
    with testing.poisoned_memory():
        together = backward(dy, arguments["x"], h, *rest, False, given)
        for i in (i for i, there in enumerate(given) if there):
            alone = backward(dy, arguments["x"], h, *rest, False, [i == j for j in range(9)])
            torch.testing.assert_close(alone[i], together[i])
            assert "norm" not in sizes or torch.equal(alone[i], together[i])  # a library may round in another order
            assert all(grad.numel() == 0 for j, grad in enumerate(alone) if j != i)


@pytest.mark.parametrize("backend,device", PLACES)
@pytest.mark.parametrize("rows", [8, 70])
@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_of_zero_hides_no_nan(backend, device, rows, scale):
    arguments = problem(device, torch.float32, torch.float32, rows=(rows,), scale=scale, **PLAIN)
    arguments["x"][3] = math.nan
    if scale == "float":
        arguments["scaling"] = 0.0
    else:
        arguments["scale"].zero_()
    dy = testing.gradients_for(OP, arguments)
    found = OP.evaluate(*testing.operators(backend, OP), arguments, dy)
    expected = OP.evaluate(*testing.operators("reference", OP), arguments, dy)
    assert expected["y[0]"][3].isnan().all() and expected["grad up_weight[0]"].isnan().all()
    assert all(torch.equal(found[name].isnan(), expected[name].isnan()) for name in expected)


@pytest.mark.parametrize("backend,device", PLACES)
def test_many_rows(backend, device):
    """More rows than any backend takes at a time, in the gradients that sum over them too."""
    arguments = problem(device, torch.float32, torch.float32, rows=(2100,), K=8, N=300, E=3, p=0.1, scale="scalar")
    testing.assert_matches_oracle(OP, arguments, *testing.operators(backend, OP))


@pytest.mark.parametrize("backend,device", PLACES)
def test_more_than_2_31_elements_apart(backend, device):
    arguments = problem(device, torch.bfloat16, torch.bfloat16, rows=(3,), K=8, N=None)
    dy = testing.gradients_for(OP, arguments)
    near = OP.evaluate(*testing.operators(backend, OP), arguments, dy)
    arguments["x"], dy = far_apart(arguments["x"]), [far_apart(dy[0])]
    far = OP.evaluate(*testing.operators(backend, OP), arguments, dy)
    assert all(torch.equal(near[name], far[name]) for name in near)


def far_apart(matrix):
    """The same matrix, its third row more than 2^31 elements after the first; untouched pages cost nothing."""
    stride = 2**30 + 8
    buffer = torch.empty(2 * stride + matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    return buffer.as_strided(matrix.shape, (stride, 1)).copy_(matrix)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_replays_the_same_mask(use_reentrant):
    weights, grads = adapter(), []
    x = torch.linspace(-1, 1, 9 * 48).view(9, 48)

    def block(x):
        return run(x, None, weights, dropout_p=0.3, seed=peft_kernels.new_seed())

    for function in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        function(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend,device", PLACES)
def test_a_gradient_that_there_is_not_is_refused(backend, device):
    arguments = problem(device, torch.float32, torch.float32)
    forward, backward = testing.operators(backend, OP)
    h = forward(*arguments.values())[1]
    rest = [value for name, value in arguments.items() if name not in ("x", "residual", "down_bias")]
    for i, text in ((5, "scale must be given"), (6, "gate must be given"), (7, "norm must not be 'none'")):
        with pytest.raises((ValueError, RuntimeError), match=text):
            dy = torch.ones_like(arguments["residual"])
            backward(dy, arguments["x"], h, *rest, False, [j == i for j in range(9)])


@pytest.mark.parametrize("backend,device", PLACES)
def test_the_backward_takes_what_the_bad_inputs_are_made_from(backend, device):
    gradients = testing.operators(backend, OP)[1](*bad_bottlenecks.good(device).values())
    assert all(gradient.numel() > 0 for gradient in gradients)


@pytest.mark.parametrize("backend", backends.linked(OP.name, "cpu"))
@pytest.mark.parametrize("changes,text", [pytest.param(*case[1:], id=case[0]) for case in bad_bottlenecks.cases()])
def test_bad_inputs_of_the_backward_are_refused_in_words(changes, text, backend):
    """A tensor on another device meets the operator's fake, which checks too."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        testing.operators(backend, OP)[1](*(bad_bottlenecks.good() | changes).values())
    assert "bottleneck_adapter" in str(caught.value) and text in str(caught.value)
