"""vLLM's LoRA kernels for serving (tried with 0.33.0), without the framework: memset, shrink and expand."""

import logging
from types import SimpleNamespace

import torch

from benchmarks.peers.isolated import import_together
from benchmarks.peers.serving import Add, Batch, require_device

NAMES = ("vllm",)
_MODULES = tuple(
    f"vllm.lora.ops.triton_ops.{name}" for name in ("lora_kernel_metadata", "lora_shrink_op", "lora_expand_op", "utils")
)


class _Logger(logging.LoggerAdapter):
    def warning_once(self, *_args, **_options):
        pass

    info_once = warning_once


def _unregistered(*_args, **_options):
    raise AttributeError("the modules then call their functions directly")


def _stand_ins(device: torch.device) -> dict[str, dict]:
    """Its environment, log and platform; none of it is on the way of a kernel."""
    import triton
    import triton.language

    on_gpu = device.type == "cuda"
    capability = 10 * torch.cuda.get_device_capability(device)[0] if on_gpu else 0
    platform = SimpleNamespace(
        is_cuda=lambda: on_gpu,
        has_device_capability=lambda least: on_gpu and capability >= least,
        is_device_capability=lambda one: on_gpu and capability == one,
    )
    options = ("VLLM_BATCH_INVARIANT", "VLLM_LORA_DISABLE_PDL", "VLLM_LORA_ENABLE_DUAL_STREAM")
    return {
        "vllm.envs": dict.fromkeys(options, False) | {"VLLM_TUNED_CONFIG_FOLDER": None},
        "vllm.logger": {"init_logger": lambda name: _Logger(logging.getLogger(name), {})},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"triton": triton, "tl": triton.language},
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2},
        "vllm.utils.torch_utils": {
            "async_tensor_h2d": lambda data, dtype, device, **_: torch.tensor(data, dtype=dtype, device=device),
            "direct_register_custom_op": _unregistered,
        },
    }


def load(device: torch.device) -> dict:
    """By name, f(batch) -> add; raises ImportError saying what is missing."""
    require_device(device)
    metadata, shrink, expand, shared = import_together(_MODULES, _stand_ins(device), ("triton",), stay=True)

    def make(batch: Batch) -> Add:
        # They remember pointers by the addresses of factors, which a later batch may have too.
        for name in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
            vars(shared).get(name, {}).clear()
        rows, (L, _, R) = len(batch.slots), batch.lora_B.shape
        pieces = list(zip(batch.offsets, batch.offsets[1:], strict=False))
        a_each, b_each = [], []
        for s, (first, last) in enumerate(pieces):
            a = batch.lora_A.new_zeros(L, R, batch.lora_A.shape[2])
            for slot, r in enumerate(batch.ranks.tolist()):
                a[slot, :r] = batch.lora_A[slot, s * r : (s + 1) * r]
            a_each.append(a)
            scaled = batch.lora_B[:, first:last] * batch.scalings[:, None, None].to(batch.lora_B.dtype)
            b_each.append(scaled.contiguous())
        meta = metadata.LoRAKernelMeta.make(L, rows, batch.slots.device)
        meta.prepare_tensors(batch.slots)
        h = torch.empty(len(pieces), rows, R, dtype=torch.float32, device=batch.slots.device)

        def add(x, base):
            y, given = base(), meta.meta_args(rows, False)
            shrink.lora_shrink(x, a_each, h, *given, 1.0)
            expand.lora_expand(h, b_each, y, *given, offset_start=0, add_inputs=True)
            return y

        return add

    return {NAMES[0]: make}
