"""BitFit: the biases of the model are trained, and nothing else (Ben Zaken et al. 2022, arXiv:2106.10199)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peft_kernels.methods.config import MethodConfig
from peft_kernels.methods.names import checked, ends_with


@dataclass(frozen=True)
class BitFitConfig(MethodConfig):
    """Which biases are trained.

    Args:
        target_modules: names of modules, or ends of names ("query", "intermediate.dense"), whose biases are trained;
            None: all parameters called `bias`. The paper's small variant is those of the query and of the FFN's first
            layer.
        modules_to_save: as in `BottleneckConfig`: a head that is trained whole.

    Raises:
        ValueError: one of them is no list of names.

    Example:
        >>> peft_kernels.attach(model, BitFitConfig())
    """

    peft_type: ClassVar[str] = "BITFIT"

    target_modules: Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self):
        for field, none in (("target_modules", "all"), ("modules_to_save", "none")):
            object.__setattr__(self, field, checked("BitFitConfig", field, getattr(self, field), none))

    def takes(self, module_name: str) -> bool:
        """Whether the bias of a module is trained."""
        ends = self.target_modules
        return ends is None or any(ends_with(module_name, end) for end in ends)
