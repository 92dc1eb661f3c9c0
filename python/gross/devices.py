"""GPUs without waiting: where a network runs, how tensors get there and back, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .arguments import check_flag, check_module
from .supernet import configuration

#: Kinds of devices that work while the host goes on. Tests add the CPU.
ASYNCHRONOUS = {"cuda"}

Module = TypeVar("Module", bound=nn.Module)


def check_device(device: str | int | torch.device | None) -> torch.device | None:
    """The device that an argument names; None for where things are.

    Raises:
        TypeError, ValueError: if it names none, or a GPU that is not there.
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (TypeError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"device: got {device!r}, accepted are 'cpu', 'cuda', 'cuda:1' and the like"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {device!r}, and no CUDA device is available")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: got {device!r}, accepted are cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        )
    return found


def placed(model: Module, device: str | int | torch.device | None) -> Module:
    """A model, moved to a device in place; None leaves it. Errors are :func:`check_device`'s."""
    found = check_device(device)
    return model if found is None else model.to(found)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. The host does not wait for a copy to a GPU: it is of pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Returning:
    """Values on their way to the host, which need not wait for them until it reads them."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        if values.device.type in ASYNCHRONOUS:
            # To pinned memory, as torch does where it may not block.
            values = values.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._values = values

    @property
    def late(self) -> bool:
        """Whether reading at once would wait for a device."""
        return self._event is not None

    def read(self) -> list[float]:
        """The values. Waits for what the device did before they were asked for."""
        if self._event is not None:
            self._event.synchronize()
        found: list[float] = self._values.tolist()
        return found


# CUDA graphs ------------------------------------------------------------------------------------


def check_graphs(graphs: bool, device: torch.device) -> bool:
    """Raise TypeError or ValueError unless ``graphs`` is False, or True for a model on a GPU."""
    if check_flag("graphs", graphs) and device.type not in ASYNCHRONOUS:
        raise ValueError(f"graphs: got True for a model on {device}, accepted is one on a GPU")
    return graphs


class Replay:
    """A function of tensors as one CUDA graph: what it launched once is launched again, in one
    call, on other values of the same shapes.

    The function has to have run before: what it compiles or chooses at its first call is no part of
    a graph. It must not ask for a value of a tensor on the GPU. Results are overwritten by the next
    replay.

    Args:
        function: of tensors on one GPU.
        inputs: what it is called with; kept as copies.
    """

    def __init__(self, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        self._inputs = [given.clone() for given in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._results


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """What a graph takes for granted of an input."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


class Graphed(nn.Module):
    """A network on a GPU for inference, replayed as CUDA graphs: one for each configuration of its
    decomposed layers and each kind of input, captured at the second call of that kind.

    Where a network's kernels are short, the host takes longer to launch them than the GPU to run
    them; a replay is one launch. Weights may change in place between calls; a network that is moved
    or replaced needs a new one of these. Each graph keeps its intermediate tensors.

    Args:
        network: from one tensor to one tensor, in evaluation mode, on a GPU.

    Raises:
        TypeError: if ``network`` is no module.
        ValueError: if it is not on a GPU.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = check_module("network", network)
        first = next(network.parameters(), next(network.buffers(), None))
        if first is not None:
            check_graphs(True, first.device)
        self._replays: dict[Any, Replay | None] = {}

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """The network's output."""
        if self.network.training:
            raise RuntimeError("network: got one in training mode, accepted is evaluation mode")
        key = (tuple(configuration(self.network)), *layout(input))
        if key not in self._replays:
            output: Tensor = self.network(input)
            self._replays[key] = None
            return output
        replay = self._replays[key]
        if replay is None:
            replay = self._replays[key] = Replay(self.network, [input])
        result: Tensor = replay(input)
        return result.clone()
