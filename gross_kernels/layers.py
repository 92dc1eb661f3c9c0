"""``SeriesConv2d``, the grouped convolution over a series, and ``GroSSConv2d``, the drop-in
replacement of ``nn.Conv2d``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import bottleneck, dispatch
from .functional import (
    apply,
    check_fits,
    check_gates,
    check_input,
    check_padding_mode,
    explicit_padding,
    pair,
    series_sum,
)
from .ops import call, memory_format
from .series import (
    check_group_sizes,
    convolution_macs,
    output_size,
    powers_of_two,
    residuals,
    same_padding,
    sum_terms,
)

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


class _SeriesModule(nn.Module):
    """What both layers share: the geometry of the convolution, the group sizes, and which of them
    is active."""

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int] | str,
        dilation: int | tuple[int, int],
        padding_mode: str,
        width: tuple[int, int],
        group_sizes: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.kernel_size = pair("kernel_size", kernel_size)
        self.stride = pair("stride", stride)
        self.dilation = pair("dilation", dilation)
        if isinstance(padding, str):
            check_padding_mode(padding, self.stride)
            self.padding: tuple[int, int] | str = padding
        else:
            self.padding = pair("padding", padding, least=0)
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"padding_mode: got {padding_mode!r}, accepted are {', '.join(map(repr, PADDING_MODES))}"
            )
        self.padding_mode = padding_mode
        self.group_sizes = (
            powers_of_two(*width) if group_sizes is None else check_group_sizes(group_sizes, *width)
        )
        self.group_size = self.group_sizes[-1]

    @property
    def group_size(self) -> int:
        """The active group size, one of ``group_sizes``; settable, and free to change between
        calls."""
        return self._group_size

    @group_size.setter
    def group_size(self, value: int) -> None:
        if value not in self.group_sizes:
            raise ValueError(f"group_size: got {value!r}, accepted are {self.group_sizes}")
        index = self.group_sizes.index(value)
        if getattr(self, "_group_size", None) != value:
            self._size_changed()
        self._group_size = self.group_sizes[index]
        # A new tensor each time: the old one may be saved for a backward pass. Not a buffer: it
        # stays on the host.
        self._active = torch.tensor(index + 1, dtype=torch.int64, device="cpu")

    def release_inactive(self) -> None:
        """Set the gradients of the terms beyond the active one to None.

        They are zeros after a backward pass, and a zero gradient still moves a weight through
        momentum and weight decay. Call it between ``backward()`` and ``optimizer.step()``, with
        ``group_size`` set to the largest size used in the step."""
        for terms in self._series():
            for term in terms[int(self._active) :]:
                term.grad = None

    def _series(self) -> tuple[nn.ParameterList, ...]:
        raise NotImplementedError

    def _size_changed(self) -> None:
        """Called when another group size is set."""

    def _note_parameters(self) -> None:
        """Called when the parameters have been made, moved, cast or loaded."""
        self._channels_last = any(
            memory_format(terms[-1]) == torch.channels_last for terms in self._series()
        )

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        applied = super()._apply(*args, **kwargs)
        self._note_parameters()
        return applied

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._note_parameters()

    def _convolve(self, input: Tensor, terms: list[Tensor], gates: Tensor | None) -> Tensor:
        """The grouped convolution of a four-dimensional input, padded by ``padding_mode`` already
        unless that is zeros."""
        padding = self.padding if self.padding_mode == "zeros" else (0, 0)
        input, padding = explicit_padding(input, self.kernel_size, padding, self.dilation)
        check_fits(input, self.kernel_size, padding, self.dilation)
        return apply(input, terms, self._active, gates, self.stride, padding, self.dilation)

    def _prepare(self, input: Tensor) -> Tensor:
        """The input with a batch dimension, padded unless the mode is zeros, and channels-last
        where the weights are: ``nn.Conv2d``'s output then is, too."""
        if input.dim() == 3:
            input = input.unsqueeze(0)
        if self.padding_mode != "zeros":
            (top, bottom), (left, right) = self._padding_per_side()
            input = F.pad(input, (left, right, top, bottom), mode=self.padding_mode)
        return input.contiguous(memory_format=torch.channels_last) if self._channels_last else input

    def _padding_per_side(self) -> tuple[tuple[int, int], ...]:
        if self.padding == "same":
            return same_padding(self.kernel_size, self.dilation)
        if isinstance(self.padding, str):
            return ((0, 0), (0, 0))
        return tuple((p, p) for p in self.padding)

    def _output_size(self, input_size: int | Sequence[int]) -> tuple[int, int]:
        padded = [
            size + before + after
            for size, (before, after) in zip(
                pair("input_size", input_size), self._padding_per_side(), strict=True
            )
        ]
        h, w = output_size(padded, self.kernel_size, self.stride, (0, 0), self.dilation)
        if h < 1 or w < 1:
            raise ValueError(
                f"input_size: got {input_size}, accepted are sizes that the dilated kernel fits into"
            )
        return h, w

    def _geometry_repr(self) -> str:
        text = f"kernel_size={self.kernel_size}, stride={self.stride}"
        if self.padding != (0, 0):
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return f"{text}, group_sizes={self.group_sizes}, group_size={self.group_size}"


class SeriesConv2d(_SeriesModule):
    """Grouped convolution over a series of residual weights, ``R_n = Σ_{i≤n} gate_i Ψ(r_i)``
    (GroSS, equation 5), without bias.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size, stride, padding, dilation, padding_mode, device, dtype: as
            ``torch.nn.Conv2d``'s.
        group_sizes: ascending, each dividing the next, the last dividing ``in_channels``, and
            ``in_channels / s`` dividing ``out_channels``; by default all such powers of two.

    Shape:
        input ``[N, C_in, H, W]`` or ``[C_in, H, W]``, output ``[N, C_out, H', W']``, in the input's
        memory format.

    Attributes:
        terms: ``nn.ParameterList`` of ``[C_out, s_i, kh, kw]``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group_sizes: Sequence[int] | None = None,
    ) -> None:
        width = (_channels("in_channels", in_channels), _channels("out_channels", out_channels))
        super().__init__(kernel_size, stride, padding, dilation, padding_mode, width, group_sizes)
        self.in_channels, self.out_channels = width
        self.terms = _parameters(
            [(out_channels, s, *self.kernel_size) for s in self.group_sizes], device, dtype
        )
        self._note_parameters()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw an independent weight per group size as ``nn.Conv2d`` does, and take residuals
        (equation 6)."""
        _assign(self.terms, residuals(_draw_grouped(self.terms), self.in_channels))

    def forward(self, input: Tensor, gates: Tensor | None = None) -> Tensor:
        """Convolve at the active group size; ``gates`` ``[N]`` scale the terms."""
        terms = _terms(self.terms)
        check_input(input, terms[0])
        check_gates(gates, terms)
        _check_channels(input, self.in_channels)
        output = self._convolve(self._prepare(input), terms, gates)
        return output if input.dim() == 4 else output.squeeze(0)

    def macs(self, input_size: int | Sequence[int], group_size: int | None = None) -> int:
        """Multiply–accumulates for one image of ``input_size`` (H, W) at a group size (default: the
        active one)."""
        size = _one_of(self.group_size if group_size is None else group_size, self.group_sizes)
        return convolution_macs(
            self.out_channels, size, self.kernel_size, self._output_size(input_size)
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, {self._geometry_repr()}"

    def _series(self) -> tuple[nn.ParameterList, ...]:
        return (self.terms,)


class GroSSConv2d(_SeriesModule):
    """Drop-in for ``torch.nn.Conv2d``: pointwise → grouped → pointwise, at every group size at once
    (GroSS, Table 1, equation 5).

    Stride, padding and dilation are on the grouped convolution, the bias on the last pointwise one.
    At the n-th group size the layer is the bottleneck ``P_n = Σ_{i≤n} p_i``, ``R_n = Σ_{i≤n}
    Ψ(r_i)``, ``Q_n = Σ_{i≤n} q_i``; setting ``group_size`` costs nothing.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode:
            as ``torch.nn.Conv2d``'s.
        groups: 1; the layer brings its own.
        device, dtype: of the parameters.
        group_sizes: ascending, each dividing the next, the last dividing the input width, and the
            number of groups dividing the output width; by default all such powers of two.
        width: channels of the bottleneck, ``(width_in, width_out)`` or one int for both; by default
            ``in_channels``.
        relu: clamp the output at zero; in the fused kernel this costs nothing.

    On the CPU the layer runs in one pass (``gross::bottleneck``) unless ``GROSS_KERNELS_FUSED=0``;
    :meth:`pack` makes inference with small batches faster still.

    Shape:
        input ``[N, C_in, H, W]`` or ``[C_in, H, W]``, output ``[N, C_out, H', W']``, in the input's
        memory format.

    Attributes:
        pointwise_in: ``nn.ParameterList`` of ``p_i``, ``[width_in, C_in, 1, 1]``.
        grouped: ``nn.ParameterList`` of ``r_i``, ``[width_out, s_i, kh, kw]``.
        pointwise_out: ``nn.ParameterList`` of ``q_i``, ``[C_out, width_out, 1, 1]``.
        bias: ``[C_out]`` or None.

    Raises:
        ValueError, TypeError: for arguments that do not fit, naming the argument.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group_sizes: Sequence[int] | None = None,
        width: int | tuple[int, int] | None = None,
        relu: bool = False,
    ) -> None:
        if groups != 1:
            raise ValueError(
                f"groups: got {groups}, accepted is 1: the layer brings its own groups, see group_sizes"
            )
        _channels("in_channels", in_channels)
        _channels("out_channels", out_channels)
        width = pair("width", in_channels if width is None else width)
        self._packed: _Packed | None
        super().__init__(kernel_size, stride, padding, dilation, padding_mode, width, group_sizes)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.width = width
        self.relu = relu
        width_in, width_out = width
        count = len(self.group_sizes)
        self.pointwise_in = _parameters([(width_in, in_channels, 1, 1)] * count, device, dtype)
        self.grouped = _parameters(
            [(width_out, s, *self.kernel_size) for s in self.group_sizes], device, dtype
        )
        self.pointwise_out = _parameters([(out_channels, width_out, 1, 1)] * count, device, dtype)
        if bias:
            self.bias: nn.Parameter | None = nn.Parameter(
                torch.empty(out_channels, device=device, dtype=dtype)
            )
        else:
            self.register_parameter("bias", None)
        self._note_parameters()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw an independent bottleneck per group size and take residuals (equation 6).

        P and Q have variance 1/fan-in and R has ``nn.Conv2d``'s, so that the output's variance is
        that of a fresh ``nn.Conv2d`` at every group size. The bias is drawn as ``nn.Conv2d`` draws
        it."""
        for series in (self.pointwise_in, self.pointwise_out):
            weights = [
                nn.init.kaiming_uniform_(torch.empty_like(p), nonlinearity="linear") for p in series
            ]
            _assign(series, _differences(weights))
        _assign(self.grouped, residuals(_draw_grouped(self.grouped), self.width[0]))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_bottlenecks(
        cls, conv: nn.Conv2d, bottlenecks: Mapping[int, tuple[Tensor, Tensor, Tensor]]
    ) -> GroSSConv2d:
        """Build the layer from independent bottlenecks, one per group size, by equation 6.

        Args:
            conv: the convolution that the layer replaces: gives geometry, bias, dtype and device.
            bottlenecks: group size → ``(P [width_in, C_in, 1, 1], R [width_out, s, kh, kw], Q
                [C_out, width_out, 1, 1])``.

        Returns:
            A layer that computes, at each group size, what that size's bottleneck computes; copies
            of the weights.

        Raises:
            ValueError: if the shapes do not fit the convolution or one another.
        """
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"conv: got {type(conv).__name__}, accepted is a torch.nn.Conv2d")
        if not bottlenecks:
            raise ValueError("bottlenecks: got none, accepted is at least one")
        for size, weights in bottlenecks.items():
            shapes = [
                tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__ for w in weights
            ]
            if [len(shape) for shape in shapes if isinstance(shape, tuple)] != [4, 4, 4]:
                raise ValueError(
                    f"bottlenecks[{size}]: got {shapes}, accepted are P, R, Q, Tensors of 4 dimensions"
                )
        group_sizes = tuple(sorted(bottlenecks))
        width_in, width_out = (weight.shape[0] for weight in bottlenecks[group_sizes[0]][:2])
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            conv.weight.device,
            conv.weight.dtype,
            group_sizes=group_sizes,
            width=(width_in, width_out),
        )
        names = ("P", "R", "Q")
        series = (layer.pointwise_in, layer.grouped, layer.pointwise_out)
        for i, s in enumerate(group_sizes):
            for name, weight, parameters in zip(names, bottlenecks[s], series, strict=True):
                if weight.shape != parameters[i].shape:
                    raise ValueError(
                        f"bottlenecks[{s}]: got {name} of shape {tuple(weight.shape)}, accepted is "
                        f"{tuple(parameters[i].shape)}"
                    )
        # Differences in float32 at least: in 16 bits the sums of the terms would drift from the
        # bottlenecks.
        wide = torch.promote_types(conv.weight.dtype, torch.float32)
        p, r, q = (
            [bottlenecks[s][k].detach().to(conv.weight.device, wide) for s in group_sizes]
            for k in range(3)
        )
        _assign(layer.pointwise_in, _differences(p))
        _assign(layer.grouped, residuals(r, width_in))
        _assign(layer.pointwise_out, _differences(q))
        if layer.bias is not None:
            _assign([layer.bias], [conv.bias])
        return layer.train(conv.training)

    def forward(self, input: Tensor, gates: Tensor | None = None) -> Tensor:
        """The bottleneck at the active group size; ``gates`` ``[N]`` scale the i-th terms of all
        three series.

        Raises:
            RuntimeError: if a parameter has changed since :meth:`pack`.
        """
        first, grouped, last = map(_terms, self._series())
        check_input(input, grouped[0])
        check_gates(gates, grouped)
        _check_channels(input, self.in_channels)
        # The first pointwise has no bias, so padding before it, in any mode, is padding after it.
        padding = self.padding if self.padding_mode == "zeros" else (0, 0)
        prepared, padding = explicit_padding(
            self._prepare(input), self.kernel_size, padding, self.dilation
        )
        check_fits(prepared, self.kernel_size, padding, self.dilation)
        packed = self._packed
        if (
            packed is not None
            and gates is None
            and packed.serves(prepared, _sources(first, grouped, last, self.bias))
        ):
            shape = (*packed.channels, *self.kernel_size, *self.stride, *padding, *self.dilation)
            output = torch.ops.gross.bottleneck_packed.default(
                prepared, packed.weights, shape, self.relu
            )
        else:
            weights = (first, grouped, last, self.bias, self._active, gates)
            geometry = (self.stride, padding, self.dilation, self.relu)
            if dispatch.choose_layer(input.device.type).name == "fused":
                output, _ = call(
                    torch.ops.gross.bottleneck.default,
                    prepared,
                    *weights,
                    *geometry,
                    self._keeps_inner(),
                )
            else:
                output = bottleneck.parts(prepared, *weights, *geometry)
        return output if input.dim() == 4 else output.squeeze(0)

    def _keeps_inner(self) -> bool:
        # Reading the first pointwise's output back is cheaper than computing it again from 128
        # channels on.
        return self.in_channels >= 128 and torch.is_grad_enabled()

    def explain(self, device: torch.device | str = "cpu") -> str:
        """One sentence: whether the layer runs in one pass on ``device`` or as three convolutions,
        and why. "packed" is said of a packed layer; its packed weights serve calls without
        gradients."""
        choice = dispatch.choose_layer(torch.device(device).type)
        packed = ", packed" if choice.name == "fused" and self._packed is not None else ""
        return f"{choice.name}{packed}: {choice.reason}"

    def pack(self, dtype: torch.dtype | None = None) -> GroSSConv2d:
        """Keep the summed weights of the active group size in the fused kernel's order, for
        inference.

        Summing and ordering them at every call costs more than the convolution itself where maps
        are small and channels many. ``train()``, loading, moving or casting the layer and setting
        another group size drop them; they are not part of ``state_dict``. Calls with gates, with an
        input of another dtype or with gradients enabled do without.

        Args:
            dtype: the inputs' dtype; by default the parameters'.

        Returns:
            The layer itself.

        Raises:
            RuntimeError: if the layer is in training mode.
        """
        if self.training:
            raise RuntimeError(
                "pack: got a layer in training mode, accepted is one in evaluation mode: call eval() first"
            )
        like = (
            self.grouped[0].new_empty(0)
            if dtype is None
            else self.grouped[0].new_empty(0, dtype=dtype)
        )
        check_input(like.expand(1, 1, 1, 0), self.grouped[0])
        self._packed = (
            _Packed(self, like) if dispatch.choose_layer(like.device.type).name == "fused" else None
        )
        return self

    def train(self, mode: bool = True) -> GroSSConv2d:
        if mode:
            self._packed = None
        return super().train(mode)

    def _size_changed(self) -> None:
        self._packed = None

    def _note_parameters(self) -> None:
        super()._note_parameters()
        self._packed = None

    def fold(self, group_size: int | None = None) -> nn.Sequential:
        """The layer at one group size (default: the active one) as three plain ``nn.Conv2d`` with
        copies of the summed weights."""
        size = _one_of(self.group_size if group_size is None else group_size, self.group_sizes)
        active = torch.tensor(self.group_sizes.index(size) + 1, device="cpu")
        width_in, width_out = self.width
        made: Any = {"device": self.grouped[0].device, "dtype": self.grouped[0].dtype}
        geometry: Any = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "padding_mode": self.padding_mode,
        }
        first = nn.Conv2d(self.in_channels, width_in, 1, bias=False, **made)
        middle = nn.Conv2d(
            width_in,
            width_out,
            self.kernel_size,
            groups=width_in // size,
            bias=False,
            **geometry,
            **made,
        )
        last = nn.Conv2d(width_out, self.out_channels, 1, bias=self.bias is not None, **made)
        with torch.no_grad():
            first.weight.copy_(series_sum(list(self.pointwise_in), active, None))
            middle.weight.copy_(sum_terms(list(self.grouped), width_in, int(active)))
            last.weight.copy_(series_sum(list(self.pointwise_out), active, None))
            if self.bias is not None and last.bias is not None:
                last.bias.copy_(self.bias)
        return nn.Sequential(first, middle, last, *([nn.ReLU()] if self.relu else [])).train(
            self.training
        )

    def macs(self, input_size: int | Sequence[int], group_size: int | None = None) -> int:
        """Multiply–accumulates for one image of ``input_size`` (H, W) at a group size (default: the
        active one).

        The first pointwise counts at the input's resolution, the grouped and the last pointwise at
        the output's; a bias counts one per output element."""
        size = _one_of(self.group_size if group_size is None else group_size, self.group_sizes)
        output = self._output_size(input_size)
        width_in, width_out = self.width
        return (
            convolution_macs(width_in, self.in_channels, (1, 1), pair("input_size", input_size))
            + convolution_macs(width_out, size, self.kernel_size, output)
            + convolution_macs(self.out_channels, width_out, (1, 1), output, self.bias is not None)
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, {self._geometry_repr()}"
        if self.width != (self.in_channels, self.in_channels):
            text += f", width={self.width}"
        if self.bias is None:
            text += ", bias=False"
        return f"{text}, relu=True" if self.relu else text

    def _series(self) -> tuple[nn.ParameterList, ...]:
        # nn.Module.__getattr__ would take 1.7 µs, which is a sixth of the smallest packed layer's
        # time.
        modules: Any = self._modules
        return modules["pointwise_in"], modules["grouped"], modules["pointwise_out"]


class _Packed:
    """Summed weights in the fused kernel's order, and what they were made from.

    Attributes:
        weights, channels: the operator's ``packed``, and the first numbers of its ``shape``.
        sources, state: the parameters, kept so that no other object takes their identities, and
            what they were like.
    """

    def __init__(self, layer: GroSSConv2d, like: Tensor) -> None:
        self.dtype = like.dtype
        self.channels = (*layer.width, layer.group_size, layer.out_channels)
        first, grouped, last = map(_terms, layer._series())
        self.sources = _sources(first, grouped, last, layer.bias)
        if any(source.is_inference() for source in self.sources):
            raise RuntimeError(
                "pack: got parameters made in inference mode, accepted are those whose changes torch counts"
            )
        self.state = _state(self.sources)
        with torch.no_grad():
            self.weights = torch.ops.gross.bottleneck_pack(
                like, first, grouped, last, layer.bias, layer._active, None
            )

    def serves(self, input: Tensor, sources: list[Tensor]) -> bool:
        """Whether the packed weights can be used for this call.

        Raises:
            RuntimeError: if a parameter has changed since they were made.
        """
        # They are on the CPU, and so then is the input.
        if torch.is_grad_enabled() or dispatch.choose_layer("cpu").name != "fused":
            return False
        if _activation_dtype(input) != self.dtype:
            return False
        if torch.compiler.is_compiling():
            return True
        if _state(sources) != self.state:
            raise RuntimeError(
                "pack: a parameter has changed since the layer was packed; call pack() again, or train() to drop the "
                "packed weights"
            )
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a layer are not packed: their parameters are others."""
        return type(None), ()


def _state(parameters: list[Tensor]) -> list[tuple[int, int, int]]:
    """Which parameters they are, where their numbers are, and how often they have been written."""
    return [(id(parameter), parameter.data_ptr(), parameter._version) for parameter in parameters]


def _activation_dtype(input: Tensor) -> torch.dtype:
    """The dtype that a kernel on the CPU computes in: autocast casts the input."""
    if torch.is_autocast_enabled("cpu") and input.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return input.dtype


def _terms(series: nn.ParameterList) -> list[Tensor]:
    """The terms as a list. Iterating over an ``nn.ParameterList`` itself takes two microseconds a
    term."""
    parameters = series._parameters
    return list(parameters.values()) if len(parameters) == len(series) else list(series)  # type: ignore[arg-type]


def _sources(
    first: list[Tensor], grouped: list[Tensor], last: list[Tensor], bias: Tensor | None
) -> list[Tensor]:
    return [*first, *grouped, *last] if bias is None else [*first, *grouped, *last, bias]


def pack(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Pack every :class:`GroSSConv2d` of a network for inference (:meth:`GroSSConv2d.pack`) and
    return the network.

    Args:
        network: a module in evaluation mode.
        dtype: the activations' dtype; by default each layer's own.
    """
    for module in network.modules():
        if isinstance(module, GroSSConv2d):
            module.pack(dtype)
    return network


def _parameters(
    shapes: Iterable[tuple[int, ...]], device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.ParameterList:
    return nn.ParameterList(
        [nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in shapes]
    )


def _draw_grouped(terms: Iterable[Tensor]) -> list[Tensor]:
    # nn.Conv2d's own: variance 1 / (3 fan-in).
    return [nn.init.kaiming_uniform_(torch.empty_like(term), a=math.sqrt(5)) for term in terms]


def _differences(weights: list[Tensor]) -> list[Tensor]:
    """Equation 6 for weights of one shape: the first, then each less the one before."""
    return [weights[0]] + [b - a for a, b in itertools.pairwise(weights)]


@torch.no_grad()
def _assign(parameters: Iterable[Tensor], values: Iterable[Any]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _channels(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, accepted is an int")
    if value < 1:
        raise ValueError(f"{name}: got {value}, accepted are ints of at least 1")
    return value


def _one_of(value: int, group_sizes: tuple[int, ...]) -> int:
    if value not in group_sizes:
        raise ValueError(f"group_size: got {value!r}, accepted are {group_sizes}")
    return value


def _check_channels(input: Tensor, in_channels: int) -> None:
    if input.shape[-3] != in_channels:
        raise ValueError(
            f"input: got {input.shape[-3]} channels in shape {tuple(input.shape)}, accepted are {in_channels}"
        )
