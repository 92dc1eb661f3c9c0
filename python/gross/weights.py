"""Tensors on disk: weight files are read whole, written whole, and put into a model whole or not at
all."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .arguments import check_path
from .copying import plain_name
from .extras import from_extra

if TYPE_CHECKING:
    from safetensors import safe_open

#: What torch's reader was seen to raise on 11 000 files with bytes changed or cut off; it trusts
#: the stream's structure.
BROKEN = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)
#: How many names an error lists before it only counts.
NAMES_SHOWN = 5


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a local weight file, on the CPU.

    Args:
        path: a ``.safetensors`` file, or one written by ``torch.save`` (read with
            ``weights_only=True``): a state dict, bare or under the key "state_dict".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is broken, or holds something else than tensors.
    """
    path = check_path("weights", path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    _check_is_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"weights: {path} is not a whole file of tensors written by torch.save: {reason}"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise ValueError(
            f"weights: {path} holds no state dict, accepted are tensors by name, bare or in "
            "'state_dict'"
        )
    return dict(content)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a whole safetensors file.
    """
    with _open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata in the header of a safetensors file; the tensors are not read. Raises as
    :func:`read_safetensors`."""
    with _open_safetensors(path) as file:
        return file.metadata() or {}


@contextmanager
def _open_safetensors(path: str | os.PathLike[str]) -> Iterator[safe_open]:
    with from_extra():
        from safetensors import SafetensorError, safe_open
    _check_is_file(path)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"weights: {path} is not a whole safetensors file: {error}") from error


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Put a safetensors file in place of ``path`` at once: whoever reads it finds the old file or
    the new one, whole.

    Raises:
        FileNotFoundError: if the folder does not exist.
        OSError: if the file cannot be written, as on a full disk.
    """
    with from_extra():
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: got {path}, accepted is a file in a folder that exists")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, part, dict(metadata)
        )
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def load(
    model: nn.Module, tensors: Mapping[str, Tensor], source: object, *, assign: bool = False
) -> None:
    """Load ``tensors`` into ``model``. All names, shapes and types are compared first, so that
    nothing is half-loaded.

    Args:
        source: where the tensors are from, for the error.
        assign: make the tensors the model's own (for a model on the meta device), instead of
            copying into the model's.

    Raises:
        ValueError: if names or shapes differ, or a tensor has another type than the model's and
            they are not both floating point.
    """
    state = model.state_dict()
    names = {plain_name(name): name for name in state}
    expected = {name: state[own] for name, own in names.items()}
    differences = {
        "missing": [name for name in expected if name not in tensors],
        "not in the model": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in tensors and tensors[name].shape != tensor.shape
        ],
        "of another type": [
            f"{name} {tensors[name].dtype} for {tensor.dtype}"
            for name, tensor in expected.items()
            if name in tensors and not _can_be_cast(tensors[name].dtype, tensor.dtype)
        ],
    }
    found = [f"{what}: {_some(names)}" for what, names in differences.items() if names]
    if found:
        raise ValueError(f"weights: {source} does not fit the model; {'; '.join(found)}")
    own_names = {names[name]: tensor for name, tensor in tensors.items()}
    model.load_state_dict(own_names, assign=assign)


def _can_be_cast(stored: torch.dtype, to: torch.dtype) -> bool:
    """Integers in place of floating point would be taken for weights of any size."""
    return stored == to or (stored.is_floating_point and to.is_floating_point)


def _check_is_file(path: str | os.PathLike[str]) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: no file at {path}")


def _some(names: list[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
