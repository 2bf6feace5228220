"""Folders of adapters: adapter_config.json, with a peft_type of our own, and adapter_model.safetensors, or AdapterHub's
two files. `load` and a pool's `load` read them here."""

import difflib
import json
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

from peft_kernels.integrations import adapterhub
from peft_kernels.integrations.prefix_files import KIND, from_peft
from peft_kernels.methods import CONFIGS, Config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD = "head_config.json"  # AdapterHub's


def about(source: str | PathLike) -> Any:
    """What adapter_config.json says."""
    try:
        return json.loads(Path(cached_file(source, CONFIG)).read_text())
    except (OSError, ValueError) as error:
        if not Path(source).exists():
            raise ValueError(f"load: there is no folder {source}{_nearest(Path(source))}, {_as_id(error)}") from error
        raise ValueError(f"load: {source} has no {CONFIG} that can be read: {_first_line(error)}") from error


def _nearest(folder: Path) -> str:
    there = folder.parent.iterdir() if folder.parent.is_dir() else ()
    near = difflib.get_close_matches(folder.name, [path.name for path in there if path.is_dir()], n=1)
    return f" (did you mean {folder.parent / near[0]}?)" if near else ""


def _as_id(error: Exception) -> str:
    if isinstance(error.__cause__, HFValidationError):
        return "and no id of the Hugging Face Hub is of that form"
    return f"and as an id of the Hugging Face Hub it has no {CONFIG} that can be read: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def is_pefts(said: Any) -> bool:
    """Whether an adapter_config.json is one of HF PEFT: of a peft_type that is none of ours."""
    return isinstance(said, dict) and isinstance(said.get("peft_type"), str) and said["peft_type"] not in CONFIGS


def read(root: nn.Module, source: str | PathLike, said: Any) -> tuple[Config, dict[str, Tensor]]:
    """The config and the tensors of an adapter for a model; `said` is what `about` gave."""
    if adapterhub.is_adapterhubs(said):
        config = adapterhub.config_of(said, root, source)
        _warn_of_head(source)
        tensors = _read_tensors(source, adapterhub.WEIGHTS, adapterhub.REMEDY)
        return config, adapterhub.renamed(tensors, said, root, source)
    kind = said.get("peft_type") if isinstance(said, dict) else None
    if kind == KIND:
        return from_peft(root, said, _read_tensors(source, WEIGHTS, "save it again as .safetensors"), source)
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ValueError(
            f"load: the peft_type in {source} must be {' or '.join(CONFIGS)}, got {kind}; what PEFT has saved is "
            "loaded by PeftModel.from_pretrained"
        )
    fields = {key: value for key, value in said.items() if key != "base_model_name_or_path"}
    return CONFIGS[kind].from_dict(fields), _read_tensors(source, WEIGHTS, "save it again as .safetensors")


def _warn_of_head(source: str | PathLike) -> None:
    """AdapterHub saves the model's head beside an adapter."""
    if cached_file(source, HEAD, _raise_exceptions_for_missing_entries=False) is not None:
        warnings.warn(
            f"load: the head beside the adapter in {source} ({HEAD}, model_head) is not read: the model keeps its own",
            stacklevel=4,
        )


def _read_tensors(source: str | PathLike, file: str, remedy: str) -> dict[str, Tensor]:
    try:
        return load_file(cached_file(source, file))
    except OSError as error:
        raise ValueError(f"load: {source} has no {file}; a .bin file is a pickle and is not read: {remedy}") from error
    except SafetensorError as error:
        raise ValueError(f"load: {file} in {source} cannot be read: {error}") from error


def check_tensors(
    expected: dict[str, list[int]], tensors: dict[str, Tensor], source: str | PathLike, *, finite: bool = True
) -> None:
    """Raises ValueError where the tensors of a file are not those of its config in the model."""
    if strangers := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"load: the model has no place for {strangers[0]} of {source} ({len(strangers)} such tensors)")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"load: {source} has no {missing[0]}, which its config needs ({len(missing)} such tensors)")
    for key, shape in expected.items():
        if list(tensors[key].shape) != shape:
            raise ValueError(f"load: {key} must have shape {shape} in this model, got {list(tensors[key].shape)}")
        if not tensors[key].is_floating_point() or (finite and not tensors[key].isfinite().all()):
            got = tensors[key].dtype if not tensors[key].is_floating_point() else "infinities or NaN"
            raise ValueError(f"load: {key} of {source} must hold finite numbers of a floating-point dtype, got {got}")
