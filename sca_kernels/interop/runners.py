"""What takes the place of ``forward`` in a published module."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..folding import FoldingCache, latents_attend_to_latents, latents_attend_to_pixels, pixels_attend_to_latents
from ..labels import LatentLayout
from ..nn.attention import update_by_latents, update_by_pixels
from ..nn.encoding import encoding_of
from ..nn.layers import NEGATIVE_SLOPE
from ..nn.modulation import modulate
from . import obstacles
from .masks import Planes, Regions, Sides, find_regions, find_sides, giving_up, is_given_up
from .parameters import attention_projections, modulation_layers, transformer_layers
from .recognise import Published

Mask = Tensor | Regions


@dataclass(eq=False)
class Runner:
    """Called in the place of a module's ``forward``.

    It holds the module, so that copies and pickles of the module have runners of their own.

    Attributes:
        module: whose ``forward`` it is.
        layout: of its latents.
        assume_one_hot: whether masks are believed to be one-hot.
        cache: remembers products of weights.
        warned: what has been warned about.
    """

    module: Published
    layout: LatentLayout
    assume_one_hot: bool
    cache: FoldingCache = field(default_factory=FoldingCache, repr=False)
    warned: set[str] = field(default_factory=set, repr=False)
    is_swapped_in: ClassVar[bool] = True
    planes: ClassVar[Planes] = "latents"

    def obstacle(self) -> str | None:
        """Why the module must run its own code."""
        try:
            return obstacles.of_hooks(self.module) or self.obstacle_in_parts()
        except AttributeError as error:  # a part was replaced by something else
            return str(error)

    def obstacle_in_parts(self) -> str | None:
        return None

    @property
    def usable_cache(self) -> FoldingCache | None:
        return None if self.module.training else self.cache

    def own(self, found: Regions | Sides | str | None, *arguments: Any) -> Any:
        """The module's own code; that of all modules inside too, where ``found`` is what is wrong with the mask."""
        if isinstance(found, str) and found not in self.warned:
            self.warned.add(found)
            name = type(self.module).__name__
            warnings.warn(f"{name} runs its own code, not sca_kernels: {found}", UserWarning, stacklevel=2)
        with giving_up() if isinstance(found, str) else nullcontext():
            dense = (value.dense if isinstance(value, Regions) else value for value in arguments)
            return type(self.module).forward(self.module, *dense)

    def read(self, mask: Mask, batch: int) -> Regions | str | None:
        """What the mask says, what is wrong with it, or None if something else speaks for the module's own code."""
        if self.obstacle() is not None:
            return None
        if isinstance(mask, Regions):
            return mask
        if is_given_up() or not isinstance(mask, Tensor) or len(mask) != batch:
            return None
        return find_regions(mask, self.layout, self.planes, assume_one_hot=self.assume_one_hot)


def runner_of(module: nn.Module) -> Runner | None:
    """What was put in the place of the module's ``forward``, if anything."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, Runner) else None


def mask_for(module: nn.Module, regions: Regions) -> Mask:
    """What to hand to a module: regions if it is swapped, and the mask that it knows if not, or if a hook sees it."""
    return regions.dense if runner_of(module) is None or obstacles.is_hooked(module) else regions


class AttentionRunner(Runner):
    """Of ``MaskedAttention``."""

    def obstacle_in_parts(self) -> str | None:
        return obstacles.of_attention(self.module)

    def __call__(
        self, X_to: Tensor, X_from: Tensor, mask_from: Tensor | None = None, return_attention: bool = False
    ) -> Any:
        sides = _read_sides(self, X_to, X_from, mask_from, return_attention)
        if not isinstance(sides, Sides):
            return self.own(sides, X_to, X_from, mask_from, return_attention)
        layers = attention_projections(self.module)
        if sides.labels is None:
            out = latents_attend_to_latents(X_to, self.layout, layers)
        elif sides.latents_attend:
            pixels = _as_image(X_from)
            out = latents_attend_to_pixels(X_to, pixels, self.layout, sides.labels, layers, cache=self.usable_cache).out
        else:
            pixels = _as_image(X_to)
            out = (
                pixels_attend_to_latents(pixels, X_from, self.layout, sides.labels, layers, cache=self.usable_cache)
                .flatten(2)
                .transpose(1, 2)
            )
        return out.to(_linear_type(X_to))


class TransformerRunner(Runner):
    """Of ``MaskedTransformer``."""

    def obstacle_in_parts(self) -> str | None:
        return obstacles.of_transformer(self.module)

    def __call__(self, X_to: Tensor, X_from: Tensor, mask: Tensor | None = None, return_attention: bool = False) -> Any:
        sides = _read_sides(self, X_to, X_from, mask, return_attention)
        if not isinstance(sides, Sides) or not sides.latents_attend:
            return self.own(sides, X_to, X_from, mask, return_attention)
        layers = transformer_layers(self.module, self.usable_cache)
        if sides.labels is None:
            return update_by_latents(X_to, self.layout, layers)
        return update_by_pixels(X_to, _as_image(X_from), self.layout, sides.labels, layers, encoding=None)[0]


class ModulationRunner(Runner):
    """Of ``SCAMModulation``."""

    def obstacle_in_parts(self) -> str | None:
        return obstacles.of_modulation(self.module)

    def __call__(
        self,
        x: Tensor,
        segmentation_map: Mask,
        style_codes: Tensor | None = None,
        content_code: Tensor | None = None,
        *,
        twice: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """``twice``: whether to apply the leaky ReLU again, which otherwise the convolution behind does."""
        regions = self.read(segmentation_map, len(x))
        if not isinstance(regions, Regions) or style_codes is None or not self._fits(x, style_codes):
            out, style_codes = self.own(regions, x, segmentation_map, style_codes, content_code)
            return F.leaky_relu(out, NEGATIVE_SLOPE) if twice else out, style_codes
        slope = NEGATIVE_SLOPE**2 if twice else NEGATIVE_SLOPE
        layers = modulation_layers(self.module, self.layout, self.usable_cache, slope)
        noise = None
        if layers.noise_strength is not None:
            batch, _, height, width = x.shape
            noise = torch.randn((batch, width, height, 1), device=x.device).transpose(1, 3)
        out, style_codes = modulate(x, regions.labels, style_codes, layers, noise=noise)
        # Another swapped module hands the features to a convolution, which takes them in any type under autocast.
        return out if regions is segmentation_map else out.to(self._result_type(x)), style_codes

    def _fits(self, x: Tensor, latents: Tensor) -> bool:
        """Whether the formulas say the same of these shapes; the own code has its errors for others."""
        module = self.module
        if x.dim() != 4 or latents.dim() != 3 or x.shape[1] != module.mlp_lti_gamma.weight.shape[0]:
            return False
        over_pixels = x.shape[2] * x.shape[3]
        if module.norm_type == "BatchNorm":
            over_pixels *= len(x) if module.training else 2
        expected = (len(x), self.layout.count)
        return latents.shape[:2] == expected and (over_pixels > 1 or module.norm_type == "LayerNorm")

    def _result_type(self, x: Tensor) -> torch.dtype:
        """That of the published expression, which adds noise and the mask's gamma in the type of their parameters."""
        module = self.module
        dtype = x.dtype
        if module.norm_type == "LayerNorm" and x.is_cuda and torch.is_autocast_enabled("cuda"):
            dtype = torch.promote_types(dtype, torch.float32)  # there, and not on a CPU, it is one of the casts
        if module.modulate:
            dtype = torch.promote_types(dtype, _linear_type(module.mlp_lti_gamma.weight))
            if module.use_mask_adain:
                dtype = torch.promote_types(dtype, module.blending_gamma.dtype)
        if module.add_noise:
            dtype = torch.promote_types(dtype, module.noise_var.dtype)
            dtype = torch.promote_types(dtype, torch.get_default_dtype())
        return dtype


class ToRGBRunner(Runner):
    """Of ``ToRGB``."""

    def __call__(
        self,
        x: Tensor,
        segmentation_map: Mask,
        style_codes: Tensor | None = None,
        previous_rgb: Tensor | None = None,
    ) -> Tensor:
        module = self.module
        if module.modulate_fmap:
            regions = self.read(segmentation_map, len(x))
            if not isinstance(regions, Regions):
                return self.own(regions, x, segmentation_map, style_codes, previous_rgb)
            x, _ = module.mod_rgb(x, mask_for(module.mod_rgb, regions), style_codes=style_codes)
        rgb = module.conv_rgb(x)
        return rgb if previous_rgb is None else rgb + previous_rgb


class BlockRunner(Runner):
    """Of ``SCAMResUpscale``."""

    def __call__(
        self,
        x: Tensor,
        segmentation_map: Mask,
        style_codes: Tensor | None = None,
        content_code: Tensor | None = None,
        previous_rgb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        regions = self.read(segmentation_map, len(x))
        if not isinstance(regions, Regions):
            return self.own(regions, x, segmentation_map, style_codes, content_code, previous_rgb)
        module = self.module
        # Resized once for all modulations: what is compiled remembers no label maps.
        smaller, larger = regions.at(*x.shape[2:]), None
        residual = None
        if module.architecture == "resnet":
            residual = module.up(x)
            larger = regions.at(*residual.shape[2:])
            codes = {"style_codes": style_codes, "content_code": content_code}
            residual, _ = module.mod_res(residual, mask_for(module.mod_res, larger), **codes)
            residual = module.conv_res(residual)
        x, style_codes = _modulate_and_convolve(
            module.mod_0, module.conv_0, x, smaller, style_codes=style_codes, content_code=content_code
        )
        x = module.up(x)
        larger = regions.at(*x.shape[2:]) if larger is None else larger
        x, style_codes = _modulate_and_convolve(
            module.mod_1, module.conv_1, x, larger, style_codes=style_codes, content_code=content_code
        )
        if residual is not None:
            x = (residual + x) * 2**-0.5
        rgb = None
        if module.architecture == "skip" or module.last_block:
            previous_rgb = None if previous_rgb is None else module.up(previous_rgb)
            rgb = module.torgb(x, mask_for(module.torgb, larger), style_codes, previous_rgb)
        return x, style_codes, rgb


class GeneratorRunner(Runner):
    """Of ``SCAMGenerator``."""

    planes = "labels"

    def __call__(self, segmentation_map: Tensor, style_codes: Any = None, content_code: Tensor | None = None) -> Tensor:
        regions = self.read(segmentation_map, len(segmentation_map))
        if not isinstance(regions, Regions):
            return self.own(regions, segmentation_map, style_codes, content_code)
        module = self.module
        x = module.first_conv(F.interpolate(segmentation_map, size=(module.small_h, module.small_w)))
        latents = self._latents(style_codes, len(segmentation_map))
        rgb = None
        for index in range(len(module.backbone)):
            block = module.backbone[f"SCAM_block_{index}"]
            x, updated, rgb = block(
                x, mask_for(block, regions), style_codes=latents, content_code=content_code, previous_rgb=rgb
            )
            if module.attention_type == "duplex":
                latents = updated
        return module.last_act(rgb)

    def _latents(self, style_codes: Any, batch: int) -> Tensor:
        module = self.module
        if module.use_vae:
            mean, log_variance = style_codes
            style_codes = mean
            if module.training:
                deviation = torch.exp(0.5 * log_variance)
                style_codes = torch.randn_like(deviation).mul(deviation) + mean
        if module.split_latents:
            style_codes = style_codes.view(batch, module.num_labels * module.num_labels_split, -1)
        if module.latent_pos_emb == "fourier":
            return module.style_code_pos_encoding(style_codes.unsqueeze(1)).squeeze(1)
        return module.style_code_pos_encoding(style_codes)


class EncoderRunner(Runner):
    """Of ``SemanticAttentionTransformerEncoder``."""

    planes = "labels"

    def obstacle_in_parts(self) -> str | None:
        return obstacles.of_encoder(self.module)

    def __call__(self, input: Tensor, segmentation_map: Tensor) -> tuple[Any, None]:
        regions = self.read(segmentation_map, len(input))
        module = self.module
        # Without the pyramid the published code does not resize the mask, and fails.
        fits = module.image_conv or input.shape[2:] == segmentation_map.shape[2:]
        if not isinstance(regions, Regions) or not fits:
            return self.own(regions, input, segmentation_map)
        latents = self._initial_latents(input)
        cache = self.usable_cache
        for block, (level, is_image) in zip(module.backbone.values(), self._levels(input), strict=True):
            layers = transformer_layers(block["cross_attention"], cache)
            channels = layers.attention.key.in_features - (level.shape[1] if is_image else 0)
            encoding = encoding_of(level, channels, concatenated=is_image) if channels else None
            latents, _, _ = update_by_pixels(latents, level, self.layout, regions.labels, layers, encoding=encoding)
            if module.use_self_attention:
                latents = update_by_latents(latents, self.layout, transformer_layers(block["self_attention"], cache))
        if module.use_vae:
            mapped = torch.stack([mapper(latents[:, index]) for index, mapper in enumerate(module.vae_mapper)], 1)
            return mapped.to(torch.get_default_dtype()).chunk(2, dim=-1), None
        return latents, None

    def _levels(self, image: Tensor) -> list[tuple[Tensor, bool]]:
        """What each block attends to, and whether it is the image itself."""
        module = self.module
        if not module.image_conv:
            return [(image, True)] * len(module.backbone)
        levels = []
        for index, convolution in enumerate(module.convs):
            image = convolution(image)
            levels.append((image, index == 0))
        return levels[::-1] if module.reverse_conv else levels

    def _initial_latents(self, image: Tensor) -> Tensor:
        module = self.module
        if module.type_of_initial_latents == "random":
            return torch.randn(len(image), module.num_latents, module.latent_dim, device=image.device)
        return module.latents.to(image.device).expand(len(image), -1, -1) * module.lr_mul


def _modulate_and_convolve(
    modulation: nn.Module, convolution: Published, x: Tensor, regions: Regions, **codes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """With one leaky ReLU for two where the convolution begins with another."""
    mask = mask_for(modulation, regions)
    if isinstance(mask, Regions) and obstacles.starts_with_activation(convolution):
        x, latents = modulation(x, mask, **codes, twice=True)
        return convolution[1](x), latents
    x, latents = modulation(x, mask, **codes)
    return convolution(x), latents


def _read_sides(
    runner: Runner, X_to: Tensor, X_from: Tensor, mask: Tensor | None, return_attention: bool
) -> Sides | str | None:
    """Who attends to whom, what is wrong with the mask, or None if something else speaks for the own code."""
    if return_attention or mask is None or is_given_up() or runner.obstacle() is not None:
        return None
    shape = X_to.shape[1], X_from.shape[1]
    if X_to.dim() != 3 or X_from.dim() != 3 or mask.shape[1:] != shape or len(mask) not in (1, len(X_to)):
        return None
    if len(X_from) != len(X_to):
        return None
    return find_sides(mask, runner.layout, itself=X_to is X_from, assume_one_hot=runner.assume_one_hot)


def _as_image(tokens: Tensor) -> Tensor:
    """(B, n, C) to (B, C, 1, n), which copies nothing."""
    return tokens.transpose(1, 2).unsqueeze(2)


def _linear_type(tensor: Tensor) -> torch.dtype:
    """What a linear layer makes of this type."""
    device = tensor.device.type
    is_cast = torch.is_autocast_enabled(device) and tensor.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_cast else tensor.dtype
