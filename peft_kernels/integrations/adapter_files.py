"""Adapters in files, PEFT's two: adapter_config.json, with a peft_type of our own, and adapter_model.safetensors."""

import json
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import cached_file

from peft_kernels.integrations import adapterhub
from peft_kernels.integrations.attach import set_active
from peft_kernels.integrations.attachments import (
    add,
    freeze_base,
    note_of,
    plan,
    require_attached,
    root_of,
    shapes,
    tensors_of,
)
from peft_kernels.integrations.prefix_files import KIND, from_peft
from peft_kernels.methods import CONFIGS, Config

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
    tensors = {key: _whole(t.detach()).cpu().contiguous() for key, t in tensors_of(root, name).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP has sharded, from all processes; they all have to save."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load(
    model: nn.Module, source: str | PathLike, name: str = "default", *, trainable: bool = False, freeze: bool = True
) -> tuple[str, ...]:
    """Attaches an adapter that `save_pretrained` has written; returns what `attach` does.

    Adapters of AdapterHub are read too, as its `save_adapter(..., use_safetensors=True)` writes them: seq_bn,
    double_seq_bn, par_bn, scaled_par_bn and what lies between them, for BERT, RoBERTa, BART, T5, GPT-2 and Llama; and
    HF PEFT's prefixes of decoder-only models.

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
    config, tensors = _read(root, source)
    places = plan(root, config, name)
    _check_tensors(shapes(config, places), tensors, source)
    add(root, config, name, places, tensors)
    if freeze:
        freeze_base(root)
    set_active(root, name, trainable=trainable)
    return tuple(places)


def _read(root: nn.Module, source: str | PathLike) -> tuple[Config, dict[str, Tensor]]:
    try:
        about = json.loads(Path(cached_file(source, CONFIG)).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"load: {source} has no {CONFIG} that can be read: {str(error).splitlines()[0]}") from error
    if adapterhub.is_adapterhubs(about):
        config = adapterhub.config_of(about, root, source)
        tensors = _read_tensors(source, adapterhub.WEIGHTS, adapterhub.REMEDY)
        return config, adapterhub.renamed(tensors, about, root, source)
    kind = about.get("peft_type") if isinstance(about, dict) else None
    if kind == KIND:
        return from_peft(root, about, _read_tensors(source, WEIGHTS, "save it again as .safetensors"), source)
    if not isinstance(kind, str) or kind not in CONFIGS:
        raise ValueError(
            f"load: the peft_type in {source} must be {' or '.join(CONFIGS)}, got {kind}; what PEFT has saved is "
            "loaded by PeftModel.from_pretrained"
        )
    about.pop("base_model_name_or_path", None)
    return CONFIGS[kind].from_dict(about), _read_tensors(source, WEIGHTS, "save it again as .safetensors")


def _read_tensors(source: str | PathLike, file: str, remedy: str) -> dict[str, Tensor]:
    try:
        return load_file(cached_file(source, file))
    except OSError as error:
        raise ValueError(f"load: {source} has no {file}; a .bin file is a pickle and is not read: {remedy}") from error
    except SafetensorError as error:
        raise ValueError(f"load: {file} in {source} cannot be read: {error}") from error


def _check_tensors(expected: dict[str, list[int]], tensors: dict[str, Tensor], source: str | PathLike) -> None:
    if strangers := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"load: the model has no place for {strangers[0]} of {source} ({len(strangers)} such tensors)")
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"load: {source} has no {missing[0]}, which its config needs ({len(missing)} such tensors)")
    for key, shape in expected.items():
        if list(tensors[key].shape) != shape:
            raise ValueError(f"load: {key} must have shape {shape} in this model, got {list(tensors[key].shape)}")
        if not tensors[key].is_floating_point() or not tensors[key].isfinite().all():
            got = tensors[key].dtype if not tensors[key].is_floating_point() else "infinities or NaN"
            raise ValueError(f"load: {key} of {source} must hold finite numbers of a floating-point dtype, got {got}")
