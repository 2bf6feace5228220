"""Fine-tuning without adapters, which adapters are compared with: all parameters, or those of the top layers."""

from torch import nn

from peft_kernels.integrations.blocks import sites_of


def train_all(model: nn.Module) -> None:
    """Full fine-tuning: every parameter is trained.

    >>> peft_kernels.train_all(model)
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)


def train_top_layers(model: nn.Module, k: int) -> tuple[str, ...]:
    """Only the last k layers are trained (FT-top-k: Li and Liang 2021, arXiv:2101.00190); returns their names.

    Embeddings, final norms and heads are frozen too; a head that is new sets `requires_grad_` afterwards. Of an encoder
    and a decoder, the last layers are the decoder's.

    Raises:
        ValueError: the model has no known layers, or fewer than k.

    Example:
        >>> peft_kernels.train_top_layers(model, 2)
    """
    layers = tuple(dict.fromkeys(site.layer_name for site in sites_of(model)))
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(layers):
        raise ValueError(f"train_top_layers: k must be from 1 to {len(layers)}, the layers that are known, got {k!r}")
    model.requires_grad_(False)
    for name in layers[-k:]:
        model.get_submodule(name).requires_grad_(True)
    return layers[-k:]
