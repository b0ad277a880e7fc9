"""How an operator is made: one torch schema, a Triton launcher, a torch implementation, a shape function.

torch's dispatcher picks between them by the device of the tensors; nothing else in the package does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.library import Library

_library = Library("lmops", "DEF")


@dataclass(frozen=True)
class Operator:
    """What `define_op` was given, for `lmops doctor` and for tests that name the implementation they run."""

    name: str
    triton: Callable[..., Any]
    torch: Callable[..., Any]
    cpu_uses_triton: bool

    def implementation(self, device_type: str) -> tuple[str, str]:
        """Which implementation tensors on `device_type` ("cpu", "cuda") get, and why."""
        if device_type == "cuda":
            return "triton", "tensors on a GPU"
        if self.cpu_uses_triton:
            return "triton", "TRITON_INTERPRET=1 or LMOPS_TRITON_ON_CPU=1 was set when lmops was imported"
        return "torch", "tensors on the CPU"


OPERATORS: dict[str, Operator] = {}


def define_op(
    schema: str,
    *,
    triton: Callable[..., Any],
    torch_cpu: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Register `lmops::<schema>` and return the callable operator.

    triton: the launcher, for CUDA tensors (NVIDIA and AMD). With TRITON_INTERPRET=1 (Triton's interpreter) or
        LMOPS_TRITON_ON_CPU=1 (a Triton driver that takes CPU tensors) it also gets the CPU's; both are read here,
        once, so a running program never changes its implementation.
    torch_cpu: the same operator written in torch, for CPU tensors.
    fake: shapes, dtypes and strides of the result, for torch.compile.

    All three take what the schema says and return new tensors; what they write to, it declares. Autograd is not
    registered: the public function enters a `torch.autograd.Function` only where a gradient is needed, which costs a
    call without one 8 µs less.
    """
    name = schema.partition("(")[0]
    cpu_uses_triton = "1" in (os.environ.get("TRITON_INTERPRET"), os.environ.get("LMOPS_TRITON_ON_CPU"))
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _on_its_device(triton), "CUDA")
    _library.impl(name, triton if cpu_uses_triton else torch_cpu, "CPU")
    torch.library.register_fake(f"lmops::{name}", fake, lib=_library)
    OPERATORS[name] = Operator(name, triton, torch_cpu, cpu_uses_triton)
    return getattr(torch.ops.lmops, name).default


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher with the first tensor's GPU as the current one, which is where Triton launches."""

    @wraps(launcher)
    def call(first: torch.Tensor, *rest: Any) -> Any:
        with torch.cuda.device(first.device):
            return launcher(first, *rest)

    return call


def distinct(*arguments: Any) -> Sequence[Any]:
    """The arguments; for torch.compile, whose autograd functions take no tensor twice, with views of repeated ones."""
    if not torch.compiler.is_compiling():
        return arguments
    return [
        a.view_as(a) if isinstance(a, torch.Tensor) and any(a is b for b in arguments[:i]) else a
        for i, a in enumerate(arguments)
    ]


def differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd must know of what is computed from the tensors.

    In forward mode always: an operator would drop the tangents without a word, where an autograd function, none of
    which has a jvp, refuses them.
    """
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0


def warp_size() -> int:
    """Threads of a warp on the GPU that Triton compiles for: 32, on AMD's CDNA 64. In its interpreter 32."""
    import triton

    return 32 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().warp_size


def backend() -> str:
    """What Triton's compiler is for: "cuda", "hip", ... or "interpreter"."""
    import triton

    return (
        "interpreter" if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().backend
    )


def target_name() -> str:
    """What Triton compiles for: "sm_90", "gfx942", ... or "interpreter"."""
    import triton

    if triton.knobs.runtime.interpret:
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
