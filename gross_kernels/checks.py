"""What is refused of a user's arguments, in the user's words: "name: got …, accepted is …"."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .geometry import integer

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_input(input: Tensor, weight: Tensor) -> None:
    """Check an input's type, dimensions, device and dtype against a layer's weight."""
    if not isinstance(input, Tensor):
        raise TypeError(f"input: got {type(input).__name__}, accepted is a Tensor")
    if input.dim() not in (3, 4):
        raise ValueError(
            f"input: got shape {tuple(input.shape)}, accepted is [N, C_in, H, W] or [C_in, H, W]"
        )
    if input.device != weight.device:
        raise ValueError(
            f"input: got device {input.device}, accepted is the terms' device {weight.device}"
        )
    if input.dtype is not weight.dtype or input.dtype not in DTYPES:
        check_input_dtype(input.dtype, weight.dtype, input.device.type)


def check_input_dtype(
    dtype: torch.dtype, weight: torch.dtype, device: str, name: str = "input"
) -> None:
    """Check an input's dtype against the weight's."""
    if dtype not in DTYPES:
        raise TypeError(
            f"{name}: got {dtype!r}, accepted are float32, float64, float16 and bfloat16"
        )
    if dtype == weight or (weight == torch.float32 and dtype.itemsize == 2):
        return
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and torch.float64 not in (dtype, weight):
        return
    raise TypeError(
        f"{name}: got {dtype} with terms of {weight}, accepted are equal dtypes, or float32 terms "
        "with a float16 or bfloat16 input"
    )


def check_input_channels(input: Tensor, in_channels: int) -> None:
    """Check the number of an input's channels."""
    if input.shape[-3] != in_channels:
        raise ValueError(
            f"input: got {input.shape[-3]} channels in shape {tuple(input.shape)}, accepted are "
            f"{in_channels}"
        )


def check_terms(terms: Iterable[Tensor]) -> list[Tensor]:
    """Check the types of a series' terms, and that they agree with one another in all but their
    group size."""
    if isinstance(terms, Tensor) or not isinstance(terms, Iterable):
        raise TypeError(f"terms: got {type(terms).__name__}, accepted is a sequence of Tensors")
    terms = list(terms)
    if not terms:
        raise ValueError("terms: got none, accepted is at least one")
    for i, term in enumerate(terms):
        if not isinstance(term, Tensor):
            raise TypeError(f"terms[{i}]: got {type(term).__name__}, accepted is a Tensor")
        if term.dim() != 4 or 0 in term.shape:
            raise ValueError(
                f"terms[{i}]: got shape {tuple(term.shape)}, accepted is [C_out, group size, kh, "
                "kw]"
            )
    first = terms[0]
    for i, term in enumerate(terms):
        if term.shape[0] != first.shape[0] or term.shape[2:] != first.shape[2:]:
            raise ValueError(
                f"terms[{i}]: got shape {tuple(term.shape)}, accepted is that of terms[0], "
                f"{tuple(first.shape)}, up to the group size"
            )
        if term.dtype != first.dtype:
            raise TypeError(
                f"terms[{i}]: got {term.dtype}, accepted is that of terms[0], {first.dtype}"
            )
        if term.device != first.device:
            raise ValueError(
                f"terms[{i}]: got device {term.device}, accepted is that of terms[0], "
                f"{first.device}"
            )
    return terms


def check_gates(gates: Tensor | None, terms: Sequence[Tensor]) -> None:
    """Check the gates' type, shape, dtype and device against the terms that they scale."""
    if gates is None:
        return
    if not isinstance(gates, Tensor):
        raise TypeError(
            f"gates: got {type(gates).__name__}, accepted is a Tensor of shape [{len(terms)}] or "
            "None"
        )
    if gates.shape != (len(terms),):
        raise ValueError(
            f"gates: got shape {tuple(gates.shape)}, accepted is one per term, [{len(terms)}]"
        )
    if gates.dtype not in (terms[0].dtype, torch.float32):
        raise TypeError(
            f"gates: got {gates.dtype}, accepted are the terms' {terms[0].dtype} and float32"
        )
    if gates.device != terms[0].device:
        raise ValueError(
            f"gates: got device {gates.device}, accepted is the terms' {terms[0].device}"
        )


def check_active(active: int | Tensor | None, count: int) -> Tensor:
    """``active`` as the operator takes it: a 0-dimensional int64 tensor on the host."""
    if active is None:
        active = count
    if isinstance(active, Tensor):
        if active.dtype != torch.int64 or active.dim() != 0 or active.device.type != "cpu":
            raise TypeError(
                f"active: got a tensor of {active.dtype}, shape {tuple(active.shape)} on "
                f"{active.device}, accepted is a 0-dimensional int64 tensor on the CPU"
            )
        # Inside a compiled graph the value is not known; the kernel checks it there.
        if torch.compiler.is_compiling() or 1 <= int(active) <= count:
            return active
        active = int(active)
    else:
        accepted = "an int, a 0-dimensional int64 tensor or None"
        active = integer("active", active, accepted=accepted)
    if not 1 <= active <= count:
        raise ValueError(f"active: got {active}, accepted is 1 to {count}, the number of terms")
    return torch.tensor(active, dtype=torch.int64, device="cpu")


def check_flag(name: str, value: bool) -> bool:
    """Check that a value is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, accepted are True and False")
    return value


def check_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Check a dtype that parameters can have, or None for torch's default."""
    accepted = "accepted are torch.float32, float64, float16, bfloat16 and None"
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype: got {dtype!r}, {accepted}")
    if dtype is None and torch.get_default_dtype() not in DTYPES:
        raise TypeError(f"dtype: got torch's default {torch.get_default_dtype()}, {accepted}")
    return dtype


def check_device(device: Any) -> torch.device | None:
    """Check what names a device, or None for torch's default."""
    try:
        return None if device is None else torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise type(error)(
            f"device: got {device!r}, accepted is a torch.device, its name, an index or None"
        ) from error


def check_one_of(name: str, value: str, accepted: tuple[str, ...]) -> str:
    """Check that a word is one of those ``accepted``."""
    if not isinstance(value, str) or value not in accepted:
        listed = ", ".join(map(repr, accepted))
        raise ValueError(f"{name}: got {value!r}, accepted are {listed}")
    return value


def check_group_size(value: int, group_sizes: tuple[int, ...]) -> int:
    """Check that a group size is one of a layer's."""
    try:
        size = integer("group_size", value)
    except TypeError:
        size = 0
    if size not in group_sizes:
        raise ValueError(f"group_size: got {value!r}, accepted are {group_sizes}")
    return size
