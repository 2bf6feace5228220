"""Adapters saved and loaded, in PEFT's two files: adapter_config.json and adapter_model.safetensors."""

import json
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from peft_kernels.integrations.adapter_folders import CONFIG, WEIGHTS, about, check_tensors, read
from peft_kernels.integrations.attach import set_active
from peft_kernels.integrations.attachments import (
    add,
    file_shapes,
    freeze_base,
    note_of,
    plan,
    require_attached,
    require_one_root,
    require_unwrapped,
    root_of,
    tensors_of,
)
from peft_kernels.integrations.blocks import chosen_sites, file_key
from peft_kernels.integrations.prefix_files import to_peft
from peft_kernels.methods import blocks_of


def save_pretrained(model: nn.Module, folder: str | PathLike, name: str = "default") -> None:
    """Writes an adapter in PEFT's form: adapter_config.json and adapter_model.safetensors.

    Raises:
        ValueError: the model has no adapter of that name, or its parameters are offloaded.

    Example:
        >>> peft_kernels.save_pretrained(model, "checkpoints/task", "task")
    """
    root = root_of(model)
    require_one_root(root, "save_pretrained")
    require_attached(root, name, "save_pretrained")
    base = getattr(getattr(root, "config", None), "_name_or_path", None)
    config = note_of(root).configs[name]
    said = config.to_dict() | {"base_model_name_or_path": base or None}
    tensors = tensors_of(root, name)
    if absent := [key for key, tensor in tensors.items() if tensor.is_meta]:
        raise ValueError(f"save_pretrained: {absent[0]} is not there (meta, or offloaded); move it to a device first")
    if blocks := blocks_of(config):
        for site in chosen_sites(root, blocks):
            if not any(key.startswith(file_key(site, "")) for key in tensors):
                raise ValueError(f"save_pretrained: the adapter {name!r} is no longer at {site.name}; attach it again")
    _write(folder, said, tensors)


def export_prefix(model: nn.Module, folder: str | PathLike, name: str = "default") -> None:
    """Writes a prefix in HF PEFT's own form, for `PeftModel.from_pretrained`; `load` reads it too.

    Of decoder-only models, with a prefix in every layer. Where positions are learned (GPT-2, OPT), the prefix must have
    been trained with shift_positions=True, as PEFT has it. A classifier's head goes along. PEFT's logits are ours
    except in layers with a sliding window, which forget PEFT's prefix.

    Raises:
        ValueError: the model has no prefix of that name, or PEFT has no form for it; it says why.

    Example:
        >>> peft_kernels.export_prefix(model, "for_peft", "task")
    """
    root = root_of(model)
    require_one_root(root, "export_prefix")
    require_attached(root, name, "export_prefix")
    _write(folder, *to_peft(root, note_of(root).configs[name], name))


def _write(folder: str | PathLike, said: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors = {key: _whole(tensor.detach()).cpu().contiguous() for key, tensor in tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n")


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor that FSDP has sharded, from all processes; they all have to save."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def load(
    model: nn.Module, source: str | PathLike, name: str = "default", *, trainable: bool = False, freeze: bool = True
) -> tuple[str, ...]:
    """Attaches an adapter that `save_pretrained` has written; returns what `attach` does.

    Adapters of AdapterHub are read too, as its `save_adapter(..., use_safetensors=True)` writes them: seq_bn,
    double_seq_bn, par_bn, scaled_par_bn and what lies between them, for BERT, RoBERTa, BART, T5, GPT-2 and Llama.
    So are the prefixes of PEFT (PREFIX_TUNING) for decoder-only models, with the head that was trained beside one.

    Args:
        source: a folder, or an id of the Hugging Face Hub.
        name: what the adapter is called here, whatever it was called when it was saved. It becomes the active one.
        trainable: whether it is to be trained on.
        freeze: as in `attach`.

    Raises:
        ValueError: a file is missing or of another kind, or does not fit the model; it says which tensor. The model is
            not changed then. Or as in `attach`.

    Example:
        >>> peft_kernels.load(model, "checkpoints/task", "task")
    """
    require_unwrapped(model, "load")
    root = root_of(model)
    said = about(source)
    try:
        config, tensors = read(root, source, said)
        places = plan(root, config, name)
    except ValueError as error:
        raise ValueError(str(error).replace("attach: ", "load: ", 1)) from None
    check_tensors(file_shapes(root, config, places), tensors, source)
    add(root, config, name, places, tensors)
    if freeze:
        freeze_base(root)
    set_active(root, name, trainable=trainable)
    return tuple(places)
