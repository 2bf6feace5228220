"""One declaration per op: it feeds dispatch, tests, opcheck, benchmarks and the README's support table.

An Op is a handful of Functions (forward, perhaps a backward, companions), each a schema with a fake and a reference
implementation, plus what they share: autograd and autocast where there are any, samples, bad inputs and the cost
model. `link()` turns the declarations into torch operators, in one namespace per backend and in `peft_kernels` for the
bound ones.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch

from peft_kernels import backends

below_autograd = torch._C._AutoDispatchBelowAutograd  # pinned by python_tests/test_house.py, as the next one
below_in_place = torch._C._AutoDispatchBelowADInplaceOrView


@dataclass(frozen=True)
class Function:
    """One torch operator: `name` + `schema` as torch.library spells them, its fake and its reference.

    `above(namespace)`: the kernels of a companion for dispatch keys above its backends', by key."""

    name: str
    schema: str
    fake: Callable
    reference: Callable
    above: Callable[[ModuleType], dict[str, Callable]] | None = None


@dataclass(frozen=True)
class Sample:
    """Inputs at an edge. `make(device, dtype, factor_dtype)` gives the forward's arguments by name."""

    id: str
    why: str
    make: Callable[..., dict]
    dtypes: tuple[tuple[torch.dtype, torch.dtype], ...]  # (activations, factors) that the sample is run in
    busy: bool = False  # enough work for several threads: also run with several numbers of them


@dataclass(frozen=True)
class BadInput:
    """Arguments that must be refused: `make(device)` gives them; `error` and `text` say how."""

    id: str
    make: Callable[..., dict]
    error: type[Exception]
    text: str  # a part of the message


@dataclass(frozen=True)
class Cost:
    """The least work that an op can do: floating-point operations, and bytes to and from memory."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Op:
    """`functions[0]` is the forward, `<name>_backward` among them the backward if there is one, the rest companions.

    `check(**arguments)` refuses what the op cannot take; `public` names the function of peft_kernels that takes the
    same arguments by name, if users call one. `evaluate(forward, backward, arguments, dy)` gives every output and every
    gradient by name, for the oracle; what has the rows of the argument `rows` is called `y[g]`, `h` or
    `grad <rows>[0]`. Without a backward it is given None and no dy. It leaves the arguments as they were, even if the
    forward works in place. `constants` are arguments with numbers that have no gradient.
    `cost(**arguments)` gives a Cost for "forward" and, with a backward, one for "backward".
    `autograd(namespace)` and `autocast(namespace, device_type)` make the forward's kernels for those dispatch keys.
    `python_backends` names the module of each backend that is written in Python, whose `FUNCTIONS` has a kernel for
    every function. It is imported only where that backend is available."""

    name: str
    formula: str
    functions: tuple[Function, ...]
    samples: Callable[[], list[Sample]]
    bad_inputs: Callable[[], list[BadInput]]
    evaluate: Callable[..., dict[str, torch.Tensor]]
    cost: Callable[..., dict[str, Cost]]
    check: Callable[..., None]
    public: str = ""
    size: tuple[Callable, Callable | None] | None = None
    rows: str = "x"
    constants: tuple[str, ...] = ()
    autograd: Callable[[ModuleType], Callable] | None = None
    autocast: Callable[[ModuleType, str], Callable] | None = None
    backends: tuple[str, ...] = field(default=("reference", "cpu"))
    python_backends: dict[str, str] = field(default_factory=dict)

    @property
    def forward(self) -> Function:
        return self.functions[0]

    @property
    def backward(self) -> Function | None:
        return next((f for f in self.functions if f.name == f"{self.name}_backward"), None)


_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
_OPS: dict[str, Op] = {}
_LIBRARIES: list[torch.library.Library] = []  # an operator lives as long as its Library object


def register(op: Op) -> Op:
    """Adds an op to the registry; `link()` makes its operators."""
    if op.name in _OPS:
        raise ValueError(f"registry: op '{op.name}' is registered already")
    _OPS[op.name] = op
    return op


def ops() -> dict[str, Op]:
    """Every registered op by name."""
    return dict(_OPS)


def support_table() -> str:
    """The README's table: what each op computes, on which backends, in which dtypes its samples are tested."""
    lines = ["| op | computes | backends | dtypes (activations / factors) | samples |", "|---|---|---|---|---|"]
    for op in _OPS.values():
        samples = op.samples()
        pairs = dict.fromkeys(pair for sample in samples for pair in sample.dtypes)
        names = ("/".join(_SHORT[dtype] for dtype in pair) for pair in pairs)
        lines.append(
            f"| `{op.name}` | `{op.formula}` | {', '.join(op.backends)} | {', '.join(names)} | {len(samples)} |"
        )
    return "\n".join(lines)


def link() -> None:
    """Defines every op in every available backend's namespace and binds `peft_kernels`. Called once, at import."""
    if _LIBRARIES:
        return
    for backend in backends.all_backends().values():
        if backend.available:
            ops = [op for op in _OPS.values() if backend.name in op.backends]
            _define(f"peft_kernels_{backend.name}", ops)
            for device in backend.devices:
                _implement(f"peft_kernels_{backend.name}", ops, backend.name, device)
    everything = list(_OPS.values())
    _define("peft_kernels", everything)
    for device in backends.all_backends()["reference"].devices:
        served: dict[str, list[Op]] = {}
        for op in everything:
            served.setdefault(backends.serving(op.backends, device), []).append(op)
        for backend, ops in served.items():
            _implement("peft_kernels", ops, backend, device)


def _define(namespace: str, ops: list[Op]) -> None:
    """Schemas, fakes, autograd and autocast of some ops in one namespace."""
    library = torch.library.Library(namespace, "DEF")
    _LIBRARIES.append(library)
    torch_ops = getattr(torch.ops, namespace)
    for op in ops:
        for function in op.functions:
            library.define(function.name + function.schema, tags=(torch.Tag.needs_fixed_stride_order,))
            torch.library.register_fake(f"{namespace}::{function.name}", function.fake, lib=library)
            for key, kernel in function.above(torch_ops).items() if function.above else ():
                library.impl(function.name, kernel, key)
        if op.autograd:
            library.impl(op.name, op.autograd(torch_ops), "Autograd")
        for device in ("CPU", "CUDA") if op.autocast else ():
            library.impl(op.name, op.autocast(torch_ops, device.lower()), f"Autocast{device}")


def _implement(namespace: str, ops: list[Op], backend: str, device: str) -> None:
    """The kernels of one backend, for one device."""
    if backend in ("cpu", "cuda"):
        backends.bind_native(namespace, device)
    library = torch.library.Library(namespace, "IMPL")
    _LIBRARIES.append(library)
    for op in ops:
        for name, kernel in _python_kernels(op, backend).items():
            library.impl(name, kernel, device.upper())


def _python_kernels(op: Op, backend: str) -> dict[str, Callable]:
    """What runs in Python for each function of an op; nothing where the backend is C++."""
    if backend == "reference":
        return {function.name: function.reference for function in op.functions}
    module = op.python_backends.get(backend)
    return importlib.import_module(module).FUNCTIONS if module else {}
