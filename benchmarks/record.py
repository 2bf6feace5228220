"""A benchmark's result as a CSV row, and where it came from: device, versions, commit, date."""

import csv
import dataclasses
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

import peft_kernels
from benchmarks import gate
from peft_kernels import backends

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Origin:
    """Where a row comes from: the last columns of every CSV."""

    device: str
    driver: str  # of a GPU
    threads: int
    instruction_set: str  # that our CPU kernels use
    sm90: str  # what PEFT_KERNELS_SM90 said: "1" lets the kernels of compute capability 9.0 run that are off by default
    torch: str
    triton: str
    cuda: str  # that torch was built for
    transformers: str
    peft: str
    peft_kernels: str
    commit: str
    date: str


@dataclass(frozen=True)
class Row(Origin):
    """One arm of one cell in one direction. Empty text: does not apply (a frozen arm has no adapter)."""

    op: str
    arm: str
    backend: str
    dtype: str
    adapter_dtype: str
    M: int
    K: int
    N: int
    r: str
    p: str
    direction: str  # "forward" (the forward part of a training step) or "forward+backward"
    timing: str  # "eager", or "graph": replayed from a CUDA graph
    copies: int  # layers that a step went through; all numbers are those of one
    rounds: int
    ms_p20: float
    ms_p50: float
    ms_p80: float
    ratio_p20: float  # to the frozen linear of the same round
    ratio_p50: float
    ratio_p80: float
    aa_spread: float  # how far from 1 the middle 60% of the rounds put the ratio of the two frozen arms
    gbs: float  # of the least traffic that the op needs (registry's cost)
    tflops: float
    peak_share: float  # least time at the measured copy and GEMM rates of this process / time taken
    saved_bytes: int  # kept by autograd between forward and backward, parameters not counted
    not_timed: str  # why this arm has no time (its numbers are NaN); empty where it has


def columns(kind: type[Origin]) -> dict[str, type]:
    """Names and types of a CSV's columns, in their order: a row's own, then its origin."""
    types = {field.name: field.type if field.type in (int, float) else str for field in dataclasses.fields(kind)}
    last = {field.name for field in dataclasses.fields(Origin)}
    return dict(sorted(types.items(), key=lambda column: column[0] in last))


def no_numbers(kind: type[Origin]) -> dict[str, float]:
    """The measurements of a row that has none: NaN."""
    return {name: math.nan for name, type_ in columns(kind).items() if type_ is float}


FIELDS = tuple(columns(Row))
# Columns that came later, and what they say of a CSV without them: those were all of CPUs.
_LATER = {
    "timing": "eager", "not_timed": "", "driver": "", "triton": "", "cuda": "", "instruction_set": "", "sm90": "",
    "copies": "1", "added_us": "nan",
}  # fmt: skip


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    """The processor's model; /proc names it on Linux, `platform` elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def commit() -> str:
    """Revision of the tree that is measured, "-dirty" where tracked files differ from it; outside git PK_REVISION."""

    def git(*words: str) -> str:
        return subprocess.run(("git", "-C", ROOT, *words), capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PK_REVISION") or "unknown"


def _driver() -> str:
    """Version of the NVIDIA driver."""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def provenance(device: torch.device) -> dict[str, str | int]:
    """The columns that are the same for every row of a run."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "driver": _driver() if on_gpu else "",
        "threads": torch.get_num_threads(),
        "instruction_set": "" if on_gpu or backends.operator_library() is None else backends.instruction_set(),
        "sm90": os.environ.get("PEFT_KERNELS_SM90", ""),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda or "",
        "transformers": _version("transformers"),
        "peft": _version("peft"),
        "peft_kernels": peft_kernels.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class Writer:
    """Appends rows to a new CSV as cells finish, so an interrupted run keeps what it measured."""

    def __init__(self, path: Path, kind: type = Row):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fields = tuple(columns(kind))
        self._file = path.open("w", newline="")
        self._csv = csv.writer(self._file, lineterminator="\n")
        self._csv.writerow(self._fields)

    def write(self, rows: list) -> None:
        self._csv.writerows([_text(getattr(row, name)) for name in self._fields] for row in rows)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def failure(cell, error: Exception) -> str:
    """One line for a cell that has no rows."""
    return f"{cell.title}: failed: {type(error).__name__}: {' '.join(str(error).split())[:400]}"


def one_by_one(
    cells: Iterable,
    time_cell: Callable[[object], list],
    described: Callable[[object, list, float], str],
    kind: type[Origin],
    say: Callable[[str], None],
    out: Path | None,
) -> int:
    """Times cells, each of them said, and written where that is asked for, when it is finished; how many failed.

    A cell that fails is said and has no rows; the others are not lost with it. A wrong result ends the run.
    """
    writer, failed = Writer(out, kind) if out else None, 0
    for cell in cells:
        start = time.perf_counter()
        try:
            rows = time_cell(cell)
        except gate.RedGateError:
            raise
        except Exception as error:
            failed += 1
            say(failure(cell, error))
            continue
        say(described(cell, rows, time.perf_counter() - start))
        if writer:
            writer.write(rows)
    if writer:
        writer.close()
        say(f"written: {out}")
    return failed


def _text(value) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read(path: Path, kind: type = Row) -> list:
    """The rows of a CSV. Raises ValueError where its columns are neither this version's nor an earlier one's."""
    fields = columns(kind)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        found = set(reader.fieldnames or ())
        if found - fields.keys() or fields.keys() - found - _LATER.keys():
            raise ValueError(f"{path.name}: columns must be {', '.join(fields)}, got {reader.fieldnames}")
        lines = [{name: line.get(name, _LATER.get(name)) for name in fields} for line in reader]
    return [kind(**{name: fields[name](text) for name, text in line.items()}) for line in lines]
