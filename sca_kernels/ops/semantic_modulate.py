"""Semantic modulation: the latents of a pixel's label scale and shift its normalised features."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import backends
from ..autocast import without_autocast
from ..labels import LabelMap, LatentLayout, LatentSelection
from ..outputs import empty_modulate_gradients, empty_modulate_outputs
from ..reference import semantic_modulate as reference
from .arguments import (
    check_empty,
    check_feature_map,
    check_regions,
    check_table,
    grouping,
    per_channel,
    prepare_noise,
    prepare_stats,
)
from .known_calls import Given, can_be_known, look_at
from .library import Saved, register

_OPERATOR = "semantic_modulate"


def semantic_modulate(
    x: Tensor,
    keys: Tensor,
    scale: Tensor,
    shift: Tensor,
    layout: LatentLayout | LatentSelection,
    labels: LabelMap,
    *,
    key_bias: Tensor | None = None,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    scale_bias: Tensor | None = None,
    shift_bias: Tensor | None = None,
    empty: Literal["uniform", "zero"] = "uniform",
    empty_scale: Tensor | None = None,
    empty_shift: Tensor | None = None,
    add_one: bool = True,
    stats: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    noise: Tensor | Literal["per_element"] | None = None,
    noise_seed: Tensor | None = None,
    noise_strength: Tensor | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """Normalises features, scales and shifts them by the latents of each pixel's label, adds noise and activates.

    For a pixel p, with j over the latents of its label, in each image and channel:

        P_hpj = softmax_j(<x_p, keys_hj> + key_bias_hj + row_bias_hj[row of p] + col_bias_hj[column of p])
        gamma_p = 1 + scale_bias + sum_h sum_j P_hpj scale_hj,    beta_p = shift_bias + sum_h sum_j P_hpj shift_hj
        out_p = leaky_relu(gamma_p * (x_p - mean) * rstd + beta_p + noise_strength * noise_p, negative_slope)

    This is cross-attention of pixels to latents, instance normalisation and modulation in one, with all projections
    folded onto the latents: that of the queries goes into ``keys`` (whose scale is included there), the output
    projection and those to gamma and beta into ``scale`` and ``shift``, and a positional encoding that is separable
    into rows and columns into the biases. Where gamma and beta are blended with those of another network, pixel by
    pixel (``use_mask_adain`` of the published code), :func:`semantic_cross_attention` and :func:`instance_modulate`
    take its place.

    Args:
        x: (B, C, height, width); any strides, read in place.
        keys: (B, H, m, C), float32 (float64 where x is), like all tables.
        scale: (B, H, m, C), rows of gamma.
        shift: (B, H, m, C), rows of beta.
        layout: the m latents, or a selection of them, which stands for its layout with absent labels owning none.
        labels: the label of each pixel at x's resolution, for B images or one for all.
        key_bias: (B, H, m). Default: none.
        row_bias: (B, H, m, height). Default: none.
        col_bias: (B, H, m, width). Default: none.
        scale_bias: broadcastable to (B, C). Default: none.
        shift_bias: broadcastable to (B, C). Default: none.
        empty: what takes the place of the sums over j and h for a pixel that has no label or one without latents:
            "uniform", the mean of all m rows, summed over heads, or "zero".
        empty_scale: broadcastable to (B, C), what takes the place of the sum in gamma instead; ``empty`` is then
            unused. With a selection, "uniform" needs it, since the rows of absent labels are not there.
        empty_shift: the same for beta; given together with ``empty_scale``.
        add_one: whether gamma includes the 1.
        stats: (mean, rstd), each broadcastable to (B, C), like keys in type. Default: those of each channel of each
            image over its pixels, rstd = 1 / sqrt(biased variance + eps). Where a given rstd is zero, its own gradient
            is undefined.
        eps: see ``stats``.
        noise: a tensor broadcastable to (B, 1, height, width), of any floating-point type, which takes no gradient; or
            "per_element", a standard normal number for each element, made on the way and never stored. Default: none.
        noise_seed: int64, one element, on x's device: the same numbers "per_element" for the same seed, on every
            backend up to rounding. Default: drawn from PyTorch's generator.
        noise_strength: broadcastable to (B, C), only with noise. Default: 1.
        negative_slope: factor of negative results; 1 for no activation.

    Returns:
        out, like x in shape, type and memory order.

    Types: x float32, float64, bfloat16 or float16, never cast; arithmetic and tables are in float32, or float64 where
    x is. Under autocast nothing changes.

    Gradients: of x (through the statistics too, unless they are given) and of all tables, the given mean and rstd and
    noise_strength included. They are deterministic and independent of the number of threads. Gradients of gradients
    are refused, except by ``backend("reference")``.

    Raises:
        TypeError: if a type is not as above.
        ValueError: if shapes, devices or numbers of labels do not agree, arguments that belong together are not given
            together, or noise requires a gradient.

    Backends: ``cpu`` (the default on the CPU), ``triton`` (on GPUs where it is chosen, all but float64, with at most
    256 latents of a label in all heads; it has never run on one), ``reference``.

    Source: Dufour et al., SCAM!, ECCV 2022, the modulation of the generator, with folded projections.

    Example:
        >>> labels = LabelMap.from_labels(torch.tensor([[0, 0], [1, 1]]), num_labels=2)
        >>> x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
        >>> keys = torch.zeros(1, 1, 2, 1)
        >>> shift = torch.tensor([10.0, 20.0]).view(1, 1, 2, 1)
        >>> out = semantic_modulate(x, keys, keys, shift, LatentLayout((1, 1)), labels)
        >>> [round(value, 2) for value in out.flatten().tolist()]
        [8.66, 9.55, 20.45, 21.34]
    """
    # A call like an earlier one skips the checks and preparations that follow.
    given: Given | None = None
    if can_be_known(_OPERATOR, x, layout, labels) and (stats is None or isinstance(stats, tuple)):
        (cu_latents, _, max_latents), of_latents = look_at(layout)
        (offsets, order, _), of_pixels = look_at(labels)
        tensors = (
            x, keys, scale, shift, cu_latents, offsets, order,
            key_bias, row_bias, col_bias, scale_bias, shift_bias, empty_scale, empty_shift,
            *((None, None) if stats is None else stats), noise, noise_seed, noise_strength,
        )  # fmt: skip
        given = (tensors, (max_latents, eps, negative_slope, add_one, empty, *of_latents, *of_pixels))
        results = _operator.run_known(*given)
        if results is not None:
            return results[0]
    _check(x, keys, scale, shift, layout, labels, key_bias, row_bias, col_bias, empty)
    device, (batch, channels, _, _) = x.device, x.shape
    dtype = keys.dtype
    if scale_bias is not None:
        scale_bias = per_channel("scale_bias", scale_bias, batch, channels, dtype, device)
    if shift_bias is not None:
        shift_bias = per_channel("shift_bias", shift_bias, batch, channels, dtype, device)
    if empty_scale is not None and empty_shift is not None:
        empty_scale = per_channel("empty_scale", empty_scale, batch, channels, dtype, device)
        empty_shift = per_channel("empty_shift", empty_shift, batch, channels, dtype, device)
    elif empty_scale is not None or empty_shift is not None:
        missing = "empty_shift" if empty_shift is None else "empty_scale"
        raise ValueError(f"{missing}: expected empty_scale and empty_shift together, got None")
    elif empty == "uniform" and isinstance(layout, LatentSelection):
        raise ValueError(
            "empty_scale, empty_shift: expected both with a selection and empty='uniform', "
            "since it holds not all of the rows whose mean that is, got None"
        )
    mean, rstd = prepare_stats(stats, batch, channels, dtype, device)
    noise, noise_seed, noise_strength = prepare_noise(x, noise, noise_seed, noise_strength, dtype)
    backend = backends.resolve(_OPERATOR, device, x.dtype)
    if backend == "reference":
        with without_autocast(device):
            return reference.semantic_modulate(
                x, keys, scale, shift,
                labels.labels.flatten(1), torch.atleast_2d(layout.labels(device)), layout.num_labels,
                key_bias, row_bias, col_bias, scale_bias, shift_bias, empty_scale, empty_shift,
                mean, rstd, noise, noise_seed, noise_strength,
                eps=eps, negative_slope=negative_slope, add_one=add_one, empty=empty,
            )  # fmt: skip
    offsets, order, _ = grouping(labels, device)
    out, _ = _operator.run(
        (
            x, keys, scale, shift, layout.offsets(device), offsets, order,
            key_bias, row_bias, col_bias, scale_bias, shift_bias, empty_scale, empty_shift,
            mean, rstd, noise, noise_seed, noise_strength,
        ),
        (layout.max_per_label, eps, negative_slope, add_one, empty, backend),
        given,
    )  # fmt: skip
    return out


def _check(
    x: Tensor,
    keys: Tensor,
    scale: Tensor,
    shift: Tensor,
    layout: LatentLayout | LatentSelection,
    labels: LabelMap,
    key_bias: Tensor | None,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    empty: str,
) -> None:
    dtype, device = check_feature_map(x), x.device
    check_regions(x, layout, labels)
    batch, channels, height, width = x.shape
    if not isinstance(keys, Tensor):
        raise TypeError(f"keys: expected a tensor, got {type(keys).__name__}")
    if keys.dim() != 4:
        raise ValueError(f"keys: expected shape (B, H, m, C), got {tuple(keys.shape)}")
    if keys.shape[1] == 0:
        raise ValueError(f"keys: expected at least one head, got shape {tuple(keys.shape)}")
    rows = (batch, keys.shape[1], layout.count)
    check_table("keys", keys, (*rows, channels), dtype, device)
    check_table("scale", scale, (*rows, channels), dtype, device)
    check_table("shift", shift, (*rows, channels), dtype, device)
    if key_bias is not None:
        check_table("key_bias", key_bias, rows, dtype, device)
    if row_bias is not None:
        check_table("row_bias", row_bias, (*rows, height), dtype, device)
    if col_bias is not None:
        check_table("col_bias", col_bias, (*rows, width), dtype, device)
    check_empty(empty)


def _save(arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> Saved:
    _, stats = results
    tensors, settings = arguments[:19], arguments[19:]
    return (*tensors[:14], stats, *tensors[16:]), (tensors[14] is not None, *settings)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return empty_modulate_outputs(x)


def _backward_fake(grad_out: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    keys, scale, shift, _, _, _, *tables, stats, _, _, noise_strength = rest[:17]
    of_latents, of_channels = (keys, scale, shift, *tables[:3]), (*tables[3:], stats, stats, noise_strength)
    return empty_modulate_gradients(x, of_latents, of_channels, rest[-1])


_INPUTS_SCHEMA = (
    "Tensor x, Tensor keys, Tensor scale, Tensor shift, Tensor cu_latents, Tensor offsets, Tensor order,"
    " Tensor? key_bias, Tensor? row_bias, Tensor? col_bias, Tensor? scale_bias, Tensor? shift_bias,"
    " Tensor? empty_scale, Tensor? empty_shift"
)
_NOISE_SCHEMA = "Tensor? noise, Tensor? noise_seed, Tensor? noise_strength"
_SETTINGS_SCHEMA = "int max_latents, float eps, float negative_slope, bool add_one, str empty, str backend"
_DIFFERENTIABLE = (
    "x", "keys", "scale", "shift", "key_bias", "row_bias", "col_bias", "scale_bias", "shift_bias",
    "empty_scale", "empty_shift", "mean", "rstd", "noise_strength",
)  # fmt: skip
_operator = register(
    _OPERATOR,
    f"({_INPUTS_SCHEMA}, Tensor? mean, Tensor? rstd, {_NOISE_SCHEMA}, {_SETTINGS_SCHEMA})"
    " -> (Tensor out, Tensor stats)",
    f"(Tensor grad_out, {_INPUTS_SCHEMA}, Tensor stats, {_NOISE_SCHEMA}, bool stats_given,"
    f" {_SETTINGS_SCHEMA}, bool[14] output_mask)"
    f" -> ({', '.join(f'Tensor grad_{name}' for name in _DIFFERENTIABLE)})",
    differentiable=_DIFFERENTIABLE,
    constants=("noise", "noise_seed"),
    differentiable_results=1,
    save=_save,
    fake=_fake,
    backward_fake=_backward_fake,
)
