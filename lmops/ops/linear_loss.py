"""The losses of a linear layer's outputs, which never exist as a whole: schemas, autograd, public functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmops.ops._loss_chunks import (
    Chunk,
    Divergence,
    Options,
    compute_dtype,
    cross_entropy_launch,
    cross_entropy_torch,
    kl_div_launch,
    kl_div_torch,
    statistics,
)
from lmops.ops._register import define_op, differentiated, distinct
from lmops.ops.loss import (
    OPTIONS,
    REDUCTIONS,
    as_tensor,
    check_class_weight,
    check_device,
    check_float,
    check_mask,
    check_reduction,
    check_target,
    checked_divergence,
    checked_options,
    constant,
    once_differentiable,
    reduced,
    result_dtype,
    row_gradient,
    sum_of_class_weights,
    sum_of_rows,
    sum_of_weights,
)
from lmops.ops.quantized_embedding import quantized_embedding_forward
from lmops.ops.quantized_matmul import Quantized
from lmops.reference.quantization import row_chunks

# what a linear form allocates at most beyond inputs, results and a few numbers a token, in bytes
BUDGET = 60_000_000
CPU_BUDGET = 16_000_000
# elements of a quantized weight that a CPU dequantizes at a time
PIECE = 1 << 16


@dataclass(frozen=True)
class Blocks:
    """How many tokens and how many classes of the vocabulary have their logits in memory at a time."""

    tokens: int
    classes: int


@lru_cache(256)
def linear_blocks(
    n_tokens: int, n_classes: int, a_token: int, a_class: int, a_logit: int, budget: int = BUDGET
) -> Blocks:
    """The largest blocks of tokens, for at least 2,048 classes, that keep within `budget` bytes of memory.

    a_token, a_class, a_logit: bytes that each of them takes in such a block. Every block of tokens reads the weight,
    and adds to its gradient, once, so as many tokens as possible come first, in blocks of the same size.
    """
    classes = min(n_classes, 2_048)
    most = max(16, (budget - classes * a_class) // (a_token + classes * a_logit) // 16 * 16)
    tokens = -(-n_tokens // -(-n_tokens // most))
    tokens = min(n_tokens, -(-tokens // 16) * 16)
    left = (budget - tokens * a_token) // (tokens * a_logit + a_class)
    return Blocks(tokens, min(n_classes, max(classes, left // 256 * 256)))


class Packed(NamedTuple):
    """A quantized weight (V, d) as the operators take it: the fields of a `lmops.quantization.QuantizedTensor`."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    permutation: Tensor | None
    format: str
    group_size: int
    shape: tuple[int, int]


Weight = Tensor | Packed


def _weight(
    weight: Tensor, width: int, scales: Tensor | None = None, zeros: Tensor | None = None,
    offsets: Tensor | None = None, permutation: Tensor | None = None, format: str = "", group_size: int = 0,
) -> Weight:  # fmt: skip
    """The weight (V, width) that an operator's arguments stand for: with scales, `weight` is the packed codes of it."""
    if scales is None:
        return weight
    return Packed(weight, scales, zeros, offsets, permutation, format, group_size, (weight.shape[1], width))


def _arguments(weight: Tensor | Quantized) -> tuple[Tensor, tuple[Any, ...]]:
    """What an operator takes for a weight: its first tensor, and the `QUANTIZED` arguments."""
    if isinstance(weight, Tensor):
        return weight, (None, None, None, None, "", 0)
    parts = (weight.scales, weight.zeros, weight.offsets, weight.permutation)
    return weight.packed, (*parts, weight.format, weight.group_size)


def _is_converted(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether chunks of the weight are copied to be multiplied in this type."""
    return not isinstance(weight, Tensor) or weight.dtype != dtype


class _Head:
    """Blocks of logits = hidden @ weight.T + bias, one at a time in the same memory, from `rows` of the weight."""

    def __init__(self, hidden: Tensor, weight: Weight, bias: Tensor | None, blocks: Blocks) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        one = blocks.tokens == hidden.shape[0] and blocks.classes == weight.shape[0]
        self.memory = None if one else hidden.new_empty(blocks.tokens, blocks.classes)
        converted = _is_converted(weight, hidden.dtype)
        self.chunk = hidden.new_empty(blocks.classes, hidden.shape[1]) if converted else None
        self.whole = not converted and blocks.classes == weight.shape[0]
        self.rows: Any = weight

    def _rows(self, classes: slice) -> Tensor:
        """Rows of the weight in the type to multiply with; in memory that the next ones overwrite."""
        weight, chunk = self.weight, self.chunk
        if chunk is None:
            assert isinstance(weight, Tensor)
            return _part(weight, classes)
        chunk = chunk[: classes.stop - classes.start]
        if isinstance(weight, Tensor):
            return chunk.copy_(weight[classes])
        *parts, _ = weight
        # a CPU forms a few copies of what it dequantizes, so it does that in small pieces
        pieces = PIECE if chunk.device.type == "cpu" else chunk.numel()
        for rows in row_chunks(chunk.shape[0], chunk.shape[1], pieces):
            ids = torch.arange(classes.start + rows.start, classes.start + rows.stop, device=chunk.device)
            chunk[rows] = quantized_embedding_forward(ids, *parts, chunk.shape[1], chunk.dtype)
        return chunk

    def logits(self, tokens: slice, classes: slice) -> Tensor:
        if not self.whole:
            self.rows = self._rows(classes)
        rows = self.rows
        bias = None if self.bias is None else _part(self.bias, classes).to(self.hidden.dtype)
        if self.memory is None:
            return nn.functional.linear(self.hidden, rows, bias)
        h = self.hidden[tokens]
        logits = self.memory[: h.shape[0], : rows.shape[0]]
        if bias is None:
            return torch.mm(h, rows.t(), out=logits)
        return torch.addmm(bias, h, rows.t(), out=logits)


class _HeadGradient:
    """Adds up the gradients of a head from blocks of dlogits; only those that are wanted exist."""

    def __init__(self, head: _Head, tokens: int, wanted: Sequence[bool]) -> None:
        hidden, weight, bias = head.hidden, head.weight, head.bias
        self.head = head
        self.dhidden = torch.empty_like(hidden) if wanted[0] else None
        self.dweight = torch.empty_like(weight) if wanted[1] and isinstance(weight, Tensor) else None
        self.dbias = hidden.new_zeros(weight.shape[0], dtype=compute_dtype(hidden.dtype)) if wanted[2] else None
        self.bias_dtype = bias.dtype if bias is not None else hidden.dtype
        # float32 sums for a block of tokens, and a product that goes into them; float32 itself needs neither
        self.sums = self.product = None
        if wanted[0] and hidden.dtype != compute_dtype(hidden.dtype):
            self.sums = hidden.new_empty(tokens, hidden.shape[1], dtype=torch.float32)
            self.product = hidden.new_empty(tokens, hidden.shape[1])

    def add(self, tokens: slice, classes: slice, dlogits: Tensor) -> None:
        h, rows = self.head.hidden[tokens], self.head.rows
        if self.dbias is not None:
            self.dbias[classes] += dlogits.sum(0, dtype=self.dbias.dtype)
        if self.dweight is not None:
            _add_product(self.dweight[classes], dlogits.t(), h, first=tokens.start == 0)
        if self.dhidden is None:
            return
        if self.sums is None or self.product is None:
            _add_product(self.dhidden[tokens], dlogits, rows, first=classes.start == 0)
        else:
            sums, product = self.sums[: h.shape[0]], self.product[: h.shape[0]]
            torch.mm(dlogits, rows, out=product)
            if classes.start == 0:
                sums.copy_(product)
            else:
                sums += product
            if classes.stop == self.head.weight.shape[0]:
                self.dhidden[tokens] = sums

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        nothing = self.head.hidden.new_empty(0)
        return (
            nothing if self.dhidden is None else self.dhidden,
            self.head.hidden.new_empty(0) if self.dweight is None else self.dweight,
            self.head.hidden.new_empty(0) if self.dbias is None else self.dbias.to(self.bias_dtype),
        )


def _add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out = a @ b at first, then out += a @ b; a and b may have less precision than out."""
    if out.dtype != a.dtype:
        product = torch.mm(a, b)
        if first:
            out.copy_(product)
        else:
            out += product
    elif first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def _part(t: Tensor, part: slice, dim: int = 0) -> Tensor:
    """A part of a dimension; t itself where that is all of it, since a view takes the host longer than to see that."""
    n = part.stop - part.start
    return t if n == t.shape[dim] else t.narrow(dim, part.start, n)


@lru_cache(256)
def _slices(n: int, step: int) -> tuple[slice, ...]:
    return tuple(slice(i, min(i + step, n)) for i in range(0, n, step))


@lru_cache(256)
def _chunks(n_classes: int, step: int, forward: bool = True) -> tuple[tuple[slice, Chunk], ...]:
    return tuple(
        (part, Chunk(part.start, n_classes, forward, not forward or part.stop == n_classes))
        for part in _slices(n_classes, step)
    )


def _head_blocks(heads: Sequence[tuple[Tensor, Weight]], wanted: Sequence[bool] = (False,) * 3) -> Blocks:
    """Blocks for heads of (hidden, weight), of which the first has the gradients `wanted`."""
    hidden, weight = heads[0]
    width, size = hidden.shape[1], hidden.element_size()
    narrow = hidden.dtype != compute_dtype(hidden.dtype)
    a_token = width * (4 + size) if wanted[0] and narrow else 0
    a_class = width * size if wanted[1] and _is_converted(weight, hidden.dtype) else 0
    a_logit = 0
    for h, w in heads:
        a_logit += h.element_size()
        if _is_converted(w, h.dtype):
            a_class += h.shape[1] * h.element_size()
    budget = CPU_BUDGET if hidden.device.type == "cpu" else BUDGET
    return linear_blocks(hidden.shape[0], weight.shape[0], a_token, a_class, a_logit, budget)


def _logits(
    heads: Sequence[_Head], blocks: Blocks, forward: bool = True
) -> Iterator[tuple[slice, slice, Chunk, list[Tensor]]]:
    """Every block of logits: its tokens and classes, what it is of the vocabulary, and the logits of each head."""
    chunks = _chunks(heads[0].weight.shape[0], blocks.classes, forward)
    for tokens in _slices(heads[0].hidden.shape[0], blocks.tokens):
        for classes, chunk in chunks:
            yield tokens, classes, chunk, [head.logits(tokens, classes) for head in heads]


def _cross_entropy_forward(
    run: Callable[..., None], hidden: Tensor, first: Tensor, bias: Tensor | None, target: Tensor,
    class_weight: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    temperature: float, *quantized: Any,
) -> Tensor:  # fmt: skip
    if not hidden.shape[0]:
        return _cross_entropy_fake(hidden)
    o = Options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    weight = _weight(first, hidden.shape[1], *quantized)
    blocks = _head_blocks([(hidden, weight)])
    # three planes more go from one chunk of classes to the next
    planes = 3 if blocks.classes == weight.shape[0] else 6
    state = statistics(hidden, planes, hidden.shape[0])
    weight_sum = sum_of_class_weights(class_weight, o.label_smoothing)
    for tokens, _, chunk, (x,) in _logits([_Head(hidden, weight, bias, blocks)], blocks):
        run(x, None, _part(target, tokens), class_weight, weight_sum, None, _part(state, tokens, 1), o, chunk)
    return state if planes == 3 else state[:3].clone()


def _cross_entropy_fake(hidden: Tensor, *_: Any) -> Tensor:
    return statistics(hidden, 3, hidden.shape[0])


def _cross_entropy_backward(
    run: Callable[..., None], hidden: Tensor, first: Tensor, bias: Tensor | None, target: Tensor,
    class_weight: Tensor | None, grad: Tensor, state: Tensor, wanted: Sequence[bool], ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float, temperature: float, *quantized: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not hidden.shape[0]:
        return _zeros_of_head(hidden, first, bias, wanted)
    o = Options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    weight = _weight(first, hidden.shape[1], *quantized)
    blocks = _head_blocks([(hidden, weight)], wanted)
    head, weight_sum = _Head(hidden, weight, bias, blocks), sum_of_class_weights(class_weight, o.label_smoothing)
    gradient = _HeadGradient(head, blocks.tokens, wanted)
    for tokens, classes, chunk, (x,) in _logits([head], blocks, forward=False):
        of_tokens = _part(grad, tokens), _part(state, tokens, 1)
        run(x, x, _part(target, tokens), class_weight, weight_sum, *of_tokens, o, chunk)
        gradient.add(tokens, classes, x)
    return gradient.result()


def _zeros_of_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    like = (hidden, weight, hidden if bias is None else bias)
    first, second, third = (
        torch.zeros_like(t) if need else hidden.new_empty(0) for t, need in zip(like, wanted, strict=True)
    )
    return first, second, third


def _cross_entropy_backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, grad: Tensor,
    state: Tensor, wanted: Sequence[bool], *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _zeros_of_head(hidden, weight, bias, wanted)


def _kl_div_forward(
    run: Callable[..., None], hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, mask: Tensor | None, temperature: float, reverse: bool,
    *quantized: Any,
) -> Tensor:  # fmt: skip
    state = _kl_div_fake(hidden)
    if not hidden.shape[0]:
        return state
    o = Divergence(temperature, reverse)
    student = hidden, _weight(weight, hidden.shape[1], *quantized[:6])
    teacher = teacher_hidden, _weight(teacher_weight, teacher_hidden.shape[1], *quantized[6:])
    blocks = _head_blocks([student, teacher])
    heads = _Head(*student, bias, blocks), _Head(*teacher, teacher_bias, blocks)
    for tokens, _, chunk, (x, y) in _logits(heads, blocks):
        run(x, y, None, None if mask is None else _part(mask, tokens), None, _part(state, tokens, 1), o, chunk)
    return state


def _kl_div_fake(hidden: Tensor, *_: Any) -> Tensor:
    return statistics(hidden, 5, hidden.shape[0])


def _kl_div_backward(
    run: Callable[..., None], hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, mask: Tensor | None, grad: Tensor, state: Tensor,
    wanted: Sequence[bool], temperature: float, reverse: bool, *quantized: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not hidden.shape[0]:
        return _zeros_of_head(hidden, weight, bias, wanted)
    o = Divergence(temperature, reverse)
    student = hidden, _weight(weight, hidden.shape[1], *quantized[:6])
    teacher = teacher_hidden, _weight(teacher_weight, teacher_hidden.shape[1], *quantized[6:])
    blocks = _head_blocks([student, teacher], wanted)
    heads = _Head(*student, bias, blocks), _Head(*teacher, teacher_bias, blocks)
    gradient = _HeadGradient(heads[0], blocks.tokens, wanted)
    for tokens, classes, chunk, (x, y) in _logits(heads, blocks, forward=False):
        of_tokens = None if mask is None else _part(mask, tokens), _part(grad, tokens), _part(state, tokens, 1)
        run(x, y, x, *of_tokens, o, chunk)
        gradient.add(tokens, classes, x)
    return gradient.result()


def _kl_div_backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor, teacher_weight: Tensor,
    teacher_bias: Tensor | None, mask: Tensor | None, grad: Tensor, state: Tensor, wanted: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _zeros_of_head(hidden, weight, bias, wanted)


QUANTIZED = (
    "Tensor? scales=None, Tensor? zeros=None, Tensor? offsets=None, Tensor? permutation=None,"
    ' str format="", int group_size=0'
)
HEADS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias,"
    " Tensor? mask"
)
QUANTIZED_HEADS = QUANTIZED + (
    ", Tensor? teacher_scales=None, Tensor? teacher_zeros=None, Tensor? teacher_offsets=None,"
    ' Tensor? teacher_permutation=None, str teacher_format="", int teacher_group_size=0'
)
linear_cross_entropy_forward = define_op(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
    f"{OPTIONS}, {QUANTIZED}) -> Tensor",
    triton=partial(_cross_entropy_forward, cross_entropy_launch),
    torch_cpu=partial(_cross_entropy_forward, cross_entropy_torch),
    fake=_cross_entropy_fake,
)
linear_cross_entropy_backward = define_op(
    "linear_cross_entropy_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight,"
    f" Tensor grad, Tensor state, bool[] wanted, {OPTIONS}, {QUANTIZED}) -> (Tensor, Tensor, Tensor)",
    triton=partial(_cross_entropy_backward, cross_entropy_launch),
    torch_cpu=partial(_cross_entropy_backward, cross_entropy_torch),
    fake=_cross_entropy_backward_fake,
)
linear_kl_div_forward = define_op(
    f"linear_kl_div_forward({HEADS}, float temperature, bool reverse, {QUANTIZED_HEADS}) -> Tensor",
    triton=partial(_kl_div_forward, kl_div_launch),
    torch_cpu=partial(_kl_div_forward, kl_div_torch),
    fake=_kl_div_fake,
)
linear_kl_div_backward = define_op(
    f"linear_kl_div_backward({HEADS}, Tensor grad, Tensor state, bool[] wanted, float temperature, bool reverse,"
    f" {QUANTIZED_HEADS}) -> (Tensor, Tensor, Tensor)",
    triton=partial(_kl_div_backward, kl_div_launch),
    torch_cpu=partial(_kl_div_backward, kl_div_torch),
    fake=_kl_div_backward_fake,
)


# --- autograd ---


def _linear_loss(forward_of: Callable[..., Tensor], backward_of: Callable[..., Any], n_inputs: int) -> Any:
    """The autograd function of a linear loss from its operators, which take n_inputs tensors before their options.

    Of these hidden, weight and bias come first, and have gradients. What describes quantized weights follows.
    """

    class LinearLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, total, reduction, options, *arguments):
            state = forward_of(*arguments[:n_inputs], *options, *arguments[n_inputs:])
            ctx.save_for_backward(total, state, *(a if isinstance(a, Tensor) else None for a in arguments))
            ctx.options, ctx.others = options, [None if isinstance(a, Tensor) else a for a in arguments]
            return reduced(state, total, reduction)

        @staticmethod
        @once_differentiable
        def backward(ctx, dy):
            total, state, *tensors = ctx.saved_tensors
            arguments = [other if t is None else t for t, other in zip(tensors, ctx.others, strict=True)]
            inputs, quantized = arguments[:n_inputs], arguments[n_inputs:]
            wanted = list(ctx.needs_input_grad[3:6])
            grad = row_gradient(dy, total, state)
            gradients = backward_of(*inputs, grad, state, wanted, *ctx.options, *quantized)
            of_head = (g if need else None for g, need in zip(gradients, wanted, strict=True))
            return None, None, None, *of_head, *(None,) * (len(arguments) - 3)

    return LinearLoss


_LinearCrossEntropy = _linear_loss(linear_cross_entropy_forward, linear_cross_entropy_backward, 5)
_LinearKLDiv = _linear_loss(linear_kl_div_forward, linear_kl_div_backward, 7)


# --- public functions ---


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | Quantized,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, target)`, without the logits (tokens, V) in memory, also backward.

    hidden: (..., d), usually (N, d) or (B, T, d). weight: (V, d), such as a tied embedding. bias: (V,).
    target: class indices of the shape of hidden without d. class_weight: (V,), the `weight` of cross_entropy.
    dtype: of the result, float32 by default (float64 for float64 hidden).
    Other arguments and errors: as `cross_entropy`.

    Logits exist for a block of tokens and a chunk of the vocabulary at a time, rounded to the type of hidden as a
    linear layer rounds them. The backward computes them again: a fourth product of matrices beside three. Memory beyond
    inputs, gradients and results stays under 64 MB (`linear_blocks`) plus a few numbers a token.
    weight may be of another type than hidden, float32 for training in mixed precision: it is cast a chunk at a time.
    It may be quantized, a `lmops.quantization.QuantizedTensor` or the weight of a `QuantLinear`: it is dequantized a
    chunk at a time to the type of hidden, and is a constant.
    Under torch.autocast hidden is cast to its type (not float64).
    """
    weight = _of_layer(weight)
    hidden, rows = _check_head("hidden", hidden, "weight", weight, "bias", bias)
    check_class_weight("class_weight", class_weight, hidden, weight.shape[0])
    check_target(target, hidden.shape[:-1], hidden)
    options = checked_options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    check_reduction(reduction, REDUCTIONS)
    total = None
    if reduction == "mean":
        total = sum_of_weights(target, class_weight, weight.shape[0], ignore_index, hidden.dtype)
    codes, quantized = _arguments(weight)
    inputs = rows, codes, bias, target if target.ndim == 1 else target.reshape(-1), class_weight
    if differentiated(rows, codes, bias):
        loss = _LinearCrossEntropy.apply(total, reduction, options, *distinct(*inputs, *quantized))
    else:
        # what is a default is left out: each argument costs the host time
        dense = quantized[0] is None
        state = linear_cross_entropy_forward(*inputs, *options, *(() if dense else quantized))
        loss = reduced(state, total, reduction)
    loss = loss.view(target.shape) if reduction == "none" else loss
    return loss if dtype is None else loss.to(result_dtype(dtype, hidden))


def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor | Quantized,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | Quantized,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    reverse: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`kl_div` of the logits student_hidden @ student_weight.T and teacher_hidden @ teacher_weight.T, without them.

    student_hidden: (..., d). student_weight: (V, d). student_bias: (V,). The teacher's: the same, with a d of its own.
    dtype: of the result, float32 by default (float64 for float64). Other arguments and errors: as `kl_div`; blocks,
    memory and types as `linear_cross_entropy`. Gradients for the student only.
    """
    student_weight, teacher_weight = _of_layer(student_weight), _of_layer(teacher_weight)
    student_hidden, rows = _check_head(
        "student_hidden", student_hidden, "student_weight", student_weight, "student_bias", student_bias
    )
    teacher_hidden, teacher_rows = _check_head(
        "teacher_hidden", teacher_hidden, "teacher_weight", teacher_weight, "teacher_bias", teacher_bias
    )
    shape = student_hidden.shape[:-1]
    if shape != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden must be {tuple(shape)} x d as student_hidden, got {tuple(teacher_hidden.shape)}"
        )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"teacher_weight must have {student_weight.shape[0]} rows as student_weight, got {teacher_weight.shape[0]}"
        )
    check_device("teacher_hidden", teacher_hidden, student_hidden)
    options = checked_divergence(temperature, reverse)
    check_mask(mask, student_hidden)
    total = sum_of_rows(mask, reduction, student_hidden)
    reduction = "mean" if reduction == "batchmean" else reduction
    codes, student = _arguments(student_weight)
    teacher_codes, teacher = _arguments(teacher_weight)
    inputs = (
        rows, codes, student_bias, *map(constant, (teacher_rows, teacher_codes, teacher_bias)),
        mask if mask is None or mask.ndim == 1 else mask.reshape(-1),
    )  # fmt: skip
    if differentiated(rows, codes, student_bias):
        arguments = distinct(*inputs, *student, *teacher)
        loss = _LinearKLDiv.apply(as_tensor(total, student_hidden), reduction, options, *arguments)
    else:
        dense = student[0] is None and teacher[0] is None
        state = linear_kl_div_forward(*inputs, *options, *(() if dense else (*student, *teacher)))
        loss = reduced(state, total, reduction)
    loss = loss.view(shape) if reduction == "none" else loss
    return loss if dtype is None else loss.to(result_dtype(dtype, student_hidden))


def _of_layer(weight: Tensor | Quantized) -> Tensor | Quantized:
    """The weight, where it is that of a `QuantLinear` the quantized tensor which it stands for."""
    return getattr(weight, "quantized", weight)


def _check_head(
    name: str, hidden: Tensor, weight_name: str, weight: Tensor | Quantized, bias_name: str, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """hidden, as autocast wants it, and as rows (N, d)."""
    check_float(name, hidden)
    if isinstance(weight, Tensor):
        check_float(weight_name, weight)
    elif not hasattr(weight, "packed"):
        raise TypeError(
            f"{weight_name} must be a tensor or a lmops.quantization.QuantizedTensor, got {type(weight).__name__}"
        )
    shape = tuple(weight.shape)
    if len(shape) != 2 or hidden.ndim == 0 or hidden.shape[-1] != shape[1] or 0 in shape:
        shapes = f"got {tuple(hidden.shape)} and {shape}"
        raise ValueError(f"{name} must be (..., d) and {weight_name} (V, d), neither V nor d 0, {shapes}")
    check_device(weight_name, weight if isinstance(weight, Tensor) else weight.packed, hidden)
    if bias is not None:
        check_float(bias_name, bias)
        if tuple(bias.shape) != shape[:1]:
            raise ValueError(f"{bias_name} must be ({weight.shape[0]},), got {tuple(bias.shape)}")
        check_device(bias_name, bias, hidden)
    kind = hidden.device.type
    if kind in ("cpu", "cuda") and hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    return hidden, hidden if hidden.ndim == 2 else hidden.reshape(-1, hidden.shape[-1])
