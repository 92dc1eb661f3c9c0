"""The shapes that are measured are the paper's."""

import torch

from benchmarks import shapes


def test_every_distinct_layer_of_the_papers_networks() -> None:
    """Catches a network that is left out, and layers that repeat: 3 of the 4-layer network, 8 of
    VGG-16 at each resolution, 7 of ResNet-18, and of the narrow VGG-16 12 less two repetitions."""
    labels = [layer.label for layer in shapes.layers()]
    assert len(labels) == len(set(labels)) == 3 + 8 + 8 + 7 + 10
    assert {"32-64@8", "512@2", "256-512@14/2", "64@224", "64@224:11-18"} <= set(labels)


def test_cores_have_the_bottlenecks_width() -> None:
    """Catches a grouped convolution of the layer's output width: 64 to 128 channels at 112×112 is
    64 to 64 inside."""
    cores = {core.label: core for core in shapes.cores()}
    assert len(cores) == len(shapes.cores())
    assert {"64@112", "116-100@28", "256@14/2"} <= set(cores)
    assert not any(label.startswith("64-128") for label in cores)


def test_strided_layers_have_the_input_before_the_stride() -> None:
    """Catches the output's size in place of the input's."""
    layer = next(layer for layer in shapes.layers() if layer.label == "64-128@56/2")
    assert (layer.input_size, layer.output_size) == ((56, 56), (28, 28))


def test_narrow() -> None:
    """Catches the paper's own widths among the narrow ones, of which the goals do not speak."""
    assert {layer.label for layer in shapes.layers() if layer.narrow} == {
        layer.label for layer in shapes.layers() if ":" in layer.label
    }
    assert sum(layer.narrow for layer in shapes.layers()) == 10


def test_batch() -> None:
    """Catches calls too short to time, or a batch of 0 where one image exceeds the limit."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for core in shapes.cores():
        elements = core.batch(cpu) * core.out_channels * core.output_size[0] * core.output_size[1]
        assert shapes.CPU_ELEMENTS / 2 < elements <= shapes.CPU_ELEMENTS
        assert core.batch(gpu) == {32: 256, 224: 128}[core.image_size]
