"""Published SCAM modules that compute with these kernels, and back: :func:`swap_in` and :func:`swap_out`.

A swapped module has another ``forward``, an attribute of its own that hides that of its class, and nothing else: class,
parameters, buffers, state dict and submodules stay the same objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from torch import nn

from ..labels import LatentLayout
from .recognise import (
    ATTENTION,
    BLOCK,
    ENCODER,
    GENERATOR,
    MODULATION,
    TO_RGB,
    TRANSFORMER,
    Kind,
    changed_forward,
    kind_of,
    latents_of,
    near_miss,
    own_layout,
)
from .report import SwapReport, SwapRow
from .runners import (
    AttentionRunner,
    BlockRunner,
    EncoderRunner,
    GeneratorRunner,
    ModulationRunner,
    Runner,
    ToRGBRunner,
    TransformerRunner,
    runner_of,
)

__all__ = ["SwapReport", "SwapRow", "swap_in", "swap_out"]

_RUNNERS: dict[Kind, type[Runner]] = {
    ATTENTION: AttentionRunner,
    TRANSFORMER: TransformerRunner,
    MODULATION: ModulationRunner,
    TO_RGB: ToRGBRunner,
    BLOCK: BlockRunner,
    GENERATOR: GeneratorRunner,
    ENCODER: EncoderRunner,
}
# These compute the modules of some kinds inside of them without calling them.
_COMPUTES = {ENCODER: (TRANSFORMER, ATTENTION), MODULATION: (TRANSFORMER, ATTENTION), TRANSFORMER: (ATTENTION,)}


def swap_in(
    model: nn.Module,
    *,
    latents_per_label: LatentLayout | Sequence[int] | None = None,
    assume_one_hot: bool = False,
) -> SwapReport:
    """Lets the published SCAM modules in a model compute with these kernels, with the same results.

    ``MaskedAttention``, ``MaskedTransformer``, ``SCAMModulation``, ``ToRGB``, ``SCAMResUpscale``, ``SCAMGenerator`` and
    ``SemanticAttentionTransformerEncoder`` are recognised by their attributes and the arguments of their ``forward``.
    Parameters, buffers, state dict, classes and submodules stay the same objects. Modules that are swapped already are
    swapped anew.

    Args:
        model: any module that contains published ones, or is one.
        latents_per_label: how many latents each label has, for modules outside of a generator or an encoder, which know
            that. Default: such modules are left alone.
        assume_one_hot: whether to believe that masks are one-hot instead of looking once at each, which waits for a GPU
            and cannot be done while compiling or capturing a graph. If one is not, results are wrong.

    Returns:
        what each published module runs now. It prints as a table.

    Raises:
        TypeError: if ``model`` is not a module, or ``latents_per_label`` not a sequence of integers.

    Example:
        >>> import torch
        >>> print(swap_in(torch.nn.Linear(3, 3)))
        module  kind  runs
        no published module was found
    """
    _check_model(model)
    given = latents_per_label
    if given is not None and not isinstance(given, LatentLayout):
        given = LatentLayout(tuple(given))
    return SwapReport(tuple(_visit(model, "", given, assume_one_hot, {}, set())))


def swap_out(model: nn.Module) -> None:
    """Lets all modules of a model run their own code again, exactly as before :func:`swap_in`.

    Args:
        model: any module, swapped or not.

    Raises:
        TypeError: if ``model`` is not a module.

    Example:
        >>> import torch
        >>> swap_out(torch.nn.Linear(3, 3))
    """
    _check_model(model)
    for module in model.modules():
        if runner_of(module) is not None:
            del module.__dict__["forward"]


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _visit(
    module: nn.Module,
    path: str,
    layout: LatentLayout | None,
    assume_one_hot: bool,
    computed: dict[Kind, str],
    seen: set[nn.Module],
) -> Iterator[SwapRow]:
    """Swaps a module and those inside of it.

    Args:
        layout: of its latents, as known from outside.
        computed: kinds of modules that an outer module computes, with its path.
        seen: modules that were visited.
    """
    if module in seen:
        return
    seen.add(module)
    kind = kind_of(module)
    if kind is not None:
        layout = own_layout(module, kind) or layout
        reason = _swap(module, kind, layout, assume_one_hot)
        within = computed.get(kind) if reason is None else None
        yield SwapRow(path, kind.name, reason, within)
        if reason is None and within is None:
            computed = computed | dict.fromkeys(_COMPUTES.get(kind, ()), path)
    else:
        reason = near_miss(module)
        if reason is not None:
            yield SwapRow(path, type(module).__name__, reason)
    children = ((f"{path}.{name}" if path else name, child) for name, child in module.named_children())
    yield from chain.from_iterable(
        _visit(child, name, layout, assume_one_hot, computed, seen) for name, child in children
    )


def _swap(module: nn.Module, kind: Kind, layout: LatentLayout | None, assume_one_hot: bool) -> str | None:
    """Swaps a module; why it runs its own code, or None."""
    before = runner_of(module)
    if before is not None:
        layout = layout or before.layout
        del module.__dict__["forward"]
    reason = changed_forward(module)
    if reason is not None:
        return reason
    if layout is None:
        return "its latents per label are not known, give latents_per_label"
    count = latents_of(module, kind)
    if count not in (None, layout.count):
        return f"it has {count} latents, and {layout.count} are known of"
    runner = _RUNNERS[kind](module, layout, assume_one_hot)
    module.__dict__["forward"] = runner
    return runner.obstacle()
