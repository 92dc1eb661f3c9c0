"""Supernets, and networks with structured layers, on disk: a safetensors file whose header carries
a JSON description.

One file, so that weights and description cannot part and both are replaced at once. The description
has the architecture where it is one of the paper's networks, the geometry, group sizes and width of
each decomposed layer, the active configuration, and where the supernet is from. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from types import NoneType, UnionType
from typing import Any, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

import torch
from torch import Tensor, nn

from gross_kernels import GroSSConv2d

from . import networks, weights
from .arguments import check_module, check_path, check_type
from .copying import copy_model, plain_name, unwrapped
from .decomposition import Decomposition, decompose
from .decomposition.convert import Convert
from .structured import StructuredDecomposition
from .structured import decompose as structure
from .structured.plan import structured_layers
from .supernet import Configuration, configuration, decomposed_layers, set_configuration

#: The description's key in the header of the file.
KEY = "gross"
#: Raised when files can no longer be read as they were.
FORMAT = 1
#: How deep what a user adds to the description may be nested.
DEEPEST = 50


class LayerStructure(TypedDict):
    """What makes a decomposed layer: its arguments."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    padding_mode: str
    bias: bool
    width: tuple[int, int]
    group_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Description:
    """What a saved supernet says about itself.

    Attributes:
        network: name and number of classes of one of the paper's networks before its decomposition;
            None for any other model.
        layers: geometry, width and group sizes of each decomposed layer, by qualified name in
            network order.
        configuration: the active group sizes.
        shared: tensors stored under another name, because the model has them under several.
        decomposition: the report of ``gross.decompose``, if the model has one.
        provenance: time, versions, and what the user added.
        structured: ``(c, n, …)`` of each structured layer, by qualified name in network order.
        structured_decomposition: the report of ``gross.structured.decompose``, if the model has
            one.
    """

    network: tuple[str, int] | None
    layers: dict[str, LayerStructure]
    configuration: Configuration
    shared: dict[str, str]
    decomposition: Decomposition | None
    provenance: dict[str, Any]
    structured: dict[str, tuple[int, ...]]
    structured_decomposition: StructuredDecomposition | None

    def to_json(self) -> str:
        """The description as JSON. Raises TypeError if the provenance holds what JSON cannot."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        try:
            return json.dumps(content, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            raise TypeError(
                f"provenance: got {self.provenance!r}, accepted is what JSON can hold: {error}"
            ) from error

    @classmethod
    def from_json(cls, text: str) -> Description:
        """The description back from JSON. Raises ValueError if the text is not one of this format,
        with the entry that is wrong."""
        try:
            content = json.loads(text)
        except RecursionError as error:
            raise ValueError("JSON that is nested too deep") from error
        if not isinstance(content, dict):
            raise ValueError(f"got {type(content).__name__}, accepted is a description by names")
        if content.get("format") != FORMAT:
            raise ValueError(f"got format {content.get('format')!r}, accepted is {FORMAT}")
        del content["format"]
        # Files from before there were structured layers have none.
        content = {"structured": {}, "structured_decomposition": None, **content}
        description: Description = _restored(cls, content, "description")
        return description


def save(
    model: nn.Module, path: str | os.PathLike[str], *, provenance: Mapping[str, Any] | None = None
) -> None:
    """Save a supernet, or a network with structured layers, as one safetensors file with a JSON
    description in its header. An existing file is replaced at once.

    Args:
        model: a network with decomposed or structured layers. Whether it is one of the paper's
            networks is found out, also when its number of classes or its group sizes are others.
        path: the file to write, by custom ``.safetensors``; its folder must exist.
        provenance: what else the description shall say: anything that JSON can.

    Raises:
        TypeError: for an argument of another type, or a provenance that JSON cannot hold.
        ValueError: if the model has no such layer, or its state is not all tensors with
            values.
        FileNotFoundError: if the folder does not exist.
    """
    path = check_path("path", path)
    if provenance is not None:
        check_type("provenance", provenance, Mapping, "a mapping from names to values")
    model = unwrapped(check_module("model", model))
    layers = decomposed_layers(model)
    structured = structured_layers(model)
    if not layers and not structured:
        raise ValueError(
            f"model: got {type(model).__name__} without decomposed layers, accepted is what "
            "gross.decompose or gross.structured.decompose returns"
        )
    state = {plain_name(name): value for name, value in model.state_dict().items()}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta:
            raise ValueError(
                f"model: got a state {name!r} without values, accepted are tensors on a real device"
            )
        if value.layout != torch.strided or value.is_quantized:
            raise ValueError(
                f"model: got a state {name!r} that is sparse or quantised, accepted are dense "
                "tensors"
            )
    first_names: dict[tuple[Any, ...], str] = {}
    stored = {
        n: first_names.setdefault((v.data_ptr(), v.shape, v.stride(), v.dtype), n)
        for n, v in state.items()
    }
    description = Description(
        _recognise(model),
        {name: _structure(layer) for name, layer in layers.items()},
        configuration(model),
        {name: first for name, first in stored.items() if name != first},
        vars(model).get("decomposition_report"),
        {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "gross-kernels": _version(),
            "torch": str(torch.__version__),
            **(provenance or {}),
        },
        {name: layer.structure for name, layer in structured.items()},
        vars(model).get("structured_report"),
    )
    tensors = {name: state[name] for name, first in stored.items() if name == first}
    # Views of one memory that are not the same tensor (buffers cut out of another) become tensors
    # of their own, which is how a file can hold them.
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    tensors = {
        name: tensor.clone() if owners[tensor.untyped_storage().data_ptr()] > 1 else tensor
        for name, tensor in tensors.items()
    }
    weights.write_safetensors(path, tensors, {KEY: description.to_json()})


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    convert: Convert | None = None,
) -> nn.Module:
    """Load a supernet that :func:`save` wrote. Everything is checked before a tensor is loaded.

    Args:
        path: the file.
        model: needed where the supernet is not of one of the paper's networks: the model before its
            decomposition, or a supernet of the same structure. It is left as it is; the result has
            its device and dtypes.
        convert: what :func:`gross.decompose` was given, where the model is as it was before.

    Returns:
        A new supernet in the saved configuration; without ``model`` on the CPU, in the saved
        dtypes, in training mode.

    Raises:
        TypeError: for an argument of another type.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, is not a saved supernet, or does not fit the model,
            with what is wrong.
    """
    if model is not None:
        model = unwrapped(check_module("model", model))
    if convert is not None:
        check_type("convert", convert, Mapping, "a mapping from classes of modules to functions")
    description = describe(path)
    try:
        if model is not None:
            supernet = _restructure(model, description.layers, description.structured, convert)
        elif description.network is not None:
            empty = _empty(*description.network)
            supernet = _restructure(empty, description.layers, description.structured)
        else:
            raise ValueError(
                "gross.networks.build does not know its network; needed is model, as it was before "
                "or after its decomposition"
            )
        tensors = weights.read_safetensors(path)
        tensors |= {name: tensors[first] for name, first in description.shared.items()}
        weights.load(supernet, tensors, "the file", assign=model is None)
        set_configuration(supernet, description.configuration)
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    vars(supernet)["decomposition_report"] = description.decomposition
    if description.structured:
        vars(supernet)["structured_report"] = description.structured_decomposition
    return supernet


def describe(path: str | os.PathLike[str]) -> Description:
    """The description of a saved supernet.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or is not a saved supernet.
    """
    metadata = weights.read_metadata(check_path("path", path))
    if KEY not in metadata:
        raise ValueError(
            f"{path} holds tensors, but no supernet saved by gross.save: its header has no "
            "description"
        )
    try:
        return Description.from_json(metadata[KEY])
    except ValueError as error:
        raise ValueError(f"{path} is not a supernet that this version can read: {error}") from error


def _structure(layer: GroSSConv2d) -> LayerStructure:
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "padding_mode": layer.padding_mode,
        "bias": layer.bias is not None,
        "width": layer.width,
        "group_sizes": layer.group_sizes,
    }


def _restructure(
    model: nn.Module,
    layers: Mapping[str, LayerStructure],
    structured: Mapping[str, tuple[int, ...]],
    convert: Convert | None = None,
) -> nn.Module:
    """A copy of ``model`` with these decomposed and structured layers; those that it has already
    must have the same structure."""
    present = decomposed_layers(model)
    new = {name: layer for name, layer in layers.items() if name not in present}
    if new:
        model = decompose(
            model,
            {name: layer["group_sizes"] for name, layer in new.items()},
            width={name: layer["width"] for name, layer in new.items()},
            convert=convert,
            method="random",
            quiet=True,
        )
    else:
        model = copy_model(model)
    for name, layer in decomposed_layers(model).items():
        if _structure(layer) != layers.get(name):
            raise ValueError(
                f"layer {name!r} is {_structure(layer)}, and {layers.get(name)} in the file"
            )
    present_structures = {n: layer.structure for n, layer in structured_layers(model).items()}
    for name, given in present_structures.items():
        if given != structured.get(name):
            raise ValueError(f"layer {name!r} is {given}, and {structured.get(name)} in the file")
    missing: Any = {
        name: (c, tuple(n)) if n else c
        for name, (c, *n) in structured.items()
        if name not in present_structures
    }
    return structure(model, missing, quiet=True) if missing else model


def _empty(name: str, num_classes: int) -> nn.Module:
    with torch.device("meta"):
        return networks.build(name, num_classes=num_classes)


def _recognise(model: nn.Module) -> tuple[str, int] | None:
    """Name and number of classes of the network that ``model`` is a decomposition of, if
    :func:`gross.networks.build` makes it.

    The network is built without memory, given the same structure, and compared module by module,
    arguments included."""
    classifiers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    layers = {name: _structure(layer) for name, layer in decomposed_layers(model).items()}
    structured = {name: layer.structure for name, layer in structured_layers(model).items()}
    for name, network in networks.NETWORKS.items():
        if not classifiers or network.dense is not None:
            continue
        num_classes = classifiers[-1].out_features
        try:
            candidate = _restructure(_empty(name, num_classes), layers, structured)
        except ValueError:
            continue
        set_configuration(candidate, configuration(model))
        if _modules(candidate) == _modules(model):
            return name, num_classes
    return None


def _modules(model: nn.Module) -> list[tuple[str, type[nn.Module], str]]:
    """Every module with its arguments. Lists of parameters are left out: they show device and
    dtype."""
    return [
        (name, type(module), module.extra_repr())
        for name, module in model.named_modules()
        if not isinstance(module, nn.ParameterList)
    ]


def _restored(kind: Any, value: Any, where: str) -> Any:
    """A value out of JSON as the type ``kind``, which JSON has not got: dataclasses, typed
    dictionaries and tuples.

    Raises:
        ValueError: if the value is no such thing, naming the entry.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        if _depth(value) > DEEPEST:
            raise ValueError(f"{where}: nested deeper than {DEEPEST}")
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        kinds = [each for each in arguments if each is not NoneType]
        return _restored(str if isinstance(value, str) and str in kinds else kinds[0], value, where)
    if origin is tuple and isinstance(value, list):
        kinds = [arguments[0]] * len(value) if Ellipsis in arguments else [*arguments]
        if len(kinds) != len(value):
            raise ValueError(f"{where}: got {len(value)} entries, accepted are {len(kinds)}")
        parts = enumerate(zip(kinds, value, strict=True))
        return tuple(_restored(each, part, f"{where}[{i}]") for i, (each, part) in parts)
    if origin is dict and isinstance(value, dict):
        return {key: _restored(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    if (dataclasses.is_dataclass(kind) or is_typeddict(kind)) and isinstance(value, dict):
        kinds_of = get_type_hints(kind)
        if value.keys() != kinds_of.keys():
            odd = ", ".join(sorted(value.keys() ^ kinds_of.keys()))
            raise ValueError(f"{where}: incomplete description, missing or unknown: {odd}")
        return kind(**{k: _restored(kinds_of[k], v, f"{where}.{k}") for k, v in value.items()})
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where}: got {type(value).__name__}, accepted is {_name(kind)}")
    return value


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


def _depth(value: Any) -> int:
    """How deep a value out of JSON is nested."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [
            each
            for part in inner
            if not isinstance(part, str | int | float | None)
            for each in part
        ]
    return depth


def _plain(value: object) -> object:
    """What JSON does not know, as what it does: paths, arrays, tensors, numbers of numpy."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not among it")


def _version() -> str | None:
    """This package's version, None where it runs from its sources without being installed."""
    try:
        return version("gross-kernels")
    except PackageNotFoundError:
        return None
