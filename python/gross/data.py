"""Images to train, search and test on: in memory where they are small, from files where they are
not."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .arguments import check_flag, check_int, check_path, check_type
from .extras import from_extra

if TYPE_CHECKING:
    from PIL.Image import Image

#: Images up to this side are decoded once and held in memory.
SMALL = 64
#: Of a training split without a validation split, the share that becomes one: 10 000 of CIFAR-10's
#: 50 000.
VALIDATION_SHARE = 0.2
ACCEPTED = "'digits', 'cifar10' and 'folder:PATH'"


@dataclass(frozen=True)
class Normalisation:
    """``(pixel / 255 - mean) / std``, by channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels: Tensor) -> Tensor:
        """float32 inputs ``[N, 3, H, W]``, channels-last, of uint8 pixels."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        count, channels, height, width = pixels.shape
        # Three channels are too few for a vector, a row of the image is enough.
        rows = pixels.permute(0, 2, 3, 1).reshape(count, height, width * channels).float()
        rows.mul_((1 / (255 * std)).repeat(width)).sub_((mean / std).repeat(width))
        return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


#: ICLR 2020 draft, section 4.2: what it calls a variance is the usual standard deviation.
HALF = Normalisation((0.5, 0.5, 0.5), (0.225, 0.225, 0.225))
#: What torchvision's ImageNet weights were trained with.
IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images at random: a crop of the image padded with zeros, and a
    horizontal flip with probability one half."""

    padding: int = 2
    flip: bool = True


@dataclass(frozen=True)
class Shard:
    """The part of every batch that one of ``count`` processes takes."""

    index: int = 0
    count: int = 1


class Split(Protocol):
    """What a split of a data set offers, wherever its images lie."""

    @property
    def labels(self) -> Tensor:
        """int64 ``[N]``."""

    def __len__(self) -> int:
        """How many images."""

    def tensors(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """The first ``count`` images (default: all) as normalised float32 inputs ``[N, 3, H, W]``,
        channels-last, and labels ``[N]``."""

    def batches(
        self, batch_size: int, *, start: int = 0, shard: Shard = Shard()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The images in their order, without augmentation, the last batch as small as it comes
        out."""

    def epoch(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, shard: Shard = Shard()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch's whole batches, shuffled and augmented, from the batch ``start`` on.

        What a batch holds depends on seed, epoch and its number alone."""


@dataclass(frozen=True)
class Images:
    """Images held decoded in memory.

    Attributes:
        pixels: uint8 ``[N, 3, H, W]``, channels-last.
        labels: int64 ``[N]``.
    """

    pixels: Tensor
    labels: Tensor
    normalisation: Normalisation = HALF
    augmentation: Augmentation = Augmentation()

    def __post_init__(self) -> None:
        pixels = self.pixels.contiguous(memory_format=torch.channels_last)
        object.__setattr__(self, "pixels", pixels)

    def __len__(self) -> int:
        return len(self.labels)

    def tensors(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        return self.normalisation(self.pixels[:count]), self.labels[:count]

    def batches(
        self, batch_size: int, *, start: int = 0, shard: Shard = Shard()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(start * batch_size, len(self), batch_size):
            rows = slice(first + shard.index, min(first + batch_size, len(self)), shard.count)
            yield self.normalisation(self.pixels[rows]), self.labels[rows]

    def epoch(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, shard: Shard = Shard()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self), generator=_generator(seed, epoch))
        for batch in range(start, len(self) // batch_size):
            draws = _generator(seed, epoch, batch)
            rows = order[batch * batch_size : (batch + 1) * batch_size]
            images = augmented(self.pixels, rows, self.augmentation, draws, shard)
            yield self.normalisation(images), self.labels[rows[shard.index :: shard.count]]


def augmented(
    pixels: Tensor,
    rows: Tensor,
    augmentation: Augmentation,
    draws: torch.Generator,
    shard: Shard = Shard(),
) -> Tensor:
    """The images ``rows`` of ``pixels`` cropped and flipped at random, all in a few tensor
    operations; channels-last.

    The draws are made for every row, whatever the shard: the shards of a batch are its parts."""
    own = slice(shard.index, None, shard.count)
    padding = augmentation.padding
    top, left = torch.randint(2 * padding + 1, (2, len(rows)), generator=draws)[:, own]
    flipped = torch.randint(2, (len(rows),), generator=draws)[own]
    rows = rows[own]
    count, (channels, height, width) = len(rows), pixels.shape[1:]
    images = pixels.permute(0, 2, 3, 1).flatten(1).index_select(0, rows)
    images = images.view(count, height, width, channels)
    images = F.pad(images, (0, 0, padding, padding, padding, padding))
    # First whole lines of every image, then columns of all images with the same offset and flip:
    # whole runs of bytes move.
    lines = torch.arange(count) * images.shape[1] + top
    lines = (lines[:, None] + torch.arange(height)).flatten()
    images = images.flatten(0, 1).flatten(1).index_select(0, lines)
    images = images.view(count, height, -1, channels)
    cropped = torch.empty(count, height, width, channels, dtype=pixels.dtype)
    for offset in range(2 * padding + 1):
        for flip in (False, True):
            alike = (left == offset) & (flipped == flip if augmentation.flip else not flip)
            alike = alike.nonzero().flatten()
            part = images.index_select(0, alike)[:, :, offset : offset + width]
            cropped.index_copy_(0, alike, part.flip(2) if flip else part)
    return cropped.permute(0, 3, 1, 2)


class ImageFiles:
    """Images that are decoded when they are needed, by worker processes.

    Training images are resized so that their smaller side is ``8/7`` of ``size``, flipped with
    probability one half and cropped at random; others are cropped at the centre (GroSS, section
    4.4).

    Args:
        paths, labels: the files and int64 ``[N]``.
        size: side of an input; 224 with a smaller side of 256.
        workers: processes that decode; by default one for each processor.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        size: int,
        normalisation: Normalisation = IMAGENET,
        workers: int | None = None,
    ) -> None:
        self.paths = list(paths)
        self.labels = labels
        self.size = size
        self.normalisation = normalisation
        self.workers = (os.cpu_count() or 1) if workers is None else workers

    def __len__(self) -> int:
        return len(self.paths)

    def tensors(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        count = len(self) if count is None else min(count, len(self))
        inputs = [self.normalisation(decode(path, self.size)[None]) for path in self.paths[:count]]
        return (
            torch.cat(inputs).contiguous(memory_format=torch.channels_last),
            self.labels[:count],
        )

    def batches(
        self, batch_size: int, *, start: int = 0, shard: Shard = Shard()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self))
        rows = order[start * batch_size :].split(batch_size)
        return self._load([part[shard.index :: shard.count] for part in rows], None)

    def epoch(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, shard: Shard = Shard()
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self), generator=_generator(seed, epoch))
        whole = len(self) // batch_size * batch_size
        rows = order[start * batch_size : whole].split(batch_size)
        return self._load([part[shard.index :: shard.count] for part in rows], (seed, epoch))

    def _load(
        self, rows: list[Tensor], draws: tuple[int, int] | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            _Decoded(self, draws), batch_sampler=_Fixed(rows), num_workers=self.workers
        )
        for pixels, labels in loader:
            inputs = self.normalisation(pixels)
            yield inputs.contiguous(memory_format=torch.channels_last), labels


class _Decoded(Dataset[tuple[Tensor, int]]):
    def __init__(self, files: ImageFiles, draws: tuple[int, int] | None) -> None:
        self.files = files
        self.draws = draws

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        draws = None if self.draws is None else random.Random(f"{self.draws} {row}")
        return decode(self.files.paths[row], self.files.size, draws), int(self.files.labels[row])


class _Fixed(Sampler[list[int]]):
    """Batches that are known beforehand."""

    def __init__(self, rows: list[Tensor]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        return (part.tolist() for part in self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def decode(path: Path, size: int, draws: random.Random | None = None) -> Tensor:
    """An image file as uint8 ``[3, size, size]``: the smaller side resized to 8/7 of ``size``, then
    a crop, at random and perhaps flipped with ``draws``, else at the centre. An image that has the
    size already is taken as it is.

    Raises:
        ValueError: if the file is not an image.
    """
    image = _open(path)
    flip = False
    if image.size != (size, size):
        smaller = round(size * 8 / 7)
        scale = smaller / min(image.size)
        width, height = (max(smaller, round(side * scale)) for side in image.size)
        image = image.resize((width, height))
        left, top = (width - size) // 2, (height - size) // 2
        if draws is not None:
            left, top = draws.randint(0, width - size), draws.randint(0, height - size)
        image = image.crop((left, top, left + size, top + size))
    if draws is not None:
        flip = draws.random() < 0.5
    pixels = _pixels(image)
    return pixels.flip(-1) if flip else pixels


def _open(path: Path) -> Image:
    with from_extra("train"):
        from PIL import Image, UnidentifiedImageError
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"data: {path} is not a whole image: {error}") from error


def _pixels(image: Image) -> Tensor:
    """uint8 ``[3, H, W]``, channels-last."""
    width, height = image.size
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .reshape(height, width, 3)
        .permute(2, 0, 1)
    )


# Data sets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A data set in three parts.

    Attributes:
        name: what :func:`load` was given.
        train, validation, test: the splits. Searches choose by validation alone.
        classes: their names, by label.
        input_size: channels, height and width of an input.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]

    def __str__(self) -> str:
        counts = ", ".join(str(len(part)) for part in (self.train, self.validation, self.test))
        return f"{self.name}: {counts} images of {len(self.classes)} classes, {self.input_size}"


def load(
    name: str = "digits",
    *,
    seed: int = 0,
    root: str | os.PathLike[str] | None = None,
    size: int | None = None,
    download: bool = False,
) -> Data:
    """Load a data set by name.

    Args:
        name: "digits", scikit-learn's 1797 handwritten digits, enlarged from 8×8 to 32×32 pixels of
            three channels; "cifar10", torchvision's copy in ``root``, 40 000, 10 000 and 10 000
            images; "folder:PATH", a tree with ``train/`` and ``val/`` or ``test/``, or all three,
            each with one folder of images a class. Without ``val/`` a fifth of the training images
            are for validation; without ``test/`` the validation images are the test.
        seed: of the split into training and validation images.
        root: where "cifar10" lies, by default ``data``.
        size: side of an input, for folders: by default that of the images where all are square, of
            one size and at most 64 pixels, else 224. Larger inputs are decoded when they are
            needed.
        download: whether "cifar10" may be fetched from its home page.

    Raises:
        ValueError: for an unknown name, or a folder without classes or images, or with other
            classes in one split than in another.
        FileNotFoundError: if there is no such folder, or no CIFAR-10 in ``root``.
        ImportError: if scikit-learn, torchvision or pillow is needed and missing.
    """
    check_type("name", name, str, "a string")
    check_int("seed", seed)
    check_flag("download", download)
    if root is not None:
        root = check_path("root", root)
    if size is not None:
        check_int("size", size, least=8)
    kind, _, path = name.partition(":")
    if kind == "folder" and path:
        return _folder(name, Path(path), seed, size)
    if name not in ("digits", "cifar10"):
        raise ValueError(f"name: got {name!r}, accepted are {ACCEPTED}")
    if size is not None:
        raise ValueError(f"size: got {size} for {name!r}, accepted is one for 'folder:PATH'")
    return _digits(seed) if name == "digits" else _cifar10(Path(root or "data"), seed, download)


def _digits(seed: int) -> Data:
    with from_extra("train"):
        from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(small, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    pixels = large.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    # Flipped digits are other signs.
    train, validation, test = _split(
        pixels, torch.tensor(labels), (1197, 300, 300), seed, Augmentation(flip=False)
    )
    return Data("digits", train, validation, test, tuple(map(str, range(10))), (3, 32, 32))


def _cifar10(root: Path, seed: int, download: bool) -> Data:
    with from_extra():
        from torchvision.datasets import CIFAR10
    try:
        splits = [CIFAR10(root, train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(
            f"data: no CIFAR-10 in {root}, accepted are root, the folder that holds torchvision's "
            "copy, or download=True"
        ) from error
    (pixels, labels), (test_pixels, test_labels) = (
        (torch.from_numpy(split.data).permute(0, 3, 1, 2), torch.tensor(split.targets))
        for split in splits
    )
    train, validation = _split(pixels, labels, (40_000, 10_000), seed)
    return Data(
        "cifar10",
        train,
        validation,
        Images(test_pixels, test_labels),
        tuple(splits[0].classes),
        (3, 32, 32),
    )


def _split(
    pixels: Tensor,
    labels: Tensor,
    counts: Sequence[int],
    seed: int,
    augmentation: Augmentation = Augmentation(),
) -> list[Images]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return [
        Images(pixels[rows], labels[rows], augmentation=augmentation)
        for rows in order.split(list(counts))
    ]


@dataclass(frozen=True)
class _Files:
    """One split of a folder: files and their labels."""

    paths: list[Path]
    labels: Tensor

    def take(self, rows: Tensor) -> _Files:
        return _Files([self.paths[row] for row in rows.tolist()], self.labels[rows])


def _folder(name: str, folder: Path, seed: int, size: int | None) -> Data:
    if not folder.is_dir():
        raise FileNotFoundError(f"data: no folder at {folder}")
    present = [part for part in ("train", "val", "test") if (folder / part).is_dir()]
    if "train" not in present or len(present) < 2:
        raise ValueError(
            f"data: got {folder} with {present or 'none'} of train/, val/, test/; accepted is one "
            "with train/ and val/ or test/"
        )
    classes = _classes(folder / "train")
    for part in present:
        if _classes(folder / part) != classes:
            raise ValueError(
                f"data: got other classes in {folder / part} than in {folder / 'train'}, accepted "
                "are the same folders in both"
            )
    files = {part: _files(folder / part, classes) for part in present}
    if "val" not in files:
        order = torch.randperm(
            len(files["train"].paths), generator=torch.Generator().manual_seed(seed)
        )
        held_out = round(VALIDATION_SHARE * len(order))
        files["val"] = files["train"].take(order[:held_out])
        files["train"] = files["train"].take(order[held_out:])
    side = _side(files["train"]) if size is None else size
    read = _decoded if side <= SMALL else _streamed
    train, validation = read(files["train"], side), read(files["val"], side)
    test = read(files["test"], side) if "test" in files else validation
    return Data(name, train, validation, test, tuple(classes), (3, side, side))


def _classes(folder: Path) -> list[str]:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not classes:
        raise ValueError(f"data: got {folder} without classes, accepted is one folder a class")
    return classes


def _files(folder: Path, classes: Sequence[str]) -> _Files:
    with from_extra():
        from torchvision.datasets.folder import IMG_EXTENSIONS
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            path for path in (folder / name).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS
        )
        if not found:
            raise ValueError(
                f"data: got {folder / name} without images, accepted are files of "
                f"{', '.join(IMG_EXTENSIONS)}"
            )
        paths += found
        labels += [label] * len(found)
    return _Files(paths, torch.tensor(labels))


def _side(files: _Files) -> int:
    """The side of an input for these images: theirs where they are small, square and look alike."""
    some = [files.paths[i] for i in range(0, len(files.paths), max(1, len(files.paths) // 8))]
    sizes = {_open(path).size for path in some}
    (width, height), *others = sizes
    return width if not others and width == height <= SMALL else 224


def _decoded(files: _Files, side: int) -> Split:
    pixels = torch.empty(len(files.paths), side, side, 3, dtype=torch.uint8)
    for row, path in enumerate(files.paths):
        pixels[row] = decode(path, side).permute(1, 2, 0)
    return Images(pixels.permute(0, 3, 1, 2), files.labels)


def _streamed(files: _Files, side: int) -> Split:
    return ImageFiles(files.paths, files.labels, side)


def _generator(*numbers: int) -> torch.Generator:
    """A generator whose state depends on all the numbers, and on nothing else."""
    text = json.dumps(numbers)
    return torch.Generator().manual_seed(random.Random(text).getrandbits(63))
