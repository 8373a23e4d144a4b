"""Checks of the arguments that several operators take, and their preparation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..labels import LabelMap, LatentLayout, LatentSelection

Grouping = tuple[Tensor, Tensor | None, int]

TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_feature_map(x: Tensor) -> torch.dtype:
    """Checks a feature map; returns the type that is computed in, and that tables have."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    dtype = x.dtype
    if dtype not in TYPES:
        raise TypeError(f"x: expected float32, float64, bfloat16 or float16, got {dtype}")
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (B, C, height, width), got {tuple(x.shape)}")
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_table(name: str, table: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Checks a table of numbers that goes with a feature map."""
    if not isinstance(table, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(table).__name__}")
    if table.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(table.shape)}")
    _check_kind(name, table, dtype, device)


def per_channel(
    name: str, table: Tensor, batch: int, channels: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Checks numbers of images and channels; returns them as (B, C)."""
    if not isinstance(table, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(table).__name__}")
    _check_kind(name, table, dtype, device)
    return broadcast(name, table, (batch, channels))


def check_images(name: str, label_map: LabelMap, batch: int, device: torch.device, like: str) -> None:
    """Checks that there is a label map for every image, or one for all."""
    labels = label_map.labels
    if labels.device != device:
        raise ValueError(f"{name}: expected a label map on {device} like {like}, got one on {labels.device}")
    images = labels.shape[0]
    if images != batch and images != 1:
        raise ValueError(f"{name}: expected label maps for {batch} images or for one, got {images}")


def check_selection(name: str, selection: LatentSelection, batch: int, device: torch.device, like: str) -> None:
    """Checks that there is a selection of latents for every image, or one for all."""
    if selection.index.device != device:
        raise ValueError(f"{name}: expected a selection on {device} like {like}, got one on {selection.index.device}")
    if selection.batch != batch and selection.batch != 1:
        raise ValueError(f"{name}: expected a selection for {batch} images or for one, got {selection.batch}")


def check_regions(x: Tensor, layout: LatentLayout | LatentSelection, labels: LabelMap) -> None:
    """Checks what says which latents and which pixels of a feature map belong together."""
    if not isinstance(labels, LabelMap):
        raise TypeError(f"labels: expected a LabelMap, got {type(labels).__name__}")
    if not isinstance(layout, LatentLayout | LatentSelection):
        raise TypeError(f"layout: expected a LatentLayout or a LatentSelection, got {type(layout).__name__}")
    batch, _, height, width = x.shape
    device = x.device
    check_images("labels", labels, batch, device, "x")
    if labels.labels.shape[1:] != (height, width):
        raise ValueError(
            f"labels: expected a label map of {height} x {width} pixels like x, "
            f"got {labels.height} x {labels.width} (use at(height, width) to resize it)"
        )
    if layout.num_labels != labels.num_labels:
        raise ValueError(f"layout: expected {labels.num_labels} labels like labels, got {layout.num_labels}")
    if isinstance(layout, LatentSelection):
        check_selection("layout", layout, batch, device, "x")


def check_empty(empty: str) -> None:
    if empty not in ("uniform", "zero"):
        raise ValueError(f"empty: expected 'uniform' or 'zero', got {empty!r}")


def prepare_stats(
    stats: tuple[Tensor, Tensor] | None, batch: int, channels: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Checks given statistics; returns mean and rstd as (B, C), or None where there are none."""
    if stats is None:
        return None, None
    if not isinstance(stats, tuple | list):
        raise TypeError(f"stats: expected a pair (mean, rstd) or None, got {type(stats).__name__}")
    if len(stats) != 2:
        raise ValueError(f"stats: expected a pair (mean, rstd), got {len(stats)} elements")
    mean, rstd = stats
    return (
        per_channel("stats[0] (mean)", mean, batch, channels, dtype, device),
        per_channel("stats[1] (rstd)", rstd, batch, channels, dtype, device),
    )


def prepare_noise(
    x: Tensor, noise: Tensor | str | None, noise_seed: Tensor | None, noise_strength: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Checks noise.

    Returns:
        a value for each pixel (B, 1, height, width), the seed of one for each element, and the strength (B, C); where
        there is no noise of a kind, None.
    """
    batch, channels, height, width = x.shape
    device = x.device
    if noise_seed is not None and not isinstance(noise, str):
        raise ValueError('noise_seed: expected None unless noise="per_element", got a seed')
    if noise is None:
        if noise_strength is not None:
            raise ValueError("noise_strength: expected None without noise, got a strength")
        return None, None, None
    if noise_strength is None:
        noise_strength = torch.ones((), dtype=dtype, device=device).expand(batch, channels)
    else:
        noise_strength = per_channel("noise_strength", noise_strength, batch, channels, dtype, device)
    if isinstance(noise, str):
        if noise != "per_element":
            raise ValueError(f"noise: expected a tensor, 'per_element' or None, got {noise!r}")
        return None, _prepare_seed(noise_seed, device), noise_strength
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise: expected a tensor, 'per_element' or None, got {type(noise).__name__}")
    if not noise.is_floating_point():
        raise TypeError(f"noise: expected floating-point numbers, got {noise.dtype}")
    if noise.requires_grad and torch.is_grad_enabled():
        raise ValueError("noise: expected a tensor that takes no gradient, got one that requires it")
    if noise.device != device:
        raise ValueError(f"noise: expected a tensor on {device} like x, got one on {noise.device}")
    return broadcast("noise", noise.to(dtype), (batch, 1, height, width)), None, noise_strength


def _prepare_seed(seed: Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        limits = torch.iinfo(torch.int64)
        return torch.randint(limits.min, limits.max, (1,), device=device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        given = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"noise_seed: expected an int64 tensor, got {given}")
    if seed.numel() != 1:
        raise ValueError(f"noise_seed: expected one element, got shape {tuple(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"noise_seed: expected a tensor on {device} like x, got one on {seed.device}")
    return seed.view(1)


def _check_kind(name: str, table: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if table.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, the type that x is computed in, got {table.dtype}")
    if table.device != device:
        raise ValueError(f"{name}: expected a tensor on {device} like x, got one on {table.device}")


def broadcast(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor in another shape, if its own broadcasts to that."""
    if tensor.dim() == len(shape) and tensor.shape == shape:
        return tensor
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name}: expected a shape that broadcasts to {shape}, got {tuple(tensor.shape)}") from None


def grouping(tokens: LabelMap | LatentLayout | LatentSelection, device: torch.device) -> Grouping:
    """The tokens grouped by label: offsets, order (None where it is the identity) and the most latents of a label."""
    if isinstance(tokens, LabelMap):
        plan = tokens.planned().plan
        assert plan is not None
        return plan.offsets, plan.order, 0
    return tokens.offsets(device), None, tokens.max_per_label
