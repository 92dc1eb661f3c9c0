"""A CPU that plays the card, so that a whole check runs where there is no GPU: ``check_gpu.sh
--dry``.

CUDA kernels run on the emulator of ``tests/cuda_on_host``, Triton's in its interpreter
(``TRITON_INTERPRET=1``), and the package takes tensors of the CPU for a GPU's. Streams do nothing;
a graph (:class:`Graph`) replays the operators that it recorded and, as CUDA does, refuses to be
captured where the host asks for a value."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

ATEN = torch.ops.aten
#: What a GPU cannot answer before everything queued is done.
ANSWERS = {
    ATEN._local_scalar_dense.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.equal.default,
}


class Watched(TorchDispatchMode):
    """Sees every operator, and those whose answer the host would wait for on a GPU.

    Which tensors would be a GPU's a CPU cannot say: all floats, and what is computed from them.
    Other numbers are the host's, as a layer's count of active terms is."""

    def __init__(self) -> None:
        super().__init__()
        self.made = WeakTensorKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        on_device = any(each.is_floating_point() or each in self.made for each in given)
        # Indexing by a mask looks for its nonzero places.
        masked = func is ATEN.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if on_device and (func in ANSWERS or masked):
            self.waits(func)
        result = func(*args, **kwargs)
        if on_device:
            for each in tensors(result):
                self.made[each] = True
        self.ran(func, args, kwargs, result)
        return result

    def waits(self, func: Any) -> None:
        """Before an operator whose answer the host would wait for."""

    def ran(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """After every operator."""


class Synchronisations(Watched):
    """Notes, while it lasts, the operators whose answer the host would wait for on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def waits(self, func: Any) -> None:
        self.found.append(str(func))


class Graph:
    """Plays ``torch.cuda.CUDAGraph``: the operators between begin and end, which :meth:`replay`
    runs again on the same tensors, into the same results."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, tuple, dict[str, Any], Any]] = []

    def pool(self) -> tuple[int, int]:
        return (0, 0)

    def replay(self) -> None:
        if not self.steps:
            raise RuntimeError("the graph is replayed and was never captured")
        with torch.inference_mode():
            for func, args, kwargs, kept in self.steps:
                before = {each.data_ptr() for each in tensors((args, kwargs))}
                result = func(*args, **kwargs)
                for old, new in zip(tensors(kept), tensors(result), strict=True):
                    # A view, or what was written in place, has its value already.
                    if old.data_ptr() not in before and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Recorder(Watched):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def waits(self, func: Any) -> None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {func}")

    def ran(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        self.graph.steps.append((func, args, kwargs, result))


@contextmanager
def capture(graph: Graph, pool: Any = None, **_: Any) -> Iterator[None]:
    """Plays ``torch.cuda.graph``."""
    with _Recorder(graph):
        yield


class Stream:
    """Plays ``torch.cuda.Stream``: everything is done when the call returns."""

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Event:
    """Plays ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.time - self.time)


@contextmanager
def stream(chosen: Any) -> Iterator[None]:
    yield


class _Refusing(Watched):
    def waits(self, func: Any) -> None:
        raise RuntimeError(f"called a synchronizing CUDA operation: {func}")


_refusing: list[_Refusing] = []


def set_sync_debug_mode(mode: str) -> None:
    """Plays torch's: with "error" what would wait raises."""
    while _refusing:
        _refusing.pop().__exit__(None, None, None)
    if mode == "error":
        _refusing.append(_Refusing())
        _refusing[-1].__enter__()


#: What ``torch.cuda`` is while a CPU plays the card.
DOUBLES = {
    "CUDAGraph": Graph,
    "graph": capture,
    "Stream": Stream,
    "Event": Event,
    "stream": stream,
    "current_stream": lambda device=None: Stream(),
    "is_current_stream_capturing": lambda: False,
    "synchronize": lambda device=None: None,
    "set_sync_debug_mode": set_sync_debug_mode,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: "a CPU that plays a small H200",
    "mem_get_info": lambda device=None: (2**36, 2**36),
    "_sleep": lambda cycles: None,
}


for_good = ExitStack()


def play() -> None:
    """Make this process one with a card, for good."""
    import host_library
    import interpreter  # noqa: F401  makes Triton's as exact as a GPU
    from gross import devices

    from gross_kernels import dispatch, ops, pooling
    from gross_kernels.backends import cuda, triton
    from gross_kernels.call import Call

    for name, double in DOUBLES.items():
        setattr(torch.cuda, name, double)
    operators: Any = host_library.operators()
    torch.ops.gross_cuda = operators
    cuda._operators = lambda: operators
    cuda.available = lambda: True
    cuda.load_error = None
    cuda.runs_on = lambda capability, architectures: True
    describe, supports, choose = Call.of.__func__, triton.supports, dispatch.choose

    def of(cls: type[Call], *arguments: Any) -> Call:
        return replace(describe(cls, *arguments), device="cuda", index=0)

    Call.of = classmethod(of)
    triton.supports = lambda call: supports(replace(call, device="cpu"))
    # Only on a CPU is it asked within a compiled graph, which cannot trace the CUDA library.
    dispatch.choose = lambda call: None if torch.compiler.is_compiling() else choose(call)
    dispatch.PREFERENCE["cpu"] = dispatch.PREFERENCE["cuda"]
    # Layers run as they do on a GPU, by the functions that ask dispatch.
    for_good.enter_context(dispatch.use_fused(False))
    devices.ASYNCHRONOUS.add("cpu")
    for library, name, function in (
        (ops._library, "series_conv2d", ops._cuda_forward),
        (ops._library, "series_conv2d_backward", ops._cuda_backward),
        (ops._library, "series_sum", ops._cuda_sum),
        (pooling._library, "sum_pool", pooling._cuda_forward),
        (pooling._library, "sum_pool_backward", pooling._cuda_backward),
    ):
        library.impl(name, function, "CPU", allow_override=True)
