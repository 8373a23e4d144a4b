"""Instance modulation: instance norm, modulation by what is given, noise and leaky ReLU in one operator."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import backends
from ..autocast import without_autocast
from ..outputs import empty_instance_modulate_outputs
from ..reference import instance_modulate as reference
from .arguments import check_feature_map, per_channel, prepare_noise, prepare_stats
from .known_calls import Given, can_be_known
from .library import Saved, register

_OPERATOR = "instance_modulate"


def instance_modulate(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    add_one: bool = True,
    stats: tuple[Tensor, Tensor] | None = None,
    unbiased: bool = False,
    eps: float = 1e-5,
    noise: Tensor | Literal["per_element"] | None = None,
    noise_seed: Tensor | None = None,
    noise_strength: Tensor | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """Instance norm, modulation, noise and leaky ReLU, reading x twice and writing the result once.

    For channel c of image b and the pixel p:

        out = leaky_relu((1 + gamma) * (x - mean_bc) * rstd_bc + beta + noise_strength_bc * noise, negative_slope)

    With gamma and beta per pixel this is the modulation of SPADE and SCAM, per channel that of AdaIN, with neither it
    is instance norm.

    Args:
        x: (B, C, height, width); any strides, read in place.
        gamma: (B or 1, C, height, width), a factor per pixel with any strides, or (B, C) or (C,), one per channel.
            Default: the factor is 1, with or without ``add_one``.
        beta: of the same shapes. Default: zero.
        add_one: whether the factor is 1 + gamma, or gamma itself.
        stats: mean and rstd = 1 / sqrt(variance + eps), each broadcastable to (B, C), of the type that is computed in.
            They serve other normalisations, batch norm for one. Default: those of each channel of each image.
        unbiased: whether the variance divides by height * width - 1; that of a single pixel is zero either way.
        eps: added to the variance; unused with ``stats``.
        noise: numbers broadcastable to (B, 1, height, width), any strides, that all channels share; or "per_element",
            a standard normal number for each element, which takes no memory. Default: none.
        noise_seed: int64, one element, on x's device: "per_element" noise is the same for the same seed, on every
            backend. Default: drawn from PyTorch's generator.
        noise_strength: broadcastable to (B, C), of the type that is computed in. Default: ones.
        negative_slope: of the leaky ReLU; 1 leaves it out.

    Returns:
        out (B, C, height, width) in the type and memory order of ``x``.

    Types: x float32, float64, bfloat16 or float16, never cast; under autocast nothing changes. It is computed in
    float64 where x is float64, in float32 otherwise; gamma and beta are of x's type or that one.

    Gradients: of x (through the statistics too), gamma, beta, both of stats, and noise_strength; none of noise. They
    are deterministic and independent of the number of threads. Gradients of gradients are refused, except by
    ``backend("reference")``.

    Raises:
        TypeError: if a type is not as above.
        ValueError: if shapes or devices do not agree, if noise requires a gradient, or if there is a seed or a strength
            without the noise it belongs to.

    Backends: ``cpu`` (the default on the CPU), ``triton`` (on GPUs where it is chosen, all but float64; it has never
    run on one), ``reference``.

    Source: Huang and Belongie, AdaIN, ICCV 2017; Park et al., SPADE, CVPR 2019; Dufour et al., SCAM!, ECCV 2022.

    Example:
        >>> x = torch.tensor([[[[1.0, 3.0], [1.0, 3.0]]]])
        >>> gamma, beta = torch.tensor([2.0]), torch.tensor([1.0])
        >>> instance_modulate(x, gamma, beta, eps=0.0, negative_slope=0.5).flatten().tolist()
        [-1.0, 4.0, -1.0, 4.0]
    """
    # A call like an earlier one skips the checks and preparations that follow.
    given: Given | None = None
    if can_be_known(_OPERATOR, x) and (stats is None or isinstance(stats, tuple)):
        of_stats = (None, None) if stats is None else stats
        as_given = (x, gamma, beta, *of_stats, noise, noise_seed, noise_strength)
        given = (as_given, (add_one, unbiased, eps, negative_slope))
        results = _operator.run_known(*given)
        if results is not None:
            return results[0]
    dtype, device = check_feature_map(x), x.device
    batch, channels, _, _ = x.shape
    gamma = _prepare_parameter("gamma", gamma, x, dtype)
    beta = _prepare_parameter("beta", beta, x, dtype)
    mean, rstd = prepare_stats(stats, batch, channels, dtype, device)
    by_pixel, seed, noise_strength = prepare_noise(x, noise, noise_seed, noise_strength, dtype)
    backend = backends.resolve(_OPERATOR, device, x.dtype)
    tensors = (x, gamma, beta, mean, rstd, by_pixel, seed, noise_strength)
    if backend == "reference":
        with without_autocast(device):
            return reference.instance_modulate(
                *tensors, add_one=add_one, unbiased=unbiased, eps=eps, negative_slope=negative_slope
            )
    out, _ = _operator.run(tensors, (add_one, unbiased, eps, negative_slope, backend), given)
    return out


def _prepare_parameter(name: str, parameter: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Checks gamma or beta; returns it per pixel (B, C, height, width), or per channel (B, C) in ``dtype``."""
    if parameter is None:
        return None
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(parameter).__name__}")
    if parameter.dtype not in (x.dtype, dtype):
        types = f"{x.dtype}" if x.dtype == dtype else f"{x.dtype} or {dtype}"
        raise TypeError(f"{name}: expected {types} to go with x, got {parameter.dtype}")
    shape = parameter.shape
    batch, channels, height, width = x.shape
    if len(shape) <= 2:
        return per_channel(name, parameter.to(dtype), batch, channels, dtype, x.device)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[1:] != x.shape[1:]:
        raise ValueError(
            f"{name}: expected shape ({batch} or 1, {channels}, {height}, {width}) like x, or one that broadcasts to "
            f"({batch}, {channels}), got {tuple(shape)}"
        )
    if parameter.device != x.device:
        raise ValueError(f"{name}: expected a tensor on {x.device} like x, got one on {parameter.device}")
    return parameter if shape[0] == batch else parameter.expand(x.shape)


def _save(arguments: tuple[Any, ...], results: tuple[Tensor, ...]) -> Saved:
    x, gamma, beta, given_mean, _, *noise = arguments[:8]
    _, stats = results
    return (x, gamma, beta, stats, *noise), (given_mean is not None, *arguments[8:])


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return empty_instance_modulate_outputs(x)


def _backward_fake(grad_out: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    gamma, beta, stats, _, _, noise_strength = rest[:6]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wants_x, *mask = rest[-1]
    gradients: list[Tensor | None] = [torch.empty_like(x) if wants_x else None]
    for tensor, wanted in zip((gamma, beta, stats[0], stats[1], noise_strength), mask, strict=True):
        if not wanted or tensor is None:
            gradients.append(None)
        elif tensor.dim() == 4:
            gradients.append(torch.empty_like(tensor.expand(x.shape)))
        else:
            gradients.append(x.new_empty(x.shape[:2], dtype=dtype))
    return tuple(gradients)


_NOISE_SCHEMA = "Tensor? noise, Tensor? noise_seed, Tensor? noise_strength"
_SETTINGS_SCHEMA = "bool add_one, bool unbiased, float eps, float negative_slope, str backend"
_DIFFERENTIABLE = ("x", "gamma", "beta", "mean", "rstd", "noise_strength")
_operator = register(
    _OPERATOR,
    f"(Tensor x, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? rstd, {_NOISE_SCHEMA}, {_SETTINGS_SCHEMA})"
    " -> (Tensor out, Tensor stats)",
    f"(Tensor grad_out, Tensor x, Tensor? gamma, Tensor? beta, Tensor stats, {_NOISE_SCHEMA},"
    f" bool stats_given, {_SETTINGS_SCHEMA}, bool[6] output_mask)"
    f" -> ({', '.join(f'Tensor grad_{name}' for name in _DIFFERENTIABLE)})",
    differentiable=_DIFFERENTIABLE,
    constants=("noise", "noise_seed"),
    differentiable_results=1,
    save=_save,
    fake=_fake,
    backward_fake=_backward_fake,
)
