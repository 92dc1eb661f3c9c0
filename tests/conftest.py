"""Every test starts from the same seed, and hypothesis from the same examples: a failure
repeats."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# On tensors as small as the tests', threads wait for one another more than they compute: with two
# of them on a busy machine of two cores, test_operator.py takes 246 s instead of 20 s. Tests of
# threads set their own number.
torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What compiles, or checks whole networks, begins: else one process ends with the longest while
    the other has nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("build") is None)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every tensor that is allocated without a value with NaN."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
