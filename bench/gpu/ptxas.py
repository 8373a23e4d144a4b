"""What became of the kernels in CUDA C++, by what ptxas said when they were compiled.

    python -m bench.gpu.ptxas

writes ``docs/cuda-kernels.md``, after ``make compile-gpu``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass

from .calls import ROOT

LOGS = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}" / "cuda"
PAGE = ROOT / "docs" / "cuda-kernels.md"

_INTRODUCTION = """# What the kernels in CUDA C++ compile to

Written by `python -m bench.gpu.ptxas` from what ptxas said when `make compile-gpu` built them with {compiler}.
They have never run on a GPU. Registers are those of a thread, shared memory is in bytes and that of a block of 256
threads. None of them spills registers or uses local memory, which a test checks.
"""

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Kernel:
    """What became of a kernel.

    Attributes:
        operator: the source that it is in.
        name: with its template's arguments.
        local_memory: bytes of a thread: its stack and what it spills.
        shared_memory: bytes of a block.
    """

    operator: str
    name: str
    architecture: str
    registers: int
    local_memory: int
    shared_memory: int


def kernels() -> Iterator[Kernel]:
    """All that were compiled."""
    for log in sorted(LOGS.glob("*.ptxas")):
        for found in _KERNEL.finditer(log.read_text()):
            shared = re.search(r"(\d+) bytes smem", found["rest"])
            yield Kernel(
                operator=log.name.partition(".")[0].removesuffix("_backward"),
                name=_readable(found["name"]),
                architecture=found["architecture"],
                registers=int(found["registers"]),
                local_memory=sum(int(found[kind]) for kind in ("stack", "stores", "loads")),
                shared_memory=int(shared[1]) if shared else 0,
            )


def page() -> str:
    """A row for each kernel, with the registers for each architecture."""
    found = list(kernels())
    architectures = sorted({kernel.architecture for kernel in found}, key=lambda name: int(re.sub(r"\D", "", name)))
    rows: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in found:
        rows.setdefault((kernel.operator, kernel.name), {})[kernel.architecture] = kernel
    lines = [
        _INTRODUCTION.format(compiler=_compiler()),
        f"| operator | kernel | {' | '.join(f'registers, {name}' for name in architectures)} | shared memory |",
        f"|---|---|{'---|' * len(architectures)}---|",
    ]
    for (operator, name), row in sorted(rows.items()):
        registers = " | ".join(str(row[architecture].registers) for architecture in architectures)
        shared = max(kernel.shared_memory for kernel in row.values())
        lines.append(f"| `{operator}` | `{name}` | {registers} | {shared} |")
    return "\n".join(lines) + "\n"


def _readable(mangled: str) -> str:
    """run<namespace::Kernel<float, 1>>, demangled if there is a program for that, to Kernel<float, 1>."""
    if shutil.which("c++filt") is None:
        return mangled
    name = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout
    name = name.partition("run<")[2].rpartition(">(")[0].strip()
    return re.sub(r"sca::cuda::|\(anonymous namespace\)::", "", name).replace(" >", ">")


def _compiler() -> str:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return "nvcc " + version.partition("release ")[2].partition(",")[0]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
