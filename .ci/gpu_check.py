"""`make gpu-check`: builds, tests, sanitizes and times the project where there is an NVIDIA GPU. Offline, with the
Python that runs this file and its packages; no virtual environment. What runs stands in gpu_stages.py.

    make gpu-check PYTHON=python3                    everything, within 540 seconds for each group of stages
    make gpu-check ARGS="--stage check"              a group: check, ops or models; each takes at most ten minutes
    make gpu-check ARGS="--stage cpp --stage limits" some stages, in the table's order; --list names them

Under $OUT (build/gpu-check without it): log.txt (what every command printed), summary.txt, summary.json and the
benchmarks' CSV files. A stage that fails or runs out of time does not stop the next ones.
Exit code: 0 all passed, 1 a stage did not, 2 no GPU, torch or nvcc to check with.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gpu_stages import STAGES, Stage

ROOT = Path(__file__).resolve().parent.parent
CUDA_BIN = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
BUDGET = 540.0
KEPT = 400_000  # characters that one command leaves in the log: its beginning and its end
ARCHS = {8: "80", 9: "90a", 10: "100", 12: "120"}  # the machine code that serves a compute capability's major number


class NothingToCheckError(Exception):
    """This machine lacks what every stage needs; the message says what."""


@dataclass
class Outcome:
    """What became of a stage."""

    stage: str
    result: str  # passed, FAILED, TIMED OUT, NOT RUN
    seconds: float
    detail: str


@dataclass
class Run:
    """One command: its steps, and what came of it."""

    steps: list[list[str]]
    code: int | None = None  # None: not finished when the time was up
    output: str = ""
    seconds: float = 0.0

    @property
    def title(self) -> str:
        return " && ".join(shlex.join(step) for step in self.steps)

    @property
    def last_line(self) -> str:
        return next((line.strip() for line in reversed(self.output.splitlines()) if line.strip()), "(no output)")

    def start(self, deadline: float, environment: dict[str, str]) -> None:
        """Runs the steps until one fails or the time is up; then the processes that it started end with it."""
        began = time.monotonic()
        with tempfile.TemporaryFile() as log:
            for step in self.steps:
                self.code = self._step(step, log, deadline, environment)
                if self.code != 0:
                    break
            log.seek(0)
            text = log.read().decode(errors="replace")
        gap = f"\n... {len(text) - KEPT} characters left out ...\n"
        self.output = text if len(text) <= KEPT else text[: KEPT // 2] + gap + text[-KEPT // 2 :]
        self.seconds = time.monotonic() - began

    def _step(self, step: list[str], log, deadline: float, environment: dict[str, str]) -> int | None:
        if time.monotonic() >= deadline:
            return None
        try:
            process = subprocess.Popen(
                step,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            log.write(f"cannot run {step[0]}: {error.strerror}; is it on PATH or in {CUDA_BIN}?\n".encode())
            return 127
        try:
            return process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def find_tool(name: str) -> str:
    """The program's path; the bare name where it is not there, so that running it says so."""
    return shutil.which(name) or shutil.which(name, path=str(CUDA_BIN)) or name


def ask(*command: str) -> str:
    """What a command prints; nothing where it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def find_machine() -> dict[str, str]:
    """Device, driver and versions. Raises NothingToCheckError where there is no GPU, torch or nvcc."""
    code = """
import importlib.metadata, json, platform, torch
def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return "not installed"
facts = dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda or "none")
facts |= {name: version(name) for name in ("triton", "transformers", "peft", "numpy")}
if torch.cuda.is_available():
    facts |= dict(device=torch.cuda.get_device_name(), capability="%d.%d" % torch.cuda.get_device_capability())
print(json.dumps(facts))
"""
    answer = ask(sys.executable, "-c", code)
    if not answer:
        raise NothingToCheckError(f"{sys.executable} cannot import torch: make gpu-check PYTHON=... names another")
    facts = json.loads(answer.splitlines()[-1])
    if int(facts.get("capability", "0").split(".")[0]) not in ARCHS:
        seen = f"{facts['device']} of {facts['capability']}" if "device" in facts else "no CUDA device"
        raise NothingToCheckError(
            f"it needs an NVIDIA GPU of compute capability 8, 9, 10 or 12, and torch {facts['torch']} sees {seen}.\n"
            "make test and make test-kernels check everything that can be checked without one."
        )
    nvcc = find_tool("nvcc")
    if not Path(nvcc).exists():
        raise NothingToCheckError(f"there is no nvcc on PATH or in {CUDA_BIN}: it needs the CUDA toolkit")
    driver = ask(find_tool("nvidia-smi"), "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    release = ask(nvcc, "--version").partition("release ")[2].partition(",")[0]
    return facts | {"driver": driver[0] if driver else "unknown", "nvcc": release or "unknown"}


def commit() -> str:
    """Revision of the tree, "-dirty" where tracked files differ; outside git PK_REVISION."""
    revision = ask("git", "rev-parse", "HEAD")
    if not revision:
        return os.environ.get("PK_REVISION") or "unknown"
    return revision + ("-dirty" if ask("git", "status", "--porcelain", "--untracked-files=no") else "")


def _cuda_tests() -> list[Path]:
    """The tests that need a GPU; what nvcc makes of the code is looked at without one."""
    return [path for path in ROOT.glob("python_tests/test_cuda*.py") if path.name != "test_cuda_code.py"]


def words_for(facts: dict[str, str], out: Path) -> dict[str, str]:
    """What stands for the words in braces, as a shell would want it: some are two words, and paths may have spaces."""
    return {
        "python": shlex.quote(sys.executable),
        "out": shlex.quote(str(out)),
        "native": "build/gpu-check-native",
        "arch": ARCHS[int(facts["capability"].split(".")[0])],
        "cores": str(os.cpu_count()),
        "cmake": shlex.quote(find_tool("cmake")),
        "generator": "-G Ninja" if shutil.which("ninja") else "",
        "sanitizer": shlex.quote(find_tool("compute-sanitizer")),
        "cuda_tests": shlex.join(sorted(str(p.relative_to(ROOT)) for p in _cuda_tests())),
        "xdist": f"-n {min(8, os.cpu_count() or 1)}" if importlib.util.find_spec("xdist") else "",
    }


def environment_for(facts: dict[str, str], words: dict[str, str]) -> dict[str, str]:
    """The checkout is the package; both builds take this GPU's machine code."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PK_CUDA": "1", "PK_CUDA_ARCHS": words["arch"]}
    environment |= {"PK_REVISION": facts["commit"], "CUDACXX": find_tool("nvcc")}
    # torch asks for it where algorithms are to be deterministic, as the tests do to poison memory
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if words["xdist"]:  # else every worker would start a thread per core
        environment.setdefault("OMP_NUM_THREADS", "2")
    return environment


def commands_of(stage: Stage, words: dict[str, str]) -> list[Run]:
    """The stage's commands with all words filled in; none where {each} stands for no file. Programs of kernels that are
    for sm_90a alone are left out on another GPU."""
    files = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(stage.each.format(**words))) if stage.each else []
    files = [file for file in files if words["arch"] == "90a" or "_sm90_" not in file]
    runs = []
    for command in stage.commands:
        for each in files if "{each}" in command else [""]:
            filled = [step.format(**words, each=shlex.quote(each)) for step in command.split(" && ")]
            runs.append(Run([shlex.split(step) for step in filled]))
    return runs


def run_stage(stage: Stage, words: dict[str, str], environment: dict[str, str], seconds: float, log: Path) -> Outcome:
    """Runs the stage's commands, writes what they printed to the log, and judges."""
    if seconds <= 0:
        return Outcome(stage.name, "NOT RUN", 0.0, "no time was left")
    began, runs = time.monotonic(), commands_of(stage, words)
    if not runs:
        pattern = stage.each.format(**words)
        return Outcome(stage.name, "FAILED", 0.0, f"nothing to run: no {pattern}; --stage build makes them")
    with ThreadPoolExecutor(stage.workers) as pool:
        list(pool.map(lambda run: run.start(began + seconds, environment | stage.environment), runs))
    with log.open("a") as file:
        for run in runs:
            code = "not finished" if run.code is None else f"exit code {run.code}"
            file.write(f"\n== {stage.name}: {run.title}\n{run.output.rstrip()}\n-- {code}, {run.seconds:.1f} s\n")
    bad = [run for run in runs if run.code != 0]
    late = any(run.code is None for run in runs)
    shown = bad[0] if bad else runs[-1]
    counted = f"{len(runs) - len(bad)} of {len(runs)} passed; " if len(runs) > 1 else ""
    culprit = " ".join(Path(word).name for word in shown.steps[-1]) + ": " if bad and len(runs) > 1 else ""
    result = "TIMED OUT" if late else "FAILED" if bad else "passed"
    return Outcome(stage.name, result, time.monotonic() - began, counted + culprit + shown.last_line[:200])


def table(facts: dict[str, str], outcomes: list[Outcome]) -> str:
    """The summary as text: the machine, then a line per stage."""
    width = max(len(outcome.stage) for outcome in outcomes)
    lines = [f"{name:13s} {value}" for name, value in facts.items()] + [""]
    lines += [f"{o.stage:{width}s}  {o.result:9s} {o.seconds:6.1f} s  {o.detail}" for o in outcomes]
    passed = sum(outcome.result == "passed" for outcome in outcomes)
    return "\n".join([*lines, "", f"{passed} of {len(outcomes)} stages passed"])


def write_summary(out: Path, facts: dict[str, str], outcomes: list[Outcome]) -> None:
    stages = [dataclasses.asdict(outcome) | {"seconds": round(outcome.seconds, 1)} for outcome in outcomes]
    (out / "summary.json").write_text(json.dumps(facts | {"stages": stages}, indent=1) + "\n")
    (out / "summary.txt").write_text(table(facts, outcomes) + "\n")


def parse(arguments: list[str], stages: tuple[Stage, ...]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__.split("\n\n")[0])
    names = dict.fromkeys([*(stage.group for stage in stages), *(stage.name for stage in stages)])
    parser.add_argument(
        "--stage", action="append", choices=[*names], help="only this stage or group of stages; may be given again"
    )
    parser.add_argument("--list", action="store_true", help="name the stages, run nothing")
    parser.add_argument("--budget", type=float, help=f"seconds for all stages together ({BUDGET:g} for each group)")
    parser.add_argument("--prebuilt", action="store_true", help="keep peft_kernels/_ops.abi3.so where it is there")
    return parser.parse_args(arguments)


def seconds_for(stage: Stage, later: list[Stage], left: float) -> float:
    """How long a stage may take: what is left, less what the later ones need at least; in proportion, if too little."""
    if left <= 0:
        return 0
    kept = sum(other.least for other in later)
    if left < stage.least + kept:
        kept *= left / (stage.least + kept)
    return min(stage.limit, left - kept)


def groups_asked_for(asked: list[str] | None, chosen: list[Stage]) -> int:
    """How many calls' time there is: stages that are named one by one have none of their own beside a group."""
    groups = {stage.group for stage in chosen}
    return max(1, len(groups.intersection(asked) if asked else groups))


def without_library(stage: Stage) -> Stage:
    return dataclasses.replace(stage, commands=tuple(c for c in stage.commands if "setup.py" not in c))


def main(
    arguments: list[str],
    stages: tuple[Stage, ...] = STAGES,
    machine: Callable[[], dict[str, str]] = find_machine,
) -> int:
    asked, began = parse(arguments, stages), time.monotonic()
    if asked.list:
        for stage in stages:
            print(f"{stage.group:6s}  {stage.name:23s} {stage.limit:4.0f} s at most  {stage.what}")
        return 0
    try:
        facts = machine()
    except NothingToCheckError as lack:
        print(f"gpu-check: {lack}")
        return 2
    facts |= {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    out = Path(os.environ.get("OUT") or ROOT / "build/gpu-check").resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.txt").write_text("")
    words = words_for(facts, out)
    chosen = [s for s in stages if not asked.stage or s.name in asked.stage or s.group in asked.stage]
    for stage in [s for s in chosen if s.capability not in ("", facts["capability"])]:
        print(f"{stage.name}: left out, it is for compute capability {stage.capability}")
        chosen.remove(stage)
    budget = asked.budget or BUDGET * groups_asked_for(asked.stage, chosen)
    if asked.prebuilt and (ROOT / "peft_kernels/_ops.abi3.so").exists():
        chosen = [without_library(stage) for stage in chosen]
    outcomes: list[Outcome] = []
    for i, stage in enumerate(chosen):
        seconds = seconds_for(stage, chosen[i + 1 :], budget - (time.monotonic() - began))
        print(f"{stage.name}: {stage.what} (at most {max(seconds, 0):.0f} s)", flush=True)
        outcomes.append(run_stage(stage, words, environment_for(facts, words), seconds, out / "log.txt"))
        print(f"  {outcomes[-1].result}, {outcomes[-1].seconds:.1f} s: {outcomes[-1].detail}", flush=True)
        write_summary(out, facts, outcomes)  # after each stage: a run that is cut short keeps what it knows
    print("\n" + table(facts, outcomes), flush=True)
    return int(any(outcome.result != "passed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
