"""Reads what nvcc made of the CUDA kernels, from the library that is shipped: no GPU and no rebuild needed.

`read(library)` runs cuobjdump (from PATH, CUDA_HOME or the Triton wheel) over an .so or .o file and gives one Kernel
per template instance and architecture (kernels of `*_sm90.cu` are there for sm_90a alone): registers, stack and static
shared memory of `-res-usage` (sm_90 and later count the 1024 bytes that the system takes), and the SASS instructions of
`-sass`, counted by opcode. Spills show as LDL
and STL: loads and stores of local memory.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_ARCH = re.compile(r"arch = (sm_\w+)|code for (sm_\w+)")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_FUNCTION = re.compile(r"\s*Function\s*:?\s*(\S+?):?\s*$")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(?:\S*(\.MULTICAST))?")


@dataclass
class Kernel:
    """One template instance, as machine code of one architecture."""

    symbol: str
    arch: str
    registers: int
    stack: int  # bytes a thread keeps in local memory: spills, and arrays that are indexed at run time
    shared: int  # bytes, static; what is asked for at the launch is not known here
    local: int
    instructions: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        return name_of(self.symbol)


def name_of(symbol: str) -> str:
    """The kernel's name: the last of the nested names in its mangled symbol, each of which follows its length."""
    name, rest = symbol, symbol.removeprefix("_Z").removeprefix("N")
    while found := re.match(r"L?(\d+)", rest):
        end = found.end() + int(found[1])
        name, rest = rest[found.end() : end], rest[end:]
    return name


def cuobjdump() -> Path | None:
    """Where the program is, if anywhere."""
    spec = importlib.util.find_spec("triton")
    wheels = [Path(spec.origin).parent / "backends/nvidia/bin"] if spec and spec.origin else []
    folders = [*os.environ.get("PATH", "").split(os.pathsep), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    found = shutil.which("cuobjdump", path=os.pathsep.join(map(str, [*folders, *wheels])))
    return Path(found) if found else None


def dump(file: Path, option: str) -> str:
    """What cuobjdump prints; raises CalledProcessError where it fails."""
    return subprocess.run([cuobjdump(), option, file], capture_output=True, text=True, check=True).stdout


def resources(lines: Iterable[str]) -> Iterator[Kernel]:
    """The kernels of `cuobjdump -res-usage`."""
    arch = symbol = ""
    for line in lines:
        if found := _ARCH.search(line):
            arch = found[1]
        elif found := _FUNCTION.match(line):
            symbol = found[1]
        elif (found := _RESOURCES.search(line)) and symbol:
            yield Kernel(symbol, arch, *map(int, found.groups()))


def instructions(lines: Iterable[str]) -> dict[tuple[str, str], Counter[str]]:
    """How often each opcode occurs, by symbol and architecture, in what `cuobjdump -sass` prints; and each with
    .MULTICAST, besides."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    arch, current = "", Counter()
    for line in lines:
        if found := _INSTRUCTION.match(line):
            current[found[1]] += 1
            if found[2]:
                current[found[1] + found[2]] += 1
        elif found := _ARCH.search(line):
            arch = found[1] or found[2]
        elif found := _FUNCTION.match(line):
            current = counts.setdefault((found[1], arch), Counter())
    return counts


def read(file: Path) -> list[Kernel]:
    kernels = list(resources(dump(file, "-res-usage").splitlines()))
    counts = instructions(dump(file, "-sass").splitlines())
    for kernel in kernels:
        kernel.instructions = counts[kernel.symbol, kernel.arch]
    return kernels


def images(file: Path) -> tuple[set[str], set[str]]:
    """The architectures that the file has machine code for, and those that it has PTX for."""
    return tuple(set(re.findall(r"\.(sm_\w+)\.", dump(file, option))) for option in ("--list-elf", "--list-ptx"))


def table(kernels: list[Kernel], budget) -> str:
    """The report: a line per kernel and architecture, the most that one of its instances takes."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in sorted(kernels, key=lambda k: (k.name, int(re.findall(r"\d+", k.arch)[0]))):
        groups.setdefault((kernel.name, kernel.arch), []).append(kernel)
    columns = ("registers", "budget", "shared", "stack", "LDL", "STL", "HMMA", "LDSM", "LDGSTS", "HGMMA", "UTMALDG")
    lines = [f"{'kernel':44s} {'arch':7s} {'instances':>9s} " + " ".join(f"{name:>9s}" for name in columns)]
    for (name, arch), group in groups.items():
        most = [max(getattr(k, fact) for k in group) for fact in ("registers", "shared", "stack")]
        counted = [max(k.instructions[opcode] for k in group) for opcode in columns[4:]]
        row = [most[0], budget(name), *most[1:], *counted]
        lines.append(f"{name:44s} {arch:7s} {len(group):9d} " + " ".join(f"{value:9d}" for value in row))
    return "\n".join(lines)
