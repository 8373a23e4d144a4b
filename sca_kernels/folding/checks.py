"""Checks of what the attentions between pixels and latents are given."""

from __future__ import annotations

from torch import Tensor

from ..labels import LabelMap, LatentLayout
from ..ops.arguments import check_empty, check_feature_map
from .layers import AttentionProjections, Projection, SeparableEncoding


def check_call(
    use: str,
    x: Tensor,
    latents: Tensor,
    layout: LatentLayout,
    labels: LabelMap,
    attention: AttentionProjections,
    encoding: SeparableEncoding | None,
    empty: str,
) -> None:
    check_feature_map(x)
    check_empty(empty)
    if not isinstance(labels, LabelMap):
        raise TypeError(f"labels: expected a LabelMap, got {type(labels).__name__}")
    batch, channels, height, width = x.shape
    check_latents(latents, layout, batch)
    if encoding is not None:
        extra = encoding.row.shape[-1] if encoding.concatenated else channels
        for name, table, size in (("row", encoding.row, height), ("col", encoding.col, width)):
            if table.shape != (size, extra):
                raise ValueError(
                    f"encoding: expected a table of shape ({size}, {extra}) for {name}, got {tuple(table.shape)}"
                )
        if encoding.concatenated:
            channels += extra
    widths = dict.fromkeys(("query", "key", "value"), channels)
    for name in ("query",) if use == "pool" else ("key", "value"):
        widths[name] = latents.shape[2]
    check_attention(attention, widths)


def check_latents(latents: Tensor, layout: LatentLayout, batch: int | None) -> None:
    if not isinstance(layout, LatentLayout):
        raise TypeError(f"layout: expected a LatentLayout, got {type(layout).__name__}")
    if not isinstance(latents, Tensor):
        raise TypeError(f"latents: expected a tensor, got {type(latents).__name__}")
    if latents.dim() != 3 or latents.shape[1] != layout.count or batch not in (None, latents.shape[0]):
        images = "B" if batch is None else batch
        raise ValueError(f"latents: expected shape ({images}, {layout.count}, D), got {tuple(latents.shape)}")
    if not latents.is_floating_point():
        raise TypeError(f"latents: expected floating-point numbers, got {latents.dtype}")


def check_attention(attention: AttentionProjections, widths: dict[str, int]) -> None:
    inner = attention.query.out_features
    if attention.num_heads < 1 or inner % attention.num_heads:
        raise ValueError(
            f"attention: expected a number of heads that divides the width {inner}, got {attention.num_heads}"
        )
    for name, width in widths.items():
        check_layer(f"attention.{name}", getattr(attention, name), inner, width)
    check_layer("attention.out", attention.out, attention.out.out_features, inner)


def check_layer(name: str, layer: Projection, out_features: int, in_features: int) -> None:
    expected = (out_features, in_features)
    if layer.weight.shape != expected:
        raise ValueError(f"{name}: expected a weight of shape {expected}, got {tuple(layer.weight.shape)}")
    if layer.bias is not None and layer.bias.shape != (out_features,):
        raise ValueError(f"{name}: expected a bias of shape ({out_features},), got {tuple(layer.bias.shape)}")
