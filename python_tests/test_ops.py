"""Every op x backend x sample against the oracle, and what every operator must keep: opcheck, gradcheck, repeatability,
NaN where it arose, bad inputs. Ops and samples come from the registry."""

import math

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import peft_kernels
from peft_kernels import backends, registry, testing

OPS = registry.ops()
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PLACES = [
    (op, backend, device) for op in OPS.values() for device in DEVICES for backend in backends.linked(op.name, device)
]
RUNS = [
    pytest.param(op, backend, device, sample, pair, id=f"{op.name}-{backend}-{device}-{sample.id}-{_pair}")
    for op, backend, device in PLACES
    for sample in op.samples()
    for pair in sample.dtypes
    for _pair in ["/".join(str(d).removeprefix("torch.") for d in pair)]
]


def runs_of(choose):
    """Op, backend, device and sample, of the samples that `choose(op, sample)` takes."""
    return [
        pytest.param(op, backend, device, sample, id=f"{op.name}-{backend}-{device}-{sample.id}")
        for op, backend, device in PLACES
        for sample in op.samples()
        if choose(op, sample)
    ]


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


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
@pytest.mark.parametrize("op", [pytest.param(op, id=name) for name, op in OPS.items() if "cpu" in op.backends])
def test_every_instruction_set(op, isa):
    best = backends.instruction_set()
    try:
        backends.set_instruction_set(isa)
    except ValueError:
        pytest.skip(f"this processor has no {isa}")
    try:
        for sample in op.samples():
            for pair in sample.dtypes:
                testing.assert_matches_oracle(op, sample.make("cpu", *pair), *testing.operators("cpu", op))
    finally:
        backends.set_instruction_set(best)


@pytest.mark.parametrize("op,backend,device,sample", runs_of(lambda op, sample: sample.busy))
def test_repeatable_for_any_thread_count(op, backend, device, sample):
    arguments = sample.make(device, *sample.dtypes[0])
    dy = testing.gradients_for(op, arguments)
    counts = (2, 2) if backend == "reference" else (1, 2, 2, 3)  # PyTorch's own products may depend on the number
    threads, runs = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            runs.append(op.evaluate(*testing.operators(backend, op), arguments, dy))
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(runs[0][name], other[name]) for name in runs[0])


def test_every_op_has_a_busy_sample():
    assert all(any(sample.busy for sample in op.samples()) for op in OPS.values())


FP32 = (torch.float32, torch.float32)


def structure(value):
    """What matters to PyTorch about an argument: is it there, dimensions, layout, emptiness; one or several."""
    if isinstance(value, list):
        return min(len(value), 2), *sorted({structure(v) for v in value})
    if isinstance(value, torch.Tensor):
        return "tensor", value.dim(), value.is_contiguous(), value.numel() == 0
    return (type(value).__name__,)


def one_of_each_structure(op):
    """Ids of the samples that are the first with their structure."""
    first = {}
    for sample in op.samples():
        if FP32 in sample.dtypes:
            first.setdefault(str([structure(v) for v in sample.make("cpu", *FP32).values()]), sample.id)
    return first.values()


STRUCTURES = {op.name: one_of_each_structure(op) for op in OPS.values()}


@pytest.mark.parametrize("op,backend,device,sample", runs_of(lambda op, sample: sample.id in STRUCTURES[op.name]))
def test_opcheck(op, backend, device, sample):
    arguments = sample.make(device, *FP32)
    forward, backward = testing.operators(backend, op)
    calls = []
    if backward:
        record = lambda *call: calls.append(call) or backward(*call)  # noqa: E731
        op.evaluate(forward, record, arguments, testing.gradients_for(op, arguments))
    if op.autograd:
        leaf = lambda t: t.detach().clone().requires_grad_() if is_float(t) else t  # noqa: E731
        arguments = {n: v if n in op.constants else tree_map(leaf, v) for n, v in arguments.items()}
    torch.library.opcheck(forward, tuple(arguments.values()))
    for *call, needs in calls:  # all gradients that there are, and those of x alone
        for wanted in (needs, [i == 0 for i in range(len(needs))]):
            torch.library.opcheck(backward, (*call, wanted))


FP64 = (torch.float64, torch.float64)


@pytest.mark.parametrize("op,backend,device,sample", runs_of(lambda op, sample: op.autograd and FP64 in sample.dtypes))
def test_gradcheck(op, backend, device, sample):
    """One random direction in the space of all inputs, which no wrong gradient is likely to be at right angles to."""
    forward, _ = testing.operators(backend, op)
    arguments = sample.make(device, *FP64)
    leaves, tree = tree_flatten(arguments)
    constants = [arguments[name] for name in op.constants]
    wanted = [
        i for i, leaf in enumerate(leaves)
        if is_float(leaf) and not leaf.isnan().any() and not any(leaf is constant for constant in constants)
    ]  # fmt: skip

    def run(*tensors):
        filled = list(leaves)
        for i, tensor in zip(wanted, tensors, strict=True):
            filled[i] = tensor
        y = testing.first_output(forward(*tree_unflatten(filled, tree).values()))
        return tuple(out for out in y if not out.isnan().any())

    inputs = [leaves[i].detach().clone(memory_format=torch.contiguous_format).requires_grad_() for i in wanted]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize(
    "op,bad", [pytest.param(op, b, id=f"{op.name}-{b.id}") for op in OPS.values() for b in op.bad_inputs()]
)
def test_bad_input_is_refused_in_words(op, bad):
    arguments = bad.make("cpu")
    with pytest.raises(bad.error) as caught:
        op.check(**arguments)
    assert str(caught.value).startswith(f"{op.name}: ") and bad.text in str(caught.value)
    if op.public:
        with pytest.raises(bad.error) as public:
            getattr(peft_kernels, op.public)(**arguments)
        assert str(public.value) == str(caught.value)
    arguments = bad.make("cpu")
    for backend in backends.linked(op.name, "cpu"):
        with pytest.raises((RuntimeError, ValueError, TypeError)) as raw:
            testing.operators(backend, op)[0](*arguments.values())
        if (
            "sparse" not in bad.id and "device" not in bad.id
        ):  # those two PyTorch's dispatcher refuses before the kernel
            assert bad.text in str(raw.value), backend
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(bad.error):
        getattr(torch.ops.peft_kernels, op.name).default(*arguments.values())


def rows_of(tensor):
    return tensor.numel() // tensor.shape[-1]


@pytest.mark.parametrize("op,backend,device,sample", runs_of(lambda op, sample: FP32 in sample.dtypes))
def test_nan_stays_in_its_row(op, backend, device, sample):
    """One row of what has rows and of every dy: what the reference makes of it there, not a bit of it elsewhere."""
    arguments = sample.make(device, *FP32)
    if rows_of(arguments[op.rows]) < 2:
        pytest.skip("one row has no other")
    arguments[op.rows] = arguments[op.rows].clone(memory_format=torch.contiguous_format)
    dy = testing.gradients_for(op, arguments)
    runs = []
    for value in (0.5, math.nan):
        for tensor in (arguments[op.rows], *dy):
            tensor.view(-1, tensor.shape[-1])[1] = value
        runs.append(op.evaluate(*testing.operators(backend, op), arguments, dy))
    clean, dirty = runs
    expected = op.evaluate(*(f and f.reference for f in (op.forward, op.backward)), arguments, dy)
    for name in (n for n in clean if n.startswith(("y[", "h", f"grad {op.rows}"))):
        before, after, reference = (t[name].reshape(rows_of(arguments[op.rows]), -1) for t in (clean, dirty, expected))
        others = [m for m in range(len(before)) if m != 1]
        assert torch.equal(after[1].isnan(), reference[1].isnan()), name
        assert torch.equal(after[others].nan_to_num(7.0), before[others].nan_to_num(7.0)), name
