"""Calls of the operators on feature maps: their inputs, what must come out, and who else computes something like it.

* ``ours``: the operator, on a label map whose plan is remembered. ``ours + plan``: a new map in every call.
* ``instance_norm``: of the same feature map, the yardstick. Its backward gives the gradient of the map alone.
* ``copy``: of the feature map into memory that is already there: one read and one write. What the operators must move
  is, in copies: ``semantic_pool`` half a one forward (one read), and one more backward; ``semantic_modulate`` one and a
  half forward (two reads, one write), and two and a half more backward (map and incoming gradient twice, one write).
* ``dense``: the same formula on the same folded rows with a mask of all pairs, which is made beforehand.
  ``compiled``: that under ``torch.compile``. ``autocast``: that under autocast to bfloat16, and so less exact.
* ``loop``: over the labels, each with its own pixels, which are put into order and back with ``index_select``; which
  pixels belong to a label is found beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sca_kernels import LabelMap, LatentLayout, semantic_modulate, semantic_pool

from .dense import blocked_pairs
from .timing import Contender

Rows = Mapping[str, Tensor]
Compute = Callable[[Tensor, Rows], tuple[Tensor, ...]]

EPS = 1e-5
NEGATIVE_SLOPE = 0.2

# Channels and side of the feature maps of the published models at 256 x 256.
SHAPES = ((64, 256), (128, 128), (256, 64), (512, 32), (1024, 16), (1024, 8))


@dataclass(frozen=True)
class Sizes:
    """Of a feature map: channels, latents of each label, type, and order in memory."""

    channels: int = 64
    latents: int = 8
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def describe(self) -> str:
        order = "channels last" if self.channels_last else "NCHW"
        return f"k = {self.latents}, {order}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Problem:
    """One call to compute, for one image and one head.

    Attributes:
        operator: ``semantic_pool`` or ``semantic_modulate``.
        x: (1, C, height, width).
        rows: every other tensor that takes a gradient, by the name of its argument.
        noise: (1, 1, height, width), which takes none.
        gradients: those that backward starts from, one for each result.
        labels: of the pixels, with its plan.
        layout: of the latents.
    """

    operator: str
    x: Tensor
    rows: Rows
    noise: Tensor
    gradients: tuple[Tensor, ...]
    labels: LabelMap
    layout: LatentLayout
    _expected: dict[bool, tuple[Tensor, ...]] = field(default_factory=dict, init=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def shape(self) -> dict[str, int]:
        """What a result is recorded with."""
        _, channels, height, width = self.x.shape
        return {
            "channels": channels,
            "height": height,
            "width": width,
            "latents_per_label": self.layout.max_per_label,
            "labels": self.layout.num_labels,
            "labels_present": int(torch.unique(self.labels.labels).numel()),
            "bytes": self.x.nbytes,
        }

    def task(self, compute: Compute, backward: bool) -> Callable[[], tuple[Tensor, ...]]:
        """A function that computes the results, with ``backward`` also the gradients of x and of all rows."""
        if not backward:
            return lambda: compute(self.x, self.rows)
        x = self.x.detach().requires_grad_()
        rows = {name: row.detach().requires_grad_() for name, row in self.rows.items()}
        leaves = [x, *rows.values()]

        def forward_and_backward() -> tuple[Tensor, ...]:
            results = compute(x, rows)
            return *(result.detach() for result in results), *torch.autograd.grad(results, leaves, self.gradients)

        return forward_and_backward

    def in_float64(self) -> Problem:
        return replace(
            self,
            x=self.x.double(),
            rows={name: row.double() for name, row in self.rows.items()},
            noise=self.noise.double(),
            gradients=tuple(gradient.double() for gradient in self.gradients),
        )

    def expected(self, backward: bool) -> tuple[Tensor, ...]:
        """The results in float64, with ``backward`` also the gradients; computed once."""
        if True not in self._expected:
            exact = self.in_float64()
            self._expected[True] = exact.task(by_label(exact), backward=True)()
        return self._expected[True][: None if backward else len(self.gradients)]

    def entry(self, name: str, compute: Compute, backward: bool) -> Contender:
        """A way to compute it as a contender."""
        return Contender(name, self.task(compute, backward), self.expected(backward), self.shape)


def problem(operator: str, labels: Tensor, num_labels: int, sizes: Sizes) -> Problem:
    """A call with random features and rows for (1, height, width) labels."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    _, height, width = labels.shape
    channels = sizes.channels
    layout = LatentLayout.uniform(num_labels, sizes.latents)
    memory_format = torch.channels_last if sizes.channels_last else torch.contiguous_format

    def feature_map(offset: float) -> Tensor:
        return (random(1, channels, height, width) + offset).to(sizes.dtype).contiguous(memory_format=memory_format)

    latents = (1, 1, layout.count)
    # Logits of about unit variance.
    queries = random(*latents, channels) * channels**-0.5
    biases = {"row_bias": random(*latents, height), "col_bias": random(*latents, width)}
    if operator == "semantic_pool":
        rows = {"queries": queries, **biases}
        shapes = [(*latents, channels), (*latents, height), (*latents, width), (1, channels), (1, channels)]
        gradients = tuple(random(*shape) for shape in shapes)
    else:
        rows = {
            "keys": queries,
            "scale": random(*latents, channels) * 0.3,
            "shift": random(*latents, channels) * 0.3,
            "key_bias": random(*latents),
            **biases,
            "scale_bias": random(channels) * 0.1,
            "shift_bias": random(channels) * 0.1,
            "noise_strength": random(channels) * 0.1,
        }
        gradients = (feature_map(0.0),)
    made = Problem(
        operator=operator,
        x=feature_map(0.5),
        rows=rows,
        noise=random(1, 1, height, width),
        gradients=gradients,
        labels=LabelMap(labels, num_labels).planned(),
        layout=layout,
    )
    if operator == "semantic_modulate":
        exact = made.in_float64()
        (out,) = modulate_by_label(exact)(exact.x, exact.rows)
        without_gradient_at_kinks(gradients[0], out)
    return made


def without_gradient_at_kinks(gradient: Tensor, out: Tensor) -> None:
    """Clears the gradient of results so close to zero that rounding may put them on the other side of the kink."""
    gradient.masked_fill_(out.abs() < 1e-4, 0)


def noticeable(gradients: Sequence[Tensor]) -> list[int]:
    """Which of the exact gradients are not zero up to rounding.

    That of a key's bias always is, which softmax does not see; and that of queries where every label has one pixel.
    """
    return [index for index, gradient in enumerate(gradients) if gradient.abs().max() > 1e-10]


def ours(problem: Problem, *, plan_counted: bool = False) -> Compute:
    """The operator of this library. The log-sum-exp is left out of the results: it may be infinite."""
    layout, noise = problem.layout, problem.noise

    def labels() -> LabelMap:
        return LabelMap(problem.labels.labels, problem.labels.num_labels) if plan_counted else problem.labels

    def pool(x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        pooled, _, *others = semantic_pool(x=x, layout=layout, labels=labels(), **rows)
        return pooled, *others

    def modulate(x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        return (
            semantic_modulate(
                x, layout=layout, labels=labels(), noise=noise, eps=EPS, negative_slope=NEGATIVE_SLOPE, **rows
            ),
        )

    return pool if problem.operator == "semantic_pool" else modulate


def instance_norm(problem: Problem, backward: bool) -> Contender:
    """Instance norm of the same feature map.

    Its gradient starts from one in NCHW memory, whatever the map's: for B = 1 on a CPU it would be wrong otherwise
    (PyTorch 2.13).
    """
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(problem.x.shape, generator=generator).to(problem.dtype)

    def task(normalise: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        if not backward:
            return lambda: (normalise(x),)
        leaf = x.detach().requires_grad_()

        def forward_and_backward() -> tuple[Tensor, ...]:
            out = normalise(leaf)
            return out.detach(), *torch.autograd.grad(out, leaf, gradient)

        return forward_and_backward

    expected = task(_normalised, problem.x.double(), gradient.double())()
    return Contender(
        "instance_norm", task(lambda x: F.instance_norm(x, eps=EPS), problem.x, gradient), expected, problem.shape
    )


def copy(problem: Problem) -> Contender:
    target = torch.empty_like(problem.x)
    return Contender("copy", lambda: (target.copy_(problem.x),), (problem.x,), problem.shape)


def masked_bytes(problem: Problem) -> int:
    """What the tables of all pairs of ``dense`` take: mask, logits, masked logits and weights."""
    pairs = problem.noise.numel() * problem.layout.count
    return pairs * (3 * torch.float32.itemsize + 1)


def dense(problem: Problem) -> Compute:
    """The operator in plain PyTorch with a mask of all pairs."""
    pixel_labels, latent_labels = problem.labels.labels.flatten(1), problem.layout.labels(problem.x.device)[None]
    height, width = problem.x.shape[2:]
    blocked = blocked_pairs(latent_labels, pixel_labels)

    def logits(x: Tensor, rows: Rows, keys: str) -> Tensor:
        of_latents: Tensor = (rows[keys] @ x.flatten(2).unsqueeze(1)).unflatten(-1, (height, width))
        biased = of_latents + rows["row_bias"].unsqueeze(-1) + rows["col_bias"].unsqueeze(-2)
        return biased.flatten(-2)

    def pool(x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        weights = logits(x, rows, "queries").masked_fill(blocked, -1e4).softmax(-1)
        pooled = weights @ x.flatten(2).mT.unsqueeze(1)
        by_place = weights.unflatten(-1, (height, width))
        variance, mean = torch.var_mean(x, (2, 3), correction=0)
        return pooled, by_place.sum(-1), by_place.sum(-2), mean, variance

    def modulate(x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        of_latents = logits(x, rows, "keys") + rows["key_bias"].unsqueeze(-1)
        weights = of_latents.masked_fill(blocked, -1e4).softmax(-2)
        gamma, beta = (
            (rows[name].mT @ weights).squeeze(1).unflatten(-1, (height, width)) for name in ("scale", "shift")
        )
        gamma = 1 + gamma + rows["scale_bias"][:, None, None]
        beta = beta + rows["shift_bias"][:, None, None]
        out = gamma * F.instance_norm(x, eps=EPS) + beta + rows["noise_strength"][:, None, None] * problem.noise
        return (F.leaky_relu(out, NEGATIVE_SLOPE),)

    return pool if problem.operator == "semantic_pool" else modulate


def by_label(problem: Problem) -> Compute:
    """The operator one label at a time."""
    return pool_by_label(problem) if problem.operator == "semantic_pool" else modulate_by_label(problem)


def pool_by_label(problem: Problem) -> Compute:
    """``semantic_pool`` one label at a time: what float64 can afford, and a rival."""
    height, width = problem.x.shape[2:]
    grouped = _PixelsByLabel.of(problem)

    def pool(x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        features = x[0].flatten(1)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for pixels, members, latents in grouped.each(features):
            row, column = pixels // width, pixels % width
            if pixels.numel() == 0:
                count = rows["queries"][0, 0, latents].shape[0]
                equal = features.new_ones(count, 1)
                parts.append(
                    (equal * features.mean(1), equal.expand(-1, height) / height, equal.expand(-1, width) / width)
                )
                continue
            logits = rows["queries"][0, 0, latents] @ members
            logits = logits + rows["row_bias"][0, 0, latents][:, row] + rows["col_bias"][0, 0, latents][:, column]
            weights = logits.softmax(-1)
            row_mass = weights.new_zeros(len(weights), height).index_add(1, row, weights)
            col_mass = weights.new_zeros(len(weights), width).index_add(1, column, weights)
            parts.append((weights @ members.mT, row_mass, col_mass))
        pooled, row_mass, col_mass = (torch.cat(of_labels)[None, None] for of_labels in zip(*parts, strict=True))
        variance, mean = torch.var_mean(x, (2, 3), correction=0)
        return pooled, row_mass, col_mass, mean, variance

    return pool


def modulate_by_label(problem: Problem) -> Compute:
    """``semantic_modulate`` one label at a time: what float64 can afford, and a rival.

    Every pixel has a label with latents.
    """
    width = problem.x.shape[3]
    grouped = _PixelsByLabel.of(problem)

    def modulate(x: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        gammas, betas = [], []
        for pixels, members, latents in grouped.each(x[0].flatten(1)):
            keys, scale, shift, key_bias = (
                rows[name][0, 0, latents] for name in ("keys", "scale", "shift", "key_bias")
            )
            logits = keys @ members + key_bias[:, None]
            logits = logits + rows["row_bias"][0, 0, latents][:, pixels // width]
            logits = logits + rows["col_bias"][0, 0, latents][:, pixels % width]
            weights = logits.softmax(0)
            gammas.append(scale.mT @ weights)
            betas.append(shift.mT @ weights)
        gamma, beta = (
            torch.cat(parts, 1).index_select(1, grouped.places).view_as(x) + rows[bias][:, None, None]
            for parts, bias in ((gammas, "scale_bias"), (betas, "shift_bias"))
        )
        out = (1 + gamma) * _normalised(x) + beta
        out = out + rows["noise_strength"][:, None, None] * problem.noise
        return (F.leaky_relu(out, NEGATIVE_SLOPE),)

    return modulate


def _normalised(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    return (x - mean) * (variance + EPS).rsqrt()


@dataclass(frozen=True)
class _PixelsByLabel:
    """The pixels of one image in the order of their labels.

    Attributes:
        order: (n), the pixels sorted by label.
        places: (n), where each pixel is in that order.
        counts: pixels of each label.
        cu_latents: prefix sums of the latents of each label.
    """

    order: Tensor
    places: Tensor
    counts: Sequence[int]
    cu_latents: Sequence[int]

    @classmethod
    def of(cls, problem: Problem) -> _PixelsByLabel:
        labels = problem.labels.labels.flatten().long()
        order = labels.argsort(stable=True)
        counts = labels.bincount(minlength=problem.layout.num_labels).tolist()
        return cls(order, order.argsort(), counts, problem.layout.cu_latents)

    def each(self, features: Tensor) -> list[tuple[Tensor, Tensor, slice]]:
        """Of each label its pixels, their (C, n) features, and its latents."""
        pixels = self.order.split(self.counts)
        members = features.index_select(1, self.order).split(self.counts, 1)
        latents = [slice(*bounds) for bounds in zip(self.cu_latents[:-1], self.cu_latents[1:], strict=True)]
        return list(zip(pixels, members, latents, strict=True))
