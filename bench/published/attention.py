"""Attention between tokens under a dense mask, and the block that the latents pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..dense import attention_by_label, attention_weights
from .layers import NEGATIVE_SLOPE, linear_layer, two_layers


@dataclass(frozen=True)
class SameLabel:
    """In place of a mask: tokens attend to those of their label, by (1, T) and (1, F) labels of one image.

    The result is the same, without memory for all pairs: what float64 can afford at full size.
    """

    to_labels: Tensor
    from_labels: Tensor


class MaskedAttention(nn.Module):
    """Projects both sides, attends, and projects what comes out. Keys come from ``v_linear``, values from ``k_linear``.

    Args:
        to_dim: width of the tokens that attend, and of the result.
        from_dim: width of the tokens that are attended to.
        latent_dim: width of queries, keys and values, all heads together.
        num_heads: divides ``latent_dim``.
        use_equalized_lr, lr_mul: see :class:`bench.published.layers.EqualLinear`.
    """

    def __init__(
        self,
        to_dim: int,
        from_dim: int,
        latent_dim: int,
        num_heads: int,
        use_equalized_lr: bool = False,
        lr_mul: float = 1.0,
    ) -> None:
        super().__init__()
        make_linear = linear_layer(use_equalized_lr, lr_mul)
        self.latent_dim_k = latent_dim // num_heads
        self.num_heads = num_heads
        self.q_linear = make_linear(to_dim, latent_dim)
        self.v_linear = make_linear(from_dim, latent_dim)
        self.k_linear = make_linear(from_dim, latent_dim)
        self.out = nn.Sequential(make_linear(latent_dim, to_dim))

    def forward(
        self,
        X_to: Tensor,
        X_from: Tensor,
        mask_from: Tensor | SameLabel | None = None,
        return_attention: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The result (B, T, to_dim), with ``return_attention`` also the weights (B, heads, T, F).

        Args:
            X_to: (B, T, to_dim).
            X_from: (B, F, from_dim).
            mask_from: (B, T, F), zero where a token must not attend to another. A token that may attend to none
                attends to all alike.
        """
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, self.latent_dim_k)).transpose(1, 2)
            for projected in (self.q_linear(X_to), self.v_linear(X_from), self.k_linear(X_from))
        )
        if isinstance(mask_from, SameLabel):
            if return_attention:
                raise ValueError("return_attention: expected False where labels stand for the mask")
            attended = attention_by_label(query, key, value, mask_from.to_labels, mask_from.from_labels)
            return self.out(attended.transpose(1, 2).flatten(2))
        weights = attention_weights(query, key, None if mask_from is None else mask_from.unsqueeze(1) == 0)
        out = self.out((weights @ value).transpose(1, 2).flatten(2))
        return (out, weights) if return_attention else out


class MaskedTransformer(nn.Module):
    """Tokens attend and pass a small network; both layer norms are over all ``to_len`` tokens together.

    y = ln_1(attention(x) + x), out = ln_2(fc(y) + y); ``fc`` ends with a leaky ReLU.
    """

    def __init__(
        self,
        to_dim: int,
        to_len: int,
        from_dim: int,
        latent_dim: int,
        num_heads: int,
        use_equalized_lr: bool = False,
        lr_mul: float = 1.0,
    ) -> None:
        super().__init__()
        self.attention = MaskedAttention(to_dim, from_dim, latent_dim, num_heads, use_equalized_lr, lr_mul)
        self.ln_1 = nn.LayerNorm((to_len, to_dim))
        layers = two_layers(to_dim, linear_layer(use_equalized_lr, lr_mul))
        self.fc = nn.Sequential(*layers, nn.LeakyReLU(NEGATIVE_SLOPE))
        self.ln_2 = nn.LayerNorm((to_len, to_dim))

    def forward(
        self,
        X_to: Tensor,
        X_from: Tensor,
        mask: Tensor | SameLabel | None = None,
        return_attention: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Like :meth:`MaskedAttention.forward`."""
        attended = self.attention(X_to, X_from, mask, return_attention)
        attended, *weights = attended if return_attention else (attended,)
        rows = self.ln_1(attended + X_to)
        rows = self.ln_2(self.fc(rows) + rows)
        return (rows, *weights) if return_attention else rows
