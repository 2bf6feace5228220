"""The CUDA backend without a GPU: the shipped sources and the shipped binding on the emulator, over every sample.

`make test` builds the emulator's operator libraries first (CMake, csrc/emulator/operator_library.cpp). Plain runs
several orders of threads; asan ends at an access out of bounds, race at accesses that CUDA does not order. `make test`
runs a sample in one pair of dtypes, another in each build, and what hangs on the schedule on plain; the rest is slow.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KINDS = ("", "add_", "adapter_", "prefix_", "decode_sm90_", "linear_sm90_")
SAMPLES = tuple(f"emulated_{which}samples.py" for which in KINDS)
CXX = os.environ.get("CXX", "g++")


def _preloaded(build):
    """What the process of a build needs: AddressSanitizer's runtime has to be there before Python."""
    if build != "asan":
        return {}
    names = ("libasan.so", "libstdc++.so")
    found = [subprocess.check_output([CXX, f"-print-file-name={name}"], text=True).strip() for name in names]
    return {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0"}


@pytest.mark.parametrize("build", ["plain", "asan", "race"])
@pytest.mark.parametrize(
    "which", ["not slow", pytest.param("slow", marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_every_sample_emulated(build, which, count_sample):
    library = HERE.parent / f"build/cmake/pk_ops_emulated_{build}.so"
    backend = f"emulated-{build}", "cpu"
    if not library.exists():
        reason = f"{library.name} is not built; `make emulated` builds it where nvcc, g++ and an x86-64 processor are"
        count_sample(backend, 0, reason)
        pytest.skip(reason)
    named = {"PK_EMULATED": build, "PK_EMULATED_LIBRARY": str(library), "PYTHONPATH": str(HERE.parent)}
    options = ["-q", "-s", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-m", which, *SAMPLES],
        cwd=HERE,
        env=os.environ | named | _preloaded(build),
        capture_output=True,
        text=True,
    )
    print(run.stdout[-8000:], run.stderr[-8000:])
    assert run.returncode == 0, run.stderr.strip().splitlines()[-1:] or run.stdout.strip().splitlines()[-1:]
    assert "emulator:" not in run.stderr + run.stdout, "the emulator reported something"
    count_sample(backend, int(re.search(rf"emulated-{build} on cpu: (\d+) samples run", run.stdout)[1]))
