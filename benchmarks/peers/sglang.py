"""SGLang's LoRA kernels for serving (tried with 0.5.23), without the framework.

triton_v2   a plan for the device and the shape; the shrink may run beside the base layer, on a stream of its own
csgmv       its default: rows sorted by adapter, in chunks
"""

import dataclasses
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.peers.isolated import import_together
from benchmarks.peers.serving import Add, Batch, require_device

NAMES = ("sglang_v2", "sglang_csgmv")
_MODULES = (
    "sglang.srt.lora.dense.runner",
    "sglang.srt.lora.dense.plan",
    "sglang.srt.lora.workspace",
    "sglang.kernels.ops.lora.common.routing",
    "sglang.kernels.ops.lora.dense.chunked_sgmv_shrink",
    "sglang.kernels.ops.lora.dense.chunked_sgmv_expand",
)
_LARGEST_OF_ONE_KERNEL = 513  # rows from which the route is Triton's three kernels: the other way compiles C++
_CHUNK = 16


class Phase(str, Enum):  # noqa: UP042  (SGLang's own is one too)
    PREFILL = "prefill"
    DECODE = "decode"


@dataclasses.dataclass
class LoRABatchInfo:
    bs: int
    use_cuda_graph: bool
    num_segments: Any
    seg_indptr: Any
    weight_indices: Any
    lora_ranks: Any
    scalings: Any
    max_len: Any
    seg_lens: Any
    permutation: Any
    req_seg_indptr: Any = None
    req_weight_indices: Any = None


class Struct:
    """In place of msgspec's: a record of what is annotated."""

    def __init_subclass__(cls, frozen: bool = False, kw_only: bool = False, **options):
        dataclasses.dataclass(cls, frozen=frozen, kw_only=kw_only, eq=False)


def _not_carried(*_args, **_options):
    raise NotImplementedError("SGLang's C++ for large routes")


def _stand_ins(device: torch.device) -> dict[str, dict]:
    """Its environment, device names and batches; none of it is on the way of a kernel."""

    def architecture(major):
        return {9: "sm90"}.get(major, "sm100" if major >= 10 else "default")

    def overlapped_launches():
        return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9

    options = ("SGLANG_ENABLE_LORA_CSGMV_SPLIT_K", "SGLANG_ENABLE_DETERMINISTIC_INFERENCE")
    envs = {name: SimpleNamespace(get=lambda: False) for name in options}
    envs["SGLANG_LORA_DENSE_CONFIG_DIR"] = SimpleNamespace(get=lambda: None)
    name_of = torch.cuda.get_device_name if device.type == "cuda" else lambda: "cpu"
    return {
        "sglang.srt.environ": {"envs": SimpleNamespace(**envs)},
        "sglang.srt.utils": {"get_device_name": name_of, "cached_triton_kernel": lambda key_fn=None: lambda fn: fn},
        "sglang.srt.lora.utils": {
            "Phase": Phase,
            "LoRABatchInfo": LoRABatchInfo,
            "architecture_for_capability": architecture,
        },
        "sglang.kernels.jit.utils": {"is_arch_support_pdl": overlapped_launches},
        "sglang.kernels.ops.lora.moe.virtual_experts": {"_align_block_size_jit": _not_carried},
        "msgspec": {"Struct": Struct},
    }


def load(device: torch.device) -> dict:
    """By name, f(batch) -> add; raises ImportError saying what is missing."""
    require_device(device)
    found = import_together(_MODULES, _stand_ins(device), ("triton", "pydantic"), stay=True)
    runner, plan, workspace, routing, shrink, expand = found
    routing._LARGE_ROUTE_MIN_PAIRS = _LARGEST_OF_ONE_KERNEL

    def planned(batch: Batch) -> Add:
        L, _, K = batch.lora_A.shape
        architecture = None if device.type == "cuda" else "sm90"
        run = runner.DenseLoraRunner(workspace.LoraWorkspace(), max_loras=L, device=device, architecture=architecture)
        rows = len(batch.slots)
        phase = Phase.DECODE if rows <= 256 else Phase.PREFILL
        given = {"token_slots": batch.slots, "lora_ranks": batch.ranks, "scalings": batch.scalings}
        run.begin_batch(**given, num_tokens=rows, phase=phase, graph_mode=False)
        R, width = batch.lora_B.shape[-1], batch.offsets[-1]
        chosen = run.plan_for(plan.DenseLoraKind.LINEAR, R, K, width, num_tokens=rows)

        def add(x, base):
            return run.apply(x, base, chosen, a=batch.lora_A, b=batch.lora_B, offsets=batch.offsets)

        return add

    def chunked(batch: Batch) -> Add:
        return _chunked(batch, shrink.chunked_sgmv_lora_shrink_forward, expand.chunked_sgmv_lora_expand_forward)

    return dict(zip(NAMES, (planned, chunked), strict=True))


def _chunked(batch: Batch, shrink, expand) -> Add:
    """Rows without an adapter have one of rank 0, as SGLang gives them."""
    L, S = len(batch.lora_A), len(batch.offsets) - 1
    slots = torch.where(batch.slots < 0, L, batch.slots).long()
    order = slots.argsort(stable=True)
    starts, owners = [0], []
    for slot, count in zip(*(t.tolist() for t in slots.unique(return_counts=True)), strict=True):
        for first in range(0, count, _CHUNK):
            owners.append(slot)
            starts.append(starts[-1] + min(_CHUNK, count - first))
    none = batch.lora_A.new_zeros(1, *batch.lora_A.shape[1:]), batch.lora_B.new_zeros(1, *batch.lora_B.shape[1:])
    a_all, b_all = torch.cat([batch.lora_A, none[0]]), torch.cat([batch.lora_B, none[1]])

    def numbers(values):
        return torch.as_tensor(values, dtype=torch.int32, device=a_all.device)

    info = LoRABatchInfo(
        bs=len(slots),
        use_cuda_graph=False,
        num_segments=len(owners),
        seg_indptr=numbers(starts),
        weight_indices=numbers(owners),
        lora_ranks=torch.cat([batch.ranks, batch.ranks.new_zeros(1)]),
        scalings=torch.cat([batch.scalings, batch.scalings.new_ones(1)]),
        max_len=_CHUNK,
        seg_lens=None,
        permutation=numbers(order),
    )
    offsets, known = numbers(batch.offsets), torch.tensor(batch.offsets)
    widest = max(b - a for a, b in zip(batch.offsets, batch.offsets[1:], strict=False))

    def add(x, base):
        return expand(shrink(x, a_all, info, S), b_all, info, offsets, widest, base(), slice_offsets_cpu=known)

    return add
