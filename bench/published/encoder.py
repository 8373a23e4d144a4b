"""The encoder: latents attend to the pixels of their label in every level of an image, and to each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import MaskedTransformer
from .layers import NEGATIVE_SLOPE, BaseNetwork, SinusoidalPositionalEmbedding, convolution_layer
from .masks import planes_of_latents


class SemanticAttentionTransformerEncoder(BaseNetwork):
    """Encodes an image to latents for each label.

    Args:
        num_input_channels: of the image.
        positional_embedding_dim: channels of the position that is concatenated to the image, which four divides.
        num_labels: number of labels.
        num_latent_per_labels: number of latents of a label.
        latent_dim: width of a latent.
        num_blocks: number of blocks, and of levels with ``image_conv``.
        attention_latent_dim: width of queries, keys and values.
        num_cross_heads, num_self_heads: of the attention to pixels and to each other.
        type_of_initial_latents: what the latents are at first: "learned"; "fixed_random": the same random numbers in
            every call, which are not in the state dict; "random": new ones.
        image_conv: whether each block has a level of its own, the first one the image, each of the others a convolution
            of the one before to half its height and width, with the position added. Otherwise all see the image.
        reverse_conv: whether the blocks see the levels from the last to the first.
        num_latents_bg: number of latents of label 0. Default: the same.
        conv_features_dim_first: half the channels of the first convolution; each of the others doubles them.
        content_dim: not used.
        use_vae: whether to return means and logarithms of variances, by a linear layer for each latent.
        use_self_attention: whether the latents of a label attend to each other after they attended to the pixels.
        use_equalized_lr: of linear layers and convolutions, except those of ``use_vae``.
        lr_mul: for these, and for the initial latents also where the learning rate is not equalised.

    Attributes:
        return_attention: whether the attentions to pixels return their weights as well, for forward hooks, and
            ``image_sizes`` lists the heights and widths of the levels.
    """

    def __init__(
        self,
        num_input_channels: int,
        positional_embedding_dim: int,
        num_labels: int,
        num_latent_per_labels: int,
        latent_dim: int,
        num_blocks: int,
        attention_latent_dim: int,
        num_cross_heads: int,
        num_self_heads: int,
        type_of_initial_latents: Literal["learned", "fixed_random", "random"] = "learned",
        image_conv: bool = False,
        reverse_conv: bool = False,
        num_latents_bg: int | None = None,
        conv_features_dim_first: int = 16,
        content_dim: int = 512,
        use_vae: bool = False,
        use_self_attention: bool = True,
        use_equalized_lr: bool = False,
        lr_mul: float = 1.0,
    ) -> None:
        super().__init__()
        if type_of_initial_latents not in ("learned", "fixed_random", "random"):
            raise ValueError(
                "type_of_initial_latents: expected 'learned', 'fixed_random' or 'random', "
                f"got {type_of_initial_latents!r}"
            )
        self.num_latent_per_labels = num_latent_per_labels
        self.num_latents_bg = num_latent_per_labels if num_latents_bg is None else num_latents_bg
        self.num_latents = (num_labels - 1) * num_latent_per_labels + self.num_latents_bg
        self.latent_dim, self.lr_mul = latent_dim, lr_mul
        self.image_conv, self.reverse_conv = image_conv, reverse_conv
        self.use_self_attention, self.use_vae = use_self_attention, use_vae
        self.return_attention = False
        of_label = [torch.ones(num_latent_per_labels, num_latent_per_labels)] * (num_labels - 1)
        of_background = torch.ones(self.num_latents_bg, self.num_latents_bg)
        self.register_buffer("latents_mask", torch.block_diag(of_background, *of_label).unsqueeze(0))
        self.type_of_initial_latents = type_of_initial_latents
        if type_of_initial_latents == "learned":
            self.latents = nn.Parameter(torch.randn(self.num_latents, latent_dim) / lr_mul)
        elif type_of_initial_latents == "fixed_random":
            self.latents = torch.randn(self.num_latents, latent_dim)

        image_width = num_input_channels + positional_embedding_dim
        of_image = SinusoidalPositionalEmbedding(positional_embedding_dim, "concat")
        widths = [image_width] * num_blocks
        if image_conv:
            channels = [num_input_channels, *(conv_features_dim_first << level for level in range(1, num_blocks))]
            widths = [image_width, *channels[1:]]
            make_convolution = convolution_layer(use_equalized_lr, lr_mul)
            self.image_pos_embs = nn.ModuleList([of_image, *map(SinusoidalPositionalEmbedding, channels[1:])])
            self.convs = nn.ModuleList([nn.Identity()])
            for before, after in pairwise(channels):
                convolution = make_convolution(before, after, kernel_size=3, padding=1, stride=2)
                self.convs.append(nn.Sequential(convolution, nn.LeakyReLU(NEGATIVE_SLOPE)))
        else:
            self.image_pos_emb = of_image
        settings: dict[str, Any] = {"use_equalized_lr": use_equalized_lr, "lr_mul": lr_mul}
        self.backbone = nn.ModuleDict()
        for block, width in enumerate(reversed(widths) if reverse_conv else widths):
            attentions = nn.ModuleDict()
            attentions["cross_attention"] = MaskedTransformer(
                latent_dim, self.num_latents, width, attention_latent_dim, num_cross_heads, **settings
            )
            if use_self_attention:
                attentions["self_attention"] = MaskedTransformer(
                    latent_dim, self.num_latents, latent_dim, attention_latent_dim, num_self_heads, **settings
                )
            self.backbone[f"block_{block}"] = attentions
        if use_vae:
            mappers = (nn.Linear(latent_dim, 2 * latent_dim) for _ in range(self.num_latents))
            self.vae_mapper = nn.ModuleList(mappers)

    def forward(self, input: Tensor, segmentation_map: Tensor) -> tuple[Tensor | tuple[Tensor, Tensor], None]:
        """The latents, see ``use_vae``, and None.

        Args:
            input: (B, num_input_channels, height, width).
            segmentation_map: one-hot, (B, num_labels, H, W); of the height and width of the image without
                ``image_conv``.
        """
        latents = self._initial_latents(input)
        levels = self._levels(input, segmentation_map)
        for attentions, (pixels, mask) in zip(self.backbone.values(), levels, strict=True):
            attended = attentions["cross_attention"](latents, pixels, mask, self.return_attention)
            latents = attended[0] if self.return_attention else attended
            if self.use_self_attention:
                latents = attentions["self_attention"](latents, latents, self.latents_mask)
        if self.use_vae:
            mapped = [mapper(latents[:, index]) for index, mapper in enumerate(self.vae_mapper)]
            return torch.stack(mapped, 1).chunk(2, -1), None
        return latents, None

    def _initial_latents(self, image: Tensor) -> Tensor:
        if self.type_of_initial_latents == "random":
            return torch.randn(len(image), self.num_latents, self.latent_dim, dtype=image.dtype, device=image.device)
        latents = self.latents.to(image) if self.type_of_initial_latents == "fixed_random" else self.latents
        return latents.expand(len(image), -1, -1) * self.lr_mul

    def _levels(self, image: Tensor, segmentation_map: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What each block attends to, (B, n, width), and its mask (B, m, n)."""
        if not self.image_conv:
            pixels = self.image_pos_emb(image).flatten(2).transpose(1, 2)
            return [(pixels, self._mask(segmentation_map))] * len(self.backbone)
        levels, sizes = [], []
        for convolution, embedding in zip(self.convs, self.image_pos_embs, strict=True):
            image = convolution(image)
            sizes.append(image.shape[2:])
            resized = F.interpolate(segmentation_map, size=image.shape[2:], mode="nearest")
            levels.append((embedding(image).flatten(2).transpose(1, 2), self._mask(resized)))
        if self.return_attention:
            self.image_sizes = sizes
        return levels[::-1] if self.reverse_conv else levels

    def _mask(self, segmentation_map: Tensor) -> Tensor:
        return planes_of_latents(segmentation_map, self.num_latents_bg, self.num_latent_per_labels).flatten(2)
