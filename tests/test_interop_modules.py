"""What a swap leaves as it is, what runs its own code and says why, and what a user may do before and after."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from swapping import (
    LATENT_DIM,
    LAYOUT,
    Autoencoder,
    assert_same,
    float64_noise,
    make_autoencoder,
    make_inputs,
    swapped_copy,
    without_own_code,
)
from test_scam_models_published import ENCODER, GENERATOR, randomise
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import sca_kernels
from bench import published
from sca_kernels import LabelMap, LatentLayout
from sca_kernels.interop import masks

pytestmark = pytest.mark.usefixtures("native", float64_noise.__name__)

__all__ = ["float64_noise"]


def run(model: nn.Module, *inputs: Tensor) -> Tensor:
    torch.manual_seed(0)
    return model(*inputs)


def make_modulation(**options: Any) -> tuple[published.SCAMModulation, tuple[Tensor, Tensor, Tensor]]:
    """A modulation, and features, a mask and latents for it."""
    module = published.SCAMModulation(LAYOUT.count, 8, LATENT_DIM, 8, 3, 1, **options).double()
    randomise(module)
    _, mask = make_inputs(6, 7)
    return module, (torch.randn(2, 8, 6, 7), mask.repeat_interleave(3, 1), torch.randn(2, LAYOUT.count, LATENT_DIM))


def reasons(report: sca_kernels.SwapReport) -> dict[str, str | None]:
    return {row.path: row.reason for row in report.left_alone}


def test_everything_stays_the_same_object():
    model = make_autoencoder()
    parameters, buffers, modules = dict(model.named_parameters()), dict(model.named_buffers()), list(model.modules())
    attributes = {module: set(vars(module)) for module in modules}
    state, kinds = model.state_dict(), [type(module) for module in modules]
    image, mask = make_inputs()
    before = run(model, image, mask)
    for _ in range(2):
        sca_kernels.swap_in(model)
        assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
        assert len(list(model.parameters())) == len(parameters)
        assert all(model.get_buffer(name) is buffer for name, buffer in buffers.items())
        assert list(model.modules()) == modules and [type(module) for module in modules] == kinds
        assert list(model.state_dict()) == list(state)
        with without_own_code():
            assert (run(model, image, mask) - before).norm() <= 1e-9 * before.norm()
    for _ in range(2):
        sca_kernels.swap_out(model)
        assert {module: set(vars(module)) for module in modules} == attributes
        assert torch.equal(run(model, image, mask), before)


def test_report():
    model = make_autoencoder()
    handle = model.generator.backbone["SCAM_block_1"].register_forward_hook(lambda *arguments: None)
    report = sca_kernels.swap_in(model)
    (row,) = report.left_alone
    assert (row.path, row.kind, row.reason) == (
        "generator.backbone.SCAM_block_1",
        "SCAMResUpscale",
        "it carries a hook",
    )
    table = str(report).splitlines()
    assert table[0].split() == ["module", "kind", "runs"]
    assert table[1].split() == ["encoder", "SemanticAttentionTransformerEncoder", "sca_kernels"]
    assert "generator.backbone.SCAM_block_1  " in str(report) and "its own code: it carries a hook" in str(report)
    inner = next(row for row in report.rows if row.path == "encoder.backbone.block_0.cross_attention")
    assert inner.runs == "sca_kernels, as part of encoder"
    assert table[-1] == f"{sum(row.within is not None for row in report.rows)} more are computed as parts of these"
    handle.remove()
    assert not sca_kernels.swap_in(model).left_alone
    assert "no published module was found" in str(sca_kernels.swap_in(nn.Linear(2, 2)))
    for function in (sca_kernels.swap_in, sca_kernels.swap_out):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
            function(3)  # type: ignore[arg-type, operator]


def test_bare_modules_need_a_layout():
    module, inputs = make_modulation()
    expected = run(module, *inputs)
    model = nn.ModuleDict({"mod": module})
    assert set(reasons(sca_kernels.swap_in(model))) == {
        *("mod", "mod.latent_to_image", "mod.image_to_latent", "mod.image_to_latent.attention")
    }
    assert "give latents_per_label" in str(sca_kernels.swap_in(model))
    assert torch.equal(run(module, *inputs)[0], expected[0])
    report = sca_kernels.swap_in(model, latents_per_label=(3, 3, 3))
    assert reasons(report)["mod"] == "it has 12 latents, and 9 are known of"
    assert not sca_kernels.swap_in(model, latents_per_label=(3, 3, 3, 3)).left_alone
    with without_own_code():
        torch.testing.assert_close(run(module, *inputs), expected)
    assert not sca_kernels.swap_in(model).left_alone  # it is known since the last time
    with pytest.raises(TypeError, match="latents_per_label: expected integers, got str"):
        sca_kernels.swap_in(model, latents_per_label="ab")  # type: ignore[arg-type]


class Other(published.SCAMModulation):
    """Takes the same arguments and computes something else."""

    def forward(self, x, segmentation_map, style_codes, content_code=None):
        out, latents = super().forward(x, segmentation_map, style_codes, content_code)
        return 2 * out, latents


class MoreArguments(published.SCAMModulation):
    def forward(self, x, segmentation_map, style_codes, content_code=None, strength=1.0):  # type: ignore[override]
        return super().forward(x, segmentation_map, style_codes, content_code)


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def change_class(changed: type[nn.Module]) -> Callable[[Any], None]:
    return lambda module: setattr(module, "__class__", changed)


def replace_linear(module: Any) -> None:
    module.mlp_lti_beta = ScaledLinear(8, 8).double()


def replace_forward(module: Any) -> None:
    forward = module.latent_to_image.forward
    module.latent_to_image.forward = lambda *arguments: forward(*arguments)


def replace_activation(module: Any) -> None:
    module.activation = nn.LeakyReLU(0.3)


OBSTACLES: dict[str, tuple[Callable[[Any], object], str]] = {
    "it overrides": (change_class(Other), "Other overrides the forward of SCAMModulation"),
    "another signature": (
        change_class(MoreArguments),
        "its forward takes (x, segmentation_map, style_codes, content_code, strength), "
        "not (x, segmentation_map, style_codes, content_code)",
    ),
    "hook": (lambda module: module.register_forward_pre_hook(lambda *arguments: None), "it carries a hook"),
    "backward hook": (lambda module: module.register_full_backward_hook(lambda *arguments: None), "it carries a hook"),
    "inner hook": (
        lambda module: module.image_to_latent.fc[1].register_forward_hook(lambda *arguments: None),
        "image_to_latent.fc.1 carries a hook",
    ),
    "weight norm": (
        lambda module: parametrizations.weight_norm(module.latent_to_image.q_linear),
        "latent_to_image.q_linear is parametrized",
    ),
    "old weight norm": (
        lambda module: nn.utils.spectral_norm(module.latent_to_image.out[0]),
        "the parameters of latent_to_image.out.0 are computed",
    ),
    "unknown linear layer": (replace_linear, "mlp_lti_beta is a ScaledLinear"),
    "replaced forward": (replace_forward, "the forward of latent_to_image was replaced"),
    "another activation": (replace_activation, "activation is not a leaky ReLU of slope 0.2"),
    "attention wanted": (lambda module: setattr(module, "return_attention", True), "return_attention is set"),
}


# What a class computes is looked at when it is swapped.
OF_CLASSES = ("it overrides", "another signature")


@pytest.mark.parametrize(
    "name, late", [(name, late) for name in OBSTACLES for late in (False, True) if not (late and name in OF_CLASSES)]
)
def test_obstacles(name, late):
    """A module that cannot be computed from its parameters runs its own code, also where that changes after a swap."""
    change, reason = OBSTACLES[name]
    module, inputs = make_modulation()
    model = nn.ModuleDict({"mod": module})
    if late:
        sca_kernels.swap_in(model, latents_per_label=LAYOUT)
    change(module)
    if not late:
        assert reasons(sca_kernels.swap_in(model, latents_per_label=LAYOUT))["mod"] == reason
    expected_model = copy.deepcopy(model)
    sca_kernels.swap_out(expected_model)
    for found, expected in zip(run(module, *inputs), run(expected_model["mod"], *inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    if late:
        assert reasons(sca_kernels.swap_in(model))["mod"] == reason


def test_hooks_see_what_they_always_saw():
    """Whatever carries a hook gets the published arguments, and what surrounds it stays swapped."""
    expected = make_autoencoder()
    found = swapped_copy(expected)
    seen: list[list[Tensor]] = [[], []]

    def listen(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], results: Any) -> None:
            values = [*arguments, *named.values(), *(results if isinstance(results, tuple) else [results])]
            seen[index].extend(value.detach() for value in values if isinstance(value, Tensor))

        return hook

    names = [
        "generator.backbone.SCAM_block_0.mod_1",
        "generator.backbone.SCAM_block_1",
        "generator.backbone.SCAM_block_1.conv_1.0",
        "generator.backbone.SCAM_block_2.conv_0",
        "generator.backbone.SCAM_block_2.torgb",
        "generator.backbone.SCAM_block_2.mod_0.latent_to_image",
        "encoder.backbone.block_1.cross_attention",
        "encoder.convs.1",
    ]
    for index, model in enumerate((expected, found)):
        for name in names:
            model.get_submodule(name).register_forward_hook(listen(index), with_kwargs=True)
    image, mask = make_inputs()
    wanted, got = run(expected, image, mask), run(found, image, mask)
    assert (got - wanted).norm() <= 1e-9 * wanted.norm()
    assert len(seen[0]) == len(seen[1]) > 3 * len(names) - 1
    for one, other in zip(*seen, strict=True):
        assert one.shape == other.shape and (one - other).norm() <= 1e-9 * other.norm()


def test_hook_on_all_modules():
    expected = make_autoencoder()
    found = swapped_copy(expected)
    image, mask = make_inputs()
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *others: called.append(type(module).__name__)
    )
    try:
        assert torch.equal(run(found, image, mask), run(expected, image, mask))
    finally:
        handle.remove()
    assert called[: len(called) // 2] == called[len(called) // 2 :]


def overlapping(mask: Tensor) -> Tensor:
    mask[0, :2, 3, 4] = 1
    return mask


def soft(mask: Tensor) -> Tensor:
    return 0.9 * mask


def learned(mask: Tensor) -> Tensor:
    return mask.requires_grad_()


@pytest.mark.parametrize(
    "change, message",
    [
        (overlapping, "the mask has a pixel that belongs to 2 labels"),
        (soft, "the mask has other numbers than zeros and ones"),
        (learned, "the mask takes a gradient"),
    ],
)
def test_masks_that_are_not_one_hot(change, message):
    """The own code runs, all of it, and there is one warning from each network, however often it is called."""
    expected = make_autoencoder()
    found = swapped_copy(expected)
    image, mask = make_inputs()
    mask = change(mask)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(run(found, image, mask), run(expected, image, mask))
    own = [str(warning.message) for warning in caught if "sca_kernels" in str(warning.message)]
    assert own == [
        f"{name} runs its own code, not sca_kernels: {message}"
        for name in ("SemanticAttentionTransformerEncoder", "SCAMGenerator")
    ]
    _, good = make_inputs()
    with without_own_code():
        run(found, image, good)


def test_planes_of_a_label_that_differ():
    expected, (x, planes, latents) = make_modulation()
    found = swapped_copy(expected, latents_per_label=LAYOUT)
    planes[1, 4] = 0
    with pytest.warns(UserWarning, match="the mask's planes for the latents of a label differ"):
        result = run(found, x, planes, latents)
    assert torch.equal(result[0], run(expected, x, planes, latents)[0])
    wrong = (torch.rand(1, LAYOUT.count, LAYOUT.count) < 0.5).double()
    attention = published.MaskedAttention(LATENT_DIM, LATENT_DIM, 8, 1).double()
    found = swapped_copy(attention, latents_per_label=LAYOUT)
    with pytest.warns(UserWarning, match="the mask is not that of latents of the same label"):
        assert torch.equal(found(latents, latents, wrong), attention(latents, latents, wrong))


def test_other_shapes_have_the_published_results():
    """Errors, or what broadcasting makes of them."""
    expected = make_autoencoder()
    found = swapped_copy(expected)
    image, mask = make_inputs()
    cases: list[tuple[Tensor, Tensor]] = [(image, mask[:, :3]), (image[:1], mask), (image, mask[0]), (image[0], mask)]
    for arguments in cases:
        results: list[Any] = []
        for model in (expected, found):
            try:
                results.append(run(model, *arguments))
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                results.append(str(error))
        if isinstance(results[0], str):
            assert results[0] == results[1]
        else:
            torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)


def test_a_mask_is_looked_at_once(monkeypatch):
    """By all networks, until it is written to; and resized once for each resolution."""
    image, mask = make_inputs()
    looked: list[Tensor] = []
    planned: list[tuple[int, int]] = []
    look, plan = masks.labels_of_one_hot, LabelMap._planned_at
    monkeypatch.setattr(masks, "labels_of_one_hot", lambda mask: looked.append(mask) or look(mask))
    monkeypatch.setattr(LabelMap, "_planned_at", lambda self, *size: planned.append(size) or plan(self, *size))
    found = swapped_copy(make_autoencoder())
    for _ in range(2):
        run(found, image, mask)
    assert len(looked) == 1
    assert len(planned) == len(set(planned))
    mask[:, [0, 1]] = mask[:, [1, 0]]
    changed = run(found, image, mask)
    assert len(looked) == 2
    sca_kernels.swap_out(found)
    assert (changed - run(found, image, mask)).norm() <= 1e-9 * changed.norm()


def test_assumed_one_hot(monkeypatch):
    """Nothing is compared, so nothing waits for a device."""
    monkeypatch.setattr(masks, "is_one_hot", lambda *arguments: pytest.fail("the mask is looked at"))
    expected = make_autoencoder()
    found = swapped_copy(expected, assume_one_hot=True)
    image, mask = make_inputs()
    assert_same(expected, found, lambda model: [model(image, mask)], {})


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(duplicate):
    """A copy computes with its own parameters."""
    model = make_autoencoder()
    sca_kernels.swap_in(model)
    image, mask = make_inputs()
    before = run(model, image, mask)
    other = duplicate(model)
    with without_own_code():
        assert torch.equal(run(other, image, mask), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    changed = run(other, image, mask)
    assert torch.equal(run(model, image, mask), before) and not torch.allclose(changed, before)
    sca_kernels.swap_out(other)
    assert (run(other, image, mask) - changed).norm() <= 1e-9 * changed.norm()
    with without_own_code():
        run(model, image, mask)


def test_saved_and_loaded():
    model = swapped_copy(make_autoencoder())
    image, mask = make_inputs()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with without_own_code():
        assert torch.equal(run(loaded, image, mask), run(model, image, mask))
    fresh = make_autoencoder(latent_pos_emb="none")
    fresh.load_state_dict(model.state_dict())
    assert (run(fresh, image, mask) - run(model, image, mask)).norm() <= 1e-9 * run(fresh, image, mask).norm()


def test_moved_after_the_swap():
    torch.set_default_dtype(torch.float32)
    model = Autoencoder()
    randomise(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sca_kernels.swap_in(model)
    model.double().to(memory_format=torch.channels_last)
    image, mask = make_inputs()
    expected = copy.deepcopy(model)
    sca_kernels.swap_out(expected)
    torch.set_default_dtype(torch.float64)
    assert_same(expected, model, lambda model: [model(image, mask)], {})
    before = run(model, image, mask)
    before.sum().backward()
    optimizer.step()
    assert not torch.allclose(run(model, image, mask), before)


def test_other_parameters_for_a_call():
    model = swapped_copy(make_autoencoder())
    image, mask = make_inputs()
    others = {name: parameter * 0.9 for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    found = torch.func.functional_call(model, others, (image, mask))
    model.load_state_dict(others, strict=False)
    assert (found - run(model, image, mask)).norm() <= 1e-9 * found.norm()


@pytest.mark.parametrize("first", [True, False])
def test_distributed(first, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        expected = make_autoencoder()
        model = copy.deepcopy(expected)
        if first:
            sca_kernels.swap_in(model)
        wrapped = DistributedDataParallel(model)
        if not first:
            assert all(row.path.startswith("module.") for row in sca_kernels.swap_in(wrapped).rows)
        image, mask = make_inputs()
        with without_own_code():
            run(wrapped, image, mask).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    run(expected, image, mask).square().sum().backward()
    for parameter, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert parameter.grad is not None and wanted.grad is not None
        assert (parameter.grad - wanted.grad).norm() <= 1e-9 * wanted.grad.norm() + 1e-12


TYPES: dict[str, dict[str, Any]] = {
    "noise": {},
    "no noise": {"add_noise": False},
    "simplex": {"attention_type": "simplex", "add_noise": False},
    "layer norm": {"norm_type": "LayerNorm", "add_noise": False},
    "batch norm": {"norm_type": "BatchNorm", "add_noise": False},
    "map encoder": {"num_up_layers_with_mask_adain": 4, "add_noise": False},
    "no modulation": {"modulate": False, "add_noise": False},
    "equalised": {"use_equalized_lr": True},
}


@pytest.mark.parametrize("name", TYPES)
def test_types_under_autocast(name):
    torch.set_default_dtype(torch.float32)
    expected = published.SCAMGenerator(**GENERATOR | TYPES[name])
    randomise(expected)
    found = swapped_copy(expected)
    _, mask = make_inputs(dtype=torch.float32)
    planes, latents = mask.repeat_interleave(3, 1), torch.randn(2, 12, LATENT_DIM)
    x = torch.randn(2, 16, 6, 5)
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for model in (expected, found):
            block = model.backbone["SCAM_block_2"]
            with torch.autocast("cpu", torch.bfloat16):
                torch.manual_seed(0)
                results.append(
                    [
                        model(mask, latents),
                        *block(x.to(dtype), planes, latents),
                        *block.mod_0(x.to(dtype), planes, latents),
                        block.torgb(x[:, :8].to(dtype), planes, latents),
                    ]
                )
        for wanted, got in zip(*results, strict=True):
            assert got.dtype == wanted.dtype
            assert (got.double() - wanted.double()).norm() <= 0.1 * wanted.double().norm()


def test_noise_is_drawn_in_the_default_type():
    """As published, whatever the type of the model; and in the same order."""
    torch.set_default_dtype(torch.float32)
    module, (x, planes, latents) = make_modulation()
    found = swapped_copy(module, latents_per_label=LAYOUT)
    module.draw_noise = lambda x: torch.randn((2, x.shape[3], x.shape[2], 1)).double()  # type: ignore[method-assign]
    inputs = x.double(), planes, latents.double()
    torch.testing.assert_close(run(found, *inputs), run(module, *inputs), rtol=1e-9, atol=1e-12)


def test_parts_know_the_layout_of_their_network():
    generator = published.SCAMGenerator(**GENERATOR | {"num_labels_bg": 1})
    encoder = published.SemanticAttentionTransformerEncoder(**ENCODER | {"num_latents_bg": 7})
    sca_kernels.swap_in(nn.ModuleList([generator, encoder]))
    assert vars(generator.backbone["SCAM_block_0"].mod_0)["forward"].layout == LatentLayout((1, 3, 3, 3))
    assert vars(encoder.backbone["block_0"]["self_attention"])["forward"].layout == LatentLayout((7, 3, 3, 3))
