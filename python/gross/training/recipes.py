"""Recipes: how a network is trained, as a TOML file of the package or of the user.

``gross.training.recipes.NAMES`` lists the package's: every schedule of the papers."""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from .sampling import Form, Policy

FOLDER = files("gross") / "recipes"
NAMES = tuple(sorted(entry.name.removesuffix(".toml") for entry in FOLDER.iterdir()))


@dataclass(frozen=True)
class Optimizer:
    """``[optimizer]``.

    Attributes:
        name: stochastic gradient descent with momentum, or AdamW.
        lr: the initial learning rate.
        momentum: of SGD; AdamW has torch's betas.
        weight_decay: as the optimizer's.
        clip: the largest norm of all gradients together; 0 clips nothing.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """``[schedule]``: how the learning rate falls.

    Attributes:
        shape: "steps" multiplies it by ``factor`` after each epoch in ``after``; "cosine" lowers it
            to zero along half a wave.
    """

    shape: Literal["steps", "cosine"] = "steps"
    after: tuple[int, ...] = ()
    factor: float = 0.1

    def scale(self, progress: float, epochs: int) -> float:
        """What the learning rate is multiplied with after ``progress`` epochs of ``epochs``."""
        if self.shape == "cosine":
            return (1 + math.cos(math.pi * progress / epochs)) / 2
        return math.prod(self.factor for epoch in self.after if epoch <= progress)


@dataclass(frozen=True)
class Sampling:
    """``[sampling]``: which configurations a supernet's steps run, see :class:`gross.Sampler`."""

    policy: Policy = "uniform"
    alpha: float = 4.0
    form: Form = "relative"


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        description: what it is and where it is from.
        epochs, batch_size: the batch is that of all processes together; what is left of an epoch
            that it does not divide waits for the next shuffle.
        objective: "task" is the caller's loss, "response" is response reconstruction (ICLR 2020
            draft, equation 9).
        trains: "all" parameters, or those of the "decomposition" alone: the terms, without biases.
        batch_norm: whether running statistics are "updated" or "frozen", as in evaluation.
        precision: "bfloat16" is autocast, the weights stay float32.
        compile: run the model through ``torch.compile``; one graph serves every configuration.
        checkpoint_minutes: the longest time between checkpoints; there is one after every epoch.
    """

    description: str = ""
    epochs: int = 15
    batch_size: int = 256
    objective: Literal["task", "response"] = "task"
    trains: Literal["all", "decomposition"] = "all"
    batch_norm: Literal["updated", "frozen"] = "updated"
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    checkpoint_minutes: float = 10.0
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        least: dict[str, float] = {
            "epochs": 1,
            "batch_size": 1,
            "optimizer.lr": 0,
            "optimizer.momentum": 0,
            "optimizer.weight_decay": 0,
            "optimizer.clip": 0,
            "schedule.factor": 0,
            "checkpoint_minutes": 0,
        }
        values = self.flat()
        for key, bound in least.items():
            if not (math.isfinite(values[key]) and values[key] >= bound):
                raise ValueError(
                    f"{key}: got {values[key]}, accepted are finite numbers of at least {bound}"
                )
        if not math.isfinite(self.sampling.alpha):
            raise ValueError(
                f"sampling.alpha: got {self.sampling.alpha}, accepted is a finite number"
            )
        after = self.schedule.after
        if list(after) != sorted(set(after)) or any(epoch < 1 for epoch in after):
            raise ValueError(
                f"schedule.after: got {after}, accepted are ascending epochs of at least 1"
            )

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """A recipe of the package by its name, or a TOML file by its path.

        Raises:
            ValueError: naming the key, for one that is unknown or has a value that is not accepted.
            FileNotFoundError: if there is neither such a recipe nor such a file.
        """
        text = str(source)
        if text in NAMES:
            content = (FOLDER / f"{text}.toml").read_text(encoding="utf-8")
        elif text.endswith(".toml") and Path(text).is_file():
            content = Path(text).read_text(encoding="utf-8")
        else:
            near = difflib.get_close_matches(text, NAMES, n=3) or NAMES
            raise FileNotFoundError(
                f"recipe: got {text!r}, accepted are a .toml file, or one of {len(NAMES)} names "
                f"such as {', '.join(near)}"
            )
        try:
            return _build(cls, tomllib.loads(content), "")
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"recipe: {text} is not TOML: {error}") from error
        except ValueError as error:
            raise ValueError(f"recipe {text}: {error}") from error

    def override(self, values: Mapping[str, Any]) -> Self:
        """The recipe with other values, by key: ``{"epochs": 3, "optimizer.lr": 0.02}``.

        Raises:
            ValueError: naming the key.
        """
        content = dataclasses.asdict(self)
        for key, value in values.items():
            *path, last = key.split(".")
            table = content
            for part in path:
                table = table[part] if isinstance(table.get(part), dict) else {}
            if last not in table:
                raise _unknown(key, self.flat())
            table[last] = value
        return _build(type(self), content, "")

    def flat(self) -> dict[str, Any]:
        """Every value by its key: ``{"epochs": 15, "optimizer.lr": 0.02, …}``."""
        flat: dict[str, Any] = {}
        for key, value in dataclasses.asdict(self).items():
            if isinstance(value, dict):
                flat |= {f"{key}.{inner}": v for inner, v in value.items()}
            else:
                flat[key] = value
        return flat


def parse(text: str) -> tuple[str, Any]:
    """Key and value of ``optimizer.lr=0.02``: the value is TOML, or a string without quotes.

    Raises:
        ValueError: if there is no key.
    """
    key, equals, value = text.partition("=")
    if not key.strip() or not equals:
        raise ValueError(f"got {text!r}, accepted is KEY=VALUE, such as optimizer.lr=0.02")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _build(kind: Any, content: Mapping[str, Any], prefix: str) -> Any:
    """A dataclass from what TOML gave, each value checked against its field's type."""
    hints = get_type_hints(kind)
    for key in content:
        if key not in hints:
            raise _unknown(prefix + key, [prefix + name for name in hints])
    return kind(**{key: _value(prefix + key, hints[key], value) for key, value in content.items()})


def _value(key: str, kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ValueError(f"{key}: got {value!r}, accepted is a table")
        return _build(kind, value, f"{key}.")
    if get_origin(kind) is Literal:
        accepted = " and ".join(map(repr, get_args(kind)))
        fits = value in get_args(kind)
    elif isinstance(kind, types.GenericAlias):
        accepted = "an array of ints"
        fits = isinstance(value, list | tuple) and all(type(part) is int for part in value)
        value = tuple(value) if fits else value
    elif kind is float:
        accepted = "a number"
        fits = type(value) in (int, float)
        value = float(value) if fits else value
    else:
        accepted = {int: "an int", bool: "true or false", str: "a string"}[kind]
        fits = type(value) is kind
    if not fits:
        raise ValueError(f"{key}: got {value!r}, accepted is {accepted}")
    return value


def _unknown(key: str, accepted: Any) -> ValueError:
    near = difflib.get_close_matches(key, list(accepted), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{key}: unknown, accepted are {', '.join(accepted)}{hint}")
