"""Every evaluation of a search, on disk as soon as it is known.

A file of JSON lines: the first says what was evaluated and on what, each of the others is one
evaluation. A search that was killed reads them back and repeats none. A group size in 8 bits stands
there as its negative."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gross_kernels.environment import weight_bits

from ..copying import unwrapped
from ..evaluation import Accuracy
from ..supernet import decomposed_layers

#: Raised when journals can no longer be read as they were.
FORMAT = 1
#: Images of a data set that its fingerprint looks at, evenly spaced.
SAMPLES = 64


class Journal:
    """Records of one supernet and one metric.

    Attributes:
        records: those that the file held when it was opened.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, str]) -> None:
        """Open a journal, or begin one.

        Args:
            path: the file; its folder must exist.
            identity: fingerprints by name, such as "supernet" and "metric".

        Raises:
            ValueError: if the file is no journal, or one whose identity differs, with what differs.
            FileNotFoundError: if the folder does not exist.
        """
        self.path = Path(path)
        head = {"format": FORMAT, **identity}
        self.records: list[dict[str, Any]] = []
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        # The last line of a killed process may be cut off.
        whole = [line for line in lines if line.endswith(b"\n")]
        if whole:
            try:
                found, *self.records = map(json.loads, whole)
            except ValueError as error:
                raise ValueError(f"journal: got {self.path}, which is none: {error}") from error
            other = [
                key for key in head if not isinstance(found, dict) or found.get(key) != head[key]
            ]
            if other:
                raise ValueError(
                    f"journal: got {self.path}, which was written for another {', '.join(other)}; "
                    "accepted is one of the same, or a new file"
                )
            if len(whole) < len(lines):
                with open(self.path, "r+b") as file:
                    file.truncate(sum(map(len, whole)))
        else:
            self.path.write_bytes(b"")
            self.append(head)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line, and wait until it is on the disk."""
        with open(self.path, "ab", buffering=0) as file:
            file.write(json.dumps(dict(record)).encode() + b"\n")
            os.fsync(file.fileno())


def fingerprint(supernet: nn.Module) -> str:
    """A hash of the structure and the weights."""
    digest = hashlib.sha256()
    for name, layer in decomposed_layers(supernet).items():
        digest.update(f"{name} {layer.group_sizes} {layer.width}".encode())
    for name, value in unwrapped(supernet).state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def metric_fingerprint(metric: Any) -> str:
    """A hash of an accuracy's data and options; of other metrics their own ``fingerprint``, or
    their qualified name."""
    if not isinstance(metric, Accuracy):
        name = (
            f"{getattr(metric, '__module__', '')}.{getattr(metric, '__qualname__', type(metric))}"
        )
        return str(getattr(metric, "fingerprint", name))
    digest = hashlib.sha256(f"{metric.images} {metric.give_up_below}".encode())
    data: Any = metric.data
    if hasattr(data, "tensors"):
        digest.update(_bytes(data.labels))
        data = data.tensors(SAMPLES)
    if isinstance(data, tuple):
        images, labels = data
        digest.update(f"{tuple(images.shape)} {images.dtype}".encode())
        digest.update(_bytes(labels))
        digest.update(_bytes(images[:: max(1, len(images) // SAMPLES)]))
    else:
        digest.update(f"{type(data)} {len(getattr(data, 'dataset', ()))}".encode())
    return digest.hexdigest()


def calibration_fingerprint(images: Sequence[Tensor]) -> str:
    """A hash of what layers are brought into 8 bits by: the images, and the bits of weights that
    this processor wants."""
    digest = hashlib.sha256(f"{weight_bits()}".encode())
    for batch in images:
        digest.update(f"{tuple(batch.shape)}".encode())
        digest.update(_bytes(batch))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    # Flat first: a dimension of one may have any stride, and bytes need the last to be one.
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
