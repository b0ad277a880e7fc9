"""What every checkpoint format shares: the list of stored tensors, the map of their names, and filling a model.

A format gives a list of `StoredTensor` (name, shape, how to read it) and an architecture a table from stored names
to `Target`s. `load_parameters` checks one against the other before it reads anything, then reads one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmops.models.gpt import GPT, GPTConfig
from lmops.quantization import JoinedLinear, QuantEmbedding, QuantizedTensor, QuantLinear
from lmops.quantization.checkpoints import join_rows, reorder_rows


class CheckpointError(ValueError):
    """A checkpoint that can't be loaded: damaged, incomplete, or with a feature that the model doesn't have."""


@contextmanager
def naming(source: Path, what: str) -> Iterator[None]:
    """Errors about values in `source` become a CheckpointError that says so."""
    try:
        yield
    except (CheckpointError, NotImplementedError, ImportError):
        raise
    except Exception as error:  # of numbers, of GPTConfig, and of tokenizers, which raises nothing more precise
        raise CheckpointError(f"{source}: {what}: {error}") from error


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint, not read yet. `read` gives it as a CPU tensor of `shape` and `dtype`.

    quantized: gives it as it is stored, where that is quantized.
    zeros_mean_none: it may be there, all zeros, for a parameter that the model doesn't have.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    file: Path
    quantized: Callable[[], QuantizedTensor] | None = None
    zeros_mean_none: bool = False


@dataclass(frozen=True)
class Target:
    """Where a stored tensor goes.

    parameter: a name in `GPT`; in a table `{i}` stands for the number of a block.
    part: which rows of a fused parameter: "q", "k", "v", "gate", "up"; "" is all of it.
    layout: how the stored tensor differs from the parameter. "transposed" is (in, out), as GPT-2's Conv1D keeps it.
        "interleaved" has the rows of each head in the order 0, half, 1, half + 1, ..., as llama.cpp keeps q and k.
    """

    parameter: str
    part: Literal["", "q", "k", "v", "gate", "up"] = ""
    layout: Literal["", "transposed", "interleaved"] = ""


NameTable = Mapping[str, Target]


def expand(table: NameTable, n_layers: int) -> dict[str, Target]:
    """The table with every `{i}` entry written out for each block."""
    targets: dict[str, Target] = {}
    for name, target in table.items():
        for i in range(n_layers) if "{i}" in name else (0,):
            parameter = target.parameter.replace("{i}", str(i))
            targets[name.replace("{i}", str(i))] = Target(parameter, target.part, target.layout)
    return targets


class _NoInitialValues(TorchFunctionMode):
    """Leaves out torch.nn.init. On the meta device it does nothing, yet the first random draw there imports sympy and
    torch's decompositions: 1.3 s and 140 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":  # a method of Tensor has none
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def build_model(
    config: GPTConfig,
    stored: Sequence[StoredTensor],
    table: NameTable,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    source: Path,
) -> GPT:
    """A `GPT` of `config` with the weights of a checkpoint, in evaluation mode.

    The model starts on the meta device, so memory holds the parameters in `dtype` on `device` and one stored tensor.
    A matrix all of whose tensors are `quantized` becomes a layer with that weight; any other is a parameter.

    stored: the tensors of the checkpoint, without those that hold no weights.
    table: the names of the architecture. An entry whose parameter this model doesn't have (a bias) is left out.
    source: what an error about the whole checkpoint names.

    Raises CheckpointError where the tensors are not exactly those that the model needs, each with the right shape.
    """
    if config.n_layers > len(stored):  # before a damaged number makes a model of a million layers
        raise CheckpointError(f"{source}: {config.n_layers} layers, but only {len(stored)} tensors")
    with torch.device("meta"), _NoInitialValues():
        model = GPT(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets = {name: t for name, t in expand(table, config.n_layers).items() if t.parameter in parameters}
    stored = [t for t in stored if t.name in targets or not (t.zeros_mean_none and not t.read().any())]
    for tensor in stored:  # quantizers keep (n_out, n_in) of a weight, also where the format's plain one is transposed
        if tensor.quantized is not None and tensor.name in targets and targets[tensor.name].layout == "transposed":
            targets[tensor.name] = replace(targets[tensor.name], layout="")
    _check(stored, targets, parameters, config, source)
    kept = _fill_quantized(model, stored, targets, config, dtype, device)
    _allocate(model, dtype, device)
    stored = [tensor for tensor in stored if tensor.name not in kept]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled: dict[tuple[int, str], StoredTensor] = {}
    for tensor in stored:
        target = targets[tensor.name]
        rows = parameters[target.parameter].data[_rows(target, parameters[target.parameter], config)]
        slot = (id(parameters[target.parameter]), target.part)
        if slot not in filled:
            _copy(rows, tensor.read(), target.layout, config.head_dim)
            filled[slot] = tensor
        elif not torch.equal(rows, tensor.read().to(rows)):
            raise _differ(filled[slot], tensor)
    return model.eval()


def _check(
    stored: Sequence[StoredTensor],
    targets: Mapping[str, Target],
    parameters: Mapping[str, nn.Parameter],
    config: GPTConfig,
    source: Path,
) -> None:
    """Compare what is stored with what the model needs, by names and shapes alone."""
    seen: dict[str, StoredTensor] = {}
    for tensor in stored:
        if tensor.name in seen:
            raise CheckpointError(
                f"tensor {tensor.name!r} is stored twice: in {seen[tensor.name].file} and {tensor.file}"
            )
        seen[tensor.name] = tensor
    unexpected = [tensor for tensor in stored if tensor.name not in targets]
    if unexpected:
        first = unexpected[0]
        raise CheckpointError(
            f"{first.file}: unexpected tensor {first.name!r} of shape {first.shape}{_more(unexpected)}: "
            "this architecture has no place for it"
        )
    covered = {(id(parameters[targets[name].parameter]), targets[name].part) for name in seen}
    missing = [(name, t) for name, t in targets.items() if (id(parameters[t.parameter]), t.part) not in covered]
    if missing:
        name, target = missing[0]
        shape = _stored_shape(target, parameters[target.parameter], config)
        raise CheckpointError(f"{source}: missing tensor {name!r} of shape {shape}{_more(missing)}")
    for tensor in stored:
        target = targets[tensor.name]
        shape = _stored_shape(target, parameters[target.parameter], config)
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, the configuration needs {shape}"
            )
    unmapped = set(map(id, parameters.values())) - {id(parameters[t.parameter]) for t in targets.values()}
    assert not unmapped, [name for name, p in parameters.items() if id(p) in unmapped]


def _more(items: Sequence[object]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""


def _rows(target: Target, parameter: Tensor, config: GPTConfig) -> slice:
    """The rows of `parameter` that `target` names."""
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    half = len(parameter) // 2
    bounds = {
        "": (0, len(parameter)),
        "q": (0, q),
        "k": (q, q + kv),
        "v": (q + kv, q + 2 * kv),
        "gate": (0, half),
        "up": (half, 2 * half),
    }
    return slice(*bounds[target.part])


def _stored_shape(target: Target, parameter: Tensor, config: GPTConfig) -> tuple[int, ...]:
    rows = _rows(target, parameter, config)
    shape = (rows.stop - rows.start, *parameter.shape[1:])
    return shape[::-1] if target.layout == "transposed" else shape


_PARTS = ("", "q", "k", "v", "gate", "up")  # in the order of their rows


def _fill_quantized(
    model: GPT,
    stored: Sequence[StoredTensor],
    targets: Mapping[str, Target],
    config: GPTConfig,
    dtype: torch.dtype,
    device: torch.device | str,
) -> set[str]:
    """Replace the layers of a meta model all of whose weight is stored quantized; the names of the tensors used."""
    sources: dict[int, list[StoredTensor]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for tensor in sorted(stored, key=lambda tensor: _PARTS.index(targets[tensor.name].part)):
        sources.setdefault(id(parameters[targets[tensor.name].parameter]), []).append(tensor)
    sources = {key: tensors for key, tensors in sources.items() if all(t.quantized is not None for t in tensors)}
    layers: dict[int, QuantLinear | JoinedLinear] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, (nn.Linear, nn.Embedding)) or id(module.weight) not in sources:
            continue
        key = id(module.weight)
        if key not in layers:
            weights = _read_quantized(sources[key], targets, config, device)
            joined = join_rows(weights)
            parts = [QuantLinear.from_quantized(w, dtype=dtype) for w in ([joined] if joined else weights)]
            layers[key] = parts[0] if joined else JoinedLinear(parts)
        layer = layers[key]
        parent, _, name = path.rpartition(".")
        if isinstance(module, nn.Linear):
            layer.bias = module.bias  # still on the meta device
            setattr(model.get_submodule(parent), name, layer)
        else:
            assert isinstance(layer, QuantLinear), f"{path} has parts"
            setattr(model.get_submodule(parent), name, QuantEmbedding(layer))
    return {tensor.name for tensors in sources.values() for tensor in tensors}


def _read_quantized(
    tensors: Sequence[StoredTensor], targets: Mapping[str, Target], config: GPTConfig, device: torch.device | str
) -> list[QuantizedTensor]:
    """The weights of the parts of a layer, in the order of their rows and with Hugging Face's order in them."""
    weights: dict[str, QuantizedTensor] = {}
    first: dict[str, StoredTensor] = {}
    for tensor in tensors:
        target = targets[tensor.name]
        assert tensor.quantized is not None
        weight = tensor.quantized()
        if target.layout == "interleaved":
            order = torch.arange(len(weight.scales.T)).unflatten(0, (-1, config.head_dim // 2, 2))
            weight = reorder_rows(weight, order.transpose(1, 2).flatten())
        if target.part not in weights:
            weights[target.part], first[target.part] = weight.to(device), tensor
        elif not torch.equal(weight.dequantize(), weights[target.part].to("cpu").dequantize()):
            raise _differ(first[target.part], tensor)
    return list(weights.values())


def _differ(first: StoredTensor, second: StoredTensor) -> CheckpointError:
    return CheckpointError(
        f"{second.file}: tensors {first.name!r} and {second.name!r} differ, but the configuration ties them"
    )


def _allocate(model: nn.Module, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give every meta parameter memory, once for those that share one."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(old) not in made:
                made[id(old)] = nn.Parameter(torch.empty(old.shape, dtype=dtype, device=device))
            setattr(module, name, made[id(old)])


def _copy(rows: Tensor, tensor: Tensor, layout: str, head_dim: int) -> None:
    """Write a stored tensor into the rows of a parameter; converts dtype and device on the way."""
    if layout == "transposed":
        tensor = tensor.T
    elif layout == "interleaved":
        rows = rows.unflatten(0, (-1, 2, head_dim // 2))
        tensor = tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2)
    rows.copy_(tensor)


def check_features(settings: Mapping[str, object], neutral: Mapping[str, object], source: Path) -> None:
    """Raise for a setting that changes what the model computes in a way that `GPT` doesn't have.

    neutral: for each such key the value without effect; a key that is absent or null has none either.
    """
    for key, value in neutral.items():
        if settings.get(key) not in (None, value):
            raise CheckpointError(f"{source}: {key} = {settings[key]!r} is not supported (only {value!r} is)")
