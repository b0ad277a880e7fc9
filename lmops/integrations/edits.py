"""What `lmops.optimize` does to a model, so that it can be undone, and the report of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

from torch import nn

# what the operators of each kind are called
ATTENTION = ("attention_forward", "attention_backward")
SOFTMAX = ("softmax_forward", "softmax_backward")
NORM = ("norm", "norm_forward", "norm_backward")
GATED = ("gated_forward", "gated_backward")
LOSS = ("cross_entropy_state", "cross_entropy_forward", "cross_entropy_backward")


@dataclass(frozen=True)
class Item:
    """A module: its name and class, what it uses now or why it stayed as it was, and the operators that it calls."""

    name: str
    kind: str
    what: str
    operators: tuple[str, ...] = ()


@dataclass
class Report:
    """What `optimize` did; `print` shows it as a table.

    replaced, kept: modules that changed, and candidates that did not, with the reason. bytes_before, bytes_after: of
    parameters and buffers, memory that is shared counted once. implementations: which implementation ("triton" or
    "torch") every operator in use has on the model's devices, and why. verified: whether `verify` was given.
    kl_divergence, agreement: with verify and linear, the mean over positions of KL(before || after) in nats, and the
    share of positions whose largest entry is the same.
    """

    replaced: list[Item] = field(default_factory=list)
    kept: list[Item] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    implementations: dict[str, str] = field(default_factory=dict)
    verified: bool = False
    kl_divergence: float | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        rows = [("module", "class", "now"), *_grouped(self.replaced)]
        rows += [(name, kind, f"unchanged: {what}") for name, kind, what in _grouped(self.kept)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{name:{widths[0]}}  {kind:{widths[1]}}  {what}" for name, kind, what in rows]
        lines.append(f"parameters and buffers: {self.bytes_before:,} bytes before, {self.bytes_after:,} after")
        lines += [f"{name}: {how}" for name, how in self.implementations.items()]
        if self.verified:
            lines.append("verified: as accurate as before, by the rule of lmops.testing.assert_accurate")
        if self.kl_divergence is not None and self.agreement is not None:
            lines.append(
                f"quantized: KL divergence {self.kl_divergence:.2e}, the largest entry is the same at "
                f"{100 * self.agreement:.1f} % of positions"
            )
        return "\n".join(lines)


def _grouped(items: Sequence[Item]) -> list[tuple[str, str, str]]:
    """A row for all that differ in a number alone: h.0.attn, h.1.attn, ... are h.*.attn (12)."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for item in items:
        pattern = ".".join("*" if part.isdigit() else part for part in item.name.split("."))
        groups.setdefault((pattern, item.kind, item.what), []).append(item.name)
    return [
        (names[0] or "(the model)" if len(names) == 1 else f"{pattern} ({len(names)})", kind, what)
        for (pattern, kind, what), names in groups.items()
    ]


@dataclass
class Edit:
    """An entry of an instance's `__dict__`, and what it was. Data alone, so that a model with edits can be copied."""

    owner: nn.Module
    name: str
    existed: bool
    old: Any

    def undo(self) -> None:
        if self.existed:
            self.owner.__dict__[self.name] = self.old
        else:
            self.owner.__dict__.pop(self.name, None)


class Work:
    """A model that is being changed: what was asked for, what has been done."""

    def __init__(self, model: nn.Module, skip: Sequence[str]) -> None:
        self.model, self.skip = model, skip
        size = size_of(model)
        self.report = Report(bytes_before=size, bytes_after=size)
        self.edits: list[Edit] = []
        self.children = [(module, dict(module._modules)) for module in model.modules()]
        self.claimed: set[int] = set()  # modules that have been decided on

    def skipped(self, name: str) -> bool:
        return any(f".{pattern}." in f".{name}." or fnmatchcase(name, pattern) for pattern in self.skip)

    def set(self, owner: nn.Module, name: str, value: Any) -> None:
        self.edits.append(Edit(owner, name, name in owner.__dict__, owner.__dict__.get(name)))
        owner.__dict__[name] = value

    def replace_forward(
        self, name: str, module: nn.Module, forward: Callable[..., Any], what: str, operators: tuple[str, ...]
    ) -> None:
        self.claimed.add(id(module))
        if "forward" in module.__dict__:
            return self.keep(name, module, "its forward has been replaced before")
        self.set(module, "forward", MethodType(forward, module))
        return self.replaced(name, module, what, operators)

    def replaced(self, name: str, module: nn.Module, what: str, operators: tuple[str, ...]) -> None:
        self.report.replaced.append(Item(name, type(module).__name__, what, operators))

    def keep(self, name: str, module: nn.Module, why: str) -> None:
        self.claimed.add(id(module))
        self.report.kept.append(Item(name, type(module).__name__, why))

    def undo(self) -> None:
        for edit in reversed(self.edits):
            edit.undo()
        for module, children in self.children:
            module._modules.update(children)


def size_of(model: nn.Module) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())
