"""What each way to compute a call costs, and which is the fastest."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any, Literal

from ..labels import tile_size
from ..tracing import is_tracing

LogitsOrder = Literal["chain", "product"]
ValuesOrder = Literal["chain", "out", "all"]


@dataclass(frozen=True)
class FoldingProblem:
    """The sizes that decide how a call is best computed.

    Attributes:
        use: "pool": latents attend to pixels; "attend": pixels to latents; "modulate": the same, on to gamma, beta
            and the modulated features.
        images, height, width, channels: of the features.
        encoding: channels of the positional encoding, 0 for none.
        concatenated: whether they follow those of the features.
        layout_latents: latents m of an image.
        latents: of them those whose labels are present, as far as is known or assumed.
        latents_per_label: on average.
        latent_dim: width of a latent.
        attention_dim: width d of queries, keys and values, all heads together.
        num_heads: number of heads.
        weights_grad, latents_grad, features_grad: what takes gradients.
        cached: whether products of weights alone are remembered and cost nothing.
        foldable: whether the result has as many channels as the features, as the folded kernels need it.
        device: type of the device.
    """

    use: Literal["pool", "attend", "modulate"]
    images: int
    height: int
    width: int
    channels: int
    layout_latents: int
    latents: int
    latent_dim: int
    attention_dim: int
    num_heads: int = 1
    latents_per_label: float = 8.0
    encoding: int = 0
    concatenated: bool = False
    weights_grad: bool = False
    latents_grad: bool = False
    features_grad: bool = False
    cached: bool = False
    foldable: bool = True
    device: str = "cpu"

    @property
    def constant(self) -> tuple[Any, ...]:
        """All fields in their order, symbolic sizes made constants: the way of a compiled call depends on them."""
        values = (getattr(self, name) for name in _FIELDS)
        return tuple(operator.index(value) if type(value) not in (str, bool, float) else value for value in values)


_FIELDS = tuple(entry.name for entry in fields(FoldingProblem))


@dataclass(frozen=True)
class FoldingChoice:
    """One way to compute a call.

    Attributes:
        folded: whether the projections are folded onto the latents; otherwise the pixels are projected.
        logits: how folded rows of the logits are made: "chain", W_q^T (W_k z), or "product", (W_q^T W_k) z.
        values: in which order the layers behind the attention are applied to v: "chain", one after the other; "out",
            those behind the value's as one product; "all", the value's included.
        selects: whether only the latents of labels that are present are folded, or projected.
        seconds: the estimated time.
    """

    folded: bool
    logits: LogitsOrder = "chain"
    values: ValuesOrder = "chain"
    selects: bool = False
    seconds: float = field(default=0.0, compare=False)


Choice = FoldingChoice | Literal["auto", "folded", "projected"]


@dataclass(frozen=True)
class Rates:
    """What work costs on a device, in seconds. A pair is for the forward pass, and for both passes together.

    Attributes:
        cores: that share the work.
        multiply_add: of a product of matrices, on all cores.
        number: read or written by a product, or by an operation element by element, on all cores.
        call: of a product or another operation, whatever its size.
        select: to find the present labels, to pick their latents and to put them back.
        kernel: of a kernel that reads the feature map, whatever its size. The rest is what one core takes for it.
        pool, modulate, normalise: of one number of the feature map in :func:`sca_kernels.semantic_pool`,
            :func:`sca_kernels.semantic_modulate` and :func:`sca_kernels.instance_modulate`, whatever the latents.
        pool_latent, modulate_latent: in addition for each latent of a label and each head.
        pool_segment, modulate_segment: of one number of a folded row for each tile in which its label occurs.
        attend: of one number of the projected pixels and one latent of its label, in
            :func:`sca_kernels.semantic_cross_attention`.
    """

    cores: int
    multiply_add: float
    number: float
    call: float
    select: tuple[float, float]
    kernel: tuple[float, float]
    pool: tuple[float, float]
    pool_latent: tuple[float, float]
    pool_segment: tuple[float, float]
    modulate: tuple[float, float]
    modulate_latent: tuple[float, float]
    modulate_segment: tuple[float, float]
    normalise: tuple[float, float]
    attend: tuple[float, float]


# Measured on 2 cores of an EPYC with AVX-512, float32. Devices that have no entry use that of "cpu".
RATES = {
    "cpu": Rates(
        cores=2,
        multiply_add=5e-12,
        number=2.1e-10,
        call=3.3e-5,
        select=(2.4e-4, 1e-3),
        kernel=(2.5e-5, 1.4e-4),
        pool=(3.7e-10, 1.4e-9),
        pool_latent=(4.3e-11, 2.4e-10),
        pool_segment=(5.8e-10, 5.1e-9),
        modulate=(1e-9, 3.8e-9),
        modulate_latent=(2.8e-11, 1.3e-10),
        modulate_segment=(1e-10, 6.8e-9),
        normalise=(1e-10, 5e-10),
        attend=(2.2e-11, 4.4e-10),
    ),
}


class _Work:
    """Adds up the time of matrix products and operations element by element."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self.seconds = 0.0

    def product(self, rows: float, inner: int, outer: int, *grads: bool) -> None:
        """(rows, inner) times (inner, outer); each factor that takes a gradient is one more product."""
        products = 1 + sum(grads)
        work = rows * inner * outer * self.rates.multiply_add
        memory = (rows * inner + inner * outer + rows * outer) * self.rates.number
        self.seconds += products * (work + memory + self.rates.call)

    def elements(self, numbers: float, grad: bool) -> None:
        """An operation element by element, and its gradient."""
        self.seconds += (1 + grad) * (numbers * self.rates.number + self.rates.call)

    def kernel(self, core_seconds: float, tiles: int, grad: bool) -> None:
        """A kernel that reads the feature map in tiles, each of which one core takes."""
        self.seconds += self.rates.kernel[grad] + core_seconds / max(1, min(self.rates.cores, tiles))


def estimate(problem: FoldingProblem) -> list[FoldingChoice]:
    """All ways to compute a call and their estimated times, the fastest first.

    The multiply-adds of every matrix product are counted, with those of the backward pass where gradients are taken:
    one more product for each factor that takes one. With R rows (all latents, or those of labels that are present), n
    pixels, C channels (Ct with a concatenated encoding), d, D = latent_dim, H heads and T = 2 further layers
    ("modulate") or none:

        folded logits     chain     R D d + R d Ct
                          product   R H D Ct                          and once  d Ct D
        folded values     chain     R D d + R d C + T R H C C
        (onto latents)    out       R D d + T R d C                   and once  T C C d
                          all       R H D C (times T if any)          and once  d C D (times T, and T C C d if any)
        folded values     chain     R d Ct + R d D
        (from pixels)     all       R H D Ct                          and once  d Ct D
        encoding          R H E (height + width), twice for "pool"
        projected         n Ct d and 2 R D d for "attend" and "modulate", then the output layer and the further ones
                          on n pixels: chain n d C + n T C C, or out n T C d, and once T C C d; 2 n Ct d and 2 R D d
                          for "pool", the output layer on R rows included

    What is done once is free where it is remembered. A product also costs the time to read and write its matrices,
    and a call. The kernels that read the pixels do little arithmetic for each number: their time is counted by number
    of the feature map, and by the folded rows that each tile of the image needs. All constants are in :data:`RATES`.

    Example:
        >>> sizes = dict(layout_latents=152, latents=152, latent_dim=256, attention_dim=256)
        >>> estimate(FoldingProblem("modulate", images=1, height=256, width=256, channels=64, **sizes))[0].folded
        True
        >>> estimate(FoldingProblem("modulate", images=1, height=4, width=4, channels=1024, **sizes))[0].folded
        False
    """
    rates = RATES.get(problem.device, RATES["cpu"])
    choices = []
    logits: tuple[LogitsOrder, ...] = ("chain", "product")
    values: tuple[ValuesOrder, ...] = ("chain", "out", "all") if problem.use == "modulate" else ("chain", "all")
    for selects in (False, True) if problem.latents < problem.layout_latents else (False,):
        rows = problem.images * (problem.latents if selects else problem.layout_latents)
        any_grad = problem.weights_grad or problem.latents_grad or problem.features_grad
        select = rates.select[any_grad] if selects else 0.0
        for before, behind in product(logits, values) if problem.foldable else ():
            seconds = select + _folded_seconds(problem, rows, rates, before, behind)
            choices.append(FoldingChoice(True, before, behind, selects, seconds))
        for behind in values[:-1]:
            seconds = select + _projected_seconds(problem, rows, rates, behind)
            choices.append(FoldingChoice(False, "chain", behind, selects, seconds))
    return sorted(choices, key=lambda choice: choice.seconds)


def _folded_seconds(problem: FoldingProblem, rows: int, rates: Rates, logits: str, values: str) -> float:
    work = _Work(rates)
    width, d, heads = problem.latent_dim, problem.attention_dim, problem.num_heads
    channels = problem.channels
    encoded = channels + problem.encoding if problem.concatenated else channels
    weights_grad, latents_grad = problem.weights_grad, problem.latents_grad
    rows_grad = weights_grad or latents_grad

    def once(inner: int, outer: int, count: float) -> None:
        if not problem.cached:
            work.product(count, inner, outer, weights_grad, weights_grad)

    if logits == "chain":
        work.product(rows, width, d, latents_grad, weights_grad)
        work.product(rows, d, encoded, rows_grad, weights_grad)
    else:
        once(d, width, encoded)
        for _ in range(heads):
            work.product(rows, width, encoded, latents_grad, weights_grad)
    if problem.encoding:
        for size in (problem.height, problem.width):
            work.product(rows * heads, problem.encoding, size, rows_grad)

    numbers = problem.images * problem.height * problem.width * channels
    training = rows_grad or problem.features_grad
    per_number = heads * problem.latents_per_label
    tiles, segments = _tiles_and_segments(problem)
    if problem.use == "pool":
        seconds = numbers * (rates.pool[training] + per_number * rates.pool_latent[training])
        seconds += segments * per_number * channels * rates.pool_segment[training]
        work.kernel(seconds, tiles, training)
        pooled_grad = rows_grad or problem.features_grad
        if problem.encoding:
            for size in (problem.height, problem.width):
                work.product(rows * heads, size, problem.encoding, pooled_grad)
        if values == "chain":
            work.product(rows, encoded, d, pooled_grad, weights_grad)
            work.product(rows, d, width, pooled_grad, weights_grad)
        else:
            once(d, encoded, width)
            for _ in range(heads):
                work.product(rows, encoded, width, pooled_grad, weights_grad)
        return work.seconds

    seconds = numbers * (rates.modulate[training] + per_number * rates.modulate_latent[training])
    seconds += segments * per_number * channels * rates.modulate_segment[training]
    work.kernel(seconds, tiles, training)
    tails = 2 if problem.use == "modulate" else 0
    if values == "all":
        for _ in range(tails):
            once(channels, d + 1, channels)
        for _ in range(max(tails, 1)):
            once(d, width, channels)
            for _ in range(heads):
                work.product(rows, width, channels, latents_grad, weights_grad)
        return work.seconds
    work.product(rows, width, d, latents_grad, weights_grad)
    if values == "out":
        for _ in range(tails):
            once(channels, d + 1, channels)
            work.product(rows, d, channels, rows_grad, weights_grad)
        return work.seconds
    work.product(rows, d, channels, rows_grad, weights_grad)
    for _ in range(tails * heads):
        work.product(rows, channels, channels, rows_grad, weights_grad)
    return work.seconds


def _tiles_and_segments(problem: FoldingProblem) -> tuple[int, float]:
    """In how many tiles the feature maps are walked, and how many labels they hold, added up over the tiles.

    Labels are assumed to lie in smooth regions, about three for each label that is present.
    """
    tile_height, tile_width = tile_size(problem.height, problem.width)
    tiles = problem.images * -(-problem.height // tile_height) * -(-problem.width // tile_width)
    pixels = problem.images * problem.height * problem.width
    in_tile = pixels / max(tiles, 1)
    present = problem.latents / max(problem.latents_per_label, 1.0)
    regions = 3 * present * problem.images
    met = (1 + (regions * in_tile / max(pixels, 1)) ** 0.5) ** 2
    return tiles, tiles * min(present, in_tile, met)


def _projected_seconds(problem: FoldingProblem, rows: int, rates: Rates, values: str) -> float:
    work = _Work(rates)
    pixels = problem.images * problem.height * problem.width
    width, d, channels = problem.latent_dim, problem.attention_dim, problem.channels
    encoded = channels + problem.encoding if problem.concatenated else channels
    weights_grad, latents_grad, features_grad = problem.weights_grad, problem.latents_grad, problem.features_grad
    any_grad = weights_grad or latents_grad or features_grad

    tiles, _ = _tiles_and_segments(problem)
    work.elements(2 * pixels * encoded, features_grad)
    work.kernel(pixels * d * problem.latents_per_label * rates.attend[any_grad], tiles, any_grad)
    if problem.use == "pool":
        work.product(rows, width, d, latents_grad, weights_grad)
        for _ in range(2):
            work.product(pixels, encoded, d, features_grad, weights_grad)
        work.product(rows, d, width, any_grad, weights_grad)
        return work.seconds

    work.product(pixels, encoded, d, features_grad, weights_grad)
    for _ in range(2):
        work.product(rows, width, d, latents_grad, weights_grad)
    tails = 2 if problem.use == "modulate" else 0
    if values == "out":
        for _ in range(tails):
            if not problem.cached:
                work.product(channels, channels, d + 1, weights_grad, weights_grad)
            work.product(pixels, d, channels, any_grad, weights_grad)
    else:
        work.product(pixels, d, channels, any_grad, weights_grad)
        for _ in range(tails):
            work.product(pixels, channels, channels, any_grad, weights_grad)
    if tails:
        work.kernel(pixels * channels * rates.normalise[any_grad], channels, any_grad)
    return work.seconds


def choose(problem: FoldingProblem, choice: Choice = "auto") -> FoldingChoice:
    """The fastest way by :func:`estimate`, the fastest of those that fold or project, or the one that is given.

    Compiled for symbolic sizes, only a way that is given keeps them symbolic.

    Example:
        >>> widths = dict(latent_dim=256, attention_dim=256)
        >>> problem = FoldingProblem("pool", 1, 4, 4, 1024, layout_latents=152, latents=80, **widths)
        >>> choose(problem).folded, choose(problem, "folded").folded
        (False, True)

    Raises:
        ValueError: if ``choice`` is none of the above, or cannot be had.
    """
    if isinstance(choice, FoldingChoice):
        if choice.folded and not problem.foldable:
            raise ValueError("choice: expected a projected way, since the result has other channels than x")
        return choice
    if choice not in ("auto", "folded", "projected"):
        raise ValueError(f"choice: expected 'auto', 'folded', 'projected' or a FoldingChoice, got {choice!r}")
    if is_tracing():
        # Here, because the module imports TorchDynamo, which takes seconds.
        from .traced_cost import choose_while_tracing

        return FoldingChoice(*choose_while_tracing(choice, *problem.constant))
    key = (problem, choice)
    found = _choices.get(key)
    if found is None:
        if len(_choices) >= _MOST_CHOICES:
            _choices.clear()
        found = _choices[key] = fastest(problem, choice)
    return found


def fastest(problem: FoldingProblem, choice: str) -> FoldingChoice:
    """:func:`choose` for one of its words, without remembering."""
    for way in estimate(problem):
        if choice == "auto" or way.folded == (choice == "folded"):
            return way
    raise ValueError("choice: expected a projected way, since the result has other channels than x")


_MOST_CHOICES = 4096
_choices: dict[tuple[FoldingProblem, str], FoldingChoice] = {}
