"""Milliseconds by layer, group size and precision, measured on this device: a budget that is time.

Every decomposed layer is timed where it stands, in the running network, at each of its group sizes:
its input is where the layer before has left it, and the caches are as they are in use. An exported
network runs several layers in one call, in which none can be timed: whole exported networks say by
how much that is faster. A configuration's latency is then a sum, as its MACs are.

On a CPU with glibc the process keeps freed memory from the first measurement on, as `gross train`
does. Otherwise activations come in fresh pages or in used ones, as the heap happens to lie, and
fresh ones can cost more than the network."""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import replace as replace_fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gross_kernels import pack
from gross_kernels.environment import processor

from .arguments import check_flag, check_module, check_number, check_tensor, check_type
from .copying import copy_model, unwrapped
from .deployment import Int8, export
from .deployment.mixed import in_8_bits, inputs_of
from .deployment.precision import read
from .report import text
from .supernet import (
    Configuration,
    check_supernet,
    configuration,
    covering,
    decomposed_layers,
    dense_network,
    set_configuration,
)
from .training.memory import keep_freed_memory
from .training.run import replace

if TYPE_CHECKING:
    from rich.table import Table

#: Raised when tables can no longer be read as they were.
FORMAT = 2


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of one network on one device. Printable; a JSON file with :meth:`save` and
    :meth:`load`.

    Attributes:
        device: its name.
        threads: torch's, on a CPU.
        input_size: shape of the example, with the batch dimension.
        dtype: of the example.
        kernels: whether the decomposed layers ran on this package's kernels, packed, or as three
            plain convolutions.
        rest: milliseconds of everything but the decomposed layers.
        layers: milliseconds of each decomposed layer at each group size, by qualified name.
        dense: milliseconds of the network with plain convolutions in place of those layers.
        int8_rest, int8_layers: the same as ``rest`` and ``layers``, exported in 8 bits; 0 and
            empty where they were not measured.
        conversions: milliseconds that a layer in float32 takes longer where the others are in
            8 bits: what it reads and writes is then brought from one to the other.
    """

    device: str
    threads: int
    input_size: tuple[int, ...]
    dtype: str
    kernels: bool
    rest: float
    layers: Mapping[str, Mapping[int, float]]
    dense: float
    int8_rest: float = 0.0
    int8_layers: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    conversions: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def measure(
        cls,
        supernet: nn.Module,
        example: Tensor,
        *,
        kernels: bool = True,
        seconds: float = 10.0,
        calibration: Tensor | Iterable[Any] | None = None,
    ) -> LatencyTable:
        """Time the layers of a supernet on the device that ``example`` is on.

        The supernet is exported once for each group size, and copied with its layers apart. These
        networks run in turn, again and again in another order, so that a disturbance meets all of
        them; lower quartiles count. The layers' times at their i-th sizes are then scaled, all by
        one factor, to what the exported network of these sizes takes. In 8 bits, where nothing
        runs apart, each layer is timed alone, and one factor and one rest are fitted to the
        exported networks. Networks with one layer in float32 and all else in 8 bits say what the
        conversions around it take.

        Args:
            supernet: a network with decomposed layers; left as it is.
            example: an input of the batch size that is to be deployed, on the supernet's device.
            kernels: as :func:`gross.export`'s.
            seconds: how long to measure.
            calibration: as :func:`gross.export`'s; with it layers are timed in 8 bits too, for as
                long again.

        Raises:
            ValueError: if the supernet has no decomposed layer or does not take the example.
        """
        layers = check_supernet("supernet", supernet)
        check_flag("kernels", kernels)
        sizes = [layer.group_sizes for layer in layers.values()]
        example = _ready(example, seconds)
        every = covering(supernet)
        whole = [export(supernet, c, kernels=kernels, example=example) for c in every]
        apart = [_apart(supernet, c, kernels) for c in every]
        clocks = [_LayerClock(network, list(layers), example.device) for network in apart]
        dense = dense_network(supernet)
        calls = [*clocks, *(partial(_time, network) for network in (*whole, dense))]
        samples: list[list[Any]] = [[] for _ in calls]
        for i in _turns(len(calls), seconds):
            samples[i].append(calls[i](example))
        *exported, dense_time = map(_typical, samples[len(clocks) :])
        shares, parts = [], []
        for clocked in samples[: len(clocks)]:
            parts.append([_typical(each) for each in zip(*(p for _, p in clocked), strict=True)])
            shares.append(1 - sum(parts[-1]) / _typical([total for total, _ in clocked]))
        rest = statistics.median(
            max(share, 0) * total for share, total in zip(shares, exported, strict=True)
        )
        scaled: dict[tuple[int, int], list[float]] = {}
        for c, total, own in zip(every, exported, parts, strict=True):
            factor = max(total - rest, 0) / sum(own)
            for key, part in zip(enumerate(c), own, strict=True):
                scaled.setdefault(key, []).append(factor * part)
        times = {
            name: {size: statistics.median(scaled[i, size]) for size in sizes[i]}
            for i, name in enumerate(layers)
        }
        table = cls(
            device_name(example.device),
            torch.get_num_threads(),
            tuple(example.shape),
            str(example.dtype).removeprefix("torch."),
            kernels,
            rest,
            times,
            dense_time,
        )
        if calibration is None:
            return table
        return _with_8_bits(table, supernet, example, read(calibration, example), seconds)

    def milliseconds(self, configuration: Sequence[int], int8: Collection[str] = ()) -> float:
        """Predicted latency of a configuration: the layers' and the rest's, added up.

        Args:
            int8: the layers that run in 8 bits, by name; with any, the rest does too. Each of the
                others then counts with its conversions, as if its neighbours were in 8 bits: of
                neighbours in float32 the conversions between them are too many.
        """
        rest, layers = self.rest, dict(self.layers)
        if int8:
            rest = self.int8_rest
            layers = {
                name: self.int8_layers[name] if name in int8 else self.beside_8_bits(name)
                for name in self.layers
            }
        return rest + sum(
            layer[size] for layer, size in zip(layers.values(), configuration, strict=True)
        )

    def beside_8_bits(self, name: str) -> dict[int, float]:
        """Milliseconds by group size of a layer in float32 where others are in 8 bits: its own and
        those of its conversions."""
        conversion = self.conversions.get(name, 0.0)
        return {size: time + conversion for size, time in self.layers[name].items()}

    def check(
        self,
        supernet: nn.Module,
        example: Tensor,
        *,
        configurations: int = 12,
        seconds: float = 10.0,
        seed: int = 0,
    ) -> LatencyCheck:
        """Time whole networks in random configurations, without clocks inside, against the
        prediction.

        Raises:
            ValueError: if the table is of other layers.
        """
        self.check_layers(supernet)
        example = _ready(example, seconds)
        generator = random.Random(seed)
        drawn = [
            tuple(generator.choice(list(sizes)) for sizes in self.layers.values())
            for _ in range(configurations)
        ]
        networks = [export(supernet, c, kernels=self.kernels, example=example) for c in drawn]
        samples: list[list[float]] = [[] for _ in networks]
        for i in _turns(len(networks), seconds):
            samples[i].append(_time(networks[i], example))
        measured = tuple(map(_typical, samples))
        return LatencyCheck(tuple(drawn), tuple(map(self.milliseconds, drawn)), measured)

    def check_layers(self, supernet: nn.Module) -> None:
        """Raise ValueError if the table is not of this supernet's layers."""
        found = {n: layer.group_sizes for n, layer in decomposed_layers(supernet).items()}
        own = {name: tuple(sizes) for name, sizes in self.layers.items()}
        if found != own:
            raise ValueError(
                f"latency: got a table of the layers {own}, accepted is one of {found}"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, in place of a file that is there."""
        replace(Path(path), json.dumps({"format": FORMAT, **asdict(self)}, indent=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyTable:
        """Read what :meth:`save` wrote; ValueError for any other file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError(f"accepted is format {FORMAT}")
            content["input_size"] = tuple(content["input_size"])
            for of in ("layers", "int8_layers"):
                content[of] = {
                    name: {int(size): value for size, value in sizes.items()}
                    for name, sizes in content[of].items()
                }
            return cls(**content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a latency table: {error}") from error

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        sizes = sorted({size for layer in self.layers.values() for size in layer})
        shape = "×".join(map(str, self.input_size))
        table = Table(
            title=f"milliseconds for {shape} {self.dtype} on {self.device}, "
            f"{self.threads} threads, {'kernels' if self.kernels else 'plain convolutions'}",
            box=SIMPLE_HEAD,
        )
        table.add_column("layer")
        columns = [(self.layers, size, "") for size in sizes]
        columns += [(self.int8_layers, size, " int8") for size in sizes if self.int8_layers]
        for _, size, precision in columns:
            table.add_column(f"{size}{precision}", justify="right")
        for name in self.layers:
            cells = [f"{of[name][s]:.3f}" if s in of[name] else "" for of, s, _ in columns]
            table.add_row(name, *cells)
        table.add_section()
        if self.conversions:
            times = ", ".join(f"{time:.3f}" for time in self.conversions.values())
            table.caption = f"in float32 among 8 bits the layers take longer by {times}"
        table.add_row("the rest", f"{self.rest:.3f}")
        if self.int8_layers:
            table.add_row("the rest, int8", f"{self.int8_rest:.3f}")
        table.add_row("dense network", f"{self.dense:.3f}")
        return table

    def __str__(self) -> str:
        return text(self)


@dataclass(frozen=True)
class LatencyCheck:
    """Predicted and measured milliseconds of whole networks."""

    configurations: tuple[Configuration, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def median_error(self) -> float:
        """Median of the relative errors of the predictions."""
        pairs = zip(self.predicted, self.measured, strict=True)
        return statistics.median(abs(p - m) / m for p, m in pairs)

    def __str__(self) -> str:
        return (
            f"predicted against measured latency of {len(self.measured)} configurations: median "
            f"error {100 * self.median_error:.1f} %"
        )


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def milliseconds(
    networks: Sequence[nn.Module], example: Tensor, seconds: float = 2.0
) -> list[float]:
    """Latency of each network, timed in turn for so many seconds in all."""
    check_type("networks", networks, Sequence, "a sequence of modules")
    for i, network in enumerate(networks):
        check_module(f"networks[{i}]", network)
    example = _ready(example, seconds)
    samples: list[list[float]] = [[] for _ in networks]
    for i in _turns(len(networks), seconds):
        samples[i].append(_time(networks[i], example))
    return list(map(_typical, samples))


def _apart(supernet: nn.Module, configuration: Configuration, kernels: bool) -> nn.Module:
    """The network in a configuration, each decomposed layer a module that can be timed."""
    if not kernels:
        return export(supernet, configuration, kernels=False)
    network = copy_model(unwrapped(supernet), with_attributes=False).eval()
    set_configuration(network, configuration)
    return pack(network.to(memory_format=torch.channels_last))


def _with_8_bits(
    table: LatencyTable,
    supernet: nn.Module,
    example: Tensor,
    batches: Sequence[Tensor],
    seconds: float,
) -> LatencyTable:
    """The table with milliseconds in 8 bits of the rest and of each layer at each size."""
    network = copy_model(unwrapped(supernet), with_attributes=False).eval()
    settings = Int8(most_error=sys.float_info.max, ranges="largest")
    layers, active = decomposed_layers(network), configuration(network)
    names, every = list(layers), covering(network)
    inputs = {name: inputs_of(network, name, [(active, example)])[0] for name in names}
    alone = {
        (name, size): lowered
        for name, layer in layers.items()
        for size, lowered in in_8_bits(layer, [inputs[name]], settings).items()
    }
    whole = [
        export(network, c, example=example, precision=settings, calibration=batches) for c in every
    ]
    # Each layer is left in float32 in the network of one of these configurations.
    spared = {name: i % len(every) for i, name in enumerate(names)}
    whole += [
        export(
            network,
            every[i],
            example=example,
            precision=replace_fields(settings, float32=(name,)),
            calibration=batches,
        )
        for name, i in spared.items()
    ]
    calls = [partial(_time, each) for each in (*whole, *alone.values())]
    examples = [example] * len(whole) + [inputs[name] for name, _ in alone]
    samples: list[list[float]] = [[] for _ in calls]
    for i in _turns(len(calls), seconds):
        samples[i].append(calls[i](examples[i]))
    typical = list(map(_typical, samples))
    total, own = typical[: len(whole)], dict(zip(alone, typical[len(whole) :], strict=True))
    total, mixed = total[: len(every)], dict(zip(names, total[len(every) :], strict=True))
    sums = [sum(own[key] for key in zip(names, c, strict=True)) for c in every]
    factor, rest = _line(sums, total)
    times: dict[str, dict[int, float]] = {name: {} for name in names}
    for (name, size), each in own.items():
        times[name][size] = factor * each
    conversions = {}
    for position, (name, i) in enumerate(spared.items()):
        size = every[i][position]
        gained = table.layers[name][size] - times[name][size]
        conversions[name] = mixed[name] - total[i] - gained
    return replace_fields(table, int8_rest=rest, int8_layers=times, conversions=conversions)


def _line(sums: Sequence[float], totals: Sequence[float]) -> tuple[float, float]:
    """Factor and rest with ``total ≈ factor · sum + rest``, least squares, none below 0; of one
    network alone all is the layers'."""
    if len(set(sums)) > 1:
        factor, rest = statistics.linear_regression(sums, totals)
        if factor > 0 and rest >= 0:
            return factor, rest
    return statistics.fmean(totals) / statistics.fmean(sums), 0.0


class _LayerClock:
    """Runs a network and says how long the whole of it and its decomposed layers took.

    The whole is timed without clocks inside, which take microseconds of their own."""

    def __init__(self, network: nn.Module, names: Sequence[str], device: torch.device) -> None:
        self.network = network
        self.layers = [network.get_submodule(name) for name in names]
        self.device = device
        self.marks: list[tuple[int, Any]] = []

    def __call__(self, example: Tensor) -> tuple[float, list[float]]:
        total = _time(self.network, example)
        hooks = []
        for i, layer in enumerate(self.layers):
            mark = partial(self._mark, i)
            hooks += [layer.register_forward_pre_hook(mark), layer.register_forward_hook(mark)]
        self.marks.clear()
        try:
            with torch.inference_mode():
                self.network(example)
        finally:
            for hook in hooks:
                hook.remove()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        parts = [0.0] * len(self.layers)
        for (i, began), (_, ended) in zip(self.marks[::2], self.marks[1::2], strict=True):
            parts[i] += _between(began, ended)
        return total, parts

    def _mark(self, layer: int, *_: object) -> None:
        self.marks.append((layer, _now(self.device)))


def _typical(samples: Sequence[float]) -> float:
    """The lower quartile: what other programs take from the machine only ever adds time."""
    return statistics.quantiles(samples, n=4, method="inclusive")[0]


def _turns(count: int, seconds: float) -> Any:
    """Positions 0 to ``count``, in another order each round, for so long; at least five rounds
    after a first one to warm up."""
    generator = random.Random(0)
    rounds = 0
    end = time.perf_counter() + seconds
    while rounds < 6 or time.perf_counter() < end:
        yield from generator.sample(range(count), count)
        rounds += 1


def _time(network: nn.Module, example: Tensor) -> float:
    """Milliseconds of a call that follows another, which has brought the weights into the caches:
    the networks that take turns throw one another's out."""
    with torch.inference_mode():
        network(example)
        began = _now(example.device)
        network(example)
        ended = _now(example.device)
        if example.device.type == "cuda":
            torch.cuda.synchronize(example.device)
    return _between(began, ended)


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(began: Any, ended: Any) -> float:
    if isinstance(began, float):
        return 1000 * (ended - began)
    return began.elapsed_time(ended)


def _ready(example: Tensor, seconds: float) -> Tensor:
    """The example in channels-last, in a process that keeps freed memory."""
    check_tensor("example", example)
    check_number("seconds", seconds, "a number of at least 0")
    keep_freed_memory()
    return example.contiguous(memory_format=torch.channels_last) if example.dim() == 4 else example
