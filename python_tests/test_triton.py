"""The Triton backend without a GPU: interpreted over every sample, and compiled ahead of time for three architectures,
by the pinned Triton and by the oldest that is supported.

Interpretation shows that arithmetic and bounds are right, compilation that ptxas takes the kernels and keeps them in
registers and shared memory. On a GPU the same kernels also run through test_ops.py.

`make test` interprets every sample but those that are `LONG` in one pair of dtypes (interpreted_samples.py), compiles
the shapes of a model with the pinned Triton for the three architectures, and with the oldest for sm_90; the rest is
slow.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_kernels import backends, registry

HERE = Path(__file__).parent
OLDEST = Path(sys.prefix, "triton-3.6")  # the oldest supported Triton, where `make test` puts it beside the pinned one
SHARDS = {
    "triton_samples.py": 4,
    "triton_add_samples.py": 1,
    "triton_embedding_samples.py": 1,
    "triton_pool_samples.py": 2,
    "triton_training_samples.py": 2,
    "triton_adapter_samples.py": 2,
    "triton_prefix_samples.py": 2,
    "triton_gated_samples.py": 1,
    "triton_dora_samples.py": 2,
}  # a minute or two each; what is marked slow takes minutes and is not cut
QUIET = ["-q", "-W", "ignore", "-p", "no:cacheprovider"]
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# (activations, factors), dropout, ranks per projection; M = 1, 16, 40, 200 and 8192 take different tiles
TRAINING = [((BF16, BF16), 0.1, ((16,),)), ((BF16, F32), 0.1, ((16,),))]
OTHERS = [
    ((BF16, BF16), 0.0, ((64,),)),
    ((F16, F32), 0.1, ((8, 128), ())),
    ((F32, F32), 0.1, ((16,),)),
    ((F64, F64), 0.1, ((16,),)),
]

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton: nothing run, it is not installed", allow_module_level=True)


def _too_old_for_numpy():
    versions = [tuple(map(int, importlib.metadata.version(name).split(".")[:2])) for name in ("triton", "numpy")]
    return versions[0] < (3, 7) and versions[1] >= (2, 4)


@pytest.mark.skipif(_too_old_for_numpy(), reason="this triton cannot interpret with this numpy (2.4 and later)")
@pytest.mark.parametrize(
    "samples,which,shard",
    [(file, "not slow", f"{i}/{count}") for file, count in SHARDS.items() for i in range(count)]
    + [pytest.param(file, "slow", "0/1", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]) for file in SHARDS],
)
def test_every_sample_interpreted(samples, which, shard):
    command = [sys.executable, "-m", "pytest", *QUIET, "-m", which, samples, "--shard", shard]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)}
    run = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    print(run.stdout[-8000:], run.stderr[-2000:])
    assert run.returncode == 0, run.stdout.strip().splitlines()[-1:]


def _run(arguments, needs):
    """One forward and one backward."""
    from peft_kernels.ops.lora_linear.triton_kernel import FUNCTIONS

    y, h = FUNCTIONS["lora_linear"](*arguments.values())
    rest = [arguments[n] for n in ("weight", "lora_A", "lora_B", "member", "scaling", "dropout_p", "seed")]
    FUNCTIONS["lora_linear_backward"](y, arguments["x"], h, *rest, needs)


def _call(M, pair, p, ranks, K=4096, N=4096):
    """The same on meta tensors of real size, and a mask."""
    from peft_kernels.ops.lora_linear.triton_kernel import FUNCTIONS

    def empty(*shape, dtype=pair[0]):
        return torch.empty(shape, dtype=dtype, device="meta")

    member = [g for g, group in enumerate(ranks) for _ in group]
    flat = [r for group in ranks for r in group]
    arguments = {
        "x": empty(M, K),
        "weight": [empty(N, K) for _ in ranks],
        "bias": [empty(N) for _ in ranks],
        "lora_A": [empty(r, K, dtype=pair[1]) for r in flat],
        "lora_B": [empty(N, r, dtype=pair[1]) for r in flat],
        "lora_bias": [None] * len(flat),
        "member": member,
        "scaling": [1.5] * len(flat),
        "dropout_p": [p] * len(flat),
        "seed": torch.empty((), dtype=torch.int64, device="meta"),
    }
    _run(arguments, [True] + [False] * 2 * len(ranks) + [True] * 2 * len(flat) + [False] * len(flat))
    FUNCTIONS["lora_dropout_mask"](arguments["seed"], M, K, 0.1, 0)


def _call_add(M, pair, p, ranks, K=4096, N=4096):
    """One lora_add, forward and backward with every gradient, on meta tensors of real size."""
    from peft_kernels.ops.lora_linear.triton_add import FUNCTIONS

    def empty(*shape, dtype=pair[1]):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, residual, seed = empty(M, K, dtype=pair[0]), empty(M, N, dtype=pair[0]), empty(dtype=torch.int64)
    factors = [empty(r, K) for r in ranks], [empty(N, r) for r in ranks]
    numbers = [1.5] * len(ranks), [p] * len(ranks), seed
    y, h = FUNCTIONS["lora_add"](residual, x, *factors, [empty(N)] * len(ranks), *numbers)
    FUNCTIONS["lora_add_backward"](y, x, h, *factors, *numbers, [True] * (1 + 3 * len(ranks)))


def _call_pool(M, pair, N=(4096, 1024, 1024), K=4096, pages=2, slots=64, down_biased=False):
    """One batched_lora_ on meta tensors of real size."""
    from peft_kernels.ops.batched_lora import route
    from peft_kernels.ops.batched_lora.triton_kernel import FUNCTIONS

    def empty(*shape, dtype=pair[0]):
        return torch.empty(shape, dtype=dtype, device="meta")

    wide = F64 if pair[0] is F64 else F32
    FUNCTIONS["batched_lora_"](
        [empty(M, n) for n in N],
        empty(M, K),
        empty(route.length(M, slots), dtype=torch.int32),
        empty(100, 8, K, dtype=pair[1]),
        [empty(100, 8, n, dtype=pair[1]) for n in N],
        [empty(slots, 4 + 2 * pages, dtype=torch.int32) for _ in N],
        [empty(slots, dtype=wide) for _ in N],
        [empty(*((slots, 8 * pages) if down_biased else (0,)), dtype=wide) for _ in N],
    )


def _call_training(M, pair, p, ranks, N=(4096, 1024), K=4096):
    """One batched_lora, forward and backward with every gradient of the adapters, on meta tensors of real size."""
    from peft_kernels.ops.batched_lora import route
    from peft_kernels.ops.batched_lora.triton_training import FUNCTIONS

    def empty(*shape, dtype=pair[0]):
        return torch.empty(shape, dtype=dtype, device="meta")

    entries = [(g, adapter, rank) for adapter, rank in enumerate(ranks) for g in range(len(N))]
    member, adapter, _ = ([*field] for field in zip(*entries, strict=True))
    factors = (
        [empty(r, K, dtype=pair[1]) for _, _, r in entries],
        [empty(N[g], r, dtype=pair[1]) for g, _, r in entries],
    )
    numbers = (
        member,
        adapter,
        [1.5] * len(entries),
        [p] * len(entries),
        torch.empty((), dtype=torch.int64, device="meta"),
    )
    x, routed = empty(M, K), empty(route.length(M, len(ranks)), dtype=torch.int32)
    weight, bias = [empty(n, K) for n in N], [empty(n) for n in N]
    y, h = FUNCTIONS["batched_lora"](x, routed, weight, bias, *factors, [None] * len(entries), *numbers)
    needs = [True] + [False] * 2 * len(N) + [True] * 3 * len(entries)
    FUNCTIONS["batched_lora_backward"](y, x, h, routed, weight, *factors, *numbers, needs)


def _compile_training(arch, M, *case):
    from triton_compiler import Recorder, assert_fits

    with Recorder(arch) as compiled:
        _call_training(M, *case)
    assert {k.name for k in compiled} >= {"_table_kernel", "_shrink_kernel", "_expand_kernel", "_gradient_kernel"}
    assert_fits(arch, f"M={M}, {case}", compiled)


def _compile(arch, M, case):
    from triton_compiler import Recorder

    with Recorder(arch) as compiled:
        _call(M, *case)
    _check(compiled, arch, f"M={M}, {case}")
    return compiled


def _check(compiled, arch, case):
    """Every kernel is there, and fits."""
    from triton_compiler import assert_fits

    assert {k.name for k in compiled} >= {"_shrink_kernel", "_concat_gemm_kernel", "_factor_kernel", "_input_kernel"}
    assert_fits(arch, case, compiled)


def _compile_add(arch, M, *case):
    from triton_compiler import Recorder

    with Recorder(arch) as compiled:
        _call_add(M, *case)
    _check(compiled, arch, f"lora_add, M={M}, {case}")


def _compile_pool(arch, pair, **sizes):
    from triton_compiler import Recorder, assert_fits

    with Recorder(arch) as compiled:
        _call_pool(64, pair, **sizes)
    assert [k.name for k in compiled] == ["_pool_shrink_kernel", "_pool_expand_kernel"]
    assert_fits(arch, f"{pair}, {sizes}", compiled)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiled_ahead_of_time(arch):
    for case in TRAINING:
        large = _compile(arch, 8192, case)
    text = "".join(kernel.ptx for kernel in large if kernel.name == "_concat_gemm_kernel")
    assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[arch] in text
    assert all("cp.async" in kernel.ptx for kernel in large if kernel.name == "_shrink_kernel")
    _compile(arch, 1, TRAINING[0])
    _compile_add(arch, 8192, (BF16, F32), 0.1, (16,))
    _compile_pool(arch, (BF16, BF16))
    _compile_pool(arch, (BF16, F32), N=(4096,), down_biased=True)
    if arch == 90:  # the others compile for minutes
        _compile_training(arch, 8192, (BF16, F32), 0.1, (16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("pair", [(BF16, BF16), (F16, F16), (BF16, F32), (F16, F32), (F32, F32), (F64, F64)], ids=str)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_pool_kernel_compiled_ahead_of_time(arch, pair):
    _compile_pool(arch, pair)
    _compile_pool(arch, pair, N=(4096,), pages=64, down_biased=True)
    _compile_pool(arch, pair, N=(1, 37), K=67, pages=1)


@pytest.mark.slow
@pytest.mark.parametrize("M", [64, 8192])
@pytest.mark.parametrize(
    "pair,p,ranks",
    [
        ((BF16, BF16), 0.0, (16, 16)),
        ((BF16, BF16), 0.1, (64,)),
        ((BF16, F32), 0.1, (8,) * 20),
        ((BF16, F32), 0.0, (3, 128)),
        ((F16, F32), 0.1, (32, 16)),
        ((F32, F32), 0.1, (16, 16)),
        ((F64, F64), 0.1, (16, 64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_of_the_training_form_compiled_ahead_of_time(arch, pair, p, ranks, M):
    _compile_training(arch, M, pair, p, ranks)
    if M == 64:
        _compile_training(arch, M, pair, p, ranks, (1, 37), 67)


@pytest.mark.parametrize("id", ["ones", "ragged", "group"])
def test_odd_sizes_compiled_ahead_of_time(id):
    """Sizes of 1, which Triton compiles in as constants, and rows and pointers that lie on no 16 bytes."""
    from triton_compiler import Recorder

    arguments = next(s for s in registry.ops()["lora_linear"].samples() if s.id == id).make("meta", BF16, BF16)
    with Recorder(90) as compiled:
        _run(arguments, [True] * (1 + 2 * len(arguments["weight"]) + 3 * len(arguments["lora_A"])))
    _check(compiled, 90, id)


@pytest.mark.slow
@pytest.mark.parametrize("M", [1, 40, 200, 8192])
@pytest.mark.parametrize("case", [*TRAINING, *OTHERS], ids=str)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_tile_compiled_ahead_of_time(arch, case, M):
    _compile(arch, M, case)
    _compile_add(arch, M, *case[:2], case[2][0])


@pytest.mark.skipif(not OLDEST.exists(), reason=f"triton 3.6: nothing compiled, it is not in {OLDEST}")
@pytest.mark.parametrize(
    "test",
    [
        "test_compiled_ahead_of_time[90]",
        "test_triton_adapter.py::test_compiled_ahead_of_time[90]",
        "test_triton_prefix.py::test_compiled_ahead_of_time[90]",
        "test_triton_dora.py::test_compiled_ahead_of_time[90]",
        "test_triton_embedding.py::test_compiled_ahead_of_time[90]",
        *(pytest.param(f"test_compiled_ahead_of_time[{arch}]", marks=pytest.mark.slow) for arch in (80, 100)),
        pytest.param("test_triton_adapter.py::test_every_kernel_compiled_ahead_of_time", marks=pytest.mark.slow),
        pytest.param("test_triton_prefix.py::test_every_kernel_compiled_ahead_of_time", marks=pytest.mark.slow),
        pytest.param("test_triton_gated.py::test_every_kernel_compiled_ahead_of_time", marks=pytest.mark.slow),
        pytest.param("test_triton_dora.py::test_every_kernel_compiled_ahead_of_time", marks=pytest.mark.slow),
        pytest.param("test_triton_embedding.py::test_every_kernel_compiled_ahead_of_time", marks=pytest.mark.slow),
        pytest.param("test_every_tile_compiled_ahead_of_time", marks=pytest.mark.slow),
        pytest.param("test_every_pool_kernel_compiled_ahead_of_time", marks=pytest.mark.slow),
        pytest.param("test_every_kernel_of_the_training_form_compiled_ahead_of_time", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(1800)  # all tiles are minutes in one process
def test_the_same_with_the_oldest_triton(test):
    arguments = [*QUIET, test if "::" in test else f"test_triton.py::{test}"]
    code = "import sys, pytest, triton; assert triton.__version__ == '3.6.0', triton.__file__; "
    code += f"sys.exit(pytest.main({arguments}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (OLDEST, HERE.parent)))}
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=environment, capture_output=True, text=True)
    print(run.stdout[-8000:], run.stderr[-2000:])
    assert run.returncode == 0, run.stdout.strip().splitlines()[-1:]


def test_row_counts_do_not_compile_again():
    from triton_compiler import Recorder

    with Recorder(90) as compiled:
        _call(1024, (BF16, BF16), 0.0, ((16,),))
        first = [kernel.name for kernel in compiled]
        for M in (1041, 4096):
            _call(M, (BF16, BF16), 0.0, ((16,),))
    assert [kernel.name for kernel in compiled] == first
    with Recorder(90) as compiled:
        for M in (1, 17, 64, 2048):
            _call_pool(M, (BF16, BF16))
    assert len(compiled) == 2


def test_neither_rows_nor_adapters_compile_the_training_form_again():
    from triton_compiler import Recorder

    with Recorder(90) as compiled:
        _call_training(256, (BF16, BF16), 0.0, (16,), (1024,))
        first = [kernel.name for kernel in compiled]
        for M, ranks in ((265, (16,)), (400, (16, 8)), (450, (16, 16, 16))):
            _call_training(M, (BF16, BF16), 0.0, ranks, (1024,))
    assert [kernel.name for kernel in compiled[len(first) :]] == ["_table_kernel"]  # of 128 numbers


def test_the_backend_says_why_it_is_not_there():
    triton = backends.all_backends()["triton"]
    assert triton.available == (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))
    if not torch.cuda.is_available():
        assert triton.missing == "this torch sees no CUDA device"
