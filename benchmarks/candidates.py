"""One way to run a network, in a process of its own: ``python -m benchmarks.candidates NETWORK
BATCH CANDIDATE FOLDER``, where a candidate is such as "folded OpenVINO int8".

Runtimes' threads spin after a call, and some bind the calling thread to a core: in one process they
would ruin one another's times, thirty-fold in OpenVINO's and OpenMP's case. The process writes its
output for a fixed input to FOLDER, then reads lines from its input, a number of seconds each, and
answers with the median of the calls that fit into them, in milliseconds."""

from __future__ import annotations

import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gross
import numpy as np
import torch
from gross.deployment import save_program
from gross.supernet import decomposed_layers, dense_network, set_configuration
from torch import Tensor, nn
from torchvision import models

GROUP_SIZE = 4
GROUP_SIZES = (1, 4, 16, 32)
THREADS = 2
#: Images that 8 bits are calibrated on.
CALIBRATED = 8
OURS = "ours"
RUNTIMES = ("ONNX Runtime", "OpenVINO", "PyTorch")
#: By precision, the candidates: the dense and the folded network in each runtime and in ours. Ours
#: is the first; in 8 bits its float32 is beside it.
CANDIDATES = {
    "float32": (
        f"folded {OURS}",
        *(f"{kind} {runtime}" for kind in ("dense", "folded") for runtime in RUNTIMES),
    ),
    "int8": (
        f"folded {OURS} int8",
        f"dense {OURS} int8",
        f"folded {OURS}",
        *(f"{kind} {runtime} int8" for kind in ("dense", "folded") for runtime in RUNTIMES[:2]),
    ),
}


class SuperResolution(nn.Module):
    """Real-ESRGAN's compact video model: 16 × 64→64 3×3 with PReLUs, then a pixel shuffle, to which
    the enlarged input is added."""

    def __init__(self, features: int = 64, blocks: int = 16, scale: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (3, *[features] * blocks):
            layers += [nn.Conv2d(channels, features, 3, padding=1), nn.PReLU(features)]
        layers.append(nn.Conv2d(features, 3 * scale**2, 3, padding=1))
        self.body = nn.Sequential(*layers)
        self.shuffle = nn.PixelShuffle(scale)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        larger = nn.functional.interpolate(x, scale_factor=self.scale, mode="nearest")
        return self.shuffle(self.body(x)) + larger


#: By name: how it is made, and the shape of an input.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "resnet18": (models.resnet18, (3, 224, 224)),
    "resnet50": (models.resnet50, (3, 224, 224)),
    "vgg16": (models.vgg16, (3, 224, 224)),
    "vgg16-cifar": (lambda: gross.networks.build("vgg16-cifar"), (3, 32, 32)),
    "super-resolution": (SuperResolution, (3, 180, 320)),
    "4-layer": (lambda: gross.networks.build("4-layer"), (3, 32, 32)),
}


def supernet(name: str) -> nn.Module:
    """A network with random weights and statistics, every decomposed layer at group size 4."""
    torch.manual_seed(0)
    network = NETWORKS[name][0]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
    network = gross.decompose(network, GROUP_SIZES, method="random", quiet=True).eval()
    set_configuration(network, GROUP_SIZE)
    return network


def images(name: str, batch: int) -> Tensor:
    """The same random input in every process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *NETWORKS[name][1], generator=generator)


def parsed(candidate: str) -> tuple[str, str, bool]:
    """Its kind, "dense" or "folded"; its runtime; and whether it computes in 8 bits."""
    kind, runtime = candidate.removesuffix(" int8").split(" ", 1)
    return kind, runtime, candidate.endswith(" int8")


def call(name: str, batch: int, candidate: str, folder: Path) -> Callable[[], Any]:
    """What is timed."""
    given = images(name, batch)
    network = supernet(name)
    kind, runtime, int8 = parsed(candidate)
    settings: dict[str, Any] = {}
    if int8:
        settings = {"precision": "int8", "calibration": images(name, CALIBRATED)}
    if kind == "dense":
        network = dense_network(network, [GROUP_SIZE] * len(decomposed_layers(network)))
    if runtime == OURS:
        exported = gross.export(network, example=given, **settings)
        return lambda: exported(given)
    plain = network
    if kind == "folded":
        plain = gross.export(network, example=given, kernels=False)
    if runtime == "PyTorch":
        laid = given.contiguous(memory_format=torch.channels_last)
        return lambda: plain(laid)
    path = folder / f"{name}-{kind}{'-int8' if int8 else ''}.onnx"
    if not path.exists():
        save_program(copy.deepcopy(plain), given, path, **settings)
    pixels = given.numpy()
    if runtime == "ONNX Runtime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"input": pixels})[0]
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({model.inputs[0].any_name: list(pixels.shape)})
    settings = {
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # Of what is not in 8 bits.
    }
    compiled = core.compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    return lambda: request.infer([pixels])[compiled.outputs[0]]


def main() -> None:
    name, batch, candidate, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    timed = call(name, batch, candidate, folder)
    with torch.inference_mode():
        np.save(folder / f"{name}-{batch}-{candidate}.npy", np.asarray(timed()))
        print("ready", flush=True)
        for line in sys.stdin:
            timed()
            times, end = [], time.perf_counter() + float(line)
            while not times or time.perf_counter() < end:
                began = time.perf_counter()
                timed()
                times.append(time.perf_counter() - began)
            print(1e3 * statistics.median(times), flush=True)


if __name__ == "__main__":
    main()
