"""Exported networks as files."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from gross_kernels.environment import weight_bits

from ..arguments import check_choice, check_module, check_path, check_tensor
from ..extras import from_extra
from ..supernet import decomposed_layers
from .onnx_int8 import quantise_file
from .precision import read, warn_of_slow_weights
from .programs import has_programs

#: Raised when programs can no longer be read as they were; a file beside the network has it.
FORMAT = 1
EXTRA = "gross_format"


def save_program(
    network: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    precision: str = "float32",
    calibration: Tensor | Iterable[Any] | None = None,
) -> None:
    """Write an exported network as a file.

    Args:
        network: from :func:`export`; for ``.onnx`` with ``kernels=False``.
        example: an input; the file takes any batch size.
        path: a ``.pt2`` file of ``torch.export``, for :func:`load_program`, or an ``.onnx`` file.
            Both hold plain weights and serve every processor; programs are packed where the file
            is loaded. A network that was exported in 8 bits is one in the ``.pt2`` file too.
        precision: "int8" for an ``.onnx`` file in 8 bits, by ONNX Runtime's quantiser.
        calibration: for that, as :func:`export` takes it.

    Raises:
        TypeError: if 8 bits are asked for without calibration data.
        ValueError: for another suffix, a network with decomposed layers, 8 bits in a ``.pt2``
            file, or calibration data that is no input of the network.
        ImportError: if onnx and onnxscript are needed and missing; onnxruntime too for 8 bits.
    """
    check_module("network", network)
    check_tensor("example", example)
    target = check_path("path", path)
    if target.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"path: got {path}, accepted are .pt2 and .onnx files")
    if target.suffix == ".onnx" and (decomposed_layers(network) or has_programs(network)):
        raise ValueError(
            "network: got this package's kernels, accepted for .onnx is one of "
            "export(kernels=False)"
        )
    batches = None
    if check_choice("precision", precision, ("float32", "int8")) == "int8":
        if target.suffix != ".onnx":
            raise ValueError(
                "precision: got 'int8' for a .pt2 file, accepted is 'float32'; "
                "export(..., precision='int8') makes a network that is written in 8 bits"
            )
        batches = read(calibration, example)
        for i, images in enumerate(batches):
            if images.shape[1:] != example.shape[1:]:
                raise ValueError(
                    f"calibration[{i}]: got {tuple(images.shape)}, accepted for an .onnx file is "
                    f"the example's size, {tuple(example.shape[1:])}"
                )
    elif calibration is not None:
        raise ValueError(
            "calibration: got data for precision 'float32', accepted is None; or 'int8'"
        )
    part = target.with_name(f"{target.stem}.{os.getpid()}.part{target.suffix}")
    lowered = part.with_suffix(".int8.onnx")
    # A batch of one would be taken for a constant.
    example = torch.cat([example, example]) if len(example) == 1 else example
    batch = {0: torch.export.Dim("batch", min=1)}
    try:
        if target.suffix == ".pt2":
            program = torch.export.export(network, (example,), dynamic_shapes=(batch,))
            torch.export.save(program, part, extra_files={EXTRA: str(FORMAT)})
        else:
            with from_extra("onnx"):
                import onnxscript  # noqa: F401
            torch.onnx.export(
                network,
                (example,),
                part,
                dynamo=True,
                dynamic_shapes=(batch,),
                external_data=False,
                input_names=["input"],
                output_names=["output"],
                verbose=False,
            )
        if batches is not None:
            quantise_file(part, lowered, batches, weight_bits())
            lowered.replace(part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
        lowered.unlink(missing_ok=True)


def load_program(path: str | os.PathLike[str]) -> nn.Module:
    """The network of a ``.pt2`` file, with its programs packed for this processor.

    ``torch.export.load(path).module()`` is the same network, but packs its weights at every call.

    Raises:
        ValueError: if there is no such file, or it is none of :func:`save_program`'s, or damaged,
            or from a newer version.
    """
    source = check_path("path", path)
    if not source.is_file():
        raise ValueError(f"path: got {path}, accepted is a file that save_program wrote")
    extra: dict[str, Any] = {EXTRA: ""}
    try:
        # Of these torch would also print a page.
        if source.suffix != ".pt2" or not zipfile.is_zipfile(source):
            raise ValueError("it is no whole archive")
        program = torch.export.load(source, extra_files=extra)
        if int(extra[EXTRA]) > FORMAT:
            raise ValueError(f"got format {int(extra[EXTRA])}, accepted is {FORMAT}")
        network = program.module(check_guards=False)
        fold_packing(network)
    except Exception as error:
        first, *_ = [*str(error).strip().splitlines(), type(error).__name__]
        raise ValueError(
            f"path: {path} cannot be read, accepted is a .pt2 file that save_program wrote with "
            f"this or an older version: {first}"
        ) from error
    return network


def fold_packing(network: fx.GraphModule) -> None:
    """Pack the programs of a network from ``torch.export`` once, in place."""
    graph = network.graph
    for i, node in enumerate(list(graph.nodes)):
        if node.target is not torch.ops.gross.program_pack.default:
            continue
        _, weights, *rest = node.args
        tensors = [_constant(network, weight) for weight in weights]
        warn_of_slow_weights(tensors)
        real = next(tensor for tensor in tensors if tensor.is_floating_point())
        packed = node.target(real.new_empty(0), tensors, *rest)
        network.register_buffer(f"packed_{i}", packed, persistent=False)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.get_attr(f"packed_{i}"))
        graph.erase_node(node)
    graph.eliminate_dead_code()
    network.recompile()


def _constant(network: nn.Module, node: object) -> Tensor:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        raise ValueError(
            "network: got a program whose weights are computed, accepted are constants"
        )
    return attrgetter(str(node.target))(network).detach()
