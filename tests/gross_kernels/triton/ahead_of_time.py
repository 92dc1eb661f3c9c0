"""Compiles a kernel of a plan for a GPU that is not here, and reads what came of it."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: Bytes of shared memory that one program may have.
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
}


@dataclass
class Compiled:
    """What the compiler made: resources, and counts of the instructions that matter.

    ``wide_terms`` are loads of several terms' numbers at once, ``orders`` the order of dimensions,
    fastest first, in which tensors of three are loaded one number at a time. ``stack`` is in bytes
    of a thread, ``spilled_in_loops`` in reads and writes of it where numbers are computed again and
    again (:func:`spills_in_loops`)."""

    name: str
    registers: int
    stack: int
    spilled_in_loops: int
    shared: int
    matrix: int
    wide_loads: int
    wide_stores: int
    wide_terms: int
    orders: set[tuple[int, ...]]
    assembly: str


def compile_for(architecture: str, kernel: Any, tensors: tuple) -> Compiled:
    """Compile a ``launch.Kernel`` as its first launch on ``tensors`` would, for another GPU."""
    parameters = kernel.function.params
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def describe(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        if isinstance(value, (tuple, list)):
            return tuple(describe(each, (*path, i)) for i, each in enumerate(value))
        if value is None or value == 1:
            constants[path] = value
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, (parameter, value) in enumerate(
        zip(parameters, (*tensors, *kernel.arguments), strict=True)
    ):
        if parameter.is_constexpr:
            constants[(i,)] = value
            signature[parameter.name] = "constexpr"
        elif parameter.do_not_specialize:
            signature[parameter.name] = "i32"
        else:
            signature[parameter.name] = describe(value, (i,))
    source = ASTSource(kernel.function, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[architecture], options=kernel.options)
    if architecture.startswith("gfx"):
        text = compiled.asm["amdgcn"]

        def number(name: str) -> int:
            return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

        stack = number("private_segment_fixed_size")
        return Compiled(
            kernel.function.__name__,
            number("vgpr_count"),
            stack,
            stack,  # Where it is used is not read: none is wanted.
            compiled.metadata.shared,
            text.count("v_mfma"),
            len(re.findall(r"(?:global|buffer)_load_dwordx4", text)),
            len(re.findall(r"(?:global|buffer)_store_dwordx4", text)),
            0,  # Not told apart from other loads.
            load_orders(compiled.asm["ttgir"]),
            text,
        )
    text = compiled.asm["ptx"]
    usage = cuobjdump("-res-usage", compiled.asm["cubin"])
    return Compiled(
        kernel.function.__name__,
        int(re.search(r"REG:(\d+)", usage)[1]),
        int(re.search(r"STACK:(\d+)", usage)[1]),
        spills_in_loops(cuobjdump("-sass", compiled.asm["cubin"])),
        compiled.metadata.shared,
        len(re.findall(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma", text)),
        len(
            re.findall(
                r"cp\.async\.cg\.shared\.global"
                r"|ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64",
                text,
            )
        ),
        len(re.findall(r"st\.global[.\w:]*\.v4\.b32|st\.global[.\w:]*\.v2\.b64", text)),
        # Everything else is copied asynchronously.
        len(re.findall(r"ld\.global[.\w:]*\.v[24]\.", text)),
        load_orders(compiled.asm["ttgir"]),
        text,
    )


def load_orders(ttgir: str) -> set[tuple[int, ...]]:
    """Of every load of a tensor of three dimensions, a number for each thread."""
    layouts = dict(re.findall(r"^(#blocked\d*) = (#ttg\.blocked<.*>)", ttgir, re.MULTILINE))
    loaded = re.findall(r"= tt\.load .*: tensor<\d+x\d+x\d+x!tt\.ptr<\w+>, (#blocked\d*)>", ttgir)
    return {
        tuple(map(int, re.search(r"order = \[([\d, ]+)\]", layouts[name])[1].split(",")))
        for name in loaded
        if "sizePerThread = [1, 1, 1]" in layouts[name]
    }


def spills_in_loops(sass: str) -> int:
    """Reads and writes of the stack within the innermost loop around every product and sum of
    floating-point numbers. Elsewhere they are made once for a tile of many rows, not once a row."""
    code = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", sass)
    ]
    loops = [
        range(target, address + 1)
        for address, text in code
        if (jump := re.search(r"\bBRA\b.*0x([0-9a-f]+)", text))
        and (target := int(jump[1], 16)) < address
    ]
    inner = {
        min(around, key=len)
        for address, text in code
        if re.search(r"MMA|\bF(FMA|ADD|MUL)", text)
        and (around := [loop for loop in loops if address in loop])
    }
    return sum(
        bool(re.search(r"\b(LDL|STL)\b", text)) and any(address in loop for loop in inner)
        for address, text in code
    )


def cuobjdump(what: str, cubin: bytes) -> str:
    """What Triton's own ``cuobjdump`` says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    try:
        return subprocess.run(
            [tool, what, file.name], capture_output=True, text=True, check=True
        ).stdout
    finally:
        os.unlink(file.name)
