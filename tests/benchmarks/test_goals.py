"""Goals: a wrong mark would be believed."""

from typing import Any

import pytest

from benchmarks import goals
from benchmarks.goals import Goal
from benchmarks.shapes import NETWORKS

MAIN = {"device_type": "cpu", "dtype": "float32", "memory_format": "channels_last"}


def core(setting: int, operation: str = "forward", **more: Any) -> dict[str, Any]:
    return {
        **MAIN,
        "suite": "grouped convolution",
        "setting": setting,
        "operation": operation,
        "batch": 16,
        **more,
    }


def layer(setting: int, batch: int, operation: str = "inference", **more: Any) -> dict[str, Any]:
    entry = {
        "suite": "GroSSConv2d",
        "setting": setting,
        "operation": operation,
        "batch": batch,
        "narrow": False,
    }
    return {**MAIN, **entry, **more}


def network(subject: str, setting: str, **more: Any) -> dict[str, Any]:
    entry = {
        "suite": "networks",
        "subject": subject,
        "setting": setting,
        "operation": "inference",
        "batch": 16,
    }
    return {**MAIN, **entry, **more}


@pytest.mark.parametrize(
    ("values", "mark"),
    [
        ([2.0, 0.5], "≥ 1.00 / 0.50 reached"),
        ([2.0, 0.49], "≥ 1.00 / 0.50 missed"),
        ([9.0, 0.49], "≥ 1.00 / 0.50 missed"),
        ([1.5, 0.6], "≥ 1.00 / 0.50 missed"),
    ],
)
def test_both_mean_and_minimum_count(values: list[float], mark: str) -> None:
    """Catches an arithmetic mean (1.05 in the last), a strict comparison, and one of two conditions
    left out."""
    assert Goal(1.0, 0.5).mark(values) == mark


def test_goal_without_minimum() -> None:
    """Catches a minimum where none is asked for."""
    assert Goal(1.7).mark([9.0, 0.5]) == "≥ 1.70 reached"


@pytest.mark.parametrize(
    ("setting", "means"),
    [
        (1, (1.1, 1.5, 1.1)),
        (4, (3.5, 3.5, 2.8)),
        (16, (1.05, 1.05, 1.05)),
        (64, (0.97, 0.97, 0.97)),
        (29, (1.0,) * 3),
    ],
)
def test_grouped_convolution(setting: int, means: tuple[float, ...]) -> None:
    """Catches an operation's goal beside another's, and sizes that are no power of two without
    one."""
    found = [goals.goal("library", core(setting, operation)) for operation in goals.OPERATIONS]
    assert found == [Goal(mean, 0.85) for mean in means]


@pytest.mark.parametrize(
    "precision", [{"dtype": "bfloat16"}, {"memory_format": "contiguous_format"}]
)
def test_other_precisions_must_only_keep_up(precision: dict[str, str]) -> None:
    """Catches float32's goals beside figures of another precision; layers and networks have none
    there."""
    assert goals.goal("library", core(4, **precision)) == Goal(1.0, 0.85)
    assert goals.goal("η", layer(4, 16, **precision)) is None
    assert goals.goal("dense", network("vgg16", "4 4", **precision)) is None


@pytest.mark.parametrize(
    ("figure", "entry", "goal"),
    [
        ("η", layer(1, 16), Goal(0.90, 0.75)),
        ("η", layer(16, 16), Goal(0.95, 0.80)),
        ("η", layer(1, 1), Goal(0.80, 0.65)),
        ("η", layer(32, 1), Goal(0.85, 0.70)),
        ("fold", layer(4, 16), Goal(1.7)),
        ("fold", layer(4, 1), Goal(1.6)),
        ("η", layer(4, 16, "training"), Goal(0.8)),
        ("fold", layer(16, 16), None),
        ("fold", layer(4, 16, "training"), None),
        ("dense", layer(4, 16), None),
        ("η unpacked", layer(4, 16), None),
        ("η", layer(4, 1, "training"), None),
        ("η", layer(8, 16), None),
        ("η", layer(4, 16, narrow=True), None),
    ],
)
def test_layer(figure: str, entry: dict[str, Any], goal: Goal | None) -> None:
    """Catches a goal beside a figure that it does not speak of, or of the other batch."""
    assert goals.goal(figure, entry) == goal


@pytest.mark.parametrize(
    ("figure", "entry", "goal"),
    [
        ("dense", network("vgg16", "4 4 4"), Goal(3.0)),
        ("dense", network("4-layer", "4 4 4"), Goal(1.8)),
        ("dense", network("vgg16-narrow", "4 4 4"), None),
        ("dense", network("vgg16", "4 16 4"), None),
        ("dense", network("vgg16", "16 16 16"), None),
        ("dense", network("vgg16", "4 4 4", operation="training"), None),
        ("dense", network("vgg16", "4 4 4", batch=1), None),
        ("fold", network("vgg16", "4 4 4"), None),
    ],
)
def test_network(figure: str, entry: dict[str, Any], goal: Goal | None) -> None:
    """Catches the goal of group size 4 in inference beside another configuration, operation or
    batch."""
    assert goals.goal(figure, entry) == goal


def in_8_bits(suite: str, setting: Any, batch: int, **more: Any) -> dict[str, Any]:
    entry = {"suite": suite, "setting": setting, "batch": batch, "operation": "inference"}
    return {**MAIN, "dtype": "int8", "narrow": False, **entry, **more}


@pytest.mark.parametrize(
    ("figure", "entry", "goal"),
    [
        ("dense", in_8_bits("int8 layer", 4, 16), Goal(2.0)),
        ("fold", in_8_bits("int8 layer", 4, 16), Goal(1.3)),
        ("float32", in_8_bits("int8 layer", 4, 16), Goal(1.5)),
        ("fold", in_8_bits("int8 layer", 4, 1), Goal(1.3)),
        ("float32", in_8_bits("int8 layer", 4, 1), None),
        ("fold", in_8_bits("int8 layer", 16, 16), None),
        ("fold", in_8_bits("int8 layer", 4, 16, narrow=True), None),
        ("library", in_8_bits("int8 convolution", "dense", 16), Goal(1.0, 0.85)),
        ("float32", in_8_bits("int8 convolution", "dense", 1), Goal(2.0)),
    ],
)
def test_in_8_bits(figure: str, entry: dict[str, Any], goal: Goal | None) -> None:
    """Catches float32's goals beside figures of 8 bits, and a goal beside another batch or size."""
    assert goals.goal(figure, entry) == goal


def test_networks_with_goals_are_measured() -> None:
    """Catches a goal that no table shows because its network has another name."""
    assert goals.NETWORK.keys() <= NETWORKS.keys()


@pytest.mark.parametrize(
    ("figure", "entry"),
    [("library", core(4)), ("η", layer(4, 16)), ("dense", network("vgg16", "4 4"))],
)
def test_no_goal_on_a_gpu(figure: str, entry: dict[str, Any]) -> None:
    """Catches a processor's goals beside a GPU's figures."""
    assert goals.goal(figure, entry) is not None
    assert goals.goal(figure, entry | {"device_type": "cuda"}) is None
