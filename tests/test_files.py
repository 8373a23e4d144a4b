"""Files that are whole or not there; configurations as plain values."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from sca_kernels import LatentLayout
from scam_models import GeneratorConfiguration, InputError, ScamConfiguration, ade20k, idesigner, tiny
from scam_models.files import write_whole
from scam_models.serialisation import first_difference, from_values, to_values


def test_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    for content in (b"one", b"two"):
        write_whole(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64")])
def test_old_file_stays_when_writing_fails(tmp_path: Path, error: Exception) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half of the n")
        raise error

    with pytest.raises(InputError, match=r"file: cannot be written \((No space|unexpected pos).*unchanged; make room"):
        write_whole(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


FULL_DISK = """
import resource, sys, torch
from scam_models import InputError
from scam_models.files import write_whole
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    write_whole(sys.argv[1], lambda file: torch.save({"weights": torch.zeros(10**5)}, file))
except InputError as error:
    print(error)
"""


@pytest.mark.subprocess
def test_disk_that_takes_no_more(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"old")
    result = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True)
    assert "cannot be written" in result.stdout and len(result.stdout.splitlines()) == 1
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


CONFIGURATIONS = {
    "tiny": tiny(),
    "idesigner": idesigner(4),
    "ade20k": ade20k(),
    "own": ScamConfiguration(
        tiny(LatentLayout((3, 1))).encoder,
        GeneratorConfiguration(
            layout=LatentLayout((3, 1)),
            height=64,
            width=48,
            latent_dim=32,
            first_size=(3, 2),
            num_blocks=4,
            map_encoder_blocks=(0, 2),
        ),
    ),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_survive_json(name: str) -> None:
    configuration = CONFIGURATIONS[name]
    assert from_values(ScamConfiguration, json.loads(json.dumps(to_values(configuration)))) == configuration


def changed(change: dict[str, Any]) -> dict[str, Any]:
    values = to_values(tiny())
    return values | {"encoder": values["encoder"] | change}


def test_other_fields_are_an_error() -> None:
    with pytest.raises(InputError, match=r"configuration.encoder: made by another version.*; new_field is missing"):
        from_values(ScamConfiguration, changed({"new_field": 1}))


DIFFERENCES: dict[str, tuple[dict[str, Any], frozenset[str], str | None]] = {
    "none": ({}, frozenset(), None),
    "number": ({"latent_dim": 64}, frozenset(), "encoder.latent_dim is 32, not 64"),
    "layout": ({"layout": [4, 4]}, frozenset(), "encoder.layout is [4, 4, 4], not [4, 4]"),
    "ignored": ({"latent_dim": 64}, frozenset({"encoder.latent_dim"}), None),
    "new": ({"new": 1}, frozenset(), "encoder.new is None, not 1"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_first_difference(name: str) -> None:
    change, ignored, expected = DIFFERENCES[name]
    assert first_difference(to_values(tiny()), changed(change), ignored=ignored) == expected
