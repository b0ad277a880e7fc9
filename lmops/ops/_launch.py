"""Launches that are prepared once: what a call like an earlier one needs is looked up, not worked out again.

To choose a launch (layouts, tile, flags) takes Python 5 to 40 µs, and Triton's binding of its arguments another 8 to
20, more than a kernel of one token's row runs. Both follow from the shapes, strides, types and alignment of the
tensors and from the options of the call, and these are the same in every step of a decoding loop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R")
MOST = 2_048  # of calls that are not alike, remembered an operator
PLAIN = frozenset((type(None), bool, int, float, str, torch.dtype))  # what is seen sooner than that it is no tensor


class Launch:
    """A kernel, its grid, the arguments that follow its leading ones, and its options. Called with the leading ones.

    leading: tensors, or None, and numbers that the kernel does not specialize. Whatever Triton compiles for must be the
    same in all calls: their types, and whether tensors begin at a multiple of 16 bytes. The first call goes through
    Triton's `kernel[grid](...)`, those after it launch what that has compiled.
    """

    __slots__ = ("_again", "_behind", "arguments", "grid", "kernel", "options")

    def __init__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        self.kernel, self.arguments, self.options = kernel, arguments, options
        self.grid = (*grid, 1, 1)[:3]
        self._again: Any = None  # launches what the first call compiled
        self._behind: tuple[Any, ...] = ()

    def __call__(self, *leading: Any) -> None:
        again = self._again
        if again is not None:
            again(*leading, *self._behind)
            return
        compiled = self.kernel[self.grid](*leading, *self.arguments, **self.options)
        if compiled is not None:  # which it is in Triton's interpreter
            names = self.kernel.arg_names[len(leading) + len(self.arguments) :]
            self._behind = (*self.arguments, *(self.options[name] for name in names))
            self._again = compiled[self.grid]


def prepared(prepare: Callable[..., R]) -> Callable[..., R]:
    """`prepare`, which is called once for all arguments that are alike, and whose result is remembered.

    Alike are tensors of the same shape, strides and type that begin equally far past a multiple of 16 bytes, and other
    arguments, which must be hashable, that are equal; on one device. So `prepare` must look at nothing else of them.
    It takes positional arguments only.
    """
    known: dict[tuple[Any, ...], R] = {}

    @wraps(prepare)
    def remembered(*arguments: Any) -> R:
        runtime, driver = _triton()
        key = (
            None if runtime.interpret else driver.active.get_current_device(),
            *[
                a
                if type(a) in PLAIN or not isinstance(a, Tensor)
                else (a.shape, a.stride(), a.dtype, a.data_ptr() & 15)
                for a in arguments
            ],
        )
        found = known.get(key)
        if found is None:
            if len(known) == MOST:
                known.clear()
            found = known[key] = prepare(*arguments)
        return found

    return remembered


@cache
def _triton() -> tuple[Any, Any]:
    """Its switches and its drivers. An interpreter has no driver, and no device."""
    import triton
    from triton.runtime.driver import driver

    return triton.knobs.runtime, driver
