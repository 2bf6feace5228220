"""What `make gpu-check` runs: the stages, in three groups, each of which fits into one call of ten minutes.

check    what is built is right: C++ tests, the registry's samples, compute-sanitizer
ops      the limits of this GPU and the ops beside their peers
models   whole layers and models

Kernels for Hopper that are off by default are tested in a run of their own; benchmarks time them beside the others.
"""

from dataclasses import dataclass, field

SM90 = {"PEFT_KERNELS_SM90": "1"}


@dataclass(frozen=True)
class Stage:
    """Commands that pass together: each with exit code 0, all within `limit` seconds.

    Words in braces are filled in from the machine; " && " joins steps of one command; a command that names {each} is
    run once for every file that the pattern `each` matches; `workers` commands run side by side. `least` seconds are
    kept for the stage while those before it run.
    """

    name: str
    limit: float
    what: str
    commands: tuple[str, ...]
    each: str = ""
    workers: int = 1
    least: float = 0
    environment: dict[str, str] = field(default_factory=dict)  # beside what every stage has
    group: str = "check"
    capability: str = ""  # where it is another, the stage is left out


def _python_tests(name: str, limit: float, least: float, **more) -> Stage:
    command = (
        "{python} -m pytest -q --timeout=150 -p no:cacheprovider {xdist} -m 'not slow' python_tests/test_ops.py"
        " python_tests/test_peft.py python_tests/test_patching.py {cuda_tests}"
    )
    what = "every sample of the registry on every backend"
    return Stage(name, limit, what + more.pop("beside", ""), (command,), least=least, **more)


def _benchmark(op: str, limit: float, least: float, group: str, options: str = "") -> Stage:
    """The op's CSV."""
    command = f"{{python}} benchmarks/run.py --op {op} --device cuda --grid gpu {options} --out {{out}}/{op}_cuda.csv"
    # cuda: the arm `patched` is to be what is measured, not the definition
    environment = {"PEFT_KERNELS_BACKEND": "cuda"}
    return Stage(op, limit, f"benchmark: {op}", (command,), least=least, environment=environment, group=group)


CONFIGURE = "{cmake} -S . -B {native} {generator} -DCMAKE_BUILD_TYPE=Release -DPK_CUDA=1 -DPK_CUDA_ARCHS={arch}-real"
STAGES = (
    Stage(
        "build",
        240,
        "the library in place and the C++ tests, for this GPU alone",
        (
            "{python} setup.py -q build_ext --inplace",
            CONFIGURE + " && {cmake} --build {native} --target gpu_check --parallel {cores}",
        ),
        workers=2,
        least=90,
    ),
    Stage(
        "primitives",
        30,
        "emulator == GPU: the same expected values in both",
        (
            "{native}/test_emulator_plain",
            "{native}/test_emulator_sm90_plain",
            "{native}/test_primitives_cuda_plain",
            "{native}/test_primitives_sm90_cuda_plain",
            "{native}/test_primitives_cuda_gpu",  # that of sm_90 is in the next stage, where it is for this GPU
        ),
        least=10,
    ),
    Stage("cpp", 90, "the C++ tests on the GPU", ("{each}",), each="{native}/test_*_cuda_gpu", least=30),
    _python_tests("python", 200, 90),
    _python_tests("python_sm90", 150, 60, beside=", with the kernels for Hopper", environment=SM90, capability="9.0"),
    Stage(
        "sanitizer",
        200,
        "compute-sanitizer over the C++ tests",
        tuple(
            f"{{sanitizer}} --tool {tool} --error-exitcode 9 {{each}}"
            for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
        ),
        each="{native}/test_*_cuda_gpu",
        workers=6,
        least=100,
    ),
    # the most important first: a stage that runs out of time keeps the cells that it has written
    _benchmark("limits", 40, 15, "ops"),
    _benchmark("lora_linear", 260, 140, "ops", "--graphs"),
    _benchmark("batched_lora", 260, 140, "ops"),
    _benchmark("bottleneck_adapter", 90, 45, "ops", "--arms eager,widened,op"),
    _benchmark("prefix_attention", 70, 35, "ops", "--arms peft,cat,merged,op"),
    _benchmark("decoder", 340, 220, "models"),
    _benchmark("train_many", 90, 45, "models", "--rounds 10"),
    _benchmark("prefix_models", 70, 35, "models"),
    _benchmark("lora_variants", 90, 45, "models"),
)
