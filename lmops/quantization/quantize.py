"""`quantize_model`: the linear layers of a model in 4 or 8 bits, in place."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lmops.quantization.awq import scale_channels
from lmops.quantization.gptq import gptq
from lmops.quantization.linear import QuantLinear
from lmops.quantization.rounding import Inputs, check_weight, float_weight, round_to_nearest
from lmops.quantization.tensor import QuantizedTensor

METHODS = ("rtn", "gptq", "awq")

Edit = Callable[[nn.Module, str, Any], None]  # setattr that is undone on an error
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a block behind its first


def quantize_model(
    model: nn.Module,
    bits: int = 4,
    group_size: int = 128,
    method: str = "rtn",
    *,
    calibration: Iterable[Tensor | Mapping[str, Any]] | None = None,
    skip: Sequence[str] = ("lm_head", "head"),
    symmetric: bool = False,
    scale_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> list[str]:
    """Replace the linear layers of a model by `QuantLinear`s, in place; the names of those replaced.

        tokens = torch.tensor(tokenizer.encode(text))                # 16,000 tokens of what it will read
        quantize_model(model, method="gptq", calibration=tokens.split(512))

    model: any module for "rtn"; for "gptq" and "awq" one whose layers stand in a ModuleList, as lmops.models.GPT and
        the decoders of transformers do. Its torch.nn.Linear layers are replaced, with subclasses and GPT-2's Conv1D.
    bits: 4 or 8. group_size: columns that share a scale, 16 to 1024, or -1 for a whole row.
    method: "rtn" rounds to nearest, with the scales that cost least (see `round_to_nearest`). "gptq" lets the columns
        that follow make up for the error of each (arXiv 2210.17323). "awq" scales the channels that matter up before it
        rounds, and what makes them down (arXiv 2306.00978), wherever that can be folded into the norm or layer before
        without a change; it warns of the layers where it can't. Layers outside that ModuleList are rounded to nearest.
    calibration: batches of tokens, each a tensor (B, T) or (T,) of integers, or a mapping with the model's arguments.
        They go through the model as they are: padding counts like text. Needed for "gptq" and "awq".
    skip: names to leave alone: a whole name, part of one between its dots ("lm_head", "blocks.0"), or with wildcards.
    symmetric: without zero points, which costs some accuracy. scale_dtype: by default that of each weight.
    progress: the name of each layer on standard error as it is done.

    Calibration takes one layer of the model at a time, and each sees what the quantized ones before it put out. Beside
    the model and the packed one there are the hidden states of all batches, and one layer's work: for each of its
    linear layers the second moments of the input, (n_in, n_in) in float32, and with "awq" a float32 copy of the layer.

    What is quantized is saved by `state_dict`, and of a GPT by `lmops.models.save`. For a model of transformers take
    `LmopsConfig` or `lmops.optimize`, which also tell its save_pretrained what from_pretrained must know: without that
    it would give quantized layers random weights, with a warning of its own.

    Everything that can be is checked first, and whatever fails, the model is as it was: the float layers are let go at
    the end. Raises ValueError or TypeError, naming the layer, for weights with NaN or infinities, on the meta device,
    or narrower than a group; and for other arguments out of range, for missing, empty or unusable calibration, and for
    a model without linear layers.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if isinstance(skip, str):
        raise TypeError(f"skip must be a list of names, got the string {skip!r}")
    layers = _find_layers(model, skip)
    scale_dtypes = {
        name: check_weight(float_weight(layer), bits, group_size, scale_dtype, name) for name, layer in layers.items()
    }
    settings: dict[str, Any] = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    report = _Progress(len(layers) if progress else 0)
    with torch.no_grad(), _evaluating(model), _undone_on_error() as edit:
        if method == "rtn":
            done: set[str] = set()
        else:
            batches = _check_calibration(method, calibration)
            done = _quantize_blocks(model, layers, method, batches, settings, scale_dtypes, edit, report)
        for name, layer in layers.items():
            if name not in done:
                weight = round_to_nearest(float_weight(layer), **settings, scale_dtype=scale_dtypes[name], name=name)
                _replace(model, layer, _quantized(layer, weight, layer.bias), edit)
                report(name)
    return list(layers)


# ---- what is in a model -------------------------------------------------------------------------------------------


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False  # part of torch.nn.MultiheadAttention, which reads its weight and never calls it
    conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers' GPT-2
    return conv1d or (isinstance(module, nn.Linear) and not isinstance(module, QuantLinear))


def _find_layers(model: nn.Module, skip: Sequence[str]) -> dict[str, nn.Module]:
    """The layers to quantize by name, each once."""

    def skipped(name: str) -> bool:
        return any(f".{pattern}." in f".{name}." or fnmatchcase(name, pattern) for pattern in skip)

    if _is_linear(model):
        raise ValueError(f"model is itself a {type(model).__name__}, which has no parent to put another one in")
    layers = {name: module for name, module in model.named_modules() if _is_linear(module) and not skipped(name)}
    if not layers:
        raise ValueError(f"model has no torch.nn.Linear but those that skip={list(skip)} names")
    return layers


def _find_blocks(model: nn.Module, layers: Mapping[str, nn.Module], method: str) -> tuple[str, nn.ModuleList]:
    """The ModuleList with the most weights in `layers`, and its name: what a decoder is a stack of."""
    best, most = None, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            weights = sum(float_weight(m).numel() for key, m in layers.items() if key.startswith(f"{name}."))
            if weights > most:  # of lists in each other the outer one comes first
                best, most = (name, module), weights
    if best is None:
        raise ValueError(f"method={method!r} needs a model whose layers stand in a ModuleList; use method='rtn'")
    return best


def _check_calibration(method: str, calibration: Iterable[Any] | None) -> list[Mapping[str, Any] | Tensor]:
    if calibration is None:
        raise ValueError(f"calibration is missing: method={method!r} needs batches of tokens, e.g. tokens.split(512)")
    batches: list[Mapping[str, Any] | Tensor] = []
    for batch in calibration:
        if isinstance(batch, Mapping):
            batches.append(batch)
            continue
        if not isinstance(batch, Tensor) or batch.ndim not in (1, 2) or batch.dtype not in (torch.int64, torch.int32):
            kind = f"{batch.dtype} {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise TypeError(f"calibration must be batches of tokens, integers (B, T) or (T,), or mappings, got {kind}")
        if batch.numel():
            batches.append(batch if batch.ndim == 2 else batch[None])
    if not batches:
        raise ValueError("calibration has no tokens")
    return batches


# ---- layer by layer -----------------------------------------------------------------------------------------------


def _quantize_blocks(
    model: nn.Module, layers: Mapping[str, nn.Module], method: str, batches: list[Mapping[str, Any] | Tensor],
    settings: Mapping[str, Any], scale_dtypes: Mapping[str, torch.dtype], edit: Edit, report: _Progress,
) -> set[str]:  # fmt: skip
    """Quantize the linear layers of one block after the other; their names."""
    prefix, blocks = _find_blocks(model, layers, method)
    done: set[str] = set()
    left: Counter[str] = Counter()
    hidden, calls = _first_pass(model, prefix, blocks, batches)
    for i, block in enumerate(blocks):
        path = f"{prefix}.{i}."
        inside = {name.removeprefix(path): layer for name, layer in layers.items() if name.startswith(path)}
        inputs = _inputs(block, inside, path, hidden, calls[i])
        work, scales = block, {}
        if method == "awq":
            work = copy.deepcopy(block).float()
            x, call = tree_map_only(Tensor, _to_float32, (hidden[0], calls[i][0]))
            scales = scale_channels(work, partial(_run, x=x, call=call), inputs, **settings)
            left.update(inputs.keys() - scales.keys())
            _take_norms(block, work, inside, edit)
        for name, layer in inside.items():
            weight, seen = float_weight(work.get_submodule(name)), inputs.get(name)
            bias: Any = layer.bias
            options = {**settings, "scale_dtype": scale_dtypes[path + name], "name": path + name}
            if method == "gptq" and seen is not None:
                packed = gptq(weight, seen.gram, **options)
            else:
                importance = None if seen is None else seen.gram.diagonal() / scales.get(name, 1.0) ** 2
                packed = round_to_nearest(weight, **options, importance=importance)
            if bias is not None and method == "awq":
                scaled = work.get_parameter(f"{name}.bias").to(bias.dtype)
                bias = nn.Parameter(scaled.detach(), bias.requires_grad)
            _replace(model, layer, _quantized(layer, packed, bias), edit)
            done.add(path + name)
            report(path + name)
        hidden = [_run(block, x, call) for x, call in zip(hidden, calls[i], strict=True)]
        calls[i] = []
        for module in block.modules():
            if isinstance(module, QuantLinear):
                module.forget()
    if left:
        which = ", ".join(f"{name} ({count} of {len(blocks)})" for name, count in sorted(left.items()))
        warnings.warn(
            f"awq rounded these without scaling their inputs, because nothing before them could take the scales "
            f"without a change of the output: {which}",
            stacklevel=3,
        )
    return done


def _run(block: nn.Module, x: Tensor, call: Call) -> Tensor:
    y = block(x, *call[0], **call[1])
    return y if isinstance(y, Tensor) else y[0]


def _to_float32(t: Tensor) -> Tensor:
    return t.float() if t.is_floating_point() else t


class _Stop(Exception):
    """Ends the first pass before the head."""


def _first_pass(
    model: nn.Module, prefix: str, blocks: nn.ModuleList, batches: list[Mapping[str, Any] | Tensor]
) -> tuple[list[Tensor], list[list[Call]]]:
    """For every batch the hidden states that enter the first block, and for every block its other arguments."""
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in blocks]

    def note(i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        x, args = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), args)
        if i == 0:
            hidden.append(x)
        calls[i].append((args, kwargs))
        if i == len(blocks) - 1:
            raise _Stop

    parameter = next(model.parameters())
    # transformers would keep the keys of this pass, and attend to them in the next
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with ExitStack() as hooks:
        for i, block in enumerate(blocks):
            hooks.callback(block.register_forward_pre_hook(partial(note, i), with_kwargs=True).remove)
        for batch in batches:
            batch = tree_map_only(Tensor, lambda t: t.to(parameter.device), batch)
            with suppress(_Stop):
                model(**{**options, **batch}) if isinstance(batch, Mapping) else model(batch, **options)
    for i, found in enumerate(calls):
        if len(found) != len(batches):
            raise ValueError(
                f"{prefix}.{i} ran {len(found)} times for {len(batches)} calibration batches, not once each"
            )
    return hidden, calls


def _inputs(
    block: nn.Module, inside: Mapping[str, nn.Module], path: str, hidden: list[Tensor], calls: list[Call]
) -> dict[str, Inputs]:
    """What the linear layers of a block get, of those that get anything."""
    inputs: dict[str, Inputs] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if name not in inputs:
            inputs[name] = Inputs(args[0].shape[-1], args[0].device)
        inputs[name].add(args[0])

    with ExitStack() as hooks:
        for name, layer in inside.items():
            hooks.callback(layer.register_forward_pre_hook(partial(note, name)).remove)
        for x, call in zip(hidden, calls, strict=True):
            _run(block, x, call)
    for name, seen in inputs.items():
        if not seen.gram.isfinite().all():
            raise ValueError(f"the calibration inputs of {path}{name} have NaN or infinite values")
    return inputs


# ---- changing a model ---------------------------------------------------------------------------------------------


@contextmanager
def _undone_on_error() -> Iterator[Edit]:
    """A setattr whose changes are taken back, the last first, where the block raises."""
    changes: list[tuple[nn.Module, str, Any]] = []

    def edit(owner: nn.Module, name: str, value: Any) -> None:
        changes.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        yield edit
    except BaseException:
        for change in reversed(changes):
            setattr(*change)
        raise


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module, also a new one, has the mode of what had its name."""
    training = {name for name, module in model.named_modules(remove_duplicate=False) if module.training}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules(remove_duplicate=False):
            module.training = name in training


def _quantized(layer: nn.Module, weight: QuantizedTensor, bias: Any) -> QuantLinear:
    return QuantLinear.from_quantized(weight, bias, float_weight(layer).dtype)


def _replace(model: nn.Module, layer: nn.Module, new: QuantLinear, edit: Edit) -> None:
    """Put `new` wherever `layer` is."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is layer:
                edit(parent, name, new)


def _take_norms(block: nn.Module, work: nn.Module, inside: Mapping[str, nn.Module], edit: Edit) -> None:
    """The parameters of `work` that differ, but for those of linear layers, which are packed anyway."""
    for path, module in block.named_modules():
        if path in inside:
            continue
        for name, old in module.named_parameters(recurse=False):
            new = work.get_parameter(f"{path}.{name}" if path else name).to(old.dtype)
            if not torch.equal(new, old):
                edit(module, name, nn.Parameter(new.detach(), old.requires_grad))


class _Progress:
    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def __call__(self, name: str) -> None:
        self.done += 1
        if self.total:
            print(f"quantized {name} ({self.done} of {self.total})", file=sys.stderr)
