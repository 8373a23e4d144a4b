"""Attention between pixels and latents to look at, as the weights themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..labels import LabelMap, LatentLayout
from ..ops.semantic_cross_attention import semantic_cross_attention
from .calls import Call, prepare
from .checks import check_call
from .layers import AttentionProjections, SeparableEncoding
from .rows import pixel_rows


def attention_weights(
    x: Tensor,
    latents: Tensor,
    layout: LatentLayout,
    labels: LabelMap,
    attention: AttentionProjections,
    *,
    encoding: SeparableEncoding | None = None,
) -> Tensor:
    """How much each pixel attends to each latent of its label, to look at.

        weight_phj = softmax_j(scale <query(x_p + e_p)_h, key(z_j)_h>)

    over the latents j of the label of pixel p, where e is the encoding (concatenated, if it is that kind).

    Args:
        x, latents, layout, labels, attention, encoding: as in :func:`pixels_attend_to_latents`.

    Returns:
        (B, H, k, height, width) for k = ``layout.max_per_label``, in float32, or float64 where x, latents or a weight
        are. Latent i of a label has plane i; the planes that a label has no latent for are zero, and all of a pixel
        without latents.

    Types: as in :func:`pixels_attend_to_latents`.

    Gradients: of x, latents and the layers of query and key.

    Raises:
        ValueError: if shapes do not agree.

    Backends: those of :func:`sca_kernels.semantic_cross_attention`.

    Example:
        >>> import torch
        >>> from sca_kernels.folding import Projection
        >>> layers = [Projection(torch.randn(8, width)) for width in (3, 6, 6)]
        >>> attention = AttentionProjections(*layers, Projection(torch.randn(3, 8)))
        >>> labels = LabelMap.from_labels(torch.tensor([[0, 0], [0, 1]]), num_labels=2)
        >>> latents, x = torch.randn(1, 5, 6), torch.randn(1, 3, 2, 2)
        >>> weights = attention_weights(x, latents, LatentLayout((4, 1)), labels, attention)
        >>> weights.shape, weights[0, 0, :, 1, 1].tolist()
        (torch.Size([1, 1, 4, 2, 2]), [1.0, 0.0, 0.0, 0.0])
    """
    check_call("attend", x, latents, layout, labels, attention, encoding, "zero")
    with without_autocast(x.device):
        call = prepare("attend", x, latents, layout, labels, attention, (), encoding, "zero", "projected", None)
        query = call.attention.query.apply(pixel_rows(call))
        key = call.attention.key._replace(bias=None).apply(call.latents)
        return _over_latents(call, _by_head(call, query), _by_head(call, key))


def attention_shares(
    latents: Tensor,
    x: Tensor,
    layout: LatentLayout,
    labels: LabelMap,
    attention: AttentionProjections,
    *,
    encoding: SeparableEncoding | None = None,
) -> Tensor:
    """How much of the attention that each pixel gets from the latents of its label comes from each of them, to look at.

        weight_jhp = softmax_p(scale <query(z_j)_h, key(x_p + e_p)_h>) over the pixels p of the label of latent j
        share_phj = weight_jhp / sum_i weight_ihp over the latents i of the label of pixel p

    where e is the encoding (concatenated, if it is that kind). Every latent gives away as much as every other, so a
    share says which of them is after a pixel, whether or not the pixel gets much. It is computed as

        share_phj = softmax_j(scale <query(z_j)_h, key(x_p + e_p)_h> - lse_jh)

    with the log-sum-exp of the first softmax, so neither weights that are very small nor a table of all latents times
    all pixels is needed.

    Args:
        latents, x, layout, labels, attention, encoding: as in :func:`latents_attend_to_pixels`.

    Returns:
        (B, H, k, height, width) for k = ``layout.max_per_label``, in float32, or float64 where latents, x or a weight
        are. Latent i of a label has plane i; the planes that a label has no latent for are zero, and all of a pixel
        without latents.

    Types: as in :func:`latents_attend_to_pixels`.

    Gradients: of x, latents and the layers of query and key, but for the key's bias, which changes nothing.

    Raises:
        ValueError: if shapes do not agree.

    Backends: those of :func:`sca_kernels.semantic_cross_attention`.

    Example:
        >>> import torch
        >>> from sca_kernels.folding import Projection
        >>> layers = [Projection(torch.randn(8, width)) for width in (6, 3, 3)]
        >>> attention = AttentionProjections(*layers, Projection(torch.randn(6, 8)))
        >>> labels = LabelMap.from_labels(torch.tensor([[0, 0], [0, 1]]), num_labels=2)
        >>> latents, x = torch.randn(1, 5, 6), torch.randn(1, 3, 2, 2)
        >>> shares = attention_shares(latents, x, LatentLayout((4, 1)), labels, attention)
        >>> shares.shape, shares[0, 0, :, 1, 1].tolist()
        (torch.Size([1, 1, 4, 2, 2]), [1.0, 0.0, 0.0, 0.0])
    """
    check_call("pool", x, latents, layout, labels, attention, encoding, "zero")
    with without_autocast(x.device):
        call = prepare("pool", x, latents, layout, labels, attention, (), encoding, "zero", "projected", None)
        query = _by_head(call, call.attention.query.apply(call.latents))
        key = _by_head(call, call.attention.key._replace(bias=None).apply(pixel_rows(call)))
        no_value = key.new_zeros(()).expand(*key.shape[:3], 1)
        scale = call.attention.scale
        _, lse = semantic_cross_attention(
            query, key, no_value, layout, call.labels, scale=scale, empty="zero", return_lse=True
        )
        # A latent without pixels is no pixel's, but an infinite number beside others would spoil their products.
        lse = lse.where(lse.isfinite(), 0)
        # One more channel, 1 for every pixel, takes the log-sum-exp from the logits; then the two change roles.
        query = torch.cat([query, -lse.unsqueeze(-1) / scale], -1)
        key = torch.cat([key, torch.ones_like(key[..., :1])], -1)
        return _over_latents(call, key, query)


def _by_head(call: Call, rows: Tensor) -> Tensor:
    """(B, N, d) to (B, H, N, d / H)."""
    return rows.unflatten(-1, (call.attention.num_heads, -1)).transpose(1, 2)


def _over_latents(call: Call, pixels: Tensor, latents: Tensor) -> Tensor:
    """The softmax over the latents of each pixel's label, (B, H, k, height, width).

    Args:
        call: of either attention.
        pixels, latents: whose scalar products are the logits, (B, H, n, D) and (B, H, m, D).
    """
    layout, device = call.layout, latents.device
    # Values that are the latents' places among those of their label: the weighted mean of them is the weights.
    place = torch.arange(layout.count, device=device) - layout.offsets(device)[layout.labels(device).long()]
    planes = torch.arange(layout.max_per_label, device=device)
    value = (place.unsqueeze(1) == planes).to(call.dtype).expand(*latents.shape[:2], -1, -1)
    weights = semantic_cross_attention(
        pixels, latents, value, call.labels, layout, scale=call.attention.scale, empty="zero"
    )
    return weights.transpose(2, 3).unflatten(3, call.x.shape[2:])
