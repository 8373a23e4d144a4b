"""Calls like an earlier one skip the checks: only those, and with the same results, gradients and errors."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import sca_kernels
from sca_kernels import LabelMap, LatentLayout, backend, cpu
from sca_kernels.ops.known_calls import KnownCalls

pytestmark = pytest.mark.usefixtures("native")

LAYOUT = LatentLayout((2, 0, 3))
BATCH, CHANNELS, HEIGHT, WIDTH, HEADS = 2, 6, 3, 5, 2
ROWS = (BATCH, HEADS, LAYOUT.count)
# The function that every call passes which is checked.
CHECKS = {
    "semantic_cross_attention": "_check",
    "semantic_pool": "_check",
    "semantic_modulate": "_check",
    "instance_modulate": "check_feature_map",
}
operators = pytest.mark.parametrize("operator", CHECKS)


def label_map(seed: int = 0) -> LabelMap:
    labels = torch.randint(-1, 3, (BATCH, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(seed))
    return LabelMap.from_labels(labels, 3)


def arguments(operator: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Of a call with as many kinds of arguments as it has; tables are smaller than what they broadcast to."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = random(BATCH, CHANNELS, HEIGHT, WIDTH)
    biases = {"row_bias": random(*ROWS, HEIGHT), "col_bias": random(*ROWS, WIDTH)}
    regions = {"layout": LAYOUT, "labels": label_map()}
    noise = {"noise": random(HEIGHT, WIDTH), "noise_strength": random(CHANNELS)}
    made: dict[str, Any] = {
        "semantic_cross_attention": lambda: {
            "query": random(BATCH, HEADS, HEIGHT * WIDTH, 4),
            "key": random(*ROWS, 4),
            "value": random(*ROWS, 7),
            "empty_value": random(HEADS, 7),
            "query_tokens": label_map(),
            "key_tokens": LAYOUT,
        },
        "semantic_pool": lambda: {"queries": random(*ROWS, CHANNELS), "x": x, **regions, **biases},
        "semantic_modulate": lambda: {
            "x": x,
            **{name: random(*ROWS, CHANNELS) for name in ("keys", "scale", "shift")},
            **regions,
            **biases,
            "key_bias": random(*ROWS),
            "scale_bias": random(CHANNELS),
            "shift_bias": random(1, CHANNELS),
            "empty_scale": random(BATCH, 1),
            "empty_shift": random(),
            **noise,
        },
        "instance_modulate": lambda: {
            "x": x, "gamma": random(1, CHANNELS, HEIGHT, WIDTH), "beta": random(CHANNELS), **noise,
        },
    }[operator]()  # fmt: skip
    return {**made, **changes}


def call(operator: str, given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    results = getattr(sca_kernels, operator)(**given)
    return tuple(results) if isinstance(results, tuple) else (results,)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that other tests made are forgotten for a while."""
    for operator in CHECKS:
        monkeypatch.setattr(calls_of(operator), "_calls", KnownCalls()._calls)


def calls_of(operator: str) -> KnownCalls:
    run_known = module(operator)._operator.run_known
    found = dict(zip(run_known.__code__.co_freevars, run_known.__closure__, strict=True))
    known: KnownCalls = found["known_calls"].cell_contents
    return known


def module(operator: str) -> Any:
    return importlib.import_module(f"sca_kernels.ops.{operator}")


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators of calls that were checked, in order."""
    names: list[str] = []
    for operator, name in CHECKS.items():
        check = getattr(module(operator), name)

        def follow(*values: Any, _operator: str = operator, _check: Callable[..., Any] = check) -> Any:
            names.append(_operator)
            return _check(*values)

        monkeypatch.setattr(module(operator), name, follow)
    return names


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@operators
def test_the_second_call_is_known(operator, checked):
    for seed in range(3):  # other numbers in other tensors
        given = arguments(operator, seed)
        with backend("reference"):
            expected = call(operator, given)
        checked.clear()
        for one, other in zip(call(operator, given), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert checked == ([operator] if seed == 0 else [])


@operators
def test_results_and_gradients_are_the_same(operator, checked):
    """Bit for bit, those of tables that broadcast included."""
    found = []
    for _ in range(2):
        given = arguments(operator)
        leaves = {
            name: value.requires_grad_()
            for name, value in given.items()
            if isinstance(value, Tensor) and name != "noise"
        }
        results = call(operator, given)
        finite = [torch.where(result.isfinite(), result, 0).square().sum() for result in results]
        torch.stack(finite).sum().backward()
        gradients = tuple(leaf.grad for leaf in leaves.values())
        assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves.values()]
        found.append((*results, *gradients))
    assert checked == [operator]
    assert_same(*found)


@operators
def test_known_with_and_without_gradients(operator, checked):
    expected = call(operator, arguments(operator))
    for _ in range(2):
        given = arguments(operator)
        next(value for value in given.values() if isinstance(value, Tensor)).requires_grad_()
        results = call(operator, given)
        assert results[0].requires_grad
        assert_same(results, expected)
        with torch.no_grad():
            results = call(operator, given)
        assert not results[0].requires_grad
        assert_same(results, expected)
    assert checked == [operator] * 3  # without a tensor that requires gradients, with one, with one in vain


CHANGES: dict[str, Callable[[Any], Any]] = {
    "type": lambda value: value.double() if isinstance(value, Tensor) else value,
    "strides": lambda value: (
        value.transpose(-1, -2).contiguous().transpose(-1, -2)
        if isinstance(value, Tensor) and value.dim() > 1
        else value
    ),
    "class": lambda value: value.as_subclass(Subclass) if isinstance(value, Tensor) else value,
    "negative": lambda value: torch.complex(value, -value).conj().imag if isinstance(value, Tensor) else value,
}


class Subclass(Tensor):
    """A tensor of another class."""


@operators
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(operator, change, checked):
    given = arguments(operator)
    expected = call(operator, given)
    call(operator, given)
    changed = {name: CHANGES[change](value) for name, value in given.items()}
    checked.clear()
    results = call(operator, changed)
    assert checked == [operator]
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one.as_subclass(Tensor), other.to(one.dtype), rtol=1e-4, atol=1e-4)


ERRORS: dict[str, Callable[[Any], Any]] = {
    "shape": lambda tensor: torch.cat([tensor, tensor], -1) if tensor.dim() else tensor.expand(7),
    "dimensions": lambda tensor: tensor[..., None, None, None],
    "integers": lambda tensor: tensor.int(),
    "no tensor": lambda tensor: tensor.tolist(),
    "another device": lambda tensor: tensor.to("meta"),
}


@operators
@pytest.mark.parametrize("mistake", ERRORS)
def test_mistakes_are_errors_after_a_known_call(operator, mistake, monkeypatch):
    """The same errors as if there had been none, for each tensor."""
    given = arguments(operator)
    wrong = {
        name: {**given, name: ERRORS[mistake](value)} for name, value in given.items() if isinstance(value, Tensor)
    }

    def messages() -> dict[str, str]:
        found = {}
        for name, values in wrong.items():
            with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
                call(operator, values)
            found[name] = f"{error.type.__name__}: {error.value}"
        return found

    expected = messages()
    call(operator, given)
    call(operator, given)
    assert messages() == expected


@operators
def test_other_settings_are_noticed(operator, checked):
    given = arguments(operator)
    call(operator, given)
    setting = {"negative_slope": 0.5} if "modulate" in operator else {"empty": "zero"}
    checked.clear()
    results = call(operator, {**given, **setting})
    assert checked == [operator]
    assert_same(call(operator, {**given, **setting}), results)
    with pytest.raises((TypeError, ValueError)):
        call(operator, {**given, **({"noise": "salt"} if "modulate" in operator else {"empty": "full"})})


@pytest.mark.parametrize("operator", list(CHECKS)[:3])
def test_other_labels_and_layouts_are_noticed(operator, checked):
    given = arguments(operator)
    layout = "key_tokens" if operator == "semantic_cross_attention" else "layout"
    labels = "query_tokens" if operator == "semantic_cross_attention" else "labels"
    for _ in range(2):
        call(operator, given)
    assert checked == [operator]
    with backend("reference"):
        expected = call(operator, {**given, labels: label_map(1), layout: LatentLayout((0, 4, 1))})
    checked.clear()
    results = call(operator, {**given, labels: label_map(1), layout: LatentLayout((0, 4, 1))})
    assert checked == [operator]  # the most latents of a label have changed
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=": expected"):
        call(operator, {**given, layout: LatentLayout((2, 1, 3))})
    with pytest.raises(ValueError, match="label"):
        call(operator, {**given, labels: LabelMap.from_labels(label_map().labels, 4)})
    with pytest.raises(ValueError, match=f"{labels}: expected"):
        call(operator, {**given, labels: label_map().at(HEIGHT, WIDTH + 1)})


@pytest.mark.parametrize("operator", list(CHECKS)[:3])
def test_labels_that_are_written_to_are_noticed(operator):
    given = arguments(operator)
    labels = "query_tokens" if operator == "semantic_cross_attention" else "labels"
    for _ in range(2):
        call(operator, given)
    given[labels].labels.copy_(label_map(1).labels)
    assert_same(call(operator, given), call(operator, {**given, labels: label_map(1)}))


@pytest.mark.parametrize("operator", list(CHECKS)[:3])
def test_selections(operator, checked):
    layout = "key_tokens" if operator == "semantic_cross_attention" else "layout"
    given = arguments(operator)
    selection = LAYOUT.present_in(label_map())
    selected = {
        name: selection.gather(value.transpose(1, 2)).transpose(1, 2)
        if isinstance(value, Tensor) and value.shape[:3] == ROWS
        else value
        for name, value in given.items()
    }
    selected[layout] = selection
    results = call(operator, selected)
    assert_same(call(operator, selected), results)
    assert checked == [operator]
    three_images = LabelMap.from_labels(torch.zeros(3, HEIGHT, WIDTH, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match=f"{layout}: expected a selection"):
        call(operator, {**selected, layout: LAYOUT.present_in(three_images)})


@operators
def test_the_backend_is_asked_each_time(operator, checked, monkeypatch):
    given = arguments(operator)
    results = call(operator, given)
    call(operator, given)
    checked.clear()
    with backend("reference"):
        call(operator, given)
    assert checked == [operator]
    assert_same(call(operator, given), results)
    assert checked == [operator]


@operators
def test_the_instruction_set_is_asked_each_time(operator):
    given = arguments(operator)
    call(operator, given)
    before = cpu.CAPABILITIES[cpu.capability()]
    try:
        for name in cpu.capabilities():
            cpu.set_capability(name)
            known = call(operator, given)
            calls_of(operator)._calls = KnownCalls()._calls
            assert_same(known, call(operator, given))
    finally:
        cpu.set_capability(before)


@operators
def test_the_number_of_threads_is_asked_each_time(operator, use_threads, monkeypatch):
    given = arguments(operator)
    results = call(operator, given)
    seen: list[int] = []
    run = cpu.run

    def follow(kernel: str, tensor: Tensor, settings: tuple[int, ...], *rest: Any) -> None:
        seen.append(settings[1])
        run(kernel, tensor, settings, *rest)

    monkeypatch.setattr(cpu, "run", follow)
    for threads in (2, 1, 3):
        use_threads(threads)
        assert_same(call(operator, given), results)
    assert seen == [2, 1, 3]


class Listener(TorchDispatchMode):
    """Learns of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, values: Any = (), settings: Any = None) -> Any:
        self.names.append(str(function))
        return function(*values, **(settings or {}))


@operators
def test_who_listens_still_learns_of_the_operator(operator):
    given = arguments(operator)
    for _ in range(2):
        call(operator, given)
    with Listener() as listener:
        call(operator, given)
    assert f"sca.{operator}.default" in listener.names
    with torch.profiler.profile() as profile:
        call(operator, given)
    assert any(event.name == f"sca::{operator}" for event in profile.events())


@operators
def test_forward_mode_and_transforms_are_still_refused(operator):
    given = arguments(operator)
    name = next(name for name, value in given.items() if isinstance(value, Tensor))
    for _ in range(2):
        call(operator, given)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        call(operator, {**given, name: forward_ad.make_dual(given[name], torch.ones_like(given[name]))})
    with pytest.raises(RuntimeError):
        torch.func.grad(lambda tensor: call(operator, {**given, name: tensor})[0].sum())(given[name])


@pytest.mark.parametrize("operator", ["semantic_modulate", "instance_modulate"])
def test_noise_that_requires_a_gradient_is_refused_after_calls_without(operator):
    given = arguments(operator)
    given["noise"].requires_grad_()
    with torch.no_grad():
        for _ in range(2):
            call(operator, given)
    with pytest.raises(ValueError, match="noise: expected a tensor that takes no gradient"):
        call(operator, given)


def test_a_number_that_is_a_tensor_is_read_each_time():
    x, eps = torch.randn(1, 2, 3, 4), torch.tensor(1e-5)
    for number in (1e-5, 1e5, 1e-5):
        eps.fill_(number)
        actual = sca_kernels.instance_modulate(x, eps=eps)
        torch.testing.assert_close(actual, sca_kernels.instance_modulate(x, eps=number))


def test_autocast_still_casts():
    given = arguments("semantic_cross_attention")
    for _ in range(2):
        call("semantic_cross_attention", given)
    with torch.autocast("cpu", torch.bfloat16):
        (out,) = call("semantic_cross_attention", given)
    assert out.dtype == torch.bfloat16


@operators
@pytest.mark.parametrize("with_gradients", [False, True])
def test_nothing_is_kept_alive(operator, with_gradients):
    given = arguments(operator)
    for name, value in given.items():
        if with_gradients and isinstance(value, Tensor) and name != "noise":
            value.requires_grad_()
    for _ in range(2):
        results = call(operator, given)
    seen = [weakref.ref(value) for value in (*given.values(), *results) if isinstance(value, Tensor | LabelMap)]
    assert sum(map(len, calls_of(operator)._calls or ())) == 1
    del given, results, value
    gc.collect()
    assert [reference() for reference in seen] == [None] * len(seen)


def test_what_is_remembered_is_bounded():
    known = cpu.native.KnownCalls((Tensor,), 3)
    for number in range(10):
        known.add((torch.zeros(number),), ("uniform", 0.5), number)
        assert len(known) <= 3
        assert known.find((torch.ones(number),), ("uniform", 0.5)) == number
        assert known.find((torch.ones(number),), ("zero", 0.5)) is None
        assert known.find((torch.ones(number),), ("uniform", 1.5)) is None
        assert known.find((torch.ones(number + 1),), ("uniform", 0.5)) is None


@pytest.mark.parametrize(
    "value",
    [torch.ones(2).to_sparse(), torch.ones(2, device="meta"), torch._efficientzerotensor(2), [1], 2**70, object()],
    ids=["sparse", "meta", "zeros", "list", "integer", "object"],
)
def test_what_a_signature_cannot_tell_is_never_known(value):
    known = cpu.native.KnownCalls((Tensor,), 3)
    known.add((torch.ones(1), value), (), True)
    known.add((torch.ones(1),), (value,), True)
    assert len(known) == 0
    assert known.find((torch.ones(1), value), ()) is None
