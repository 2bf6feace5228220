"""Imports one module of a framework without its package's __init__, which would patch transformers and start devices.

The packages above the module become bare namespaces over the installed folder; what it imports and is not installed
can be given stand-ins. Afterwards `sys.modules` holds none of them: nobody else meets a half-imported package.
"""

import importlib
import importlib.util
import sys
from types import ModuleType


def import_isolated(module: str, stand_ins: dict[str, dict], required: tuple[str, ...] = ()) -> ModuleType:
    """The module `module`, e.g. "axolotl.kernels.lora".

    stand_ins: attributes by module name. A name inside the framework replaces that module of it; any other is used
    only where its package is not installed. required: packages that no stand-in can replace.
    Raises ImportError naming what is missing.
    """
    return import_together((module,), stand_ins, required)[0]


def import_together(
    modules: tuple[str, ...], stand_ins: dict[str, dict], required: tuple[str, ...] = (), *, stay: bool = False
) -> list[ModuleType]:
    """Several modules of one framework, and what import_isolated takes.

    stay: the framework's modules stay in sys.modules, for those that import others of it when they are called.
    """
    framework = _top(modules[0])
    for name in (framework, *required):
        if not _installed(name):
            raise ImportError(f"{name} is not installed")
    used = {name: a for name, a in stand_ins.items() if _top(name) == framework or not _installed(_top(name))}
    temporary = {framework, *map(_top, used)}
    root = importlib.util.find_spec(framework).submodule_search_locations[0]
    before = {name: kept for name, kept in sys.modules.items() if _top(name) in temporary}
    try:
        for name in before:
            del sys.modules[name]
        for name in modules:
            parts = name.split(".")[:-1]
            for depth in range(1, len(parts) + 1):
                if (package := ".".join(parts[:depth])) not in sys.modules:
                    _enter(package, ["/".join((root, *parts[1:depth]))], {})
        for name, attributes in used.items():
            _enter(name, [], attributes)
        found = [importlib.import_module(name) for name in modules]
        temporary -= {framework} if stay else set()
        return found
    except ImportError:
        raise
    except Exception as error:  # a release that the front end does not know
        raise ImportError(f"{modules[0]} does not import here: {type(error).__name__}: {error}") from error
    finally:
        for name in [name for name in sys.modules if _top(name) in temporary]:
            del sys.modules[name]
        sys.modules.update({name: kept for name, kept in before.items() if _top(name) in temporary})


def _top(name: str) -> str:
    return name.partition(".")[0]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _enter(name: str, path: list[str], attributes: dict) -> None:
    """Puts a package with these attributes into sys.modules and onto its parent, which is made if there is none."""
    package = ModuleType(name)
    package.__path__ = path
    vars(package).update(attributes)
    sys.modules[name] = package
    parent, _, leaf = name.rpartition(".")
    if parent:
        if parent not in sys.modules:
            _enter(parent, [], {})
        setattr(sys.modules[parent], leaf, package)
