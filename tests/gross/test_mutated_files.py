"""Files that were changed after they had been written, by chance or on purpose: each is loaded
whole or refused with a ValueError that names it."""

import copy
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gross
import pytest
import safetensors.torch
import torch
from gross import networks, storage
from torch import nn

#: Values that take the place of others: other types, and numbers out of range.
VALUES = (None, True, -1, 0, 7, 10**30, 1.5, "x", "", [], {}, [1], [[1, 2]], {"a": 1}, [None, "b"])
#: Types of tensors, right and wrong ones, as a header names them.
TYPES = ("F32", "F64", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "X9", "")


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("files") / "whole.safetensors"
    supernet = gross.decompose(
        networks.build("4-layer", num_classes=3),
        {"features.3": (1, 4), "features.6": (2, 8)},
        sweeps=1,
        input_size=(3, 32, 32),
        quiet=True,
    )
    gross.save(supernet, path, provenance={"epochs": 3, "data": {"name": ["digits"]}})
    return path


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: dict[str, Any], tensors: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value out of JSON, with each key or position in it."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def changed(value: Any, chance: random.Random) -> Any:
    """A value with one entry replaced, left out, renamed or doubled."""
    value = copy.deepcopy(value)
    container, key = chance.choice(list(places(value)))
    match chance.randrange(4):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):
            container[f"{key}x"] = container.pop(key)
        case 2 if isinstance(container, list):
            container.append(container[key])
        case _:
            container[key] = chance.choice(VALUES)
    return value


def mutated(content: bytes, chance: random.Random) -> bytes:
    """The file with one thing changed: bits, its length, the header's length, a type, a shape, a
    name, or an entry of the description."""
    header, tensors = parts(content)
    described = json.loads(header["__metadata__"][storage.KEY])
    tensor = chance.choice([name for name in header if name != "__metadata__"])
    match chance.randrange(8):
        case 0:
            broken = bytearray(content)
            for _ in range(chance.randint(1, 8)):
                broken[chance.randrange(len(content) - len(tensors))] ^= 1 << chance.randrange(8)
            return bytes(broken)
        case 1:
            return content[: chance.randrange(len(content))]
        case 2:
            return struct.pack("<Q", chance.choice([0, 1, 2**63, len(content)])) + content[8:]
        case 3:
            header[tensor]["dtype"] = chance.choice(TYPES)
        case 4:
            header[tensor]["shape"] = chance.choice(
                [[], [1], [0, 4], header[tensor]["shape"][::-1]]
            )
        case 5:
            header[f"{tensor}x"] = header.pop(tensor)
        case _:
            described = changed(described, chance)
    header["__metadata__"][storage.KEY] = json.dumps(described)
    return joined(header, tensors)


def check(path: Path) -> bool:
    """Whether a file is loaded; False if it is refused as it has to be."""
    try:
        supernet = gross.load(path)
    except ValueError as error:
        refused = str(error)
    else:
        assert all(each.is_floating_point() for each in supernet.parameters())
        supernet(torch.zeros(1, 3, 32, 32))
        str(storage.describe(path).decomposition)
        return True
    assert path.name in refused
    return False


def sweep(file: Path, tmp_path: Path, numbers: range) -> int:
    content, path = file.read_bytes(), tmp_path / "mutated.safetensors"
    loaded = 0
    for number in numbers:
        path.write_bytes(mutated(content, random.Random(number)))
        loaded += check(path)
    return loaded


def test_a_mutated_file_is_loaded_or_refused_by_name(file, tmp_path):
    """Catches AttributeError, RecursionError and the like out of the middle of a reader. Some
    changes (a time, a name in the report) do no harm, so some files are loaded."""
    assert check(file)
    assert 0 < sweep(file, tmp_path, range(150)) < 50


@pytest.mark.sweep
def test_many_mutated_files_are_loaded_or_refused_by_name(file, tmp_path):
    """Catches what 150 mutations do not reach."""
    sweep(file, tmp_path, range(150, 3000))


@pytest.mark.parametrize("depth", [60, 900, 5000, 100_000])
@pytest.mark.parametrize("entry", ["layers", "provenance", None])
def test_a_description_nested_without_end_is_refused(file, tmp_path, depth, entry):
    """Catches a RecursionError, here or where the description is shown."""
    header, tensors = parts(file.read_bytes())
    described = json.loads(header["__metadata__"][storage.KEY])
    nested = "[" * depth + "]" * depth
    text = nested if entry is None else json.dumps(described | {entry: {"a": "NESTED"}})
    header["__metadata__"][storage.KEY] = text.replace('"NESTED"', nested)
    (tmp_path / "nested.safetensors").write_bytes(joined(header, tensors))
    with pytest.raises(ValueError, match=r"nested\.safetensors"):
        gross.load(tmp_path / "nested.safetensors")


def stored_as(file: Path, path: Path, dtype: torch.dtype) -> Path:
    """The file with its classifier's bias in another type."""
    header, _ = parts(file.read_bytes())
    tensors = safetensors.torch.load_file(file)
    tensors["classifier.3.bias"] = torch.full_like(tensors["classifier.3.bias"], 9).to(dtype)
    safetensors.torch.save_file(tensors, path, header["__metadata__"])
    return path


def test_floating_types_are_cast_and_others_are_refused_by_name(file, tmp_path):
    """Catches integers that are loaded as weights: a bias of 1e9, silently."""
    path = tmp_path / "types.safetensors"
    model = networks.build("4-layer", num_classes=3)
    for dtype in (torch.float64, torch.bfloat16):
        loaded = gross.load(stored_as(file, path, dtype), model)
        assert loaded.classifier[3].bias.dtype == torch.float32
        assert loaded.classifier[3].bias.tolist() == [9] * 3
    for dtype in (torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64):
        for into in (None, model):
            message = rf"of another type: classifier\.3\.bias {dtype} for torch\.float32"
            with pytest.raises(ValueError, match=message):
                gross.load(stored_as(file, path, dtype), into)


def test_views_and_other_buffers_are_saved(tmp_path):
    """Catches safetensors' own error about tensors that share memory: a buffer cut out of another,
    overlapping or not, transposed, or complex."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
            self.register_buffer("whole", torch.arange(12.0).reshape(3, 4))
            self.register_buffer("row", self.whole[1])
            self.register_buffer("part", self.whole[:, 1:3])
            self.register_buffer("turned", self.whole.T)
            self.register_buffer("same", self.whole)
            self.register_buffer("waves", torch.ones(2, dtype=torch.complex64))

    supernet = gross.decompose(Views(), (1, 2), method="random", quiet=True)
    gross.save(supernet, tmp_path / "views.safetensors")
    loaded = gross.load(tmp_path / "views.safetensors", Views())
    for name, value in supernet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert set(storage.describe(tmp_path / "views.safetensors").shared) == {"same"}
    supernet.whole = supernet.whole.to_sparse()
    with pytest.raises(ValueError, match="state 'whole' that is sparse"):
        gross.save(supernet, tmp_path / "views.safetensors")


def test_what_json_cannot_hold_is_refused_before_a_file_is_written(tmp_path):
    """Catches half a file, or a file that replaced a good one, after a provenance that cannot be
    written."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    supernet = gross.decompose(model, (1, 2), method="random", quiet=True)
    path = tmp_path / "saved.safetensors"
    for wrong in (object(), {1, 2}, 3 + 4j):
        with pytest.raises(TypeError, match="provenance: got"):
            gross.save(supernet, path, provenance={"wrong": wrong})
    assert not path.exists()
    gross.save(supernet, path, provenance={"file": Path("/data"), "loss": torch.tensor(0.5)})
    provenance = storage.describe(path).provenance
    assert (provenance["file"], provenance["loss"]) == ("/data", 0.5)
