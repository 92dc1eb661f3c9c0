"""Exported networks: the same outputs, to rounding, in float64."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gross
import pytest
import torch
import torch.nn.functional as F
from gross.deployment import files, save_program
from gross.deployment.exporting import tensors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models

from gross_kernels.program import Program

from .generated import Generated, supernet, with_statistics


def assert_same(network: nn.Module, expected: nn.Module, example: Tensor, limit: float) -> None:
    """Outputs that differ by at most `limit` of the largest."""
    with torch.inference_mode():
        pairs = [tensors_of(each(example.clone())) for each in (network, expected)]
    for found, wanted in zip(*pairs, strict=True):
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype
        error = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-9)
        assert float(error) <= limit, f"differs by {error:.2g}"


def programs(network: nn.Module) -> list[Program]:
    return [module for module in network.modules() if isinstance(module, Program)]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31))
def test_generated_networks(seed: int) -> None:
    """Catches a fold with a wrong scale, shift, order or padding; an activation or a sum that goes
    to the wrong step, or is lost; a value that is overwritten by a later step in place; programs
    that are put in the wrong order."""
    torch.manual_seed(seed)
    net = supernet(Generated(seed).double())
    example = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    exported = gross.export(net, example=example)
    assert programs(exported)
    assert_same(exported, net, example, 1e-11)
    assert_same(exported, net, torch.randn(1, 4, 8, 8, dtype=torch.float64), 1e-11)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**31))
def test_generated_networks_that_torch_fx_cannot_trace(seed: int) -> None:
    """Catches the same in the operators of ``torch.export``, and a batch size that is fixed."""
    torch.manual_seed(seed)
    net = supernet(Generated(seed, dynamic=True).double())
    with pytest.raises(Exception, match="symbolically traced"):
        torch.fx.symbolic_trace(net)
    example = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    exported = gross.export(net, example=example)
    assert programs(exported) or "the network" in exported.report.left
    assert_same(exported, net, example, 1e-11)
    assert_same(exported, net, torch.randn(3, 4, 8, 8, dtype=torch.float64), 1e-11)


class UNet(nn.Module):
    """Two levels, with transposed convolutions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom, self.up = self.pair(3, 16), self.pair(16, 32), self.pair(32, 16)
        self.larger = nn.ConvTranspose2d(32, 16, 2, 2)
        self.last = nn.Conv2d(16, 2, 1)

    @staticmethod
    def pair(before: int, after: int) -> nn.Module:
        parts = []
        for channels in (before, after):
            parts += [
                nn.Conv2d(channels, after, 3, padding=1),
                nn.BatchNorm2d(after),
                nn.ReLU(True),
            ]
        return nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        left = self.down(x)
        right = self.larger(self.bottom(F.max_pool2d(left, 2)))
        return self.last(self.up(torch.cat([left, right], 1)))


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16)]
        for _ in range(3):
            parts += [nn.Conv2d(16, 16, 3, padding=1), nn.PReLU(16)]
        self.body = nn.Sequential(*parts, nn.Conv2d(16, 3 * 16, 3, padding=1), nn.PixelShuffle(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + F.interpolate(x, scale_factor=4)


#: By name the network, the side of its images, and how many programs it becomes.
NETWORKS = {
    "resnet18": (models.resnet18, 64, 1),
    "resnet50": (models.resnet50, 64, 1),
    "vgg16": (models.vgg16_bn, 64, 2),
    "densenet": (lambda: models.densenet.DenseNet(8, (2, 2), 16), 64, None),
    "mobilenet_v2": (models.mobilenet_v2, 64, 1),
    "u_net": (UNet, 32, 2),
    "super_resolution": (SuperResolution, 12, 1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(name: str) -> None:
    """Catches networks that users have and the generated ones do not resemble; and steps that fall
    out of the programs."""
    make, side, count = NETWORKS[name]
    net = supernet(make().double())
    example = torch.randn(2, 3, side, side, dtype=torch.float64)
    exported = gross.export(net, example=example)
    assert_same(exported, net, example, 1e-10)
    found = programs(exported)
    assert len(found) == count if count else len(found) > 1
    norms = [module for module in exported.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not norms
    assert bool(exported.report.left) == (name not in ("resnet18", "resnet50", "mobilenet_v2"))
    printed = str(exported.report)
    for row in exported.report.steps:
        assert row.name in printed
    for left, reason in exported.report.left.items():
        assert left in printed
        assert reason.split()[0] in printed
        assert "out_of_place" not in left


def test_what_is_left_is_said_with_its_reason() -> None:
    """Catches a report that is silent about what runs in PyTorch, and what it says of a layer."""
    net = supernet(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.SiLU(),
            nn.Hardswish(),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1, padding=1),
        )
    )
    exported = gross.export(net, example=torch.randn(1, 3, 9, 9))
    assert exported.report.left == {
        "4": "no program knows it",
        "5": "no program knows it",
    }
    layer = next(row for row in exported.report.steps if row.name == "1")
    assert layer.followed_by == ("batch norm", "silu")
    assert layer.choice in ("fused", "parts", "merged")
    assert set(layer.milliseconds) == {"fused", "parts", "merged"}
    assert layer.output == (1, 8, 7, 7)


def small() -> nn.Module:
    """A residual block with a classifier."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, padding=1)
            self.conv = nn.Conv2d(16, 16, 3, padding=1)
            self.norm = nn.BatchNorm2d(16)
            self.last = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            x = F.relu(self.norm(self.conv(x)) + x)
            return self.last(F.adaptive_avg_pool2d(x, 1).flatten(1))

    torch.manual_seed(0)
    return supernet(Block())


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 12, 12)


@pytest.fixture
def exported(images: Tensor) -> nn.Module:
    return gross.export(small(), example=images)


def test_tuned_plans_compute_the_same(images: Tensor) -> None:
    """Catches a choice that is timed and another that is taken."""
    tuned = gross.export(small(), example=images, tune=True)
    assert_same(tuned, small(), images, 1e-5)
    (layer,) = [row for row in tuned.report.steps if len(row.milliseconds) > 1]
    assert layer.choice == min(layer.milliseconds, key=layer.milliseconds.__getitem__)


@pytest.mark.parametrize("choice", ["fused", "parts", "merged"])
@pytest.mark.parametrize("residual", [False, True])
def test_every_plan_is_exact(choice: str, residual: bool, monkeypatch) -> None:
    """Catches a product of the three kernels in the wrong order, and an end of the layer that goes
    to the first of its parts."""
    from gross.deployment import plan

    def forced(candidates: object, example: Tensor, int8: bool) -> dict[str, float]:
        return {name: float(name != choice) for name in ("fused", "parts", "merged")}

    monkeypatch.setattr(plan, "_measured", forced)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.act = nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16)
            self.conv = nn.Conv2d(16, 16, 3, 1, 2, dilation=2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.act(self.conv(x)) + x if residual else self.act(self.conv(x))

    net = supernet(Net().double())
    example = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    network = gross.export(net, example=example, tune=True)
    assert [row.choice for row in network.report.steps if row.name == "conv"] == [choice]
    assert_same(network, net, example, 1e-12)


# Bad input ----------------------------------------------------------------------------------------


def test_warnings(images: Tensor) -> None:
    """Catches silence about statistics that were never set, and about training mode; and noise
    where all is well, as for a batch norm whose weight begins at zero."""
    fresh = gross.decompose(models.resnet18(), (1, 4), method="random", quiet=True).eval()
    example = torch.randn(1, 3, 64, 64)
    for kernels in (True, False):
        with pytest.warns(UserWarning, match=r"20 batch norms whose statistics were never set"):
            gross.export(fresh, example=example, kernels=kernels)
    net = small()
    nn.init.zeros_(net.norm.weight)
    nn.init.zeros_(net.norm.bias)
    with pytest.warns(UserWarning, match="got a network in training mode") as said:
        gross.export(net.train(), example=images)
    assert len([w for w in said if "gross" in str(w.message) or "supernet" in str(w.message)]) == 1


EXAMPLES = {
    "shape": (torch.zeros(1, 4, 12, 12), ValueError, r"example: got \(1, 4, 12, 12\), accepted"),
    "dimensions": (torch.zeros(3), ValueError, r"example: got \(3,\), accepted"),
    "type": (torch.zeros(1, 3, 12, 12).double(), ValueError, "example: got"),
    "device": (torch.zeros(1, 3, 12, 12, device="meta"), ValueError, "got a tensor on meta"),
    "no_tensor": ([1], TypeError, "example: got list, accepted is"),
    "none": (None, TypeError, "example: got None, accepted is an input"),
}


@pytest.mark.parametrize(("example", "kind", "message"), EXAMPLES.values(), ids=EXAMPLES)
def test_examples_that_do_not_fit(example: object, kind: type, message: str) -> None:
    """Catches an error from deep inside the network."""
    with pytest.raises(kind, match=message):
        gross.export(small(), example=example)


def test_a_configuration_that_does_not_fit(images: Tensor) -> None:
    """Catches an export of another configuration."""
    with pytest.raises(ValueError, match="got 3 for decomposed layer 0"):
        gross.export(small(), (3,), example=images)
    with pytest.raises(ValueError, match="configuration: got 2 group sizes"):
        gross.export(small(), (1, 1), example=images)


def test_another_input_says_what_is_accepted(exported: nn.Module) -> None:
    """Catches memory that is read as what it is not."""
    for input in (torch.zeros(1, 3, 12, 12).double(), torch.zeros(1, 4, 12, 12), torch.zeros(3)):
        with torch.no_grad(), pytest.raises(RuntimeError, match="accepted"):
            exported(input)


# As a module --------------------------------------------------------------------------------------


def test_copies(exported: nn.Module, images: Tensor) -> None:
    """Catches copies without packed weights, with those of the original, or without the report."""
    for copied in (copy.deepcopy(exported), pickle.loads(pickle.dumps(exported))):
        assert_same(copied, exported, images, 0)
        assert copied.report == exported.report
        for program in programs(copied):
            program.load_state_dict({k: 0 * v for k, v in program.state_dict().items()})
        with torch.no_grad():
            assert not copied(images).any()
            assert exported(images).any()


def test_loading_packs_again(exported: nn.Module, images: Tensor) -> None:
    """Catches outputs of the weights before."""
    torch.manual_seed(1)
    net = small()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    other = gross.export(net, example=images)
    exported.load_state_dict(other.state_dict())
    assert_same(exported, other, images, 0)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-6), (torch.bfloat16, 0.05)])
def test_casting_packs_again(
    exported: nn.Module, images: Tensor, dtype: torch.dtype, limit: float
) -> None:
    """Catches programs that are still packed for the type before."""
    with torch.no_grad():
        wanted = small()(images)
        found = exported.to(dtype)(images.to(dtype))
    assert found.dtype == dtype
    assert float((found - wanted).abs().max() / wanted.abs().max()) < limit


def test_gradients(exported: nn.Module, images: Tensor) -> None:
    """Catches outputs without a history: attacks and saliency maps differentiate by the input."""
    gradients = []
    for network in (exported, small()):
        input = images.clone().requires_grad_()
        network(input).square().sum().backward()
        gradients.append(input.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert exported(images.requires_grad_()).grad_fn is None


def test_threads_of_the_caller(exported: nn.Module, images: Tensor) -> None:
    """Catches memory between steps that two callers share."""
    inputs = [torch.randn_like(images) for _ in range(8)]

    def call(input: Tensor) -> Tensor:
        with torch.inference_mode():
            return exported(input)

    expected = [call(input) for input in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            assert all(map(torch.equal, pool.map(call, inputs), expected))


def _answer(network: nn.Module, input: Tensor, queue: object) -> None:
    with torch.inference_mode():
        queue.put(network(input).tolist())  # type: ignore[attr-defined]


def test_forked_processes(exported: nn.Module, images: Tensor) -> None:
    """Catches a child that waits for threads which it does not have."""
    with torch.inference_mode():
        expected = exported(images)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_answer, args=(exported, images, queue)) for _ in range(2)]
    for child in children:
        child.start()
    found = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert found == [expected.tolist()] * 2


def test_compiled(exported: nn.Module, images: Tensor) -> None:
    """Catches a graph break, and a compiled network that answers with the weights before."""
    compiled = torch.compile(exported, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(images), exported(images))
        before = exported(images)
        exported.load_state_dict({k: 2 * v for k, v in exported.state_dict().items()})
        assert torch.equal(compiled(images), exported(images))
        assert not torch.equal(exported(images), before)


# Files --------------------------------------------------------------------------------------------

CAPABILITY = torch.backends.cpu.get_cpu_capability()
ISAS = ["portable", *["avx2"] * (CAPABILITY in ("AVX2", "AVX512"))]

ANSWER = """
import sys, gross, torch
torch.set_num_threads(1)
images = torch.load(sys.argv[2])
with torch.inference_mode():
    torch.save(gross.load_program(sys.argv[1])(images), sys.argv[3])
"""


@pytest.mark.parametrize("isa", ISAS)
def test_files_serve_other_processors(
    isa: str, exported: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    """Catches packed weights in the file: they are in the order of the processor that wrote it."""
    save_program(exported, images, tmp_path / "network.pt2")
    torch.save(images, tmp_path / "images.pt")
    paths = [tmp_path / name for name in ("network.pt2", "images.pt", "outputs.pt")]
    result = subprocess.run(
        [sys.executable, "-c", ANSWER, *map(str, paths)],
        env=os.environ | {"GROSS_KERNELS_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    with torch.inference_mode():
        torch.testing.assert_close(torch.load(paths[2]), exported(images), rtol=1e-5, atol=1e-6)


def test_a_file_takes_other_batches_and_packs_once(
    exported: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    """Catches a batch size that is fixed, and weights that are packed at every call."""
    save_program(exported, images[:1], tmp_path / "network.pt2")
    loaded = gross.load_program(tmp_path / "network.pt2")
    for batch in (1, 2, 7):
        assert_same(loaded, exported, torch.randn(batch, 3, 12, 12), 1e-6)
    targets = [node.target for node in loaded.graph.nodes]
    assert torch.ops.gross.program_run.default in targets
    assert torch.ops.gross.program_pack.default not in targets
    assert [path.name for path in tmp_path.iterdir()] == ["network.pt2"]


DAMAGES = ["truncated", "something else", "empty", "missing", "folder", "newer", "not ours"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_none(
    damage: str, exported: nn.Module, images: Tensor, tmp_path: Path, monkeypatch
) -> None:
    """Catches a traceback from a reader of archives, and steps of a later version that are read as
    this one's."""
    path = tmp_path / "network.pt2"
    if damage == "newer":
        monkeypatch.setattr(files, "FORMAT", files.FORMAT + 1)
        save_program(exported, images, path)
        monkeypatch.undo()
    if damage == "not ours":
        torch.export.save(torch.export.export(nn.ReLU(), (images,)), path)
    if damage == "truncated":
        save_program(exported, images, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "something else":
        torch.save({"a": 1}, path)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=r"path: .*accepted is a"):
        gross.load_program(path)


def test_onnx_runs_elsewhere(images: Tensor, tmp_path: Path) -> None:
    """Catches operators that another runtime does not know, and outputs that are others there."""
    import onnxruntime

    net = small()
    plain = gross.export(net, example=images, kernels=False)
    save_program(plain, images, tmp_path / "network.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
    with torch.inference_mode():
        wanted = net(images)
    (found,) = session.run(None, {"input": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)
    openvino = pytest.importorskip("openvino")
    # In a process of its own: its threads stay bound to cores.
    script = """
import sys, numpy, openvino
# Some processors would be given 16 bits.
settings = {"INFERENCE_PRECISION_HINT": "f32"}
model = openvino.Core().compile_model(sys.argv[1], "CPU", settings)
numpy.save(sys.argv[3], model([numpy.load(sys.argv[2])])[model.outputs[0]])
"""
    assert openvino
    import numpy

    numpy.save(tmp_path / "images.npy", images.numpy())
    paths = [str(tmp_path / name) for name in ("network.onnx", "images.npy", "outputs.npy")]
    result = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = torch.from_numpy(numpy.load(tmp_path / "outputs.npy"))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.build
def test_ahead_of_time_without_python(exported: nn.Module, images: Tensor, tmp_path: Path) -> None:
    """Catches programs that AOTInductor cannot call from its C++."""
    with torch.inference_mode():
        expected = exported(images)
    program = torch.export.export(exported, (images,))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "network.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(loaded(images), expected, rtol=1e-5, atol=1e-6)


def test_statistics_helper_changes_every_norm() -> None:
    """Catches networks whose folds would be of nothing: scale 1 and shift 0."""
    for module in with_statistics(models.resnet18()).modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean.any()
            assert (module.running_var != 1).any()
