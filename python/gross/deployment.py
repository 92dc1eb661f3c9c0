"""From a supernet and a configuration to the network that is deployed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from gross_kernels import GroSSConv2d, pack

from .copying import copy_model, unwrapped
from .extras import from_extra
from .supernet import check_configuration, decomposed_layers
from .supernet import configuration as active_configuration

#: Largest difference from the supernet's output, relative to the largest magnitude, that an export
#: may have: sums in another order.
TOLERANCE = 1e-3


def export(
    supernet: nn.Module,
    configuration: int | Sequence[int] | Mapping[str, int] | None = None,
    *,
    example: Tensor | None = None,
    kernels: bool = False,
) -> nn.Module:
    """The network that one configuration of a supernet is, with nothing of the others in it.

    Args:
        supernet: a network with decomposed layers; left as it is.
        configuration: as :func:`gross.set_configuration` takes it; by default the active one.
        example: an input. With it the outputs of both networks are compared.
        kernels: keep decomposed layers, of the one group size, on this package's kernels, packed
            where they are in evaluation mode. By default each becomes three ``nn.Conv2d``, and the
            network needs PyTorch alone: ready for ``torch.export``, ONNX, and training.

    Returns:
        A new network in evaluation mode and channels-last.

    Raises:
        ValueError: if the configuration is not the supernet's, or something in the network cannot
            be copied.
        RuntimeError: if the outputs for ``example`` differ by more than rounding.
    """
    layers = decomposed_layers(supernet)
    if configuration is None:
        configuration = active_configuration(supernet)
    sizes = [layer.group_sizes for layer in layers.values()]
    configuration = check_configuration(
        configuration, sizes, active_configuration(supernet), list(layers)
    )
    replaced: dict[int, nn.Module] = {
        id(layer): _single(layer, size) if kernels else layer.fold(size)
        for layer, size in zip(layers.values(), configuration, strict=True)
    }
    exported = copy_model(unwrapped(supernet), replaced, with_attributes=False).eval()
    exported = exported.to(memory_format=torch.channels_last)
    vars(exported).pop("decomposition_report", None)
    if kernels:
        pack(exported)
    if example is not None:
        _compare(supernet, configuration, exported, example)
    return exported


def save_program(network: nn.Module, example: Tensor, path: str | os.PathLike[str]) -> None:
    """Write an exported network as a file that other runtimes read.

    Args:
        network: from :func:`export` with ``kernels=False``.
        example: an input; the file takes any batch size.
        path: a ``.pt2`` file of ``torch.export``, or an ``.onnx`` file.

    Raises:
        ValueError: for another suffix, or a network with decomposed layers.
        ImportError: if onnx and onnxscript are needed and missing.
    """
    target = Path(path)
    if target.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"path: got {path}, accepted are .pt2 and .onnx files")
    if decomposed_layers(network):
        raise ValueError("network: got decomposed layers, accepted is one of export(kernels=False)")
    part = target.with_name(f"{target.stem}.{os.getpid()}.part{target.suffix}")
    # A batch of one would be taken for a constant.
    example = torch.cat([example, example]) if len(example) == 1 else example
    batch = {0: torch.export.Dim("batch", min=1)}
    try:
        if target.suffix == ".pt2":
            program = torch.export.export(network, (example,), dynamic_shapes=(batch,))
            torch.export.save(program, part)
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
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _single(layer: GroSSConv2d, size: int) -> GroSSConv2d:
    """The layer with one group size, and the sums of its terms as that one's terms."""
    folded = layer.fold(size)
    single = GroSSConv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        1,
        layer.bias is not None,
        layer.padding_mode,
        layer.grouped[0].device,
        layer.grouped[0].dtype,
        group_sizes=(size,),
        width=layer.width,
        relu=layer.relu,
    )
    with torch.no_grad():
        for series, conv in zip(single._series(), folded, strict=False):
            series[0].copy_(conv.weight)
        if single.bias is not None and layer.bias is not None:
            single.bias.copy_(layer.bias)
    return single.eval()


def _compare(
    supernet: nn.Module, configuration: Sequence[int], exported: nn.Module, example: Tensor
) -> None:
    from .evaluation import inference

    with inference(supernet, configuration):
        expected = supernet(example)
        found = exported(example)
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    if not error <= TOLERANCE:
        raise RuntimeError(
            f"example: the exported network's outputs differ by {error:.2g} of the largest, "
            f"accepted is {TOLERANCE}"
        )
