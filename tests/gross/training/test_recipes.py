"""Recipes: the papers' schedules, and what a wrong key or value says."""

import subprocess
import sys

import pytest
from gross.training import Recipe
from gross.training.recipes import NAMES, parse

#: As printed: epochs, batch, learning rate, the epochs after which it is divided by ten, and
#: whether the decomposition trains alone. ECCV 2020, sections 4.4, A.2 and A.3; ICLR draft, 4.
PRINTED = {
    "4-layer": (100, 256, 0.1, (50, 75), False),
    "4-layer-gross": (150, 256, 1e-4, (80, 120), True),
    "4-layer-individual": (100, 256, 1e-3, (80,), True),
    "vgg16-cifar": (200, 256, 0.05, (100, 150), False),
    "vgg16-cifar-gross": (200, 256, 1e-4, (100, 150), True),
    "vgg16-cifar-individual": (100, 256, 1e-3, (80,), True),
    "vgg16-gross": (4, 128, 1e-5, (2,), True),
    "vgg16-individual": (6, 128, 1e-4, (2, 4), False),
    "vgg16-narrow-gross": (14, 128, 5e-4, (8, 12), True),
    "resnet18-gross": (8, 512, 5e-5, (2, 4, 6), True),
    "resnet18-individual": (12, 512, 1e-3, (8, 10), False),
    "iclr-response": (30, 256, 1e-4, (20,), True),
    "iclr-gross": (150, 256, 1e-4, (80, 120), True),
    "iclr-individual-response": (30, 256, 0.01, (20,), True),
    "iclr-individual": (100, 256, 1e-3, (80,), True),
}


@pytest.mark.parametrize("name", PRINTED)
def test_recipes_are_as_printed(name):
    """Catches a number that was copied wrongly."""
    recipe = Recipe.load(name)
    epochs, batch, lr, after, decomposition = PRINTED[name]
    assert (recipe.epochs, recipe.batch_size) == (epochs, batch)
    assert recipe.optimizer.name == "sgd"
    assert (recipe.optimizer.lr, recipe.optimizer.momentum) == (lr, 0.9)
    assert (recipe.optimizer.weight_decay, recipe.schedule.shape) == (0.0, "steps")
    assert (recipe.schedule.after, recipe.schedule.factor) == (after, 0.1)
    assert (recipe.trains == "decomposition") == decomposition
    assert (recipe.batch_norm == "frozen") == decomposition
    assert (recipe.objective == "response") == name.endswith("response")
    warm = name in ("iclr-response", "iclr-gross")
    assert recipe.sampling.policy == ("temperature" if warm else "uniform")
    assert (recipe.sampling.alpha, recipe.sampling.form) == (4.0, "relative")


def test_every_recipe_of_the_package_loads_and_says_what_it_is():
    """Catches a file that is not tested above, or that does not load."""
    assert set(NAMES) == {*PRINTED, "train", "finetune"}
    assert all(Recipe.load(name).description.endswith(".") for name in NAMES)


def test_the_rate_falls_after_the_epochs_named():
    """Catches a fall one epoch early or late, and a wave that does not end at zero."""
    schedule = Recipe.load("4-layer-gross").schedule
    scales = [schedule.scale(progress, 150) for progress in (0, 79.99, 80, 119.99, 120, 149)]
    assert scales == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    wave = Recipe.load("train").schedule
    assert [wave.scale(p, 10) for p in (0, 5, 10)] == pytest.approx([1, 0.5, 0])


def test_a_users_file_needs_only_what_differs(tmp_path):
    """Catches keys that must all be given, and a table that loses its other keys."""
    file = tmp_path / "mine.toml"
    file.write_text('epochs = 3\n[optimizer]\nlr = 1\n[sampling]\npolicy = "fair"\n')
    recipe = Recipe.load(file)
    assert (recipe.epochs, recipe.optimizer.lr, recipe.optimizer.momentum) == (3, 1.0, 0.9)
    other = recipe.override({"optimizer.momentum": 0.5, "schedule.after": [1, 2]})
    assert (other.optimizer.lr, other.optimizer.momentum) == (1.0, 0.5)
    assert other.schedule.after == (1, 2)
    assert other.sampling.policy == "fair"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr=0.02", ("optimizer.lr", 0.02)),
        ("epochs = 3", ("epochs", 3)),
        ("schedule.after=[1, 2]", ("schedule.after", [1, 2])),
        ("sampling.policy=fair", ("sampling.policy", "fair")),
        ("compile=true", ("compile", True)),
    ],
)
def test_overrides_of_the_command_line_are_toml_or_plain_words(text, expected):
    """Catches a number that stays a string."""
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch = 3", "epoch: unknown, accepted are .*did you mean 'epochs'"),
        ("[optimizer]\nlearning = 1", "optimizer.learning: unknown"),
        ("optimizer = 3", "optimizer: got 3, accepted is a table"),
        ("epochs = 2.5", "epochs: got 2.5, accepted is an int"),
        ("epochs = true", "epochs: got True, accepted is an int"),
        ("epochs = 0", "epochs: got 0, accepted are finite numbers of at least 1"),
        ("[optimizer]\nlr = nan", "optimizer.lr: got nan"),
        ("[optimizer]\nlr = -1", "optimizer.lr: got -1.0"),
        ('[optimizer]\nname = "adam"', "optimizer.name: got 'adam', accepted is 'sgd' and 'adamw'"),
        ("[schedule]\nafter = [3, 2]", "schedule.after: got .*ascending"),
        ("[schedule]\nafter = [1.5]", "schedule.after: got .*array of ints"),
        ("[sampling]\nalpha = inf", "sampling.alpha: got inf, accepted is a finite number"),
        ("epochs = ", "is not TOML"),
    ],
)
def test_errors_name_file_and_key(tmp_path, content, message):
    """Catches a recipe that is taken with a wrong key left out, and a reason without the key."""
    file = tmp_path / "mine.toml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        Recipe.load(file)
    assert "mine.toml" in str(raised.value)


def test_unknown_recipes_and_keys_are_refused():
    """Catches a name that falls back to a default."""
    with pytest.raises(FileNotFoundError, match=r"recipe: got '4-layers', accepted are .*4-layer"):
        Recipe.load("4-layers")
    with pytest.raises(ValueError, match=r"optimizer.l: unknown.*did you mean 'optimizer.lr'"):
        Recipe().override({"optimizer.l": 1})
    with pytest.raises(ValueError, match=r"lr.x: unknown"):
        Recipe().override({"lr.x": 1})
    with pytest.raises(ValueError, match="got 'lr', accepted is KEY=VALUE"):
        parse("lr")


def test_an_installed_package_has_the_recipes():
    """Catches package data that setuptools is not told of: the names would be none."""
    program = "from setuptools import Distribution; d = Distribution(); d.parse_config_files(); "
    program += "print(d.package_data)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "recipes/*.toml" in found.stdout, found.stderr
