"""Checkpoints: one safetensors file each, its header saying where in the run it is.

The states of model, optimizer and sampler are all there is to keep: data order, augmentation,
dropout and learning rate depend on the seed and the number of the step alone."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import weights
from .sampling import Sampler

KEY = "gross-checkpoint"
FORMAT = 1
#: So many of the latest files are kept: if the last one is broken, the one before serves.
KEPT = 2


@dataclass
class Position:
    """Where a run is.

    Attributes:
        step: updates of the weights done.
        epoch: epochs done.
        batch: batches done of the epoch after those.
        loss: the sum of these batches' losses.
        seconds: spent in the run so far.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in a folder.

    Args:
        folder: where the files are.
        model: whose parameters and buffers are kept.
        optimizer: whose state is kept.
        parameters: what it trains, by name.
        sampler: None for a network that has one configuration.
    """

    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: Mapping[str, nn.Parameter]
    sampler: Sampler | None

    def save(self, position: Position) -> Path:
        """Write a checkpoint, whole or not at all, and delete those that are too old.

        Raises:
            FloatingPointError: if a weight is not finite, naming it; nothing is written.
            OSError: if it cannot be written; the earlier ones are untouched.
        """
        tensors = {f"model.{name}": tensor for name, tensor in self._model_state().items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise FloatingPointError(name.removeprefix("model."))
        scalars: dict[str, Any] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                kept = tensors if isinstance(value, Tensor) else scalars
                kept[f"optimizer.{name}.{key}"] = value
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = {
            "format": FORMAT,
            "position": asdict(position),
            "optimizer": scalars,
            "sampler": None if self.sampler is None else self.sampler.state_dict(),
            "crc32": _checksum(tensors),
        }
        path = self.folder / f"checkpoint-{position.step:09d}.safetensors"
        weights.write_safetensors(path, tensors, {KEY: json.dumps(content)})
        for old in self.paths()[:-KEPT]:
            old.unlink(missing_ok=True)
        return path

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        return sorted(self.folder.glob("checkpoint-*.safetensors"))

    def restore(self) -> tuple[Position, list[str]]:
        """Put model, optimizer and sampler where the latest whole checkpoint has them.

        Returns:
            The position, the beginning if there is no checkpoint; and what is wrong with the files
            that were passed over.

        Raises:
            ValueError: if there are checkpoints and none is whole, or they are of another model.
        """
        broken: list[str] = []
        for path in reversed(self.paths()):
            try:
                tensors, content = _read(path)
            except ValueError as error:
                broken.append(str(error))
                continue
            self._load(path, tensors, content)
            return Position(**content["position"]), broken
        if broken:
            raise ValueError(f"resume: no checkpoint is whole; {'; '.join(broken)}")
        return Position(), broken

    def _load(self, path: Path, tensors: dict[str, Tensor], content: Mapping[str, Any]) -> None:
        state = self._model_state()
        kept = {
            name.removeprefix("model."): tensor
            for name, tensor in tensors.items()
            if name.startswith("model.")
        }
        if {name: tensor.shape for name, tensor in state.items()} != {
            name: tensor.shape for name, tensor in kept.items()
        }:
            raise ValueError(f"resume: {path} is of another model than this one")
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(kept[name])
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            prefix = f"optimizer.{name}."
            held: dict[str, Any] = {
                key.removeprefix(prefix): value
                for key, value in (tensors | content["optimizer"]).items()
                if key.startswith(prefix) and "." not in key.removeprefix(prefix)
            }
            for key, value in held.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    # In the parameter's memory format, as the optimizer makes it.
                    held[key] = torch.empty_like(parameter, requires_grad=False).copy_(value)
            if held:
                self.optimizer.state[parameter] = held
        if self.sampler is not None:
            self.sampler.load_state_dict(content["sampler"])

    def _model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers under their first names; a safetensors file has no tensor
        twice."""
        state: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                state[name] = tensor
        return state


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a checkpoint.

    Raises:
        ValueError: if it is not whole.
    """
    tensors = weights.read_safetensors(path)
    try:
        content = json.loads(weights.read_metadata(path)[KEY])
        whole = content["format"] == FORMAT and content["crc32"] == _checksum(tensors)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a checkpoint") from error
    if not whole:
        raise ValueError(f"{path} is damaged: its checksum differs")
    return tensors, content


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names and bytes: safetensors itself notices only a file of the wrong length."""
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(name.encode(), checksum)
        flat = tensors[name].contiguous().view(-1)
        if flat.numel():
            checksum = zlib.crc32(flat.view(torch.uint8).numpy().data, checksum)
    return checksum
