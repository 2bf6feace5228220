"""Which backend is there and why another is not, asked without initialising CUDA: a driver that is not there is
stood in for by a library of its name."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from peft_kernels import backends

CXX = os.environ.get("CXX", "g++")
NVML = """
extern "C" int nvmlInit_v2() { return 0; }
extern "C" int nvmlDeviceGetCount_v2(int* count) { *count = sizeof(kGpus) / sizeof(kGpus[0]); return 0; }
extern "C" int nvmlDeviceGetHandleByIndex_v2(int i, void** device) { *device = &kGpus[i]; return 0; }
extern "C" int nvmlDeviceGetCudaComputeCapability(int* device, int* major, int* minor) {
  *major = *device / 10;
  *minor = *device % 10;
  return 0;
}
"""
# torch takes part as far as it must: it sees a device, and whoever asks it for more has initialised CUDA.
IMPORT = """
import torch
def initialised(*_): raise AssertionError("CUDA was initialised")
torch.cuda.device_count = lambda: 1
torch.cuda._lazy_init = torch.cuda.is_available = initialised
torch.cuda.get_device_capability = torch.cuda.get_device_name = initialised
import peft_kernels
from peft_kernels import backends
assert not torch.cuda.is_initialized()
print(backends._capability(), backends.bound("cuda"))
print(backends.all_backends()["triton"].missing)
"""


@pytest.fixture
def imported(tmp_path):
    """What a process prints that imports the package beside GPUs of some compute capabilities."""

    def run(*gpus):
        source, library = tmp_path / "nvml.cpp", tmp_path / "libnvidia-ml.so.1"
        source.write_text(f"static int kGpus[] = {{{', '.join(map(str, gpus))}}};\n{NVML}")
        try:
            subprocess.run([CXX, "-shared", "-fPIC", "-o", library, source], check=True)
        except FileNotFoundError:
            pytest.skip(f"there is no {CXX} here")
        path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
        environment = {k: v for k, v in os.environ.items() if k != "PEFT_KERNELS_BACKEND"} | {"LD_LIBRARY_PATH": path}
        done = subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize(
    "gpus,capability", [((90,), "(9, 0)"), ((86, 86), "(8, 6)"), ((80, 90), "None"), ((), "None")], ids=str
)
def test_import_initialises_no_cuda(imported, gpus, capability):
    assert imported(*gpus)[0] == f"{capability} reference"


def test_a_gpu_that_is_too_old_is_named(imported):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed, which is said first")
    assert imported(75)[1] == "a GPU of compute capability 8.0 or later is needed, found 7.5"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_forked_child_can_use_cuda():
    code = """
import os, torch, peft_kernels
child = os.fork()
if child == 0: os._exit(int(torch.ones(2, device="cuda").sum().item()))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2", done.stderr


def test_a_gpu_without_code_in_the_library_is_a_reason(monkeypatch):
    library = SimpleNamespace(
        peft_kernels_cuda_missing=lambda: b"", peft_kernels_cuda_serves=lambda major, minor: major == 9
    )
    monkeypatch.setattr(backends, "operator_library", lambda: library)
    monkeypatch.setattr(backends, "_library_missing", lambda: "")
    monkeypatch.setattr(backends, "_gpu_missing", lambda: "")
    monkeypatch.setattr(backends, "_capability", lambda: (9, 0))
    assert backends._cuda_missing() == ""
    monkeypatch.setattr(backends, "_capability", lambda: (12, 0))
    said = "_ops.abi3.so has no code for compute capability 12.0; building with PK_CUDA_ARCHS=120 makes it"
    assert backends._cuda_missing() == said


@pytest.mark.skipif(backends.operator_library() is None, reason="the operator library is not built")
def test_the_library_knows_what_it_serves():
    serves = backends.operator_library().peft_kernels_cuda_serves
    if backends.cuda_summary() == "built without CUDA":
        assert not serves(9, 0)
        return
    if importlib.util.find_spec("peft_kernels._C") is None:
        pytest.skip("_C (optional), which says what was built, was not")
    from peft_kernels import _C

    built = [int(arch.rstrip("af")) for arch in _C.build_info()["cuda_archs"]]
    for major, minor in [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)]:
        device = 10 * major + minor
        expected = device >= built[-1] or any(arch // 10 == major and arch <= device for arch in built)
        assert bool(serves(major, minor)) == expected, (major, minor)


def test_a_device_that_nobody_serves_is_refused_in_words():
    with pytest.raises(ValueError, match=r"serves tensors on cuda, cpu, xpu, mps, got 'meta'.*moved to one of those"):
        backends.bound("meta")
