"""What the configs of all methods are: frozen dataclasses that adapter_config.json can hold."""

from dataclasses import asdict, fields
from typing import Any, ClassVar, Self


class MethodConfig:
    """How a config is written, and read again; `peft_type` is the method's name in the file."""

    peft_type: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """What adapter_config.json says of it."""
        return {"peft_type": self.peft_type} | asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From what `to_dict` gave. Raises ValueError for fields that there are not."""
        names = [field.name for field in fields(cls)]
        if strangers := sorted(values.keys() - {*names, "peft_type"}):
            raise ValueError(f"{cls.__name__}: there is no field {strangers[0]!r}; the fields are {', '.join(names)}")
        return cls(**{name: value for name, value in values.items() if name != "peft_type"})
