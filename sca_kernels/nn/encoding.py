"""The encoding of a pixel's place."""

from __future__ import annotations

import torch
from torch import Tensor

from ..folding import SeparableEncoding
from ..tracing import is_tracing


def sinusoidal_encoding(
    height: int,
    width: int,
    channels: int,
    *,
    concatenated: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> SeparableEncoding:
    """The sinusoidal encoding of a pixel's place, as one table over rows and one over columns.

    With frequencies f_i = 10000^(-2 i / (channels / 2)), i < channels / 4, and coordinates r, c from -1 to 1, the
    channels are, a quarter each: sin(c f_i), sin(r f_i), cos(c f_i), cos(r f_i).

    The tables are remembered for each size, type and device, except while compiling or exporting.

    Args:
        height, width: of the image.
        channels: of the encoding, divisible by four.
        concatenated: whether it is concatenated to the features or added to them.
        dtype, device: of the tables.

    Raises:
        ValueError: if ``channels`` is not divisible by four.

    Source: the positional embedding of the published SCAM code.

    Example:
        >>> encoding = sinusoidal_encoding(2, 3, 8)
        >>> encoding.row.shape, encoding.col.shape
        (torch.Size([2, 8]), torch.Size([3, 8]))
        >>> encoding.encode(torch.zeros(1, 8, 2, 3)).shape
        torch.Size([1, 8, 2, 3])
    """
    if channels < 1 or channels % 4:
        raise ValueError(f"channels: expected a positive number divisible by four, got {channels}")
    device = torch.get_default_device() if device is None else torch.device(device)
    if is_tracing():
        return SeparableEncoding(*_make_tables(height, width, channels, dtype, device), concatenated)
    key = (height, width, channels, dtype, device)
    tables = _tables.get(key)
    if tables is None:
        if len(_tables) >= _MOST_TABLES:
            _tables.clear()
        with torch.inference_mode(False):  # what is remembered may serve training later
            tables = _tables[key] = _make_tables(height, width, channels, dtype, device)
    return SeparableEncoding(*tables, concatenated)


_MOST_TABLES = 256
_tables: dict[tuple[int, int, int, torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}


def _make_tables(
    height: int, width: int, channels: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(channels // 4, dtype=torch.float64, device=device) / (channels // 2)
    frequencies = 10000 ** (-2 * exponents)

    def waves(size: int) -> tuple[Tensor, Tensor]:
        angles = torch.linspace(-1, 1, size, dtype=torch.float64, device=device).unsqueeze(1) * frequencies
        return angles.sin(), angles.cos()

    (row_sin, row_cos), (col_sin, col_cos) = waves(height), waves(width)
    row_none, col_none = torch.zeros_like(row_sin), torch.zeros_like(col_sin)
    row = torch.cat([row_none, row_sin, row_none, row_cos], 1)
    col = torch.cat([col_sin, col_none, col_cos, col_none], 1)
    return row.to(dtype), col.to(dtype)


def encoding_of(x: Tensor, channels: int, *, concatenated: bool = False) -> SeparableEncoding:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return sinusoidal_encoding(
        x.shape[2], x.shape[3], channels, concatenated=concatenated, dtype=dtype, device=x.device
    )
