"""Two processes over gloo train a patched model, or a prefix: DDP and FSDP2 give the losses of one process on the whole
batch."""

import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from models import calls_per_forward, in_double, inputs, peft_model
from prefixes import prefixed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import peft_kernels
from peft_kernels import PrefixTuningConfig

STEPS, WORLD = 3, 2


def train(model, batch, reduce=lambda loss: loss):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(reduce(loss.detach().double()).item())
    return losses


def shard_layers(model):
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (module for module in model.modules() if isinstance(module, LlamaDecoderLayer)):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrap_layers(model):
    """The older FSDP, as accelerate uses it for PEFT: it wraps modules and keeps their classes."""
    policy = ModuleWrapPolicy({LlamaDecoderLayer})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu"))


def shard_leaves(model):
    """Every factor its own FSDP unit: the layer then sees DTensors, which only the submodules' own calls gather."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for name, module in list(model.named_modules()):
        if name.endswith(("lora_A.default", "lora_B.default")):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {"ddp": DistributedDataParallel, "fsdp_layers": shard_layers, "fsdp1": wrap_layers, "fsdp_leaves": shard_leaves}


PREFIXES = {
    "baked": PrefixTuningConfig(num_virtual_tokens=3),
    "projected": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=6),
}
PREFIX_WAYS = {
    "ddp": DistributedDataParallel,
    "fsdp_layers": shard_layers,
    "fsdp1": wrap_layers,
    "fsdp_whole": lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,))),
}
SHARD_THE_MLP = ("fsdp_layers", "fsdp1")


def mean(loss):
    dist.all_reduce(loss)
    return loss / WORLD


def part(rank):
    return {name: tensor[rank::WORLD] for name, tensor in inputs(rows=4).items()}


def run(way, patch_first, rank):
    model = peft_model("llama")
    report = peft_kernels.patch(model) if patch_first else None
    wrapped = WAYS[way](model)
    report = report or peft_kernels.patch(model)
    losses = train(wrapped, part(rank), mean)
    reasons = {*report.fallbacks, *(row.reason for row in report.left)}
    return losses, report.fused, calls_per_forward(report), reasons


def train_prefix(way, kind, rank):
    """The losses, or what is said."""
    model = PREFIX_WAYS[way](prefixed("llama", PREFIXES[kind]))
    try:
        return train(model, part(rank), mean)
    except RuntimeError as error:
        return str(error)


def work(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=WORLD)
    try:
        found = {(way, first): run(way, first, rank) for way in WAYS for first in (True, False)}
        found |= {(way, kind): train_prefix(way, kind, rank) for way in PREFIX_WAYS for kind in PREFIXES}
        if rank == 0:
            torch.save(found, f"{path}/found")
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # gloo's threads abort the interpreter's own way out now and then: std::terminate without an exception


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("ranks"))
    multiprocessing.spawn(work, (path,), nprocs=WORLD)
    return torch.load(f"{path}/found")


def assert_those_of_one_process(losses, model):
    exact, plain = train(in_double(model), inputs(rows=4)), train(model, inputs(rows=4))
    rounding = torch.finfo(torch.float32).eps
    assert plain[-1] < plain[0]
    for loss, single, reference in zip(losses, plain, exact, strict=True):
        # the mean of two halves is another order of summation than the whole batch's
        assert abs(loss - reference) <= 2 * abs(single - reference) + STEPS * WORLD * rounding * reference


@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize("way", PREFIX_WAYS)
def test_a_prefix_has_the_losses_of_one_process(way, kind, found):
    if kind == "projected" and way in SHARD_THE_MLP:
        assert "has sharded the MLP of prefix_projection with one layer" in found[way, kind]
    else:
        assert_those_of_one_process(found[way, kind], prefixed("llama", PREFIXES[kind]))


@pytest.mark.parametrize("patch_first", [True, False], ids=["patched_before", "patched_after"])
@pytest.mark.parametrize("way", WAYS)
def test_losses_equal_those_of_one_process(way, patch_first, found):
    losses, fused, calls, reasons = found[way, patch_first]
    assert_those_of_one_process(losses, peft_model("llama"))
    if way == "fsdp_leaves":
        assert fused == 0 and any("lora_A is a FSDPLinear" in reason for reason in reasons)
    else:
        assert fused == STEPS * calls and not reasons
