"""Packed weights say for which processor, type and channels they were made, and serve no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gross_kernels  # noqa: F401

ops = torch.ops.gross

#: C_in, width_in, width_out and C_out; every width is several vectors, and part of one.
CHANNELS = (5, 40, 60, 7)
GROUP_SIZES = (2, 4)
KERNEL = (3, 2)
#: Instruction sets that pack in different orders, from the least.
ORDERS = ("portable", "avx2", "avx512")


def weights(
    channels: tuple[int, int, int, int] = CHANNELS,
    group_sizes: tuple[int, ...] = GROUP_SIZES,
    kernel: tuple[int, int] = KERNEL,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The three series of a layer."""
    generator = torch.Generator().manual_seed(1)
    first, width_in, width_out, last = channels

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return (
        [draw(width_in, first, 1, 1) for _ in group_sizes],
        [draw(width_out, s, *kernel) for s in group_sizes],
        [draw(last, width_out, 1, 1) for _ in group_sizes],
    )


def pack(dtype: torch.dtype = torch.float32, active: int = 2, **layer: tuple[int, ...]) -> Tensor:
    """What ``bottleneck_pack`` makes of a layer for activations of a dtype."""
    series = weights(**layer)  # type: ignore[arg-type]
    return ops.bottleneck_pack(
        torch.empty(0, dtype=dtype), *series, None, torch.tensor(active), None
    )


def run(packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The layer of ``CHANNELS`` from packed weights."""
    generator = torch.Generator().manual_seed(2)
    input = torch.randn(2, CHANNELS[0], 6, 5, generator=generator).to(dtype)
    shape = (*CHANNELS[1:3], GROUP_SIZES[-1], CHANNELS[3], *KERNEL, 1, 1, 1, 1, 1, 1)
    return ops.bottleneck_packed(input, packed, shape, False)


def expected() -> Tensor:
    """The same from the terms."""
    generator = torch.Generator().manual_seed(2)
    input = torch.randn(2, CHANNELS[0], 6, 5, generator=generator)
    geometry = ((1, 1), (1, 1), (1, 1))
    return ops.bottleneck(input, *weights(), None, torch.tensor(2), None, *geometry, False, False)[
        0
    ]


#: Layers that take as many numbers as that of ``CHANNELS``, or nearly: C_in, widths and C_out are
#: all less than a vector more.
OTHERS = {
    "float16": ({"dtype": torch.float16}, "float16 activations"),
    "bfloat16": ({"dtype": torch.bfloat16}, "bfloat16 activations"),
    "fewer_terms": ({"active": 1}, "group size 2"),
    "outputs": ({"channels": (5, 40, 60, 8)}, "→ 8 channels"),
    "turned_kernel": ({"kernel": (2, 3)}, "kernel 2×3"),
    "inputs": ({"channels": (6, 40, 60, 7)}, "6 → 40"),
    "widths": ({"channels": (5, 20, 30, 7), "group_sizes": (2, 4)}, "5 → 20 → 30 → 7"),
}


@pytest.mark.parametrize(("made_for", "said"), OTHERS.values(), ids=OTHERS)
def test_weights_of_another_layer(made_for: dict, said: str) -> None:
    """Catches packed weights of another dtype or layer that are read as this one's because they are
    as many: the other values, rounding, or order of taps would pass for a result."""
    assert torch.equal(run(pack()), expected())
    packed = pack(**made_for)
    with pytest.raises(RuntimeError, match=r"packed: got weights for .*, accepted is .*") as raised:
        run(packed)
    got, accepted = str(raised.value).split("accepted is")
    assert said in got
    assert "5 → 40 → 60 → 7 channels, group size 4, kernel 3×2, float32 activations" in accepted


HEADERS = {
    # Byte of the header, and what the error says of it.
    "magic": (0, "packed: got numbers without the header of packed weights, accepted is"),
    "version": (8, "packed: got an order of version .*, accepted is .* in version 2"),
    "vectors": (12, r"packed: got weights for .*, vectors of \d+ bytes, accepted is"),
    "rest": (127, "packed: got weights for"),
}


@pytest.mark.parametrize(("byte", "message"), HEADERS.values(), ids=HEADERS)
def test_every_part_of_the_header_counts(byte: int, message: str) -> None:
    """Catches a part of the header that is written and never read: weights of a later version, or
    those of a processor with other vectors, would be taken."""
    packed = pack()
    packed.view(torch.uint8)[byte] += 1
    with pytest.raises(RuntimeError, match=message):
        run(packed)


@pytest.mark.parametrize("count", [0, 16, 31])
def test_less_than_a_header(count: int) -> None:
    """Catches a header that is read beyond the tensor's end."""
    with pytest.raises(RuntimeError, match="packed: got numbers without the header"):
        run(pack()[:count].clone())


@pytest.mark.parametrize("change", [-1, 1])
def test_another_number_of_weights(change: int) -> None:
    """Catches a whole header that is taken for whole weights."""
    packed = pack()
    changed = torch.cat([packed, torch.zeros(1)])[: packed.numel() + change]
    with pytest.raises(RuntimeError, match=rf"got {changed.numel()} numbers, accepted is"):
        run(changed)


def test_payload_is_aligned() -> None:
    """Catches a header after which vectors of weights cross cache lines."""
    packed = pack()
    assert packed.data_ptr() % 64 == 0
    # A header of two cache lines, and the bias, the last of the weights, of whole vectors.
    assert not packed[32:].view(torch.uint8).numel() % 16
    assert packed.view(torch.uint8)[80:128].count_nonzero() == 0


#: Packs for this process's instruction set, or tells of every file what comes of running it.
PROGRAM = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_packed_header import expected, pack, run
task, *paths = sys.argv[1:]
if task == "pack":
    torch.save(pack(), paths[0])
else:
    for path in paths:
        try:
            print(torch.equal(run(torch.load(path)), expected()))
        except RuntimeError as error:
            print(str(error).splitlines()[0])
"""


def in_process(isa: str, *arguments: str) -> list[str]:
    """The lines that ``PROGRAM`` prints with an instruction set: the choice is made once a
    process."""
    program = PROGRAM.format(folder=str(Path(__file__).parent))
    environment = os.environ | {"GROSS_KERNELS_ISA": isa}
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


CAPABILITY = torch.backends.cpu.get_cpu_capability()
PRESENT = ORDERS[: {"AVX2": 2, "AVX512": 3}.get(CAPABILITY, 1)]
VECTOR_BYTES = dict(zip(ORDERS, (16, 32, 64), strict=True))


@pytest.mark.skipif(len(PRESENT) == 1, reason="this processor has one instruction set")
def test_weights_of_another_processor(tmp_path: Path) -> None:
    """Catches weights packed for vectors of other lengths that are read in this processor's order:
    under AVX2 and run as portable, the result was wrong by 3.0 where outputs reach 2.5."""
    paths = [str(tmp_path / made) for made in PRESENT]
    for made, path in zip(PRESENT, paths, strict=True):
        in_process(made, "pack", path)
    for used in PRESENT:
        for made, line in zip(PRESENT, in_process(used, "run", *paths), strict=True):
            if used == made:
                assert line == "True"
            else:
                assert f"vectors of {VECTOR_BYTES[made]} bytes, accepted is" in line
                assert f"vectors of {VECTOR_BYTES[used]} bytes ({used})" in line
