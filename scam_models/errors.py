"""What is raised when the input is wrong, and not the program."""

from __future__ import annotations


class InputError(ValueError):
    """What a user gave cannot be used: a folder, a file, an option. The message is one line that says what to do.

    The command line prints the message alone; any other exception is a mistake in the program and keeps its traceback.

    Example:
        >>> raise InputError("data/train/images: no images; put PNG or JPEG files there")
        Traceback (most recent call last):
        scam_models.errors.InputError: data/train/images: no images; put PNG or JPEG files there
    """
