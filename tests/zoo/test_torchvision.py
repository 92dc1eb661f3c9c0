"""torchvision's share of the zoo that ``scripts/check_zoo.sh`` checks."""

import pytest
from networks import TORCHVISION
from run import check

#: Decomposed layers of each network, and what torch cannot do with the network itself.
EXPECTED = {
    "resnet18": (16, set()),
    "densenet121": (58, set()),
    "googlenet": (19, set()),
    "fcn_resnet50": (17, set()),
    "deeplabv3_resnet50": (17, set()),
    "raft_small": (18, {"bfloat16", "fx"}),
    "fasterrcnn_resnet50_fpn": (21, {"bfloat16", "fx", "export"}),
}


@pytest.mark.build
@pytest.mark.parametrize("name", EXPECTED)
def test_a_supernet_does_what_the_network_does(name):
    """Catches what small networks do not show: a layer that is lost in a branch, two inputs, lists
    of images, outputs by name; and whatever of ``checks.CHECKS`` breaks on a whole network. What is
    excused because the network cannot do it either is named above, so that nothing else is."""
    network = next(each for each in TORCHVISION if each.name == name)
    result = check(network)
    assert result.failed == {}
    assert (result.decomposed, set(result.dense_too)) == EXPECTED[name]
    assert result.macs_at_size is not None
    assert result.macs_at_size < result.macs
