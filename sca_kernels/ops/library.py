"""The ``torch.library`` namespace that all operators are defined in, and how those with gradients are registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import Library

from .. import backends
from ..tracing import is_plain_call
from .known_calls import Given, KnownCalls

LIBRARY = Library("sca", "DEF")

Results = tuple[Tensor, ...]
Saved = tuple[tuple[Tensor | None, ...], tuple[Any, ...]]
Gradients = tuple[Tensor | None, ...]


# A call that autograd has to know of: what computes it, the arguments of the operator, the positions of those that may
# take gradients, and whether the results that only the backward pass needs are returned as well.
_Call = tuple[Callable[..., Results], tuple[Any, ...], Sequence[int], bool]


@dataclass(frozen=True)
class Operator:
    """An operator with gradients, as its public function calls it.

    Attributes:
        run: takes tensors and settings that were checked and prepared, and what the user gave if a call like that may
            skip its checks from now on; returns the results.
        run_known: takes what the user gave, in two parts; returns the results, or None if it has to be checked. Results
            that are only there for the backward pass are missing, or None.
    """

    run: Callable[[tuple[Tensor | None, ...], tuple[Any, ...], Given | None], Results]
    run_known: Callable[[tuple[Any, ...], tuple[Any, ...]], tuple[Any, ...] | None]


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
) -> Operator:
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
        differentiable_results: how many of the results, from the first on, take gradients. The others are there for the
            backward pass alone: implementations leave them out if told that it is not ``for_backward``. Default: all.
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
    without_backward = {"for_backward": False} if gradients_in < len(operator._schema.returns) else {}
    known_calls = KnownCalls()

    # Autograd looks at each argument of a function, so it gets the few that may take gradients, the inputs, one by one
    # and all the rest as one. It looks at results too: what only the backward pass needs is left out if nobody else is
    # going to see it.
    def forward(ctx: Any, call: _Call, *inputs: Tensor) -> Results:
        run, arguments, ctx.where, returns_all = call
        results = run(*arguments)
        tensors, ctx.settings = save(arguments, results)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        if gradients_in == len(results):
            return results
        if not returns_all:
            return results[:gradients_in]
        ctx.mark_non_differentiable(*results[gradients_in:])
        return results

    # A table that was given may be smaller than its gradient here: autograd sums that to the shape of the input.
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = gradients[:gradients_in]
        _, *needed = ctx.needs_input_grad
        if all(gradient is None for gradient in gradients):
            return (None, *(None for _ in needed))
        wanted = {position for position, is_needed in zip(ctx.where, needed, strict=True) if is_needed}
        output_mask = [position in wanted for position in positions]
        arguments = (*gradients, *ctx.saved_tensors)
        run = backward_operator
        if not torch.is_grad_enabled() and is_plain_call(arguments):
            run = backward_dispatch
        found = dict(zip(positions, run(*arguments, *ctx.settings, output_mask), strict=True))
        return (None, *(found[position] if position in wanted else None for position in ctx.where))

    # The name shows in grad_fn and in profiles.
    function: Any = type(
        "".join(word.capitalize() for word in name.split("_")),
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )
    # What Function.apply does before it goes on to this, for transforms, a known call has no need of.
    apply_to_plain_tensors = super(torch.autograd.Function, function).apply

    def run(tensors: tuple[Tensor | None, ...], settings: tuple[Any, ...], given: Given | None) -> Results:
        if torch.compiler.is_compiling():
            return operator(*tensors, *settings)
        # To have the dispatcher find the autograd kernel costs as much as a small call.
        results = autograd(*tensors, *settings)
        if given is not None:
            known_calls.add(given, tensors, settings)
        return results

    def run_known(tensors: tuple[Any, ...], others: tuple[Any, ...]) -> tuple[Any, ...] | None:
        known = known_calls.find(tensors, others)
        if known is None:
            return None
        settings, where = known
        if where:
            call = (dispatch, (*tensors, *settings, "cpu"), where, False)
            return apply_to_plain_tensors(call, *[tensors[position] for position in where])
        return backends.implementation(name, "cpu")(*tensors, *settings, **without_backward)

    def autograd(*arguments: Any) -> Results:
        where = [position for position in positions if arguments[position] is not None]
        inputs = [arguments[position] for position in where]
        # Forward-mode differentiation must reach the function too, which refuses it: below it tangents would be lost.
        if forward_ad._current_level >= 0 or (
            torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        ):
            return function.apply((below_autograd, arguments, where, True), *inputs)
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
    return Operator(run, run_known)
