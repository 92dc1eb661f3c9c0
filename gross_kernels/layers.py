"""``SeriesConv2d``, the grouped convolution over a series, and ``GroSSConv2d``, the drop-in
replacement of ``nn.Conv2d``."""

from __future__ import annotations

import itertools
import math
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import bottleneck, dispatch, grouped_pointwise
from .bottleneck import Weights
from .call import memory_format
from .checks import (
    check_device,
    check_dtype,
    check_flag,
    check_gates,
    check_group_size,
    check_input,
    check_input_channels,
    check_input_dtype,
    check_one_of,
)
from .functional import apply, explicit_padding, series_sum
from .geometry import (
    Geometry,
    check_padding,
    first_size,
    integer,
    padded_size,
    pads_first,
    pair,
    same_padding,
)
from .layer_times import LayerCall, multiplied
from .library import call, clock, recomputed, transformed
from .packing import Packed
from .series import (
    MAX_TERMS,
    Series,
    check_group_sizes,
    convolution_macs,
    powers_of_two,
    residuals,
    sum_terms,
)

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
#: Images and size of a large map.
LARGE: tuple[int, tuple[int, ...]] = (64, (56, 56))
#: How many changes of a layer's size lie between a forward pass and its recomputation at most.
REMEMBERED = 256


class _SeriesModule(nn.Module):
    """What both layers share: the geometry of the convolution, the group sizes, and which of them
    is active."""

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        geometry: tuple[Any, Any, Any],
        padding_mode: str,
        width: tuple[int, int],
        group_sizes: Sequence[int] | None,
    ) -> None:
        super().__init__()
        self.kernel_size = pair("kernel_size", kernel_size)
        stride, padding, dilation = geometry
        self.stride = pair("stride", stride)
        self.dilation = pair("dilation", dilation)
        self.padding = check_padding(padding, self.stride)
        self.padding_mode = check_one_of("padding_mode", padding_mode, PADDING_MODES)
        self.group_sizes = (
            powers_of_two(*width) if group_sizes is None else check_group_sizes(group_sizes, *width)
        )
        #: What was set when, by the clock, and within the backward pass of which node.
        self._sizes: deque[tuple[int, Tensor]] = deque(maxlen=REMEMBERED)
        self._set_by: int | None = None
        self._group_size = 0
        self.group_size = self.group_sizes[-1]
        self._forget_sizes()

    @property
    def group_size(self) -> int:
        """The active group size, one of ``group_sizes``; settable, and free to change between
        calls.

        Where ``torch.utils.checkpoint`` computes a call again, in either of its variants, the size
        in force is the one that it was made at, unless the checkpointed function itself sets
        another. Two things it cannot see: a size that another thread sets than the one that runs
        the layer, and a ``torch.compile``d layer inside a checkpoint that is not itself
        compiled."""
        if recomputed() is None:
            return self._group_size
        return self.group_sizes[int(self._in_force()) - 1]

    @group_size.setter
    def group_size(self, value: int) -> None:
        size = check_group_size(value, self.group_sizes)
        if size != self._group_size:
            self._size_changed()
        self._group_size = size
        # A new tensor each time: the old one may be saved for a backward pass. Not a buffer: it
        # stays on the host. Nor an inference tensor, which no backward pass could use.
        with torch.inference_mode(False):
            self._active = torch.tensor(
                self.group_sizes.index(size) + 1, dtype=torch.int64, device="cpu"
            )
        if not torch.compiler.is_compiling():
            self._sizes.append((clock(), self._active))
            self._set_by = recomputed()

    def _in_force(self) -> Tensor:
        """``active`` for this call: of the size that is set or, where a backward pass makes the
        call again, of the size that was set when it was made."""
        at = recomputed()
        if at is None or at == self._set_by:
            return self._active
        for since, active in reversed(self._sizes):
            if since < at:
                return active
        raise RuntimeError(
            f"group_size: got more than {REMEMBERED} sizes between a checkpointed call and its "
            "backward pass, accepted are fewer: the size of the call is no longer known"
        )

    def _forget_sizes(self) -> None:
        """Begin the record of sizes."""
        self._sizes = deque([(-1, self._active)], maxlen=REMEMBERED)
        self._set_by = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy, maybe in another process, whose clock is another.
        super().__setstate__(state)
        self._forget_sizes()

    def _replicate_for_data_parallel(self) -> Self:
        # A replica lives for one call, in a thread of its own, whose clock is another.
        replica: Any = super()._replicate_for_data_parallel()
        replica._forget_sizes()
        return replica

    def release_inactive(self) -> None:
        """Set the gradients of the terms beyond the active one to None.

        They are zeros after a backward pass, and a zero gradient still moves a weight through
        momentum and weight decay. Call it between ``backward()`` and ``optimizer.step()``, with
        ``group_size`` set to the largest size used in the step."""
        active = int(self._active)
        for series in self._series():
            for name, parameter in series.named_parameters():
                # "3"; "3_orig" where it is pruned, "parametrizations.3.original" if parametrised.
                number = re.search(r"\d+", name)
                if number is not None and int(number[0]) >= active:
                    parameter.grad = None

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

    def _traced(self, input: Any, gates: Any) -> fx.Proxy:
        """One call of this module in the graph of ``torch.fx``, whatever its tracer takes for a
        leaf."""
        path = input.tracer.path_of_module(self)
        if not path:
            raise TypeError(
                f"input: got {type(input).__name__} for a layer that is itself traced, accepted is "
                "a module that holds it, such as torch.nn.Sequential(layer)"
            )
        arguments = (input,) if gates is None else (input, gates)
        return input.tracer.create_proxy("call_module", path, arguments, {})

    def _padded(self, input: Tensor, later: bool = False) -> tuple[Tensor, Geometry]:
        """The input with a batch dimension, channels-last where the weights are (``nn.Conv2d``'s
        output then is, too), and with what of its padding is not left to the convolution, nor to
        :meth:`_pad` for ``later``."""
        if input.dim() == 3:
            input = input.unsqueeze(0)
        padding = self.padding
        if self.padding_mode != "zeros":
            padding = (0, 0)
            if not later:
                input = self._pad(input)
        if self._channels_last:
            input = input.contiguous(memory_format=torch.channels_last)
        input, padding = explicit_padding(input, self.kernel_size, padding, self.dilation)
        geometry = Geometry(self.stride, padding, self.dilation)
        size: Sequence[int] = input.shape[-2:]
        geometry.check_fits(self._padded_size(size) if later else size, self.kernel_size)
        return input, geometry

    def _pad(self, input: Tensor) -> Tensor:
        """The input padded in a mode other than zeros."""
        (top, bottom), (left, right) = self._padding_per_side()
        return F.pad(input, (left, right, top, bottom), mode=self.padding_mode)

    def _padding_per_side(self) -> tuple[tuple[int, int], ...]:
        if self.padding == "same":
            return same_padding(self.kernel_size, self.dilation)
        if isinstance(self.padding, str):
            return ((0, 0), (0, 0))
        return tuple((p, p) for p in self.padding)

    def _padded_size(self, input_size: int | Sequence[int]) -> tuple[int, int]:
        return padded_size(pair("input_size", input_size), self._padding_per_side())

    def _output_size(self, input_size: int | Sequence[int]) -> tuple[int, int]:
        padded = self._padded_size(input_size)
        geometry = Geometry(self.stride, (0, 0), self.dilation)
        h, w = geometry.output_size(padded, self.kernel_size)
        if h < 1 or w < 1:
            raise ValueError(
                f"input_size: got {input_size}, accepted are sizes that the dilated kernel fits "
                "into"
            )
        return h, w

    def _size(self, group_size: int | None) -> int:
        """A group size of the layer, by default the active one."""
        return (
            self.group_size
            if group_size is None
            else check_group_size(group_size, self.group_sizes)
        )

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
        width = _channels(in_channels, out_channels)
        made = check_device(device), check_dtype(dtype)
        super().__init__(kernel_size, (stride, padding, dilation), padding_mode, width, group_sizes)
        self.in_channels, self.out_channels = width
        self.terms = _parameters(
            [(self.out_channels, s, *self.kernel_size) for s in self.group_sizes], *made
        )
        self._note_parameters()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw an independent weight per group size as ``nn.Conv2d`` does, and take residuals
        (equation 6)."""
        _assign(self.terms, residuals(_draw_grouped(self.terms), self.in_channels))

    def forward(self, input: Tensor, gates: Tensor | None = None) -> Tensor:
        """Convolve at the active group size; ``gates`` ``[N]`` scale the terms."""
        if isinstance(input, fx.Proxy):
            return self._traced(input, gates)
        terms = _terms(self.terms, _NAMES[len(self.group_sizes)])
        check_input(input, terms[0])
        check_gates(gates, terms)
        check_input_channels(input, self.in_channels)
        padded, geometry = self._padded(input)
        output = apply(padded, terms, self._in_force(), gates, geometry)
        return output if input.dim() == 4 else output.squeeze(0)

    def macs(self, input_size: int | Sequence[int], group_size: int | None = None) -> int:
        """Multiply–accumulates for one image of ``input_size`` (H, W) at a group size (default: the
        active one)."""
        size = self._size(group_size)
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

    On the CPU the layer runs in one pass (``gross::bottleneck``) unless ``GROSS_KERNELS_FUSED=0``,
    or ``padding_mode`` is not "zeros" and more than triples the map's pixels; :meth:`pack` makes
    inference with small batches faster still. On a GPU it runs as three convolutions, without
    gradients with the last two in one kernel, or as the dense one that it amounts to, whichever is
    predicted to be fastest (:meth:`explain`).

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
        if integer("groups", groups) != 1:
            raise ValueError(
                f"groups: got {groups}, accepted is 1: the layer brings its own groups, see "
                "group_sizes"
            )
        in_channels, out_channels = _channels(in_channels, out_channels)
        width = pair("width", in_channels if width is None else width)
        made = check_device(device), check_dtype(dtype)
        check_flag("bias", bias)
        check_flag("relu", relu)
        self._packed: Packed | None
        super().__init__(kernel_size, (stride, padding, dilation), padding_mode, width, group_sizes)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.width = width
        self.relu = relu
        width_in, width_out = width
        count = len(self.group_sizes)
        self.pointwise_in = _parameters([(width_in, in_channels, 1, 1)] * count, *made)
        self.grouped = _parameters(
            [(width_out, s, *self.kernel_size) for s in self.group_sizes], *made
        )
        self.pointwise_out = _parameters([(out_channels, width_out, 1, 1)] * count, *made)
        if bias:
            self.bias: nn.Parameter | None
            (self.bias,) = _parameters([(out_channels,)], *made)
        else:
            super().register_parameter("bias", None)
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
        if not isinstance(bottlenecks, Mapping):
            raise TypeError(
                f"bottlenecks: got {type(bottlenecks).__name__}, accepted is a dictionary of group "
                "sizes"
            )
        if not bottlenecks:
            raise ValueError("bottlenecks: got none, accepted is at least one")
        for size, weights in bottlenecks.items():
            given = weights if isinstance(weights, Sequence) else [weights]
            shapes = [tuple(w.shape) if isinstance(w, Tensor) else type(w).__name__ for w in given]
            if [len(shape) for shape in shapes if isinstance(shape, tuple)] != [4, 4, 4]:
                raise ValueError(
                    f"bottlenecks[{size}]: got {shapes}, accepted are P, R, Q, Tensors of 4 "
                    "dimensions"
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
        if isinstance(input, fx.Proxy):
            return self._traced(input, gates)
        weights = self._weights(gates)
        check_input(input, weights.grouped[0])
        check_gates(gates, weights.grouped)
        check_input_channels(input, self.in_channels)
        later = self.padding_mode != "zeros" and self._pads_later(input.shape[-2:])
        padded, geometry = self._padded(input, later)
        packed = self._packed
        if later:
            output, _ = bottleneck.parts(padded, weights, geometry, self.relu, self._pad)
        elif packed is not None and packed.serves(padded, weights):
            output = packed(padded, self.kernel_size, geometry, self.relu)
        else:
            way = self._way(padded, geometry)
            if way == "fused":
                output, _ = call(
                    torch.ops.gross.bottleneck.default,
                    padded,
                    *weights,
                    *geometry,
                    self.relu,
                    self._keeps_inner(),
                )
            elif way == "merged":
                output = bottleneck.merged(padded, weights, geometry, self.relu)
            elif way == "grouped_pointwise" and not (torch.is_grad_enabled() or transformed()):
                output = grouped_pointwise.layer(padded, weights, geometry, self.relu)
            else:
                output, _ = bottleneck.parts(padded, weights, geometry, self.relu)
        return output if input.dim() == 4 else output.squeeze(0)

    def _way(self, input: Tensor, geometry: Geometry) -> str:
        """How this call runs, by :func:`dispatch.choose_layer`."""
        device = input.device.type
        if device != "cuda":
            return dispatch.choose_layer(device).name
        if torch.compiler.is_compiling():
            # One graph for maps and groups of all sizes: what is faster on large maps, where groups
            # of up to 16 take the same time.
            (images, size), group_size = LARGE, min(16, self.group_sizes[-1])
        else:
            images, size = input.shape[0], tuple(input.shape[2:])
            group_size = self.group_size
        output = geometry.output_size(size, self.kernel_size)
        autocast = torch.is_autocast_enabled(device) and input.dtype != torch.float64
        dtype = torch.get_autocast_dtype(device) if autocast else input.dtype
        return dispatch.choose_layer(
            device, self._described(images, size, output, group_size, dtype)
        ).name

    def _described(
        self,
        images: int,
        size: Sequence[int],
        output: Sequence[int],
        group_size: int,
        dtype: torch.dtype,
    ) -> LayerCall:
        return LayerCall(
            images * math.prod(size),
            images * math.prod(output),
            self.in_channels,
            *self.width,
            self.out_channels,
            group_size,
            math.prod(self.kernel_size),
            dtype.itemsize,
            multiplied(dtype),
            torch.is_grad_enabled(),
        )

    @property
    def weight(self) -> Tensor:
        """The dense kernel ``[C_out, C_in, kh, kw]`` that the layer amounts to at the active group
        size, ``Q_n · R_n · P_n``: computed when it is read, differentiable, not to be written.
        ``relu`` is not part of it."""
        weights = self._weights(None)
        return bottleneck.merged_kernel(weights).to(weights.pointwise_in[0].dtype)

    @weight.setter
    def weight(self, value: Any) -> None:
        raise AttributeError(_READ_ONLY)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # What nn.Module does with `layer.weight = nn.Parameter(…)`.
        if name == "weight":
            raise AttributeError(_READ_ONLY)
        super().register_parameter(name, param)

    def _pads_later(self, input_size: Sequence[int]) -> bool:
        """Whether to pad a map after the first pointwise, in a mode other than zeros."""
        # A program that is exported serves maps of any size.
        exporting = torch.compiler.is_exporting()
        return not exporting and not pads_first(input_size, self._padding_per_side())

    def _keeps_inner(self) -> bool:
        # Reading the first pointwise's output back is cheaper than computing it again from 128
        # channels on.
        return self.in_channels >= 128 and torch.is_grad_enabled()

    def explain(
        self,
        device: torch.device | str = "cpu",
        input_size: int | Sequence[int] = LARGE[1],
        images: int = LARGE[0],
        dtype: torch.dtype | None = None,
    ) -> str:
        """One sentence: whether the layer runs in one pass on ``device``, as three convolutions or
        as one dense one, and why; on a GPU with the microseconds predicted for each. "packed" is
        said of a packed layer; its packed weights serve calls without gradients.

        Args:
            device: where.
            input_size: H and W of the input.
            images: how many.
            dtype: of the input; by default the parameters'.

        Raises:
            TypeError, ValueError, RuntimeError: if ``device`` names none, or for other arguments
                that do not fit.
        """
        found = check_device(device) or torch.get_default_device()
        images, size = integer("images", images, 1), pair("input_size", input_size)
        first = self.grouped[0]
        if dtype is not None:
            check_input_dtype(dtype, first.dtype, found.type, "dtype")
        output = self._output_size(size)
        described = self._described(images, size, output, self.group_size, dtype or first.dtype)
        choice = dispatch.choose_layer(found.type, described)
        packed = ", packed" if choice.name == "fused" and self._packed is not None else ""
        return f"{choice.name}{packed}: {choice.reason}"

    def pack(self, dtype: torch.dtype | None = None) -> GroSSConv2d:
        """Keep the summed weights of the active group size in the fused kernel's order, for
        inference.

        Summing and ordering them at every call costs more than the convolution itself where maps
        are small and channels many. ``train()``, loading, moving or casting the layer and setting
        another group size drop them; they are not part of ``state_dict``. Calls with gates, with an
        input of another dtype, with gradients enabled or compiled by ``torch.compile`` do without.

        A parameter that changes in place afterwards, as by an optimiser's step or ``add_``, makes
        the next call raise RuntimeError. What torch does not count it cannot see: after
        ``parameter.data.add_()`` the old weights answer.

        Args:
            dtype: the inputs' dtype; by default the parameters'.

        Returns:
            The layer itself.

        Raises:
            TypeError: for a dtype that no input of the layer has.
            RuntimeError: if the layer is in training mode, or its parameters are pruned or
                parametrised.
        """
        if self.training:
            raise RuntimeError(
                "pack: got a layer in training mode, accepted is one in evaluation mode: call "
                "eval() first"
            )
        weights = self._weights(None)
        first = weights.grouped[0]
        if dtype is not None:
            check_input_dtype(dtype, first.dtype, first.device.type, "dtype")
        fused = dispatch.choose_layer(first.device.type).name == "fused"
        self._packed = Packed(weights, first.new_empty(0, dtype=dtype)) if fused else None
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
        size = self._size(group_size)
        count = self.group_sizes.index(size) + 1
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
            active = torch.tensor(count, device="cpu")
            p, r, q, *_ = self._weights(None)
            first.weight.copy_(series_sum(p, active, None))
            middle.weight.copy_(sum_terms(Series(r, count), width_in))
            last.weight.copy_(series_sum(q, active, None))
            if self.bias is not None and last.bias is not None:
                last.bias.copy_(self.bias)
        return nn.Sequential(first, middle, last, *([nn.ReLU()] if self.relu else [])).train(
            self.training
        )

    def macs(self, input_size: int | Sequence[int], group_size: int | None = None) -> int:
        """Multiply–accumulates for one image of ``input_size`` (H, W) at a group size (default: the
        active one).

        The first pointwise counts at the input's resolution, the grouped and the last pointwise at
        the output's; a bias counts one per output element. Where ``padding_mode`` is not "zeros",
        the first pointwise runs on the padded map, and counts so, unless that has more than three
        times the pixels: it is then padded afterwards."""
        size = self._size(group_size)
        output = self._output_size(input_size)
        width_in, width_out = self.width
        first = first_size(
            pair("input_size", input_size), self._padding_per_side(), self.padding_mode
        )
        return (
            convolution_macs(width_in, self.in_channels, (1, 1), first)
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
        return self.pointwise_in, self.grouped, self.pointwise_out

    def _weights(self, gates: Tensor | None) -> Weights:
        # nn.Module.__getattr__ would take 1.7 µs, which is a sixth of the smallest packed layer's
        # time.
        modules: Any = self._modules
        parameters: Any = self._parameters
        names = _NAMES[len(self.group_sizes)]
        return Weights(
            _terms(modules["pointwise_in"], names),
            _terms(modules["grouped"], names),
            _terms(modules["pointwise_out"], names),
            parameters["bias"] if "bias" in parameters else self.bias,  # noqa: SIM401
            self._in_force(),
            gates,
        )


_READ_ONLY = (
    "weight: got a value to set, accepted is reading it: it is the product of the layer's terms; "
    "set those (pointwise_in, grouped, pointwise_out), build the layer by from_bottlenecks, or "
    "decompose a convolution with the new weight"
)


#: By the number of terms: the names of their parameters.
_NAMES = [tuple(map(str, range(count))) for count in range(MAX_TERMS + 1)]


def _terms(series: nn.ParameterList, names: tuple[str, ...]) -> list[Tensor]:
    """The terms, by name: the order of a module's parameters is that in which they were set, and
    prune and parametrize set others. Iterating over an ``nn.ParameterList`` itself takes two
    microseconds a term."""
    parameters: Any = series._parameters
    try:
        return [parameters[name] for name in names]
    except KeyError:
        # What is computed at every call is computed by hooks, which a list, never called, does not
        # run by itself.
        for hook in series._forward_pre_hooks.values():
            hook(series, ())
        return list(series)


def pack(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Pack every :class:`GroSSConv2d` of a network for inference (:meth:`GroSSConv2d.pack`) and
    return the network.

    Args:
        network: a module in evaluation mode.
        dtype: the activations' dtype; by default each layer's own.

    Raises:
        TypeError, RuntimeError: as :meth:`GroSSConv2d.pack`.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network: got {type(network).__name__}, accepted is a torch.nn.Module")
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


def _channels(in_channels: int, out_channels: int) -> tuple[int, int]:
    return integer("in_channels", in_channels, 1), integer("out_channels", out_channels, 1)
