"""Triton's interpreter as the tests run kernels in it: with today's NumPy, and with canaries around every tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Mends what Triton 3.6 interprets otherwise than it compiles.

    ``range(number)`` fails with NumPy 2.4 and later, which converts no array of one element to a number any more
    (github.com/triton-lang/triton/issues/9171). Conversion to bfloat16 cuts numbers off instead of rounding them, and
    a product of bfloat16 multiplies their bits as integers. And each call of a device function patches the whole
    language again, which takes most of the time: once in a launch is enough. The precision ``bf16x3`` is not known; all
    are computed as float32 here.
    """
    patch, convert, dot = (
        interpreter._patch_lang_tensor,
        interpreter._convert_float,
        interpreter.InterpreterBuilder.create_dot,
    )

    def patch_and_repair(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def convert_and_round(data: Any, given: Any, wanted: Any, rounding_mode: Any) -> Any:
        if given == tl.float32 and wanted == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16)
            return rounded.numpy().view(np.uint16)
        if given == tl.bfloat16 and wanted == tl.float32:
            return (data.astype(np.uint32) << 16).view(np.float32)
        return convert(data, given, wanted, rounding_mode)

    def dot_of_numbers(self: Any, a: Any, b: Any, total: Any, input_precision: Any, imprecise: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (
                interpreter.TensorHandle(convert_and_round(side.data, tl.bfloat16, tl.float32, None), tl.float32)
                for side in (a, b)
            )
        return dot(self, a, b, total, input_precision, imprecise)

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(
        builder.options, allowed_dot_input_precisions=(*builder.options.allowed_dot_input_precisions, "bf16x3")
    )
    launch, patched = interpreter.GridExecutor.__call__, set()

    def launch_anew(self: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        launch(self, *arguments, **options)

    def call_device_function(self: Any, *arguments: Any, **options: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*arguments, **options)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call_device_function
    interpreter._patch_lang_tensor = patch_and_repair
    interpreter._convert_float = convert_and_round
    interpreter.InterpreterBuilder.create_dot = dot_of_numbers


def between_canaries(run: Callable[..., None]) -> Callable[..., None]:
    def guarded_run(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: Any) -> None:
        guards = {id(value): Guarded(value) for value in arguments if isinstance(value, torch.Tensor)}
        run(kernel, grid, tuple(guards[id(v)].inside if id(v) in guards else v for v in arguments), options)
        for guard in guards.values():
            guard.check_and_return(kernel.__name__)

    return guarded_run


class Guarded:
    """A copy of a tensor in memory of its own, with canaries on both sides and in the gaps that its strides leave.

    Attributes:
        inside: the copy, with the strides of the original.
    """

    ROOM = 64  # elements on each side

    def __init__(self, original: torch.Tensor) -> None:
        strides = original.stride()
        # Of an expanded tensor there is one element to be copied where it shows many.
        self.original = original[tuple(slice(None if stride else 1) for stride in strides)]
        span = sum((size - 1) * stride for size, stride in zip(self.original.shape, strides, strict=True)) + 1
        self.memory = torch.empty(span + 2 * self.ROOM, dtype=original.dtype)
        self.memory.view(torch.uint8).fill_(0xFF)  # a NaN, or -1
        self.inside = self.memory.as_strided(original.shape, strides, self.ROOM)
        self.copy = self.memory.as_strided(self.original.shape, strides, self.ROOM)
        self.copy.copy_(self.original)
        self.before = self.memory.clone()

    def check_and_return(self, kernel: str) -> None:
        after, before = (memory.view(torch.uint8).view(len(memory), -1) for memory in (self.memory, self.before))
        if torch.equal(after, before):
            return
        changed = (after != before).any(1)
        changed.as_strided(self.copy.shape, self.copy.stride(), self.ROOM).fill_(False)
        assert not changed.any(), f"{kernel} wrote beside a tensor of shape {tuple(self.inside.shape)}"
        self.original.copy_(self.copy)
