"""What a training step minimises and what an epoch reports. The loop knows neither: it calls
``loss(model, batch)`` and ``metric(model)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_callable, check_int, check_module
from ..data import Split
from ..devices import moved

#: A scalar from the model and a batch, whatever the loader gives as one.
Loss = Callable[[nn.Module, Any], Tensor]
#: A number from the model in evaluation mode; the more the better.
Metric = Callable[[nn.Module], float]
#: A scalar that is added to a loss.
Penalty = Callable[[], Tensor]
#: How far an output is from the teacher's: a scalar.
Distance = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the logits for inputs and labels."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels)


def accuracy(split: Split, batch_size: int = 500) -> Metric:
    """The metric "percentage of right answers on this split", 0 to 100."""

    check_int("batch_size", batch_size, least=1)
    if not callable(getattr(split, "batches", None)):
        raise TypeError(f"split: got {type(split).__name__}, accepted is a split of a data set")

    @torch.no_grad()
    def percentage(model: nn.Module) -> float:
        device = next(model.parameters()).device
        right = torch.zeros((), dtype=torch.int64, device=device)
        for inputs, labels in split.batches(batch_size):
            right += (model(moved(inputs, device)).argmax(1) == moved(labels, device)).sum()
        return 100 * int(right) / len(split)

    return percentage


def divergence(output: Tensor, target: Tensor) -> Tensor:
    """Kullback–Leibler divergence of the class probabilities from the target's, from logits ``[N,
    classes]``, a mean over the batch."""
    return F.kl_div(
        output.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True
    )


def distillation(teacher: nn.Module, distance: Distance = divergence) -> Loss:
    """The loss "distance of the output from the teacher's", for the first part of a batch.

    Args:
        teacher: gives the targets, in evaluation mode and without gradients; usually the network
            before its decomposition.
        distance: of two outputs; ``torch.nn.functional.mse_loss`` for images.
    """

    check_module("teacher", teacher)
    check_callable("distance", distance, "a function of two Tensors")

    def distance_to_teacher(model: nn.Module, batch: Any) -> Tensor:
        inputs = batch if isinstance(batch, Tensor) else batch[0]
        training = teacher.training
        with torch.no_grad():
            target = teacher.eval()(inputs)
        teacher.train(training)
        return distance(model(inputs), target)

    return distance_to_teacher
