"""ONNX files in 8 bits for other runtimes, by the static quantiser that ONNX Runtime brings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ..extras import from_extra


def quantise_file(source: Path, target: Path, batches: Sequence[Tensor], bits: int) -> None:
    """Write the network of a float file in 8 bits: pairs of QuantizeLinear and DequantizeLinear
    around each operation, which runtimes fuse.

    Args:
        source: a file of float32, with one input.
        target: the file to write; not ``source``.
        batches: images to calibrate on, taken one by one. Ranges are the smallest and the largest
            value.
        bits: of the weights, symmetric by output channel: 8, or 7 for processors that sum pairs of
            products in 16 bits.

    Raises:
        ImportError: if onnx or onnxruntime is missing.
    """
    with from_extra("onnx-int8"):
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.calibrate import CalibrationDataReader
        from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.feeds: Iterator[Any] = (
                {name: image.numpy()} for batch in batches for image in batch.split(1)
            )

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with TemporaryDirectory() as folder:
        # Without batch norms, and with the shapes that the quantiser looks at.
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        name = onnx.load(prepared, load_external_data=False).graph.input[0].name
        quantize_static(
            prepared,
            target,
            Images(name),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=bits == 7,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
