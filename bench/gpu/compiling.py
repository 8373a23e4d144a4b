"""Compiles kernels for GPUs that need not be there, and reads what became of them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .launches import Launch

CACHE = Path(__file__).resolve().parents[2] / "build" / "triton"

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Target:
    """A kind of GPU.

    Attributes:
        backend, architecture, warp_size: what Triton calls it.
        shared_memory: the most bytes that a program can have.
        tensor_cores: matches the instructions of its matrix units.
    """

    name: str
    backend: str
    architecture: int | str
    warp_size: int
    shared_memory: int
    tensor_cores: str


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 << 10, r"\bmma\.sync"),
        Target("sm_90", "cuda", 90, 32, 227 << 10, r"\bwgmma\.mma_async|\bmma\.sync"),
        Target("sm_100", "cuda", 100, 32, 227 << 10, r"\btcgen05\.mma|\bmma\.sync"),
        Target("gfx942", "hip", "gfx942", 64, 64 << 10, r"\bv_mfma_"),
    )
}


@dataclass(frozen=True)
class Compiled:
    """What became of a kernel.

    Attributes:
        registers: of a thread.
        spills: bytes of local memory of a thread, on NVIDIA; spilled registers on AMD.
        shared_memory: bytes of a program.
        tensor_cores: how many instructions there are for matrix units.
        has_products: whether the kernel has matrix products that could use them.
    """

    name: str
    registers: int
    spills: int
    shared_memory: int
    tensor_cores: int
    has_products: bool


def compile_for(launch: Launch, target: Target) -> Compiled:
    """Compiles a kernel as this launch would have it compiled. The results are kept in ``build/triton``."""
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialize(launch)
    if target.backend == "hip" and constants.get("PRECISION") != "bf16x3" and "PRECISION" in constants:
        constants["PRECISION"] = "ieee"  # what is launched there; this machine chose for NVIDIA
    source = ASTSource(launch.kernel, signature, constants, attributes)
    gpu = GPUTarget(target.backend, target.architecture, target.warp_size)
    compiled = triton.compile(source, target=gpu, options=dict(launch.options))
    products = re.findall(r"tt\.dot.*", compiled.asm["ttir"])
    # AMD has matrix units for all types; on NVIDIA products of float32 in "ieee" and of float64 are for ordinary ones.
    narrow = re.compile("inputPrecision = (tf32|bf16)|x(bf16|f16)>" if target.backend == "cuda" else "")
    has_products = any(narrow.search(line) for line in products)
    assembly = compiled.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    resources = _nvidia_resources if target.backend == "cuda" else _amd_resources
    registers, spills = resources(compiled)
    return Compiled(
        name=launch.name,
        registers=registers,
        spills=spills,
        shared_memory=compiled.metadata.shared,
        tensor_cores=len(re.findall(target.tensor_cores, assembly)),
        has_products=has_products,
    )


_compiled: dict[str, Compiled] = {}


def compile_what_differs(launches: Sequence[Launch], target: Target) -> list[Compiled]:
    """What became of those kernels that say something of their own on a target, each compiled once in a process.

    For sm_90, in float32 and bfloat16, these differ in more than the integers they are specialised for. For other
    NVIDIA GPUs they have matrix products, and a configuration or types of tensors of their own: what is not a product
    compiles to much the same for all. For AMD, and in float16, which has no configurations of its own, each kernel is
    compiled once.
    """
    keys = {key: launch for launch in launches if (key := _what_differs(launch, target)) is not None}
    for key, launch in keys.items():
        if key not in _compiled:
            _compiled[key] = compile_for(launch, target)
    return [_compiled[key] for key in keys]


def _what_differs(launch: Launch, target: Target) -> str | None:
    signature, constants, _ = _specialize(launch)
    tensors = {kind for kind in signature.values() if kind.startswith("*")}
    if target.backend == "hip" or "*fp16" in tensors:
        return str((target.name, launch.name, "*fp16" in tensors))
    shape = {name: value for name, value in constants.items() if name.isupper() and not isinstance(value, bool)}
    if target.name == "sm_90":
        plain = {name for name, value in launch.arguments.items() if type(value) is int} - shape.keys()
        details = [
            {name: kind for name, kind in kinds.items() if name not in plain} for kinds in (signature, constants)
        ]
        return str((target.name, launch.name, details, launch.options))
    if "PRECISION" not in constants:
        return None
    return str((target.name, launch.name, sorted(tensors), shape, launch.options))


def _specialize(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Types, constants and alignments, by the rules by which Triton specializes a kernel when it is launched."""
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if name in launch.constants or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        aligned = False
        if isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            aligned = True  # memory that PyTorch allocates
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[name] = "fp32"
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _nvidia_resources(compiled: Any) -> tuple[int, int]:
    import triton.backends.nvidia

    program = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([program, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(_only(rf"\b{name}:(\d+)", text)) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _amd_resources(compiled: Any) -> tuple[int, int]:
    text = compiled.asm["amdgcn"]
    return int(_only(r"\.vgpr_count:\s*(\d+)", text)), int(_only(r"\.vgpr_spill_count:\s*(\d+)", text))


def _only(pattern: str, text: str) -> str:
    (match,) = re.findall(pattern, text)
    return str(match)
