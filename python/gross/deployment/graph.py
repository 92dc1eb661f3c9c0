"""A network as a graph of operations that programs know, whatever wrote them: modules, functions,
tensor methods, or ``torch.export``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from gross_kernels import GroSSConv2d

aten = torch.ops.aten
Pair = tuple[int, int]


class UntraceableError(Exception):
    """Why a network cannot be read as a graph."""


@dataclass
class Operation:
    """What one node of a graph computes.

    Attributes:
        kind: "layer", "convolution", "linear", "norm", "activation", "add", "max_pool",
            "mean_pool", "mean", "flatten" or "identity".
        inputs: the nodes that it reads.
        weights: P, R and Q of a layer; the kernel ``[out, in / groups, kh, kw]`` of a convolution
            or ``[out, in]`` of a linear layer; scale and shift of a norm; slopes of PReLU.
        bias: ``[out]`` or None.
        activation: of an activation, or of a layer that ends in one.
    """

    kind: str
    inputs: tuple[fx.Node, ...]
    weights: tuple[Tensor, ...] = ()
    bias: Tensor | None = None
    activation: str = "none"
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


# Tracing -----------------------------------------------------------------------------------------


def trace(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The network as a graph without mutation, whose nodes know their shapes for ``example``: by
    ``torch.fx`` where it can, else by ``torch.export``.

    Args:
        model: a network in evaluation mode; its graph refers to its modules.

    Raises:
        UntraceableError: where neither can, or a mutation cannot be undone.
    """
    with torch.no_grad():
        try:
            traced = fx.symbolic_trace(model)
            memory = _Memory(traced, example)
            # ``a += b`` reaches torch.fx as ``a + b``, which leaves other names of ``a`` behind.
            if not _equal(memory.result, model(example.clone())):
                raise UntraceableError("what it writes into is read by another name")
        except Exception as by_fx:
            try:
                traced = _exported(model, example)
                memory = _Memory(traced, example)
            except Exception as by_export:
                raise UntraceableError(
                    f"torch.fx: {_first_line(by_fx)}; torch.export: {_first_line(by_export)}"
                ) from by_export
        _undo_mutation(traced, memory)
        traced.graph.eliminate_dead_code()
        ShapeProp(traced).propagate(example)
    return traced


def _equal(left: object, right: object) -> bool:
    pairs = [torch.utils._pytree.tree_leaves(each) for each in (left, right)]
    return len(pairs[0]) == len(pairs[1]) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(*pairs, strict=True)
    )


def _exported(model: nn.Module, example: Tensor) -> fx.GraphModule:
    # A batch of one would be taken for a constant.
    images = torch.cat([example, example]) if len(example) == 1 else example
    batch = {0: torch.export.Dim.AUTO}
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=(batch,), strict=False)
    return program.run_decompositions({}).module(check_guards=False)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


#: In-place operations and what they are without.
_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.imul: operator.mul,
    operator.isub: operator.sub,
    torch.relu_: torch.relu,
    F.relu_: F.relu,
    "relu_": "relu",
    "add_": "add",
    "mul_": "mul",
    "sub_": "sub",
    "sigmoid_": "sigmoid",
    "clamp_": "clamp",
    "__iadd__": "add",
    "__imul__": "mul",
    "__isub__": "sub",
}
_PLACED = (F.relu, F.relu6, F.silu, F.leaky_relu, F.hardtanh, F.hardswish, F.dropout, F.elu)


class _Memory(fx.Interpreter):
    """Runs a network and notes where in memory every node's value lies; all are kept, so that no
    two lie in the same place by chance.

    Attributes:
        of: by node, the memory and how the value lies in it.
        result: the network's output.
    """

    def __init__(self, traced: fx.GraphModule, example: Tensor) -> None:
        super().__init__(traced, garbage_collect_values=False)
        self.of: dict[fx.Node, tuple[int, tuple]] = {}
        self.result = self.run(example.clone())
        self.env.clear()

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        if isinstance(value, Tensor):
            layout = (value.storage_offset(), value.shape, value.stride())
            self.of[node] = (value.untyped_storage()._cdata, layout)
        return value


def _undo_mutation(traced: fx.GraphModule, memory: _Memory) -> None:
    """Replace operations that write into their input by those that do not; who reads the input
    later, by whatever name, reads the result."""
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    for node in list(traced.graph.nodes):
        if not _mutates(traced, node):
            continue
        written = node.args[0] if node.args else None
        if not isinstance(written, fx.Node) or written not in memory.of:
            raise UntraceableError(f"{node.name}: writes into what is no value of the graph")
        place, layout = memory.of[written]
        for other, (same, as_it_lies) in memory.of.items():
            if same != place or order[other] >= order[node]:
                continue
            later = [user for user in other.users if order[user] > order[node]]
            if later and as_it_lies != layout:
                raise UntraceableError(f"{node.name}: writes into what {other.name} has a view of")
            for user in later:
                user.replace_input_with(other, node)


def _mutates(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node writes into its input; if so, it no longer does."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if not getattr(module, "inplace", False):
            return False
        twin: Any = type(module).__new__(type(module))
        twin.__dict__ = module.__dict__ | {"inplace": False}
        node.target = _added(traced, f"{node.name}_out_of_place", twin)
        return True
    if node.op == "call_function" and node.target in _PLACED and node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    if node.op in ("call_function", "call_method"):
        if node.target in _OUT_OF_PLACE:
            node.target = _OUT_OF_PLACE[node.target]
            return True
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        schema = getattr(node.target, "_schema", None)
        if (
            node.target is operator.setitem
            or (name.endswith("_") and not name.endswith("__"))
            or (schema is not None and schema.is_mutable)
        ):
            raise UntraceableError(f"{node.name}: writes into its input")
    return False


def _added(traced: fx.GraphModule, name: str, module: nn.Module) -> str:
    traced.add_module(name, module)
    return name


# Reading -----------------------------------------------------------------------------------------


def read(traced: fx.GraphModule, node: fx.Node) -> Operation | None:
    """What a node computes; None where no program knows it."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if module._forward_hooks or module._forward_pre_hooks or len(node.args) != 1:
            return None
        return _read_module(module, node)
    if node.op not in ("call_function", "call_method"):
        return None
    reader = _READERS.get(node.target)
    return None if reader is None else reader(_Arguments(traced, node))


def _pair(value: Any) -> Pair:
    values = tuple(value) if isinstance(value, Iterable) else (value,)
    return (int(values[0]), int(values[-1]))


def _read_module(module: nn.Module, node: fx.Node) -> Operation | None:
    inputs: tuple[Any, ...] = (node.args[0],)
    if isinstance(module, GroSSConv2d):
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return None
        return Operation(
            "layer",
            inputs,
            _folded(module),
            _detached(module.bias),
            "relu" if module.relu else "none",
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.width[0] // module.group_size,
        )
    for kind, reader in _MODULES.items():
        # A subclass that computes something else is another module.
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return reader(module, inputs)
    return None


def _folded(layer: GroSSConv2d) -> tuple[Tensor, ...]:
    """P, R and Q at the layer's group size."""
    convolutions: Any = layer.fold()
    return tuple(convolutions[i].weight.detach() for i in range(3))


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _conv(module: Any, inputs: tuple) -> Operation | None:
    padding = module.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        twice = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        if any(side % 2 for side in twice):
            return None
        padding = (twice[0] // 2, twice[1] // 2)
    if module.padding_mode != "zeros":
        return None
    return _convolution(
        inputs,
        module.weight.detach(),
        _detached(module.bias),
        module.stride,
        padding,
        module.dilation,
        module.groups,
    )


def _convolution(
    inputs: tuple,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Operation | None:
    if isinstance(padding, str):
        return None
    return Operation(
        "convolution",
        inputs,
        (weight,),
        bias,
        kernel_size=_pair(weight.shape[2:]),
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        groups=groups,
    )


def _norm(
    inputs: tuple,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Operation | None:
    """Batch norm with the statistics that it has: scale and shift, in float64."""
    if mean is None or variance is None:
        return None
    scale = (variance.detach().double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -mean.detach().double() * scale
    if bias is not None:
        shift = shift + bias.detach().double()
    return Operation("norm", inputs, (scale, shift))


def _batch_norm(module: Any, inputs: tuple) -> Operation | None:
    return _norm(
        inputs, module.running_mean, module.running_var, module.weight, module.bias, module.eps
    )


def _act(name: str) -> Callable[[Any, tuple], Operation]:
    return lambda module, inputs: Operation("activation", inputs, activation=name)


def _number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _slopes(inputs: tuple, slopes: Tensor) -> Operation:
    return Operation("activation", inputs, (slopes,), activation="prelu")


def _hardtanh(inputs: tuple, least: float, most: float) -> Operation | None:
    return Operation("activation", inputs, activation="relu6") if (least, most) == (0, 6) else None


def _max_pool(
    inputs: tuple, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> Operation | None:
    if ceil:
        return None
    kernel = _pair(kernel)
    if _pair(padding) != (0, 0) and _pair(dilation) != (1, 1):
        return None  # A window may then hold no pixel.
    steps = _pair(stride) if stride not in (None, [], ()) else kernel
    return Operation(
        "max_pool",
        inputs,
        kernel_size=kernel,
        stride=steps,
        padding=_pair(padding),
        dilation=_pair(dilation),
    )


def _mean_pool(
    inputs: tuple, kernel: Any, stride: Any, padding: Any, ceil: bool, include: bool, divisor: Any
) -> Operation | None:
    kernel, padding = _pair(kernel), _pair(padding)
    if ceil or divisor is not None or (padding != (0, 0) and not include):
        return None
    steps = _pair(stride) if stride not in (None, [], ()) else kernel
    return Operation("mean_pool", inputs, kernel_size=kernel, stride=steps, padding=padding)


def _adaptive(inputs: tuple, size: Any) -> Operation | None:
    if size in (1, (1, 1), [1, 1]):
        return Operation("mean", inputs)
    # At the size that it has an image stays as it is; at another the linear layer that follows
    # would not take it.
    shape = _shape(inputs[0])
    if shape is None or len(shape) != 4 or _pair(size) != tuple(shape[2:]):
        return None
    return Operation("same_size", inputs)


_MODULES: dict[type[nn.Module], Callable[[Any, tuple], Operation | None]] = {
    nn.Conv2d: _conv,
    nn.Linear: lambda m, inputs: Operation(
        "linear", inputs, (m.weight.detach(),), _detached(m.bias)
    ),
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: _act("relu"),
    nn.ReLU6: _act("relu6"),
    nn.SiLU: _act("silu"),
    nn.PReLU: lambda m, inputs: _slopes(inputs, m.weight.detach()),
    nn.LeakyReLU: lambda m, inputs: _slopes(inputs, _number(m.negative_slope)),
    nn.Hardtanh: lambda m, inputs: _hardtanh(inputs, m.min_val, m.max_val),
    nn.MaxPool2d: lambda m, inputs: (
        None
        if m.return_indices
        else _max_pool(inputs, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)
    ),
    nn.AvgPool2d: lambda m, inputs: _mean_pool(
        inputs,
        m.kernel_size,
        m.stride,
        m.padding,
        m.ceil_mode,
        m.count_include_pad,
        m.divisor_override,
    ),
    nn.AdaptiveAvgPool2d: lambda m, inputs: _adaptive(inputs, m.output_size),
    nn.Flatten: lambda m, inputs: (
        Operation("flatten", inputs) if (m.start_dim, m.end_dim) == (1, -1) else None
    ),
    nn.Identity: lambda m, inputs: Operation("identity", inputs),
    nn.Dropout: lambda m, inputs: Operation("identity", inputs),
    nn.Dropout2d: lambda m, inputs: Operation("identity", inputs),
}


class _Arguments:
    """A call's arguments by position and name, tensors of the network as tensors."""

    def __init__(self, traced: fx.GraphModule, node: fx.Node) -> None:
        self.traced = traced
        self.node = node

    def get(self, position: int, name: str, default: Any = None) -> Any:
        args, kwargs = self.node.args, self.node.kwargs
        return self.value(args[position] if position < len(args) else kwargs.get(name, default))

    def after_input(self, **defaults: Any) -> list[Any]:
        """Those that follow the input, in their order, by their names and defaults."""
        return [self.get(i, name, default) for i, (name, default) in enumerate(defaults.items(), 1)]

    def value(self, given: Any) -> Any:
        if isinstance(given, fx.Node) and given.op == "get_attr":
            found = operator.attrgetter(str(given.target))(self.traced)
            return found.detach() if isinstance(found, Tensor) else found
        if isinstance(given, (list, tuple)) and not isinstance(given, torch.Size):
            return type(given)([self.value(item) for item in given])
        return given

    @property
    def input(self) -> tuple[Any, ...]:
        return (self.get(0, "input"),)


def _is_static(*values: Any) -> bool:
    return not any(isinstance(value, fx.Node) for value in values)


def _shape(node: Any) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return tuple(meta.shape) if meta is not None and hasattr(meta, "shape") else None


def type_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of what a node returned for the example; None where it is no tensor."""
    meta = node.meta.get("tensor_meta")
    return getattr(meta, "dtype", None)


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of what a node returned for the example; None where it is no tensor."""
    return _shape(node)


def tensors_of(output: object) -> list[Tensor]:
    """The tensors of a network's output, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _f_conv(a: _Arguments) -> Operation | None:
    weight, bias, *rest = a.after_input(
        weight=None, bias=None, stride=1, padding=0, dilation=1, groups=1
    )
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        return None
    return _convolution(a.input, weight, bias, *rest) if _is_static(*rest) else None


def _f_linear(a: _Arguments) -> Operation | None:
    weight, bias = a.get(1, "weight"), a.get(2, "bias")
    if not isinstance(weight, Tensor) or not (bias is None or isinstance(bias, Tensor)):
        return None
    return Operation("linear", a.input, (weight,), bias)


def _f_batch_norm(a: _Arguments) -> Operation | None:
    values = a.after_input(running_mean=None, running_var=None, weight=None, bias=None)
    if not _is_static(*values) or a.get(5, "training", False):
        return None
    mean, variance, weight, bias = values
    return _norm(a.input, mean, variance, weight, bias, a.get(7, "eps", 1e-5))


def _aten_batch_norm(a: _Arguments) -> Operation | None:
    weight, bias, mean, variance, training = (a.get(i, "") for i in range(1, 6))
    if not _is_static(weight, bias, mean, variance) or training:
        return None
    return _norm(a.input, mean, variance, weight, bias, a.get(7, "", 1e-5))


def _f_act(name: str) -> Callable[[_Arguments], Operation]:
    return lambda a: Operation("activation", a.input, activation=name)


def _f_prelu(a: _Arguments) -> Operation | None:
    slopes = a.get(1, "weight")
    return _slopes(a.input, slopes) if isinstance(slopes, Tensor) else None


def _f_leaky(a: _Arguments) -> Operation | None:
    slope = a.get(1, "negative_slope", 0.01)
    return _slopes(a.input, _number(slope)) if isinstance(slope, int | float) else None


def _f_add(a: _Arguments) -> Operation | None:
    left, right = a.get(0, "input"), a.get(1, "other")
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    return None if a.node.kwargs.get("alpha", 1) != 1 else Operation("add", (left, right))


def _f_max_pool(a: _Arguments) -> Operation | None:
    values = a.after_input(kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=False)
    if not _is_static(*values) or a.get(6, "return_indices", False):
        return None
    return _max_pool(a.input, *values)


def _f_mean_pool(a: _Arguments) -> Operation | None:
    values = a.after_input(
        kernel_size=None,
        stride=None,
        padding=0,
        ceil_mode=False,
        count_include_pad=True,
        divisor_override=None,
    )
    return _mean_pool(a.input, *values) if _is_static(*values) else None


def _f_mean(a: _Arguments) -> Operation | None:
    dims = a.get(1, "dim")
    dims = sorted(d % 4 for d in dims) if isinstance(dims, (list, tuple)) else None
    shape = _shape(a.input[0])
    if dims != [2, 3] or shape is None or len(shape) != 4 or a.node.kwargs.get("dtype"):
        return None
    return Operation("mean" if a.get(2, "keepdim", False) else "flat_mean", a.input)


def _f_flatten(a: _Arguments) -> Operation | None:
    """Flattening all but the images, however it is written."""
    source, result = _shape(a.input[0]), _shape(a.node)
    if source is None or result is None or len(source) < 2 or len(result) != 2:
        return None
    return Operation("flatten", a.input) if source[0] == result[0] else None


def _f_bottleneck(a: _Arguments) -> Operation | None:
    """The first result of a layer that ``torch.export`` wrote down."""
    node = a.node.args[0]
    if a.get(1, "") != 0 or not isinstance(node, fx.Node):
        return None
    if node.target is not torch.ops.gross.bottleneck.default:
        return None
    call = _Arguments(a.traced, node)
    series, (bias, active, gates) = (
        [call.get(i, "") for i in (1, 2, 3)],
        (call.get(i, "") for i in (4, 5, 6)),
    )
    if gates is not None or not isinstance(active, Tensor):
        return None
    first, grouped, last = series
    width = first[0].shape[0]
    stride, padding, dilation = (_pair(call.get(i, "")) for i in (7, 8, 9))
    layer = GroSSConv2d(
        first[0].shape[1],
        last[0].shape[0],
        tuple(grouped[0].shape[2:]),
        bias=False,
        group_sizes=[term.shape[1] for term in grouped],
        width=(width, grouped[0].shape[0]),
        dtype=first[0].dtype,
    )
    with torch.no_grad():
        for terms, given in zip(layer._series(), series, strict=True):
            for term, value in zip(terms, given, strict=True):
                term.copy_(value)
    layer.group_size = layer.group_sizes[int(active) - 1]
    return Operation(
        "layer",
        call.input,
        _folded(layer),
        bias,
        "relu" if call.get(10, "") else "none",
        _pair(grouped[0].shape[2:]),
        stride,
        padding,
        dilation,
        width // layer.group_size,
    )


def _f_dropout(a: _Arguments) -> Operation | None:
    return None if a.get(2, "training", True) else Operation("identity", a.input)


def _f_hardtanh(a: _Arguments) -> Operation | None:
    return _hardtanh(a.input, a.get(1, "min_val", -1.0), a.get(2, "max_val", 1.0))


def _f_adaptive(a: _Arguments) -> Operation | None:
    return _adaptive(a.input, a.get(1, "output_size"))


_READERS: dict[Any, Callable[[_Arguments], Operation | None]] = {}
for _targets, _reader in (
    ((F.conv2d, torch.conv2d, aten.conv2d.default), _f_conv),
    ((F.linear, aten.linear.default), _f_linear),
    ((F.batch_norm,), _f_batch_norm),
    ((aten.batch_norm.default,), _aten_batch_norm),
    ((F.relu, torch.relu, "relu", aten.relu.default), _f_act("relu")),
    ((F.relu6, aten.relu6.default), _f_act("relu6")),
    ((F.silu, aten.silu.default), _f_act("silu")),
    ((F.hardtanh, aten.hardtanh.default), _f_hardtanh),
    ((F.prelu, torch.prelu, aten.prelu.default), _f_prelu),
    ((F.leaky_relu, aten.leaky_relu.default), _f_leaky),
    ((operator.add, torch.add, "add", aten.add.Tensor), _f_add),
    ((F.max_pool2d, torch.max_pool2d, aten.max_pool2d.default), _f_max_pool),
    ((F.avg_pool2d, aten.avg_pool2d.default), _f_mean_pool),
    ((F.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default), _f_adaptive),
    ((torch.mean, "mean", aten.mean.dim), _f_mean),
    (
        (
            torch.flatten,
            torch.reshape,
            "flatten",
            "view",
            "reshape",
            aten.view.default,
            aten.flatten.using_ints,
            aten.reshape.default,
        ),
        _f_flatten,
    ),
    ((F.dropout,), _f_dropout),
    ((operator.getitem,), _f_bottleneck),
):
    _READERS |= dict.fromkeys(_targets, _reader)
