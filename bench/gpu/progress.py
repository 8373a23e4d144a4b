"""A plugin for pytest that keeps what is known when a test on a GPU ends more than itself.

``pytest -p bench.gpu.progress``, with SCA_TEST_PROGRESS naming a file, to which a line is added when a test begins and
when it ends. A test that is in the file is not run again. So after a process that crashed, hung or lost the device
another one goes on with the next test: :mod:`bench.gpu.parts` does that. SCA_TEST_SHARE=1/3 leaves out all but every
third test.

The device is waited for behind each test, so that what went wrong on it is that test's failure.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Generator
from pathlib import Path

import pytest

from .device import device_is_lost, wait_for_device

SECONDS = float(os.environ.get("SCA_TEST_SECONDS", "240"))  # for a test; then the process ends
FINISHED = 40  # the exit code where all tests ran and some failed; that of pytest is also one of a process that ended

_TERMINAL = os.fdopen(os.dup(2), "w")  # before pytest captures it


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Progress(Path(os.environ["SCA_TEST_PROGRESS"])))


class Progress:
    """What pytest calls.

    Attributes:
        path: the file, one JSON object in each line: {"test": ..., "outcome": ...}, "began" being one of the outcomes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        share, _, shares = os.environ.get("SCA_TEST_SHARE", "1/1").partition("/")
        known = outcomes(self.path)
        chosen = {item.nodeid for item in items[int(share) - 1 :: int(shares)]} - known.keys()
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in chosen])
        items[:] = [item for item in items if item.nodeid in chosen]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._add(nodeid, "began")
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=_TERMINAL)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, None, None]:
        yield
        wait_for_device()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or self.outcomes.get(report.nodeid) is None:
            self.outcomes[report.nodeid] = report.outcome
        elif report.skipped:
            self.outcomes[report.nodeid] = "skipped"

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._add(nodeid, self.outcomes.get(nodeid, "failed"))

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if device_is_lost():
            item.session.shouldstop = "the device answers no more"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.TESTS_FAILED:
            session.exitstatus = FINISHED

    def _add(self, nodeid: str, outcome: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": nodeid, "outcome": outcome}) + "\n")


def outcomes(path: Path) -> dict[str, str]:
    """The last that is known of each test."""
    if not path.exists():
        return {}
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["test"]: line["outcome"] for line in lines}
