"""What is shipped: the operator library keeps to torch's stable ABI and to itself, and the wheel holds what it must."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from peft_kernels import backends

ROOT = Path(__file__).parent.parent
CALLED = ("bind", "cuda_devices", "cuda_missing", "cuda_serves", "isa", "poison", "set_isa")
EXPORTS = {f"peft_kernels_{name}" for name in CALLED}
# Weak, since only a CUDA build of torch has them: the current stream and the library GEMM.
OF_CUDA = {"aoti_torch_get_current_cuda_stream", "aoti_torch_cuda_mm_out", "aoti_torch_cuda_addmm_out"}

built = pytest.mark.skipif(
    not backends.LIBRARY.exists() or not shutil.which("nm"), reason="the operator library or nm (binutils) is missing"
)


def symbols(file, *options):
    """(name, kind) of each symbol, as nm prints them: U undefined, w and v weak undefined, T a function, W weak, ..."""
    listing = subprocess.run(["nm", "-P", *options, file], capture_output=True, text=True, check=True).stdout
    return [tuple(line.split()[:2]) for line in listing.splitlines() if line and not line.endswith(":")]


@built
def test_library_exports_its_functions_and_nothing_else():
    assert {name for name, _ in symbols(backends.LIBRARY, "-D", "--defined-only")} == EXPORTS


@built
def test_library_needs_only_the_stable_abi_and_the_c_runtime():
    undefined = symbols(backends.LIBRARY, "-D", "--undefined-only")
    assert (backends.cuda_summary() == "built without CUDA") != ({name for name, _ in undefined} >= OF_CUDA)
    for name, kind in undefined:
        from_runtime = "@" in name  # versioned: glibc, libstdc++ or libgcc
        assert from_runtime or kind in "wv" or name.startswith(("aoti_torch_", "torch_")), name
        assert kind != "U" or not re.match(r"cu[A-Z]|cuda[A-Z]|Py", name), f"{name}: needs CUDA or Python to load"
        assert "_cuda_" not in name or kind == "w", f"{name} must be weak: a CPU build of torch lacks it"


@built
@pytest.mark.skipif(not shutil.which("readelf"), reason="readelf (binutils) is missing")
def test_library_links_no_cuda_and_no_python():
    listing = subprocess.run(["readelf", "-d", backends.LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", listing))
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    system = re.compile(r"libtorch(_cpu)?\.so|lib(stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so\.\d+|ld-linux-.*")
    assert all(system.fullmatch(name) for name in needed), needed


@built
def test_code_for_one_instruction_set_stays_in_its_namespace():
    """The linker keeps one copy of an inline function: were it from an AVX-512 object, every processor would run it."""
    objects = list((ROOT / "build/objects").rglob("*_cpu.*.o"))
    if not objects:
        pytest.skip("no objects here: the library was not built in this tree")
    for path in objects:
        namespace = f"pk_{path.name.split('.')[1]}"
        for name, _ in symbols(path, "--extern-only", "--defined-only"):
            assert f"{len(namespace)}{namespace}" in name, f"{path.name}: {name} lies outside {namespace}"


def test_import_needs_torch_alone():
    """Hugging Face's libraries and the command's are imported by those who use them."""
    blocked = ["transformers", "peft", "accelerate", "typer", "rich", "matplotlib", "triton", "peft_kernels._C"]
    code = f"""
import sys
for name in {blocked}: sys.modules[name] = None
import torch, peft_kernels
x, w, a, b = torch.ones(2, 8), torch.ones(4, 8), torch.ones(1, 8), torch.ones(4, 1)
assert (peft_kernels.lora_linear(x, w, None, a, b, scaling=0.5) == 12).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", [b"", b"\x7fELF, cut short"])
def test_a_library_that_does_not_load_is_a_reason_and_the_reference_serves(tmp_path, content):
    shutil.copytree(ROOT / "peft_kernels", tmp_path / "peft_kernels", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "peft_kernels" / backends.LIBRARY.name).write_bytes(content)
    code = """
import torch
from peft_kernels import backends, lora_linear
x, w, a, b = torch.ones(2, 8), torch.ones(4, 8), torch.ones(1, 8), torch.ones(4, 1)
assert (lora_linear(x, w, None, a, b, scaling=0.5) == 12).all() and backends.bound("cpu") == "reference"
print(backends.all_backends()["cpu"].missing)
print(backends.cuda_summary())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert line.startswith("_ops.abi3.so does not load with torch") and "must be built again: /" in line


def test_ptx_is_of_no_family_of_architectures():
    """PTX of compute_90a could be compiled for nothing later; the latest architecture gives it, wherever named."""
    code = """
import runpy, setuptools
setuptools.setup = lambda **_: None
made = runpy.run_path("setup.py")
made["cuda_archs"].__globals__["ask"] = lambda *_: "sm_80 sm_90 sm_100"
archs = made["cuda_archs"]("nvcc")
print("", *archs, *made["gencode"](archs), sep=chr(10))
"""
    said = {}
    for wanted in ("90a;80;120", "100f;90a"):
        environment = os.environ | {"PK_CUDA_ARCHS": wanted}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said[wanted] = done.stdout.splitlines()
    option = "-gencode=arch=compute_{0},code={1}_{0}".format
    machine = [option("80", "sm"), option("90a", "sm"), option("90", "compute")]
    assert said["90a;80;120"][-5:] == ["80", "90a", *machine]
    assert said["100f;90a"][-3:] == [option("90a", "sm"), option("100f", "sm"), option("100", "compute")]


@built
def test_device_query_answers_without_a_driver():
    summary = backends.cuda_summary()
    assert re.search(r"runtime \d+\.\d+|built with CUDA \d+\.\d+|built without CUDA", summary), summary


inspectable = pytest.mark.skipif(
    not importlib.util.find_spec("peft_kernels._C"), reason="_C (optional) was not built for this Python"
)


@inspectable
def test_build_info_says_what_was_built():
    from peft_kernels import _C, __version__

    info = _C.build_info()
    assert info["version"] == __version__
    assert backends.instruction_set() in info["instruction_sets"]
    assert bool(info["cuda"]) == bool(info["cuda_archs"]) == (backends.cuda_summary() != "built without CUDA")


@inspectable
def test_plan_shows_the_launch():
    from peft_kernels._C import lora_linear_plan

    row, rows = (lora_linear_plan(M=M, N=300, K=1000, R=8, dtype_size=2) for M in (1, 100))
    assert row["path"] == "fused" and [name for name, _ in row["forward"]] == ["shrink", "expand"]
    assert [name for name, _ in row["backward"]] == ["dy_pass", "sum_ds", "stream_dx", "x_pass"]
    assert rows["path"] == "gemm" and [name for name, _ in rows["forward"]] == ["shrink", "expand", "gemm"]
    assert dict(rows["forward"])["expand"] == -(-300 // rows["block"])
    assert dict(rows["backward"])["x_pass"] == -(-1000 // rows["block"])
    with pytest.raises(ValueError, match="dtype_size must be 2, 4 or 8, got 3"):
        lora_linear_plan(M=1, N=1, K=1, R=1, dtype_size=3)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, from the objects that are there; building those is the business of `make build`."""
    if not (ROOT / "build/objects").exists():
        pytest.skip("no objects here: the library was not built in this tree")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "build", "-b", folder / "build", "bdist_wheel", "-d", folder]
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_serves_every_python_from_the_oldest(wheel):
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f"-cp{oldest.removeprefix('>=').replace('.', '')}-abi3-linux_" in wheel.name


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "peft_kernels").rglob("*.py")}
    assert package <= names
    assert "peft_kernels/_ops.abi3.so" in names
    rest = {name for name in names - package if not name.endswith("_ops.abi3.so") and ".dist-info/" not in name}
    assert all(re.fullmatch(r"peft_kernels/(_C\..*\.so|.*\.(md|txt|typed))", name) for name in rest), rest


def test_wheel_declares_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("/METADATA"))
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert "torch>=2.11" in required and 'transformers>=5.17; extra == "hf"' in required
    assert 'peft>=0.21; extra == "hf"' in required and "License-Expression: Apache-2.0" in metadata
    commands = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("/entry_points.txt"))
    assert "peft-kernels = peft_kernels.cli:app" in commands


def test_build_fetches_no_second_torch():
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not any(requirement.startswith("torch") for requirement in requires)
