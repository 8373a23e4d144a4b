"""What is raised when the input is wrong, and not the program."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """What a user gave cannot be used: a folder, a file, an option. The message is one line that says what to do.

    The command line prints the message alone; any other exception is a mistake in the program and keeps its traceback.

    Example:
        >>> raise InputError("data/train/images: no images; put PNG or JPEG files there")
        Traceback (most recent call last):
        scam_models.errors.InputError: data/train/images: no images; put PNG or JPEG files there
    """


class FileError(InputError):
    """A file cannot be used.

    Attributes:
        path: of the file.
        reason: why not, and what to do.

    Example:
        >>> raise FileError(Path("a.png"), "not a readable image; replace or remove it")
        Traceback (most recent call last):
        scam_models.errors.FileError: a.png: not a readable image; replace or remove it
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[FileError], tuple[Path, str]]:
        return FileError, (self.path, self.reason)  # workers of a DataLoader send it to the main process
