"""Which configurations a training step runs.

A :class:`Sampler` is a part for anybody's loop: it knows of no loss, no classes and no trainer."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import nn

from gross_kernels import GroSSConv2d

from ..arguments import check_choice, check_int, check_module, check_number
from ..supernet import Configuration, decomposed_layers

Policy = Literal["uniform", "temperature", "sandwich", "fair"]
Form = Literal["relative", "literal"]


class Sampler:
    """Draws the configuration that each training step of a supernet runs (GroSS, section 3.3).

    A step is one update of the weights::

        sampler = gross.Sampler(supernet)
        for batch in batches:
            for _ in sampler.step():
                loss(supernet, batch).backward()
            sampler.release()
            optimizer.step()
            optimizer.zero_grad()

    ``step`` sets its first configuration at once, so that where a step has one configuration, that
    is under every policy but "sandwich", ``sampler.step()`` may stand alone before the forward.
    Trainers that own the backward pass take the sum of the losses,
    ``sum(loss(supernet, batch) for _ in sampler.step())``, and call ``release`` where gradients are
    complete: Lightning in ``on_before_optimizer_step``, Hugging Face's Trainer in a callback's
    ``on_pre_optimizer_step``, an AMP loop before ``scaler.step``. With gradient accumulation
    ``step`` is called for each part and ``release`` once.

    What is drawn depends on the seed and the number of the step alone: equal on every rank.

    Args:
        supernet: a network with decomposed layers.
        policy: "uniform" draws each layer's size uniformly (ECCV 2020). "temperature" draws the
            i-th smallest of N with ``P(s_i) ∝ exp(-α·i/N)``, or in the form "literal" with
            ``exp(-α·i)`` (ICLR 2020 draft, equation 8). "sandwich" runs four configurations a step:
            every layer at its largest size, every layer at its smallest, and two uniform ones
            (slimmable networks' rule). "fair" draws every size of a layer once in each round of N
            steps.
        alpha: the temperature; 0 is uniform.
        form: of the temperature. Read literally, equation 8 at its default α = 4 draws the smallest
            size in 98 % of the steps, which the figures of the draft contradict.
        seed: of the draws.

    Raises:
        ValueError: for a supernet without decomposed layers, an unknown policy or form, or a
            temperature that is not finite.
    """

    def __init__(
        self,
        supernet: nn.Module,
        policy: Policy = "uniform",
        *,
        alpha: float = 4.0,
        form: Form = "relative",
        seed: int = 0,
    ) -> None:
        layers = decomposed_layers(check_module("supernet", supernet))
        if not layers:
            raise ValueError(
                f"supernet: got {type(supernet).__name__} without decomposed layers, accepted is "
                "what gross.decompose returns"
            )
        self.policy = check_choice("policy", policy, get_args(Policy))
        self.form = check_choice("form", form, get_args(Form))
        self.alpha = check_number("alpha", alpha, "a finite number", -math.inf)
        self.seed = check_int("seed", seed)
        self._layers = layers
        self._steps = 0
        # The largest size that each series of terms has run at since the last release. Layers may
        # share their terms.
        self._largest: dict[int, int] = {}

    def __len__(self) -> int:
        """How many configurations one step runs."""
        return 4 if self.policy == "sandwich" else 1

    def step(self) -> Iterator[Configuration]:
        """Draw the next step's configurations, set the first, and return an iterator that sets each
        in turn as it yields it."""
        configurations = self._draw(self._steps)
        self._steps += 1
        self._set(configurations[0])
        return self._visit(configurations)

    def release(self) -> None:
        """Set the gradients of the terms that no forward has used since the last call to None.

        They are zeros after the backward pass, and a zero gradient still moves a weight through
        momentum and weight decay. Call it when the gradients are complete, after any all-reduce,
        before the optimizer's step."""
        for layer in self._layers.values():
            largest = self._largest.get(id(layer.grouped))
            if largest is not None and largest != layer.group_sizes[-1]:
                now = layer.group_size
                layer.group_size = largest
                layer.release_inactive()
                layer.group_size = now
        self._largest.clear()

    def probabilities(self) -> dict[str, dict[int, float]]:
        """How often each layer runs at each group size, in a step on average: by the layer's name
        and the size. They sum to 1, under "sandwich" to 4."""
        return {
            name: dict(zip(layer.group_sizes, self._shares(layer), strict=True))
            for name, layer in self._layers.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """How many steps have been drawn, and what the draws depend on; all of it JSON."""
        return {"steps": self._steps, **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the sampler that gave ``state`` was.

        Raises:
            ValueError: if that sampler draws otherwise than this one, with what differs.
        """
        for name, value in self._settings().items():
            if state[name] != value:
                raise ValueError(f"{name}: got a state of {state[name]!r}, accepted is {value!r}")
        self._steps = int(state["steps"])
        self._largest.clear()

    def _settings(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "alpha": self.alpha,
            "form": self.form,
            "seed": self.seed,
            "group_sizes": [list(layer.group_sizes) for layer in self._layers.values()],
        }

    def _draw(self, step: int) -> list[Configuration]:
        layers = list(self._layers.values())
        if self.policy == "fair":
            return [tuple(self._fair(i, layer, step) for i, layer in enumerate(layers))]
        # Strings are seeds of all their characters, the same on every machine.
        draws = random.Random(f"{self.seed} {step}")
        if self.policy == "sandwich":
            extremes = [tuple(layer.group_sizes[end] for layer in layers) for end in (-1, 0)]
            return extremes + [
                tuple(draws.choice(layer.group_sizes) for layer in layers) for _ in range(2)
            ]
        return [
            tuple(draws.choices(layer.group_sizes, self._weights(layer))[0] for layer in layers)
        ]

    def _fair(self, position: int, layer: GroSSConv2d, step: int) -> int:
        """A layer's size in this step: the order of a round is a permutation of its own."""
        lap, place = divmod(step, len(layer.group_sizes))
        order = list(layer.group_sizes)
        random.Random(f"{self.seed} {position} {lap}").shuffle(order)
        return order[place]

    def _weights(self, layer: GroSSConv2d) -> list[float]:
        """What a single draw is proportional to, by size."""
        count = len(layer.group_sizes)
        if self.policy != "temperature":
            return [1.0] * count
        scale = count if self.form == "relative" else 1
        exponents = [-self.alpha * i / scale for i in range(1, count + 1)]
        return [math.exp(exponent - max(exponents)) for exponent in exponents]

    def _shares(self, layer: GroSSConv2d) -> list[float]:
        weights = self._weights(layer)
        shares = [weight / sum(weights) for weight in weights]
        if self.policy == "sandwich":
            shares = [2 * share for share in shares]
            shares[0] += 1
            shares[-1] += 1
        return shares

    def _visit(self, configurations: Sequence[Configuration]) -> Iterator[Configuration]:
        for configuration in configurations:
            self._set(configuration)
            yield configuration

    def _set(self, configuration: Configuration) -> None:
        for layer, size in zip(self._layers.values(), configuration, strict=True):
            layer.group_size = size
            terms = id(layer.grouped)
            self._largest[terms] = max(size, self._largest.get(terms, 0))
