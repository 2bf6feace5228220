"""The backends: what implements the ops, whether it is there and if not why, and which one serves a device.

Each backend registers its kernels under its own namespace, `peft_kernels_<backend>::<op>`, so that tests and
benchmarks can name any of them in one process. `peft_kernels::<op>`, the one that users call, is bound to one
backend per device, once, at import. `PEFT_KERNELS_BACKEND=<name>` overrides the choice; it is read here only.
Nothing here initialises CUDA before somebody asks for a description: after that, forked workers could not use it.
"""

import ctypes
import importlib.util
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# `import peft_kernels.backends` must find torch's libraries loaded before it opens ours.
import torch

LIBRARY = Path(__file__).parent / "_ops.abi3.so"

# Which backend serves a CUDA tensor, best first: by compute capability, from measurements on such a GPU. One that is
# not listed has not been measured, and keeps to the definition.
MEASURED: dict[tuple[int, int] | None, tuple[str, ...]] = {}
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


@cache
def _capability() -> tuple[int, int] | None:
    """Compute capability of this machine's NVIDIA GPUs; None where they differ or the driver cannot be asked.

    It is the driver's management library that is asked (as torch.cuda.device_count() does): torch.cuda's own question
    would initialise CUDA.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    count, major, minor = (ctypes.c_int() for _ in range(3))
    if nvml.nvmlInit_v2() != 0 or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return None
    found = set()
    for index in range(count.value):
        device = ctypes.c_void_p()
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) != 0:
            return None
        if nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) != 0:
            return None
        found.add((major.value, minor.value))
    return found.pop() if len(found) == 1 else None


def _gpu_missing() -> str:
    """Why kernels for NVIDIA GPUs cannot run here; empty where they can, as far as one can know without asking CUDA."""
    if torch.cuda.device_count() == 0:
        return "this torch sees no CUDA device"
    if torch.version.hip:
        return "an NVIDIA GPU is needed, and this torch is built for AMD's"
    if (found := _capability()) and found < (8, 0):
        return f"a GPU of compute capability 8.0 or later is needed, found {found[0]}.{found[1]}"
    return ""


def _cuda_missing() -> str:
    """Why the CUDA kernels cannot run here; empty where they can."""
    if reason := _library_missing():
        return reason
    function = operator_library().peft_kernels_cuda_missing
    function.restype = ctypes.c_char_p
    if missing := function().decode():
        return f"{LIBRARY.name}: {missing}"
    if missing := _gpu_missing():
        return missing
    if (found := _capability()) and not operator_library().peft_kernels_cuda_serves(*found):
        wanted = f"compute capability {found[0]}.{found[1]}"
        return f"{LIBRARY.name} has no code for {wanted}; building with PK_CUDA_ARCHS={found[0]}{found[1]} makes it"
    return ""


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
    return MEASURED.get(_capability(), UNMEASURED)


@cache
def bound(device_type: str) -> str:
    """The backend that `peft_kernels::<op>` runs for tensors of a device type, if it has the op (else `serving`).

    Raises ValueError for a device type that none serves ("meta"), and for a wrong PEFT_KERNELS_BACKEND.
    """
    wanted = os.environ.get("PEFT_KERNELS_BACKEND", "")
    known = all_backends()
    if wanted and wanted not in known:
        raise ValueError(f"PEFT_KERNELS_BACKEND must be one of {', '.join(known)}, got '{wanted}'")
    if wanted and not known[wanted].available:
        raise RuntimeError(f"PEFT_KERNELS_BACKEND={wanted} cannot be used here: {known[wanted].missing}")
    if wanted and device_type in known[wanted].devices:
        return wanted
    usable = (known[name] for name in _preference(device_type))
    found = next((b.name for b in usable if b.available and device_type in b.devices), None)
    if found is None:
        served = ", ".join(dict.fromkeys(device for b in known.values() for device in b.devices))
        raise ValueError(
            f"peft_kernels serves tensors on {served}, got '{device_type}': weights that are not loaded yet, or are "
            "offloaded, have to be moved to one of those devices first"
        )
    return found


def serving(op_backends: tuple[str, ...], device_type: str) -> str:
    """The backend that runs an op that has these: the bound one, or where it lacks the op the next best that does not.

    Of the backends in order of preference, so where nothing has been measured it is the definition.
    """
    names = (bound(device_type), *_preference(device_type))
    known = all_backends()
    usable = (n for n in names if n in op_backends and known[n].available and device_type in known[n].devices)
    return next(usable, "reference")


def without_kernel(device_type: str, op_backends: tuple[str, ...]) -> str:
    """Why nothing but the definition serves an op on a device type, unasked; empty where a kernel does.

    The definition is right everywhere and slow everywhere: a layer is not worth changing for it.
    """
    if os.environ.get("PEFT_KERNELS_BACKEND") == "reference" or serving(op_backends, device_type) != "reference":
        return ""
    kernels = set(op_backends) - {"reference"}
    others = [b for b in all_backends().values() if device_type in b.devices and b.name in kernels]
    if ready := [b.name for b in others if b.available]:
        return f"no kernel has been measured on this GPU yet; PEFT_KERNELS_BACKEND={ready[0]} uses the unmeasured one"
    return others[0].missing if others else f"there are no kernels for {device_type}"


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


def poison_memory(*, on: bool) -> float:
    """Makes the C++ operators fill what they allocate with NaN, or stop doing so; for tests.

    Returns a number that they have allocated afterwards and not written: NaN shows that it works.
    """
    function = operator_library().peft_kernels_poison
    function.restype = ctypes.c_float
    return function(int(on))


def cuda_summary() -> str:
    """What the CUDA runtime inside the operator library sees: its devices, or why there are none. Initialises CUDA."""
    if operator_library() is None:
        return _load_library()
    function = operator_library().peft_kernels_cuda_devices
    function.restype = ctypes.c_char_p
    found = function().decode()
    without_driver = re.search(r"driver none, runtime ([\d.]+)", found)
    return f"no NVIDIA driver here; the kernels were built with CUDA {without_driver[1]}" if without_driver else found


def sm90_asked_for() -> bool:
    """Whether `cuda` may use its kernels for Hopper, which are not measured yet (csrc/bindings/cuda_device.h)."""
    return os.environ.get("PEFT_KERNELS_SM90") == "1"


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
