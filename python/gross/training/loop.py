"""The training loop: :func:`train` for an ordinary network, :func:`finetune` for a supernet."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_callable, check_flag, check_int, check_module, check_path
from ..data import Data
from ..devices import Returning, moved, placed
from ..supernet import (
    Configuration,
    check_configuration,
    configuration,
    decomposed_layers,
    set_configuration,
)
from . import distributed
from .beginning import in_pieces
from .checkpoint import Checkpoints, Position
from .losses import Loss, Metric, Penalty, accuracy, cross_entropy, distillation
from .progress import draws, shown
from .recipes import Recipe
from .reconstruct import ResponseLoss
from .run import RunDirectory
from .sampling import Sampler
from .selection import evaluating, selected

#: What a supernet is measured in after each epoch: the place of each layer's group size.
EXTREMES = (("smallest", 0), ("largest", -1))


class DivergenceError(RuntimeError):
    """The loss or a weight is not finite; the message says at which step and in which layer."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; it finished its step and saved."""


@dataclass(frozen=True)
class History:
    """What a run measured.

    Attributes:
        epochs: one record an epoch, as in ``metrics.jsonl``: "epoch", "step", "loss" (the mean over
            its steps), "lr", the metrics, "seconds", "loader_seconds", "images_per_second".
        directory: where the run was kept, if it was.
    """

    epochs: tuple[dict[str, Any], ...]
    directory: Path | None = None


def train(
    model: nn.Module,
    data: Data | Iterable[Any],
    recipe: str | os.PathLike[str] | Recipe | None = None,
    *,
    loss: Loss = cross_entropy,
    metric: Metric | None = None,
    regularizer: Penalty | None = None,
    directory: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    quiet: bool = False,
    device: str | int | torch.device | None = None,
    **overrides: Any,
) -> History:
    """Train an ordinary network, in place.

    With the same arguments a run on the CPU gives the same bits, also if it was stopped, at any
    moment, and resumed.

    Args:
        model: any module.
        data: from :func:`gross.data.load`, or any iterable of batches that can be iterated once an
            epoch, such as a ``DataLoader``; torch's generator is seeded before each epoch.
        recipe: a name of the package's, a TOML file or a :class:`Recipe`; by default "train".
        loss: ``loss(model, batch)`` gives a scalar to minimise; by default cross-entropy.
        metric: ``metric(model)`` gives a number after each epoch; by default the accuracy on the
            validation images in percent.
        regularizer: ``regularizer()`` gives a scalar that is added to the loss at each step, such
            as :func:`gross.structured.regularizer`'s.
        directory: where metrics and checkpoints go; by default nothing is written.
        resume: go on with the run in ``directory``, if there is one.
        seed: of data order, augmentation and dropout.
        quiet: show no progress.
        device: where to train, such as "cuda"; the model is moved there and stays. By default where
            it is.
        overrides: other values for the recipe: ``epochs=3``, ``**{"optimizer.lr": 0.02}``.

    Raises:
        ValueError, TypeError: before any work, for an argument that does not fit.
        DivergenceError: if the loss or a weight becomes NaN or infinite; the last checkpoint is
            kept.
        Interrupted: after Ctrl-C or SIGTERM, when the step is finished and saved. A second Ctrl-C
            stops at once.
        OSError: if a checkpoint cannot be written; those before it are kept.
    """
    check_module("model", model)
    chosen = _recipe(recipe, "train", overrides)
    if chosen.objective != "task":
        raise ValueError(f"objective: got {chosen.objective!r}, accepted is 'task': see finetune")
    metrics = _metrics(data, metric, None)
    placed(model, device)
    run = _Run(model, data, chosen, loss, metrics, regularizer, seed=seed, quiet=quiet)
    return run(directory, resume)


def finetune(
    supernet: nn.Module,
    data: Data | Iterable[Any],
    recipe: str | os.PathLike[str] | Recipe | None = None,
    *,
    configuration: int | Sequence[int] | Mapping[str, int] | None = None,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    metric: Metric | None = None,
    directory: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int = 0,
    quiet: bool = False,
    device: str | int | torch.device | None = None,
    **overrides: Any,
) -> History:
    """Train every configuration of a supernet together (GroSS, section 3.3.1), or one alone.

    What each step runs is drawn as the recipe's ``sampling`` says. Arguments that are not listed
    are :func:`train`'s.

    Args:
        supernet: what :func:`gross.decompose` returns; trained in place. Afterwards it has the
            configuration that it had, or the fixed one.
        recipe: by default "finetune".
        configuration: train this one alone, the paper's "individual" fine-tuning: the terms that
            make it up move as the weights of a plain bottleneck. As :func:`gross.set_configuration`
            takes it.
        teacher: the network before its decomposition. Then, unless ``loss`` is given, the loss is
            the divergence of the class probabilities from the teacher's; for other tasks, ``loss=
            gross.training.distillation(teacher, distance)``. A recipe whose ``objective`` is
            "response" needs it.
        metric: by default the accuracy on the validation images in percent; taken at every layer's
            smallest and largest group size, or in the fixed configuration.

    Raises:
        ValueError, TypeError: before any work, for an argument that does not fit.
        DivergenceError, Interrupted, OSError: as :func:`train`.
    """
    layers = decomposed_layers(check_module("supernet", supernet))
    if teacher is not None:
        check_module("teacher", teacher)
    if not layers:
        raise ValueError(
            f"supernet: got {type(supernet).__name__} without decomposed layers, accepted is what "
            "gross.decompose returns"
        )
    chosen = _recipe(recipe, "finetune", overrides)
    sizes = [layer.group_sizes for layer in layers.values()]
    extremes: dict[str, Configuration] | None = None
    if configuration is None:
        extremes = {end: tuple(s[i] for s in sizes) for end, i in EXTREMES}
        sampling = chosen.sampling
        sampler = Sampler(
            supernet, sampling.policy, alpha=sampling.alpha, form=sampling.form, seed=seed
        )
    else:
        active = tuple(layer.group_size for layer in layers.values())
        configuration = check_configuration(configuration, sizes, active, list(layers))
        sampler = None
    for model in (supernet, teacher):
        if model is not None:
            placed(model, device)
    with ExitStack() as stack:
        if chosen.objective == "response":
            if teacher is None or loss is not None:
                raise ValueError(
                    "teacher: got none, or a loss beside it; accepted for the objective 'response' "
                    "is the network before its decomposition, alone"
                )
            loss = ResponseLoss(supernet, teacher)
            stack.callback(loss.close)
        elif loss is None:
            loss = cross_entropy if teacher is None else distillation(teacher)
        metrics = _metrics(data, metric, extremes)
        run = _Run(supernet, data, chosen, loss, metrics, None, sampler, configuration, seed, quiet)
        return run(directory, resume)


def _recipe(
    source: str | os.PathLike[str] | Recipe | None, default: str, overrides: Mapping[str, Any]
) -> Recipe:
    if not isinstance(source, Recipe):
        source = Recipe.load(default if source is None else check_path("recipe", source))
    return source.override(overrides)


@dataclass(frozen=True)
class _Probe:
    """A metric, taken in a configuration; in the model as it is for None."""

    metric: Metric
    configuration: Configuration | None


def _metrics(
    data: object, metric: Metric | None, extremes: Mapping[str, Configuration] | None
) -> dict[str, _Probe]:
    """What is measured after an epoch, by the name that it is reported under."""
    name = "accuracy" if metric is None else "metric"
    if metric is None:
        if not isinstance(data, Data):
            return {}
        metric = accuracy(data.validation)
    if extremes is None:
        return {name: _Probe(metric, None)}
    return {end: _Probe(metric, configuration) for end, configuration in extremes.items()}


@dataclass
class _Step:
    """A step that was done: its loss and whether to stop, its number, what it ran on."""

    values: Returning
    number: int
    batch: Any
    read: bool = False


@dataclass
class _Run:
    """One training: everything that it needs, and its state while it goes."""

    model: nn.Module
    data: Data | Iterable[Any]
    recipe: Recipe
    loss: Loss
    metrics: dict[str, _Probe]
    regularizer: Penalty | None = None
    sampler: Sampler | None = None
    configuration: Configuration | None = None
    seed: int = 0
    quiet: bool = False
    position: Position = field(default_factory=Position)
    records: list[dict[str, Any]] = field(default_factory=list)
    pending: _Step | None = None

    def __call__(self, directory: str | os.PathLike[str] | None, resume: bool) -> History:
        check_callable("loss", self.loss, "a function of model and batch")
        if self.regularizer is not None:
            accepted = "a function without arguments, or None"
            check_callable("regularizer", self.regularizer, accepted)
        for probe in self.metrics.values():
            check_callable("metric", probe.metric, "a function of the model")
        check_int("seed", self.seed)
        check_flag("quiet", self.quiet)
        if directory is not None:
            check_path("directory", directory)
        if check_flag("resume", resume) and directory is None:
            raise ValueError("resume: got no directory, accepted is one that holds a run")
        self.device = next(self.model.parameters()).device
        self.shard = distributed.shard()
        self.steps_an_epoch = self._check_data()
        before = configuration(self.model)
        if self.configuration is not None:
            set_configuration(self.model, self.configuration)
        self._check_batch()
        with ExitStack() as stack:
            if self.configuration is None:
                stack.callback(set_configuration, self.model, before)
            self.parameters = stack.enter_context(
                selected(self.model, self.recipe, self.configuration)
            )
            if not self.recipe.compile:
                stack.enter_context(in_pieces(self.model))
            self.optimizer = self._make_optimizer()
            steps = self.steps_an_epoch * self.recipe.epochs
            first = self.shard.index == 0
            self.progress = stack.enter_context(shown(steps, self.quiet or not first))
            self.run: RunDirectory | None = None
            self.checkpoints: Checkpoints | None = None
            if directory is not None:
                self._open(Path(directory), resume, stack)
            self._say_what(steps)
            self.stop = stack.enter_context(_stop_requests())
            self._train()
        return History(tuple(self.records), None if directory is None else Path(directory))

    # Before the first step ----------------------------------------------------------------------

    def _check_data(self) -> int:
        """Steps an epoch. Raises ValueError if the data give no whole batch for each process."""
        size, count = self.recipe.batch_size, self.shard.count
        if size % count:
            raise ValueError(
                f"batch_size: got {size} for {count} processes, accepted are multiples of {count}"
            )
        if isinstance(self.data, Data):
            if size > len(self.data.train):
                raise ValueError(
                    f"batch_size: got {size}, accepted are at most the {len(self.data.train)} "
                    f"training images of {self.data.name!r}"
                )
            return len(self.data.train) // size
        if not isinstance(self.data, Sized):
            raise TypeError(
                f"data: got {type(self.data).__name__}, accepted are gross.data.load's and sized "
                "iterables of batches, such as a DataLoader"
            )
        if len(self.data) == 0:
            raise ValueError("data: got no batch, accepted is at least one an epoch")
        return len(self.data)

    def _check_batch(self) -> None:
        """Run the model on one image of the data. Raises ValueError if it does not take it."""
        if not isinstance(self.data, Data):
            return
        inputs, _ = self.data.validation.tensors(1)
        try:
            with evaluating(self.model):
                output = self.model(moved(inputs, self.device))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"data: got images of {tuple(inputs.shape[1:])}, which {type(self.model).__name__} "
                f"does not take: {error}"
            ) from error
        classes = len(self.data.classes)
        if self.loss is cross_entropy and output.shape[1:] != (classes,):
            raise ValueError(
                f"data: got {classes} classes in {self.data.name!r}, and the outputs of "
                f"{type(self.model).__name__} have the shape {tuple(output.shape[1:])}"
            )

    def _make_optimizer(self) -> torch.optim.Optimizer:
        options = self.recipe.optimizer
        parameters = list(self.parameters.values())
        common: Any = {"lr": options.lr, "weight_decay": options.weight_decay, "foreach": True}
        if options.name == "adamw":
            return torch.optim.AdamW(parameters, **common)
        return torch.optim.SGD(parameters, momentum=options.momentum, **common)

    def _open(self, folder: Path, resume: bool, stack: ExitStack) -> None:
        """The run directory, and the state of its last checkpoint."""
        identity = {
            "recipe": self.recipe.flat(),
            "seed": self.seed,
            "data": self._describe_data(),
            "model": {
                "class": type(self.model).__name__,
                "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            },
            "configuration": self.configuration,
            "loss": getattr(self.loss, "__qualname__", type(self.loss).__name__),
            "regularizer": None,
        }
        if self.regularizer is not None:
            named = getattr(self.regularizer, "__qualname__", repr(self.regularizer))
            identity["regularizer"] = named
        if self.shard.index == 0:
            self.run = RunDirectory.open(folder, identity, resume=resume)
            stack.callback(self.run.close)
        distributed.wait()
        self.checkpoints = Checkpoints(
            folder, self.model, self.optimizer, self.parameters, self.sampler
        )
        self.position, broken = self.checkpoints.restore()
        for problem in broken:
            self.progress.say(f"{problem}; going on from the checkpoint before")
        if self.run is not None:
            self.records = self.run.rewind(self.position.epoch)
        if self.position.step:
            at = f"epoch {self.position.epoch}, step {self.position.step}"
            self.progress.say(f"resumed at {at}")

    def _describe_data(self) -> dict[str, Any]:
        if not isinstance(self.data, Data):
            return {"name": type(self.data).__name__, "batches": self.steps_an_epoch}
        parts = (self.data.train, self.data.validation, self.data.test)
        return {
            "name": self.data.name,
            "images": list(map(len, parts)),
            "input_size": list(self.data.input_size),
            "classes": list(self.data.classes),
        }

    def _say_what(self, steps: int) -> None:
        if isinstance(self.data, Data):
            self.progress.say(str(self.data))
        count = sum(parameter.numel() for parameter in self.parameters.values())
        self.progress.say(
            f"{self.recipe.epochs} epochs of {self.steps_an_epoch} steps, {count:,} numbers train"
        )
        if self.sampler is not None:
            expected = {
                name: {size: share * steps for size, share in shares.items()}
                for name, shares in self.sampler.probabilities().items()
            }
            self.progress.say(draws(expected))

    # The epochs ---------------------------------------------------------------------------------

    def _train(self) -> None:
        model = distributed.wrapped(self.model, self.device)
        if self.recipe.compile:
            model = torch.compile(model)  # type: ignore[assignment]
        self._saved = time.monotonic()
        if self.position.step == 0:
            self._save()
        while self.position.epoch < self.recipe.epochs:
            self._epoch(model)

    def _epoch(self, model: nn.Module) -> None:
        position = self.position
        begin, loading = time.perf_counter(), 0.0
        before = position.batch
        batches = self._batches(position.epoch, position.batch)
        while position.batch < self.steps_an_epoch:
            asked = time.perf_counter()
            batch = _to(next(batches), self.device)
            loading += time.perf_counter() - asked
            step = self._step(model, batch)
            position.batch += 1
            position.step += 1
            # A GPU's loss is read while it computes the next step: the host is never more than one
            # step ahead, and never waits in between.
            loss, stop = self._read(step if self.pending is None else self.pending)
            self.pending = step if step.values.late else None
            spent = time.perf_counter() - begin
            rate = (position.batch - before) * self.recipe.batch_size / spent
            self.progress.step(position.step, self._line(position.epoch + 1, loss, rate))
            if stop:
                self._catch_up()
                position.seconds += spent
                self._save()
                raise Interrupted(self._how_to_resume())
            if time.monotonic() - self._saved > 60 * self.recipe.checkpoint_minutes:
                self._catch_up()
                self._save()
        self._catch_up()
        spent = time.perf_counter() - begin
        position.seconds += spent
        images = (position.batch - before) * self.recipe.batch_size
        self._finish_epoch(spent, loading, images / spent)

    def _finish_epoch(self, seconds: float, loading: float, rate: float) -> None:
        position = self.position
        record = {
            "epoch": position.epoch + 1,
            "step": position.step,
            "loss": position.loss / self.steps_an_epoch,
            "lr": self._lr(position.epoch, self.steps_an_epoch - 1),
            **self._measure(),
            "seconds": seconds,
            "loader_seconds": loading,
            "images_per_second": rate,
        }
        position.epoch += 1
        position.batch, position.loss = 0, 0.0
        self.records.append(record)
        if self.run is not None:
            self.run.record(record)
        self._save()
        self.progress.epoch(self._line(position.epoch, record["loss"], rate))

    def _read(self, step: _Step) -> tuple[float, bool]:
        """The mean loss of a step's configurations, over all processes, and whether to stop."""
        mean, stop = step.values.read()
        if not abs(mean) < float("inf"):
            self._diverged(f"the loss is {mean}", step.number, self._first_bad(step.batch))
        if not step.read:
            self.position.loss += mean
            step.read = True
        return mean, bool(stop)

    def _catch_up(self) -> None:
        """Read what a step has left to read."""
        if self.pending is not None:
            self._read(self.pending)
            self.pending = None

    def _step(self, model: nn.Module, batch: Any) -> _Step:
        """One update."""
        position = self.position
        # Dropout depends on the step, so that a resumed run draws the same.
        torch.manual_seed(_mix(self.seed, position.step, self.shard.index))
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(position.epoch, position.batch)
        losses = []
        for _ in (None,) if self.sampler is None else self.sampler.step():
            with self._autocast():
                loss = self.loss(model, batch)
            if self.regularizer is not None:
                loss = loss + self.regularizer()
            losses.append(loss.detach().double())
            # Also where it is not finite: the other processes wait for the gradients.
            loss.backward()
        values = distributed.agree(sum(losses[1:], losses[0]) / len(losses), self.stop.is_set())
        step = _Step(Returning(values), position.step + 1, batch)
        if not step.values.late:
            self._read(step)
        if self.sampler is not None:
            self.sampler.release()
        if self.recipe.optimizer.clip:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.recipe.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return step

    def _autocast(self) -> Any:
        if self.recipe.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _lr(self, epoch: int, batch: int) -> float:
        progress = epoch + batch / self.steps_an_epoch
        return self.recipe.optimizer.lr * self.recipe.schedule.scale(progress, self.recipe.epochs)

    def _batches(self, epoch: int, start: int) -> Iterator[Any]:
        """The epoch's batches from ``start`` on, those of this process."""
        if isinstance(self.data, Data):
            return self.data.train.epoch(
                self.recipe.batch_size,
                seed=self.seed,
                epoch=epoch,
                start=start,
                shard=self.shard,
            )
        torch.manual_seed(_mix(self.seed, "epoch", epoch))
        batches = iter(self.data)
        for _ in range(start):
            next(batches)
        return batches

    def _measure(self) -> dict[str, float]:
        if self.shard.index != 0:
            return {}
        values = {}
        with evaluating(self.model):
            for name, probe in self.metrics.items():
                if probe.configuration is not None:
                    set_configuration(self.model, probe.configuration)
                values[name] = float(probe.metric(self.model))
        return values

    def _save(self) -> None:
        """A checkpoint, if the run is kept."""
        self._saved = time.monotonic()
        if self.run is None or self.checkpoints is None:
            return
        try:
            self.checkpoints.save(self.position)
        except FloatingPointError as error:
            self._diverged("a weight is not finite", self.position.step, str(error))

    def _line(self, epoch: int, loss: float, rate: float) -> str:
        latest = self.records[-1] if self.records else {}
        parts = [f"epoch {epoch}/{self.recipe.epochs}", f"loss {loss:.4f}"]
        parts += [f"{name} {latest[name]:.2f}" for name in self.metrics if name in latest]
        return "  ".join([*parts, f"{rate:,.0f} images/s"])

    def _how_to_resume(self) -> str:
        if self.run is None:
            return f"stopped after step {self.position.step}; nothing was kept without a directory"
        return (
            f"stopped after step {self.position.step} and saved; to go on, give the same arguments "
            f"and resume (directory {self.run.folder})"
        )

    def _diverged(self, what: str, step: int, layer: str) -> None:
        kept = self.checkpoints.paths() if self.checkpoints is not None else []
        last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was kept"
        raise DivergenceError(
            f"{what} at step {step} (epoch {self._epoch_of(step)}), first seen in {layer}; {last}"
        )

    def _epoch_of(self, step: int) -> int:
        return (step - 1) // self.steps_an_epoch + 1

    def _first_bad(self, batch: Any) -> str:
        """The first layer with a weight or an output that is not finite, in the order of a
        forward."""
        found: list[str] = []
        hooks = [
            module.register_forward_hook(_finder(name, found))
            for name, module in self.model.named_modules()
            if not any(module.children()) or not isinstance(module, nn.Sequential)
        ]
        try:
            with torch.no_grad(), self._autocast():
                self.loss(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else "the loss itself"


def _finder(name: str, found: list[str]) -> Any:
    def find(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            found.append(f"the output of {name or 'the model'}")

    return find


class _Stop(threading.Event):
    """Set by the first Ctrl-C or SIGTERM."""

    def request(self, number: int, frame: object) -> None:
        if self.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.set()


@contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """Within, the first Ctrl-C or SIGTERM asks to stop after the step. Signals reach the main
    thread alone."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop.request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _to(batch: Any, device: torch.device) -> Any:
    """A batch on a device: a tensor, or a tuple, list or mapping of what a batch can be."""
    if isinstance(batch, Tensor):
        return moved(batch, device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_to(value, device) for value in batch)
    return batch


def _mix(*parts: object) -> int:
    """A seed that depends on all its parts."""
    return random.Random(repr(parts)).getrandbits(63)
