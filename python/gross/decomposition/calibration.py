"""Calibration data, and what the layers of a network see of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: A calibration tensor runs in batches of at most so many numbers, and of one input at least.
BATCH_NUMBERS = 2**19
#: Patches of a layer's input that are taken from one call, at most.
POSITIONS = 2**14


@dataclass(frozen=True)
class ModelInput:
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, model: nn.Module) -> None:
        model(*self.args, **self.kwargs)


class Calibration:
    """The model inputs of calibration data, any number of times.

    A model input is a tensor, a tuple or list of positional arguments, or a dictionary of keyword
    arguments. A pair whose second is a tensor of integers is taken for images and labels, and the
    labels are dropped; a model that needs such a pair is given a dictionary.

    Args:
        data: a tensor ``[N, …]`` of inputs, or an iterable of model inputs, such as a loader. An
            iterator, which can be gone through once, is read into memory.
        device: where tensors are moved.

    Raises:
        TypeError: if ``data``, or one of its items, is something else.
        ValueError: while it is gone through, if there is nothing in it, an item has labels alone,
            or a number is not finite.
    """

    def __init__(self, data: Tensor | Iterable[Any], device: torch.device) -> None:
        if isinstance(data, (Mapping, str)) or not isinstance(data, Iterable):
            raise TypeError(
                f"calibration: got {type(data).__name__}, accepted is a tensor of inputs, a loader "
                "or another iterable of model inputs"
            )
        if isinstance(data, Tensor):
            if data.dim() == 0:
                raise ValueError("calibration: got a single number, accepted is a tensor [N, …]")
            data = data.split(max(1, BATCH_NUMBERS // data[0].numel())) if data.numel() else ()
        self.data: Iterable[Any] = list(data) if isinstance(data, Iterator) else data
        self.device = device

    def __iter__(self) -> Iterator[ModelInput]:
        position = -1
        for position, item in enumerate(self.data):
            yield self._model_input(item, f"calibration[{position}]")
        if position < 0:
            raise ValueError("calibration: got no inputs, accepted is at least one")

    def _model_input(self, item: Any, name: str) -> ModelInput:
        if isinstance(item, Mapping):
            return ModelInput((), self._placed(item, name))
        if not isinstance(item, (Tensor, tuple, list)):
            raise TypeError(
                f"{name}: got {type(item).__name__}, accepted is a tensor, a tuple of arguments or "
                "a dictionary of keyword arguments"
            )
        args = (item,) if isinstance(item, Tensor) else tuple(item)
        if len(args) == 2 and _is_integer(args[1]):
            args = args[:1]
        if args and _is_integer(args[0]) and args[0].dim() < 3:
            raise ValueError(
                f"{name}: got {args[0].dtype} of shape {tuple(args[0].shape)}, which look like "
                "labels, accepted are inputs of the model"
            )
        return ModelInput(self._placed(args, name), {})

    def _placed(self, value: Any, name: str) -> Any:
        """A value with the tensors in it checked and moved."""
        if isinstance(value, Tensor):
            if not value.isfinite().all():
                count = int((~value.isfinite()).sum())
                raise ValueError(f"{name}: {count} of {value.numel()} numbers are not finite")
            return value.to(self.device)
        if isinstance(value, Mapping):
            return {key: self._placed(each, name) for key, each in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._placed(each, name) for each in value)
        return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex())


def second_moments(
    model: nn.Module,
    convolutions: Mapping[str, nn.Conv2d],
    calibration: Calibration,
    *,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Tensor]:
    """``Σ x xᵀ`` of each convolution's input patches x, by the convolution's name.

    A patch is what lies under the kernel at one output position, padding included; ``[C_in · kh ·
    kw]`` in the order of ``torch.nn.functional.unfold``. Where there are more than ``POSITIONS`` in
    a call, so many of them are drawn. Convolutions that no input reaches are missing.

    Args:
        progress: called with a line about what is being done.

    Raises:
        ValueError: if the model does not accept an input, or a convolution's is not finite.
    """
    moments: dict[str, Tensor] = {}

    def add(name: str, input: Tensor, response: Tensor) -> None:
        x = _patches(convolutions[name], input)
        moments[name] = moments.get(name, 0) + x @ x.T

    with evaluation(model), watched(convolutions, add):
        for position, model_input in enumerate(calibration):
            progress(f"input {position}")
            try:
                model_input.run(model)
            except Exception as error:
                raise ValueError(
                    f"calibration[{position}]: the model does not accept it: {error}"
                ) from error
    for name, moment in moments.items():
        if not moment.isfinite().all():
            raise ValueError(f"calibration: the input of layer {name!r} is not finite")
    return moments


def _patches(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    """Patches of a convolution's input as columns, in float32 at least."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    mode = convolution.padding_mode.replace("zeros", "constant")
    padded = F.pad(
        images if images.dim() == 4 else images[None],
        convolution._reversed_padding_repeated_twice,
        mode,
    )
    generator = torch.Generator().manual_seed(0)
    columns = []
    for image in padded:
        patches = F.unfold(
            image[None], convolution.kernel_size, convolution.dilation, 0, convolution.stride
        )[0]
        if patches.shape[1] * len(padded) > POSITIONS:
            drawn = torch.randperm(patches.shape[1], generator=generator)
            patches = patches[:, drawn[: -(-POSITIONS // len(padded))].to(patches.device)]
        columns.append(patches)
    return torch.cat(columns, 1)


def by_channel(images: Tensor) -> Tensor:
    """``[N, C, H, W]`` or ``[C, H, W]`` as a float64 matrix ``[C, positions]``."""
    return images.movedim(-3, 0).flatten(1).double()


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, without gradients or compilation; afterwards each of its
    modules is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def watched(
    modules: Mapping[str, nn.Module], watch: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Calls ``watch(name, input, output)`` after each call of one of the modules."""
    with ExitStack() as stack:
        for name, module in modules.items():

            def hook(
                module: nn.Module, args: Any, kwargs: Any, output: Tensor, name: str = name
            ) -> None:
                watch(name, args[0] if args else kwargs["input"], output)

            handle = module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield
