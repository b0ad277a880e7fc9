"""AWQ (arXiv 2306.00978): input channels that matter are scaled up before rounding, and what makes them down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmops.quantization.rounding import Inputs, float_weight
from lmops.quantization.tensor import QuantizedTensor

STEPS = 20  # exponents of the channels' magnitude that are tried, 0 to 1
ROWS = 1024  # of a weight that the search looks at


@dataclass(frozen=True)
class Fold:
    """Where the inverse of scales of the consumers' inputs can go: into what another module of the block puts out.

    producer: a norm with a weight, or a linear layer. consumers: linear layers that all read the same. By their names
        in a block.
    rows: those of a linear producer that the consumers read: "all", the "values" of a fused (queries, keys, values),
        or "up" of a fused (gate, up). Attention repeats the rows of a key/value head for each of its query heads.
    """

    producer: str
    consumers: tuple[str, ...]
    rows: str = "all"


# A block passes over the entries that it doesn't have, and over those that turn out not to be exact in it.
FOLDS = (
    # lmops.models.GPT
    Fold("attn_norm", ("attn.qkv",)),
    Fold("attn.qkv", ("attn.out",), "values"),
    Fold("mlp_norm", ("mlp.up",)),
    Fold("mlp.up", ("mlp.down",), "up"),
    # transformers: Llama, Mistral, Qwen2, Qwen3
    Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fold("self_attn.v_proj", ("self_attn.o_proj",)),
    Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Fold("mlp.up_proj", ("mlp.down_proj",)),
    # GPT-2
    Fold("ln_1", ("attn.c_attn",)),
    Fold("attn.c_attn", ("attn.c_proj",), "values"),
    Fold("ln_2", ("mlp.c_fc",)),
    # OPT
    Fold("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fold("self_attn.v_proj", ("self_attn.out_proj",)),
    Fold("final_layer_norm", ("fc1",)),
    Fold("fc1", ("fc2",)),
)


def rows_read(fold: Fold, modules: Mapping[str, nn.Module]) -> int | None:
    """How many rows of the producer, its last ones, the consumers read; None where their sizes say otherwise."""
    n_in = float_weight(modules[fold.consumers[0]]).shape[1]
    weight = getattr(modules[fold.producer], "weight", None)
    if not isinstance(weight, Tensor):
        return None
    if weight.ndim == 1:
        return n_in if fold.rows == "all" and len(weight) == n_in else None
    n_out = len(float_weight(modules[fold.producer]))
    if fold.rows == "up":
        return n_in if n_out == 2 * n_in else None
    rows = n_out if fold.rows == "all" else (n_out - n_in) // 2
    repeats = n_in // rows if rows > 0 else 0
    if repeats * rows != n_in or (repeats > 1 and rows % _head_dim(fold, modules)):
        return None
    return rows


def _head_dim(fold: Fold, modules: Mapping[str, nn.Module]) -> int:
    """Columns that repeat together: head_dim of the attention that the consumers are in."""
    return getattr(modules[fold.consumers[0].rpartition(".")[0]], "head_dim", 1)


def _by_column(rows: Tensor, fold: Fold, modules: Mapping[str, nn.Module]) -> Tensor:
    """A value a row of the producer as one a column of the consumers, (n_in,)."""
    repeats = float_weight(modules[fold.consumers[0]]).shape[1] // len(rows)
    return rows.view(-1, 1, _head_dim(fold, modules)).expand(-1, repeats, -1).flatten() if repeats > 1 else rows


@torch.no_grad()
def _apply(fold: Fold, scales: Tensor, modules: Mapping[str, nn.Module]) -> None:
    """Multiply the consumers' columns by scales (rows_read,), and divide the rows of the producer."""
    for name in fold.consumers:
        float_weight(modules[name]).mul_(_by_column(scales, fold, modules))
    producer = modules[fold.producer]
    for p in producer.parameters(recurse=False):
        rows = (float_weight(producer) if p.ndim == 2 else p)[-len(scales) :]
        rows.div_(scales[:, None] if p.ndim == 2 else scales)


def scale_channels(
    block: nn.Module,
    run: Callable[[nn.Module], Tensor],
    inputs: Mapping[str, Inputs],
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
) -> dict[str, Tensor]:
    """Scale the channels of a float32 block where it costs nothing, so that rounding its layers changes less.

    run: the block's output for one calibration input. inputs: of each linear layer that will be rounded.
    Returns the scales of the columns, (n_in,), of those layers whose columns could be scaled.

    Each place to fold is tried first with scales between 1/2 and 2, and left alone if the block's output changes: so no
    table has to know what the norm of some model does with its weight, or what stands between two layers. Scales are
    magnitude^r for the r in 0 .. 1 with the least error of the consumers' outputs, in the paper's equation 5.
    """
    modules = dict(block.named_modules())
    expected = run(block)
    found: dict[str, Tensor] = {}
    for fold in FOLDS:
        if fold.producer not in modules or not inputs.keys() >= set(fold.consumers):
            continue
        count = rows_read(fold, modules)
        if count is None or found.keys() & set(fold.consumers):
            continue
        parts = [modules[name] for name in (fold.producer, *fold.consumers)]
        before = [(p, p.detach().clone()) for part in parts for p in part.parameters()]
        _apply(fold, torch.exp2(torch.linspace(-1, 1, count, device=expected.device)), modules)
        exact = ((run(block) - expected).norm(dim=-1) <= 1e-4 * expected.norm(dim=-1)).all()
        for p, values in before:
            p.data.copy_(values)
        if not exact:
            continue
        first = fold.consumers[0]
        magnitude = inputs[first].magnitude
        if count < len(magnitude):  # of the columns that share a row
            head_dim = _head_dim(fold, modules)
            magnitude = magnitude.view(count // head_dim, -1, head_dim).mean(1).flatten()
        best, scales = float("inf"), torch.ones_like(magnitude)
        for step in range(STEPS):
            candidate = (magnitude / magnitude.mean()).clamp(min=1e-4) ** (step / STEPS)
            candidate /= (candidate.max() * candidate.min()).sqrt()
            by_column = _by_column(candidate, fold, modules)
            error = 0.0
            for name in fold.consumers:
                w = float_weight(modules[name]).detach()
                w = w[:: -(-len(w) // ROWS)]
                rounded = QuantizedTensor.quantize(w * by_column, bits, group_size, symmetric=symmetric)
                change = rounded.dequantize() / by_column - w
                error += torch.sum((change @ inputs[first].gram) * change).item()
            if error < best:
                best, scales = error, candidate
        _apply(fold, scales, modules)
        for name in fold.consumers:
            found[name] = _by_column(scales, fold, modules)
    return found
