"""What the tests run under: uninitialised memory that shows, and each instruction set that this machine has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import emulation
import hypothesis
import pytest
import torch

from sca_kernels import cpu, cuda, triton
from sca_kernels.triton import launch

# The same few examples every time, so that a failure is there again on the next run and on the next machine.
hypothesis.settings.register_profile(
    "sca",
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    # The fixtures set up a process-wide state that no example changes.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("sca")


if triton.INTERPRETED and triton.why_not() is None:
    from interpreter import repair

    repair()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory from ``torch.empty`` is NaN, or the largest integer: an element that nobody writes, or a workspace that is
    read before it is written, shows in the results. All workspaces come from there, the smallest ones too."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    # On a GPU some of PyTorch's own operators have no other algorithm.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    if cpu.native is not None:
        cpu.native.use_stack(False)
    yield
    if cpu.native is not None:
        cpu.native.use_stack(True)
    torch.use_deterministic_algorithms(deterministic, warn_only=warns_only)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The tensors of the tests are small: a second thread mostly waits, for long where others use the processor too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def native() -> None:
    """Skips the test where the compiled kernels cannot run."""
    reason = cpu.why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=cpu.CAPABILITIES)
def capability(request: pytest.FixtureRequest, native: None) -> Iterator[str]:
    """Runs the test under each instruction set of the compiled kernels."""
    name = request.param
    if name not in cpu.capabilities():
        pytest.skip(f"this machine or this build has no {name} kernels")
    before = cpu.CAPABILITIES[cpu.capability()]
    cpu.set_capability(name)
    yield name
    cpu.set_capability(before)


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the test where kernels in Triton cannot run. In the interpreter, every tensor that a kernel is given then
    lies between canaries: what a kernel reads beside a tensor is not a number, and what it writes there is found."""
    reason = triton.why_not()
    if reason is not None:
        pytest.skip(reason)
    if triton.INTERPRETED:
        from interpreter import between_canaries

        monkeypatch.setattr(launch, "_run", between_canaries(launch._run))


@pytest.fixture(params=emulation.ORDERS)
def cuda_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test on kernels in CUDA C++ by the host, in each order; on a GPU, if there is one, once."""
    order = str(request.param)
    if cuda.why_not() is None:
        if order != "256 threads":
            pytest.skip("on a GPU the threads of a block are 256, in any order")
        return order
    if emulation.library() is None:
        pytest.skip("the kernels for GPUs were not built for the host")
    emulation.serve(monkeypatch)
    emulation.emulate(order)
    return order


@pytest.fixture
def cuda_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like ``cuda_order``, with the threads that there are on a GPU, backwards."""
    if cuda.why_not() is not None:
        if emulation.library() is None:
            pytest.skip("the kernels for GPUs were not built for the host")
        emulation.serve(monkeypatch)
        emulation.emulate("256 threads, backwards")


@pytest.fixture
def use_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """A function that sets the number of threads, for calls of any size: small ones otherwise run on one."""
    monkeypatch.setattr(cpu, "_WORK_PER_THREAD", 0)
    before = torch.get_num_threads()

    def use(threads: int) -> None:
        torch.set_num_threads(threads)
        assert torch.get_num_threads() == threads

    yield use
    torch.set_num_threads(before)
