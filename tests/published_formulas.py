"""The formulas of the SCAM paper as they read: every token projected, dense masks, one operation after the other.

Written on their own, for comparison: they know label maps and layouts only as the masks that follow from them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sca_kernels import LabelMap, LatentLayout

# Parameters by name: "query.weight", "query.bias", ..., which a name may lack.
Parameters = Mapping[str, Tensor]


def linear(rows: Tensor, parameters: Parameters, name: str, lr_mul: float | None = None) -> Tensor:
    """A linear layer, with an equalised learning rate if ``lr_mul`` is given."""
    weight, bias = parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
    if lr_mul is not None:
        weight = weight * (lr_mul / weight.shape[1] ** 0.5)
        bias = None if bias is None else bias * lr_mul
    return F.linear(rows, weight, bias)


def sinusoidal(channels: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(channels, height, width): sine of the column, of the row, cosine of the column, of the row."""
    frequencies = 10000 ** (-2 * torch.arange(channels // 4, dtype=dtype) / (channels // 2))
    columns = torch.linspace(-1, 1, width, dtype=dtype) * frequencies[:, None, None]
    rows = torch.linspace(-1, 1, height, dtype=dtype)[:, None] * frequencies[:, None, None]
    quarters = columns.sin(), rows.sin(), columns.cos(), rows.cos()
    return torch.cat([quarter.expand(-1, height, width) for quarter in quarters])


def pixel_tokens(x: Tensor, encoding: Tensor | None, concatenated: bool = False) -> Tensor:
    """(B, n, C or C + E): the pixels with their encoding (E, height, width)."""
    if encoding is not None:
        encoding = encoding.to(x.dtype).expand(len(x), -1, -1, -1)
        x = torch.cat([x, encoding], 1) if concatenated else x + encoding
    return x.flatten(2).transpose(1, 2)


def mask(labels: LabelMap, layout: LatentLayout, batch: int) -> Tensor:
    """(B, n, m): whether a latent belongs to the label of a pixel."""
    of_latents = torch.tensor([label for label, count in enumerate(layout.latents_per_label) for _ in range(count)])
    belongs = labels.labels.flatten(1).unsqueeze(2) == of_latents
    return belongs.expand(batch, -1, -1)


def attention(
    tokens: Tensor,
    source: Tensor,
    allowed: Tensor,
    parameters: Parameters,
    num_heads: int,
    *,
    empty: str = "uniform",
    lr_mul: float | None = None,
) -> Tensor:
    """``tokens`` (B, N, ...) attend to ``source`` (B, M, ...) where ``allowed`` (B, N, M)."""
    query, key, value = (
        linear(rows, parameters, name, lr_mul).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for rows, name in ((tokens, "query"), (source, "key"), (source, "value"))
    )
    logits = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    weights = logits.masked_fill(~allowed.unsqueeze(1), -1e4).softmax(-1)
    if empty == "zero":
        weights = weights * allowed.any(-1, keepdim=True).unsqueeze(1)
    return linear((weights @ value).transpose(1, 2).flatten(2), parameters, "out", lr_mul)


def modulation(
    x: Tensor, attended: Tensor, parameters: Parameters, noise: Tensor | None, lr_mul: float | None = None
) -> Tensor:
    """The features, normalised and modulated by what each pixel attended to (B, n, ...)."""
    gamma, beta = (linear(attended, parameters, name, lr_mul).transpose(1, 2).view_as(x) for name in ("gamma", "beta"))
    variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    out = (1 + gamma) * (x - mean) / (variance + 1e-5).sqrt() + beta
    if noise is not None:
        out = out + parameters["noise_strength"][:, None, None] * noise
    return F.leaky_relu(out, 0.2)


def transformer(latents: Tensor, attended: Tensor, parameters: Parameters, lr_mul: float | None = None) -> Tensor:
    """What the attention's result does to the latents: both layer norms are over all latents of an image."""

    def norm(rows: Tensor, name: str) -> Tensor:
        weight, bias = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
        return F.layer_norm(rows, weight.shape, weight, bias)

    rows = norm(attended + latents, "norm_1")
    inner = F.leaky_relu(linear(rows, parameters, "mlp.0", lr_mul), 0.2)
    return norm(F.leaky_relu(linear(inner, parameters, "mlp.2", lr_mul), 0.2) + rows, "norm_2")
