"""What patching did to each module, and what its calls did since.

A report holds no model: it refers to it weakly and reads the counts when it is asked.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from weakref import ref

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_kernels.integrations.counts import Calls, calls
from peft_kernels.integrations.gathering import INACTIVE, ONE_EACH


@dataclass(frozen=True)
class Row:
    """One module: the backend that its device runs, or why it was left alone (then `kernel` is empty).

    With a kernel, `reason` says why the module would not have run fused in the state in which `patch` found it.
    """

    name: str
    kind: str  # "lora.Linear", "qkv", "gate_up", "mlp" (recomputed), or the class of a layer that has no kernel
    kernel: str = ""
    reason: str = ""
    group: str = ""  # name of the module whose one call computes this projection too


class PatchReport:
    """What `peft_kernels.patch` returns: a row for each module, and the counts of calls since.

    rows: `Row(name, kind, kernel, reason, group)` for each adapter layer and each module that owns a group of them.
    left: the rows without a kernel. fused: calls that ran fused since. fallbacks: reason -> calls that did not.

    `print(report)` shows a table. `restore()` takes back what this `patch` changed; a context manager does at its end.

        >>> with peft_kernels.patch(model) as report:
        ...     report.verify(input_ids=input_ids)
        ...     print(report)
    """

    def __init__(self, model: nn.Module, rows: list[Row], notes: list[str], restore: Callable[[], None]):
        self.rows = rows
        self.notes = notes
        self._model = ref(model)
        self.restore = restore
        modules = dict(model.named_modules())
        self._modules = {row.name: ref(modules[row.name]) for row in rows}  # wrapping a model later changes its names
        self._kinds = {row.name: type(modules[row.name]) for row in rows if row.kernel}
        self._earlier = {row.name: calls(modules[row.name]) for row in rows}  # of a patch before this one

    def __enter__(self) -> "PatchReport":
        return self

    def __exit__(self, *exception) -> None:
        self.restore()

    @property
    def left(self) -> list[Row]:
        return [row for row in self.rows if not row.kernel]

    @property
    def fused(self) -> int:
        """Fused calls of layers and groups; a call of a group counts once."""
        return sum(found.fused for found in self.calls().values())

    @property
    def fallbacks(self) -> Counter[str]:
        return sum((found.fallbacks for found in self.calls().values()), Counter())

    def calls(self) -> dict[str, Calls]:
        """Module name -> `Calls(fused, fallbacks)` since this `patch`, those in torch.compile apart."""
        alive = {name: module() for name, module in self._modules.items()}
        return {name: Calls() if m is None else calls(m) - self._earlier[name] for name, m in alive.items()}

    def unseen(self) -> list[str]:
        """Adapter layers that the model got after `patch`, which run PEFT's own forward: patch again."""
        model, known = self._model(), {module() for module in self._modules.values()}
        if model is None:
            return []
        return [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer) and m not in known]

    def verify(self, **inputs) -> "PatchReport":
        """Runs the model once on `inputs`, without gradients, and proves that every patched module ran fused.

        Raises RuntimeError naming each module that did not, and why; or saying that the model was unpatched since.
        Modules whose layers have no active adapter are not expected to. Random state is put back.

            >>> peft_kernels.patch(model).verify(input_ids=input_ids)
        """
        model = self._model()
        if model is None:
            raise RuntimeError("verify: the patched model is gone")
        if self._kinds and not any(isinstance(self._modules[name](), kind) for name, kind in self._kinds.items()):
            raise RuntimeError(
                "verify: the model is no longer patched (unpatch, or the end of a `with`); "
                "peft_kernels.patch(model).verify(...) patches it again"
            )
        before = self.calls()
        cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        with torch.no_grad(), torch.random.fork_rng(devices=cuda), torch.compiler.set_stance("force_eager"):
            model(**inputs)
        made = {name: now - before[name] for name, now in self.calls().items()}
        failed = []
        for row in self.rows:
            here, above = made[row.name], made.get(row.group, Calls())
            if row.kernel and not (here.fused or above.fused or {INACTIVE, ONE_EACH} & here.fallbacks.keys()):
                failed.append(f"{row.name}: {', '.join(here.fallbacks) or 'not reached by this forward'}")
        failed += [f"{name}: came after patch; patch again" for name in self.unseen()]
        if failed:
            raise RuntimeError("verify: patched, but not fused in this forward:\n  " + "\n  ".join(failed))
        return self

    def table(self) -> list[tuple[str, ...]]:
        """Rows of strings as printed: module, kind, kernel or reason, fused calls, fallbacks; alike layers together."""
        alike: dict[tuple, list[str]] = {}
        for row in self.rows:
            status = row.kernel and row.reason and f"{row.kernel} (at patch: {row.reason})"
            status = status or row.kernel or f"left alone: {row.reason}"
            alike.setdefault((re.sub(r"\.\d+(?=\.|$)", ".*", row.name), row.kind, status), []).append(row)
        found = self.calls()
        lines = []
        for (name, *cells), rows in alike.items():
            fused = sum(found[row.name].fused + found.get(row.group, Calls()).fused for row in rows)
            reasons = sum((found[row.name].fallbacks for row in rows), Counter())
            shown = f"{name} (x{len(rows)})" if len(rows) > 1 else rows[0].name
            lines.append((shown, *cells, str(fused), "; ".join(f"{why}: {n}" for why, n in reasons.items())))
        return lines

    def __repr__(self) -> str:
        kernels = len(self.rows) - len(self.left)
        return f"PatchReport({kernels} modules patched, {len(self.left)} left alone, {self.fused} fused calls so far)"

    def __str__(self) -> str:
        came_later = [f"{name}: came after patch; patch again" for name in self.unseen()]
        header = ("module", "kind", "kernel", "fused calls", "fallbacks")
        return "\n".join([repr(self), *self.notes, *came_later, render([header, *self.table()])])


def render(lines: list[tuple[str, ...]]) -> str:
    """Lines of cells as text, by rich where it is there."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
    table = Table(*lines[0], box=box.SIMPLE_HEAD)
    for line in lines[1:]:
        table.add_row(*line)
    console = Console(width=140)
    with console.capture() as text:
        console.print(table, markup=False)
    return text.get().rstrip()
