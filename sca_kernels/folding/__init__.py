"""From weights and latents to folded rows: attention between pixels and latents without projecting the pixels.

Every projection in front of and behind an attention is linear, and there are few latents and many pixels. So the
projections move to the side of the latents. For one head, with latents z_j, pixels x_p and q, k, v, o for the linear
layers of query, key, value and output (weight W, bias b):

Latents attend to pixels (:func:`latents_attend_to_pixels`, on :func:`sca_kernels.semantic_pool`):

    scale <q(z_i), k(x_p)> = <scale W_k^T q(z_i), x_p> + a constant of i, which the softmax over p does not see
    o(sum_p a_p v(x_p)) = o(W_v (sum_p a_p x_p) + b_v), because sum_p a_p = 1

Pixels attend to latents (:func:`pixels_attend_to_latents`, :func:`modulate_by_latents`, on
:func:`sca_kernels.semantic_modulate`):

    scale <q(x_p), k(z_j)> = <scale W_q^T W_k z_j, x_p> + scale <b_q, W_k z_j> + a constant of p
    g(o(sum_j a_j v(z_j))) = sum_j a_j W_g W_o v(z_j) + W_g b_o + b_g for a linear layer g, because sum_j a_j = 1

In both, b_k is in the constant: the bias of a key never changes a result, and its gradient is zero. With several heads
each has its rows, and its part of W_o. A token without a partner attends to all alike, which the mean of all rows says.

A positional encoding that is a table over rows plus a table over columns (:class:`SeparableEncoding`), added to the
features or concatenated to them, becomes biases of the logits by row and by column, and comes back out of the
attention's mass in each row and column. The encoded features are never made.

Folding takes time in proportion to the latents, projecting in proportion to the pixels, and either can be multiplied
out in several orders. :func:`estimate` counts them all, and the fastest is taken for each call.

Everything here is in float32, or float64 where parameters, latents or features are: autocast casts nothing, because
folded rows that are rounded to 16 bits cost accuracy. Features keep their type.
"""

from .cache import FoldingCache
from .cost import RATES, Choice, FoldingChoice, FoldingProblem, Rates, choose, estimate
from .functions import (
    Attended,
    latents_attend_to_latents,
    latents_attend_to_pixels,
    modulate_by_latents,
    pixels_attend_to_latents,
)
from .layers import AttentionProjections, Projection, SeparableEncoding
from .weights import attention_shares, attention_weights

__all__ = [
    "RATES",
    "Attended",
    "AttentionProjections",
    "Choice",
    "FoldingCache",
    "FoldingChoice",
    "FoldingProblem",
    "Projection",
    "Rates",
    "SeparableEncoding",
    "attention_shares",
    "attention_weights",
    "choose",
    "estimate",
    "latents_attend_to_latents",
    "latents_attend_to_pixels",
    "modulate_by_latents",
    "pixels_attend_to_latents",
]
