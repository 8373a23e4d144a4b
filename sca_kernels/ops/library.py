"""The ``torch.library`` namespace that all operators are defined in, and how those with gradients are registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from .. import backends
from ..tracing import is_plain_call

LIBRARY = Library("sca", "DEF")

Results = tuple[Tensor, ...]
Saved = tuple[tuple[Tensor | None, ...], tuple[Any, ...]]
Gradients = tuple[Tensor | None, ...]


def register(
    name: str,
    schema: str,
    backward_schema: str,
    *,
    differentiable: Sequence[str],
    save: Callable[[tuple[Any, ...], Results], Saved],
    fake: Callable[..., Results],
    backward_fake: Callable[..., Gradients],
    constants: Sequence[str] = (),
    differentiable_results: int | None = None,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Defines an operator and its backward pass, which is an operator as well, and dispatches both to the backends.

    The last argument of the operator is the backend. The backward operator takes the gradients of the results, what
    was saved, and which gradients are wanted; it returns those of the ``differentiable`` arguments in their order. For
    one that is not wanted a backend returns None, and the operator, which must return tensors, an empty one. Its own
    gradient is refused: ``once_differentiable`` would return one that is detached, and drop gradient penalties without
    a word.

    Args:
        name: of the operator; that of the backward operator ends in "_backward".
        schema: arguments and results of the operator.
        backward_schema: of the backward operator, whose last two arguments are ``str backend, bool[...] output_mask``.
        differentiable: the arguments that take gradients.
        save: gets the operator's arguments and results, returns the tensors and the other values that are passed on to
            the backward operator.
        fake, backward_fake: return what a backend does, without values, from the arguments of either operator.
        constants: further arguments that the user gives as tensors.
        differentiable_results: how many of the results, from the first on, take gradients. Default: all.

    Returns:
        the operator, for code that is compiled, and a function that does the same for eager calls: to have the
        dispatcher find the autograd kernel costs as much as a small call.
    """
    backward_name = f"{name}_backward"
    LIBRARY.define(f"{name}{schema}")
    LIBRARY.define(f"{backward_name}{backward_schema}")
    operator = getattr(torch.ops.sca, name).default
    backward_operator = getattr(torch.ops.sca, backward_name).default
    arguments_by_name = [argument.name for argument in operator._schema.arguments]
    positions = [arguments_by_name.index(argument) for argument in differentiable]
    given_tensors = itemgetter(*positions, *(arguments_by_name.index(argument) for argument in constants))
    gradients_in = len(operator._schema.returns) if differentiable_results is None else differentiable_results

    def forward(ctx: Any, *arguments: Any) -> Results:
        results = below_autograd(*arguments)
        tensors, ctx.settings = save(arguments, results)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        if gradients_in < len(results):
            ctx.mark_non_differentiable(*results[gradients_in:])
        return results

    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        wanted: list[Tensor | None] = [None] * len(needed)
        gradients = gradients[:gradients_in]
        if any(gradient is not None for gradient in gradients):
            output_mask = [needed[position] for position in positions]
            arguments = (*gradients, *ctx.saved_tensors)
            run = backward_operator
            if not torch.is_grad_enabled() and is_plain_call(arguments):
                run = backward_dispatch
            found = run(*arguments, *ctx.settings, output_mask)
            for position, asked, gradient in zip(positions, output_mask, found, strict=True):
                if asked:
                    wanted[position] = gradient
        return tuple(wanted)

    # The name shows in grad_fn and in profiles.
    function: Any = type(
        "".join(word.capitalize() for word in name.split("_")),
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def autograd(*arguments: Any) -> Results:
        # Forward-mode differentiation must reach the function too, which refuses it: below it tangents would be lost.
        if forward_ad._current_level >= 0:
            return function.apply(*arguments)
        if torch.is_grad_enabled():
            for tensor in given_tensors(arguments):
                if tensor is not None and tensor.requires_grad:
                    return function.apply(*arguments)
        return below_autograd(*arguments)

    def below_autograd(*arguments: Any) -> Results:
        if is_plain_call(given_tensors(arguments)):
            return dispatch(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    def backward_autograd(*arguments: Any) -> Results:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            raise RuntimeError(
                f"{name}: gradients of gradients (create_graph=True) are computed only by the reference: "
                "use \"with sca_kernels.backend('reference'):\" around the forward pass"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return backward_operator(*arguments)

    def dispatch(*arguments: Any) -> Results:
        return backends.implementation(name, arguments[-1])(*arguments[:-1])

    def backward_dispatch(*arguments: Any) -> Gradients:
        *rest, backend, output_mask = arguments
        return backends.implementation(backward_name, backend)(*rest, output_mask)

    def all_tensors(run: Callable[..., Gradients]) -> Callable[..., Results]:
        def run_operator(*arguments: Any) -> Results:
            saved = arguments[gradients_in]
            return tuple(saved.new_empty(0) if found is None else found for found in run(*arguments))

        return run_operator

    torch.library.register_fake(f"sca::{name}", fake, lib=LIBRARY)
    torch.library.register_fake(f"sca::{backward_name}", all_tensors(backward_fake), lib=LIBRARY)
    LIBRARY.impl(name, dispatch, "CompositeExplicitAutograd")
    LIBRARY.impl(backward_name, all_tensors(backward_dispatch), "CompositeExplicitAutograd")
    LIBRARY.impl(name, autograd, "Autograd")
    LIBRARY.impl(backward_name, backward_autograd, "Autograd")
    return operator, autograd
