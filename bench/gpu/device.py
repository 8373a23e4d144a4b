"""The GPU of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

_QUESTION = """
import json, torch
if torch.cuda.is_available():
    found = torch.cuda.get_device_properties(0)
    print(json.dumps({"name": torch.cuda.get_device_name(0), "capability": [found.major, found.minor]}))
"""


@dataclass(frozen=True)
class Device:
    """A GPU.

    Attributes:
        name: as PyTorch says it.
        capability: its compute capability.
    """

    name: str
    capability: tuple[int, int]

    @property
    def architecture(self) -> str:
        """What nvcc compiles for it: with what only this architecture has, where there are kernels for that."""
        major, minor = self.capability
        return f"{major}{minor}a" if major == 9 else f"{major}{minor}"


def find_device(seconds: float = 120.0) -> Device | None:
    """The first GPU. Another process asks, so that a driver that does not answer stops nobody."""
    try:
        answer = subprocess.run([sys.executable, "-c", _QUESTION], capture_output=True, text=True, timeout=seconds)
        found = json.loads(answer.stdout)
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        return None
    return Device(found["name"], tuple(found["capability"]))


def wait_for_device() -> None:
    """Waits for the GPU, if this process has used it; what went wrong on it is raised here."""
    torch = sys.modules.get("torch")  # a process that has not imported it has not
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def device_is_lost() -> bool:
    """Whether the GPU answers this process no more, since a kernel touched what it must not, say."""
    try:
        wait_for_device()
    except RuntimeError:
        return True
    return False
