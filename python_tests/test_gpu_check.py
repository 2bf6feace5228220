"""`make gpu-check` without a GPU: its stages, limits, exit codes and summaries, with stages that are small scripts."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import run, shapes

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci/gpu_check.py"
FACTS = {"device": "a GPU of this test", "capability": "9.0", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0"}


def _load():
    sys.path.insert(0, str(SCRIPT.parent))  # where Python looks first for what a script imports
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gpu_check = _load()
Stage = gpu_check.Stage


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Runs gpu_check on stages given as {name: (limit, [source of a script, ...], {field: value} of the stage)}."""

    def run(scripts, *arguments, machine=lambda: dict(FACTS), **changes):
        stages = []
        for name, (limit, sources, *fields) in scripts.items():
            commands = []
            for i, source in enumerate(sources):
                path = tmp_path / f"{name}_{i}.py"
                path.write_text(source)
                commands.append(f"{{python}} {path}")
            stages.append(Stage(name, limit, f"what {name} does", tuple(commands), **changes, **dict(*fields)))
        monkeypatch.setenv("OUT", str(tmp_path / "out"))
        code = gpu_check.main(list(arguments), tuple(stages), machine)
        return code, capsys.readouterr().out, tmp_path / "out"

    return run


def results(out):
    return {stage["stage"]: stage["result"] for stage in json.loads((out / "summary.json").read_text())["stages"]}


def test_all_passed(check):
    code, printed, out = check({"one": (20, ["print('12 right')"]), "two": (20, ["print('a')", "print('b')"])})
    assert code == 0
    assert results(out) == {"one": "passed", "two": "passed"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["stages"][0]["detail"] == "12 right" and summary["stages"][1]["detail"] == "2 of 2 passed; b"
    assert {**FACTS, "commit": summary["commit"], "date": summary["date"]}.items() <= summary.items()
    assert (out / "summary.txt").read_text().rstrip() in printed.rstrip()
    assert printed.rstrip().endswith("2 of 2 stages passed"), "the table comes last"
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "summary.json", "summary.txt"]


def test_a_failure_does_not_stop_the_next_stages(check):
    stages = {"bad": (20, ["print('all'); print('it broke'); raise SystemExit(3)", "pass"]), "good": (20, ["pass"])}
    code, printed, out = check(stages)
    assert code == 1
    assert results(out) == {"bad": "FAILED", "good": "passed"}
    assert "1 of 2 passed" in printed and "it broke" in printed and "1 of 2 stages passed" in printed
    log = (out / "log.txt").read_text()
    assert "== bad: " in log and "all\nit broke\n-- exit code 3" in log


def test_a_skipped_program_is_no_pass(check):
    assert check({"cpp": (20, ["raise SystemExit(77)"])})[0] == 1


def test_a_stage_out_of_time_ends_with_its_children(check, tmp_path):
    child = "import time; time.sleep(3); open({!r}, 'w')".format(str(tmp_path / "survived"))
    source = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}])\n"
    source += "print('begun', flush=True); time.sleep(60)"
    began = time.monotonic()
    code, _, out = check({"slow": (1.5, [source]), "next": (20, ["pass"])})
    assert code == 1 and time.monotonic() - began < 30
    assert results(out) == {"slow": "TIMED OUT", "next": "passed"}
    assert "begun\n-- not finished" in (out / "log.txt").read_text(), "what it had printed is kept"
    time.sleep(3)
    assert not (tmp_path / "survived").exists()


def test_the_budget_is_shared(check):
    stages = {"first": (20, ["import time; time.sleep(60)"]), "second": (20, ["pass"])}
    code, printed, out = check(stages, "--budget", "1")
    assert code == 1 and "no time was left" in printed
    assert results(out) == {"first": "TIMED OUT", "second": "NOT RUN"}


def test_time_is_kept_for_later_stages(check):
    sleeps = "import time; time.sleep(60)"
    stages = {"slow": (60, [sleeps]), "short": (60, [sleeps], {"least": 1}), "last": (60, ["pass"], {"least": 20})}
    code, printed, out = check(stages, "--budget", "23")
    assert code == 1 and results(out) == {"slow": "TIMED OUT", "short": "TIMED OUT", "last": "passed"}
    seconds = {stage["stage"]: stage["seconds"] for stage in json.loads((out / "summary.json").read_text())["stages"]}
    assert seconds["slow"] < 5 and seconds["short"] < 5 and "last: what last does (at most 2" in printed


def test_too_little_time_is_shared_in_proportion():
    a, b, c = (Stage(name, 100, "", (), least=least) for name, least in (("a", 30), ("b", 10), ("c", 60)))
    assert [gpu_check.seconds_for(a, [b, c], left) for left in (1000, 100, 90, 50, 0)] == [100, 30, 27, 15, 0]
    assert gpu_check.seconds_for(c, [], 7) == 7 and gpu_check.seconds_for(b, [a], -1) == 0


GROUPS = {"check": 6, "ops": 5, "models": 4}
MOST_FILES = 8  # that lent machines give back of one call


@pytest.mark.parametrize("group", GROUPS)
def test_every_stage_of_a_group_gets_what_it_needs_at_least(group):
    stages = [stage for stage in gpu_check.STAGES if stage.group == group]
    assert len(stages) == GROUPS[group]
    assert sum(stage.least for stage in stages) <= gpu_check.BUDGET < 600
    assert all(0 < stage.least <= stage.limit for stage in stages)
    written = {word for stage in stages for step in filled()[stage.name] for word in step if word.endswith(".csv")}
    assert len(written | {"log.txt", "summary.txt", "summary.json"}) <= MOST_FILES


@pytest.mark.parametrize(
    "asked, calls",
    [
        (None, 3),
        (["ops"], 1),
        (["check", "ops"], 2),
        (["build", "ops"], 1),
        (["cpp", "limits"], 1),
        (["ops", "limits"], 1),
    ],
)
def test_a_budget_for_each_group_that_is_asked_for(asked, calls):
    chosen = [s for s in gpu_check.STAGES if not asked or s.name in asked or s.group in asked]
    assert gpu_check.groups_asked_for(asked, chosen) == calls


def test_the_groups_come_in_their_order_and_correctness_first():
    assert list(dict.fromkeys(stage.group for stage in gpu_check.STAGES)) == list(GROUPS)
    names = [stage.name for stage in gpu_check.STAGES]
    assert len(set(names)) == len(names) and not set(names) & GROUPS.keys()


@pytest.mark.parametrize("name", ["python", "python_sm90"])
def test_the_python_stages_run_every_test_that_needs_a_gpu(name):
    (step,) = filled()[name]
    needing = {path.name for path in Path(__file__).parent.glob("test_cuda*.py")} - {"test_cuda_code.py"}
    assert len(needing) > 4 and needing - {word.rpartition("/")[2] for word in step} == set()
    assert not any("test_cuda_code" in word for word in step)


def test_what_is_for_hopper_runs_twice_and_only_there(check):
    twice = {stage.name for stage in gpu_check.STAGES if stage.environment.get("PEFT_KERNELS_SM90") == "1"}
    assert twice == {"python_sm90"}
    assert all((stage.capability == "9.0") == (stage.name in twice) for stage in gpu_check.STAGES)
    stages = {
        "a": (20, ["pass"]),
        "b": (20, ["pass"], {"capability": "9.0"}),
        "c": (20, ["pass"], {"capability": "8.0"}),
    }
    code, printed, out = check(stages)
    assert code == 0 and results(out) == {"a": "passed", "b": "passed"}
    assert "c: left out, it is for compute capability 8.0" in printed


def test_every_op_has_a_benchmark_with_a_csv_of_its_own():
    steps = [step for stage in gpu_check.STAGES for step in filled()[stage.name] if "benchmarks/run.py" in step]
    timed = [step[step.index("--op") + 1] for step in steps]
    assert set(timed) == set(run.OPS) - {"seam"}
    files = [Path(step[step.index("--out") + 1]).name for step in steps]
    assert len(set(files)) == len(files)
    assert files == [f"{op}_cuda.csv" for op in timed]
    for step, op in zip(steps, timed, strict=True):
        arms = step[step.index("--arms") + 1].split(",") if "--arms" in step else []
        known = run.ARMS_OF.get(op, shapes.ARMS)
        assert set(arms) <= set(known), f"{op} has no arm {set(arms) - set(known)}"


def test_a_group_and_its_budget(check):
    stages = {name: (20, ["pass"], {"group": group}) for name, group in (("a", "check"), ("b", "ops"), ("c", "ops"))}
    assert list(results(check(stages, "--stage", "ops")[2])) == ["b", "c"]
    assert list(results(check(stages, "--stage", "ops", "--stage", "a")[2])) == ["a", "b", "c"]


def test_one_stage_alone(check):
    stages = {name: (20, [f"print('{name}')"]) for name in ("a", "b", "c")}
    assert list(results(check(stages, "--stage", "c", "--stage", "a")[2])) == ["a", "c"]
    with pytest.raises(SystemExit):
        check(stages, "--stage", "d")


def test_commands_side_by_side(check):
    waits = ["import time; time.sleep(2)"] * 4
    began = time.monotonic()
    assert check({"wide": (20, waits)}, workers=4)[0] == 0
    assert time.monotonic() - began < 8


def test_a_stage_adds_to_the_environment(check, monkeypatch):
    monkeypatch.delenv("PEFT_KERNELS_BACKEND", raising=False)
    source = "import os; print(os.environ.get('PEFT_KERNELS_BACKEND'), os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    with_it = {"environment": {"PEFT_KERNELS_BACKEND": "cuda"}}
    _, _, out = check({"one": (20, [source]), "two": (20, [source], with_it)})
    stages = json.loads((out / "summary.json").read_text())["stages"]
    assert [stage["detail"] for stage in stages] == ["None :4096:8", "cuda :4096:8"]
    timed = {stage.name: stage.environment for stage in gpu_check.STAGES if stage.group != "check"}
    # PEFT_KERNELS_SM90 is the arms' to set: what the environment says holds for all of them
    assert all(environment == {"PEFT_KERNELS_BACKEND": "cuda"} for environment in timed.values())


def test_paths_may_have_spaces(monkeypatch, tmp_path):
    python, out = tmp_path / "a b" / "python", tmp_path / "out of it"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("OUT", str(out))
    (tmp_path / "touch.py").write_text("import pathlib, sys; pathlib.Path(sys.argv[1]).touch()")
    stage = Stage("s", 20, "", (f"{{python}} {tmp_path}/touch.py {{out}}/made",))
    assert gpu_check.main([], (stage,), lambda: dict(FACTS)) == 0
    assert (out / "made").exists()


def test_a_tool_that_is_missing_is_named(check, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    stage = Stage("sanitizer", 20, "", ("no-such-sanitizer --tool memcheck",))
    assert gpu_check.main([], (stage,), lambda: dict(FACTS)) == 1
    assert "cannot run no-such-sanitizer: No such file" in capsys.readouterr().out


def test_steps_of_a_command_stop_at_the_first_that_fails(check, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.main([], (Stage("s", 20, "", (f"false && touch {tmp_path}/second",)),), lambda: dict(FACTS)) == 1
    assert not (tmp_path / "second").exists()
    assert gpu_check.main([], (Stage("s", 20, "", (f"true && touch {tmp_path}/second",)),), lambda: dict(FACTS)) == 0
    assert (tmp_path / "second").exists()


def test_each_file_once_and_none_is_a_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    stage = Stage("each", 20, "", ("grep -c . {each}", "test -f {each}"), each="python_tests/test_triton*.py")
    assert gpu_check.main([], (stage,), lambda: dict(FACTS)) == 0
    count = len(list((ROOT / "python_tests").glob("test_triton*.py")))
    assert f"{2 * count} of {2 * count} passed" in capsys.readouterr().out
    stage = Stage("each", 20, "", ("test -f {each}",), each="build/no_such_program_*")
    assert gpu_check.main([], (stage,), lambda: dict(FACTS)) == 1
    assert "nothing to run: no build/no_such_program_*" in capsys.readouterr().out


@pytest.mark.parametrize(("capability", "count"), [("9.0", 2), ("8.0", 1)])
def test_programs_for_sm_90_run_on_it_alone(monkeypatch, tmp_path, capsys, capability, count):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    for name in ("test_a_cuda_gpu", "test_a_sm90_cuda_gpu"):
        (tmp_path / name).touch()
    stage = Stage("each", 20, "", ("echo {each}", "true"), each="test_*_gpu")
    assert gpu_check.main([], (stage,), lambda: FACTS | {"capability": capability}) == 0
    assert f"{count + 1} of {count + 1} passed" in capsys.readouterr().out


def test_no_gpu_is_said_kindly_and_runs_nothing(check, tmp_path):
    def machine():
        raise gpu_check.NothingToCheckError("there is none")

    code, printed, _ = check({"one": (20, [f"open({str(tmp_path / 'ran')!r}, 'w')"])}, machine=machine)
    assert code == 2 and printed == "gpu-check: there is none\n" and not (tmp_path / "ran").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_command_itself_says_what_it_lacks():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert f"torch {torch.__version__} sees no CUDA device" in done.stdout and "make test" in done.stdout


def test_list_names_the_stages_and_runs_none():
    done = subprocess.run([sys.executable, SCRIPT, "--list"], capture_output=True, text=True, timeout=60)
    listed = [tuple(line.split()[:2]) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert listed == [(stage.group, stage.name) for stage in gpu_check.STAGES]
    check = [name for group, name in listed if group == "check"]
    assert check == ["build", "primitives", "cpp", "python", "python_sm90", "sanitizer"]


# -- the real table ---------------------------------------------------------------------------------------------------


def filled(capability="9.0", stages=gpu_check.STAGES):
    words = gpu_check.words_for(FACTS | {"capability": capability}, Path("results"))
    return {stage.name: [step for run in gpu_check.commands_of(stage, words) for step in run.steps] for stage in stages}


@pytest.mark.parametrize("capability,arch", [("8.0", "80"), ("8.9", "80"), ("9.0", "90a"), ("10.3", "100")])
def test_only_this_gpus_code_is_built(capability, arch):
    configure = next(step for step in filled(capability)["build"] if "-S" in step)
    assert f"-DPK_CUDA_ARCHS={arch}-real" in configure
    words = gpu_check.words_for(FACTS | {"capability": capability}, Path("results"))
    assert gpu_check.environment_for(FACTS | {"commit": "c"}, words)["PK_CUDA_ARCHS"] == arch


def test_prebuilt_keeps_the_library_and_builds_the_tests():
    steps = filled(stages=[gpu_check.without_library(gpu_check.STAGES[0])])["build"]
    assert len(steps) == 2 and not any("setup.py" in step for step in steps)


def test_files_and_options_that_stages_name_exist():
    steps = [step for steps in filled().values() for step in steps]
    for word in (word for step in steps for word in step if word.endswith(".py")):
        assert (ROOT / word).exists(), f"a stage names {word}, which is not there"
    for option in (word for step in steps for word in step if word.startswith("-DPK_")):
        assert option[2:].split("=")[0] in (ROOT / "CMakeLists.txt").read_text()


def test_few_results_of_a_bounded_size(check):
    _, _, out = check({"loud": (60, ["print('x' * 99 + '\\n', end='') or [print('y' * 99) for _ in range(30000)]"])})
    assert gpu_check.KEPT <= (out / "log.txt").stat().st_size < gpu_check.KEPT + 1000
    assert "characters left out" in (out / "log.txt").read_text()
