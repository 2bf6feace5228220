"""The laws of the house, kept by a machine: layers, sizes, seams, names, docstrings, and what the README may claim."""

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest
import torch

import peft_kernels
from peft_kernels import registry

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "peft_kernels"
LAYERS = ["memory", "backends", "registry", "ops", "modules", "methods", "integrations", "demo", "cli"]
CODE = (".py", ".cpp", ".h", ".cu", ".cuh")


def tracked(*suffixes):
    """The project's own files: what git tracks or would track; every file where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(p.relative_to(ROOT)) for p in ROOT.rglob("*")]
    files = [ROOT / n for n in names if n.endswith(suffixes) and not n.startswith((".venv", "build", "."))]
    return sorted(f for f in files if f.is_file())


def imports(path):
    """Dotted names of the peft_kernels modules that a file imports, lazy imports included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", tracked(".py"), ids=lambda p: str(p.relative_to(ROOT)))
def test_lower_layers_do_not_import_higher_ones(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "peft_kernels" or parts[1] not in LAYERS:
        return
    for name in imports(path):
        target = name.split(".")
        if target[0] == "peft_kernels" and len(target) > 1 and target[1] in LAYERS:
            assert LAYERS.index(target[1]) <= LAYERS.index(parts[1]), f"{path.name} imports {name}"
        assert name != "peft_kernels.testing", "the library does not import what serves its tests"


def test_families_do_not_import_each_other():
    families = [d.name for d in (PACKAGE / "ops").iterdir() if (d / "op.py").exists()]
    for family in families:
        for path in (PACKAGE / "ops" / family).glob("*.py"):
            for name in imports(path):
                assert not any(f"ops.{other}" in name for other in families if other != family), f"{path}: {name}"


def test_every_family_has_its_files_and_its_twin():
    for declaration in (PACKAGE / "ops").glob("*/op.py"):
        family = declaration.parent
        for name in ("__init__.py", "reference.py", "README.md"):
            assert (family / name).exists(), f"{family.name} has no {name}"
        assert (ROOT / "csrc" / family.name / f"{family.name}.h").exists()
        assert family.name in registry.ops()


@pytest.mark.parametrize("path", tracked(*CODE), ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400, f"{len(lines)} lines: two ideas in one file"
    assert all(len(line) <= 120 for line in lines), "a line is longer than 120 characters"
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False):
                documented = len(ast.get_docstring(node, clean=False).splitlines())
            else:
                documented = 0
            if isinstance(node, ast.FunctionDef):
                limit = 120 if any("triton.jit" in ast.unparse(d) for d in node.decorator_list) else 60  # kernels
                assert node.end_lineno - node.lineno - documented <= limit, f"{node.name} does not fit a screen"


@pytest.mark.parametrize("path", tracked(*CODE), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_opens_with_what_it_computes(path):
    first = path.read_text().lstrip().splitlines()[:1]
    assert first, "an empty file"
    assert first[0].startswith(('"""', "//", "/*", "#!")), f"opens with {first[0]!r}"


def test_seams():
    for path in tracked(".cpp", ".h", ".cu", ".cuh"):
        text, place = path.read_text(), path.relative_to(ROOT).as_posix()
        if not place.startswith("csrc/bindings/"):
            assert not re.search(r'#include *[<"](torch|ATen|c10)/', text), f"{place} includes torch"
        if not place.startswith(("csrc/common/", "csrc/emulator/")):
            assert not re.search(r"\basm( volatile)? *\(", text), f"{place} spells PTX"
    for path in tracked(".py"):
        place = path.relative_to(ROOT).as_posix()
        if place.startswith("peft_kernels/") and path.name != "backends.py":
            assert not re.search(r"os\.(environ|getenv)", path.read_text()), f"{place} reads the environment"


def test_no_tolerance_numbers_and_nothing_left_open():
    for path in tracked(".py"):
        text = path.read_text()
        if path.parent.name == "python_tests" and path.name != "test_house.py":
            assert not re.search(r"(atol|rtol) *= *[0-9]|allclose\([^)]*[0-9]e-", text), (
                f"{path.name} holds a tolerance"
            )
    for path in tracked(*CODE):
        if path.name != "test_house.py":
            assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text()), f"{path} leaves something open"


def test_names():
    forbidden = {"utils", "helpers", "misc", "v2", "new", "fast", "impl"}
    for path in tracked(*CODE):
        assert not forbidden & set(re.split(r"[_.]", path.name)), f"{path.name}: a name that says nothing"


@pytest.mark.parametrize("name", [n for n in peft_kernels.__all__ if n not in ("backends", "registry")])
def test_public_docstrings(name):
    thing = getattr(peft_kernels, name)
    text = inspect.getdoc(thing) or ""
    assert len(text.splitlines()) >= 3, f"{name} has no docstring to speak of"
    assert ">>>" in text, f"{name} shows no example"


def test_the_private_guards_that_autograd_needs():
    x = torch.ones(2, requires_grad=True)
    for guard in (registry.below_autograd, registry.below_in_place):
        with guard():
            assert (x * 2).grad_fn is None
        assert (x * 2).grad_fn is not None
    for guard, counted in ((registry.below_autograd, True), (registry.below_in_place, False)):
        y = torch.ones(2)
        before = y._version
        with guard():
            y.add_(1)
        assert (y._version > before) == counted


def test_samples_say_why_they_are_there():
    for op in registry.ops().values():
        samples = op.samples()
        assert len({s.id for s in samples}) == len(samples) >= 15
        assert all(s.why and s.dtypes for s in samples)
        assert len({b.id for b in op.bad_inputs()}) == len(op.bad_inputs())


def test_support_table_of_the_readme_is_the_registry():
    assert registry.support_table() in (ROOT / "README.md").read_text()
