"""Compiles Triton kernels for a GPU that is not there, and reads what ptxas made of them.

`Recorder(arch)` stands in for the CUDA driver: while it is active, every launch `kernel[grid](...)` compiles the kernel
for that architecture with exactly the specialisation that the launch would have on a device, and launches nothing.
Tensors may be on the meta device, so real sizes cost nothing. What it records: shared and tensor memory from Triton;
registers, stack and local memory from the cuobjdump in the Triton wheel; from the PTX the left operands of wgmma.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # what a block may use; 99 KiB for all that runs sm_80's
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one architecture."""

    name: str
    options: str  # the constants it was compiled with
    shared: int
    registers: int
    stack: int  # bytes a thread spills or indexes; 0 when all stays in registers
    local: int
    tensor_memory: int  # columns, of 512; a kernel that wants more is compiled to a trap (sm_100)
    stages: int
    ptx: str = field(repr=False)

    @property
    def wgmma_from_registers(self) -> bool:
        """A wgmma takes its left operand from registers: `wgmma... {accumulators}, {registers}, descriptor`."""
        return bool(re.search(r"wgmma\.mma_async[^;]*\{[^}]*\}\s*,\s*\{", self.ptx))


class Recorder:
    """A driver without a device; `with Recorder(90) as compiled:` fills the list."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)
        self.compiled: list[Compiled] = []
        self._seen: set[str] = set()

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return "meta"

    def __enter__(self):
        self._run, self._before = jit.JITFunction.run, driver._active
        jit.JITFunction.run = lambda kernel, *args, grid, warmup, **options: self._compile(kernel, args, options)
        driver.set_active(self)
        return self.compiled

    def __exit__(self, *_):
        jit.JITFunction.run = self._run
        driver._active = self._before  # reset_active() would look for a device

    def _compile(self, kernel, args, options):
        kernel.device_caches.clear()  # compiled for another architecture, by another recorder
        binary = self._run(kernel, *args, grid=(1,), warmup=True, **options)
        if binary.hash in self._seen:
            return
        self._seen.add(binary.hash)
        constants = ", ".join(f"{name}={value}" for name, value in options.items() if name != "enable_fp_fusion")
        registers, stack, local = _resources(binary.asm["cubin"])
        self.compiled.append(
            Compiled(
                kernel.fn.__name__,
                constants,
                binary.metadata.shared,
                registers,
                stack,
                local,
                binary.metadata.tmem_size or 0,
                binary.metadata.num_stages,
                binary.asm["ptx"],
            )
        )


def assert_fits(arch: int, case: str, compiled: list[Compiled]) -> None:
    """Every kernel stays in registers and in the memory that a block may use."""
    for kernel in compiled:
        what = f"{kernel.name} for sm_{arch}, {case}: {kernel}"
        assert kernel.shared <= SHARED[arch], what
        assert kernel.stack == kernel.local == 0, what
        assert kernel.tensor_memory <= 512, what
        # ptxas before 13.3 may miscompile a pipelined wgmma whose left operand sits in registers (triton issue 9433)
        assert kernel.stages == 1 or not kernel.wgmma_from_registers, what


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and local bytes of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{field}:(\d+)", text).group(1)) for field in ("REG", "STACK", "LOCAL"))
