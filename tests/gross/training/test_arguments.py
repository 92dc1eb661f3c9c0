"""Arguments of no meaning: every function that users call refuses them by name, before any work."""

import inspect

import gross
import pytest
import torch
from gross import training

NEEDED = {
    training.train: lambda data, network, supernet: {"model": network, "data": data},
    training.finetune: lambda data, network, supernet: {"supernet": supernet, "data": data},
    training.Sampler: lambda data, network, supernet: {"supernet": supernet},
    training.recalibrate: lambda data, network, supernet: {
        "model": network,
        "inputs": torch.ones(2, 3, 8, 8),
    },
    training.accuracy: lambda data, network, supernet: {"split": data.test},
    training.distillation: lambda data, network, supernet: {"teacher": network},
    gross.data.load: lambda data, network, supernet: {},
}
CASES = [
    pytest.param(function, argument, id=f"{function.__name__}-{argument}")
    for function in NEEDED
    for argument in inspect.signature(function).parameters
]


@pytest.mark.parametrize(("function", "argument"), CASES)
def test_an_argument_of_no_meaning_is_refused_by_name(
    squares, make_network, make_supernet, function, argument
):
    """Catches an argument that is used unchecked: the error would come from deep inside, after
    work, and not name it."""
    arguments = NEEDED[function](squares, make_network(), make_supernet())
    with pytest.raises((TypeError, ValueError), match=rf"^{argument}\b.*: .*accepted"):
        function(**{**arguments, argument: object()})
