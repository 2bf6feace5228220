"""The backends: what implements the ops, whether it is there and if not why, and which one serves a device.

Each backend registers its kernels under its own namespace, `peft_kernels_<backend>::<op>`, so that tests and
benchmarks can name any of them in one process. `peft_kernels::<op>`, the one that users call, is bound to one
backend per device, once, at import. `PEFT_KERNELS_BACKEND=<name>` overrides the choice; it is read here only.
"""

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# `import peft_kernels.backends` must find torch's libraries loaded before it opens ours.
import torch

LIBRARY = Path(__file__).parent / "_ops.abi3.so"

# Which backend serves a CUDA tensor, best first: by compute capability, from measurements on such a GPU. One that is
# not listed has not been measured, and keeps to the definition.
MEASURED: dict[tuple[int, int], tuple[str, ...]] = {}
UNMEASURED = ("reference", "cuda", "triton")


@dataclass(frozen=True)
class Backend:
    name: str
    devices: tuple[str, ...]  # device types it serves
    missing: str  # why it cannot be used here; empty where it can

    @property
    def available(self) -> bool:
        return not self.missing


@cache
def _load_library() -> ctypes.CDLL | str:
    """The C++ operators, or why they are not there."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not built; `make build` builds it"
    try:
        return ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY.name} does not load with torch {torch.__version__} and must be built again: {error}"


def operator_library() -> ctypes.CDLL | None:
    """The C++ operators, or None where they were not built or do not load."""
    library = _load_library()
    return None if isinstance(library, str) else library


def _library_missing() -> str:
    library = _load_library()
    return library if isinstance(library, str) else ""


def _gpu_missing() -> str:
    """Why kernels for NVIDIA GPUs cannot run here; empty where they can."""
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    if torch.version.hip or torch.cuda.get_device_capability() < (8, 0):
        return f"an NVIDIA GPU of sm_80 or later is needed, found {torch.cuda.get_device_name()}"
    return ""


def _cuda_missing() -> str:
    """Why the CUDA kernels cannot run here; empty where they can."""
    if reason := _library_missing():
        return reason
    function = operator_library().peft_kernels_cuda_missing
    function.restype = ctypes.c_char_p
    missing = function().decode()
    return f"{LIBRARY.name}: {missing}" if missing else _gpu_missing()


def _triton_missing() -> str:
    """Why the Triton kernels cannot run here; empty where they can. Triton itself is imported last: it is slow."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install peft-kernels[triton]` installs it"
    if missing := _gpu_missing():
        return missing
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return ""


@cache
def all_backends() -> dict[str, Backend]:
    """Every backend by name."""
    rows = (
        Backend("cuda", ("cuda",), _cuda_missing()),
        Backend("cpu", ("cpu",), _library_missing()),
        Backend("reference", ("cpu", "cuda", "xpu", "mps"), ""),
        Backend("triton", ("cuda",), _triton_missing()),
    )
    return {row.name: row for row in rows}


def _preference(device_type: str) -> tuple[str, ...]:
    """The backends for a device type, best first."""
    if device_type != "cuda":
        return ("cpu", "reference")
    if not torch.cuda.is_available():
        return UNMEASURED
    return MEASURED.get(torch.cuda.get_device_capability(), UNMEASURED)


@cache
def bound(device_type: str) -> str:
    """The backend that `peft_kernels::<op>` runs for tensors of a device type."""
    wanted = os.environ.get("PEFT_KERNELS_BACKEND", "")
    known = all_backends()
    if wanted and wanted not in known:
        raise ValueError(f"PEFT_KERNELS_BACKEND must be one of {', '.join(known)}, got '{wanted}'")
    if wanted and not known[wanted].available:
        raise RuntimeError(f"PEFT_KERNELS_BACKEND={wanted} cannot be used here: {known[wanted].missing}")
    if wanted and device_type in known[wanted].devices:
        return wanted
    usable = (known[name] for name in _preference(device_type))
    return next(b.name for b in usable if b.available and device_type in b.devices)


def linked(op_name: str, device_type: str) -> list[str]:
    """Names of the backends that can run an op on a device type: `torch.ops.peft_kernels_<name>.<op>`."""
    usable = [b.name for b in all_backends().values() if b.available and device_type in b.devices]
    return [name for name in usable if hasattr(getattr(torch.ops, f"peft_kernels_{name}"), op_name)]


def bind_native(namespace: str, device_type: str) -> None:
    """Registers the C++ kernels of a device under a namespace whose schemas Python has defined."""
    operator_library().peft_kernels_bind(namespace.encode(), device_type.upper().encode())


def instruction_set() -> str:
    """The instruction set that the CPU kernels use: default, avx2, avx512 or avx512_bf16."""
    function = operator_library().peft_kernels_isa
    function.restype = ctypes.c_char_p
    return function().decode()


def set_instruction_set(name: str) -> None:
    """Makes the CPU kernels use another instruction set; for tests.

    Raises ValueError if this processor or this build lacks it.
    """
    if operator_library().peft_kernels_set_isa(name.encode()) != 0:
        raise ValueError(f"instruction set '{name}' is not available here")


def cuda_summary() -> str:
    """What the CUDA runtime inside the operator library sees: its devices, or why there are none."""
    if operator_library() is None:
        return _load_library()
    function = operator_library().peft_kernels_cuda_devices
    function.restype = ctypes.c_char_p
    return function().decode()


def describe() -> list[dict]:
    """One row per backend and device type: name, device, available, reason, bound."""
    rows = []
    for backend in all_backends().values():
        for device in backend.devices:
            here = device == "cpu" or getattr(torch, device).is_available()
            reason = backend.missing or ("" if here else f"this torch sees no {device} device")
            usable = not reason
            rows.append(
                {
                    "name": backend.name,
                    "device": device,
                    "available": usable,
                    "reason": reason,
                    "bound": usable and bound(device) == backend.name,
                }
            )
    return rows
def poison_memory(*, on: bool) -> float:
    """Makes the C++ operators fill what they allocate with NaN, or stop doing so; for tests.

    Returns a number that they have allocated afterwards and not written: NaN shows that it works.
    """
    function = operator_library().peft_kernels_poison
    function.restype = ctypes.c_float
    return function(int(on))


