"""lora_add beyond what every op must keep: beside lora_linear, in place, the residual's gradient, what is kept for the
backward, far strides, compile, export, autocast, checkpointing, and what its backward refuses."""

import contextlib
import re

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels import backends, memory, registry, testing
from peft_kernels.ops.common.in_place import call_in_place
from peft_kernels.ops.lora_linear.add import check_backward
from peft_kernels.ops.lora_linear.add_samples import problem

OP = registry.ops()["lora_add"]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PLACES = [
    pytest.param(backend, device, id=f"{backend}-{device}")
    for device in DEVICES
    for backend in backends.linked("lora_add", device)
]
PAIRS = [(F32, F32), (BF16, BF16), (BF16, F32), (F64, F64)]


def operators(backend):
    """Forward, backward, and the form in place."""
    return *testing.operators(backend, OP), getattr(torch.ops, f"peft_kernels_{backend}").lora_add_.default


@pytest.mark.parametrize("backend,device", PLACES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_beside_lora_linear(backend, device, p):
    """With r = x W^T + b, both ops compute one thing: y, h and every gradient, under the same masks. In fp64, in which
    only the order of sums can differ."""
    arguments = problem(device, F64, F64, rows=(3, 7), K=40, N=24, ranks=(5, 3), p=p, lora_biased=True)
    weight, bias = torch.randn(24, 40, dtype=F64, device=device), torch.randn(24, dtype=F64, device=device)
    x, factors = arguments["x"].requires_grad_(), [*arguments["lora_A"], *arguments["lora_B"], *arguments["lora_bias"]]
    for factor in factors:
        factor.requires_grad_()
    lists = [arguments[name] for name in ("lora_A", "lora_B", "lora_bias")]
    numbers = arguments["scaling"], arguments["dropout_p"], arguments["seed"]
    residual = torch.nn.functional.linear(x, weight, bias)
    ops = getattr(torch.ops, f"peft_kernels_{backend}")
    y, h = ops.lora_add.default(residual, x, *lists, *numbers)
    (expected,), expected_h = ops.lora_linear.default(x, [weight], [bias], *lists, [0, 0], *numbers)
    torch.testing.assert_close(h, expected_h)
    torch.testing.assert_close(y, expected)
    for got, wanted in zip(*(torch.autograd.grad(t.square().sum(), (x, *factors)) for t in (y, expected)), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend,device", PLACES)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("rows", [(0,), (1,), (2, 9), (150,)], ids=str)
def test_in_place_has_the_same_bits(backend, device, pair, rows):
    """Also where x is the residual, or lies half over it: x is read before anything is written."""
    forward, _, forward_ = operators(backend)
    arguments = problem(device, *pair, rows=rows, K=40, N=40, ranks=(5, 3), p=0.2, lora_biased=True)
    rest = list(arguments.values())[2:]
    expected, residual = forward(*arguments.values())[0], arguments["residual"].clone()
    assert forward_(residual, arguments["x"], *rest) is None
    assert torch.equal(residual, expected)
    expected, residual = forward(arguments["x"], arguments["x"], *rest)[0], arguments["x"].clone()
    forward_(residual, residual, *rest)
    assert torch.equal(residual, expected)
    count, shift = residual.numel(), residual.numel() // 2 + 3
    buffer = torch.randn(count + shift, device=device).to(pair[0])
    x, residual = buffer[:count].view(residual.shape), buffer[shift:].view(residual.shape)
    expected = forward(residual, x.clone(), *rest)[0]
    forward_(residual, x, *rest)
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("backend,device", PLACES)
def test_in_place_needs_a_contiguous_residual(backend, device):
    forward_, arguments = operators(backend)[2], problem(device, F32, F32)
    arguments["residual"] = arguments["residual"].t().contiguous().t()
    text = "lora_add_: residual must be contiguous, as it is written to"
    with pytest.raises((RuntimeError, ValueError), match=text):
        forward_(*arguments.values())
    with pytest.raises(ValueError, match=re.escape(f"{text}, got strides [1, 12]")):
        peft_kernels.lora_add_(**arguments)


@pytest.mark.parametrize("backend,device", PLACES)
def test_in_place_refuses_what_needs_a_gradient(backend, device):
    """The operator itself, so that nothing which calls it loses one in silence."""
    forward_ = operators(backend)[2]
    arguments = problem(device, F32, F32, ranks=(5, 3), lora_biased=True)
    leaves = {name: value for name, value in arguments.items() if name in ("residual", "x")}
    leaves |= {name: arguments[name][1] for name in ("lora_A", "lora_B", "lora_bias")}
    before = arguments["residual"].clone()
    for leaf in leaves.values():
        leaf.requires_grad_()
        with pytest.raises(RuntimeError, match="lora_add_: writes into the residual and has no gradient; lora_add has"):
            forward_(*arguments.values())
        with pytest.raises(RuntimeError, match="lora_add_: writes into the residual and has no gradient; lora_add has"):
            peft_kernels.lora_add_(**arguments)
        leaf.requires_grad_(False)
    for name, leaf in leaves.items():
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaf, torch.ones_like(leaf))
            dual = dual if name in ("residual", "x") else [arguments[name][0], dual]
            with pytest.raises(NotImplementedError, match="lora_add_: no forward-mode derivative"):
                forward_(*(arguments | {name: dual}).values())
    assert torch.equal(arguments["residual"], before)


@pytest.mark.parametrize("backend,device", PLACES)
@pytest.mark.parametrize("guard", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_in_place_tells_autograd(backend, device, guard):
    """Else a backward would read the sum where it saved the residual."""
    arguments = problem(device, F32, F32)
    residual = arguments["residual"]
    weight = torch.ones_like(residual, requires_grad=True)
    y = (weight * residual).sum()
    before = residual._version
    with guard():
        operators(backend)[2](*arguments.values())
    assert residual._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("backend,device", PLACES)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_what_in_place_refuses_has_no_new_version(backend, device, guard):
    arguments = problem(device, F32, F32)
    residual, bad = arguments["residual"], {"lora_A": [a[:, 1:] for a in arguments["lora_A"]]}
    before = residual._version
    for refusing in (operators(backend)[2], lambda *args: call_in_place(operators(backend)[2], *args)):
        with guard(), pytest.raises((RuntimeError, ValueError)):
            refusing(*(arguments | bad).values())
    assert residual._version == before


def test_in_place_without_gradients():
    x, a, b = torch.randn(5, 48), torch.randn(4, 48), torch.randn(40, 4, requires_grad=True)
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            residual = torch.zeros(5, 40)
            assert peft_kernels.lora_add_(residual, x, a, b, scaling=2.0) is residual
            assert torch.equal(residual, peft_kernels.lora_add(torch.zeros(5, 40), x, a, b, scaling=2.0))


@pytest.mark.parametrize("backend,device", PLACES)
def test_opcheck_in_place(backend, device):
    for id in ("ragged", "batch", "empty", "stacked"):
        arguments = next(s for s in OP.samples() if s.id == id).make(device, F32, F32)
        torch.library.opcheck(operators(backend)[2], tuple(arguments.values()))


@pytest.mark.parametrize("backend,device", PLACES)
def test_many_rows(backend, device):
    """More rows than any backend takes at a time, in the gradients that sum over them too."""
    arguments = problem(device, F32, F32, rows=(2100,), K=8, N=300, ranks=(3,), p=0.1)
    testing.assert_matches_oracle(OP, arguments, *testing.operators(backend, OP))


@pytest.mark.parametrize("backend,device", PLACES)
def test_more_than_2_31_elements_apart(backend, device):
    arguments = problem(device, BF16, BF16, rows=(3,), K=8, N=16)
    dy = testing.gradients_for(OP, arguments)
    near = OP.evaluate(*testing.operators(backend, OP), arguments, dy)
    for name in ("residual", "x"):
        arguments[name] = _far_apart(arguments[name])
    far = OP.evaluate(*testing.operators(backend, OP), arguments, [_far_apart(dy[0])])
    assert all(torch.equal(near[name], far[name]) for name in near)


def _far_apart(matrix):
    """The same matrix, its third row more than 2^31 elements after the first; untouched pages cost nothing."""
    stride = 2**30 + 8
    buffer = torch.empty(2 * stride + matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    return buffer.as_strided(matrix.shape, (stride, 1)).copy_(matrix)


@pytest.mark.parametrize("backend,device", PLACES)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_each_gradient_alone_is_the_same(backend, device, pair):
    forward, backward, _ = operators(backend)
    arguments = problem(device, *pair, rows=(2, 9), K=40, N=24, ranks=(5, 3), p=0.2)
    dy, h = testing.gradients_for(OP, arguments)[0], forward(*arguments.values())[1]
    rest = [arguments[name] for name in ("lora_A", "lora_B", "scaling", "dropout_p", "seed")]
    together = backward(dy, arguments["x"], h, *rest, [True] * 7)
    for i in range(7):
        x, low_rank = arguments["x"] if i in (1, 2) else None, h if i in (3, 4) else None
        with testing.poisoned_memory():
            alone = backward(dy, x, low_rank, *rest, [j == i for j in range(7)])
        assert torch.equal(alone[i], together[i])
        assert all(t.numel() == 0 for j, t in enumerate(alone) if j != i)


@pytest.mark.parametrize(
    "text,changes",
    [
        ("dy must be of y's shape, dtype and device", {"dy": lambda dy: dy[1:]}),
        ("dy must be of y's shape, dtype and device", {"dy": lambda dy: dy.double()}),
        ("dy must be of y's shape, dtype and device", {"x": lambda x: x[None]}),
        ("dy must be of y's shape, dtype and device", {"dy": lambda dy: dy[0, 0], "x": lambda x: None}),
        ("x must be given for gradients of lora_A", {"x": lambda x: None}),
        ("h must be the contiguous [M, R] that the forward returned", {"h": lambda h: h[:, 1:]}),
        ("h must be the contiguous [M, R] that the forward returned", {"h": lambda h: h.double()}),
        ("h must be given for gradients of lora_B", {"h": lambda h: None}),
        ("needs must have 7 entries, got 6", {"needs": lambda needs: needs[1:]}),
        ("lora_B[0] must have shape [out_features=24, r=3], got [24, 5]", {"lora_B": lambda b: b[::-1]}),
    ],
)
def test_bad_input_of_the_backward_is_refused_in_words(text, changes):
    arguments = problem("cpu", F32, F32, rows=(20,), K=40, N=24, ranks=(3, 5), p=0.1)
    rest = {name: arguments[name] for name in ("lora_A", "lora_B", "scaling", "dropout_p", "seed")}
    dy, h = testing.gradients_for(OP, arguments)[0], OP.forward.reference(*arguments.values())[1]
    bad = {"dy": dy, "x": arguments["x"], "h": h, **rest, "needs": [True] * 7}
    bad |= {name: change(bad[name]) for name, change in changes.items()}
    with pytest.raises(ValueError, match=re.escape(f"lora_add_backward: {text}")):
        check_backward(**bad)
    for backend in {"cpu", "cuda"} & set(backends.linked("lora_add", "cpu")):
        with pytest.raises(RuntimeError, match=re.escape(f"lora_add_backward: {text}")):
            operators(backend)[1](*bad.values())


def layer(K=48, N=40, r=4, dtype=F32):
    """A frozen base, which is any function of x, and trainable factors."""
    weight = torch.randn(N, K, dtype=dtype) * K**-0.5
    a, b = (torch.randn(r, K) * K**-0.5).requires_grad_(), (torch.randn(N, r) * r**-0.5).requires_grad_()
    return lambda x: torch.nn.functional.linear(x, weight.to(x.dtype)), a, b


def apply(x, base, a, b, p=0.0):
    seed = peft_kernels.new_seed(x.device) if p else None
    return peft_kernels.lora_add(base(x), x, a, b, scaling=0.5, dropout_p=p, seed=seed)


def test_one_adapter_or_several_one_number_or_one_each():
    base, a, b = layer()
    x = torch.randn(5, 48)
    twice = peft_kernels.lora_add(base(x), x, [a, a], [b, b], scaling=[0.25, 0.25])
    torch.testing.assert_close(twice, apply(x, base, a, b))
    assert torch.equal(twice, peft_kernels.lora_add(base(x), x, (a, a), (b, b), scaling=0.25, dropout_p=[0, 0]))


def test_the_residuals_gradient_is_that_of_y_and_costs_no_call():
    _, a, b = layer()
    x, residual = torch.randn(5, 48), torch.randn(5, 40, requires_grad=True)
    y = peft_kernels.lora_add(residual, x, a.detach(), b.detach())
    dy = torch.randn_like(y)
    assert memory.saved_bytes(lambda: peft_kernels.lora_add(residual, x, a.detach(), b.detach()), ()) == 0
    assert torch.equal(torch.autograd.grad(y, residual, dy)[0], dy)


def test_only_needed_work_is_kept():
    _, a, b = layer(64, 64, r=8)
    x, residual = torch.randn(100, 64), torch.randn(100, 64)

    def run(a, p=0.0):
        seed = peft_kernels.new_seed() if p else None
        return peft_kernels.lora_add(residual, x, a, b, scaling=0.5, dropout_p=p, seed=seed)

    frozen_a = memory.saved_bytes(lambda: run(a.detach()), (a, b))
    assert frozen_a == 4 * 100 * 8  # h; not x where A is frozen, never the residual
    for tensor in (x, residual):
        tensor.requires_grad_()
    assert memory.saved_bytes(lambda: run(a, 0.5), (a, b)) == x.nbytes + 4 * 100 * 8 + 8  # and the seed: no mask
    with torch.no_grad():
        assert memory.saved_bytes(lambda: run(a), (a, b)) == 0


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compile_fullgraph(p):
    base, a, b = layer()
    x = torch.randn(9, 48, requires_grad=True)
    compiled = torch.compile(lambda x, a, b: apply(x, base, a, b, p).relu(), fullgraph=True)
    out = compiled(x, a, b)
    grads = torch.autograd.grad(out.sum(), (x, a, b))
    if p == 0:  # eager and compiled runs draw different masks
        expected = apply(x, base, a, b).relu()
        torch.testing.assert_close(out, expected)
        for grad, wanted in zip(grads, torch.autograd.grad(expected.sum(), (x, a, b)), strict=True):
            torch.testing.assert_close(grad, wanted)
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


@torch.no_grad()
def test_compile_in_place():
    base, a, b = layer(48, 48)
    x = torch.randn(9, 48)

    def run(x):
        y = peft_kernels.lora_add_(base(x), x, a, b, scaling=0.5)
        return peft_kernels.lora_add_(y, y, a, b, scaling=0.5)

    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x), run(x))


def test_export_keeps_one_node():
    base, a, b = layer()

    class Layer(torch.nn.Module):
        def forward(self, x):
            return apply(x, base, a.detach(), b.detach())

    x = torch.randn(9, 48)
    program = torch.export.export(Layer(), (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},))
    assert len([n for n in program.graph.nodes if "lora_add" in str(n.target)]) == 1
    torch.testing.assert_close(program.module()(x[:5]), apply(x[:5], base, a, b))


def test_autocast_takes_the_autocast_dtype_and_keeps_gradient_dtypes():
    base, a, b = layer()
    x = torch.randn(20, 48, requires_grad=True)
    residual = torch.randn(20, 40, requires_grad=True)
    with torch.autocast("cpu", dtype=BF16):
        y = peft_kernels.lora_add(residual, x, a, b)
        assert apply(x, base, a, b).dtype is BF16
    assert y.dtype is BF16 and torch.equal(y, peft_kernels.lora_add(residual.bfloat16(), x.bfloat16(), a, b))
    y.float().sum().backward()
    assert residual.grad.dtype is x.grad.dtype is a.grad.dtype is b.grad.dtype is F32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_replays_the_same_mask(use_reentrant):
    base, a, b = layer(48, 48)
    grads = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, 9 * 48).view(9, 48).requires_grad_()
        a.grad = b.grad = None
        run(lambda x: apply(apply(x, base, a, b, 0.3), base, a, b, 0.3), x).square().sum().backward()
        grads.append((x.grad, a.grad, b.grad))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_second_derivative_and_forward_mode_are_refused():
    base, a, b = layer()
    x = torch.randn(5, 48, requires_grad=True)
    (grad,) = torch.autograd.grad(apply(x, base, a, b).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="lora_add: no forward-mode derivative"):
        apply(x, base, a, forward_ad.make_dual(b.detach(), b.detach()))
