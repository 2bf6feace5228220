"""Adapters in files, PEFT's two: adapter_config.json, with a peft_type of our own, and adapter_model.safetensors."""

import json
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from peft_kernels.integrations.attached import (
    add,
    file_key,
    freeze_base,
    note_of,
    plan,
    require_attached,
    root_of,
    tensors_of,
)
from peft_kernels.integrations.blocks import Site
from peft_kernels.integrations.bottleneck import set_active
from peft_kernels.methods import BottleneckConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_pretrained(model: nn.Module, folder: str | PathLike, name: str = "default") -> None:
    """Writes an adapter in PEFT's form: adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: the model has no adapter of that name.

    Example:
        >>> peft_kernels.save_pretrained(model, "checkpoints/task", "task")
    """
    root = root_of(model)
    require_attached(root, name, "save_pretrained")
    base = getattr(getattr(root, "config", None), "_name_or_path", None)
    about = note_of(root).configs[name].to_dict() | {"base_model_name_or_path": base or None}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors_of(root, name).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")


def load(
    model: nn.Module, source: str | PathLike, name: str = "default", *, trainable: bool = False, freeze: bool = True
) -> tuple[str, ...]:
    """Attaches an adapter that `save_pretrained` has written; returns the names of the blocks that have one.

    Args:
        source: a folder, or an id of the Hugging Face Hub.
        name: what the adapter is called here, whatever it was called when it was saved. It becomes the active one.
        trainable: whether it is to be trained on.
        freeze: as in `attach`.

    Raises:
        ValueError: a file is missing or of another kind, or does not fit the model; it says which tensor. The model is
            not changed then.

    Example:
        >>> peft_kernels.load(model, "checkpoints/task", "task")
    """
    root = root_of(model)
    config, tensors = _read(source)
    sites = plan(root, config, name)
    _check_tensors(config, sites, tensors, source)
    add(root, config, name, sites, tensors)
    if freeze:
        freeze_base(root)
    set_active(root, name, trainable=trainable)
    return tuple(site.name for site in sites)


def _read(source: str | PathLike) -> tuple[BottleneckConfig, dict[str, Tensor]]:
    try:
        about = json.loads(Path(cached_file(source, CONFIG)).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"load: {source} has no {CONFIG} that can be read: {str(error).splitlines()[0]}") from error
    kind = about.get("peft_type") if isinstance(about, dict) else None
    if kind != BottleneckConfig.peft_type:
        raise ValueError(
            f"load: the peft_type in {source} must be {BottleneckConfig.peft_type}, got {kind}; what PEFT has saved is "
            "loaded by PeftModel.from_pretrained"
        )
    about.pop("base_model_name_or_path", None)
    config = BottleneckConfig.from_dict(about)
    try:
        return config, load_file(cached_file(source, WEIGHTS))
    except OSError as error:
        raise ValueError(
            f"load: {source} has no {WEIGHTS}; a .bin file is a pickle and is not read: save it again as .safetensors"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"load: {WEIGHTS} in {source} cannot be read: {error}") from error


def _check_tensors(config: BottleneckConfig, sites: list[Site], tensors: dict[str, Tensor], source) -> None:
    expected = {}
    for site in sites:
        for key, tensor in config.adapter(site.width, "meta").state_dict().items():
            expected[file_key(site, key)] = list(tensor.shape)
    if strangers := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"load: the model has no place for {strangers[0]} of {source} ({len(strangers)} such tensors)")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"load: {source} has no {missing[0]}, which its config needs ({len(missing)} such tensors)")
    for key, shape in expected.items():
        if list(tensors[key].shape) != shape:
            raise ValueError(f"load: {key} must have shape {shape} in this model, got {list(tensors[key].shape)}")
