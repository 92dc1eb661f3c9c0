"""How a network is called, and a forward pass of a copy of it that can be watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from gross_kernels import use_backend

from .arguments import check_ints, check_type
from .copying import shapes_of, sharing_parameters

#: Inputs of a network: a tensor or a list is its one argument, a tuple its positional arguments, a
#: dictionary its named ones.
Example = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One call of a network.

    Attributes:
        args, kwargs: what it is called with.
        input_size: shape of the one input without the batch dimension, where that is all that was
            given; the input then has no values.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    input_size: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if self.input_size is None:
            return "the example"
        return f"input_size={self.input_size}, the shape of one input without the batch dimension"


def check_call(
    model: nn.Module, input_size: Sequence[int] | None, example: Example | None
) -> Call | None:
    """The call that ``input_size`` or ``example`` stand for, None if neither is given.

    Raises:
        TypeError: if one of them has another type.
        ValueError: if both are given, or the size is not made of positive ints.
    """
    if input_size is not None and example is not None:
        raise ValueError("example: got one beside input_size, accepted is one of the two")
    if input_size is not None:
        sizes = check_ints("input_size", input_size, least=1)
        floating = (p for p in model.parameters() if p.is_floating_point())
        like = next(floating, torch.empty(0))
        return Call((torch.zeros(1, *sizes, dtype=like.dtype, device="meta"),), {}, sizes)
    if example is None:
        return None
    accepted = "a Tensor, a tuple, a list or a dictionary, as the network takes it"
    check_type("example", example, (Tensor, tuple, list, Mapping), accepted)
    if isinstance(example, Mapping):
        return Call((), example)
    return Call(example if isinstance(example, tuple) else (example,), {})


def run_copy(model: nn.Module, call: Call, watch: Callable[[nn.Module], T]) -> T:
    """Run one call through a copy of a network, in evaluation mode and without gradients.

    That is tried on the meta device, where it costs neither time nor memory. A network that cannot
    run there, because it looks at values, runs on its own device.

    Args:
        watch: called with the copy before it runs, to register hooks; if the network has to run
            twice, once for each.

    Returns:
        What ``watch`` returned for the copy that ran to its end.

    Raises:
        ValueError: if the network cannot be copied.
        Exception: what the network itself raises, with a note that says what it was called with.
    """
    on_meta = shapes_of(model).eval()
    watched = watch(on_meta)
    try:
        # Tensors that the forward makes follow to the meta device, where the reference alone always
        # serves.
        with _as_written(), torch.device("meta"), use_backend("reference"):
            args, kwargs = _to("meta", (call.args, call.kwargs))
            on_meta(*args, **kwargs)
        return watched
    except Exception as error:
        if any(parameter.is_meta for parameter in model.parameters()):
            error.add_note(f"while running the model on the meta device for {call}")
            raise
        first = f"{type(error).__name__}: {error}".partition("\n")[0]
    copied = sharing_parameters(model).eval()
    watched = watch(copied)
    device = next((tensor.device for tensor in copied.parameters()), torch.device("cpu"))
    try:
        with _as_written():
            args, kwargs = call.args, call.kwargs
            if call.input_size is not None:
                args = tuple(torch.zeros_like(each, device=device) for each in args)
            copied(*args, **kwargs)
    except Exception as error:
        error.add_note(f"while running the model for {call}; on the meta device before: {first}")
        raise
    return watched


@contextmanager
def _as_written() -> Iterator[None]:
    """Without gradients, and without compiling what ``torch.compile`` wraps."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def _to(device: str, inputs: T) -> T:
    """The inputs with every tensor in them on a device."""
    moved: T = _pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), inputs)
    return moved
