"""lora_linear beyond what every op must keep: the dropout mask, far strides, compile, export, autocast, checkpointing,
what is kept for the backward."""

import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels import backends, memory, registry, testing
from peft_kernels.ops.lora_linear.samples import problem

OPS = registry.ops()
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PLACES = [
    pytest.param(backend, device, id=f"{backend}-{device}")
    for device in DEVICES
    for backend in backends.linked("lora_linear", device)
]


@pytest.mark.parametrize("backend,device", PLACES)
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 0x0123_4567_89AB_CDEF])
def test_dropout_mask_is_bit_equal(backend, device, seed):
    seed = torch.tensor(seed, device=device)
    mask = getattr(torch.ops, f"peft_kernels_{backend}").lora_dropout_mask.default
    for rows, cols, p, stream in [
        (5, 100, 0.1, 0),
        (3, 7, 0.5, 2),
        (1, 33, 0.999999, 1),
        (2, 64, 0.0, 0),
        (0, 4, 0.1, 0),
    ]:
        expected = torch.ops.peft_kernels_reference.lora_dropout_mask.default(seed, rows, cols, p, stream)
        assert torch.equal(mask(seed, rows, cols, p, stream), expected)


def test_dropout_mask_keeps_the_right_share_and_streams_differ():
    seed, p = peft_kernels.new_seed(), 0.1
    masks = [peft_kernels.lora_dropout_mask(seed, 500, 1000, p, stream) for stream in (0, 1)]
    spread = 5 * math.sqrt(p * (1 - p) / masks[0].numel())  # five standard deviations
    for mask in masks:
        assert abs(mask.double().mean().item() - (1 - p)) < spread
    both = (masks[0] & masks[1]).double().mean().item()
    assert abs(both - (1 - p) ** 2) < 2 * spread


@pytest.mark.parametrize("backend,device", PLACES)
def test_many_rows(backend, device):
    """More rows than any backend takes at a time, in the gradients that sum over them too."""
    arguments = problem(device, torch.float32, torch.float32, rows=(2100,), K=8, N=(300,), ranks=((3,),), p=0.1)
    testing.assert_matches_oracle(OPS["lora_linear"], arguments, *testing.operators(backend, OPS["lora_linear"]))


@pytest.mark.parametrize("backend,device", PLACES)
def test_more_than_2_31_elements_apart(backend, device):
    op = OPS["lora_linear"]
    arguments = problem(device, torch.bfloat16, torch.bfloat16, rows=(3,), K=8, N=(16,))
    dy = testing.output_gradients(op.functions[0].reference(*arguments.values())[0])
    near = op.evaluate(*testing.operators(backend, op), arguments, dy)
    arguments["x"], dy = _far_apart(arguments["x"]), [_far_apart(dy[0])]
    far = op.evaluate(*testing.operators(backend, op), arguments, dy)
    assert all(torch.equal(near[name], far[name]) for name in near)


def _far_apart(matrix):
    """The same matrix, its third row more than 2^31 elements after the first; untouched pages cost nothing."""
    stride = 2**30 + 8
    buffer = torch.empty(2 * stride + matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    return buffer.as_strided(matrix.shape, (stride, 1)).copy_(matrix)


def layer(K=48, N=40, r=4, dtype=torch.float32):
    """A frozen weight and trainable factors, drawn from torch's generator."""
    weight = torch.randn(N, K, dtype=dtype) * K**-0.5
    return weight, (torch.randn(r, K) * K**-0.5).requires_grad_(), (torch.randn(N, r) * r**-0.5).requires_grad_()


def apply(x, weight, a, b, p=0.0):
    seed = peft_kernels.new_seed(x.device) if p else None
    return peft_kernels.lora_linear(x, weight, None, a, b, scaling=0.5, dropout_p=p, seed=seed)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compile_fullgraph(p):
    weight, a, b = layer()
    x = torch.randn(9, 48, requires_grad=True)
    compiled = torch.compile(lambda x, a, b: apply(x, weight, a, b, p).relu(), fullgraph=True)
    out = compiled(x, a, b)
    grads = torch.autograd.grad(out.sum(), (x, a, b))
    if p == 0:  # eager and compiled runs draw different masks
        expected = apply(x, weight, a, b).relu()
        torch.testing.assert_close(out, expected)
        for grad, wanted in zip(grads, torch.autograd.grad(expected.sum(), (x, a, b)), strict=True):
            torch.testing.assert_close(grad, wanted)
    assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


def test_export_keeps_one_node():
    weight, a, b = layer()

    class Layer(torch.nn.Module):
        def forward(self, x):
            return apply(x, weight, a.detach(), b.detach())

    x = torch.randn(9, 48)
    program = torch.export.export(Layer(), (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},))
    nodes = [n for n in program.graph.nodes if "lora_linear" in str(n.target)]
    assert len(nodes) == 1
    torch.testing.assert_close(program.module()(x[:5]), apply(x[:5], weight, a, b))


def test_autocast_takes_the_autocast_dtype_and_keeps_gradient_dtypes():
    weight, a, b = layer()
    x = torch.randn(20, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = apply(x, weight, a, b)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype is a.grad.dtype is b.grad.dtype is torch.float32
    wide = apply(x.detach().bfloat16(), weight.bfloat16(), a, b)
    assert torch.equal(y, wide)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_replays_the_same_mask(use_reentrant):
    weight, a, b = layer(48, 48)
    grads = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, 9 * 48).view(9, 48).requires_grad_()
        a.grad = b.grad = None
        run(lambda x: apply(apply(x, weight, a, b, 0.3), weight, a, b, 0.3), x).square().sum().backward()
        grads.append((x.grad, a.grad, b.grad))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_only_needed_work_is_kept():
    weight, a, b = layer(64, 64, r=8)
    x = torch.randn(100, 64)
    full = memory.saved_bytes(lambda: apply(x.requires_grad_(), weight, a, b, 0.5), (weight, a, b))
    assert full == x.nbytes + 4 * 100 * 8 + 8  # x, h and the seed: no mask, no dropped copy
    frozen_a = memory.saved_bytes(lambda: apply(x, weight, a.detach(), b), (weight, a, b))
    assert frozen_a == 4 * 100 * 8  # x is not kept where A is frozen
    with torch.no_grad():
        assert memory.saved_bytes(lambda: apply(x, weight, a, b), (weight, a, b)) == 0


def test_one_unused_projection_gets_zero_gradients():
    weight, a, b = layer()
    x = torch.randn(5, 48, requires_grad=True)
    first, _ = peft_kernels.lora_linear_group(
        x, [weight, weight], [None, None], [a, a.detach().clone().requires_grad_()], [b, b.detach()],
        member=[0, 1], scaling=[0.5, 0.5],
    )  # fmt: skip
    grad = torch.autograd.grad(first.sum(), (x, a, b))
    expected = torch.autograd.grad(apply(x, weight, a, b).sum(), (x, a, b))
    for got, wanted in zip(grad, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_second_derivative_is_refused():
    weight, a, b = layer()
    x = torch.randn(5, 48, requires_grad=True)
    (grad,) = torch.autograd.grad(apply(x, weight, a, b).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused(requires_grad):
    weight, a, b = (tensor.detach().requires_grad_(requires_grad) for tensor in layer())
    x = torch.randn(5, 48)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: apply(x, weight, a, b), (x,), (x,))
    with forward_ad.dual_level():
        expected = apply(x, weight, a, b)  # nothing here has a tangent
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            apply(x, weight, a, forward_ad.make_dual(b.detach(), b.detach()))
    assert torch.equal(expected, apply(x, weight, a, b))
