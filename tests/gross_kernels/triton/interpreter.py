"""Triton's interpreter made as exact as a GPU, and stricter: a pytest plugin for a process with
``TRITON_INTERPRET=1``.

What it lacks (Triton 3.5 to 3.9): bfloat16 is computed on the integers that hold its bits; TF32
products are exact where the matrix unit cuts their factors off; a truth value that is spread over a
tensor becomes an integer, which loads refuse; and nobody checks addresses. Here every launch may
touch its own tensors alone, and every tensor allocated without a value is filled with NaN."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from gross_kernels.backends.triton.launch import Kernel

Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

#: Address ranges that the running kernel may touch; None between launches.
allowed: list[tuple[int, int]] | None = None


@contextmanager
def bounds(tensors: Any) -> Iterator[None]:
    """Let kernels touch these tensors alone (a nested sequence) while the context lasts."""
    global allowed
    allowed = list(extents(tensors))
    try:
        yield
    finally:
        allowed = None


def extents(tensors: Any) -> Iterator[tuple[int, int]]:
    """First byte of every tensor, and the one after its last."""
    if isinstance(tensors, Tensor):
        last = sum(
            (size - 1) * stride
            for size, stride in zip(tensors.shape, tensors.stride(), strict=True)
        )
        yield tensors.data_ptr(), tensors.data_ptr() + (last + 1) * tensors.itemsize
    elif isinstance(tensors, (tuple, list)):
        for each in tensors:
            yield from extents(each)


def widened(handle: Any) -> np.ndarray:
    """Values as numpy computes with them: bfloat16, kept as 16 bits, as float32."""
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16's bits, rounded to the nearest, ties to even, NaN kept."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + 0x7FFF) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def cut_to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 with 10 bits of mantissa, the others cut off: what the matrix unit does to numbers
    that nobody rounded."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return np.where(np.isfinite(values), (bits & np.uint32(0xFFFFE000)).view(np.float32), values)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """The same rounded to the nearest, ties away from zero, as ``cvt.rna.tf32.f32`` does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def cast(builder: Any, source: Any, target: Any) -> Any:
    """A cast with true bfloat16 on either side."""
    have, want = source.dtype.scalar, target.scalar
    if have == tl.bfloat16:
        source, have = Handle(widened(source), tl.float32), tl.float32
    if want == tl.bfloat16:
        return Handle(to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
    return source if have == want else original_cast(builder, source, target)


def binary(builder: Any, left: Any, right: Any, operation: Callable) -> Any:
    """An elementwise operation, in float32 and rounded once if it is one of bfloat16."""
    if left.dtype.scalar != tl.bfloat16:
        return original_binary(builder, left, right, operation)
    result = operation(widened(left), widened(right))
    return (
        Handle(result, tl.int1)
        if result.dtype == np.bool_
        else Handle(to_bfloat16(result), tl.bfloat16)
    )


def dot(builder: Any, left: Any, right: Any, total: Any, precision: Any, *_: Any) -> Any:
    """A product of matrices as the matrix unit forms it: exact products of numbers of its own
    precision, summed in float32."""
    counts["products"] += left.data.size * right.data.shape[-1]
    factors = [widened(left).astype(np.float32), widened(right).astype(np.float32)]
    name = str(precision).rsplit(".", 1)[-1]
    if left.dtype.scalar == tl.float32 and name == "TF32":
        factors = [cut_to_tf32(factor) for factor in factors]
    if left.dtype.scalar == tl.float32 and name == "TF32x3":
        (a, b), (large_a, large_b) = factors, map(to_tf32, factors)
        with np.errstate(invalid="ignore"):
            small_a, small_b = to_tf32(a - large_a), to_tf32(b - large_b)
            small = np.matmul(small_a, large_b) + np.matmul(large_a, small_b)
        result = np.where(np.isnan(small), 0, small) + np.matmul(large_a, large_b)
    else:
        result = np.matmul(*factors)
    return Handle(result + total.data, total.dtype.scalar)


#: What kernels have done since :func:`counted` began: multiply–accumulates of the matrix unit,
#: elements loaded and stored.
counts: Counter[str] = Counter()


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts while the context lasts."""
    counts.clear()
    yield counts


def splat(builder: Any, kind: Any, scalar: Any) -> Any:
    """A scalar spread over a shape, of the same type."""
    return Handle(
        np.full(kind.shape, scalar.data.flat[0], dtype=scalar.data.dtype), scalar.dtype.scalar
    )


def bfloat16_constant(builder: Any, value: float) -> Any:
    """A number of the kernel's text as bfloat16; Triton before 3.9 has this of every type but
    that."""
    return Handle(to_bfloat16(np.array([value], dtype=np.float32)), tl.bfloat16)


def patch_tensor(tensor: Any, *scope: Any) -> None:
    """The interpreter's tensors, usable as bounds of a loop: Triton 3.5 and 3.6 convert an array of
    one element, which numpy 2.4 refuses."""
    original_patch_tensor(tensor, *scope)
    tensor.__index__ = lambda self: int(self.handle.data.item())


def checked(original: Callable, what: str) -> Callable:
    """A load or store that refuses to touch an address outside ``bounds``."""

    def access(builder: Any, pointers: Any, *rest: Any) -> Any:
        # Masked forms, to which the others come down, have the mask last of what is not a cache
        # hint: a handle of truth values.
        masks = [h.data for h in rest if isinstance(h, Handle) and h.data.dtype == np.bool_]
        if masks:
            counts[what] += int(np.broadcast_to(masks[0], pointers.data.shape).sum())
        check(pointers, masks[0] if masks else np.ones(1, bool))
        return original(builder, pointers, *rest)

    return access


def check(pointers: Any, mask: np.ndarray) -> None:
    """Raise IndexError for the first address that no allowed tensor holds."""
    if allowed is None:
        return
    size = max(1, pointers.dtype.scalar.element_ty.primitive_bitwidth // 8)
    addresses = pointers.data[np.broadcast_to(mask, pointers.data.shape)].astype(np.int64)
    inside = np.zeros(addresses.shape, bool)
    for begin, end in allowed:
        inside |= (addresses >= begin) & (addresses + size <= end)
    if not inside.all():
        raise IndexError(f"{(~inside).sum()} of {inside.size} elements lie outside the tensors")


original_binary, original_cast = Builder.binary_op, Builder.cast_impl
original_patch_tensor = interpreter._patch_lang_tensor
interpreter._patch_lang_tensor = patch_tensor
Builder.binary_op = binary
Builder.cast_impl = cast
Builder.create_fp_to_fp = lambda builder, source, target, rounding: cast(builder, source, target)
Builder.create_dot = dot
Builder.create_splat = splat
Builder.get_bf16 = bfloat16_constant
for name in ("create_load", "create_masked_load", "create_store", "create_masked_store"):
    setattr(
        Builder, name, checked(getattr(Builder, name), "loaded" if "load" in name else "stored")
    )

launch = Kernel.__call__


def guarded_launch(kernel: Kernel, *tensors: Any) -> None:
    """``Kernel.__call__`` within :func:`bounds` of its tensors."""
    with bounds(tensors):
        launch(kernel, *tensors)


Kernel.__call__ = guarded_launch
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
# float32 with the error of float32, as on the CPU: strict for cuDNN, three passes for matrix
# products.
torch.backends.cudnn.conv.fp32_precision = "ieee"
torch.set_float32_matmul_precision("high")
