"""Folded and projected attention between pixels and latents against the dense formulas in float64."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import published_formulas as published
import pytest
import torch
from tokens import error_ratio, random_map
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sca_kernels
from sca_kernels import LabelMap, LatentLayout
from sca_kernels.folding import (
    AttentionProjections,
    FoldingCache,
    FoldingChoice,
    FoldingProblem,
    Projection,
    SeparableEncoding,
    choose,
    estimate,
    latents_attend_to_latents,
    latents_attend_to_pixels,
    modulate_by_latents,
    pixels_attend_to_latents,
)

LAYOUT = LatentLayout((3, 1, 0, 2, 4))
CHANNELS, ENCODING, LATENT_DIM, ATTENTION_DIM = 8, 4, 6, 12
USES = ("pool", "attend", "modulate")

FOLDED = [
    FoldingChoice(True, logits, values, selects)
    for logits, values, selects in itertools.product(("chain", "product"), ("chain", "out", "all"), (False, True))
]
PROJECTED = [
    FoldingChoice(False, "chain", values, selects)
    for values, selects in itertools.product(("chain", "out"), (False, True))
]


def describe(value: Any) -> str:
    if isinstance(value, FoldingChoice):
        way = "folded" if value.folded else "projected"
        return f"{way}-{value.logits}-{value.values}{'-selects' * value.selects}"
    return str(value)


@dataclasses.dataclass
class Problem:
    """A call with all its parameters, and what the dense formulas make of the same numbers."""

    use: str
    x: Tensor
    latents: Tensor
    labels: LabelMap
    parameters: dict[str, Tensor]
    layout: LatentLayout = LAYOUT
    num_heads: int = 1
    encoding: str | None = None
    lr_mul: float | None = None
    empty: str = "uniform"

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"x": self.x, "latents": self.latents, **self.parameters}

    def to(self, dtype: torch.dtype, features: torch.dtype | None = None) -> Problem:
        """The same numbers in another type, ready to take gradients."""

        def convert(tensor: Tensor, dtype: torch.dtype) -> Tensor:
            return tensor.detach().to(dtype).requires_grad_()

        return dataclasses.replace(
            self,
            x=convert(self.x, features or dtype),
            latents=convert(self.latents, dtype),
            parameters={name: convert(tensor, dtype) for name, tensor in self.parameters.items()},
        )

    def layer(self, name: str) -> Projection:
        weight, bias = self.parameters[f"{name}.weight"], self.parameters.get(f"{name}.bias")
        return Projection(weight, bias) if self.lr_mul is None else Projection.equalised(weight, bias, self.lr_mul)

    def attention(self) -> AttentionProjections:
        query, key, value, out = (self.layer(name) for name in ("query", "key", "value", "out"))
        return AttentionProjections(query, key, value, out, self.num_heads)

    def tables(self) -> SeparableEncoding | None:
        if self.encoding is None:
            return None
        row, col = self.parameters["row"], self.parameters["col"]
        return SeparableEncoding(row, col, concatenated=self.encoding == "concatenated")

    def solve(self, choice: Any = "auto", cache: FoldingCache | None = None) -> Tensor:
        settings: dict[str, Any] = {
            "encoding": self.tables(),
            "empty": self.empty,
            "choice": choice,
            "cache": cache,
        }
        attention = self.attention()
        if self.use == "pool":
            return latents_attend_to_pixels(self.latents, self.x, self.layout, self.labels, attention, **settings).out
        if self.use == "attend":
            return pixels_attend_to_latents(self.x, self.latents, self.layout, self.labels, attention, **settings)
        return modulate_by_latents(
            self.x,
            self.latents,
            self.layout,
            self.labels,
            attention,
            self.layer("gamma"),
            self.layer("beta"),
            noise=NOISE[..., : self.x.shape[2], : self.x.shape[3]],
            noise_strength=self.parameters["noise_strength"],
            **settings,
        )

    def expected(self) -> Tensor:
        encoding = None
        if self.encoding is not None:
            row, col = self.parameters["row"], self.parameters["col"]
            encoding = row.t().unsqueeze(2) + col.t().unsqueeze(1)
        pixels = published.pixel_tokens(self.x, encoding, self.encoding == "concatenated")
        allowed = published.mask(self.labels, self.layout, len(self.x))
        settings: dict[str, Any] = {"empty": self.empty, "lr_mul": self.lr_mul}
        if self.use == "pool":
            return published.attention(
                self.latents, pixels, allowed.transpose(1, 2), self.parameters, self.num_heads, **settings
            )
        attended = published.attention(pixels, self.latents, allowed, self.parameters, self.num_heads, **settings)
        if self.use == "attend":
            return attended.transpose(1, 2).unflatten(2, self.x.shape[2:])
        noise = NOISE[..., : self.x.shape[2], : self.x.shape[3]].to(self.x.dtype)
        return published.modulation(self.x, attended, self.parameters, noise, self.lr_mul)


NOISE = torch.randn(1, 1, 256, 170, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def make_problem(
    use: str,
    *,
    num_heads: int = 1,
    encoding: str | None = "added",
    height: int = 5,
    width: int = 7,
    channels: int = CHANNELS,
    latent_dim: int = LATENT_DIM,
    attention_dim: int = ATTENTION_DIM,
    layout: LatentLayout = LAYOUT,
    without: Sequence[int] = (3,),
    bias: bool = True,
    lr_mul: float | None = None,
    seed: int = 0,
    **changes: Any,
) -> Problem:
    """Two images of random labels, some of them absent, some pixels ignored, some of a label without latents."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    encoded = channels + ENCODING if encoding == "concatenated" else channels
    of_pixels, of_latents = (latent_dim, encoded) if use == "pool" else (encoded, latent_dim)
    out = {"pool": latent_dim, "attend": channels, "modulate": 10}[use]
    sizes = {"query": (attention_dim, of_pixels), "key": (attention_dim, of_latents)}
    sizes |= {"value": (attention_dim, of_latents), "out": (out, attention_dim)}
    if use == "modulate":
        sizes |= {"gamma": (channels, out), "beta": (channels, out)}
    gain = 1.0 if lr_mul is None else 1 / lr_mul
    parameters = {}
    for name, (rows, columns) in sizes.items():
        parameters[f"{name}.weight"] = normal(rows, columns) * (gain if lr_mul else columns**-0.5)
        if bias:
            parameters[f"{name}.bias"] = normal(rows) * gain
    if use == "modulate":
        parameters["noise_strength"] = normal(channels)
    if encoding is not None:
        extra = ENCODING if encoding == "concatenated" else channels
        parameters |= {"row": normal(height, extra), "col": normal(width, extra)}
    labels = random_map(2, height, width, layout.num_labels, without=without, seed=seed)
    return Problem(
        use=use,
        x=normal(2, channels, height, width) + 0.3,
        latents=normal(2, layout.count, latent_dim),
        labels=labels,
        parameters=parameters,
        layout=layout,
        num_heads=num_heads,
        encoding=encoding,
        lr_mul=lr_mul,
        **changes,
    ).to(torch.float64)


def gradients(out: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view(out.shape).cos()
    found = torch.autograd.grad((out.double() * weights).sum(), list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def assert_agrees(problem: Problem, choice: Any, *, tolerance: float = 1e-10, backend: str = "cpu") -> None:
    """Results and all gradients are those of the dense formulas."""
    with sca_kernels.backend(backend):
        out = problem.solve(choice)
    expected = problem.expected()
    assert error_ratio(out, expected) <= tolerance
    found, wanted = gradients(out, problem.leaves), gradients(expected, problem.leaves)
    for name, gradient in found.items():
        assert gradient is not None, name
        assert wanted[name] is not None
        if name == "key.bias":
            assert not gradient.any()
        else:
            assert error_ratio(gradient, wanted[name]) <= tolerance, name


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cpu":
        request.getfixturevalue("native")
    yield request.param


@pytest.mark.parametrize("choice", [*FOLDED, *PROJECTED], ids=describe)
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("use", USES)
def test_every_way_is_the_same(use, num_heads, choice, backend):
    assert_agrees(make_problem(use, num_heads=num_heads), choice, backend=backend)


SOME_WAYS = [
    FoldingChoice(True, "chain", "chain"),
    FoldingChoice(True, "product", "out"),
    FoldingChoice(True, "product", "all", selects=True),
    *PROJECTED,
]
some_ways = pytest.mark.parametrize("choice", SOME_WAYS, ids=describe)
each_use = pytest.mark.parametrize("use", USES)


@some_ways
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("encoding", [None, "concatenated"])
@each_use
def test_encodings(use, encoding, num_heads, choice, native):
    assert_agrees(make_problem(use, encoding=encoding, num_heads=num_heads), choice)


@some_ways
@each_use
def test_empty_rows_of_zeros(use, choice, native):
    assert_agrees(make_problem(use, num_heads=2, empty="zero"), choice)


@some_ways
@pytest.mark.parametrize("lr_mul", [None, 0.5])
@each_use
def test_equalised_learning_rate_and_no_biases(use, lr_mul, choice, native):
    assert_agrees(make_problem(use, num_heads=2, bias=False, lr_mul=lr_mul), choice)
    if lr_mul is not None:
        assert_agrees(make_problem(use, num_heads=2, lr_mul=lr_mul), choice)


@some_ways
@each_use
def test_a_bias_of_keys_alone(use, choice, native):
    problem = make_problem(use)
    for name in [name for name in problem.parameters if name.endswith("bias") and name != "key.bias"]:
        del problem.parameters[name]
    assert_agrees(problem, choice)


@some_ways
@each_use
def test_which_labels_are_there(use, choice, native):
    problem = make_problem(use)
    labels = problem.labels.labels
    all_labelled = torch.where(labels < 0, 4, torch.where(labels == 2, 1, labels))
    maps = {
        "no pixel without latents": all_labelled,
        "one label": torch.zeros_like(labels),
        "one label in one image": torch.stack([all_labelled[0], torch.full_like(labels[1], 3)]),
        "no labels": torch.full_like(labels, -1),
        "one map for both images": labels[:1],
    }
    for changed in maps.values():
        label_map = LabelMap.from_labels(changed, LAYOUT.num_labels)
        assert_agrees(dataclasses.replace(problem, labels=label_map), choice)


@some_ways
@each_use
def test_label_maps_are_resized(use, choice, native):
    problem = make_problem(use)
    labels = random_map(2, 12, 9, LAYOUT.num_labels)
    out = dataclasses.replace(problem, labels=labels).solve(choice)
    torch.testing.assert_close(out, dataclasses.replace(problem, labels=labels.at(5, 7)).solve(choice))


@each_use
def test_large_image(use, native):
    problem = make_problem(use, height=256, width=170, channels=4, encoding="added")
    assert_agrees(problem, FoldingChoice(True, "product", "all", selects=True))
    assert error_ratio(problem.solve("projected"), problem.expected()) < 1e-10


@each_use
def test_one_pixel_and_no_image(use, native):
    assert_agrees(make_problem(use, height=1, width=1), "folded", tolerance=1e-9)
    problem = make_problem(use)
    empty = dataclasses.replace(
        problem,
        x=problem.x.detach()[:0],
        latents=problem.latents.detach()[:0],
        labels=LabelMap.from_labels(problem.labels.labels[:0], LAYOUT.num_labels),
    )
    for choice in ("folded", "projected"):
        assert empty.solve(choice).shape[0] == 0


@some_ways
@each_use
def test_no_latents(use, choice, native):
    problem = make_problem(use, layout=LatentLayout((0, 0, 0)), without=())
    out = problem.solve(choice)
    assert torch.equal(out, dataclasses.replace(problem, empty="zero").solve(choice)) and out.isfinite().all()


SELECTING = [choice for choice in (*FOLDED, *PROJECTED) if choice.selects]


@pytest.mark.parametrize("choice", SELECTING, ids=describe)
@pytest.mark.parametrize("empty", ["uniform", "zero"])
@each_use
def test_absent_labels_take_no_products(use, empty, choice, native):
    """As many multiply-adds, backward included, however many labels there are that four pixels cannot have."""
    counts = []
    for num_labels in (5, 50):
        layout = LatentLayout.uniform(num_labels, 3)
        problem = make_problem(use, layout=layout, height=2, width=2, without=range(4, num_labels), empty=empty)
        with FlopCounterMode(display=False) as counter:  # which, like a compiler, reads nothing back
            problem.solve(choice).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_latents_that_attend_to_each_other(native):
    problem = make_problem("pool", num_heads=3)
    shapes = {"query": LATENT_DIM, "key": LATENT_DIM, "value": LATENT_DIM}
    weights = {f"{name}.weight": torch.randn(ATTENTION_DIM, width).double() for name, width in shapes.items()}
    problem = dataclasses.replace(problem, parameters=problem.parameters | weights).to(torch.float64)
    out = latents_attend_to_latents(problem.latents, LAYOUT, problem.attention())
    of_latents = LAYOUT.labels(torch.device("cpu"))
    allowed = (of_latents[:, None] == of_latents).expand(2, -1, -1)
    expected = published.attention(problem.latents, problem.latents, allowed, problem.parameters, 3)
    leaves = {name: leaf for name, leaf in problem.leaves.items() if name not in ("x", "row", "col")}
    found, wanted = gradients(out, leaves), gradients(expected, leaves)
    assert error_ratio(out, expected) < 1e-10
    for name, gradient in found.items():
        assert gradient is not None
        if name == "key.bias":
            assert not gradient.any()
        else:
            assert error_ratio(gradient, wanted[name]) < 1e-10, name


@pytest.mark.parametrize("choice", ["folded", "projected"])
@each_use
def test_only_some_take_gradients(use, choice, native):
    problem = make_problem(use)
    expected = gradients(problem.expected(), problem.leaves)
    for names in (["x"], ["latents"], ["key.bias", "out.weight"], ["query.bias"], ["row"]):
        for name, leaf in problem.leaves.items():
            leaf.requires_grad_(name in names)
        found = gradients(problem.solve(choice), {name: problem.leaves[name] for name in names})
        for name, gradient in found.items():
            assert gradient is not None
            if name == "key.bias":
                assert not gradient.any()
            else:
                assert error_ratio(gradient, expected[name]) < 1e-10, name
    with torch.no_grad():
        assert not problem.solve(choice).requires_grad


@each_use
def test_gradients_of_gradients(use):
    problem = make_problem(use, height=3, width=4)
    second = []
    for solve in (lambda: problem.solve("folded"), problem.expected):
        with sca_kernels.backend("reference"):
            (first,) = torch.autograd.grad(solve().square().sum(), problem.latents, create_graph=True)
            second.append(torch.autograd.grad(first.square().sum(), problem.parameters["value.weight"])[0])
    assert error_ratio(*second) < 1e-9


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", ["folded", "projected"])
@each_use
def test_errors_are_no_larger_than_those_of_the_dense_formulas(use, choice, features, native):
    """In float32, and with features of 16 bits under autocast: folded rows are never rounded to 16 bits."""
    exact = make_problem(use, num_heads=2, channels=16, latent_dim=16, attention_dim=16, height=16, width=12)
    rounded = exact.to(torch.float32, features)
    exact = dataclasses.replace(exact, x=rounded.x.detach().double().requires_grad_())
    expected = exact.expected()
    wanted = gradients(expected, exact.leaves)
    with torch.autocast("cpu", torch.bfloat16, enabled=features == torch.bfloat16):
        out, plain = rounded.solve(choice), rounded.expected()
    found, dense = gradients(out, rounded.leaves), gradients(plain, rounded.leaves)
    assert out.dtype == (torch.float32 if use == "pool" else features)
    # Another order of the same sums, at worst a result that is rounded to 16 bits once more at its end.
    margin = 2.0
    assert error_ratio(out, expected) <= margin * error_ratio(plain, expected) + 1e-6
    for name, gradient in found.items():
        if name != "key.bias":
            assert gradient is not None and dense[name] is not None
            assert gradient.dtype == rounded.leaves[name].dtype
            limit = margin * error_ratio(dense[name], wanted[name]) + 2e-6
            assert error_ratio(gradient, wanted[name]) <= limit, name


@each_use
def test_types_are_promoted(use, native):
    problem = make_problem(use)
    expected = problem.expected()
    features = problem.to(torch.float64, torch.float32)
    assert error_ratio(features.solve("folded"), expected) < 1e-5
    parameters = problem.to(torch.float32, torch.float64)
    assert parameters.solve("folded").dtype == torch.float64
    assert error_ratio(parameters.solve("folded"), expected) < 1e-5
    halves = problem.to(torch.bfloat16)
    assert halves.solve("folded").dtype == (torch.float32 if use == "pool" else torch.bfloat16)
    assert error_ratio(halves.solve("folded"), expected) < 5e-2


def make_parameters(problem: Problem) -> Problem:
    parameters = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in problem.parameters.items()}
    return dataclasses.replace(problem, parameters=parameters)


CACHED = FoldingChoice(True, "product", "all")


@each_use
def test_products_of_weights_are_remembered(use, native):
    problem = make_parameters(make_problem(use))
    cache = FoldingCache()
    with torch.no_grad():
        first = problem.solve(CACHED, cache)
        count = len(cache)
        assert count == 2
        assert torch.equal(problem.solve(CACHED, cache), first) and len(cache) == count
        assert error_ratio(problem.solve(CACHED), first) < 1e-13
    # Training leaves them alone.
    problem.solve(CACHED, cache).sum().backward()
    assert problem.parameters["key.weight"].grad is not None
    for parameter in problem.parameters.values():
        parameter.requires_grad_(False)
    frozen = problem.solve(CACHED, cache)
    assert frozen.requires_grad and torch.equal(frozen.detach(), first)
    (gradient,) = torch.autograd.grad(frozen.square().sum(), problem.latents)
    (expected,) = torch.autograd.grad(problem.expected().square().sum(), problem.latents)
    assert error_ratio(gradient, expected) < 1e-10


def write_in_place(parameter: nn.Parameter) -> None:
    parameter.add_(0.5)


def write_to_data(parameter: nn.Parameter) -> None:
    parameter.data.mul_(0.9).add_(0.1)


def replace_data(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data + 0.5


@pytest.mark.parametrize("change", [write_in_place, write_to_data, replace_data])
@each_use
def test_changed_weights_are_noticed(use, change, native):
    problem = make_parameters(make_problem(use))
    cache = FoldingCache()
    with torch.no_grad():
        for name in problem.parameters:
            if name in ("row", "col"):
                continue
            problem.solve(CACHED, cache)
            change(problem.parameters[name])
            assert torch.equal(problem.solve(CACHED, cache), problem.solve(CACHED, FoldingCache())), name
        problem.parameters["out.weight"] = nn.Parameter(problem.parameters["out.weight"] * 2)
        assert torch.equal(problem.solve(CACHED, cache), problem.solve(CACHED, FoldingCache()))
        assert len(cache) == 2


def test_what_a_cache_does_not_remember(native):
    problem = make_problem("modulate")
    cache = FoldingCache()
    with torch.no_grad():
        problem.solve(CACHED, cache)  # tensors that are no parameters may be new ones at every call
        assert len(cache) == 0
        problem = make_parameters(problem)
        problem.solve(CACHED, cache)
        assert len(cache) > 0
        assert len(copy.deepcopy(cache)) == 0 and len(pickle.loads(pickle.dumps(cache))) == 0
        problem.to(torch.float32).solve(CACHED, cache)
        cache.clear()
        assert len(cache) == 0
    with torch.inference_mode():
        problem = make_parameters(problem)
        problem.solve(CACHED, cache)
        assert len(cache) == 0


@pytest.mark.compiled
@pytest.mark.parametrize("choice", ["auto", SOME_WAYS[2], PROJECTED[2], PROJECTED[3]], ids=describe)
@each_use
def test_compiled(use, choice, native):
    torch._dynamo.reset()  # the cases share the code that is compiled
    problem = make_parameters(make_problem(use, num_heads=2))
    cache = FoldingCache()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def solve(x: Tensor, latents: Tensor, labels: LabelMap) -> Tensor:
        return dataclasses.replace(problem, x=x, latents=latents, labels=labels).solve(choice, cache)

    out = solve(problem.x, problem.latents, problem.labels)
    expected = problem.expected()
    assert error_ratio(out, expected) < 1e-10
    found, wanted = gradients(out, problem.leaves), gradients(expected, problem.leaves)
    for name, gradient in found.items():
        assert gradient is not None
        assert name == "key.bias" or error_ratio(gradient, wanted[name]) < 1e-10, name
    with torch.no_grad():
        assert error_ratio(solve(problem.x, problem.latents, problem.labels), expected) < 1e-10
    assert len(cache) == 0


def sizes(use: str, side: int, channels: int, labels: int, **changes: Any) -> FoldingProblem:
    settings: dict[str, Any] = {
        "images": 1,
        "height": side,
        "width": side,
        "channels": channels,
        "layout_latents": 8 * labels,
        "latents": 8 * labels,
        "latent_dim": 256,
        "attention_dim": 256,
        "encoding": channels,
        **changes,
    }
    return FoldingProblem(use, **settings)


@each_use
def test_what_is_fastest(use):
    large = estimate(sizes(use, 256, 64, 19))
    assert large[0].folded
    assert [choice.seconds for choice in large] == sorted(choice.seconds for choice in large)
    assert len(set(large)) == len(large)
    assert not estimate(sizes(use, 4, 1024, 151))[0].folded
    assert estimate(sizes(use, 64, 512, 151, latents=40))[0].selects
    assert not estimate(sizes(use, 256, 64, 3, latents=16))[0].selects
    small = estimate(sizes(use, 8, 1024, 151, latents=160))
    assert not small[0].folded and small[0].selects
    more_labels = estimate(sizes(use, 8, 1024, 1000, latents=160))
    assert [choice for choice in small if choice.selects] == [choice for choice in more_labels if choice.selects]
    assert more_labels[0].seconds == small[0].seconds
    trained = estimate(sizes(use, 256, 64, 19, weights_grad=True, latents_grad=True, features_grad=True))
    assert trained[0].seconds > 2 * large[0].seconds
    assert not any(choice.folded for choice in estimate(sizes(use, 256, 64, 19, foldable=False)))
    assert choose(sizes(use, 256, 64, 19)) == large[0]
    assert not choose(sizes(use, 256, 64, 19), "projected").folded
    assert choose(sizes(use, 4, 1024, 151), "folded").folded


def test_products_of_many_latents_are_made_once():
    few, many = (estimate(sizes("modulate", 64, 512, 19, images=images, weights_grad=True)) for images in (1, 64))
    assert few[0].values == "chain" and many[0].values != "chain"
    cached = estimate(sizes("modulate", 64, 512, 19, cached=True))
    assert (cached[0].logits, cached[0].values) == ("product", "all")


def test_equal_calls_are_computed_in_the_same_way(native):
    """What another call found out about a label map changes nothing."""
    problem = make_problem("modulate").to(torch.float32)
    with torch.no_grad():
        before = problem.solve()
        problem.solve(FoldingChoice(True, "product", "all", selects=True))
        assert torch.equal(problem.solve(), before)


def test_errors(native):
    problem = make_problem("modulate")
    attention, gamma = problem.attention(), problem.layer("gamma")

    def call(**changes: Any) -> Tensor:
        arguments: dict[str, Any] = {
            "x": problem.x,
            "latents": problem.latents,
            "layout": LAYOUT,
            "labels": problem.labels,
            "attention": attention,
            "gamma": gamma,
            "beta": gamma,
            "encoding": problem.tables(),
        }
        return modulate_by_latents(**{**arguments, **changes})

    wrong = {
        "latents: expected shape": {"latents": problem.latents[:, 1:]},
        "attention.query: expected a weight": {"attention": attention._replace(query=attention.key)},
        "attention.out: expected a weight": {"attention": attention._replace(out=gamma)},
        "attention: expected a number of heads": {"attention": attention._replace(num_heads=5)},
        "gamma: expected a weight": {"gamma": attention.out},
        "beta: expected a bias": {"beta": gamma._replace(bias=torch.zeros(3))},
        "encoding: expected a table": {"encoding": SeparableEncoding(torch.zeros(5, 8), torch.zeros(5, 8))},
        "choice: expected 'auto'": {"choice": "fastest"},
        "empty: expected": {"empty": "mean"},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=message):
            call(**changes)
    for name, value in {"x": None, "latents": None, "layout": (1, 2), "labels": problem.labels.labels}.items():
        with pytest.raises(TypeError, match=f"{name}: expected"):
            call(**{name: value})
    with pytest.raises(TypeError, match="latents: expected floating-point"):
        call(latents=torch.zeros(2, LAYOUT.count, LATENT_DIM, dtype=torch.int64))
    other = make_problem("attend", encoding="concatenated")
    for choice in ("folded", CACHED):
        with pytest.raises(ValueError, match="choice: expected a projected way"):
            dataclasses.replace(other, parameters=wider_output(other)).solve(choice)


def wider_output(problem: Problem) -> dict[str, Tensor]:
    return problem.parameters | {"out.weight": torch.zeros(9, ATTENTION_DIM), "out.bias": torch.zeros(9)}
