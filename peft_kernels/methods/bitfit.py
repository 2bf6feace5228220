"""BitFit: the biases of the model are trained, and nothing else (Ben Zaken et al. 2022, arXiv:2106.10199)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peft_kernels.methods.config import MethodConfig


@dataclass(frozen=True)
class BitFitConfig(MethodConfig):
    """Which biases are trained.

    Args:
        target_modules: names of modules, or ends of names ("query", "intermediate.dense"), whose biases are trained;
            None: all parameters called `bias`. The paper's small variant is those of the query and of the FFN's first
            layer.

    Raises:
        ValueError: target_modules is no list of names.

    Example:
        >>> peft_kernels.attach(model, BitFitConfig())
    """

    peft_type: ClassVar[str] = "BITFIT"

    target_modules: Sequence[str] | None = None

    def __post_init__(self):
        names = self.target_modules
        if names is None:
            return
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise ValueError(
                f"BitFitConfig: target_modules must be a list of names of modules, or None for all, got {names!r}"
            )
        if not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"BitFitConfig: target_modules must hold names of modules, got {list(names)}")
        object.__setattr__(self, "target_modules", tuple(names))

    def takes(self, module_name: str) -> bool:
        """Whether the bias of a module is trained."""
        ends = self.target_modules
        return ends is None or any(f".{module_name}".endswith(f".{end}") for end in ends)
