"""Every op x backend x sample against the oracle, and what every operator must keep: opcheck, gradcheck, repeatability,
compile, export, autocast, checkpointing, bad inputs. The samples come from the registry."""

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
RUNS = [
    pytest.param(op, backend, device, sample, pair, id=f"{name}-{backend}-{device}-{sample.id}-{_pair}")
    for name, op in OPS.items()
    for device in DEVICES
    for backend in backends.linked(name, device)
    for sample in op.samples()
    for pair in sample.dtypes
    for _pair in ["/".join(str(d).removeprefix("torch.") for d in pair)]
]
PLACES = [
    pytest.param(backend, device, id=f"{backend}-{device}")
    for device in DEVICES
    for backend in backends.linked("lora_linear", device)
]


def sample_of(op, id, device="cpu", dtype=torch.float32, factor=None):
    return next(s for s in op.samples() if s.id == id).make(device, dtype, factor or dtype)


@pytest.mark.parametrize("op,backend,device,sample,pair", RUNS)
def test_matches_oracle(op, backend, device, sample, pair, count_sample):
    with testing.poisoned_memory():
        testing.assert_matches_oracle(op, sample.make(device, *pair), *testing.operators(backend, op))
    count_sample((backend, device))


@pytest.mark.skipif("cpu" not in backends.linked("lora_linear", "cpu"), reason="the CPU kernels are not built")
def test_poisoned_memory_reaches_what_the_operators_allocate():
    with testing.poisoned_memory():
        assert math.isnan(torch.empty(1).item()) and math.isnan(backends.poison_memory(on=True))


@pytest.mark.skipif("cpu" not in backends.linked("lora_linear", "cpu"), reason="the CPU kernels are not built")
@pytest.mark.parametrize("isa", ["default", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa):
    best = backends.instruction_set()
    try:
        backends.set_instruction_set(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        for op in OPS.values():
            for sample in op.samples():
                for pair in sample.dtypes:
                    testing.assert_matches_oracle(op, sample.make("cpu", *pair), *testing.operators("cpu", op))
    finally:
        backends.set_instruction_set(best)


@pytest.mark.parametrize("backend,device", PLACES)
@pytest.mark.parametrize("rows", [16, 200])  # both with enough work for several threads: few rows, and a GEMM
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_repeatable_for_any_thread_count(backend, device, rows, p):
    op = OPS["lora_linear"]
    sizes = dict(K=1000, N=(1024, 300), ranks=((16, 3), (8,)))
    arguments = problem(device, torch.bfloat16, torch.bfloat16, rows=(rows,), p=p, biased=True, **sizes)
    dy = testing.output_gradients(op.functions[0].reference(*arguments.values())[0])
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            runs.append(op.evaluate(*testing.operators(backend, op), arguments, dy))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])


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
@pytest.mark.parametrize("id", ["batch", "dropout", "group", "stacked", "conv1d-row", "bias"])
def test_opcheck(backend, device, id):
    op = OPS["lora_linear"]
    arguments = sample_of(op, id, device)
    tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor) and v.is_floating_point()]
    for group in ("weight", "bias", "lora_A", "lora_B", "lora_bias"):
        tensors += [t for t in arguments[group] if t is not None]
    forward, backward = testing.operators(backend, op)
    y, h = forward(*arguments.values())
    for tensor in tensors:
        tensor.requires_grad_()
    torch.library.opcheck(forward, tuple(arguments.values()))
    rest = [arguments[n] for n in ("weight", "lora_A", "lora_B", "member", "scaling", "dropout_p", "seed")]
    rest = torch.utils._pytree.tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, rest)
    L, G = len(arguments["lora_A"]), len(arguments["weight"])
    for needs in ([True] * (1 + 2 * G + 3 * L), [True] + [False] * (2 * G + 3 * L)):
        torch.library.opcheck(backward, (testing.output_gradients(y), arguments["x"].detach(), h, *rest, needs))


@pytest.mark.parametrize("backend,device", PLACES)
@pytest.mark.parametrize("id", ["ragged-small", "group-small"])
def test_gradcheck(backend, device, id):
    sizes = dict(rows=(5,), K=6, N=(7,), ranks=((3,),)) if id == "ragged-small" else dict(
        rows=(2, 2), K=5, N=(4, 3), ranks=((2, 1), (2,)), p=0.3
    )  # fmt: skip
    arguments = problem(device, torch.float64, torch.float64, biased=True, lora_biased=True, **sizes)
    names = ("x", "weight", "bias", "lora_A", "lora_B", "lora_bias")
    forward = testing.operators(backend, OPS["lora_linear"])[0]
    counts = {n: 1 if n == "x" else len(arguments[n]) for n in names}
    flat = [t.requires_grad_() for n in names for t in ([arguments[n]] if n == "x" else arguments[n])]

    def run(*tensors):
        tensors, groups = list(tensors), {}
        for name, count in counts.items():
            groups[name], tensors = tensors[:count], tensors[count:]
        groups["x"] = groups["x"][0]
        return tuple(forward(*(arguments | groups).values())[0])

    assert torch.autograd.gradcheck(run, flat)


@pytest.mark.parametrize("bad", [pytest.param(b, id=b.id) for b in OPS["lora_linear"].bad_inputs()])
def test_bad_input_is_refused_in_words(bad):
    op = OPS["lora_linear"]
    arguments = bad.make("cpu")
    with pytest.raises(bad.error) as caught:
        op.check(**arguments)
    assert str(caught.value).startswith("lora_linear: ") and bad.text in str(caught.value)
    with pytest.raises(bad.error) as public:
        peft_kernels.lora_linear_group(
            arguments.pop("x"), *(arguments.pop(n) for n in ("weight", "bias", "lora_A", "lora_B")), **arguments
        )
    assert str(public.value) == str(caught.value)
    arguments = bad.make("cpu")
    for backend in backends.linked("lora_linear", "cpu"):
        with pytest.raises((RuntimeError, ValueError, TypeError)) as raw:
            testing.operators(backend, op)[0](*arguments.values())
        if (
            "sparse" not in bad.id and "device" not in bad.id
        ):  # those two PyTorch's dispatcher refuses before the kernel
            assert bad.text in str(raw.value), backend
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(bad.error):
        torch.ops.peft_kernels.lora_linear.default(*arguments.values())


@pytest.mark.parametrize("backend,device", PLACES)
def test_many_rows(backend, device):
    """More rows than any backend takes at a time, in the gradients that sum over them too."""
    arguments = problem(device, torch.float32, torch.float32, rows=(2100,), K=8, N=(300,), ranks=((3,),), p=0.1)
    testing.assert_matches_oracle(OPS["lora_linear"], arguments, *testing.operators(backend, OPS["lora_linear"]))


@pytest.mark.parametrize("backend,device", PLACES)
@pytest.mark.parametrize("rows", [3, 40])
def test_nan_stays_in_its_row(backend, device, rows):
    op = OPS["lora_linear"]
    arguments = problem(device, torch.float32, torch.float32, rows=(rows,), K=67, N=(131,), p=0.1)
    others = [m for m in range(rows) if m != 1]
    runs = []
    for value in (0.5, math.nan):
        arguments["x"][1] = value
        dy = testing.output_gradients(op.functions[0].reference(*arguments.values())[0])
        dy[0][1] = value
        runs.append(op.evaluate(*testing.operators(backend, op), arguments, dy))
    clean, dirty = runs
    for name in ("y[0]", "h", "grad x[0]"):
        assert dirty[name][1].isnan().all() and torch.equal(dirty[name][others], clean[name][others]), name


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
