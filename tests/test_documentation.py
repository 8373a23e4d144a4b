"""The examples in docstrings and in the pages for users are run as they are written."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import sca_kernels
import scam_models
from bench.published import make_encoder, make_generator, mask_of_latents
from bench.whole_models import SMALL_ENCODER, SMALL_GENERATOR

PACKAGES = (sca_kernels, scam_models)
ROOT = Path(__file__).resolve().parents[1]


def modules() -> list[ModuleType]:
    names = [
        module.name
        for package in PACKAGES
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    # The compiled libraries have no docstrings, and the one that the others use may be elsewhere.
    names = [name for name in names if not name.endswith(("._native", "._cuda"))]
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


def nothing() -> dict[str, Any]:
    return {}


def published_model() -> dict[str, Any]:
    """What a user of the published code has."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # As published in everything that the page speaks of: 8 latents for each of three labels.
            self.encoder = make_encoder(3, **SMALL_ENCODER | {"num_latent_per_labels": 8, "num_latents_bg": 8})
            self.generator = make_generator(3, 32, 32, **SMALL_GENERATOR | {"num_labels_split": 8, "num_labels_bg": 8})

        def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.generator(mask, self.encoder(image, mask)[0])

    labels = torch.randint(0, 3, (2, 32, 32))
    return {"model": Model(), "image": torch.rand(2, 3, 32, 32), "mask": mask_of_latents(labels, torch.arange(3))}


@pytest.mark.parametrize("page, given", [("README.md", nothing), ("docs/swap.md", published_model)])
def test_page(page: str, given: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / page
    if not path.exists():
        pytest.skip(f"there is no {page}")
    text = path.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    monkeypatch.chdir(tmp_path)
    # A block may go on where the one before it ended.
    namespace: dict[str, Any] = {"__name__": "__main__", **given()}
    for block in blocks:
        # As many empty lines in front as make a traceback give the line in the page.
        source = "\n" * text.count("\n", 0, block.start(1)) + block.group(1)
        exec(compile(source, str(path), "exec"), namespace)
