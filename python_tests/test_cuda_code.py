"""What nvcc made of the CUDA kernels, asserted on the library that is shipped: registers within budget, no spills, the
tensor-core and copy instructions that were meant, machine code for every architecture (for sm_90a alone, of kernels in
*_sm90.cu), and the time that it took.

`pytest -s python_tests/test_cuda_code.py` prints the whole report.
"""

import fnmatch
import importlib.util
import re
from pathlib import Path

import cuda_code
import pytest

from peft_kernels import backends

ROOT = Path(__file__).parent.parent
ARCHS = {"sm_80", "sm_90a", "sm_100", "sm_120"}
# Registers a thread may take, by kernel: what its launch bounds leave; a little above today's number where they leave
# 255. Shared memory is asserted at the launch.
BUDGET = {
    "probe_kernel": 16,
    "lora_linear_forward_shrink_kernel": 176,
    "lora_linear_forward_few_rows_kernel": 128,
    "lora_linear_forward_expand_kernel": 128,
    "lora_linear_backward_dy_pass_kernel": 224,
    "lora_linear_backward_x_pass_kernel": 128,
    "lora_linear_forward_concat_operands_sm90_kernel": 40,
    "lora_linear_forward_concat_gemm_sm90_kernel": 168,  # as launched; setmaxnreg deals them out anew
    "lora_linear_product_kernel": 80,
    "lora_linear_*sum_kernel": 64,
    "lora_dropout_mask_kernel": 64,
    "lora_embedding_*_kernel": 48,
    "gated_product_*_kernel": 72,
    "dora_*_kernel": 112,
    "batched_lora_forward_route_kernel": 64,
    "batched_lora_forward_pool_shrink_kernel": 128,
    "batched_lora_forward_pool_expand_kernel": 160,
    "batched_lora_forward_pool_*_plain_kernel": 160,
    "batched_lora_forward_pool_cluster_sm90_kernel": 128,
    "bottleneck_adapter_forward_fused_kernel": 128,
    "bottleneck_adapter_forward_few_rows_sm90_kernel": 128,
    "bottleneck_adapter_*_kernel": 88,
    "prefix_attention_forward_rows_kernel": 255,
    "prefix_attention_forward_split_kernel": 208,
    "prefix_attention_forward_merge_kernel": 88,
    "prefix_attention_forward_plain_kernel": 240,
    "prefix_attention_backward_shares_kernel": 168,
    "prefix_attention_backward_queries_kernel": 255,
    "prefix_attention_backward_keys_kernel": 255,
    "prefix_attention_backward_*_kernel": 64,
}
# Instructions of every instance but those of wide types: tensor cores, and ldmatrix where operands go through shared
# memory
MEANT = {
    "forward_shrink": "HMMA LDSM",
    "forward_few_rows": "HMMA",
    "forward_expand": "HMMA LDSM",
    "forward_concat_operands_sm90": "PREEXIT",
    "forward_concat_gemm_sm90": "HGMMA UTMALDG UTMALDG.MULTICAST UCGABAR SYNCS USETMAXREG ACQBULK",
    "backward_dy_pass": "HMMA LDSM",
    "backward_x_pass": "HMMA LDSM",
    "pool_shrink": "HMMA",
    "pool_expand": "HMMA LDSM",
    "pool_cluster_sm90": "HMMA LDSM UCGABAR ACQBULK",
    "forward_fused": "HMMA LDSM",
    "forward_few_rows_sm90": "HMMA LDSM UCGABAR ACQBULK",
    "forward_rows": "HMMA LDSM",
    "forward_split": "HMMA LDSM",
    "backward_shares": "HMMA LDSM",
    "backward_queries": "HMMA LDSM",
    "backward_keys": "HMMA LDSM",
}
# By cp.async, but for the instances that take rows without 16-byte alignment
COPIED = (
    "forward_shrink",
    "backward_dy_pass",
    "backward_x_pass",
    "pool_expand",
    "pool_cluster_sm90",
    "forward_fused",
    "forward_few_rows_sm90",
    "forward_rows",
    "forward_split",
    "backward_shares",
    "backward_queries",
    "backward_keys",
)
# Of instances of a role: ptxas serialises the wgmma of a loop that it does not understand, by an arrival and a wait
# for each. There are five (fp16: ten) and at most seven of both that were written.
AT_MOST = {"forward_concat_gemm_sm90": {"WARPGROUP": 7}}
MOST_SECONDS = 8 * 60  # of nvcc, on two cores: half of the processor time


def budget(name):
    return next((registers for pattern, registers in BUDGET.items() if fnmatch.fnmatch(name, pattern)), 0)


def _missing():
    if not backends.LIBRARY.exists():
        return "the operator library is not built"
    if "built without CUDA" in backends.cuda_summary():
        return "the library was built without CUDA"
    return "" if cuda_code.cuobjdump() else "there is no cuobjdump on PATH, in CUDA_HOME or in a Triton wheel"


MISSING = _missing()
needs_code = pytest.mark.skipif(bool(MISSING), reason=f"CUDA code: nothing read, {MISSING}")


def _asked_for():
    """The architectures of this build; those that it should have where `_C`, which knows, is not built."""
    if importlib.util.find_spec("peft_kernels._C") is None:
        return ARCHS
    from peft_kernels import _C

    return {f"sm_{arch}" for arch in _C.build_info()["cuda_archs"]}


@pytest.fixture(scope="module")
def kernels():
    found = cuda_code.read(backends.LIBRARY)
    print("\n" + cuda_code.table(found, budget))
    return found


@needs_code
def test_machine_code_for_every_architecture_and_ptx_for_later_ones():
    if _asked_for() != ARCHS:
        pytest.skip(f"this build was asked for {', '.join(sorted(_asked_for()))} only")
    assert cuda_code.images(backends.LIBRARY) == (ARCHS, {"sm_120"})


@needs_code
def test_every_kernel_of_the_sources_is_there_for_every_architecture(kernels):
    if "sm_90a" not in _asked_for():
        pytest.skip("not asked for sm_90a, for which *_sm90.cu is built all the same")
    declared, of_sm90 = set(), set()
    for source in ROOT.glob("csrc/*/*.cu"):
        if source.parent.name != "tests":
            found = set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\s*\(", source.read_text()))
            (of_sm90 if source.stem.endswith("_sm90") else declared).update(found)
    assert declared, "no source declares a kernel"
    for arch in cuda_code.images(backends.LIBRARY)[0]:
        meant = declared | of_sm90 if arch == "sm_90a" else declared
        assert {kernel.name for kernel in kernels if kernel.arch == arch} == meant, arch


@needs_code
def test_registers_stay_within_the_budget(kernels):
    for kernel in kernels:
        assert budget(kernel.name), f"{kernel.name} has no line in BUDGET"
        assert kernel.registers <= budget(kernel.name), f"{kernel.symbol} for {kernel.arch}: {kernel.registers}"


@needs_code
def test_nothing_spills_and_nothing_lies_in_local_memory(kernels):
    for kernel in kernels:
        what = f"{kernel.symbol} for {kernel.arch}: {kernel}"
        assert kernel.instructions, what
        assert kernel.stack == kernel.local == kernel.instructions["LDL"] == kernel.instructions["STL"] == 0, what


@needs_code
def test_the_instructions_that_were_meant(kernels):
    for kernel in kernels:
        for role, opcodes in MEANT.items():
            if f"_{role}_kernel" in kernel.name and not re.search(r"_kernelI[fd]Li", kernel.symbol):
                assert all(kernel.instructions[opcode] for opcode in opcodes.split()), f"{kernel}: {opcodes}"
                for opcode, most in AT_MOST.get(role, {}).items():
                    assert kernel.instructions[opcode] <= most, f"{kernel}: more than {most} {opcode}"
    for name, arch in {(kernel.name, kernel.arch) for kernel in kernels}:
        if name.endswith(tuple(f"_{role}_kernel" for role in COPIED)):
            instances = [kernel for kernel in kernels if (kernel.name, kernel.arch) == (name, arch)]
            assert any(kernel.instructions["LDGSTS"] for kernel in instances), f"{name} for {arch}: no cp.async"


@needs_code
def test_nvcc_takes_no_longer_than_it_may():
    sources = [source.relative_to(ROOT) for source in ROOT.glob("csrc/*/*.cu") if source.parent.name != "tests"]
    records = [ROOT / "build/objects" / source.with_suffix(".cu.command") for source in sources]
    if not all(record.exists() for record in records):
        pytest.skip("not all objects are here: the library was not built in this tree")
    seconds = {record.stem: float(record.read_text().splitlines()[-1]) for record in records}
    print("\n" + "\n".join(f"{took:6.1f} s  {name}" for name, took in seconds.items()))
    assert all(took > 0 for took in seconds.values())
    assert sum(seconds.values()) / 2 < MOST_SECONDS


# -- the reader, on text as cuobjdump prints it -----------------------------------------------------------------------

SYMBOL = (
    "_ZN2pk11lora_linear47_GLOBAL__N__f3e80558_14_shrink_cuda_cu_8010d41733lora_linear_forward_shrink_kernelILi4EEEvi"
)
USAGE = f"""
Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {SYMBOL}:
  REG:125 STACK:8 SHARED:1408 LOCAL:0 CONSTANT[0]:352 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = f"""
\tcode for sm_80
\t\tFunction : {SYMBOL}
\t.headerflags\t@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   MOV R1, c[0x0][0x28] ;  /* 0x00000a0000017a02 */
                                                           /* 0x000fe40000000f00 */
        /*0010*/              @!P0 STL.64 [R1], R2 ;       /* 0x0000000000007918 */
        /*0020*/             @!UP0 HMMA.16816.F32 R4, R8 ; /* 0x0000000000007918 */
        /*12340*/              @P6 LDGSTS.E.BYPASS.128 [R1], [R2] ;  /* 0x0000000000007918 */
        /*12350*/                   UTMALDG.2D [UR16], [UR4] ;  /* 0x0000000000007918 */
        /*12360*/              @P1 UTMALDG.2D.MULTICAST [UR16], [UR4], UR6 ;  /* 0x0000000000007918 */
"""


def test_the_reader_reads():
    (kernel,) = cuda_code.resources(USAGE.splitlines())
    assert (kernel.name, kernel.arch) == ("lora_linear_forward_shrink_kernel", "sm_80")
    assert (kernel.registers, kernel.stack, kernel.shared, kernel.local) == (125, 8, 1408, 0)
    counts = cuda_code.instructions(SASS.splitlines())
    opcodes = {"MOV": 1, "STL": 1, "HMMA": 1, "LDGSTS": 1, "UTMALDG": 2, "UTMALDG.MULTICAST": 1}
    assert counts == {(SYMBOL, "sm_80"): opcodes}
    kernel.instructions = counts[SYMBOL, "sm_80"]
    printed = cuda_code.table([kernel], lambda name: 168)
    assert re.search(r"lora_linear_forward_shrink_kernel +sm_80 +1 +125 +168 +1408 +8 +0 +1 ", printed)
