"""The way from a call to a running kernel, with as little Python as can be: everything that depends
on shapes alone is worked out at the first call of a kind and kept.

A launch after the first takes the key, an allocation and Triton's own launcher; aim 15 µs,
**unmeasured**."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from ...call import float32_precision
from . import tiles

#: Plans kept; more kinds of calls than this (images of many sizes) begin anew.
MOST_PLANS = 4096
#: Whether kernels run in Triton's interpreter, on tensors of the CPU: tests do.
INTERPRETED = bool(triton.knobs.runtime.interpret)


class Kernel:
    """A kernel with its grid, its arguments beyond the tensors, and the compiled form that its
    first launch leaves."""

    def __init__(self, function: Any, grid: int, arguments: tuple, warps: int, stages: int) -> None:
        self.function = function
        self.grid = (grid, 1, 1)
        self.arguments = arguments
        # Said explicitly: Triton 3.10 changes the default of the last one.
        self.options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        self.compiled: Any = None

    def __call__(self, *tensors: Any) -> None:
        """Launch on the current stream of the current device, tensors first."""
        if self.compiled is not None:
            self.compiled(*tensors, *self.arguments)
            return
        capturing = tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()
        try:
            compiled = self.function[self.grid](*tensors, *self.arguments, **self.options)
        except Exception as error:
            if capturing:
                raise RuntimeError(
                    "graph: got the first call of its kind while a graph is captured, where its "
                    "kernel could not be loaded; accepted is a call that was made once before"
                ) from error
            raise
        if not INTERPRETED:
            # Past Triton's look-up: pointers' alignment and all else that it specialises on are
            # part of the plan's key.
            self.compiled = compiled[self.grid]


class Plans:
    """Plans by what they depend on."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Any] = {}
        self.get = self._plans.get

    def put(self, key: Hashable, plan: Any) -> Any:
        """Keep a plan, and return it."""
        if len(self._plans) >= MOST_PLANS:
            self._plans.clear()
        self._plans[key] = plan
        return plan

    def clear(self) -> None:
        """Forget everything."""
        self._plans.clear()


def layout(tensor: Tensor) -> tuple:
    """What a compiled kernel takes for granted of a tensor."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16


#: For every call whose tensors are on the current device.
_nothing = nullcontext()


def on_device(index: int) -> AbstractContextManager:
    """Make a device the current one, without a word where it is; -1 is the CPU."""
    if index < 0 or index == torch.cuda.current_device():
        return _nothing
    return torch.cuda.device(index)


@cache
def architecture(index: int | None) -> str:
    """ "sm_90", "gfx942": of a CUDA or HIP device; of an H200 where there is none, for the
    interpreter."""
    if index is None:
        return "sm_90"
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def processors(index: int | None) -> int:
    """Multiprocessors of a device."""
    return 132 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def precision_of(dtype: torch.dtype, device: int | None) -> str:
    """How a call multiplies, in Triton's words. 16 bits are exact whatever is said; "ieee" is
    understood everywhere.

    AMD's matrix unit multiplies strict float32 itself, so that there are no three passes; TF32 only
    gfx942 has."""
    if dtype != torch.float32:
        return "ieee"
    wanted, name = float32_precision(), architecture(device)
    if name.startswith("gfx") and (wanted, name) != ("tf32", "gfx942"):
        return "ieee"
    return wanted


def dense(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors, contiguous."""
    return tuple([tensor.contiguous() for tensor in tensors])


def tuned(
    name: str, candidates: Sequence[Any], plan: Callable[[Any], Kernel], tensors: tuple
) -> Any:
    """The tile that :func:`tiles.choose` chooses for a kind of calls; timed on ``tensors``, if at
    all."""

    def seconds(tile: Any) -> float:
        kernel = plan(tile)
        try:
            return float(
                triton.testing.do_bench(
                    lambda: kernel(*tensors), warmup=5, rep=20, return_mode="median"
                )
            )
        except (RuntimeError, triton.errors.TritonError):
            # More shared memory or registers than there are, or a tile that this Triton, or its
            # assembler, cannot compile.
            return float("inf")

    device = tensors[0].device
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return candidates[0]
    return tiles.choose(name, candidates, seconds, torch.cuda.get_device_name(device))
