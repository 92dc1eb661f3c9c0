"""What is measured on a GPU is the paper's, and the table says what was measured; run on the CPU
here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, shapes

ROOT = Path(__file__).parents[2]


def test_shapes_are_the_papers() -> None:
    """Catches a label, batch or stride that drifts from the networks' own, and a wide core that is
    left out."""
    cores = {core.label: core for core in shapes.cores()}
    for shape in gpu.SHAPES:
        core = cores[shape.label]
        assert (core.kernel_size, core.padding) == ((3, 3), (1, 1))
        assert core.batch(torch.device("cuda")) == shape.batch
        assert set(gpu.SIZES[:-1]) <= set(core.group_sizes)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two tiny shapes."""
    folder = tmp_path_factory.mktemp("gpu")
    gpu.write(
        folder, (gpu.Shape(2, 32, 5), gpu.Shape(1, 32, 6, 2)), "cpu", 2, time.monotonic() + 600
    )
    return folder


def test_everything_is_measured_and_checked(written: Path) -> None:
    """Catches an operation, size or baseline that is left out: each entry is compared with the
    definition first."""
    entries = json.loads((written / "gpu.json").read_text())["entries"]
    assert len(entries) == 2 * len([size for size in gpu.SIZES if size <= 32]) * len(gpu.OPERATIONS)
    assert all(
        set(e["ratios"]) == {"ours", "cuDNN", "expand + sum + cuDNN", "copy"} for e in entries
    )
    assert entries[-1]["macs"] == 1 * 32 * 3 * 3 * 32 * 9


def test_table(written: Path) -> None:
    """Catches a table that names other numbers than the entries hold."""
    entries = json.loads((written / "gpu.json").read_text())["entries"]
    text = (written / "gpu.md").read_text()
    entry = entries[0]
    ours, copy = entry["milliseconds"]["ours"], entry["ratios"]["copy"]
    assert f"| 32@5 | 1 | forward | {ours:.3f} | {copy:.2f} | – |" in text
    made = [
        e | {"ratios": {"ours": 1.0, "copy": 0.5, "cuDNN": 2.0, "expand + sum + cuDNN": 8.0}}
        for e in entries
    ]
    made[0]["ratios"] = {"ours": 1.0, "copy": 0.3, "cuDNN": 0.5, "expand + sum + cuDNN": 2.0}
    assert (
        "| forward | smaller | 1 | 2 | 0.40 / 0.30 | 0.80 | – | 1.00 / 0.50 | 4.00 / 2.00 |"
        in gpu.markdown(made, {})
    )
    made[0] |= {"size": 56, "ratios": made[0]["ratios"] | {"Triton": 1.5}}
    assert (
        "| forward | 56 and larger | 1 | 1 | 0.30 / 0.30 | 0.88 | 1.50 / 1.50 | 0.50"
        in gpu.markdown(made, {})
    )


def test_deadline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run that goes on when its time is up, or that says nothing of what is missing."""
    with pytest.raises(SystemExit, match="no time for a single entry"):
        gpu.write(tmp_path, (gpu.Shape(1, 32, 4),), "cpu", 1, time.monotonic() - 1)
    assert "everything from 32@4, group size 1 is left out" in capsys.readouterr().out


def test_check_gpu_without_a_gpu(tmp_path: Path) -> None:
    """Catches a check that builds for minutes before it finds that there is nothing to check, or
    that passes."""
    command = [ROOT / "scripts/check_gpu.sh", tmp_path / "output"]
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "check_gpu: no GPU is available to torch" in result.stderr
    assert not list((tmp_path / "output").iterdir())
