"""The kernels for sm_90 on a Hopper GPU: that they run at all, by name; large sizes; launches back to back, behind one
another and behind what is no kernel.

A launch that is overlapped may begin before what it reads is there, where its wait is wrong: here what it reads comes
late, from other kernels, from other streams and from nodes of a graph.
"""

import ctypes
from collections import Counter

import pytest
import sm90_problems
import torch
from cuda_calls import assert_replays, same
from sm90_problems import BOTTLENECKS, LINEAR, POOLED

from peft_kernels import backends, registry, testing
from peft_kernels.ops.batched_lora import pooled_samples
from peft_kernels.ops.bottleneck_adapter import samples as bottleneck_samples
from peft_kernels.ops.lora_linear import samples as linear_samples

BACKEND, DEVICE = "cuda", "cuda"
F16, BF16 = torch.float16, torch.bfloat16
NAMES = ("lora_linear", "batched_lora_", "bottleneck_adapter")
OPS = {name: registry.ops()[name] for name in NAMES}
OF_OP = {"lora_linear": "concat_gemm_sm90", "batched_lora_": "pool_cluster_sm90", "bottleneck_adapter": "few_rows_sm90"}
PROBLEMS = [
    (name, problem) for name, problems in zip(NAMES, (LINEAR, POOLED, BOTTLENECKS), strict=True) for problem in problems
]


def _missing():
    cuda = backends.all_backends()["cuda"]
    if not cuda.available:
        return cuda.missing
    capability = torch.cuda.get_device_capability()
    return "" if capability == (9, 0) else "the GPU's compute capability is {}.{}".format(*capability)


MISSING = _missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"cuda, kernels for compute capability 9.0: {MISSING}")
each_problem = pytest.mark.parametrize("name,problem", PROBLEMS, ids=["-".join(pair) for pair in PROBLEMS])
each_dtype = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_SM90", "1")


def made(name, problem, dtype=BF16):
    if name == "lora_linear":
        return linear_samples.problem(DEVICE, dtype, dtype, **LINEAR[problem])
    if name == "batched_lora_":
        return pooled_samples.problem(DEVICE, dtype, dtype, **POOLED[problem])
    return bottleneck_samples.problem(DEVICE, dtype, dtype, **BOTTLENECKS[problem])


def evaluated(name, arguments, dy=None):
    dy = testing.gradients_for(OPS[name], arguments) if dy is None else dy
    return OPS[name].evaluate(*testing.operators(BACKEND, OPS[name]), arguments, dy)


def kernels_of_sm90(run):
    """How often each kernel for sm_90 of OF_OP is launched, and what `run` returns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        result = run()
        torch.cuda.synchronize()
    of_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert any("_kernel" in event for event in of_device), "the profiler saw no kernel at all"
    return Counter(kernel for kernel in OF_OP.values() for event in of_device if f"{kernel}_kernel" in event), result


@each_dtype
@each_problem
def test_the_kernel_runs_and_matches_the_oracle(name, problem, dtype, monkeypatch):
    arguments = made(name, problem, dtype)
    with testing.poisoned_memory():
        testing.assert_matches_oracle(OPS[name], arguments, *testing.operators(BACKEND, OPS[name]))
    launches, one = kernels_of_sm90(lambda: evaluated(name, arguments))
    ranks = LINEAR[problem]["ranks"] if name == "lora_linear" else ()
    backward = bool(ranks)  # of the others the forward alone
    assert launches == {OF_OP[name]: (len(sm90_problems.with_adapters(ranks)) if ranks else 1) + backward}
    monkeypatch.delenv("PEFT_KERNELS_SM90")
    launches, other = kernels_of_sm90(lambda: evaluated(name, arguments))
    assert not launches
    if name == "lora_linear":
        sm90_problems.assert_all_gemms_differ(one, other, ranks)
    if name == "batched_lora_":
        assert same(one, other)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_many_tiles_a_block_match_the_oracle(p):
    sizes = dict(rows=(8192,), K=4096, N=(4096,), ranks=((16,),), biased=True)
    arguments = linear_samples.problem(DEVICE, BF16, BF16, p=p, **sizes)
    launches, _ = kernels_of_sm90(lambda: evaluated("lora_linear", arguments))
    assert launches == {OF_OP["lora_linear"]: 2}
    testing.assert_matches_oracle(OPS["lora_linear"], arguments, *testing.operators(BACKEND, OPS["lora_linear"]))


# -- launches back to back --------------------------------------------------------------------------------------------


def layers(count, width, rows):
    """Of each: lora_linear, then batched_lora_ and bottleneck_adapter on its first rows; no two have equal factors, so
    that what an earlier layer left in scratch is wrong."""
    linear = linear_samples.problem(DEVICE, BF16, BF16, rows=(rows,), K=width, N=(width,), ranks=((16,),), p=0.1)
    pooled = pooled_samples.problem(DEVICE, BF16, BF16, rows=16, K=width, N=(width,), ranks=((8,), (16,)))
    bottleneck = bottleneck_samples.problem(DEVICE, BF16, BF16, rows=(16,), K=width, N=None, E=24)
    found = []
    for i in range(count):
        turned = {name: [t.roll(i, -1) for t in linear[name]] for name in ("weight", "lora_A", "lora_B")}
        pages = {"pages_in": pooled["pages_in"].roll(i, -1)}
        factors = {name: bottleneck[name].roll(i, -1) for name in ("down_weight", "up_weight")}
        found.append((linear | turned, pooled | pages, bottleneck | factors))
    return found


def through(stack, x, dy, after):
    """y and dx behind the last layer, and `after()` each call; a layer's y is the next one's x, its dx the next one's
    dy."""
    pool, adapter = (testing.operators(BACKEND, OPS[name])[0] for name in NAMES[1:])
    for linear, pooled, bottleneck in stack:
        results = evaluated("lora_linear", linear | {"x": x}, [dy])
        after()
        y, dy = results["y[0]"], results["grad x[0]"]
        few = y[:16]
        pool(*(pooled | {"y": [few], "x": x[:16]}).values())
        after()
        out, _ = adapter(*(bottleneck | {"x": few}).values())
        after()
        few.copy_(out)
        after()
        x = y * 0.5  # or it would grow from layer to layer
    return {"y": x, "dx": dy}


@pytest.mark.parametrize("width,rows", [(1024, 136), (4096, 2048)])
def test_layers_back_to_back_are_those_that_wait_for_one_another(width, rows):
    stack = layers(6, width, rows)
    generator = torch.Generator().manual_seed(width)
    for _ in range(5):  # of other rows each: what memory still holds is wrong
        x, dy = (torch.randn(rows, width, generator=generator).to(DEVICE, BF16) for _ in range(2))
        wanted = through(stack, x, dy, torch.cuda.synchronize)
        assert all(t.isfinite().all() for t in wanted.values())
        through(stack, dy, x, lambda: None)  # and memory holds what is of these
        torch.cuda.synchronize()
        assert same(through(stack, x, dy, lambda: None), wanted)


def test_every_kernel_runs_in_each_of_those_layers():
    stack = layers(2, 1024, 136)
    x = torch.ones(136, 1024, dtype=BF16, device=DEVICE)
    launches, _ = kernels_of_sm90(lambda: through(stack, x, x, lambda: None))
    assert launches == {"concat_gemm_sm90": 4, "pool_cluster_sm90": 2, "few_rows_sm90": 2}


# -- behind what is no kernel of ours, in a graph ---------------------------------------------------------------------


def late():
    torch.cuda._sleep(200_000)  # about 100 us: a launch that did not wait would be over


def fill(tensor, source):
    tensor.copy_(source)
    late()
    tensor[0].zero_()


def memset(tensor, source):
    """As fill does, by a node that is no kernel."""
    tensor.copy_(source)
    late()
    row, stream = tensor[0], torch.cuda.current_stream().cuda_stream
    driver, size = ctypes.CDLL("libcuda.so.1"), ctypes.c_size_t(row.numel() * row.element_size())
    assert not driver.cuMemsetD8Async(ctypes.c_uint64(row.data_ptr()), ctypes.c_ubyte(0), size, ctypes.c_void_p(stream))


def copy(tensor, source):
    tensor.zero_()
    late()
    tensor.copy_(source)


def join(tensor, source):
    """Two streams write it, and the one behind which the launch comes is the earlier."""
    tensor.zero_()
    here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        late()
        tensor[0].copy_(source[0])
        written = beside.record_event()
    tensor[1:].copy_(source[1:])
    here.wait_event(written)


@pytest.mark.parametrize("before", [fill, memset, copy, join], ids=lambda write: write.__name__)
@pytest.mark.parametrize(
    "name,problem,target",
    [
        ("lora_linear", "dropout", "x"),
        ("batched_lora_", "group", "x"),
        ("batched_lora_", "group", "y"),
        ("bottleneck_adapter", "serial", "x"),
    ],
)
def test_graph_replays_what_is_written_directly_before(name, problem, target, before):
    held = made(name, problem)
    forward = testing.operators(BACKEND, OPS[name])[0]
    written = held["y"][0] if target == "y" else held["x"]
    source, start = written.clone(), [y.clone() for y in held.get("y", [])]

    def run():
        for y, first in zip(held.get("y", []), start, strict=True):
            y.copy_(first)
        before(written, source)
        results = forward(*held.values())
        outs = held["y"] if start else testing.first_output(results)
        return {f"y[{g}]": y.clone() for g, y in enumerate(outs)}

    eager = run()
    torch.cuda.synchronize()
    wanted = [y.clone() for y in start] or testing.first_output(forward(*held.values()))
    if start:  # by hand, when all has been written
        by_hand = source.clone()
        if before in (fill, memset):
            by_hand[0] = 0
        wanted = [by_hand if y is written else first.clone() for y, first in zip(held["y"], start, strict=True)]
        forward(*(held | {"y": wanted}).values())
    assert same(eager, {f"y[{g}]": y for g, y in enumerate(wanted)})
    assert_replays(run, lambda: source.neg_())
