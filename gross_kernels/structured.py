"""``StructuredConv2d``, ``StructuredConv3d`` and ``StructuredLinear``: a sum-pooling and then a
smaller convolution, equal to one dense layer whose kernel is structured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .checks import check_device, check_dtype, check_flag, check_one_of
from .composite import Operations, StructuredBasis
from .geometry import Geometry, check_padding, integer, same_padding, several
from .layers import PADDING_MODES
from .pooling import SumPool2d, Windows, sum_pool

#: ``(c, n)``: c channels, None for all of them, and a kernel of n, or of so much along each axis.
Structure = tuple[int | None, int | Sequence[int]]


class _Structured(nn.Module):
    """What the layers share: the basis, and the weight of the small layer.

    Attributes:
        weight: α, the small layer's.
        bias: ``[C_out]`` or None.
        basis: the :class:`~gross_kernels.StructuredBasis` of the kernels.
        residual: ``‖(I − A A⁺)W‖_F/‖W‖_F`` of the layer that it was made from, None otherwise.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def _make(self, out_channels: int, basis: StructuredBasis, bias: bool, made: Any) -> None:
        self.basis = basis
        self.residual: float | None = None
        device, dtype = made
        empty = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_channels, *basis.coefficients, **empty))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, **empty))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @property
    def structure(self) -> tuple[int, ...]:
        """``(c, n, …)``, one number per axis of a kernel."""
        return self.basis.coefficients

    def reset_parameters(self) -> None:
        """Draw a dense weight as the layer of ``torch.nn`` does, take the nearest structured one,
        and scale it to the draw's norm, which is that of a fresh dense layer."""
        fan_in = math.prod(self.basis.size)
        bound = 1 / math.sqrt(fan_in)
        drawn = self.weight.new_empty(len(self.weight), *self.basis.size).uniform_(-bound, bound)
        found = self.basis.project(drawn.double())
        near = torch.linalg.vector_norm(self.basis.compose(found))
        scale = torch.linalg.vector_norm(drawn.double()) / near
        with torch.no_grad():
            self.weight.copy_(scale * found)
            if self.bias is not None:
                nn.init.uniform_(self.bias, -bound, bound)

    def dense_weight(self) -> Tensor:
        """The dense layer's weight, ``W = Σ_m α_m β_m``: computed anew, differentiable."""
        return self.basis.compose(self.weight)

    def _take(self, module: Any) -> Self:
        """The weight and bias of a dense layer, projected."""
        with torch.no_grad():
            weight = module.weight.detach()
            self.weight.copy_(self.basis.project(weight.double()))
            self.residual = None if weight.is_meta else float(self.basis.residual(weight))
            if self.bias is not None:
                self.bias.copy_(module.bias)
        return self.train(module.training)

    def _give(self, made: Any) -> nn.Module:
        """The dense layer ``made`` with the composite kernel and the bias."""
        with torch.no_grad():
            made.weight.copy_(self.dense_weight())
            if self.bias is not None:
                made.bias.copy_(self.bias)
        dense: nn.Module = made.train(self.training)
        return dense

    def _check_input(self, input: Tensor, dims: Sequence[int], shape: str, channels: int) -> None:
        if not isinstance(input, Tensor):
            raise TypeError(f"input: got {type(input).__name__}, accepted is a Tensor")
        axis = -len(self.basis.size) if len(self.basis.size) > 1 else -1
        if input.dim() not in dims or input.shape[axis] != channels:
            raise ValueError(
                f"input: got shape {tuple(input.shape)}, accepted is {shape} with {channels} in "
                f"place of C"
            )
        kind = input.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if input.dtype != self.weight.dtype and not autocast:
            raise TypeError(
                f"input: got {input.dtype}, accepted is the weight's {self.weight.dtype}"
            )
        if input.device != self.weight.device:
            raise ValueError(
                f"input: got device {input.device}, accepted is the weight's {self.weight.device}"
            )

    def _traced(self, input: Any) -> fx.Proxy:
        """One call of this module in the graph of ``torch.fx``, whatever its tracer takes for a
        leaf."""
        path = input.tracer.path_of_module(self)
        if not path:
            raise TypeError(
                f"input: got {type(input).__name__} for a layer that is itself traced, accepted is "
                "a module that holds it, such as torch.nn.Sequential(layer)"
            )
        return input.tracer.create_proxy("call_module", path, (input,), {})


class _StructuredConv(_Structured):
    """A convolution over images or volumes.

    Along an axis with windows of d = N − n + 1: the pooling takes the padding, and the small
    convolution the stride; where n = 1 there is nothing to convolve, and the pooling takes both;
    where d = 1 nothing to pool, and the convolution does."""

    _axes: ClassVar[int]
    _dense: ClassVar[Any]
    _shape: ClassVar[str]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        structure: Structure,
    ) -> None:
        super().__init__()
        axes = self._axes
        self.in_channels = integer("in_channels", in_channels, 1)
        self.out_channels = integer("out_channels", out_channels, 1)
        self.groups = integer("groups", groups, 1)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % groups:
                raise ValueError(
                    f"groups: got {groups}, accepted are numbers that divide {name}, {channels}"
                )
        self.kernel_size = several("kernel_size", kernel_size, axes)
        self.stride = several("stride", stride, axes)
        self.dilation = several("dilation", dilation, axes)
        self.padding = check_padding(padding, self.stride)
        self.padding_mode = check_one_of("padding_mode", padding_mode, PADDING_MODES)
        check_flag("bias", bias)
        made = check_device(device), check_dtype(dtype)
        size = (self.in_channels // self.groups, *self.kernel_size)
        basis = StructuredBasis(size, check_structure("structure", structure, size))
        self._split(basis)
        self._make(self.out_channels, basis, bias, made)

    def _split(self, basis: StructuredBasis) -> None:
        """What is padded first, what the pooling does, and what the small convolution does."""
        sides = _sides(self.padding, self.kernel_size, self.dilation)
        self._pads = [p for side in reversed(sides) for p in side]
        padding = [0] * self._axes
        if self.padding_mode == "zeros":
            # The rest, of "same", is one more zero after than before.
            padding = [before for before, _ in sides]
            self._pads = [p for before, after in reversed(sides) for p in (0, after - before)]
        channels, *windows = basis.windows
        pool, convolution = [], []
        geometry = zip(self.kernel_size, self.stride, padding, self.dilation, strict=True)
        for window, (kernel, *rest) in zip(windows, geometry, strict=True):
            stride, pad, dilation = rest
            if window == 1:
                pool.append((1, 0, 1))
                convolution.append((stride, pad, dilation))
            elif window == kernel:
                pool.append((stride, pad, dilation))
                convolution.append((1, 0, 1))
            else:
                pool.append((1, pad, dilation))
                convolution.append((stride, 0, dilation))
        self._convolution = Geometry(*zip(*convolution, strict=True))
        self._pooling = _pooling(channels, windows, self.groups, Geometry(*zip(*pool, strict=True)))

    @classmethod
    def from_dense(cls, module: Any, structure: Structure) -> Self:
        """The structured layer that is nearest to a dense one, ``α = A⁺W``; how near is its
        ``residual``.

        Args:
            module: the dense layer of ``torch.nn``; left as it is. Geometry, bias, device and dtype
                are its own.
            structure: ``(c, n)``.

        Raises:
            TypeError, ValueError: for another module, or a structure that does not fit it.
        """
        if not isinstance(module, cls._dense):
            raise TypeError(
                f"module: got {type(module).__name__}, accepted is a torch.nn.{cls._dense.__name__}"
            )
        conv: Any = module
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            conv.weight.device,
            conv.weight.dtype,
            structure=structure,
        )
        return layer._take(conv)

    def forward(self, input: Tensor) -> Tensor:
        """The sum-pooling, and the small convolution of what it gives."""
        if isinstance(input, fx.Proxy):
            return self._traced(input)
        dims = (self._axes + 1, self._axes + 2)
        self._check_input(input, dims, self._shape, self.in_channels)
        batch = input if input.dim() == dims[1] else input.unsqueeze(0)
        if any(self._pads):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            batch = F.pad(batch, self._pads, mode=mode)
        self._check_fits(batch)
        output = self._convolve(self._pool(batch))
        return output if input.dim() == dims[1] else output.squeeze(0)

    def _check_fits(self, batch: Tensor) -> None:
        zeros = (0,) * self._axes
        if self.padding_mode == "zeros":
            sides = _sides(self.padding, self.kernel_size, self.dilation)
            zeros = tuple(before for before, _ in sides)
        geometry = Geometry(self.stride, zeros, self.dilation)
        geometry.check_fits(batch.shape[2:], self.kernel_size)

    def to_dense(self) -> nn.Module:
        """The layer of ``torch.nn`` that it equals, with the composite kernel."""
        made = self._dense(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            self.weight.device,
            self.weight.dtype,
        )
        return self._give(made)

    def _pool(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def _convolve(self, pooled: Tensor) -> Tensor:
        raise NotImplementedError

    def operations(self, input_size: int | Sequence[int]) -> tuple[Operations, Operations]:
        """Of one image: what the layer takes, and what the dense layer would.

        Additions of the pooling are counted as it is done: along channels, columns and rows (and
        depth), each where the next wants them.

        Args:
            input_size: rows and columns (depth, rows and columns) of the input.
        """
        size = several("input_size", input_size, self._axes)
        sides = _sides(self.padding, self.kernel_size, self.dilation)
        padded = [i + before + after for i, (before, after) in zip(size, sides, strict=True)]
        geometry = Geometry(self.stride, (0,) * self._axes, self.dilation)
        geometry.check_fits(padded, self.kernel_size)
        positions = math.prod(geometry.output_size(padded, self.kernel_size))
        additions, channels = 0, self.groups * self.structure[0]
        # Channels over the whole map; then the last axis first, which has its pooled length for
        # those before it.
        lengths = list(size)
        windows = self.basis.windows
        additions += channels * math.prod(lengths) * additions_of(windows[0])
        for axis in reversed(range(self._axes)):
            window = windows[axis + 1]
            if window > 1:
                step = self.stride[axis] if window == self.kernel_size[axis] else 1
                lengths[axis] = (padded[axis] - (window - 1) * self.dilation[axis] - 1) // step + 1
                each = window - 1 if axis == self._axes - 2 else additions_of(window)
                additions += channels * math.prod(lengths) * each
        biased = self.bias is not None
        small, dense = (
            _products(self.out_channels, math.prod(kernel), biased, positions)
            for kernel in (self.structure, self.basis.size)
        )
        return Operations(small.multiplications, small.additions + additions), dense

    def extra_repr(self) -> str:
        """The arguments of the layer."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}"
        usual = {"padding": (0,) * self._axes, "dilation": (1,) * self._axes, "groups": 1}
        for name, value in {**usual, "padding_mode": "zeros"}.items():
            if getattr(self, name) != value:
                text += f", {name}={getattr(self, name)!r}"
        if self.bias is None:
            text += ", bias=False"
        return f"{text}, structure={self.structure}"


class StructuredConv2d(_StructuredConv):
    """Drop-in for ``torch.nn.Conv2d`` with a structured kernel, a sum of cuboids of ones: a
    sum-pooling over ``(C − c + 1) × (N − n + 1)²`` and then a ``c × n × n`` convolution.

    Args:
        in_channels, out_channels, kernel_size: as ``torch.nn.Conv2d``'s.
        stride, padding, dilation, groups, bias, padding_mode: likewise.
        device, dtype: likewise.
        structure: ``(c, n)``: channels (of a group) and kernel of the small convolution; c = None
            for all channels, n may be a pair.

    Shape:
        input ``[N, C, H, W]`` or ``[C, H, W]``, output that of ``torch.nn.Conv2d``, in the input's
        memory format.

    Attributes:
        weight: α, ``[C_out, c, n, n]``.
        bias: ``[C_out]`` or None.
        residual: ``‖(I − A A⁺)W‖_F/‖W‖_F`` of the layer that :meth:`from_dense` took, or None.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """

    _axes = 2
    _dense = nn.Conv2d
    _shape = "[N, C, H, W] or [C, H, W]"

    def _pool(self, input: Tensor) -> Tensor:
        for windows in self._pooling:
            input = sum_pool(input, windows)
        return input

    def _convolve(self, pooled: Tensor) -> Tensor:
        return F.conv2d(pooled, self.weight, self.bias, *self._convolution, self.groups)

    @property
    def foldable(self) -> bool:
        """Whether :meth:`fold` can: it pads with zeros, as many before as after."""
        return self.padding_mode == "zeros" and not any(self._pads)

    def fold(self, kernels: bool = True) -> nn.Sequential:
        """The layer as a :class:`~gross_kernels.pooling.SumPool2d` and a ``nn.Conv2d``, with copies
        of the weights.

        Args:
            kernels: whether the pooling runs on this package's kernels.
        """
        check_flag("kernels", kernels)
        if not self.foldable:
            raise ValueError(
                f"fold: got padding {self.padding!r}, {self.padding_mode!r}, accepted are zeros, "
                "as many before as after"
            )
        stride, padding, dilation = self._convolution
        conv = nn.Conv2d(
            self.groups * self.structure[0],
            self.out_channels,
            self.structure[1:],  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            self.groups,
            self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(self.weight)
            if conv.bias is not None and self.bias is not None:
                conv.bias.copy_(self.bias)
        pools = [SumPool2d(windows, kernels) for windows in self._pooling]
        return nn.Sequential(*pools, conv).train(self.training)


class StructuredConv3d(_StructuredConv):
    """Drop-in for ``torch.nn.Conv3d`` with a structured kernel; see :class:`StructuredConv2d`.

    Args:
        in_channels, out_channels, kernel_size: as ``torch.nn.Conv3d``'s.
        stride, padding, dilation, groups, bias, padding_mode: likewise.
        device, dtype: likewise.
        structure: ``(c, n)``, where n may be a triple.

    Shape:
        input ``[N, C, D, H, W]`` or ``[C, D, H, W]``, output that of ``torch.nn.Conv3d``.

    Attributes:
        weight: α, ``[C_out, c, n, n, n]``.
    """

    _axes = 3
    _dense = nn.Conv3d
    _shape = "[N, C, D, H, W] or [C, D, H, W]"

    def _pool(self, input: Tensor) -> Tensor:
        # Images of depth × (rows · columns), then of rows × columns.
        if self._pooling:
            deep, flat = self._pooling
            if max(deep.window) > 1:
                input = sum_pool(input.flatten(3), deep).unflatten(3, input.shape[3:])
            if max(flat.window) > 1:
                # Whichever of depth and channels lies outside the images joins the batch.
                inside = input.stride(1) > input.stride(2)
                other = input if inside else input.transpose(1, 2)
                images = other.flatten(1, 2) if inside else other.flatten(0, 1)
                dim = 1 if inside else 0
                pooled = sum_pool(images, flat).unflatten(dim, other.shape[dim : dim + 2])
                input = pooled if inside else pooled.transpose(1, 2)
        return input

    def _convolve(self, pooled: Tensor) -> Tensor:
        return F.conv3d(pooled, self.weight, self.bias, *self._convolution, self.groups)


class StructuredLinear(_Structured):
    """Drop-in for ``torch.nn.Linear`` with structured rows: sums over windows of ``C − c + 1``
    features, and then a linear layer of c.

    Args:
        in_features, out_features, bias, device, dtype: as ``torch.nn.Linear``'s.
        structure: c, the reduced width.

    Shape:
        input ``[…, C]``, output ``[…, C_out]``.

    Attributes:
        weight: α, ``[C_out, c]``.
        bias: ``[C_out]`` or None.
        residual: ``‖(I − A A⁺)W‖_F/‖W‖_F`` of the layer that :meth:`from_dense` took, or None.

    Raises:
        TypeError, ValueError: for arguments that do not fit, naming the argument.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        structure: int,
    ) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, 1)
        self.out_features = integer("out_features", out_features, 1)
        check_flag("bias", bias)
        made = check_device(device), check_dtype(dtype)
        size = (self.in_features,)
        basis = StructuredBasis(size, check_structure("structure", structure, size))
        self._windows = Windows((basis.windows[0], 1, 1))
        self._make(self.out_features, basis, bias, made)

    @classmethod
    def from_dense(cls, module: nn.Linear, structure: int) -> Self:
        """The structured layer that is nearest to a dense one, ``α = A⁺W``; how near is its
        ``residual``. Arguments and errors are those of :meth:`StructuredConv2d.from_dense`."""
        if not isinstance(module, nn.Linear):
            raise TypeError(f"module: got {type(module).__name__}, accepted is a torch.nn.Linear")
        layer = cls(
            module.in_features,
            module.out_features,
            module.bias is not None,
            module.weight.device,
            module.weight.dtype,
            structure=structure,
        )
        return layer._take(module)

    def forward(self, input: Tensor) -> Tensor:
        """The sums, and the small linear layer of them."""
        if isinstance(input, fx.Proxy):
            return self._traced(input)
        self._check_input(input, range(1, 65), "[…, C]", self.in_features)
        if input.numel() == 0:
            input = input[..., : self.structure[0]]
        elif self._windows.window[0] > 1:
            rows = input.reshape(-1, self.in_features)
            # One image of one row, channels-last.
            image = rows[None, None].permute(0, 3, 1, 2)
            pooled = sum_pool(image, self._windows).permute(0, 2, 3, 1)
            input = pooled.reshape(*input.shape[:-1], self.structure[0])
        return F.linear(input, self.weight, self.bias)

    def to_dense(self) -> nn.Module:
        """The ``torch.nn.Linear`` that it equals, with the composite rows."""
        made = nn.Linear(
            self.in_features,
            self.out_features,
            self.bias is not None,
            self.weight.device,
            self.weight.dtype,
        )
        return self._give(made)

    def operations(self) -> tuple[Operations, Operations]:
        """Of one input: what the layer takes, and what the dense layer would."""
        biased = self.bias is not None
        sums = self.structure[0] * additions_of(self.basis.windows[0])
        small = _products(self.out_features, self.structure[0], biased, 1)
        dense = _products(self.out_features, self.in_features, biased, 1)
        return Operations(small.multiplications, small.additions + sums), dense

    def extra_repr(self) -> str:
        """The arguments of the layer."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{text}, bias={self.bias is not None}, structure={self.structure[0]}"


def check_structure(name: str, structure: Any, size: Sequence[int]) -> tuple[int, ...]:
    """A structure as one number per axis of kernels of this size, ``(C, N, …)``.

    Args:
        structure: ``(c, n)``, where c may be None, for C, and n a sequence; of linear layers, whose
            size is ``(C,)``, c alone.

    Raises:
        TypeError, ValueError: if it is no such thing or does not fit, naming what does.
    """
    channels, *kernel = size
    if kernel:
        accepted = f"(c, n) with c of 1 to {channels} or None, and n of 1 to {_span(kernel)}"
        whole = isinstance(structure, Sequence) and not isinstance(structure, str)
        if not whole or len(structure) != 2:
            raise TypeError(f"{name}: got {structure!r}, accepted is {accepted}")
        c, n = structure
    else:
        accepted = f"an int of 1 to {channels}"
        c, n = structure, ()
        if isinstance(structure, Sequence) and not isinstance(structure, str):
            c = structure[0] if len(structure) == 1 else None
    try:
        c = channels if c is None and kernel else integer(name, c)
        small = (c, *(several(name, n, len(kernel), 0) if kernel else ()))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: got {structure!r}, accepted is {accepted}") from None
    if any(not 1 <= of <= most for of, most in zip(small, size, strict=True)):
        raise ValueError(f"{name}: got {structure!r}, accepted is {accepted}")
    return small


def additions_of(window: int) -> int:
    """How many additions the sum of a window takes where all windows along an axis are summed, by
    sums of half their length: ``⌊log₂ d⌋`` and one for each further bit of d."""
    return window.bit_length() - 1 + window.bit_count() - 1


def _span(kernel: Sequence[int]) -> str:
    return str(kernel[0]) if len(set(kernel)) == 1 else "×".join(map(str, kernel))


def _sides(
    padding: tuple[int, ...] | str, kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """(before, after) along each axis."""
    if padding == "same":
        return same_padding(kernel_size, dilation)
    if isinstance(padding, str):
        return ((0, 0),) * len(kernel_size)
    return tuple((p, p) for p in padding)


def _pooling(
    channels: int, windows: Sequence[int], groups: int, geometry: Geometry
) -> tuple[Windows, ...]:
    """The calls of the operator, none where nothing is pooled: one for images; for volumes one
    along channels and depth, and one along rows and columns."""
    if max(channels, *windows) == 1:
        return ()
    stride, padding, dilation = geometry
    if len(windows) == 2:
        rows, columns = windows
        return (Windows((channels, rows, columns), groups, stride, padding, dilation),)
    depth, rows, columns = windows
    deep = [(each[0], other) for each, other in zip(geometry, (1, 0, 1), strict=True)]
    flat = [tuple(each[1:]) for each in geometry]
    return (
        Windows((channels, depth, 1), groups, *deep),
        Windows((1, rows, columns), 1, *flat),
    )


def _products(out_channels: int, each: int, bias: bool, positions: int) -> Operations:
    """Of a dense layer with so many products for an output."""
    outputs = out_channels * positions
    return Operations(outputs * each, outputs * (each - 1 + bias))
