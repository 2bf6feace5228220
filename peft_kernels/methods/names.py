"""Names of modules in configs: whole ones, or ends of them behind a dot ("query", "intermediate.dense")."""

from collections.abc import Sequence
from typing import Any


def checked(config: str, field: str, names: Any, none: str) -> tuple[str, ...] | None:
    """A field of names as a tuple, or None. Raises ValueError; `none` says in the message what None stands for."""
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ValueError(f"{config}: {field} must be a list of names of modules, or None for {none}, got {names!r}")
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{config}: {field} must hold names of modules, got {list(names)}")
    return tuple(names)


def ends_with(module_name: str, end: str) -> bool:
    """Whether a name, or the end of one, is that of a module."""
    return f".{module_name}".endswith(f".{end}")
