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
#: Patches of a layer's input that are taken from one call, at most; and from each call as soon as
#: there are ``ENOUGH``: the sum of their products is most of the work.
POSITIONS = 2**14
ENOUGH, LATER = 2**15, 2**12


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
    """``Σ x xᵀ`` of each convolution's input patches x, estimated from some of them, by the
    convolution's name.

    A patch is what lies under the kernel at one output position, padding included; ``[C_in · kh ·
    kw]`` in the order of ``torch.nn.functional.unfold``. Where there are more than ``POSITIONS`` in
    a call, so many of them are drawn, and fewer in later calls; each call counts by the patches
    that it had. Convolutions that no input reaches are missing.

    Args:
        progress: called with a line about what is being done.

    Raises:
        ValueError: if the model does not accept an input, or a convolution's is not finite.
    """
    moments: dict[str, Tensor] = {}
    taken = dict.fromkeys(convolutions, 0)

    def add(name: str, input: Tensor, response: Tensor) -> None:
        most = POSITIONS if taken[name] < ENOUGH else LATER
        x, count = _patches(convolutions[name], input, most)
        taken[name] += x.shape[1]
        moments[name] = moments.get(name, 0) + count / x.shape[1] * (x @ x.T)

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


def _patches(convolution: nn.Conv2d, images: Tensor, most: int) -> tuple[Tensor, int]:
    """Patches of a convolution's input as columns, in float32 at least, and of how many they were
    drawn: all of them, or where there are more than ``most`` so many, as many from each image."""
    images = images.to(torch.promote_types(images.dtype, torch.float32))
    mode = convolution.padding_mode.replace("zeros", "constant")
    padded = F.pad(
        images if images.dim() == 4 else images[None],
        convolution._reversed_padding_repeated_twice,
        mode,
    )
    geometry = (convolution.kernel_size, convolution.dilation, convolution.stride)
    height, width = (
        (side - dilation * (kernel - 1) - 1) // stride + 1
        for side, kernel, dilation, stride in zip(padded.shape[2:], *geometry, strict=True)
    )
    positions = len(padded) * height * width
    if positions <= most:
        columns = F.unfold(padded, convolution.kernel_size, convolution.dilation, 0, geometry[2])
        return columns.transpose(0, 1).flatten(1), positions
    # Only what is drawn is gathered: from whole pixels, whose channels lie together.
    generator = torch.Generator().manual_seed(0)
    shape = (len(padded), -(-most // len(padded)))
    drawn = torch.randint(height * width, shape, generator=generator).to(padded.device)
    starts = (drawn // width * geometry[2][0], drawn % width * geometry[2][1])
    rows, columns = (
        start[:, :, None] + dilation * torch.arange(kernel, device=padded.device)
        for start, kernel, dilation in zip(starts, *geometry[:2], strict=True)
    )
    image = torch.arange(len(padded), device=padded.device)[:, None, None, None]
    pixels = padded.permute(0, 2, 3, 1).contiguous()
    patches = pixels[image, rows[:, :, :, None], columns[:, :, None, :]]
    return patches.movedim(-1, 2).flatten(2).flatten(0, 1).T, positions


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
