"""SCAM as it was published (Dufour et al., ECCV 2022): every pixel is projected, and dense masks cover all pairs.

A re-creation for comparison, in speed and in results: with the class names, parameters, attributes, state dicts and
results of the published modules, written anew. In float64 it is exact to that type, also where the published code has
float32 inside: in the frequencies of the position, the noise, random initial latents and the result of ``use_vae``.

What the published code cannot do, and what it does unexpectedly. Where it fails late, or only builds an error without
raising it, the re-creation may raise at once; where it computes, it computes the same.

Fails:

* ``architecture="resnet"`` with ``use_equalized_lr``: the residual convolution has no bias, and the equalised layers
  multiply a bias that is not there. Fails when called.
* ``latent_pos_emb="fourrier"``, as the constructor spells it: a position of pixels is added to latents, and the result
  has four dimensions. Spelt "fourier", as in ``forward``, nothing is added.
* ``split_latents`` with ``num_labels_bg`` other than ``num_labels_split``: all labels are split alike, so the latents
  do not fit the masks.
* ``split_latents`` with ``use_vae`` in evaluation mode: the encoder's means are every second part of a tensor, which
  cannot be viewed in another shape. In training it works.
* ``kernel_size`` even: each convolution adds a row and a column, so the branches of "skip" and "resnet" no longer fit
  each other. With "none" the image has a row and a column too many.
* Channels that four does not divide, so also ``num_filters_last_layer`` and ``positional_embedding_dim``: the position
  has another number of channels.
* ``num_heads`` that does not divide ``attention_latent_dim``.
* "InstanceNorm" of a single pixel, and images whose smaller side is less than 2 * 2^num_up_layers.
* ``image_conv=False`` with a label map of another size than the image: it is not resized there.
* ``type_of_initial_latents="fixed_random"`` is not in the state dict, so a loaded encoder has other latents than the
  saved one. In float64 the published encoder fails with it, and with "random".

Unexpected:

* Keys come from ``v_linear``, values from ``k_linear``.
* A pixel without label, and a latent whose label is absent, attends to everything alike.
* The layer norms of the latents are over all latents of an image together, so their size is the number of latents.
* Each convolution of a block applies a leaky ReLU to what the modulation put through one already.
* Noise is drawn in evaluation mode too.
* An unknown ``architecture`` is taken for "none", here an error. An unknown ``attention_type`` is taken for "simplex".
* The last block sees the mask (``use_mask_adain``) if ``num_up_layers_with_mask_adain`` is ``num_up_layers - 1``, but
  not if it is ``num_up_layers``.
* A landscape starts from a portrait: its first width is the height over the aspect ratio, not times it. The last block
  stretches the features to the image's size.
* ``modulate=False`` computes gamma and beta all the same; the weights that only they need get no gradient.
* In the last block nothing reads the latents that the second modulation updates but that modulation itself.
* ``lr_mul`` scales noise, blending weights and initial latents without ``use_equalized_lr`` too.
* ``reverse_conv`` without ``image_conv`` changes nothing; ``content_code`` and ``content_dim`` are never used.
* ``latent_pos_emb="learned"`` starts from uninitialised memory; here from random numbers.
* The modulations' ``return_attention`` drops the weights; only forward hooks see them.
* With ``apply_spectral_norm`` the state dict has ``weight_orig``, ``weight_u`` and ``weight_v``, and ``get_last_layer``
  returns a tensor that is no parameter.
"""

from .attention import MaskedAttention, MaskedTransformer, SameLabel
from .configurations import (
    ATTENTION_WIDTH,
    LATENTS_PER_LABEL,
    STYLE_WIDTH,
    encoder_arguments,
    generator_arguments,
    make_encoder,
    make_generator,
)
from .encoder import SemanticAttentionTransformerEncoder
from .generator import SCAMGenerator, SCAMResUpscale, ToRGB
from .layers import (
    NEGATIVE_SLOPE,
    BaseNetwork,
    EqualConv2d,
    EqualLinear,
    LearnedPositionalEmbedding,
    SinusoidalPositionalEmbedding,
)
from .masks import mask_of_latents, planes_of_latents
from .modulation import SCAMModulation, SegMapEncoder

__all__ = [
    "ATTENTION_WIDTH",
    "LATENTS_PER_LABEL",
    "NEGATIVE_SLOPE",
    "STYLE_WIDTH",
    "BaseNetwork",
    "EqualConv2d",
    "EqualLinear",
    "LearnedPositionalEmbedding",
    "MaskedAttention",
    "MaskedTransformer",
    "SCAMGenerator",
    "SCAMModulation",
    "SCAMResUpscale",
    "SameLabel",
    "SegMapEncoder",
    "SemanticAttentionTransformerEncoder",
    "SinusoidalPositionalEmbedding",
    "ToRGB",
    "encoder_arguments",
    "generator_arguments",
    "make_encoder",
    "make_generator",
    "mask_of_latents",
    "planes_of_latents",
]
