"""Builds `peft_kernels/_ops.abi3.so` (operators and kernels, any Python from 3.11) and `_C` (pybind11, this Python).

Every object is one compiler call; they run in parallel, and one that is newer than what it was made from is kept:

    csrc/<family>/*_cpu.cpp    once per line of csrc/instruction_sets.txt: one wheel serves every x86-64 processor
    csrc/<family>/*.cu         by nvcc, without torch's headers: a CPU-only torch is enough to build the CUDA part;
                               *_sm90.cu for sm_90a alone
    csrc/bindings/*.cpp        against torch's stable ABI (2.11 and later), *_cuda.cpp only where nvcc is; nothing else
                               includes torch
    other csrc/*/*.cpp         once: launch plans, the choice of the instruction set

PK_CUDA=auto|0|1 and PK_CUDA_ARCHS="80;90a;100;120" choose the CUDA part, PK_REVISION is recorded, CXX is the compiler.
Nothing here looks for a GPU, the network or git.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).parent)  # all paths below are relative: a checkout whose path has spaces does no harm
OBJECTS = Path("build/objects")
MODULE = Path("csrc/plan/pybind_module.cpp")
CXX = os.environ.get("CXX", "g++")
# -ffp-contract=fast: ISO mode (-std=c++17) would not fuse a product and a sum into one FMA
CXXFLAGS = ["-O2", "-std=c++17", "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-Wall", "-Icsrc"]
NVCCFLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc"]
# wgmma and its like are in no other architecture, so whatever PK_CUDA_ARCHS says; the binding asks before it launches.
# Toolkits from 12.0 on know sm_90a, so that is the least one.
SM90 = ["-gencode=arch=compute_90a,code=sm_90a"]
PATHS = sysconfig.get_paths()


def find_torch() -> Path:
    """The folder of the installed torch, without importing it; in pip's isolated build, of the target environment."""
    spec = importlib.util.find_spec("torch")
    for torch in [Path(spec.origin).parent] if spec else [Path(PATHS[key], "torch") for key in ("purelib", "platlib")]:
        if (torch / "include/torch/csrc/stable/library.h").exists():
            return torch
    sys.exit("peft_kernels: install torch >= 2.11 before building, its headers are needed: pip install 'torch>=2.11'")


def find_nvcc() -> str | None:
    wanted, home = os.environ.get("PK_CUDA", "auto"), os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if wanted == "1" and not nvcc:
        sys.exit("peft_kernels: PK_CUDA=1, but there is no nvcc on PATH or in CUDA_HOME")
    if wanted == "0" or not nvcc:
        print(f"CUDA part skipped: {'PK_CUDA=0' if wanted == '0' else 'no nvcc on PATH or in CUDA_HOME'}", flush=True)
        return None
    return nvcc


def ask(nvcc: str, *question: str) -> str:
    answer = subprocess.run([nvcc, *question], capture_output=True, text=True, check=True)
    return answer.stdout + answer.stderr


def cuda_archs(nvcc: str) -> list[str]:
    known = ask(nvcc, "--list-gpu-code").split()  # 12.0 lacks the newest: build what it has
    wanted = os.environ.get("PK_CUDA_ARCHS", "80;90a;100;120").split(";")
    return sorted((arch for arch in wanted if f"sm_{family_free(arch)}" in known), key=lambda a: int(family_free(a)))


def family_free(arch: str) -> str:
    """The architecture without its suffix: code for 90a runs on nothing later, nor can its PTX be compiled for it."""
    return arch.rstrip("af")


def gencode(archs: list[str]) -> list[str]:
    """nvcc's options: machine code for each, and PTX of the latest one for later devices."""
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return code + [f"-gencode=arch=compute_{a},code=compute_{a}" for a in map(family_free, archs[-1:])]


def toolkit_flags(nvcc: str, name: str) -> list[str]:
    """What nvcc itself passes on as LIBRARIES or INCLUDES: where its toolkit lies."""
    lines = ask(nvcc, "--dryrun", "-x", "cu", os.devnull).splitlines()  # says it, runs nothing
    return shlex.split(next(line for line in lines if line.startswith(f"#$ {name}=")).split("=", 1)[1])


def operator_libraries(torch: Path, nvcc: str | None) -> list[str]:
    """What `_ops` is linked with. libtorch brings libtorch_cuda, and the current stream with it, where there is one."""
    flags = ["-Wl,--version-script=csrc/bindings/exports.map", "-Wl,-z,defs"]
    flags += [f"-L{torch}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
    if nvcc:  # the static runtime: the library then loads where there is no CUDA at all
        flags += [*toolkit_flags(nvcc, "LIBRARIES"), "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    return flags


def instruction_sets() -> dict[str, list[str]]:
    lines = Path("csrc/instruction_sets.txt").read_text().splitlines()
    sets = {line.split()[0]: line.split()[1:] for line in lines if not line.startswith("#")}
    return sets if platform.machine() in ("x86_64", "AMD64") else {"default": sets["default"]}


def module_headers() -> list[str]:
    import pybind11

    return [pybind11.get_include(), PATHS["include"]]


def module_lacks() -> list[str]:
    """What is missing to build `_C`, which is optional: a minimal Python has no headers."""
    lacks = [] if importlib.util.find_spec("pybind11") else ["pybind11"]
    return lacks if Path(PATHS["include"], "Python.h").exists() else [*lacks, "Python.h (python3-dev)"]


@dataclass(frozen=True)
class Unit:
    """One object and the compiler call that makes it, which also lists the headers it read (-MMD)."""

    source: Path
    compiler: list[str]
    variant: str = ""

    @property
    def object(self) -> Path:
        return OBJECTS / self.source.with_suffix(f"{self.variant}{self.source.suffix}.o")

    def build(self) -> None:
        record, depfile = self.object.with_suffix(".command"), self.object.with_suffix(".d")
        command = [*self.compiler, "-MMD", "-MF", str(depfile), "-c", str(self.source), "-o", str(self.object)]
        if self.object.exists() and record.exists() and record.read_text().rpartition("\n")[0] == shlex.join(command):
            read = [Path(name) for name in depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()]
            if all(path.exists() and path.stat().st_mtime < record.stat().st_mtime for path in read):
                return
        self.object.parent.mkdir(parents=True, exist_ok=True)
        record.unlink(missing_ok=True)
        start = time.time()
        compiler = subprocess.Popen(command)
        _, status, usage = os.wait4(compiler.pid, 0)
        compiler.returncode = os.waitstatus_to_exitcode(status)
        if compiler.returncode != 0:
            remedy = "; PK_CUDA=0 builds without the CUDA part" if self.source.suffix == ".cu" else ""
            sys.exit(f"peft_kernels: compiling {self.source} failed{remedy}: {shlex.join(command)}")
        # a test adds up the processor time of nvcc, which a busy machine changes little
        record.write_text(f"{shlex.join(command)}\n{usage.ru_utime + usage.ru_stime:.1f}")
        os.utime(record, (start, start))  # a file edited while it was compiled is newer than this
        print(f"  {time.time() - start:5.1f} s  {self.object.relative_to(OBJECTS)}", flush=True)


class Build(build_ext):
    """Compiles all units side by side, then links them."""

    def build_extensions(self):
        torch, nvcc = find_torch(), find_nvcc()
        units = self.units(torch, nvcc)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(Unit.build, units))
        for extension in self.extensions:
            path = Path(self.get_ext_fullpath(extension.name))
            path.parent.mkdir(parents=True, exist_ok=True)
            if extension.name == "peft_kernels._C":
                linked, libraries = [unit for unit in units if unit.source.parent.name == "plan"], []
            else:
                linked, libraries = [unit for unit in units if unit.source != MODULE], operator_libraries(torch, nvcc)
            objects = [str(unit.object) for unit in linked]
            subprocess.run([CXX, "-shared", "-s", "-o", str(path), *objects, *libraries], check=True)

    def units(self, torch: Path, nvcc: str | None) -> list[Unit]:
        sets, archs = instruction_sets(), cuda_archs(nvcc) if nvcc else []
        code = gencode(archs)
        stable = ["-std=c++20", "-isystem", f"{torch}/include", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        if nvcc:
            headers = (flag.replace("-I", "-isystem", 1) for flag in toolkit_flags(nvcc, "INCLUDES"))
            stable += ["-DPK_WITH_CUDA", *headers]
        facts = {"VERSION": self.distribution.get_version(), "REVISION": os.environ.get("PK_REVISION", "")}
        facts |= {"CUDA": ask(nvcc, "--version").split("release ")[1].split(",")[0] if nvcc else ""}
        facts |= {"CUDA_ARCHS": ";".join(archs), "INSTRUCTION_SETS": ";".join(sets)}

        def variants(source: Path) -> dict[str, list[str]]:
            """The compiler calls for one source: one, none, or one per instruction set."""
            if source.name.endswith("_cpu.cpp"):
                return {f".{name}": [CXX, *CXXFLAGS, *flags, f"-DPK_ISA=pk_{name}"] for name, flags in sets.items()}
            if source.name.endswith("_cuda.cpp") and not nvcc:
                return {}
            if source.suffix == ".cu":
                own = SM90 if source.name.endswith("_sm90.cu") else code
                return {"": [nvcc, f"-ccbin={CXX}", *NVCCFLAGS, *own]} if nvcc else {}
            if source == MODULE:
                return {"": [CXX, *CXXFLAGS, *(f"-isystem{p}" for p in module_headers())]} if not module_lacks() else {}
            if source.name == "build_info.cpp":  # it alone, so that a new revision recompiles nothing else
                return {"": [CXX, *CXXFLAGS, *(f'-DPK_{name}="{value}"' for name, value in facts.items())]}
            return {"": [CXX, *CXXFLAGS, *(stable if source.parent.name == "bindings" else [])]}

        sources = [s for s in Path("csrc").glob("*/*.c*") if s.parent.name not in ("emulator", "tests")]
        sources.sort(key=lambda s: (not s.name.endswith("_cpu.cpp"), s))  # the slowest first
        return [Unit(s, compiler, variant) for s in sources for variant, compiler in variants(s).items()]


extensions = [Extension("peft_kernels._ops", [], py_limited_api=True)]
if module_lacks():
    print(
        f"peft_kernels._C, which shows plans and build info, skipped: no {' and no '.join(module_lacks())}", flush=True
    )
else:
    extensions += [Extension("peft_kernels._C", [])]
setup(ext_modules=extensions, cmdclass={"build_ext": Build}, options={"bdist_wheel": {"py_limited_api": "cp311"}})
