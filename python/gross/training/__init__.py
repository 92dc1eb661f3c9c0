"""Training: parts for anybody's loop, and a loop made of them."""

from .batch_norm import recalibrate
from .loop import DivergenceError, History, Interrupted, finetune, train
from .losses import accuracy, cross_entropy, distillation
from .recipes import Recipe
from .reconstruct import ResponseLoss
from .sampling import Sampler

__all__ = [
    "DivergenceError",
    "History",
    "Interrupted",
    "Recipe",
    "ResponseLoss",
    "Sampler",
    "accuracy",
    "cross_entropy",
    "distillation",
    "finetune",
    "recalibrate",
    "train",
]
