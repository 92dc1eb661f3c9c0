"""Which backend serves a call, and why.

A backend is a module with ``forward``, ``input_grad``, ``weight_grad``, ``series_sum`` and
``supports(call)``; it may have ``refusal(call)``, which says in a clause why it does not serve a
call. The CPU's kernels are registered by the C++ library itself; on CUDA the public operators are
Python functions that ask this module. ``GROSS_KERNELS_BACKEND`` or :func:`use_backend` force one
backend for the functions and layers of this package; ``GROSS_KERNELS_LAYER`` or :func:`use_layer`
force one way to run a layer, ``GROSS_KERNELS_FUSED`` or :func:`use_fused` three convolutions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from . import layer_times
from .backends import cpu, cuda, reference
from .call import Call, float32_of, is_channels_last
from .checks import check_flag, check_one_of
from .geometry import Geometry
from .layer_times import LayerCall
from .library import constant
from .series import Series

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "reference": reference}

#: Backends by device type, the preferred one first.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "reference")}

if find_spec("triton") is not None:
    from .backends import triton

    BACKENDS["triton"] = triton
    PREFERENCE["cuda"] = ("cuda", "triton", "reference")


class Choice(NamedTuple):
    """What serves a call, a backend or a way to run a layer, and the reason."""

    name: str
    reason: str

    @property
    def backend(self) -> ModuleType:
        return BACKENDS[self.name]


def choose(call: Call) -> Choice:
    """The backend that serves ``call``.

    Raises:
        ValueError: if the forced backend does not serve it, or none does.
    """
    if _forced is not None:
        if not BACKENDS[_forced].supports(call):
            raise ValueError(
                f"backend: {_forced!r} is forced but does not serve {call}{_refusal(_forced, call)}"
            )
        return Choice(_forced, "forced by GROSS_KERNELS_BACKEND or use_backend")
    names = PREFERENCE.get(call.device, ("reference",))
    reason = f"first of {', '.join(names)} for {call.device} tensors that serves this call"
    for name in names:
        if BACKENDS[name].supports(call):
            return Choice(name, reason)
        reason += _refusal(name, call)
    raise ValueError(f"backend: none of {', '.join(names)} serves {call}")


def _refusal(name: str, call: Call) -> str:
    """What a backend says of a call that it does not serve, if it says anything."""
    says = getattr(BACKENDS[name], "refusal", None)
    return "" if says is None else f"; {name} {says(call)}"


#: Ways to run a layer that may be forced.
WAYS = ("parts", "merged", "grouped_pointwise")
_FUSED = Choice("fused", "there is a kernel for the whole layer on the CPU")


def choose_layer(device: str, call: LayerCall | None = None) -> Choice:
    """How a layer runs on ``device``: "fused", in one pass; "parts", as three convolutions;
    "merged", as the dense convolution that it amounts to; "grouped_pointwise", the last two of the
    three in one kernel. On a GPU whichever is faster by
    :func:`layer_times.times` of ``call``."""
    if _way is not None:
        return Choice(_way, "forced by GROSS_KERNELS_LAYER, use_layer or use_fused")
    if _forced is not None and _forced != "cpu":
        return Choice("parts", f"the {_forced} backend is forced, which has no fused kernel")
    if device == "cpu":
        return _FUSED
    if device != "cuda" or call is None:
        return Choice("parts", f"there is no fused kernel for {device} tensors")
    return Choice(*_fastest(*call))


@constant
def _fastest(*described: Any) -> tuple[str, str]:
    """Name and reason of the choice for a call, in plain words: the compiler takes no others."""
    choice = _layers.get(described)
    if choice is None:
        times = layer_times.times(LayerCall(*described))
        if "triton" not in BACKENDS:
            times.pop("grouped_pointwise", None)
        said = ", ".join(f"{name} {time:.0f} µs" for name, time in times.items())
        best = min(times, key=lambda name: times[name])
        choice = _layers[described] = best, f"the fastest as predicted for an H200: {said}"
    return choice


def serving(operation: str, input: Tensor, series: Series, geometry: Geometry) -> ModuleType:
    """The backend that :func:`choose` chooses for a call of the operator; what it said of a kind of
    calls is kept, for asking takes a third of the time that a launch may take."""
    if _forced is not None:
        return choose(Call.of(input, series, geometry, operation)).backend
    terms = series.terms
    key = (
        operation,
        input.device,
        input.dtype,
        terms[0].dtype,
        input.shape[1],
        tuple([term.shape for term in terms]),
        series.active,
        is_channels_last(input),
        float32_of(input.dtype),
        geometry.numbers,
    )
    backend = _serving.get(key)
    if backend is None:
        backend = _serving[key] = choose(Call.of(input, series, geometry, operation)).backend
    return backend


def check_backend(name: str) -> str:
    """Return ``name`` if it is a backend's, else raise ValueError."""
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, accepted are {', '.join(map(repr, BACKENDS))}")
    return name


def forced_backend() -> str | None:
    """Name of the backend forced by ``GROSS_KERNELS_BACKEND`` or :func:`use_backend`, None if the
    choice is free."""
    return _forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for the functions and layers of this package, process-wide, while the
    context lasts.

    Args:
        name: "cpu", "cuda", "reference" or, where Triton is installed, "triton".

    Raises:
        ValueError: for an unknown name.
    """
    global _forced
    before = _forced
    _forced = check_backend(name)
    try:
        yield
    finally:
        _forced = before


@contextmanager
def use_fused(fused: bool) -> Iterator[None]:
    """Run whole layers in one pass where there is a kernel for it, and otherwise in the way that is
    predicted to be fastest (the default), or always as three convolutions, process-wide, while the
    context lasts. ``GROSS_KERNELS_FUSED`` (0 or 1) sets it from outside.

    Raises:
        TypeError: if ``fused`` is no bool.
    """
    with _forced_way(None if check_flag("fused", fused) else "parts"):
        yield


@contextmanager
def use_layer(way: str) -> Iterator[None]:
    """Run whole layers in one way, process-wide, while the context lasts. ``GROSS_KERNELS_LAYER``
    sets it from outside.

    Args:
        way: "parts", three convolutions, or "merged", the dense convolution that is their product,
            on every device; or "grouped_pointwise", a pointwise convolution and then one kernel
            where Triton has it, for calls without gradients: others run as "parts".

    Raises:
        ValueError: for another way.
    """
    with _forced_way(check_one_of("way", way, WAYS)):
        yield


@contextmanager
def _forced_way(way: str | None) -> Iterator[None]:
    global _way
    before = _way
    _way = way
    try:
        yield
    finally:
        _way = before


def _way_from_environment() -> str | None:
    fused = os.environ.get("GROSS_KERNELS_FUSED") or "1"
    if fused not in ("0", "1"):
        raise ValueError(f"GROSS_KERNELS_FUSED: got {fused!r}, accepted are 0 and 1")
    way = os.environ.get("GROSS_KERNELS_LAYER")
    if way:
        return check_one_of("GROSS_KERNELS_LAYER", way, WAYS)
    return None if fused == "1" else "parts"


_way = _way_from_environment()
_layers: dict[tuple, tuple[str, str]] = {}
_serving: dict[tuple, ModuleType] = {}
_forced: str | None = None
if os.environ.get("GROSS_KERNELS_BACKEND"):
    _forced = check_backend(os.environ["GROSS_KERNELS_BACKEND"])
