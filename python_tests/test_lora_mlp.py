"""lora_mlp: against its three calls one by one, against plain PyTorch, what it keeps for the backward, and what must
stay true of any op: dropout replayed, checkpointing, autocast, one graph, gradients that nobody asked for."""

import doctest

import pytest
import torch
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import peft_kernels
from peft_kernels import memory
from peft_kernels.ops.common.activations import ACTIVATIONS
from peft_kernels.ops.common.dropout import keep_scale
from peft_kernels.ops.lora_linear.gated import GATES

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
F = torch.nn.functional
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
SUBSETS = ([0, 1, 2], [2], [0], [0, 1], [1, 0, 1, 2, 2], [])
each_device = pytest.mark.parametrize("device", DEVICES)
each_subset = pytest.mark.parametrize("member", SUBSETS, ids=str)


def problem(
    member, dtype=F64, factors=None, device="cpu", rows=(3, 7), K=24, inner=40, N=16, p=0.0, biased=True, trained=False
):
    """Arguments of lora_mlp by name; every adapter needs gradients and so does x, weights and biases if `trained`."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape, scale=1.0, to=dtype, needs=True):
        t = torch.randn(shape, generator=generator, dtype=F64) * scale
        return t.to(device, to).requires_grad_(needs)

    sizes, factors = [(inner, K), (inner, K), (N, inner)], factors or dtype
    return {
        "x": draw(*rows, K),
        "weight": [draw(*size, scale=size[1] ** -0.5, needs=trained) for size in sizes],
        "bias": [draw(size[0], needs=trained) if biased else None for size in sizes],
        "lora_A": [draw(3 + i, sizes[g][1], scale=sizes[g][1] ** -0.5, to=factors) for i, g in enumerate(member)],
        "lora_B": [draw(sizes[g][0], 3 + i, scale=0.5, to=factors) for i, g in enumerate(member)],
        "member": member,
        "scaling": [1.5 - i for i in range(len(member))],
        "dropout_p": [p] * len(member),
        "seed": torch.tensor(77, device=device) if p else None,
        "lora_bias": [draw(sizes[g][0], to=factors) if biased else None for g in member],
    }


def tensors_of(arguments):
    lists = [arguments[n] for n in ("weight", "bias", "lora_A", "lora_B", "lora_bias")]
    return [arguments["x"], *(t for entries in lists for t in entries if t is not None)]


def step(run, arguments, **options):
    """y and the gradient of everything that has one."""
    leaves = [t for t in tensors_of(arguments) if t.requires_grad]
    y = run(**arguments, **options)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=F64).to(y)
    return y, *torch.autograd.grad(y, leaves, dy)


def _half(arguments, members):
    places = [i for i, g in enumerate(arguments["member"]) if g in members]
    entries = {n: [arguments[n][i] for i in places] for n in ("lora_A", "lora_B", "lora_bias", "scaling", "dropout_p")}
    return entries | {"member": [members.index(arguments["member"][i]) for i in places]}


def one_by_one(activation="silu", **arguments):
    """The same as three calls of other operators, which keep a."""
    a, seed = arguments["x"], arguments["seed"]
    for members in ((0, 1), (2,)):
        half = _half(arguments, members)
        weight, bias = ([arguments[n][g] for g in members] for n in ("weight", "bias"))
        if half["lora_A"]:
            y = peft_kernels.lora_linear_group(a, weight, bias, **half, seed=seed)
        else:
            y = [F.linear(a, w, b) for w, b in zip(weight, bias, strict=True)]
        if members == (0, 1):
            a = torch.ops.peft_kernels.gated_product(*y, activation)
            seed = None if seed is None else ~seed
    return y[0]


def by_hand(activation="silu", **arguments):
    """Plain PyTorch, with the masks that the op is to draw."""

    def project(x, g, seed, stream_of):
        y = F.linear(x, arguments["weight"][g], arguments["bias"][g])
        for i, owner in enumerate(arguments["member"]):
            if owner != g:
                continue
            p, kept = arguments["dropout_p"][i], x
            if p:
                mask = peft_kernels.lora_dropout_mask(seed, x.numel() // x.shape[-1], x.shape[-1], p, stream_of[i])
                kept = x * mask.view(x.shape) * keep_scale(p)
            added = F.linear(F.linear(kept, arguments["lora_A"][i]), arguments["lora_B"][i], arguments["lora_bias"][i])
            y = y + arguments["scaling"][i] * added
        return y

    outer = [i for i, g in enumerate(arguments["member"]) if g < 2]
    inner = [i for i, g in enumerate(arguments["member"]) if g == 2]
    streams = {i: place for half in (outer, inner) for place, i in enumerate(half)}
    seed = arguments["seed"]
    gate, up = (project(arguments["x"], g, seed, streams) for g in (0, 1))
    a = ACTIVATIONS[activation](gate) * up
    return project(a, 2, None if seed is None else ~seed, streams)


def assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_the_example_of_the_docstring():
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    names = {"torch": torch, "peft_kernels": peft_kernels}
    runner.run(parser.get_doctest(peft_kernels.lora_mlp.__doc__, names, "lora_mlp", None, 0))
    assert runner.summarize().failed == 0 and runner.tries > 0


@each_device
@pytest.mark.parametrize("pair", [(F32, F32), (BF16, BF16), (BF16, F32), (F16, F32), (F64, F64)], ids=str)
@pytest.mark.parametrize("member", [member for member in SUBSETS if {0, 1} & {*member}], ids=str)
def test_the_bits_are_those_of_three_calls(member, pair, device):
    """What is computed again is what the forward had, and no gradient comes another way."""
    arguments = problem(member, *pair, device, p=0.1)
    assert_equal(step(peft_kernels.lora_mlp, arguments), step(one_by_one, arguments))


@each_device
@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@each_subset
def test_plain_pytorch_agrees(member, p, activation, device):
    """In fp64, where PyTorch's other order of sums does not show."""
    arguments = problem(member, device=device, p=p, trained=True)
    found, wanted = (step(run, arguments, activation=activation) for run in (peft_kernels.lora_mlp, by_hand))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@each_device
@pytest.mark.parametrize("activation", GATES)
@each_subset
def test_gradcheck(member, activation, device):
    arguments = problem(member, device=device, rows=(2, 3), K=5, inner=7, N=4, p=0.2, trained=True)
    leaves = tensors_of(arguments)

    def run(*tensors):
        filled = iter(tensors)
        new = {"x": next(filled)}
        for name in ("weight", "bias", "lora_A", "lora_B", "lora_bias"):
            new[name] = [next(filled) for _ in arguments[name]]
        return peft_kernels.lora_mlp(**arguments | new, activation=activation)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


# -- what is kept -----------------------------------------------------------------------------------------------------


def kept(run, arguments):
    """Bytes besides parameters."""
    return memory.saved_bytes(lambda: run(**arguments), tensors_of(arguments)[1:])


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_kept_for_the_backward(p):
    """x, g, u, h of each adapter in fp32 and a seed: facts of the shapes. Three calls keep a as well, and two seeds."""
    M, K, inner = 21, 24, 40
    arguments = problem([0, 1, 2], BF16, F32, p=p, biased=False)
    ranks = 4 * M * sum(a.shape[0] for a in arguments["lora_A"])
    seed = 8 if p else 0
    assert kept(peft_kernels.lora_mlp, arguments) == 2 * M * (K + 2 * inner) + ranks + seed
    assert kept(one_by_one, arguments) == 2 * M * (K + 3 * inner) + ranks + 2 * seed


def test_nothing_is_kept_that_no_needed_gradient_reads():
    M, K, inner = 21, 24, 40
    arguments = problem([0, 1, 2], BF16, F32, biased=False)
    everything = [arguments["x"], *arguments["lora_A"], *arguments["lora_B"]]
    h = [4 * M * a.shape[0] for a in arguments["lora_A"]]
    gated = 2 * M * 2 * inner
    wanted = {
        (0,): gated,  # x
        (1,): gated + 2 * M * K,  # A of gate
        (3,): gated,  # A of down
        (4,): gated + h[0] + h[1],  # B of gate
        (6,): h[2],  # B of down: no activation
    }
    for needed, size in wanted.items():
        for i, tensor in enumerate(everything):
            tensor.requires_grad_(i in needed)
        assert kept(peft_kernels.lora_mlp, arguments) == size, needed


@pytest.mark.parametrize("member", [[0, 1, 2], [2], [0]], ids=str)
def test_only_needed_gradients_are_computed(member, monkeypatch):
    """One at a time they have the bits that they have together, and what none of them needs is not called."""
    arguments = problem(member, F32, trained=True)
    leaves = tensors_of(arguments)
    together = step(peft_kernels.lora_mlp, arguments)[1:]
    called = []
    for name in ("gated_product", "gated_product_backward"):
        operator = getattr(torch.ops.peft_kernels, name)
        record = lambda *call, name=name, run=operator.default: called.append(name) or run(*call)  # noqa: E731
        monkeypatch.setattr(operator, "default", record)
    of_down = (arguments["weight"][2], *(a for a, g in zip(arguments["lora_A"], member, strict=True) if g == 2))
    behind = (*of_down, arguments["bias"][2])
    behind += tuple(t for n in ("lora_B", "lora_bias") for t, g in zip(arguments[n], member, strict=True) if g == 2)
    for i, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        called.clear()
        _, alone = step(peft_kernels.lora_mlp, arguments)
        assert torch.equal(alone, together[i])
        again, through = any(leaf is t for t in of_down), not any(leaf is t for t in behind)
        assert called == ["gated_product"] * (1 + again) + ["gated_product_backward"] * through


def test_without_gradients_nothing_is_kept():
    arguments = problem([0, 1, 2], F32)
    with torch.no_grad():
        y = peft_kernels.lora_mlp(**arguments)
    assert y.grad_fn is None and torch.equal(y, peft_kernels.lora_mlp(**arguments))


# -- beneath other machinery ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_the_dropout(use_reentrant):
    arguments = problem([0, 1, 2], F32, p=0.3)

    def again(x, **others):
        return checkpoint(lambda x: peft_kernels.lora_mlp(x, **others), x, use_reentrant=use_reentrant)

    leaves = [t for t in tensors_of(arguments) if t.requires_grad]
    found = []
    for run in (peft_kernels.lora_mlp, again):
        y = run(**arguments)
        y.backward(torch.ones_like(y))
        found.append([y, *(t.grad for t in leaves)])
        for leaf in leaves:
            leaf.grad = None
    assert_equal(*found)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiled_it_is_one_graph_and_keeps_as_little(p):
    torch._dynamo.reset()
    arguments = problem([0, 1, 2], F32, p=p)
    compiled = torch.compile(peft_kernels.lora_mlp, fullgraph=True, backend="aot_eager_decomp_partition")
    assert_equal(step(compiled, arguments), step(peft_kernels.lora_mlp, arguments))
    assert kept(compiled, arguments) == kept(peft_kernels.lora_mlp, arguments)


@pytest.mark.parametrize("pair", [(F32, F32), (BF16, F32)], ids=str)
@pytest.mark.parametrize("member", [[0, 1, 2], [2], []], ids=str)
def test_opcheck(member, pair):
    arguments = problem(member, *pair, p=0.2)
    seed, numbers = arguments.pop("seed"), [arguments[n] for n in ("member", "scaling", "dropout_p")]
    tensors = [arguments[n] for n in ("weight", "bias", "lora_A", "lora_B", "lora_bias")]
    call = (arguments["x"], *tensors, *numbers, seed, "gelu")
    torch.library.opcheck(torch.ops.peft_kernels.lora_mlp.default, call)
    y, *saved = tree_map(lambda t: t.detach(), torch.ops.peft_kernels.lora_mlp(*call))
    x, weight, lora_A, lora_B = tree_map(lambda t: t.detach(), (call[0], tensors[0], tensors[2], tensors[3]))
    needs = [True] * (7 + 3 * len(member))
    of_down = [False] * 7 + [g == 2 for g in member] * 3  # alone, what lies before down is not called
    for wanted in (needs, [i == 0 for i in range(len(needs))], of_down):
        backward = (y, x, *saved, weight, lora_A, lora_B, *numbers, seed, "gelu", wanted)
        torch.library.opcheck(torch.ops.peft_kernels.lora_mlp_backward.default, backward)


@each_device
@pytest.mark.parametrize("member", [[0, 1, 2], [2], []], ids=str)
def test_autocast(member, device):
    """x and the projections in bf16, the factors as they are; the backward outside of autocast and inside."""
    arguments = problem(member, F32, device=device)
    low = arguments | {"x": arguments["x"].bfloat16()}
    low |= {n: [t.bfloat16() for t in arguments[n]] for n in ("weight", "bias")}
    wanted = step(peft_kernels.lora_mlp, low)
    with torch.autocast(device, torch.bfloat16):
        inside = step(peft_kernels.lora_mlp, arguments)
        y = peft_kernels.lora_mlp(**arguments)
    assert y.dtype is BF16 and torch.equal(y, wanted[0])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=F64).to(y)
    outside = torch.autograd.grad(y, [t for t in tensors_of(arguments) if t.requires_grad], dy)
    assert_equal(inside[1:], outside)
    assert_equal(outside, [g.to(o.dtype) for g, o in zip(wanted[1:], outside, strict=True)])


NO_ADAPTER = {name: [] for name in ("lora_A", "lora_B", "lora_bias", "member", "scaling", "dropout_p")}
BAD = {
    "weight-two": (lambda a: {"weight": a["weight"][:2]}, "lora_mlp: weight must have three entries, of gate, up"),
    "member": (lambda a: {"member": [0, 1, 3]}, r"lora_mlp: member\[2\] must be 0 \(gate\), 1 \(up\) or 2"),
    "length": (lambda a: {"scaling": [1.0]}, r"lora_mlp: scaling must have one entry per lora_A \(3\), got 1"),
    "activation": (lambda a: {"activation": "tanh"}, "lora_mlp: activation must be one of silu, gelu"),
    "up-rows": (
        lambda a: {"weight": [a["weight"][0], a["weight"][1][:39], a["weight"][2]], "bias": [None] * 3, **NO_ADAPTER},
        r"weight\[1\] must have as many rows as weight\[0\] \(40\), got 39",
    ),
    "down": (
        lambda a: {"weight": [*a["weight"][:2], a["weight"][2][:, 1:]]},
        r"lora_mlp, down: weight\[0\] must have shape \[out_features, in_features=40\], got \[16, 39\]",
    ),
    "lora_A": (
        lambda a: {"lora_A": [a["lora_A"][0][:, 1:], *a["lora_A"][1:]]},
        r"lora_mlp, gate and up: lora_A\[0\] must have shape \[r, in_features=24\], got \[3, 23\]",
    ),
    "seed": (lambda a: {"dropout_p": [0.0, 0.0, 0.1]}, "lora_mlp, down: seed must be given where dropout_p > 0"),
    "bias": (
        lambda a: {"bias": [a["bias"][0][:1], *a["bias"][1:]], **NO_ADAPTER},
        r"lora_mlp, gate and up: bias\[0\] must have shape \[out_features=40\], got \[1\]",
    ),
    "bias-down": (
        lambda a: {"bias": [*a["bias"][:2], a["bias"][2].expand(3, 7, 16)], **NO_ADAPTER},
        r"lora_mlp, down: bias\[0\] must have shape \[out_features=16\], got \[3, 7, 16\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("id", BAD)
def test_bad_input_is_refused_in_words(id):
    change, text = BAD[id]
    arguments = problem([0, 1, 2], F32)
    with pytest.raises(ValueError, match=text):
        peft_kernels.lora_mlp(**arguments | change(arguments))
