"""Losses over a vocabulary: schemas, autograd, public functions. What they run is in `_loss_chunks`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from lmops.ops._launch import Launch, prepared
from lmops.ops._loss_chunks import (
    LOSS,
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
from lmops.ops._register import define_op, differentiated, warp_size
from lmops.ops.softmax import FLOATS
from lmops.reference.loss import cross_entropy as cross_entropy_with_probabilities

TARGETS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")
KL_REDUCTIONS = ("batchmean", "mean", "sum", "none")
OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap, float temperature"


# --- operators ---


def sum_of_class_weights(weight: Tensor | None, label_smoothing: float) -> Tensor | None:
    return None if weight is None or not label_smoothing else weight.sum(dtype=compute_dtype(weight.dtype))


def _cross_entropy_forward(
    run: Callable[..., None], x: Tensor, target: Tensor, weight: Tensor | None, grad: Tensor | None, dx: Tensor | None,
    *options: Any,
) -> Tensor:  # fmt: skip
    """The state; the gradient is written to dx where grad is given."""
    state = _cross_entropy_forward_fake(x)
    o = Options(*options)
    if x.numel():
        out = None if grad is None else dx
        run(
            x,
            out,
            target,
            weight,
            sum_of_class_weights(weight, o.label_smoothing),
            grad,
            state,
            o,
            Chunk(0, x.shape[-1]),
        )
    return state


def _cross_entropy_state(
    run: Callable[..., None], x: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> Tensor:
    """The state alone."""
    return _cross_entropy_forward(run, x, target, weight, None, None, *options)


def _cross_entropy_forward_fake(x: Tensor, *_: Any) -> Tensor:
    return statistics(x, 3, *x.shape[:-1])


def _cross_entropy_backward(
    run: Callable[..., None], x: Tensor, target: Tensor, weight: Tensor | None, grad: Tensor, state: Tensor, dx: Tensor,
    *options: Any,
) -> None:  # fmt: skip
    o = Options(*options)
    if x.numel():
        chunk = Chunk(0, x.shape[-1], forward=False)
        run(x, dx, target, weight, sum_of_class_weights(weight, o.label_smoothing), grad, state, o, chunk)


def _kl_div_forward(
    run: Callable[..., None], x: Tensor, y: Tensor, mask: Tensor | None, grad: Tensor | None, dx: Tensor | None,
    *options: Any,
) -> Tensor:  # fmt: skip
    """The state; the gradient is written to dx where grad is given."""
    state = _kl_div_forward_fake(x)
    if x.numel():
        run(x, y, None if grad is None else dx, mask, grad, state, Divergence(*options), Chunk(0, x.shape[-1]))
    return state


def _kl_div_state(run: Callable[..., None], x: Tensor, y: Tensor, mask: Tensor | None, *options: Any) -> Tensor:
    """The state alone."""
    return _kl_div_forward(run, x, y, mask, None, None, *options)


def _kl_div_forward_fake(x: Tensor, *_: Any) -> Tensor:
    return statistics(x, 5, *x.shape[:-1])


def _kl_div_backward(
    run: Callable[..., None], x: Tensor, y: Tensor, mask: Tensor | None, grad: Tensor, state: Tensor, dx: Tensor,
    *options: Any,
) -> None:  # fmt: skip
    if x.numel():
        run(x, y, dx, mask, grad, state, Divergence(*options), Chunk(0, x.shape[-1], forward=False))


@prepared
def _prepare_scale(x: Tensor, factor: Tensor) -> Launch | None:
    """None where x has gaps, which are not ours."""
    from lmops.kernels.loss import scale_kernel

    if torch.empty_like(x, device="meta").stride() != x.stride():
        return None
    block = 16_384
    return Launch(scale_kernel, (-(-x.numel() // block),), x.numel(), BLOCK=block, num_warps=512 // warp_size())


def _scale_launch(x: Tensor, factor: Tensor) -> None:
    if not x.numel():
        return
    launch = _prepare_scale(x, factor)
    if launch is None:
        x.mul_(factor)
    else:
        launch(x, factor)


def _scale_torch(x: Tensor, factor: Tensor) -> None:
    if factor != 1:
        x.mul_(factor)


def _nothing(*_: Any) -> None:
    """The shape function of an operator that returns nothing."""


cross_entropy_state = define_op(
    "cross_entropy_state(Tensor x, Tensor target, Tensor? weight, " + OPTIONS + ") -> Tensor",
    triton=partial(_cross_entropy_state, cross_entropy_launch),
    torch_cpu=partial(_cross_entropy_state, cross_entropy_torch),
    fake=_cross_entropy_forward_fake,
)
cross_entropy_forward = define_op(
    "cross_entropy_forward(Tensor x, Tensor target, Tensor? weight, Tensor? grad, Tensor(a!) dx, " + OPTIONS + ")"
    " -> Tensor",
    triton=partial(_cross_entropy_forward, cross_entropy_launch),
    torch_cpu=partial(_cross_entropy_forward, cross_entropy_torch),
    fake=_cross_entropy_forward_fake,
)
cross_entropy_backward = define_op(
    "cross_entropy_backward(Tensor x, Tensor target, Tensor? weight, Tensor grad, Tensor state, Tensor(a!) dx, "
    + OPTIONS + ") -> ()",
    triton=partial(_cross_entropy_backward, cross_entropy_launch),
    torch_cpu=partial(_cross_entropy_backward, cross_entropy_torch),
    fake=_nothing,
)  # fmt: skip
kl_div_state = define_op(
    "kl_div_state(Tensor x, Tensor y, Tensor? mask, float temperature, bool reverse) -> Tensor",
    triton=partial(_kl_div_state, kl_div_launch),
    torch_cpu=partial(_kl_div_state, kl_div_torch),
    fake=_kl_div_forward_fake,
)
kl_div_forward = define_op(
    "kl_div_forward(Tensor x, Tensor y, Tensor? mask, Tensor? grad, Tensor(a!) dx, float temperature, bool reverse)"
    " -> Tensor",
    triton=partial(_kl_div_forward, kl_div_launch),
    torch_cpu=partial(_kl_div_forward, kl_div_torch),
    fake=_kl_div_forward_fake,
)
kl_div_backward = define_op(
    "kl_div_backward(Tensor x, Tensor y, Tensor? mask, Tensor grad, Tensor state, Tensor(a!) dx, float temperature,"
    " bool reverse) -> ()",
    triton=partial(_kl_div_backward, kl_div_launch),
    torch_cpu=partial(_kl_div_backward, kl_div_torch),
    fake=_nothing,
)
scale_unless_one = define_op(
    "scale_unless_one(Tensor(a!) x, Tensor factor) -> ()",
    triton=_scale_launch,
    torch_cpu=_scale_torch,
    fake=_nothing,
)


# --- autograd ---


def _in_forward(x: Tensor, reduction: str) -> bool:
    """Whether the gradient is formed with the loss. Not where the backward multiplies each row by its own number; nor
    for float16, where it must have the scale of the loss in it before it is rounded, or small entries are lost."""
    return reduction != "none" and x.dtype != torch.float16


def reduced(state: Tensor, total: Tensor | float | None, reduction: str) -> Tensor:
    if reduction == "none":
        return state[LOSS].clone()
    loss = state[LOSS].sum()
    return loss if total is None or (isinstance(total, float) and total == 1) else loss.div_(total)


def row_gradient(dy: Tensor, total: Tensor | None, like: Tensor) -> Tensor:
    """Gradient of each row's loss, from that of the result."""
    return (dy if total is None else dy / total).to(like.dtype).expand(like.shape[1:])


def _ones(x: Tensor, total: Tensor | None) -> Tensor:
    """Gradient of each row's loss where that of the result is 1."""
    return torch.ones((), dtype=compute_dtype(x.dtype), device=x.device) if total is None else total.reciprocal()


def _graph_is_kept() -> bool:
    """Whether what was saved is needed again, so that nobody may write to it."""
    return torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()


def _times(dx: Tensor, dy: Tensor) -> Tensor:
    """The gradient from the forward times that of the loss, which mostly is 1: only the device knows."""
    if _graph_is_kept():
        return dx * dy
    scale_unless_one(dx, dy)
    return dx


def _memory(x: Tensor, inplace: bool) -> Tensor:
    """Where the gradient goes: new memory, or x's own, whose other users then get autograd's error."""
    if not inplace:
        return torch.empty_like(x)
    torch.autograd.graph.increment_version(x)
    return x.detach()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.autograd.function.once_differentiable`, also where the gradient of the loss is a constant, as mostly.

    torch's lets gradients through as constants then, and a penalty on them would have no effect without a word.
    """

    @wraps(backward)
    def call(ctx: Any, dy: Tensor) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, dy)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return gradients
        refuse = torch._C._functions.DelayedError(
            b"trying to differentiate twice a loss of lmops, which is once_differentiable", 1
        )
        return tuple(None if g is None else refuse(g.detach().requires_grad_()) for g in gradients)

    return call


def _row_loss(
    state_of: Callable[..., Tensor], forward_of: Callable[..., Tensor], backward_of: Callable[..., None]
) -> Any:
    """The autograd function of a loss from its operators. second, third: what they take beside the logits x."""

    class RowLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, second, third, total, reduction, inplace, options):
            ctx.arguments = inplace, options
            if _in_forward(x, reduction):
                dx = _memory(x, inplace)
                grad = _ones(x, total).expand(x.shape[:-1])
                state = forward_of(x, second, third, grad, dx, *options)
                ctx.save_for_backward(dx)
            else:
                state = state_of(x, second, third, *options)
                ctx.save_for_backward(x, second, third, total, state)
            return reduced(state, total, reduction)

        @staticmethod
        @once_differentiable
        def backward(ctx, dy):
            nothing = (None,) * 6
            if len(ctx.saved_tensors) == 1:
                return _times(ctx.saved_tensors[0], dy), *nothing
            x, second, third, total, state = ctx.saved_tensors
            inplace, options = ctx.arguments
            dx = _memory(x, inplace and not _graph_is_kept())
            backward_of(x, second, third, row_gradient(dy, total, state), state, dx, *options)
            return dx, *nothing

    return RowLoss


_CrossEntropy = _row_loss(cross_entropy_state, cross_entropy_forward, cross_entropy_backward)
_KLDiv = _row_loss(kl_div_state, kl_div_forward, kl_div_backward)


# --- public functions ---


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross entropy of logits with targets: `torch.nn.functional.cross_entropy`, and more, in one pass over the logits.

    input: logits (C,), (N, C) or (N, C, d1, ...), any strides; float16, bfloat16, float32, on the CPU also float64.
    target: class indices of an integer type, of the shape of input without C; or probabilities, of a floating-point
        type and the shape of input. Those take plain torch in float32, which holds several tensors of that shape.
    weight: (C,), a factor a class. Not differentiable.
    ignore_index: tokens with this target take no part: loss 0, gradient 0, and their logits are not read.
    reduction: "none", "sum", or "mean", which divides the sum by that of the weights of the targets that take part.
        Without any that is NaN, as in torch. size_average, reduce: torch's deprecated names for it.
    label_smoothing: from 0 to 1, the share of the target that is spread evenly over the classes.
    z_loss: adds z_loss * lse^2 to every token that takes part, lse the logarithm of the sum of exponentials of its
        logits (PaLM, arXiv 2204.02311). It is reduced with the rest.
    softcap: the logits are softcap * tanh(input / softcap) (Gemma 2, arXiv 2408.00118), where -inf stays -inf.
    temperature: they are divided by it after that. A finite number above 0.
    inplace_backward: the gradient overwrites input, which saves memory of its size. What else saved input for its own
        backward then raises autograd's error about an in-place change. Only for an input that is not a leaf, and
        without effect under torch.compile, which plans memory itself.
    dtype: of the result, by default input's (under torch.autocast float32, as torch). Losses are computed in float32
        (float64: in float64), so dtype=torch.float32 is the better choice for training in bfloat16.

    Logits of -inf have probability 0. A target out of range raises ValueError on the CPU; on a GPU that would stall
    the stream, so there the loss and the gradient of its row are NaN, and nothing outside the tensors is read.
    The gradient is computed with the loss, and kept in place of the logits; where the gradient of a sum or mean is 1,
    as in `loss.backward()`, the backward only looks at that number. For reduction "none", and in float16, where it must
    not be rounded before the scale of the loss is in it, the backward reads the logits once more instead.
    Differentiable once, with respect to input (with probabilities: and target, any number of times).
    Raises TypeError or ValueError for bad types, shapes or numbers.
    """
    if size_average is not None or reduce is not None:
        reduction = nn._reduction.legacy_get_string(size_average, reduce)
    check_float("input", input)
    if input.ndim == 0 or input.shape[0 if input.ndim == 1 else 1] == 0:
        raise ValueError(f"input must be (C,) or (N, C, ...) with at least one class, got {tuple(input.shape)}")
    x = input if input.ndim <= 2 else input.movedim(1, -1)
    check_class_weight("weight", weight, x)
    options = checked_options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    check_reduction(reduction, REDUCTIONS)
    dtype = result_dtype(dtype, input)
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ValueError(
                f"target of probabilities must be {tuple(input.shape)} as input, got {tuple(target.shape)}"
            )
        check_device("target", target, input)
        return cross_entropy_with_probabilities(
            input, target, weight, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss,
            softcap=softcap, temperature=temperature, dtype=dtype,
        )  # fmt: skip
    check_target(target, x.shape[:-1], input)
    total = sum_of_weights(target, weight, x.shape[-1], ignore_index, x.dtype) if reduction == "mean" else None
    if differentiated(input):
        inplace = inplace_backward and not torch.compiler.is_compiling()
        if inplace:
            _check_not_a_leaf("input", input)
        loss = _CrossEntropy.apply(x, target, weight, total, reduction, inplace, options)
    else:
        loss = reduced(cross_entropy_state(x, target, weight, *options), total, reduction)
    return loss if loss.dtype == dtype else loss.to(dtype)


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    reverse: bool = False,
    inplace_backward: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """KL(p || q) of p = softmax(teacher / temperature) and q = softmax(student / temperature), to distil a model.

    student_logits, teacher_logits: (..., V), any strides; float16, bfloat16, float32, on the CPU also float64.
    temperature: a finite number above 0. Gradients shrink with its square: beside a loss on hard labels, multiply the
        result by temperature^2 (Hinton, Vinyals and Dean, arXiv 1503.02531). It is not done here.
    mask: bool (...), False for rows that do not count: value 0, gradient 0, and their logits are not read.
    reduction: "none" one value a row, "sum", "batchmean" the sum over the size of the first dimension, as torch, "mean"
        the sum over the number of rows that count (torch divides by the number of logits).
    reverse: KL(q || p) in place of KL(p || q).
    inplace_backward, dtype: as `cross_entropy`; the gradient overwrites student_logits.

    0 log 0 is 0, so logits of -inf in both take no part. Differentiable once, with respect to student_logits; the
    teacher gets no gradient. Each tensor is read once, and the gradient computed with the value, as in
    `cross_entropy`.
    Raises TypeError or ValueError for bad types, shapes or numbers.
    """
    check_float("student_logits", student_logits)
    check_float("teacher_logits", teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits must be {tuple(student_logits.shape)} as student_logits, got {tuple(teacher_logits.shape)}"
        )
    check_device("teacher_logits", teacher_logits, student_logits)
    if student_logits.ndim == 0 or student_logits.shape[-1] == 0:
        raise ValueError(f"student_logits must be (..., V) with V > 0, got {tuple(student_logits.shape)}")
    options = checked_divergence(temperature, reverse)
    check_mask(mask, student_logits)
    dtype = result_dtype(dtype, student_logits)
    x, y = student_logits, constant(teacher_logits)
    total = sum_of_rows(mask, reduction, x)
    reduction = "mean" if reduction == "batchmean" else reduction
    if differentiated(x):
        inplace = inplace_backward and not torch.compiler.is_compiling()
        if inplace:
            _check_not_a_leaf("student_logits", x)
        loss = _KLDiv.apply(x, y, mask, as_tensor(total, x), reduction, inplace, options)
    else:
        loss = reduced(kl_div_state(x, y, mask, *options), total, reduction)
    return loss if loss.dtype == dtype else loss.to(dtype)


# --- checks ---


def check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS or (x.dtype == torch.float64 and x.device.type == "cuda"):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or, on the CPU, float64, got {x.dtype}")


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the logits, got {x.device}")


def check_target(target: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if target.dtype not in TARGETS:
        raise TypeError(f"target must be of an integer type, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"target must be {tuple(shape)}, one class a token, got {tuple(target.shape)}")
    check_device("target", target, like)


def check_class_weight(name: str, weight: Tensor | None, x: Tensor, n_classes: int | None = None) -> None:
    if weight is None:
        return
    n_classes = x.shape[-1] if n_classes is None else n_classes
    check_float(name, weight)
    if weight.shape != (n_classes,):
        raise ValueError(f"{name} must be ({n_classes},), one value a class, got {tuple(weight.shape)}")
    check_device(name, weight, x)
    if weight.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{name} has no gradient here, but requires one: pass {name}.detach()")


def constant(t: Tensor | None) -> Any:
    return t.detach() if t is not None and t.requires_grad else t


def check_mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must be {tuple(x.shape[:-1])}, one value a row, got {tuple(mask.shape)}")
    check_device("mask", mask, x)


def _check_not_a_leaf(name: str, x: Tensor) -> None:
    if x.is_leaf or (x._base is not None and x._base.is_leaf):
        raise ValueError(f"inplace_backward would overwrite {name}, a leaf that requires a gradient, or a view of one")
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"inplace_backward needs {name} to have memory for each entry, got strides {x.stride()}")


def check_reduction(reduction: str, allowed: Sequence[str]) -> None:
    if reduction not in allowed:
        raise ValueError(f"reduction must be one of {', '.join(allowed)}, got {reduction!r}")


def _check_temperature(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")
    return float(temperature)


def checked_options(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, temperature: float
) -> Options:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if not -math.inf < z_loss < math.inf:  # torch.compile has no isfinite of a number that varies
        raise ValueError(f"z_loss must be finite, got {z_loss}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be finite and above 0, or None, got {softcap}")
    temperature = _check_temperature(temperature)
    return Options(ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0), temperature)


def checked_divergence(temperature: float, reverse: bool) -> Divergence:
    return Divergence(_check_temperature(temperature), bool(reverse))


def result_dtype(dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    kind = x.device.type
    if dtype is None and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return compute_dtype(x.dtype)
    return dtype or x.dtype


def sum_of_weights(
    target: Tensor, weight: Tensor | None, n_classes: int, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """What "mean" divides by, computed on the device; without weights an integer."""
    kept = target != ignore_index
    if weight is None:
        return kept.count_nonzero()
    # a target out of range makes the sum of losses NaN, whatever it weighs
    return torch.where(kept, weight.to(compute_dtype(dtype))[target.long().clamp(0, n_classes - 1)], 0).sum()


def as_tensor(total: Tensor | float | None, x: Tensor) -> Tensor | None:
    return x.new_full((), total, dtype=compute_dtype(x.dtype)) if isinstance(total, float) else total


def sum_of_rows(mask: Tensor | None, reduction: str, x: Tensor) -> Tensor | float | None:
    check_reduction(reduction, KL_REDUCTIONS)
    if reduction in ("sum", "none"):
        return None
    if reduction == "mean" and mask is not None:
        return mask.sum().to(compute_dtype(x.dtype))
    rows = x.shape[:-1]
    return float(math.prod(rows) if reduction == "mean" else rows[0] if rows else 1)
