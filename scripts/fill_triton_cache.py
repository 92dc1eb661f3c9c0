#!/usr/bin/env python3
"""Compiles the Triton kernels that tests/gpu and benchmarks.gpu need, for a GPU that is not there.

    scripts/fill_triton_cache.py FILE [--processes N]     compile, and write FILE (a .tar.xz)
    scripts/fill_triton_cache.py --unpack FILE            put them into Triton's cache
    scripts/fill_triton_cache.py --filled                 status 0 if a first kernel is found there

A card is lent by the minute and 140 kernels take four of them. This goes the JIT's own way, so that
its keys are the same, with a driver that claims compute capability 9.0 and launches nothing. What
it writes holds for the same Triton, the same Python and the same text of the kernels: fill it after
the last edit of a kernel, with the versions of the machine that has the card. Nothing is wrong
where it does not fit; Triton then compiles.

The cache is Triton's own (TRITON_CACHE_DIR, by default ~/.triton/cache); names of files in it are
absolute, and rewritten when they are unpacked."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT / folder)
    for folder in (".", "tests/definition", "tests/gross_kernels/triton", "tests/gpu")
]
#: What a launch needs of a compiled kernel; the rest is what it was compiled from.
NEEDED = (".cubin", ".json")


class Driver:
    """A driver for a card that is not there: what it is asked for, and launches that do nothing."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 2, 255, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 232448},
        unload_module=lambda *_: None,
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def work() -> Iterator[tuple[str, Callable[[], None]]]:
    """Calls of the backend that between them need every kernel, by name."""
    import test_triton
    import torch
    from case import Case
    from larger import LARGER, TYPICAL
    from packing import CASES

    from benchmarks.gpu.cases import OPERATIONS, SHAPES, SIZES, sizes
    from gross_kernels.backends import triton
    from gross_kernels.geometry import Geometry
    from gross_kernels.series import Series

    def run(case: Case, dtype: Any, terms_dtype: Any, float32: tuple[str, str]) -> None:
        torch.backends.cudnn.conv.fp32_precision = float32[0]
        torch.set_float32_matmul_precision(float32[1])
        target = test_triton.Target("triton", "cpu", dtype, terms_dtype)
        target.run(case, *target.arguments(case))

    plain = ("ieee", "high")
    mixed = (torch.bfloat16, torch.float32)
    for name, case in {**CASES, **LARGER}.items():
        yield name, partial(run, case, *mixed, plain)
    for dtypes in test_triton.OTHERS:
        for name, case in LARGER.items():
            yield f"{name}, {dtypes}", partial(run, case, *dtypes, plain)
    for float32 in (("tf32", "highest"), ("ieee", "highest")):
        yield f"float32 as {float32}", partial(run, TYPICAL, torch.float32, torch.float32, float32)

    def measured(shape: Any, size: int, operation: str) -> None:
        geometry = Geometry((shape.stride,) * 2, (1, 1))
        places = ((shape.size,) * 2, geometry.output_size((shape.size,) * 2, (3, 3)))
        # Never touched, so that no memory is taken.
        input, grad = (
            torch.empty(
                (shape.batch, shape.channels, *place),
                dtype=torch.bfloat16,
                memory_format=torch.channels_last,
            )
            for place in places
        )
        terms = [torch.empty(shape.channels, s, 3, 3, dtype=torch.bfloat16) for s in sizes(shape)]
        function = getattr(triton, OPERATIONS[operation])
        given = (input, Series(terms, SIZES.index(size) + 1), geometry)
        function(*given) if operation == "forward" else function(grad, *given)

    for shape in SHAPES:
        for size in sizes(shape):
            for operation in OPERATIONS:
                yield (
                    f"{shape.label}, {size}, {operation}",
                    partial(measured, shape, size, operation),
                )


def compile_share(folder: str, share: int, of: int) -> int:
    """Every ``of``-th call, into the cache at ``folder``; how many there were."""
    os.environ["TRITON_CACHE_DIR"] = folder
    from triton.runtime import driver

    driver.set_active(Driver())
    done = 0
    begin = time.monotonic()
    for i, (name, call) in enumerate(work()):
        if i % of == share:
            call()
            done += 1
            print(f"[{time.monotonic() - begin:4.0f} s] {name}", flush=True)
    return done


def fill(archive: Path, processes: int) -> None:
    """Compile, and pack what a launch needs."""
    with tempfile.TemporaryDirectory() as folder:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            shares = range(processes)
            each = list(pool.map(partial(compile_share, folder, of=processes), shares))
        partial_file = archive.with_name(archive.name + ".partial")
        with tarfile.open(partial_file, "w:xz") as packed:
            for path in sorted(Path(folder).rglob("*")):
                if path.suffix in NEEDED:
                    packed.add(path, str(path.relative_to(folder)))
        os.replace(partial_file, archive)
        kernels = len(list(Path(folder).rglob("*.cubin")))
    print(f"{archive}: {kernels} kernels of {sum(each)} calls, {archive.stat().st_size} bytes")


def cache() -> Path:
    """Where Triton keeps its kernels."""
    import triton

    return Path(triton.knobs.cache.dir)


def unpack(archive: Path) -> None:
    """Put an archive into Triton's cache."""
    folder = cache()
    count = 0
    with tarfile.open(archive, "r:xz") as packed:
        for member in packed.getmembers():
            file = packed.extractfile(member)
            if file is None:
                continue
            content, path = file.read(), folder / member.name
            if path.resolve().parent.parent != folder.resolve():
                raise ValueError(f"{archive}: got {member.name!r}, accepted is folder/file")
            if path.name.startswith("__grp__"):
                group = json.loads(content)
                # A group that names a file which is not there counts for nothing.
                group["child_paths"] = {
                    name: str(path.parent / name)
                    for name in group["child_paths"]
                    if name.endswith(NEEDED)
                }
                content = json.dumps(group).encode()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            count += path.suffix == ".cubin"
    print(f"{folder}: {count} kernels")


def filled() -> bool:
    """Whether the first kernel of the tests is in the cache of the card at hand: none is added.

    Its time would not say it: Triton builds its launchers with the C compiler, cache or not."""
    import torch
    from larger import LARGER

    from gross_kernels.backends import triton
    from gross_kernels.series import Series

    case = LARGER["64@56"]
    input, terms, _, _ = case.tensors(torch.bfloat16, torch.float32, "cuda")
    before = len(list(cache().rglob("*.cubin")))
    begin = time.monotonic()
    triton.forward(input, Series(terms, case.active), case.geometry)
    torch.cuda.synchronize()
    added = len(list(cache().rglob("*.cubin"))) - before
    print(f"first Triton kernel after {time.monotonic() - begin:.2f} s, {added} compiled")
    return added == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE")
    parser.add_argument("--unpack", action="store_true", help="put FILE into Triton's cache")
    parser.add_argument("--filled", action="store_true", help="say whether the cache serves")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.filled:
        sys.exit(not filled())
    if options.file is None:
        parser.error("FILE: got none")
    if options.unpack:
        unpack(options.file)
    else:
        fill(options.file, options.processes)


if __name__ == "__main__":
    main()
