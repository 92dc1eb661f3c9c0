"""Batch-norm recalibration: the running statistics of one configuration."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..arguments import check_int, check_module, check_type


@torch.no_grad()
def recalibrate(model: nn.Module, inputs: Tensor | Iterable[Tensor], batch_size: int = 250) -> None:
    """Replace the running statistics of every batch norm by those of ``inputs``, in the model's
    present configuration.

    A supernet's statistics are averages over all configurations that it was trained in; each
    configuration has its own. Means and variances are averaged over the batches; 2000 inputs are
    customary. Everything else, modes included, is left as it was.

    Args:
        inputs: model inputs, ``[N, …]`` in one tensor or as batches.
        batch_size: how one tensor is cut.

    Raises:
        ValueError: if there are no inputs.
    """
    check_module("model", model)
    check_int("batch_size", batch_size, least=1)
    check_type("inputs", inputs, Iterable, "a Tensor or an iterable of Tensors")
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
    if not norms:
        return
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    batches = iter(inputs.split(batch_size) if isinstance(inputs, Tensor) else inputs)
    first = next(batches, None)
    if first is None or len(first) == 0:
        raise ValueError("inputs: got none, accepted is at least one batch")
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain average over batches
            norm.train()
        model(first)
        for batch in batches:
            model(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
