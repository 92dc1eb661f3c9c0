"""What the zoo asks of one network: that its supernet does what the network itself does."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gross
import torch
from gross.example import Example
from gross.supernet import decomposed_layers
from networks import Network
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.flop_counter import FlopCounterMode

from gross_kernels import pack

GROUP_SIZES = (1, 4, 16, 32)
#: The group size that the table of networks speaks of.
SIZE = 4
#: Largest difference of outputs, relative to the largest magnitude among them, that is rounding.
TOLERANCE = 1e-5


class DenseTooError(Exception):
    """The dense network itself cannot do it."""


class NothingToDecomposeError(Exception):
    """The network has no convolution that gets cheaper."""


@dataclass
class Subject:
    """A network and what was made of it.

    Attributes:
        network: where it is from.
        dense: the network, in evaluation mode.
        example: what it is called with.
        supernet: its convolutions at ``GROUP_SIZES``, as far as those are cheaper, with weights
            that are drawn.
    """

    network: Network
    dense: nn.Module
    example: Example
    supernet: nn.Module

    @classmethod
    def of(cls, network: Network) -> Subject:
        """Raises NothingToDecomposeError where that is what :func:`gross.decompose` says."""
        torch.manual_seed(0)
        dense = made(network)
        example = network.example()
        with torch.no_grad():
            call(dense, example)  # What it makes on its first call is there before it is copied.
        try:
            supernet = gross.decompose(
                dense,
                GROUP_SIZES,
                method="random",
                example=example,
                convert=network.convert(),
                quiet=True,
            )
        except ValueError as error:
            if "none can be decomposed" in str(error):
                raise NothingToDecomposeError(str(error)) from error
            raise
        gross.set_configuration(supernet, near(supernet, SIZE))
        return cls(network, dense, example, supernet)

    @cached_property
    def output(self) -> list[Tensor]:
        """What the supernet computes at ``SIZE``."""
        with torch.no_grad():
            return tensors(call(self.supernet, self.example))

    @cached_property
    def precise(self) -> tuple[nn.Module, nn.Module, Example]:
        """In float64, where rounding hides nothing and moves no detector's choice: the dense
        network, the same layers decomposed at full width and size, where that is exact, and the
        example. In float32 where the dense network runs in nothing else."""
        dense, example = copy.deepcopy(self.dense).double(), _cast(self.example, torch.float64)
        try:
            with torch.no_grad():
                call(dense, example)
        except Exception:
            dense, example = self.dense, self.example
        layers = vars(self.supernet)["decomposition_report"].layers
        exact = gross.decompose(
            dense,
            {layer.name: (layer.in_channels,) for layer in layers},
            width={layer.name: (layer.in_channels, layer.out_channels) for layer in layers},
            convert=self.network.convert(),
            quiet=True,
        )
        return dense, exact.eval(), example


def made(network: Network) -> nn.Module:
    """The network in evaluation mode, with no branch switched off: fresh ones often begin with a
    norm or gain of about 0, behind which no convolution has an effect."""
    model = network.make().eval()
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and parameter.abs().max() < 1e-3:
            nn.init.constant_(parameter, 0.5)
    return model


def call(model: Callable[..., Any], example: Example) -> Any:
    """The network's output for an example, of which it gets a copy: it may write to it."""
    example = copy.deepcopy(example)
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple) else model(example)


def _cast(arguments: Any, dtype: torch.dtype) -> Any:
    return _pytree.tree_map_only(
        Tensor, lambda each: each.to(dtype) if each.is_floating_point() else each, arguments
    )


def near(supernet: nn.Module, size: int) -> dict[str, int]:
    """For each layer the largest of its group sizes up to one, or its smallest."""
    return {
        name: max((s for s in layer.group_sizes if s <= size), default=layer.group_sizes[0])
        for name, layer in decomposed_layers(supernet).items()
    }


def tensors(output: Any) -> list[Tensor]:
    """The tensors of floating point in whatever a network returns."""
    return [each for each in _leaves(output) if each.is_floating_point()]


def _leaves(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _leaves(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _leaves(value)
    elif dataclasses.is_dataclass(output):
        yield from _leaves(vars(output))
    elif hasattr(output, "parameters"):  # A distribution, diffusers' own kind.
        yield from _leaves(output.parameters)


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest magnitude of each tensor that is expected."""
    shapes = [[tuple(each.shape) for each in outputs] for outputs in (found, expected)]
    assert shapes[0] == shapes[1], f"shapes {shapes[0]}, expected {shapes[1]}"
    filled = [pair for pair in zip(found, expected, strict=True) if pair[1].numel()]
    assert filled, "the output is empty"
    largest = 0.0
    for got, right in filled:
        assert torch.isfinite(right).all(), "the expected output is not finite"
        scale = right.double().abs().max().clamp_min(1e-30)
        error = ((got.double() - right.double()).abs().max() / scale).item()
        largest = max(largest, error) if error == error else float("inf")
    return largest


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    error = difference(found, expected)
    assert error <= tolerance, f"differs by {error:.1e}, accepted is {tolerance:.0e}"


def transformed(subject: Subject, transform: Callable[[nn.Module], Callable[..., Any]]) -> Any:
    """What the supernet computes at ``SIZE`` after a transform.

    Raises:
        DenseTooError: where the dense network cannot be transformed and run, either.
    """
    try:
        return tensors(call(transform(subject.supernet), subject.example))
    except Exception as error:
        try:
            call(transform(subject.dense), subject.example)
        except Exception as its_own:
            raise DenseTooError(type(its_own).__name__) from error
        raise


# The checks -------------------------------------------------------------------------------------


@torch.no_grad()
def check_exact(subject: Subject) -> None:
    """At full width and size the network is unchanged."""
    dense, exact, example = subject.precise
    same(tensors(call(exact, example)), tensors(call(dense, example)))


@torch.no_grad()
def check_configurations(subject: Subject) -> None:
    """Another configuration gives other values, and the first comes back bit for bit."""
    supernet = subject.supernet
    before = gross.configuration(supernet)
    largest = [layer.group_sizes[-1] for layer in decomposed_layers(supernet).values()]
    smallest = [layer.group_sizes[0] for layer in decomposed_layers(supernet).values()]
    outputs = []
    for configuration in (largest, smallest):
        gross.set_configuration(supernet, configuration)
        outputs.append(tensors(call(supernet, subject.example)))
    gross.set_configuration(supernet, before)
    same(tensors(call(supernet, subject.example)), subject.output, 0.0)
    if largest != smallest:
        assert _differ(*outputs), "two configurations give the same values"


def _differ(found: list[Tensor], expected: list[Tensor]) -> bool:
    if [each.shape for each in found] != [each.shape for each in expected]:
        return True  # As many boxes as are found, or key points.
    return difference(found, expected) > 10 * TOLERANCE


def check_gradients(subject: Subject) -> None:
    """What is not decomposed has the dense network's gradients, and every term has one."""
    dense, exact, example = subject.precise
    expected, found = (_gradients(model, example) for model in (dense, exact))
    if not expected:
        raise DenseTooError("no gradients")
    # A converted convolution's weight is another one, such as the standardised one.
    converted = tuple(
        f"{name}."
        for name, module in dense.named_modules()
        if isinstance(module, tuple(subject.network.convert() or ()))
    )
    common = [name for name in expected.keys() & found.keys() if not name.startswith(converted)]
    largest = max(expected[name].abs().max() for name in expected)
    for name in common:
        error = (found[name] - expected[name]).abs().max() / largest
        assert error <= TOLERANCE, f"the gradient of {name} differs by {error:.1e}"
    for name in decomposed_layers(exact):
        if f"{name}.weight" in expected:
            terms = [each for each in found if each.startswith(f"{name}.")]
            assert len(terms) >= 3, f"{name} has gradients of {terms} alone"


def _gradients(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """The gradients of the sum of all outputs, with weights that differ."""
    model.zero_grad(set_to_none=True)
    outputs = tensors(call(model, example))
    trained = [each for each in outputs if each.requires_grad]
    if not trained:
        return {}
    torch.autograd.backward(
        trained,
        [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) for y in trained],
    )
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(each).all() for each in gradients.values()), "gradients not finite"
    return gradients


@torch.no_grad()
def check_macs(subject: Subject) -> None:
    """``gross.macs`` is half of what torch's own counter counts in the convolutions and linear
    layers, dense and at two configurations."""
    supernet = subject.supernet
    report = gross.macs(supernet, example=subject.example)
    assert not list(decomposed_layers(subject.dense))
    _check_count(gross.macs(subject.dense, example=subject.example), subject.dense, subject.example)
    smallest = [layer.group_sizes[0] for layer in decomposed_layers(supernet).values()]
    for configuration in (gross.configuration(supernet), smallest):
        _check_count(
            report.with_configuration(configuration),
            gross.export(supernet, configuration, kernels=False),
            subject.example,
        )


def _check_count(report: gross.MacsReport, plain: nn.Module, example: Example) -> None:
    counted = 0
    counter = FlopCounterMode(display=False)
    begins: dict[nn.Module, int] = {}

    def begin(layer: nn.Module, args: object) -> None:
        begins[layer] = counter.get_total_flops()

    def end(layer: nn.Module, args: object, output: Tensor) -> None:
        nonlocal counted
        counted += counter.get_total_flops() - begins[layer]
        if isinstance(layer, nn.Linear) or layer.bias is None:
            return
        counted += 2 * output.numel()  # A convolution's bias, which torch's counter leaves out.

    handles = []
    for layer in plain.modules():
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            handles.append(layer.register_forward_pre_hook(begin))
            handles.append(layer.register_forward_hook(end))
    with counter:
        call(plain, example)
    for handle in handles:
        handle.remove()
    norms = sum(layer.total for layer in report.layers if "Norm" in layer.kind)
    assert 2 * (report.total - norms) == counted, (
        f"{report.total - norms:,} MACs, torch counts {counted:,} / 2"
    )


@torch.no_grad()
def check_deployment(subject: Subject) -> None:
    """The network of plain convolutions that is deployed computes the same."""
    plain = gross.export(subject.supernet, kernels=False)
    assert not decomposed_layers(plain)
    same(tensors(call(plain, subject.example)), subject.output)


@torch.no_grad()
def check_file(subject: Subject) -> None:
    """What is saved comes back into the network, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "supernet.safetensors"
        gross.save(subject.supernet, path)
        loaded = gross.load(path, subject.network.make(), convert=subject.network.convert())
    assert gross.configuration(loaded) == gross.configuration(subject.supernet)
    same(tensors(call(loaded.eval(), subject.example)), subject.output, 0.0)


@torch.no_grad()
def check_deepcopy(subject: Subject) -> None:
    """A copy computes the same."""
    same(transformed(subject, copy.deepcopy), subject.output, 0.0)


@torch.no_grad()
def check_pickle(subject: Subject) -> None:
    """What ``torch.save`` writes comes back."""

    def pickled(model: nn.Module) -> Any:
        return pickle.loads(pickle.dumps(model))

    same(transformed(subject, pickled), subject.output, 0.0)


@torch.no_grad()
def check_bfloat16(subject: Subject) -> None:
    """In 16 bits the error is at most twice that of plain convolutions with the same weights, and
    one unit in the last place of the largest number."""

    def in_16_bits(model: nn.Module) -> Callable[..., Any]:
        copied = copy.deepcopy(model).bfloat16()
        return lambda *args, **kwargs: copied(
            *_cast(args, torch.bfloat16), **_cast(kwargs, torch.bfloat16)
        )

    found = transformed(subject, in_16_bits)
    assert all(each.isfinite().all() for each in found), "not finite"
    # The terms are rounded one by one: what that costs is no kernel's error.
    rounded = copy.deepcopy(subject.supernet).bfloat16().float()
    plain = gross.export(rounded, kernels=False)
    expected = tensors(call(plain, subject.example))
    of_plain = tensors(call(in_16_bits(plain), subject.example))
    shapes = [[each.shape for each in outputs] for outputs in (found, of_plain, expected)]
    if not shapes[0] == shapes[1] == shapes[2]:
        return  # Rounding has moved a detector's choice.
    error, accepted = difference(found, expected), difference(of_plain, expected)
    accepted = 2 * accepted + 2**-8
    assert error <= accepted, f"differs by {error:.1e}, accepted is {accepted:.1e}"


@torch.no_grad()
def check_channels_last(subject: Subject) -> None:
    """The other memory format gives the same values."""

    def channels_last(model: nn.Module) -> Callable[..., Any]:
        copied = copy.deepcopy(model).to(memory_format=torch.channels_last)
        return lambda *args, **kwargs: copied(*other(args), **other(kwargs))

    def other(arguments: Any) -> Any:
        return _pytree.tree_map_only(
            Tensor,
            lambda each: each.to(memory_format=torch.channels_last) if each.dim() == 4 else each,
            arguments,
        )

    same(transformed(subject, channels_last), subject.output)


@torch.no_grad()
def check_pack(subject: Subject) -> None:
    """Packed for inference the network computes the same."""
    same(tensors(call(pack(copy.deepcopy(subject.supernet)), subject.example)), subject.output)


@torch.no_grad()
def check_fx(subject: Subject) -> None:
    """``torch.fx`` traces what it traces of the dense network."""
    same(transformed(subject, torch.fx.symbolic_trace), subject.output)


@torch.no_grad()
def check_export(subject: Subject) -> None:
    """``torch.export`` exports what it exports of the dense network; where it cannot,
    ``torch.jit.trace``."""

    def exported(model: nn.Module) -> Any:
        args, kwargs = _arguments(subject.example)
        return torch.export.export(model, args, kwargs).module()

    def traced(model: nn.Module) -> Any:
        args, kwargs = _arguments(subject.example)
        return torch.jit.trace(
            model,
            args or None,
            example_kwarg_inputs=kwargs or None,
            check_trace=False,
            strict=False,
        )

    try:
        found = transformed(subject, exported)
    except DenseTooError:
        found = transformed(subject, traced)
    same(found, subject.output)


def _arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    example = copy.deepcopy(example)
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


#: By the heading that a failure has in the table.
CHECKS: dict[str, Callable[[Subject], None]] = {
    "exact size": check_exact,
    "configurations": check_configurations,
    "gradients": check_gradients,
    "MACs": check_macs,
    "file": check_file,
    "deepcopy": check_deepcopy,
    "pickle": check_pickle,
    "bfloat16": check_bfloat16,
    "channels-last": check_channels_last,
    "pack": check_pack,
    "fx": check_fx,
    "export": check_export,
    "deployment": check_deployment,
}
