"""The MAM adapter: a short prefix in the attention and a scaled parallel adapter at the FFN, on one model at once.

He et al. 2022 (arXiv:2110.04366): few parameters do most in the heads of the attention, many in the FFN.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from peft_kernels.methods.bottleneck import BottleneckConfig
from peft_kernels.methods.config import MethodConfig
from peft_kernels.methods.prefix import PrefixTuningConfig, PTuningV2Config


def _prefix() -> PrefixTuningConfig:
    return PrefixTuningConfig(num_virtual_tokens=30, prefix_projection=True, encoder_hidden_size=800)


@dataclass(frozen=True)
class MAMConfig(MethodConfig):
    """Both halves, under one name.

    Args:
        prefix: the prefix; that of the paper has 30 positions and an MLP of width 800, of which a file has what it
            gives.
        ffn: the adapter; that of the paper has r=512 and s=4.

    Raises:
        TypeError: one of them is a config of another kind.

    Example:
        >>> peft_kernels.attach(model, MAMConfig())
        >>> peft_kernels.attach(model, MAMConfig(ffn=BottleneckConfig.scaled_parallel(r=64)), "small")
    """

    peft_type: ClassVar[str] = "MAM"

    prefix: PrefixTuningConfig = field(default_factory=_prefix)
    ffn: BottleneckConfig = field(default_factory=lambda: BottleneckConfig.scaled_parallel(r=512))

    def __post_init__(self):
        for name, kind in (("prefix", PrefixTuningConfig), ("ffn", BottleneckConfig)):
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise TypeError(f"MAMConfig: {name} must be a {kind.__name__}, got a {type(value).__name__}")

    @property
    def modules_to_save(self) -> tuple[str, ...] | None:
        """Those of both halves."""
        return tuple(dict.fromkeys([*(self.prefix.modules_to_save or ()), *(self.ffn.modules_to_save or ())])) or None

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json says of it."""
        return {"peft_type": self.peft_type, "prefix": self.prefix.to_dict(), "ffn": self.ffn.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From what `to_dict` gave. Raises ValueError for fields that there are not."""
        deep = values.get("prefix", {}).get("peft_type") == PTuningV2Config.peft_type
        halves = {"prefix": PTuningV2Config if deep else PrefixTuningConfig, "ffn": BottleneckConfig}
        return super().from_dict(
            values | {name: half.from_dict(values[name]) for name, half in halves.items() if name in values}
        )
