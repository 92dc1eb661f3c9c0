"""The zoo's own checks: each of them fails where it should."""

from dataclasses import replace

import gross
import pytest
import torch
from checks import CHECKS, DenseTooError, NothingToDecomposeError, Subject, check_fx
from networks import Network
from run import check, check_apart, page
from torch import Tensor, nn

from gross_kernels import GroSSConv2d


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.Conv2d(32, 32, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


SMALL = Network("torch", "small", small, lambda: torch.randn(2, 3, 9, 9))


def test_a_network_without_a_fault_passes():
    """Catches a check that fails without reason, and figures of the wrong row."""
    result = check(SMALL)
    assert result.failed == result.dense_too == {}
    assert (result.convolutions, result.pointwise, result.grouped, result.decomposed) == (
        2,
        0,
        0,
        1,
    )
    dense = 3 * 32 * 9 * 49 * 2 + 32 * 49 * 2 + 32 * 32 * 9 * 25 * 2 + 32 * 25 * 2 + 2 * 32 * 5
    assert result.macs == dense
    bottleneck = 32 * 32 * 49 + 32 * 4 * 9 * 25 + 32 * 32 * 25
    assert dense - result.macs_at_size == 2 * (32 * 32 * 9 * 25 - bottleneck)


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_finds_a_fault(name, monkeypatch):
    """Catches a check that cannot fail: every layer's output is off by a tenth after the first
    call, or what it folds into; or one multiplication is not counted."""
    subject = Subject.of(SMALL)
    assert len(subject.output) == 1
    forward, fold, macs = GroSSConv2d.forward, GroSSConv2d.fold, gross.macs

    def wrong(self: GroSSConv2d, input: Tensor, gates: Tensor | None = None) -> Tensor:
        return 1.1 * forward(self, input, gates)

    def one_less(*args, **kwargs):
        report = macs(*args, **kwargs)
        return replace(report, fixed=report.fixed - 1)

    def wrong_fold(self: GroSSConv2d, group_size: int | None = None) -> nn.Sequential:
        made = fold(self, group_size)
        made[2].weight.data *= 1.1
        return made

    monkeypatch.setattr(GroSSConv2d, "fold", wrong_fold if name == "deployment" else fold)
    if name == "MACs":
        monkeypatch.setattr(gross, "macs", one_less)
    else:
        monkeypatch.setattr(GroSSConv2d, "forward", wrong)
    with pytest.raises(AssertionError):
        CHECKS[name](subject)


def test_what_the_dense_network_cannot_do_is_no_failure():
    """Catches an excuse that a supernet gets for what its network can do."""

    class Untraceable(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            output = super().forward(input)
            return output if output.sum() > 0 else -output

    untraceable = replace(SMALL, make=lambda: Untraceable(*small()))
    with pytest.raises(DenseTooError, match="TraceError"):
        check_fx(Subject.of(untraceable))
    subject = Subject.of(SMALL)
    subject.dense, subject.supernet = small(), Untraceable(*small())
    with pytest.raises(torch.fx.proxy.TraceError):
        check_fx(subject)


def test_a_network_without_anything_to_decompose():
    """Catches one that counts as a failure."""
    pointwise = replace(SMALL, make=lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)))
    with pytest.raises(NothingToDecomposeError):
        Subject.of(pointwise)
    result = check(pointwise)
    assert (result.failed, result.pointwise, result.decomposed) == ({}, 2, 0)


def test_a_process_that_hangs_or_ends_is_a_failure():
    """Catches a crash or a hang that passes for success, or ends the whole run."""
    assert check_apart(SMALL, 0.1).failed == {"process": "not done after 0 s"}
    # Not in the list of networks: the process ends without a result.
    assert "ended with status 1" in check_apart(SMALL, 300).failed["process"]


def test_the_page_shows_failures():
    """Catches a table that hides what failed."""
    result = check(SMALL)
    result.failed = {"pickle": "AssertionError: a | b"}
    text = page([replace(result, package="torch")], "scripts/check_zoo.sh")
    assert "| small | 2 | 0 | 0 | 1 |" in text
    assert "| pickle: AssertionError: a \\| b |" in text
    assert "1 failed a check" in text
