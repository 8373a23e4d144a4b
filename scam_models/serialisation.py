"""Configurations as plain values, which JSON and checkpoints can hold, and back."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from sca_kernels import LatentLayout

from .errors import InputError

Configuration = TypeVar("Configuration")


def to_values(configuration: Any) -> Any:
    """A configuration as dictionaries, lists, strings and numbers.

    Args:
        configuration: a dataclass whose fields are such values, tuples, layouts or such dataclasses.

    Example:
        >>> from scam_models import LossWeights
        >>> to_values(LossWeights())["l1"]
        10.0
    """
    if isinstance(configuration, LatentLayout):
        return list(configuration.latents_per_label)
    if is_dataclass(configuration):
        return {field.name: to_values(getattr(configuration, field.name)) for field in fields(configuration)}
    if isinstance(configuration, tuple):
        return [to_values(value) for value in configuration]
    return configuration


def from_values(kind: type[Configuration], values: Any, name: str = "configuration") -> Configuration:
    """The inverse of :func:`to_values`.

    Args:
        kind: of the configuration.
        values: what :func:`to_values` made.
        name: what errors call it.

    Raises:
        InputError: if a field is missing or unknown.

    Example:
        >>> from scam_models import LossWeights
        >>> from_values(LossWeights, to_values(LossWeights(l1=1.0))).l1
        1.0
    """
    made: Configuration = _from_values(kind, values, name)
    return made


def first_difference(one: Any, other: Any, name: str = "", *, ignored: frozenset[str] = frozenset()) -> str | None:
    """What first differs between two results of :func:`to_values`, in words; None if nothing does.

    Args:
        one, other: such results.
        name: of the field that they are.
        ignored: names of fields that may differ.

    Example:
        >>> first_difference({"a": {"b": 1}}, {"a": {"b": 2}})
        'a.b is 1, not 2'
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in (*one, *(key for key in other if key not in one)):
            path = f"{name}.{key}" if name else str(key)
            if path in ignored:
                continue
            found = first_difference(one.get(key), other.get(key), path, ignored=ignored)
            if found is not None:
                return found
        return None
    return None if one == other else f"{name} is {one}, not {other}"


def _from_values(kind: Any, values: Any, name: str) -> Any:
    if kind is LatentLayout:
        return LatentLayout(tuple(values))
    if isinstance(kind, type) and is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = [field.name for field in fields(kind)]
        if not isinstance(values, Mapping) or set(values) != set(known):
            odd = sorted(set(values) ^ set(known)) if isinstance(values, Mapping) else known
            raise InputError(f"{name}: made by another version of this program; {odd[0]} is missing or unknown")
        return kind(**{key: _from_values(hints[key], values[key], f"{name}.{key}") for key in known})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple and values is not None:
        return tuple(_from_values(arguments[0], value, name) for value in values)
    if origin in (types.UnionType, typing.Union) and isinstance(values, Mapping | list):
        # Besides one kind of dataclass or tuple there are only kinds of plain values.
        (inner,) = (
            argument for argument in arguments if is_dataclass(argument) or typing.get_origin(argument) is tuple
        )
        return _from_values(inner, values, name)
    return values
