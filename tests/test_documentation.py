"""The examples in docstrings and README are run as they are written."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import sca_kernels
import scam_models

PACKAGES = (sca_kernels, scam_models)
README = Path(__file__).resolve().parents[1] / "README.md"


def modules() -> list[ModuleType]:
    names = [
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    # The compiled library has no docstrings, and the one that the others use may be elsewhere.
    names = [name for name in names if not name.endswith("._native")]
    if importlib.util.find_spec("triton") is None:
        names = [name for name in names if not name.startswith("sca_kernels.triton.")]
    return [*PACKAGES, *(importlib.import_module(name) for name in names)]


def examples() -> list[doctest.DocTest]:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for module in modules() for test in finder.find(module, module.__name__)]
    return [test for test in found if test.examples]


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name)
def test_docstring(example: doctest.DocTest) -> None:
    failures: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=failures.append)
    assert not failures, "".join(failures)


def public() -> dict[str, Any]:
    found = {f"{package.__name__}.{name}": getattr(package, name) for package in PACKAGES for name in package.__all__}
    return {name: value for name, value in found.items() if callable(value)}


@pytest.mark.parametrize("name", public())
def test_public_names_have_an_example(name: str) -> None:
    documented = inspect.getdoc(public()[name])
    assert documented is not None
    assert doctest.DocTestParser().get_examples(documented)


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not README.exists():
        pytest.skip("there is no README.md")
    text = README.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    monkeypatch.chdir(tmp_path)
    # A block may go on where the one before it ended.
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        # As many empty lines in front as make a traceback give the line in the README.
        source = "\n" * text.count("\n", 0, block.start(1)) + block.group(1)
        exec(compile(source, str(README), "exec"), namespace)
