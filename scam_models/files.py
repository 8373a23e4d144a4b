"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from .errors import InputError


def write_whole(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name and renames it: whatever happens, ``path`` is the old file or the new one.

    Args:
        path: the file.
        write: writes its content.

    Raises:
        InputError: if the content cannot be written, say because the disk is full. The old file is as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "file"
        >>> write_whole(path, lambda file: file.write(b"content"))
        >>> path.read_bytes()
        b'content'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save turns the error of a full disk into a RuntimeError.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        kept = "; what was there before is unchanged" if path.exists() else ""
        raise InputError(f"{path}: cannot be written ({reason}){kept}; make room on the disk and try again") from error
    finally:
        temporary.unlink(missing_ok=True)
