"""`lmops.optimize`: one line for a model that is there already; `lmops.restore` takes it back.

Only the instance changes. A layer keeps its class, name, parameters and hooks; it gets a `forward` of its own, which
`restore` deletes. Linear layers alone are replaced, by quantized ones.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmops.integrations.edits import Item, Report, Work, size_of
from lmops.integrations.layers import torch_module
from lmops.integrations.transformers_layers import transformers_layers, transformers_quantized
from lmops.ops._register import OPERATORS
from lmops.quantization.linear import QuantLinear
from lmops.quantization.quantize import _evaluating, _find_layers, quantize_model
from lmops.quantization.rounding import check_weight, float_weight
from lmops.quantization.tensor import QuantizedTensor
from lmops.quantization.w8a8 import W8A8Linear
from lmops.testing import assert_accurate

LINEAR = ("int8", "int4", "w8a8", "fp8")
HEADS = ("lm_head", "head")
EDITS = "_lmops_edits"  # the attribute of a model that has what to undo


class VerificationError(ValueError):
    """The optimized model's results differ by more than the accuracy rule allows. The model is as it was."""


class NothingToReplaceError(ValueError):
    """The model has nothing that `optimize` was asked to replace. report: what was looked at, and why it stayed."""

    def __init__(self, report: Report) -> None:
        super().__init__(f"model has nothing to replace\n{report}")
        self.report = report


def optimize(
    model: nn.Module,
    *,
    attention: bool = True,
    softmax: bool = True,
    linear: str | None = None,
    group_size: int = 128,
    norm: bool = True,
    loss: bool = True,
    skip: Sequence[str] = (),
    verify: Any = None,
) -> Report:
    """Make a model use the operators of lmops, in place, and say what was done.

        report = lmops.optimize(model, linear="int4", verify=inputs)
        print(report)
        lmops.restore(model)

    model: any torch.nn.Module. This instance changes, and nothing else: no class, and no other model, also not one that
        shares its transformers config, of which this one gets a copy.
    attention: of transformers models, through their registry of attention functions (BLOOM's layers one by one); of
        torch.nn.MultiheadAttention where weights are not asked for; and torch's scaled_dot_product_attention in the
        forward of other modules.
    softmax: torch.nn.Softmax and LogSoftmax, and the functions in the forward of other modules.
    norm: torch.nn.LayerNorm and RMSNorm, in transformers RMSNorms and the gated activations of MLPs (SwiGLU, GeGLU)
        and RoPE where a trial gives the same result, the sum before a norm in layers built as Llama's or GPT-2's are,
        and the functions in the forward of other modules.
    loss: torch.nn.CrossEntropyLoss, the losses of transformers' causal and masked language models, and cross_entropy in
        the forward of other modules.
    linear: "int4" or "int8" weights, with a scale and a zero point for every group_size columns; "fp8", with a scale a
        row; "w8a8", int8 with a scale a row, and inputs rounded to 8 bits too. None leaves linear layers alone. Weights
        are rounded to nearest; `lmops.quantization.quantize_model` has better ways. This cannot be undone.
        The head, a layer called "lm_head" or "head", becomes int8 with a scale a row for "int4" and "int8", which moves
        logits by less than their layers do, and stays for the others. An embedding that shares its weight keeps it.
        `save_pretrained` of a transformers model writes all but "w8a8", for `from_pretrained`.
    skip: names to leave alone: a whole name, part of one between its dots ("lm_head", "layers.0"), or with wildcards.
    verify: inputs of the model: a mapping of arguments, a tuple of them, or the only one. The model runs before and
        after, in evaluation mode, and in the next higher precision as the truth, for which it is copied. Where linear
        is given, what quantization did is measured and reported.

    "The functions in the forward of other modules": where the code of a module's forward, or a function it calls, names
    one of them, calls of it are redirected while this instance runs, submodules included.

    Raises, with the model as it was: NothingToReplaceError; VerificationError; ValueError for an unknown `linear`, a
    model that is quantized already, skip that names some of the attention layers of a transformers model, and layers
    that cannot be quantized, with their names; TypeError for a model or skip of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(skip, str):
        raise TypeError(f"skip must be a list of names, got the string {skip!r}")
    if linear is not None and linear not in LINEAR:
        raise ValueError(f"linear must be None or one of {', '.join(LINEAR)}, got {linear!r}")
    if linear is not None:
        quantized = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
        if quantized:
            raise ValueError(f"model is quantized already: {quantized[0]} is one of {len(quantized)} QuantLinears")
    before = None if verify is None else _run(model, verify)
    truth = None if verify is None else _truth(model, verify)
    work = Work(model, skip)
    try:
        wanted = {"attention": attention, "softmax": softmax, "norm": norm, "loss": loss}
        kinds = {kind for kind, on in wanted.items() if on}
        transformers_layers(work, kinds)
        for name, module in list(model.named_modules()):
            if id(module) not in work.claimed and not work.skipped(name):
                torch_module(work, name, module, kinds)
        if before is not None and truth is not None and work.edits:
            _verify(before, truth, _run(model, verify))
        if linear is not None:
            _quantize(work, linear, group_size)
        if not work.report.replaced:
            raise NothingToReplaceError(work.report)
        if before is not None:
            work.report.verified = bool(work.edits)
            if linear is not None:
                _compare(work.report, before, _run(model, verify))
    except BaseException:
        work.undo()
        raise
    model.__dict__.setdefault(EDITS, []).extend(work.edits)
    if linear is not None:
        transformers_quantized(model, linear, group_size, skip)
    work.report.bytes_after = size_of(model)
    devices = sorted({t.device.type for t in (*model.parameters(), *model.buffers())} or {"cpu"})
    for name in dict.fromkeys(name for item in work.report.replaced for name in item.operators):
        found = [OPERATORS[name].implementation(device) for device in devices]
        work.report.implementations[name] = "; ".join(f"{kind} ({why})" for kind, why in found)
    return work.report


def restore(model: nn.Module) -> list[str]:
    """Undo what `optimize` did to a model, or to modules in it, but for quantization; the names of what changed.

    Raises ValueError for a model that has not been optimized.
    """
    optimized = [module for module in model.modules() if EDITS in module.__dict__]
    if not optimized:
        raise ValueError("model has not been optimized: lmops.optimize was never called on it, or has been undone")
    owners: set[int] = set()
    for module in optimized:
        for edit in reversed(module.__dict__.pop(EDITS)):
            edit.undo()
            owners.add(id(edit.owner))
    return [name for name, module in model.named_modules() if id(module) in owners]


# ------------------------------------------------------------------------------------------------------- linear layers


def _quantize(work: Work, linear: str, group_size: int) -> None:
    model = work.model
    layers = _find_layers(model, [*work.skip, *HEADS])
    weight_only = linear in ("int4", "int8")
    rows = [] if weight_only else list(layers)  # what gets a scale a row
    if weight_only:
        rows = [name for name in _find_layers(model, work.skip) if name not in layers]
    found = {name: model.get_submodule(name) for name in rows}
    scales = {name: check_weight(float_weight(layer), 8, -1, None, name) for name, layer in found.items()}
    kind = W8A8Linear if linear == "w8a8" else QuantLinear
    packed = {
        name: QuantizedTensor.quantize(
            float_weight(layer), 8, -1, fp8=linear == "fp8", scale_dtype=scales[name], name=name
        )
        for name, layer in found.items()
    }
    what = dict.fromkeys(layers, f"{linear} weight") | {name: "int8 weight" for name in rows if weight_only}
    if linear == "w8a8":
        what = dict.fromkeys(layers, "int8 weight, inputs rounded to int8")
    kinds = {name: type(layer).__name__ for name, layer in (layers | found).items()}
    if weight_only:
        quantize_model(model, int(linear[3:]), group_size, skip=[*work.skip, *HEADS], progress=False)
    for name, layer in found.items():
        new = kind.from_quantized(packed[name], layer.bias, float_weight(layer).dtype).train(layer.training)  # type: ignore[arg-type]
        for parent in list(model.modules()):
            for key, child in list(parent._modules.items()):
                if child is layer:
                    parent._modules[key] = new
    forward = "int8_matmul_forward" if linear == "w8a8" else "quantized_matmul_forward"
    operators = (forward, "quantized_matmul_backward")
    for name in kinds:
        work.report.replaced.append(Item(name, kinds[name], what[name], operators))


# ------------------------------------------------------------------------------------------------------------- verify


def _run(model: nn.Module, inputs: Any) -> Tensor:
    """The main result of a model: its logits, at the positions that are not padding."""
    with torch.no_grad(), _evaluating(model):
        if isinstance(inputs, Mapping):
            out = model(**inputs)
        else:
            out = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    for name in ("logits", "last_hidden_state"):
        out = getattr(out, name, out)
    while isinstance(out, (tuple, list, Mapping)):
        out = next(iter(out.values() if isinstance(out, Mapping) else out))
    if not isinstance(out, Tensor):
        raise TypeError(f"verify: the model returned a {type(out).__name__}, no tensor to compare")
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.ndim == 2 and out.shape[:2] == mask.shape:
        out = out[mask.bool()]
    return out


def _truth(model: nn.Module, inputs: Any) -> Tensor:
    """The result in the next higher precision, of a copy of the model."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    higher = torch.float64 if torch.float32 in kinds or not kinds else torch.float32

    def raised(x: Any) -> Any:
        return x.to(higher) if isinstance(x, Tensor) and x.is_floating_point() else x

    if isinstance(inputs, Mapping):
        inputs = {name: raised(x) for name, x in inputs.items()}
    else:
        inputs = tuple(map(raised, inputs)) if isinstance(inputs, (tuple, list)) else raised(inputs)
    return _run(copy.deepcopy(model).to(higher), inputs)


def _verify(before: Tensor, truth: Tensor, after: Tensor) -> None:
    if (before.isfinite() & ~truth.isfinite()).any():
        raise ValueError(
            f"verify: the model gives finite results in {before.dtype} and NaN or infinities in {truth.dtype}, so "
            "there is no truth to compare with; transformers' eager attention does so for padding on the left"
        )
    try:
        assert_accurate(after, truth, before)
    except AssertionError as error:
        raise VerificationError(f"the optimized model is less accurate than the model was: {error}") from None


def _compare(report: Report, before: Tensor, after: Tensor) -> None:
    p, q = (x.float().log_softmax(-1) for x in (before, after))
    report.kl_divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    report.agreement = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
