"""Arguments of the public functions, checked before any work.

Every error has the form "name: got X, accepted is Y". Numbers of numpy and tensors of one element
are taken where Python's own would be, and become Python's own, so that nothing else reaches a file
or a report."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


def check_type(name: str, value: object, types: type[T] | tuple[type, ...], accepted: str) -> Any:
    """``value``, if it is an instance of ``types``.

    Raises:
        TypeError: if not.
    """
    if not isinstance(value, types):
        raise TypeError(f"{name}: got {_shown(value)}, accepted is {accepted}")
    return value


def check_module(name: str, value: object) -> nn.Module:
    """``value``, if it is a module; TypeError if not."""
    module: nn.Module = check_type(name, value, nn.Module, "a torch.nn.Module")
    return module


def check_tensor(name: str, value: object) -> Tensor:
    """``value``, if it is a tensor; TypeError if not."""
    tensor: Tensor = check_type(name, value, Tensor, "a Tensor")
    return tensor


def check_callable(name: str, value: object, accepted: str) -> None:
    """Raise TypeError if ``value`` cannot be called."""
    if not callable(value):
        raise TypeError(f"{name}: got {_shown(value)}, accepted is {accepted}")


def check_flag(name: str, value: object) -> bool:
    """``value``, if it is True or False; TypeError if not."""
    flag: bool = check_type(name, value, bool, "True or False")
    return flag


def check_int(name: str, value: object, least: int | None = None) -> int:
    """``value`` as Python's int.

    Raises:
        TypeError: if it is none (True and False are none).
        ValueError: if it is below ``least``.
    """
    accepted = "an int" if least is None else f"an int of at least {least}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: got {_shown(value)}, accepted is {accepted}") from error
    if least is not None and number < least:
        raise ValueError(f"{name}: got {number}, accepted is {accepted}")
    return number


def check_ints(name: str, value: object, least: int | None = None) -> tuple[int, ...]:
    """A sequence of ints, a one-dimensional array or tensor among them, as a tuple of Python's.

    Raises:
        TypeError, ValueError: as :func:`check_int`.
    """
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: got {_shown(value)}, accepted is a sequence of ints")
    try:
        entries = tuple(value)
    except TypeError as error:  # A tensor without dimensions.
        raise TypeError(f"{name}: got {_shown(value)}, accepted is a sequence of ints") from error
    return tuple(check_int(f"{name}[{i}]", entry, least) for i, entry in enumerate(entries))


def check_pair(name: str, value: object, least: int = 1) -> tuple[int, int]:
    """An int or a pair of ints as a pair of Python's.

    Raises:
        TypeError, ValueError: as :func:`check_int`, or if there are not two.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        values = check_ints(name, value, least)
        if len(values) != 2:
            raise ValueError(f"{name}: got {value!r}, accepted is an int or a pair of ints")
        return values
    number = check_int(name, value, least)
    return number, number


def check_number(
    name: str, value: object, accepted: str, low: float = 0.0, *, open_below: bool = False
) -> float:
    """``value`` as a finite float of at least ``low``, or above it with ``open_below``.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range.
    """
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: got {_shown(value)}, accepted is {accepted}") from error
    if not math.isfinite(number) or number < low or (open_below and number == low):
        raise ValueError(f"{name}: got {number}, accepted is {accepted}")
    return number


def check_numbers(name: str, value: object, accepted: str) -> tuple[float, ...]:
    """A sequence of finite numbers as a tuple of Python's floats.

    Raises:
        TypeError, ValueError: as :func:`check_number`.
    """
    check_type(name, value, Iterable, accepted)
    entries: Any = value
    return tuple(
        check_number(f"{name}[{i}]", x, accepted, -math.inf) for i, x in enumerate(entries)
    )


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    """``value``, if it is one of ``choices``.

    Raises:
        TypeError: if it is no string.
        ValueError: if it is another one.
    """
    accepted = f"one of {', '.join(map(repr, choices))}"
    choice: str = check_type(name, value, str, accepted)
    if choice not in choices:
        raise ValueError(f"{name}: got {choice!r}, accepted is {accepted}")
    return choice


def check_path(name: str, value: object) -> Path:
    """``value`` as a path; TypeError if it is none."""
    return Path(check_type(name, value, (str, os.PathLike), "a path"))


def _shown(value: object) -> str:
    """A value in an error: as it is written where that is short, and its type."""
    text = repr(value) if isinstance(value, str | int | float | None | tuple | list) else ""
    kind = type(value).__name__
    return f"{text} of type {kind}" if 0 < len(text) <= 60 else kind
