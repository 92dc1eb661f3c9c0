"""Composite kernels: convolution kernels that are sums of a few patterns of zeros and ones, and
structured kernels, whose patterns are cuboids (*Structured Convolutions for Efficient Neural
Network Design*, Bhalgat et al., NeurIPS 2020).

A kernel ``W = Σ_m α_m β_m`` of a binary basis {β_m} takes M multiplications for an output where it
took one per element; the sums over the patterns are the same for all output channels. With A the
matrix of the flattened patterns, ``α = A⁺W`` is the nearest such kernel, and ``‖(I − A A⁺)W‖`` how
far it is.

The cuboids of ones of size ``(C − c + 1) × (N − n + 1)²`` in a kernel of ``C × N²`` lie in ``c·n²``
places. Their A is a Kronecker product of one matrix per axis, and so are its pseudo-inverse and the
projection. Along an axis of length N with windows of d = N − n + 1, the sums of windows are the
vectors whose sums over the residue classes modulo d are all equal: a vector's distance from them is
in the differences between those d sums. Along channels nothing else is computed, and no matrix
formed; the other axes, short as they are, share one small matrix of such differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import integer


class Operations(NamedTuple):
    """Arithmetic operations of a layer."""

    multiplications: int
    additions: int


def window_sums(value: Tensor, dim: int, window: int, step: int = 1) -> Tensor:
    """``Σ_{k<window} value[i + k·step]`` along a dimension, for every i for which all of it is
    there.

    Sums of two windows make the next ones, as in the kernels: ⌊log₂ window⌋ passes, each addend
    added so often at most, where differences of prefix sums would lose digits to cancellation."""
    sums, width = value, 1
    for bit in bin(window)[3:]:
        wider = 2 * width + int(bit)
        length = value.shape[dim] - (wider - 1) * step
        total = sums.narrow(dim, 0, length) + sums.narrow(dim, width * step, length)
        if bit == "1":
            total = total + value.narrow(dim, 2 * width * step, length)
        sums, width = total, wider
    return sums


class CompositeBasis:
    """A basis of patterns of zeros and ones, {β_m}, and the kernels that are their sums.

    Args:
        patterns: ``[M, C, …]`` of zeros and ones, any dtype.

    Attributes:
        size: of a kernel, ``(C, …)``.
        coefficients: shape of a kernel's α: ``(M,)``.

    Raises:
        TypeError: if they are no tensor.
        ValueError: if there are none, or they hold something else than zeros and ones, or nothing.
    """

    def __init__(self, patterns: Tensor) -> None:
        accepted = "accepted is a Tensor [M, C, …] of zeros and ones, with a one in each pattern"
        if not isinstance(patterns, Tensor):
            raise TypeError(f"patterns: got {type(patterns).__name__}, {accepted}")
        if patterns.dim() < 2 or patterns.numel() == 0:
            raise ValueError(f"patterns: got shape {tuple(patterns.shape)}, {accepted}")
        ones = patterns == 1
        if not bool((ones | (patterns == 0)).all()) or not bool(ones.flatten(1).any(1).all()):
            raise ValueError(f"patterns: got other values or an empty pattern, {accepted}")
        self.size = tuple(patterns.shape[1:])
        self.coefficients: tuple[int, ...] = (len(patterns),)
        self._patterns = ones

    @property
    def patterns(self) -> Tensor:
        """The patterns, ``[M, C, …]``, as bools."""
        return self._patterns

    @cached_property
    def matrix(self) -> Tensor:
        """A: the flattened patterns as its columns, float64 ``[C·…, M]``."""
        return self.patterns.flatten(1).T.double()

    @cached_property
    def pseudo_inverse(self) -> Tensor:
        """A⁺, float64 ``[M, C·…]``."""
        return torch.linalg.pinv(self.matrix)

    @cached_property
    def rank(self) -> int:
        """Of A: how many of the patterns are independent."""
        return int(torch.linalg.matrix_rank(self.matrix))

    def compose(self, coefficients: Tensor) -> Tensor:
        """``W = Σ_m α_m β_m``, ``[…, C, …]`` from α of ``[…, *coefficients]``; differentiable."""
        _check_shape("coefficients", coefficients, self.coefficients)
        flat = coefficients @ self.matrix.T.to(coefficients)
        return flat.unflatten(-1, self.size)

    def project(self, weight: Tensor) -> Tensor:
        """``α = A⁺W`` of the nearest composite kernels, ``[…, *coefficients]`` from ``[…, C, …]``;
        computed in float64."""
        _check_shape("weight", weight, self.size)
        flat = weight.double().flatten(-len(self.size))
        return (flat @ self.pseudo_inverse.T.to(flat)).to(weight.dtype)

    def residual(self, weight: Tensor) -> Tensor:
        """``‖(I − A A⁺)W‖_F / ‖W‖_F`` of kernels ``[…, C, …]``, a scalar; 0 where W is. In float32
        at least; differentiable, with the gradient 0 where it is 0."""
        _check_shape("weight", weight, self.size)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return _norm(self._deviation(wide)) / _norm(wide).clamp_min(torch.finfo(wide.dtype).tiny)

    def _deviation(self, weight: Tensor) -> Tensor:
        """Something of the norm of (I − A A⁺)W."""
        flat = weight.flatten(-len(self.size))
        return flat - flat @ (self.matrix @ self.pseudo_inverse).to(flat)

    def operations(self, out_channels: int, positions: int) -> Operations:
        """Of a convolution with such kernels at so many output positions: the patterns' sums, which
        all output channels share, and then one multiplication per pattern. Sums that neighbouring
        positions could share are counted at each."""
        out_channels = integer("out_channels", out_channels, 1)
        positions = integer("positions", positions, 0)
        ones, count = int(self.matrix.sum()), self.matrix.shape[1]
        additions = ones - count + out_channels * (count - 1)
        return Operations(out_channels * count * positions, additions * positions)


class StructuredBasis(CompositeBasis):
    """The basis of structured kernels: cuboids of ones of size ``(C − c + 1) × (N − n + 1) × …``
    at every place in the kernel.

    Args:
        size: of a kernel, ``(C, N, …)``: channels, then any number of axes.
        structure: ``(c, n, …)``, one number per axis, each at most the axis's.

    Attributes:
        coefficients: ``(c, n, …)``: α are the weights of the small convolution.
        windows: of the sum-pooling, ``(C − c + 1, N − n + 1, …)``.

    Raises:
        TypeError, ValueError: if they are no ints, or do not fit one another.
    """

    def __init__(self, size: Sequence[int], structure: Sequence[int]) -> None:
        self.size = _numbers("size", size)
        self.coefficients = _numbers("structure", structure)
        if len(self.coefficients) != len(self.size) or any(
            small > large for small, large in zip(self.coefficients, self.size, strict=True)
        ):
            raise ValueError(
                f"structure: got {self.coefficients}, accepted are numbers of at most {self.size}"
            )
        self.windows = tuple(
            large - small + 1 for large, small in zip(self.size, self.coefficients, strict=True)
        )

    @property
    def patterns(self) -> Tensor:
        """The cuboids, ``[c·n·…, C, N, …]``, as bools."""
        count = math.prod(self.coefficients)
        unit = torch.eye(count, dtype=torch.float64).unflatten(1, self.coefficients)
        return self.compose(unit) == 1

    @property
    def rank(self) -> int:
        """Of A: all of the cuboids are independent."""
        return math.prod(self.coefficients)

    def compose(self, coefficients: Tensor) -> Tensor:
        """``W``, ``[…, C, N, …]`` from the small convolution's weights ``[…, c, n, …]``;
        differentiable."""
        _check_shape("coefficients", coefficients, self.coefficients)
        weight = self._flat(coefficients) @ self._kernel.matrix.T.to(coefficients)
        beyond = self.windows[0] - 1
        weight = window_sums(F.pad(weight, (0, 0, beyond, beyond)), -2, self.windows[0])
        return weight.reshape(*weight.shape[:-2], *self.size)

    def project(self, weight: Tensor) -> Tensor:
        """``α = A⁺W``, ``[…, c, n, …]`` from ``[…, C, N, …]``; computed in float64.

        Along channels, ``W_j − W_{j−1} = α_j − α_{j−d}`` once W is the nearest sum of windows."""
        _check_shape("weight", weight, self.size)
        wide = self._flat(weight.double())
        wide = wide @ self._kernel.inverse.T.to(wide)
        window, small = self.windows[0], self.coefficients[0]
        if window > 1:
            wide = wide - _tiled(_class_deviation(wide, window), self.size[0])
            steps = wide.diff(dim=-2, prepend=torch.zeros_like(wide[..., :1, :]))[..., :small, :]
            wide = _by_class(steps, window).cumsum(-3).flatten(-3, -2)[..., :small, :]
        return wide.reshape(*wide.shape[:-2], *self.coefficients).to(weight.dtype)

    def _deviation(self, weight: Tensor) -> Tensor:
        # I − P₁P₂ = (I − P₁) + P₁(I − P₂), which are orthogonal.
        flat, kernel = self._flat(weight), self._kernel
        differences = flat @ kernel.differences.to(flat)
        parts = [(differences @ kernel.scale.to(flat)).flatten()]
        window = self.windows[0]
        if window > 1:
            flat = flat - differences @ kernel.back.to(flat)
            sizes = _class_sizes(self.size[0], window).to(flat)
            parts.append((_class_deviation(flat, window) * sizes.sqrt()[:, None]).flatten())
        return torch.cat(parts)

    def _flat(self, tensor: Tensor) -> Tensor:
        """With the axes of the kernel, without channels, as one."""
        count = len(self.size)
        return tensor.reshape(*tensor.shape[: 1 - count or None], -1)

    @cached_property
    def _kernel(self) -> _Kernel:
        return _Kernel.of(self.size[1:], self.coefficients[1:])


class _Kernel(NamedTuple):
    """Small matrices in float64 for the axes of a kernel, flattened, K = ∏ N of them and k = ∏ n.

    Attributes:
        matrix, inverse: A ``[K, k]`` and A⁺.
        differences: B ``[K, K − k]`` of ones, minus ones and zeros: ``BᵀW = 0`` if and only if W is
            structured.
        scale: ``‖BᵀW · scale‖`` is the distance of W from the structured kernels.
        back: ``BᵀW · back`` is what W has beyond the nearest structured kernel.
    """

    matrix: Tensor
    inverse: Tensor
    differences: Tensor
    scale: Tensor
    back: Tensor

    @classmethod
    def of(cls, size: Sequence[int], structure: Sequence[int]) -> _Kernel:
        one = torch.ones(1, 1, dtype=torch.float64)
        matrix, chosen, rest = one, one, math.prod(size)
        columns = [one.new_zeros(rest, 0)]
        for large, small in zip(size, structure, strict=True):
            window = large - small + 1
            rest //= large
            ones = one.new_ones(large, small)
            matrix = torch.kron(matrix, ones.tril().triu(1 - window))
            classes = torch.eye(window).repeat(-(-large // window), 1)[:large].double()
            differences = classes[:, 1:] - classes[:, :1]
            # A sum of windows is known by its first n numbers: of the axes before, those suffice.
            columns.append(
                torch.kron(torch.kron(chosen, differences), torch.eye(rest, dtype=torch.float64))
            )
            chosen = torch.kron(chosen, torch.eye(large, small, dtype=torch.float64))
        found = torch.cat(columns, 1)
        gram = torch.linalg.inv(found.T @ found)
        scale = torch.linalg.cholesky(gram)
        return cls(matrix, torch.linalg.pinv(matrix), found, scale, gram @ found.T)


def _numbers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    """Ints of at least 1, at least one of them."""
    accepted = "a sequence of ints of at least 1"
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise TypeError(f"{name}: got {values!r}, accepted is {accepted}")
    return tuple(integer(name, each, 1, accepted) for each in values)


def _check_shape(name: str, tensor: Tensor, last: tuple[int, ...]) -> None:
    """Check the last dimensions of an argument."""
    accepted = f"accepted is a floating-point Tensor […, {', '.join(map(str, last))}]"
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = f"{tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: got {got}, {accepted}")
    if tuple(tensor.shape[-len(last) :]) != last:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, {accepted}")


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm


# Along the last dimension but one, in classes of indices that are equal modulo a window.


def _by_class(tensor: Tensor, classes: int) -> Tensor:
    """``[…, N, K]`` as ``[…, ⌈N / classes⌉, classes, K]``, zeros where none are left."""
    missing = -tensor.shape[-2] % classes
    padded = F.pad(tensor, (0, 0, 0, missing)) if missing else tensor
    return padded.unflatten(-2, (-1, classes))


def _class_sizes(length: int, classes: int) -> Tensor:
    """How many of the indices lie in each residue class."""
    return (length - torch.arange(classes) + classes - 1) // classes


def _class_deviation(tensor: Tensor, window: int) -> Tensor:
    """The part of a tensor that is orthogonal to all sums of windows: a number for each residue
    class modulo the window, the same for all of the class.

    Those numbers b have Σ b = 0, and minimise ``‖v − b‖``: with the classes' sums s and sizes m, b
    = (s − λ) / m. Differences of the sums come first, so that it is exactly zero where they are
    equal."""
    sums = _by_class(tensor, window).sum(-3)
    differences = sums - sums[..., :1, :]
    sizes = _class_sizes(tensor.shape[-2], window).to(sums)[:, None]
    common = (differences / sizes).sum(-2, keepdim=True) / (1 / sizes).sum()
    return (differences - common) / sizes


def _tiled(numbers: Tensor, length: int) -> Tensor:
    """A number for each residue class as one for each index."""
    times = [*[1] * (numbers.dim() - 2), -(-length // numbers.shape[-2]), 1]
    return numbers.repeat(times)[..., :length, :]
