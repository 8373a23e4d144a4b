"""The gradients of semantic_pool and semantic_modulate in PyTorch's hands: what is saved, refused and repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from folded import (
    BUILDERS,
    LABELS,
    LAYOUT,
    apply,
    assert_same_bits,
    channels_last,
    differentiate,
    full_problem,
    leaves,
    solve,
)
from tokens import label_map
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sca_kernels
from sca_kernels import LabelMap, LatentLayout

pytestmark = pytest.mark.usefixtures("native")

operator = pytest.mark.parametrize("operator", BUILDERS)


@operator
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(operator, use_reentrant):
    problem = full_problem(operator)
    names = tuple(problem.tensors)

    def recomputed(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(apply(problem, dict(zip(names, inputs, strict=True))).values())

    inputs = leaves(problem)
    results = checkpoint(recomputed, *inputs.values(), use_reentrant=use_reentrant)
    expected = solve(problem, "cpu")
    flows = [gradient for gradient in problem.gradients.values() if gradient is not None]
    torch.autograd.backward(results, flows)
    found = {f"grad_{name}": tensor.grad for name, tensor in inputs.items()}
    assert_same_bits(found, {name: value for name, value in expected.items() if name.startswith("grad_")})


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_draws_the_same_noise_again(use_reentrant):
    problem = full_problem("semantic_modulate", noise=None, options=())
    x = problem.tensors["x"].clone().requires_grad_()
    others = {name: tensor for name, tensor in problem.tensors.items() if name != "x"}

    def recomputed(x: Tensor) -> Tensor:
        return apply(problem.with_settings(noise="per_element", negative_slope=0.0), {**others, "x": x})["out"]

    torch.manual_seed(5)
    (expected,) = torch.autograd.grad(recomputed(x).sum(), x)
    torch.manual_seed(5)
    checkpoint(recomputed, x, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(x.grad, expected)


@operator
@pytest.mark.parametrize("empty", ["uniform", "zero"])
def test_reference_is_twice_differentiable(operator, empty):
    labels, layout = label_map([[0, 1, -1], [0, 0, 1]], 3), LatentLayout((2, 0, 1))
    arguments: dict[str, Any] = {"batch": 1, "heads": 1, "channels": 2, "dtype": torch.float64, "empty": empty}
    if operator == "semantic_modulate":
        arguments.update(options=("row_bias", "scale_bias"), noise=None)
    problem = full_problem(operator, labels=labels, layout=layout, **arguments)
    names = tuple(problem.tensors)

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        with sca_kernels.backend("reference"):
            results = apply(problem, dict(zip(names, inputs, strict=True)))
        return tuple(result.masked_fill(result == -torch.inf, 0) for result in results.values())

    inputs = list(leaves(problem).values())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@operator
def test_gradient_penalty_on_the_reference(operator):
    """What ``create_graph=True`` is for."""
    problem = full_problem(operator)
    inputs = leaves(problem)
    with sca_kernels.backend("reference"):
        result = next(iter(apply(problem, inputs).values()))
    (gradient,) = torch.autograd.grad(result.square().sum(), inputs["x"], create_graph=True)
    gradient.square().sum().backward()
    for name in ("x", "queries" if operator == "semantic_pool" else "keys"):
        assert inputs[name].grad.isfinite().all() and inputs[name].grad.any()


@operator
def test_gradients_of_gradients_are_refused(operator):
    """Loudly, through every result, rather than as a gradient that silently has none itself."""
    problem = full_problem(operator)
    for name in problem.gradients:
        inputs = leaves(problem)
        with sca_kernels.backend("cpu"):
            result = apply(problem, inputs)[name]
        number = result.masked_fill(result.isinf(), 0).square().sum()
        message = rf"{operator}: gradients of gradients \(create_graph=True\) .*backend\('reference'\)"
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(number, list(inputs.values()), create_graph=True, allow_unused=True)


@operator
def test_forward_mode_is_refused_rather_than_dropped(operator):
    """A derivative that is not computed is an error, not zero."""
    problem = full_problem(operator)
    for name, tensor in problem.tensors.items():
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(tensor, torch.ones_like(tensor))
            with pytest.raises((RuntimeError, NotImplementedError), match="forward"):
                apply(problem, {**problem.tensors, name: dual})
    x = problem.tensors["x"]
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda x: apply(problem, {**problem.tensors, "x": x}), (x,), (x,))


@operator
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop(operator):
    problem = full_problem(operator)
    stacked = {name: torch.stack((tensor, tensor.flip(0) * 0.5)) for name, tensor in problem.tensors.items()}
    together = torch.func.vmap(lambda tensors: apply(problem, tensors))(stacked)
    for index in range(2):
        alone = apply(problem, {name: tensor[index] for name, tensor in stacked.items()})
        for name, result in alone.items():
            assert torch.equal(together[name][index], result), name


@operator
def test_gradients_by_transforms_are_refused(operator):
    """As for semantic_cross_attention: an error, never a wrong number."""
    problem = full_problem(operator)

    def number(x: Tensor) -> Tensor:
        return sum(result.nan_to_num(neginf=0).sum() for result in apply(problem, {**problem.tensors, "x": x}).values())

    x = problem.tensors["x"]
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(number)(x)
    leaf = x.clone().requires_grad_()
    result = next(iter(apply(problem, {**problem.tensors, "x": leaf}).values()))
    with pytest.raises(RuntimeError):
        torch.autograd.grad(result, leaf, torch.randn(3, *result.shape), is_grads_batched=True)


@operator
def test_backward_twice_over_a_kept_graph(operator):
    problem = full_problem(operator)
    inputs = leaves(problem)
    results = apply(problem, inputs)
    first = differentiate(problem, results, inputs, retain_graph=True)
    assert_same_bits(differentiate(problem, results, inputs), first)


@operator
def test_inputs_changed_before_backward_are_noticed(operator):
    problem = full_problem(operator)
    for name in problem.tensors:
        inputs = leaves(problem)
        doubled = {name: tensor * 2 for name, tensor in inputs.items()}
        results = apply(problem, doubled)
        doubled[name].add_(1)
        number = sum(result.masked_fill(result.isinf(), 0).sum() for result in results.values())
        if name in ("mean", "rstd", "shift_bias"):  # what backward does not read, or has a copy of
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            number.backward()


def test_given_statistics_changed_before_backward():
    """A gradient is that of the statistics that were used."""
    problem = full_problem("semantic_modulate")
    expected = solve(problem, "cpu")
    for name in ("mean", "rstd"):
        inputs = leaves(problem)
        copies = {**inputs, name: inputs[name].clone()}
        results = apply(problem, copies)
        copies[name].data.add_(1)  # unseen by autograd
        assert_same_bits(differentiate(problem, results, inputs), expected)


@operator
@pytest.mark.parametrize("arrangement", [torch.clone, channels_last])
def test_saved_for_backward(operator, arrangement):
    """x itself, tables and results of the latents' and of the channels' size, and the plan: nothing of x's size."""
    labels = LabelMap(LABELS.labels[:, :, :1].repeat(1, 8, 40), 5)
    problem = full_problem(operator, labels=labels, channels=24)
    problem = problem.with_tensors(x=arrangement(problem.tensors["x"]))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    inputs = leaves(problem)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), sca_kernels.backend("cpu"):
        results = apply(problem, inputs)
    assert all(result.requires_grad for result in results.values())
    height, width, channels = 56, 40, 24
    floats = {tensor.data_ptr(): tensor for tensor in saved if tensor.is_floating_point()}
    x = floats.pop(inputs["x"].data_ptr())
    assert x.shape == inputs["x"].shape
    rows = 2 * 2 * LAYOUT.count
    largest = max(rows * max(height, width, channels), 2 * height * width)  # tables, and the noise
    assert largest < x.numel() / 10
    assert max(tensor.numel() for tensor in floats.values()) <= largest
    tables = 4 if operator == "semantic_pool" else 3
    assert (
        sum(tensor.numel() for tensor in floats.values())
        <= tables * rows * channels + 3 * rows * (height + width) + 30 * rows + 2 * height * width
    )
    integers = sum(tensor.numel() for tensor in saved if not tensor.is_floating_point())
    assert integers <= 2 * (height * width + 6) + 6


def test_saved_for_backward_without_noise_per_element():
    """Which is made anew, from its seed."""
    problem = full_problem("semantic_modulate", noise="per_element")
    saved: list[Tensor] = []
    inputs = leaves(problem)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        apply(problem, inputs)
    seed = problem.settings["noise_seed"]
    assert (
        sum(tensor.dtype == torch.int64 and tensor.numel() == 1 and tensor.item() == seed.item() for tensor in saved)
        == 1
    )
    of_size = [tensor for tensor in saved if tensor.numel() >= inputs["x"].numel()]
    assert [tensor.data_ptr() for tensor in of_size] == [inputs["x"].data_ptr()]
