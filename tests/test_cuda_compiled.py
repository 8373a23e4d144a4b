"""The kernels in CUDA C++ compiled for GPUs that are not there: what ptxas said of each."""

from __future__ import annotations

import os

import pytest

from bench.gpu import ptxas
from sca_kernels.backends import BACKENDS

BUILT = os.environ.get("SCA_CUDA_ARCHS", "80 90a 100+PTX")
ARCHITECTURES = {f"sm_{architecture.removesuffix('+PTX')}" for architecture in BUILT.split()}
REGISTERS = 65536  # of a multiprocessor, and a block has 256 threads
STATIC_SHARED_MEMORY = 48 << 10

pytestmark = [
    pytest.mark.compiles_gpu,
    pytest.mark.skipif(not any(ptxas.LOGS.glob("*.ptxas")), reason="nvcc has not built the kernels"),
]


def test_every_kernel_fits_without_local_memory() -> None:
    for kernel in ptxas.kernels():
        assert kernel.local_memory == 0, kernel
        assert kernel.shared_memory <= STATIC_SHARED_MEMORY, kernel
        assert kernel.registers * 256 <= REGISTERS, kernel


def test_every_operator_is_compiled_for_every_architecture() -> None:
    found = {(kernel.operator, kernel.architecture) for kernel in ptxas.kernels()}
    operators = BACKENDS["cuda"].operators
    assert operators is not None
    assert found == {(operator, architecture) for operator in operators for architecture in ARCHITECTURES}


def test_every_kernel_is_in_the_table() -> None:
    page = ptxas.PAGE.read_text(encoding="utf-8")
    for kernel in ptxas.kernels():
        assert f"| `{kernel.operator}` | `{kernel.name}` |" in page
