"""What is measured on a GPU is the paper's, and the table says what was measured; run on the CPU
here."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import shapes
from benchmarks.gpu import cases, kernels, plans, report, results

ROOT = Path(__file__).parents[2]


def test_shapes_are_the_papers() -> None:
    """Catches a label, batch or stride that drifts from the networks' own, and a wide core that is
    left out."""
    cores = {core.label: core for core in shapes.cores()}
    for shape in cases.SHAPES:
        core = cores[shape.label]
        assert (core.kernel_size, core.padding) == ((3, 3), (1, 1))
        assert core.batch(torch.device("cuda")) == shape.batch
        assert set(cases.SIZES[:-1]) <= set(core.group_sizes)


def into(folder: Path, **options: Any) -> results.Results:
    return results.Results(folder, report.markdown, **({"synchronise": int} | options))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over two tiny shapes."""
    folder = tmp_path_factory.mktemp("gpu")
    shapes = (cases.Shape(2, 32, 5), cases.Shape(1, 32, 6, 2))
    kernels.run(into(folder), shapes, "cpu", 2, time.monotonic() + 600, print)
    return folder


def parts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads((folder / "gpu.json").read_text())["parts"]
    return found


def test_everything_is_measured_and_checked(written: Path) -> None:
    """Catches an operation, size or baseline that is left out: each entry is compared with the
    definition first."""
    entries = parts(written)["kernels"]
    # Where it is no GPU, the smallest and the largest size.
    assert len(entries) == 2 * 2 * len(cases.OPERATIONS)
    assert all(
        set(e["ratios"]) == {"ours", "cuDNN", "expand + sum + cuDNN", "copy"} for e in entries
    )
    assert entries[-1]["macs"] == 1 * 32 * 3 * 3 * 32 * 9
    for e in entries:
        assert e["gflops"] == pytest.approx(2e-6 * e["macs"] / e["milliseconds"]["ours"])
    moved = 2 * 2 * 32 * (25 + 25)
    assert entries[0]["gbps"] == pytest.approx(1e-6 * moved / entries[0]["milliseconds"]["ours"])


def test_table(written: Path) -> None:
    """Catches a table that names other numbers than the entries hold."""
    entries = parts(written)["kernels"]
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
        "| forward | 8 and smaller | 1 | 2 | 0.40 / 0.30 | 0.70 | – | 1.00 / 0.50 | 4.00 / 2.00 |"
        in report.markdown({}, {"kernels": made})
    )
    made[0] |= {"size": 56, "ratios": made[0]["ratios"] | {"Triton": 1.5}}
    assert (
        "| forward | 56 and larger | 1 | 1 | 0.30 / 0.30 | 0.90 | 1.50 / 1.50 | 0.50"
        in report.markdown({}, {"kernels": made})
    )


def test_deadline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a run that goes on when its time is up, or that says nothing of what is missing."""
    shapes = (cases.Shape(1, 32, 4),)
    kernels.run(into(tmp_path), shapes, "cpu", 1, time.monotonic() - 1, print)
    assert "everything from 32@4, group size 1 is left out" in capsys.readouterr().out


def test_wrong_values_are_recorded_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a wrong kernel that ends the measurement, whose error is lost, or whose time is."""
    monkeypatch.setattr(kernels.reference, "forward", lambda input, *rest: torch.zeros_like(input))
    shapes = (cases.Shape(1, 32, 4),)
    kernels.run(into(tmp_path), shapes, "cpu", 1, time.monotonic() + 60, print)
    entries = parts(tmp_path)["kernels"]
    wrong = [e for e in entries if "error" in e]
    assert {e["operation"] for e in wrong} == {"forward"}
    assert all("ours: wrong values" in e["error"] for e in wrong)
    assert all(e["milliseconds"]["ours"] > 0 for e in entries)
    text = (tmp_path / "gpu.md").read_text()
    assert "## Failed" in text
    assert "(wrong)" in text


def test_a_lost_device_ends_the_process_and_not_the_run(tmp_path: Path) -> None:
    """Catches a fault after which everything fails, and a new process that begins anew."""

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    first = into(tmp_path)
    first.add("kernels", {"shape": "a"}, dict)
    first.synchronise = lost
    with pytest.raises(SystemExit) as raised:
        first.add("sweep", {"shape": "b"}, dict)
    assert raised.value.code == results.LOST
    kept = parts(tmp_path)["sweep"]
    assert kept[0]["error"].startswith("the device is lost: RuntimeError: an illegal")
    done: list[str] = []
    second = into(tmp_path)
    for name in "bc":
        second.add("sweep", {"shape": name}, lambda name=name: done.append(name) or {})
    assert done == ["c"]


def test_a_hanging_entry_ends_the_process(tmp_path: Path) -> None:
    """Catches a kernel that never returns and eats all minutes, or the results before it."""
    program = (
        "import sys, threading; from pathlib import Path; from benchmarks.gpu import results as r\n"
        "x = r.Results(Path(sys.argv[1]), lambda *_: '', int, longest=0.5)\n"
        "x.add('kernels', {'shape': 'a'}, dict)\n"
        "x.add('kernels', {'shape': 'b'}, threading.Event().wait)\n"
    )
    command = [sys.executable, "-c", program, tmp_path]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert finished.returncode == results.LOST, finished.stderr
    assert parts(tmp_path)["kernels"] == [
        {"shape": "a"},
        {"shape": "b", "error": "no answer within 0 s"},
    ]


NCU = """\
==PROF== Connected to process 1
profiled case 64@56 16 forward
==PROF== Profiling "march" - 0 (1/2): 0%....50%....100% - 9 passes
profiled case 512@7 4 weight gradient
==PROF== Profiling "first_pass" - 1 (1/2): 0%....50%....100% - 9 passes
==PROF== Disconnected from process 1
"ID","Process ID","Kernel Name","gpu__time_duration.sum"
"","","","us"
"0","1","march<16, 4>","24.5"
"1","1","first_pass<4>","31"
"""


def test_counters_are_read() -> None:
    """Catches counters of another case, and a table that is not one."""
    first, second = plans.read(NCU)
    assert (first["case"], first["kernel"], first["µs"]) == (
        "64@56 16 forward",
        "march<16, 4>",
        "24.5",
    )
    assert (second["case"], second["µs"], second["memory %"]) == (
        "512@7 4 weight gradient",
        "31",
        "–",
    )
    with pytest.raises(RuntimeError, match="got no table"):
        list(plans.read("==ERROR== The user does not have permission"))


def test_tests_on_a_card_survive_a_fault(tmp_path: Path) -> None:
    """Catches a fault that fails every later test, and a failure that is printed when all is over.

    In tests/gpu's own conftest, on a device that is lost after one test."""
    shutil.copy(ROOT / "tests/gpu/conftest.py", tmp_path)
    (tmp_path / "larger.py").write_text("DRY = True\n")
    (tmp_path / "host_device.py").write_text("def play(): pass\n")
    # What the conftest asks of torch, which takes each new process seconds to import.
    (tmp_path / "torch.py").write_text(
        "from types import SimpleNamespace as N\n"
        "cuda, backends = N(synchronize=int), N(cudnn=N(conv=N()))\n"
        "manual_seed = set_float32_matmul_precision = print\n"
    )
    (tmp_path / "test_some.py").write_text(
        "import time, torch\n"
        "def test_1_wrong(): assert 1 == 2\n"
        "def test_2_fault():\n"
        "    def lost(): raise RuntimeError('an illegal memory access')\n"
        "    torch.cuda.synchronize = lost\n"
        "    assert 3 == 4\n"
        "def test_3_right(): torch.cuda.synchronize = int\n"
        "def test_4_hangs(): time.sleep(100)\n"
        "def test_5_right(): pass\n"
    )
    options = ["-q", "-n", "1", "-p", "no:cacheprovider", "--tb=short", "--timeout=2"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--timeout-method=thread", "."],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    said = result.stdout + result.stderr
    assert "3 failed, 2 passed" in result.stdout, said
    assert "test_2_fault left a device that does not answer: an illegal memory access" in said
    assert "assert 3 == 4" in said
    # At once, and again at the end.
    assert result.stdout.index("assert 1 == 2") < result.stdout.index("= FAILURES =")


def test_check_gpu_without_a_gpu(tmp_path: Path) -> None:
    """Catches a check that builds for minutes before it finds that there is nothing to check, or
    that passes."""
    command = [ROOT / "scripts/check_gpu.sh", tmp_path / "output"]
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "check_gpu: no GPU is available to torch" in result.stderr
    assert not list((tmp_path / "output").iterdir())


def test_usage(tmp_path: Path) -> None:
    """Catches an option that is misspelt and taken for a folder."""
    for arguments in (["--pre", "x"], [], ["--triton-cache", "missing", "x"]):
        result = subprocess.run(
            [ROOT / "scripts/check_gpu.sh", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1
        assert "usage:" in result.stderr or "--triton-cache: got 'missing'" in result.stderr
    assert not list(tmp_path.iterdir())


def test_triton_cache_from_elsewhere(tmp_path: Path) -> None:
    """Catches a packed kernel that Triton takes for incomplete, because its group names files of
    the folder it was compiled in, or that were not packed; and a file that leaves the cache."""
    group = {"child_paths": {f"march.{end}": f"/there/march.{end}" for end in ("ptx", "cubin")}}
    (tmp_path / "key").mkdir()
    (tmp_path / "key/__grp__march.json").write_text(json.dumps(group))
    (tmp_path / "key/march.cubin").write_bytes(b"code")
    archive, cache = tmp_path / "kernels.tar.xz", tmp_path / "cache"
    for name, accepted in (("key", True), ("key/../..", False)):
        with tarfile.open(archive, "w:xz") as packed:
            for path in (tmp_path / "key").iterdir():
                packed.add(path, f"{name}/{path.name}")
        result = subprocess.run(
            [sys.executable, ROOT / "scripts/fill_triton_cache.py", "--unpack", archive],
            env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
            capture_output=True,
            text=True,
        )
        assert (result.returncode == 0) == accepted, result.stderr
    found = json.loads((cache / "key/__grp__march.json").read_text())
    assert found == {"child_paths": {"march.cubin": str(cache / "key/march.cubin")}}
    assert (cache / "key/march.cubin").read_bytes() == b"code"
    assert "accepted is folder/file" in result.stderr
