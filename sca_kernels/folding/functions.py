"""The attentions between pixels and latents as functions of features, latents and linear layers."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..labels import LabelMap, LatentLayout
from ..ops.instance_modulate import instance_modulate
from ..ops.semantic_modulate import semantic_modulate
from .cache import FoldingCache
from .calls import Empty, folding_type, prepare
from .checks import check_attention, check_call, check_latents, check_layer
from .cost import Choice
from .layers import AttentionProjections, Projection, SeparableEncoding
from .rows import (
    fold_for_latents,
    fold_for_pixels,
    project_for_latents,
    project_for_pixels,
    project_for_themselves,
)


class Attended(NamedTuple):
    """What :func:`latents_attend_to_pixels` returns.

    Attributes:
        out: (B, m, width of the result).
        mean: (B, C), the mean of each channel of the features; None where they were projected.
        second_moment: (B, C), the mean of the squared deviations from it; None where they were projected.
    """

    out: Tensor
    mean: Tensor | None
    second_moment: Tensor | None


def latents_attend_to_pixels(
    latents: Tensor,
    x: Tensor,
    layout: LatentLayout,
    labels: LabelMap,
    attention: AttentionProjections,
    *,
    encoding: SeparableEncoding | None = None,
    empty: Empty = "uniform",
    choice: Choice = "auto",
    cache: FoldingCache | None = None,
) -> Attended:
    """Each latent attends to the pixels of its label.

        out_i = out(concat_h sum_p softmax_p(scale <query(z_i)_h, key(x_p + e_p)_h>) value(x_p + e_p)_h)

    over the pixels p of the label of latent i, where e is the encoding (concatenated, if it is that kind).

    Args:
        latents: z, (B, m, D).
        x: (B, C, height, width), any strides.
        layout: the m latents.
        labels: the label of each pixel, for B images or one for all; resized to x's resolution if need be.
        attention: query (d, D), key and value (d, C, or C + E), out (any, d).
        encoding: of the pixels. Default: none.
        empty: what a latent without pixels gets in the place of the sum: "uniform", the mean over all pixels, or
            "zero".
        choice: how to compute it; by default what :func:`estimate` finds fastest.
        cache: remembers products of weights. Default: nothing is remembered.

    Returns:
        an :class:`Attended`, in float32, or float64 where latents, x or a weight are.

    Types: x float32, float64, bfloat16 or float16, everything else any floating-point type; autocast changes nothing.

    Gradients: of latents, x, all parameters and the encoding. That of the key's bias is zero.

    Raises:
        ValueError: if shapes do not agree.

    Backends: those of :func:`sca_kernels.semantic_pool`.

    Source: Dufour et al., SCAM!, ECCV 2022, the cross-attention of SAT.

    Example:
        >>> import torch
        >>> layers = [Projection(torch.randn(8, width)) for width in (6, 3, 3)]
        >>> attention = AttentionProjections(*layers, Projection(torch.randn(6, 8)))
        >>> labels = LabelMap.from_labels(torch.tensor([[0, 0], [0, 1]]), num_labels=2)
        >>> layout = LatentLayout((4, 1))
        >>> latents, x = torch.randn(1, 5, 6), torch.randn(1, 3, 2, 2)
        >>> latents_attend_to_pixels(latents, x, layout, labels, attention).out.shape
        torch.Size([1, 5, 6])
    """
    check_call("pool", x, latents, layout, labels, attention, encoding, empty)
    with without_autocast(x.device):
        call = prepare("pool", x, latents, layout, labels, attention, (), encoding, empty, choice, cache)
        if not call.choice.folded:
            return Attended(project_for_latents(call), None, None)
        return Attended(*fold_for_latents(call))


def pixels_attend_to_latents(
    x: Tensor,
    latents: Tensor,
    layout: LatentLayout,
    labels: LabelMap,
    attention: AttentionProjections,
    *,
    encoding: SeparableEncoding | None = None,
    empty: Empty = "uniform",
    choice: Choice = "auto",
    cache: FoldingCache | None = None,
) -> Tensor:
    """Each pixel attends to the latents of its label.

        out_p = out(concat_h sum_j softmax_j(scale <query(x_p + e_p)_h, key(z_j)_h>) value(z_j)_h)

    over the latents j of the label of pixel p, where e is the encoding (concatenated, if it is that kind).

    Args:
        x: (B, C, height, width), any strides.
        latents: z, (B, m, D).
        layout: the m latents.
        labels: the label of each pixel, for B images or one for all; resized to x's resolution if need be.
        attention: query (d, C, or C + E), key and value (d, D), out (C', d).
        encoding: of the pixels. Default: none.
        empty: what a pixel gets in the place of the sum that has no label or one without latents: "uniform", the mean
            over all latents, or "zero".
        choice: how to compute it; by default what :func:`estimate` finds fastest. It can be folded if C' = C.
        cache: remembers products of weights. Default: nothing is remembered.

    Returns:
        (B, C', height, width), in x's type.

    Types: x float32, float64, bfloat16 or float16, everything else any floating-point type; autocast changes nothing.

    Gradients: of x, latents, all parameters and the encoding. That of the key's bias is zero.

    Raises:
        ValueError: if shapes do not agree.

    Backends: those of :func:`sca_kernels.semantic_modulate`.

    Source: Dufour et al., SCAM!, ECCV 2022, SCA.

    Example:
        >>> import torch
        >>> layers = [Projection(torch.randn(8, width)) for width in (3, 6, 6)]
        >>> attention = AttentionProjections(*layers, Projection(torch.randn(3, 8)))
        >>> labels = LabelMap.from_labels(torch.tensor([[0, 0], [0, 1]]), num_labels=2)
        >>> layout = LatentLayout((4, 1))
        >>> latents, x = torch.randn(1, 5, 6), torch.randn(1, 3, 2, 2)
        >>> pixels_attend_to_latents(x, latents, layout, labels, attention).shape
        torch.Size([1, 3, 2, 2])
    """
    check_call("attend", x, latents, layout, labels, attention, encoding, empty)
    with without_autocast(x.device):
        call = prepare("attend", x, latents, layout, labels, attention, (), encoding, empty, choice, cache)
        if not call.choice.folded:
            (out,) = project_for_pixels(call)
            return out.to(x.dtype)
        rows = fold_for_pixels(call)
        (shift,), (bias,), (of_empty,) = rows.values, rows.biases, rows.of_empty
        zero = shift.new_zeros(())
        return semantic_modulate(
            x,
            rows.logits.rows,
            zero.expand_as(shift),
            shift,
            call.tokens,
            call.labels,
            key_bias=rows.logits.key_bias,
            row_bias=rows.logits.row_bias,
            col_bias=rows.logits.col_bias,
            shift_bias=bias,
            empty=rows.empty,
            empty_scale=None if of_empty is None else zero,
            empty_shift=of_empty,
            add_one=False,
            stats=(zero, zero + 1),
            negative_slope=1.0,
        )


def modulate_by_latents(
    x: Tensor,
    latents: Tensor,
    layout: LatentLayout,
    labels: LabelMap,
    attention: AttentionProjections,
    gamma: Projection,
    beta: Projection,
    *,
    encoding: SeparableEncoding | None = None,
    empty: Empty = "uniform",
    add_one: bool = True,
    stats: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    noise: Tensor | Literal["per_element"] | None = None,
    noise_seed: Tensor | None = None,
    noise_strength: Tensor | None = None,
    negative_slope: float = 0.2,
    choice: Choice = "auto",
    cache: FoldingCache | None = None,
) -> Tensor:
    """Each pixel attends to the latents of its label, and what it gets scales and shifts its normalised features.

        a_p = out(concat_h sum_j softmax_j(scale <query(x_p + e_p)_h, key(z_j)_h>) value(z_j)_h)
        out_p = leaky_relu((1 + gamma(a_p)) (x_p - mean) rstd + beta(a_p) + noise_strength noise_p, negative_slope)

    over the latents j of the label of pixel p, where e is the encoding (concatenated, if it is that kind).

    Args:
        x: (B, C, height, width), any strides.
        latents: z, (B, m, D).
        layout: the m latents.
        labels: the label of each pixel, for B images or one for all; resized to x's resolution if need be.
        attention: query (d, C, or C + E), key and value (d, D), out (any, d).
        gamma, beta: (C, width of the attention's result).
        encoding: of the pixels; only the attention sees it. Default: none.
        empty: what a pixel gets in the place of the sum that has no label or one without latents: "uniform", the mean
            over all latents, or "zero".
        add_one: whether the 1 is there.
        stats: (mean, rstd), each broadcastable to (B, C). Default: those of each channel of each image over its
            pixels, rstd = 1 / sqrt(biased variance + eps).
        eps, noise, noise_seed, noise_strength, negative_slope: see :func:`sca_kernels.semantic_modulate`.
        choice: how to compute it; by default what :func:`estimate` finds fastest.
        cache: remembers products of weights. Default: nothing is remembered.

    Returns:
        like x in shape, type and memory order.

    Types: x float32, float64, bfloat16 or float16, everything else any floating-point type; autocast changes nothing.

    Gradients: of x, latents, all parameters, the encoding, the given statistics and noise_strength. That of the key's
    bias is zero.

    Raises:
        ValueError: if shapes do not agree.

    Backends: those of :func:`sca_kernels.semantic_modulate`.

    Source: Dufour et al., SCAM!, ECCV 2022, the modulation of the generator.

    Example:
        >>> import torch
        >>> layers = [Projection(torch.randn(8, width)) for width in (3, 6, 6)]
        >>> attention = AttentionProjections(*layers, Projection(torch.randn(3, 8)))
        >>> gamma, beta = Projection(torch.randn(3, 3)), Projection(torch.randn(3, 3))
        >>> labels = LabelMap.from_labels(torch.tensor([[0, 0], [0, 1]]), num_labels=2)
        >>> latents, x = torch.randn(1, 5, 6), torch.randn(1, 3, 2, 2)
        >>> modulate_by_latents(x, latents, LatentLayout((4, 1)), labels, attention, gamma, beta).shape
        torch.Size([1, 3, 2, 2])
    """
    check_call("modulate", x, latents, layout, labels, attention, encoding, empty)
    for name, tail in (("gamma", gamma), ("beta", beta)):
        check_layer(name, tail, x.shape[1], attention.out.out_features)
    table_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if stats is not None:
        stats = (stats[0].to(table_dtype), stats[1].to(table_dtype))
    if noise_strength is not None:
        noise_strength = noise_strength.to(table_dtype)
    settings: dict[str, Any] = {
        "add_one": add_one,
        "stats": stats,
        "eps": eps,
        "noise": noise,
        "noise_seed": noise_seed,
        "noise_strength": noise_strength,
        "negative_slope": negative_slope,
    }
    with without_autocast(x.device):
        tails = (gamma, beta)
        call = prepare("modulate", x, latents, layout, labels, attention, tails, encoding, empty, choice, cache)
        if not call.choice.folded:
            return instance_modulate(x, *project_for_pixels(call), **settings)
        rows = fold_for_pixels(call)
        scale, shift = rows.values
        return semantic_modulate(
            x,
            rows.logits.rows,
            scale,
            shift,
            call.tokens,
            call.labels,
            key_bias=rows.logits.key_bias,
            row_bias=rows.logits.row_bias,
            col_bias=rows.logits.col_bias,
            scale_bias=rows.biases[0],
            shift_bias=rows.biases[1],
            empty=rows.empty,
            empty_scale=rows.of_empty[0],
            empty_shift=rows.of_empty[1],
            **settings,
        )


def latents_attend_to_latents(latents: Tensor, layout: LatentLayout, attention: AttentionProjections) -> Tensor:
    """Each latent attends to the latents of its label, itself included.

        out_i = out(concat_h sum_j softmax_j(scale <query(z_i)_h, key(z_j)_h>) value(z_j)_h)

    Args:
        latents: z, (B, m, D).
        layout: the m latents.
        attention: query, key and value (d, D), out (any, d).

    Returns:
        (B, m, width of the result), in float32, or float64 where latents or a weight are.

    Types: any floating-point type; autocast changes nothing.

    Gradients: of latents and all parameters. That of the key's bias is zero.

    Raises:
        ValueError: if shapes do not agree.

    Backends: those of :func:`sca_kernels.semantic_cross_attention`.

    Source: Dufour et al., SCAM!, ECCV 2022, the self-attention of SAT.

    Example:
        >>> import torch
        >>> layers = [Projection(torch.randn(8, 6)) for _ in range(3)]
        >>> attention = AttentionProjections(*layers, Projection(torch.randn(6, 8)))
        >>> latents_attend_to_latents(torch.randn(1, 5, 6), LatentLayout((4, 1)), attention).shape
        torch.Size([1, 5, 6])
    """
    check_latents(latents, layout, None)
    check_attention(attention, dict.fromkeys(("query", "key", "value"), latents.shape[2]))
    dtype = folding_type((latents,), attention.layers)
    with without_autocast(latents.device):
        return project_for_themselves(latents.to(dtype), layout, attention.to(dtype))
