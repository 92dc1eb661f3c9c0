"""Copies of networks: with other modules in place of some, with values or with shapes alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

#: What torch itself sets on a convolution or a linear layer, and on any module.
TORCH_ATTRIBUTES = {
    *vars(nn.Conv2d(1, 1, 1, device="meta")),
    *vars(nn.Linear(1, 1, device="meta")),
    "_compiled_call_impl",
}
#: What a copy makes of a tensor, given those that are copied already.
CopyTensor = Callable[[Tensor, dict[int, Any]], Tensor]


def copy_model(
    model: nn.Module,
    replaced: Mapping[int, nn.Module] | None = None,
    *,
    with_attributes: bool = True,
) -> nn.Module:
    """A copy of a network that shares nothing with it.

    Unlike with ``copy.deepcopy``, tensors that have a history (what a network keeps from its last
    forward pass) are copied without it, and attributes and gradient hooks of parameters stay.

    Args:
        replaced: other modules by the ``id`` of those whose place they take, wherever the model
            refers to them.
        with_attributes: give the others copies of the attributes that a user, or a class that is
            not torch's, has set on those.

    Raises:
        ValueError: if something cannot be copied, with the module that holds it.
    """
    memo: dict[int, Any] = dict(replaced or {})
    copied = _copied(model, memo, _detached)
    for module in model.modules():
        if with_attributes and id(module) in (replaced or {}):
            attributes = _copied(model, memo, _detached, own_attributes(module))
            vars(memo[id(module)]).update(attributes)
    for parameter in model.parameters():
        twin = memo.get(id(parameter))
        if isinstance(twin, Tensor):
            copy_attributes(parameter, twin)
            _copy_hooks(parameter, twin)
    return copied


def shapes_of(model: nn.Module) -> nn.Module:
    """A copy of a network on the meta device, which has shapes and no values, so that running it
    costs nothing. Raises as :func:`copy_model`."""

    def on_meta(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        # A number on the host combines with tensors of any device, and may be read.
        number = tensor.dim() == 0 and tensor.device.type == "cpu"
        return tensor.detach().clone() if number else tensor.detach().to("meta")

    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return _copied(model, memo, on_meta)


def sharing_parameters(
    model: nn.Module, replaced: Mapping[int, nn.Module] | None = None
) -> nn.Module:
    """A copy of a network that has its parameters and copies of the rest, for reading. Arguments
    and what is raised are those of :func:`copy_model`."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return _copied(model, memo | dict(replaced or {}), _detached)


def copy_attributes(source: Tensor, to: Tensor) -> None:
    """Give a parameter the attributes that a user has set on another, such as ``lr_mult``."""
    for name, value in vars(source).items():
        setattr(to, name, copy.deepcopy(value))


def _copy_hooks(source: Tensor, to: Tensor) -> None:
    # Torch takes hooks for trained parameters alone, and keeps them where one is frozen later.
    to.requires_grad_(True)
    for hook in (source._backward_hooks or {}).values():
        to.register_hook(hook)
    for hook in (source._post_accumulate_grad_hooks or {}).values():
        to.register_post_accumulate_grad_hook(hook)
    to.requires_grad_(source.requires_grad)


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes that a module has from its user or its class, not from torch."""
    if "_orig_mod" in module._modules:  # What torch.compile wraps around another.
        return {}
    return {name: value for name, value in vars(module).items() if name not in TORCH_ATTRIBUTES}


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside what ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``
    wrap around it: they prefix the names of its parameters."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def closed_parts(model: nn.Module) -> dict[str, str]:
    """The parts of a network whose layers are no modules that could be seen or replaced, by
    qualified name, and what each is: programs of TorchScript and of ``torch.export``. Parts without
    parameters, such as activations, are left out."""
    closed: dict[str, str] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") or not outer for outer in closed)
        if inside or (name and next(module.parameters(), None) is None):
            continue
        if isinstance(module, torch.jit.ScriptModule):
            closed[name] = "a program of TorchScript"
        elif isinstance(module, fx.GraphModule) and any(map(_is_aten, module.graph.nodes)):
            closed[name] = "a program of torch.export"
    return closed


def check_open(model: nn.Module) -> None:
    """Check that the layers of a network can be seen, of its outermost module at least.

    Raises:
        ValueError: if they cannot.
    """
    program = closed_parts(model).get("")
    if program is not None:
        raise ValueError(
            f"model: got {type(model).__name__}, {program}, accepted is the network that it was "
            "made from: its layers are modules"
        )


def _is_aten(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == "aten"


def plain_name(name: str) -> str:
    """A qualified name without what ``torch.compile`` puts into it where a part of a network is
    compiled."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


class _CopyingTensors(TorchFunctionMode):
    """In it ``copy.deepcopy`` copies tensors with a function of one's own."""

    def __init__(self, copy_tensor: CopyTensor) -> None:
        super().__init__()
        self.copy_tensor = copy_tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = self.copy_tensor(tensor, memo)
        return memo[id(tensor)]


def _detached(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """A copy without the history, which shares its memory with the copies of what ``tensor`` shares
    its own with."""
    return copy.deepcopy(tensor if tensor.is_leaf else tensor.detach(), memo)


def _copied(
    model: nn.Module, memo: dict[int, Any], copy_tensor: CopyTensor, part: object = None
) -> Any:
    """A deep copy of a model, or of a part of what it holds."""
    given = dict(memo)
    try:
        # Not under inference mode: its tensors could never be trained.
        with torch.inference_mode(False), _CopyingTensors(copy_tensor):
            return copy.deepcopy(model if part is None else part, memo)
    except Exception as error:
        holder = _holder(model, given, copy_tensor)
        raise ValueError(
            f"model: {holder} cannot be copied ({type(error).__name__}: {error}); accepted are "
            "networks without it: set it to None, and put it back afterwards"
        ) from error


def _holder(model: nn.Module, memo: dict[int, Any], copy_tensor: CopyTensor) -> str:
    """Which attribute of which module cannot be copied, the innermost module first."""
    for name, module in reversed(list(model.named_modules())):
        for attribute, value in vars(module).items():
            try:
                with _CopyingTensors(copy_tensor):
                    copy.deepcopy(value, dict(memo))
            except Exception:
                where = f"{name}.{attribute}" if name else attribute
                return f"{where!r}, a {type(value).__name__} in {type(module).__name__},"
    return type(model).__name__
