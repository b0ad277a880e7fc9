"""Cross entropy, the divergence to a teacher and their linear forms: references, CPU implementation and kernels."""

import math
import weakref
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lmops
from lmops.modules import CrossEntropyLoss, LinearCrossEntropy
from lmops.ops import linear_loss
from lmops.ops import loss as ops
from lmops.ops._register import OPERATORS
from lmops.ops.linear_loss import Blocks, linear_blocks
from lmops.ops.softmax import softmax_tile
from lmops.quantization import QuantizedTensor
from lmops.reference import loss as reference
from lmops.testing import LAYOUTS, arrange, assert_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP64 = torch.float64
INF, NAN = float("inf"), float("nan")
# one class, under a vector, one tile of several rows, an odd length with edges, a multiple of 8 but not of 16
SHAPES = ((5, 1), (6, 7), (9, 64), (3, 1003), (3, 1032))
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "temperature": 0.7}


def wide(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def to(device, t):
    return t.to(device) if isinstance(t, torch.Tensor) else t


def gradients(function, inputs, others, dy, **options):
    """Result and gradients with respect to the inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves, *others, **options)
    return y, *torch.autograd.grad(y, leaves, dy)


def check(path, function, expected, inputs, others, **options):
    """Results and gradients of an operator against its reference in float64."""
    dtype = options.get("dtype") or inputs[0].dtype
    with torch.no_grad():
        dy = torch.randn(expected(*inputs, *others, **options).shape).to(dtype)
    w = {k: wide(v) for k, v in options.items() if k != "dtype"}
    truth = gradients(expected, [wide(t) for t in inputs], [wide(t) for t in others], dy.double(), **w)
    baseline = gradients(expected, inputs, others, dy, **options)
    there = {k: to(path.device, v) for k, v in options.items()}
    others = [to(path.device, t) for t in others]
    actual = gradients(function, [to(path.device, t) for t in inputs], others, dy.to(path.device), **there)
    for i, (a, t, b) in enumerate(zip(actual, truth, baseline, strict=True)):
        if i == 0 and a.ndim == 0 and a.dtype == inputs[0].dtype:
            # torch's error of one number is often 0 by luck; losses of rows, where it is not, keep to the rule
            torch.testing.assert_close(a.cpu(), t.to(a.dtype), equal_nan=True)
        else:
            assert_accurate(a, t, b)
    return actual


def targets(shape, n_classes, ignored=0.2, ignore_index=-100):
    y = torch.randint(0, n_classes, shape)
    return torch.where(torch.rand(shape) < ignored, ignore_index, y)


# --- references ---


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 5, 3), (2, 5, 3, 2)], ids=str)
def test_reference_is_torch(shape, label_smoothing, reduction):
    classes = shape[0] if len(shape) == 1 else shape[1]
    x = torch.randn(shape, dtype=FP64)
    y = targets(shape[:1] * (len(shape) > 1) + shape[2:], classes)
    probabilities = torch.softmax(torch.randn_like(x), 0 if x.ndim == 1 else 1)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    for weight in (None, torch.rand(classes, dtype=FP64)):
        for target in (y, probabilities):
            theirs = F.cross_entropy(x, target, weight, **options)
            ours = reference.cross_entropy(x, target, weight, **options)
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_kl_reference_is_torch(reverse):
    x, y = torch.randn(3, 4, 7, dtype=FP64), torch.randn(3, 4, 7, dtype=FP64)
    q, p = (y, x) if reverse else (x, y)
    logs = torch.log_softmax(q / 2, -1), torch.log_softmax(p / 2, -1)
    for reduction in ("batchmean", "sum"):
        expected = F.kl_div(*logs, reduction=reduction, log_target=True)
        torch.testing.assert_close(reference.kl_div(x, y, 2, reduction=reduction, reverse=reverse), expected)
    rows = F.kl_div(*logs, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(reference.kl_div(x, y, 2, reduction="none", reverse=reverse), rows)
    mask = torch.tensor([True, False, True, True]).expand(3, 4)
    expected = rows[mask].sum() / 9
    torch.testing.assert_close(reference.kl_div(x, y, 2, reduction="mean", reverse=reverse, mask=mask), expected)


def test_options_of_the_reference():
    """z-loss, softcap and temperature as their papers write them."""
    x, y = torch.randn(6, 9, dtype=FP64) * 3, torch.randint(0, 9, (6,))
    z = 2 * torch.tanh(x / 2) / 0.7
    expected = F.cross_entropy(z, y) + 0.3 * z.logsumexp(-1).square().mean()
    torch.testing.assert_close(reference.cross_entropy(x, y, z_loss=0.3, softcap=2.0, temperature=0.7), expected)


# --- cross entropy ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dtype_and_size(path, shape, dtype, reduction):
    x, y = (torch.randn(shape) * 3).to(dtype), targets(shape[:1], shape[1])
    y[0] = shape[1] - 1
    check(path, lmops.cross_entropy, reference.cross_entropy, [x], [y], reduction=reduction)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layouts(path, layout, reduction):
    x = arrange(torch.randn(6, 203).bfloat16(), layout)
    y = targets((6, 2), 203)[:, 0]
    check(path, lmops.cross_entropy, reference.cross_entropy, [x], [y], reduction=reduction, **EVERYTHING)


@pytest.mark.parametrize("shape", [(37,), (2, 37, 5), (2, 37, 3, 4), (1, 3, 40)], ids=str)
def test_any_rank(path, shape):
    classes = shape[0] if len(shape) == 1 else shape[1]
    y = targets(shape[:1] * (len(shape) > 1) + shape[2:], classes, ignored=0)
    for reduction in ("sum", "none"):
        check(path, lmops.cross_entropy, reference.cross_entropy, [torch.randn(shape)], [y], reduction=reduction)
        x = torch.randn(shape, device=path.device)
        x = x if x.ndim == 1 else x.movedim(1, -1).contiguous().movedim(-1, 1)
        x.requires_grad_()
        (dx,) = torch.autograd.grad(lmops.cross_entropy(x, y.to(path.device), reduction="sum"), x)
        assert dx.stride() == x.stride()


@pytest.mark.parametrize(
    ("n_cols", "options"), [(49_152, {}), (83_001, {}), (32_768, EVERYTHING), (33_001, EVERYTHING)], ids=str
)
def test_long_rows(path, n_cols, options):
    x, y = (torch.randn(2, n_cols) * 4).bfloat16(), torch.tensor([n_cols - 1, 9_000])
    check(path, lmops.cross_entropy, reference.cross_entropy, [x], [y], **options)


@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(6, 9),
    classes=st.integers(8, 150),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignore_index=st.sampled_from([-100, 0, 3]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    softcap=st.sampled_from([None, 3.0]),
    temperature=st.sampled_from([1.0, 0.4]),
    weighted=st.booleans(),
)
def test_options(path, n, classes, dtype, weighted, ignore_index, **options):
    x = (torch.randn(n, classes) * 2).to(dtype)
    y = targets((n,), classes, ignore_index=ignore_index)
    y[0] = classes - 1  # so that not all are ignored
    if ignore_index == classes - 1:
        ignore_index = -1
    weight = torch.rand(classes) + 0.1 if weighted else None
    options = {**options, "ignore_index": ignore_index, "weight": weight}
    y[(y < 0) & (y != ignore_index)] = 0
    check(path, lmops.cross_entropy, reference.cross_entropy, [x], [y], **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("classes", [40, 1003])
def test_masked_vocabulary(path, classes, reduction):
    """Logits of -inf have probability 0, also under a softcap; a target among them has an infinite loss."""
    x = torch.randn(4, classes)
    x[torch.rand(4, classes) < 0.4] = -INF
    y = torch.tensor([5, 6, 7, 8])
    x[torch.arange(4), y] = 1.0
    for options in ({}, {"softcap": 4.0, "z_loss": 1e-2}):
        _, dx = check(path, lmops.cross_entropy, reference.cross_entropy, [x], [y], reduction=reduction, **options)
        assert (dx.cpu()[x == -INF] == 0).all()
    x[1, 6] = -INF
    loss = lmops.cross_entropy(x.to(path.device), y.to(path.device), reduction="none").cpu()
    assert loss[1] == INF
    assert loss[[0, 2, 3]].isfinite().all()
    smoothed = lmops.cross_entropy(x.to(path.device), y.to(path.device), reduction="none", label_smoothing=0.1).cpu()
    assert torch.equal(smoothed, F.cross_entropy(x, y, reduction="none", label_smoothing=0.1))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"z_loss": 1e-3, "temperature": 30.0}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_logits(path, dtype, options):
    """Around 10,000, where only differences of logits have digits."""
    x = torch.randn(5, 300) * 3 + torch.tensor([[1e4], [-1e4], [0], [6e4], [-6e4]])
    x[2, 7] = 1e4
    y = torch.tensor([1, 2, 7, 4, 5])
    for reduction in ("none", "mean"):
        check(path, lmops.cross_entropy, reference.cross_entropy, [x.to(dtype)], [y], reduction=reduction, **options)


def test_nan_spoils_its_row_only(path):
    x, y = torch.randn(5, 300), torch.tensor([0, 1, 2, 3, -100])
    x[1, 7], x[2, 9], x[3], x[4, 2] = NAN, INF, -INF, NAN
    x = x.to(path.device).requires_grad_()
    for function in (lmops.cross_entropy, reference.cross_entropy):
        loss = function(x, y.to(path.device), reduction="none")
        (dx,) = torch.autograd.grad(loss.sum(), x)
        assert loss[1:4].isnan().all(), loss
        assert dx[1:4].isnan().any(-1).all()
        assert loss[[0, 4]].isfinite().all()
        assert dx[0].isfinite().all()
    # the logits of an ignored token are not looked at; torch's own gradient of them is NaN here
    (dx,) = torch.autograd.grad(lmops.cross_entropy(x, y.to(path.device), reduction="sum"), x)
    assert (dx[4] == 0).all()


@pytest.mark.parametrize("classes", [5, 40_000])
def test_all_ignored(path, classes):
    x = torch.randn(3, classes, device=path.device, requires_grad=True)
    y = torch.full((3,), -100, device=path.device)
    for weight in (None, torch.rand(classes, device=path.device)):
        for reduction, expected in (("mean", NAN), ("sum", 0.0)):
            loss = lmops.cross_entropy(x, y, weight, reduction=reduction, z_loss=0.1, label_smoothing=0.1)
            torch.testing.assert_close(loss.item(), expected, equal_nan=True)
            assert (torch.autograd.grad(loss, x)[0] == 0).all()
        assert (lmops.cross_entropy(x, y, weight, reduction="none") == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)], ids=str)
def test_no_tokens(path, shape):
    x = torch.randn(shape, device=path.device, requires_grad=True)
    y = torch.zeros(shape[:1] + shape[2:], dtype=torch.long, device=path.device)
    for reduction, expected in (("mean", NAN), ("sum", 0.0)):
        loss = lmops.cross_entropy(x, y, reduction=reduction)
        torch.testing.assert_close(loss.item(), expected, equal_nan=True)
        assert torch.autograd.grad(loss, x)[0].shape == shape
    assert lmops.cross_entropy(x, y, reduction="none").shape == y.shape


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32], ids=str)
def test_target_types(path, dtype):
    x, y = torch.randn(4, 9), torch.tensor([1, 8, 3, 0]).to(dtype)
    loss = lmops.cross_entropy(x.to(path.device), y.to(path.device), ignore_index=3)
    torch.testing.assert_close(loss.cpu(), F.cross_entropy(x, y.long(), ignore_index=3))


def test_result_dtype(path):
    x, y = torch.randn(4, 90).bfloat16(), targets((4,), 90, 0)
    assert lmops.cross_entropy(x.to(path.device), y.to(path.device)).dtype == torch.bfloat16
    check(path, lmops.cross_entropy, reference.cross_entropy, [x], [y], dtype=torch.float32)
    with torch.autocast(path.device, dtype=torch.bfloat16):
        assert lmops.cross_entropy(x.to(path.device), y.to(path.device)).dtype == torch.float32


def test_target_out_of_range(path):
    x = torch.randn(4, 70, requires_grad=True)
    y = torch.tensor([1, 70, -3, 2])
    if path.kind == "torch":
        for bad in (70, -3):
            with pytest.raises(ValueError, match=rf"target must be from 0 to 69 or ignore_index \(-100\), got {bad}"):
                lmops.cross_entropy(x, torch.tensor([1, bad, 2, 2]))
        lmops.cross_entropy(x, torch.tensor([1, 2, 3, 4]))
        return
    # a kernel cannot raise without stalling the stream: the row is NaN, and the simulator would see a read outside
    leaf = x.detach().to(path.device).requires_grad_()
    for weight in (None, torch.rand(70, device=path.device)):
        loss = lmops.cross_entropy(leaf, y.to(path.device), weight, reduction="none")
        (dx,) = torch.autograd.grad(loss.sum(), leaf)
        assert loss[1:3].isnan().all()
        assert dx[1:3].isnan().all()
        assert loss[[0, 3]].isfinite().all()
        assert dx[[0, 3]].isfinite().all()
        assert lmops.cross_entropy(leaf, y.to(path.device), weight).isnan()
    hidden = torch.randn(4, 6, device=path.device)
    rows = lmops.linear_cross_entropy(hidden, leaf.detach()[:, :6], y.to(path.device) % 71, reduction="none")
    assert rows.isfinite().sum() == 2


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_scaled(path, reduction, dtype):
    """Also in a graph that is kept, and in several passes through it."""
    x, y = torch.randn(3, 101).to(dtype), targets((3,), 101, 0)
    leaf = x.to(path.device).requires_grad_()
    loss = lmops.cross_entropy(leaf, y.to(path.device), reduction=reduction).sum()
    for factor in (1.0, 8.0, 1.0, 0.0, -3.0):
        (dx,) = torch.autograd.grad(loss * factor, leaf, retain_graph=True)
        theirs = x.float().requires_grad_()
        expected = F.cross_entropy(theirs, y, reduction=reduction).sum() * factor
        torch.testing.assert_close(dx.cpu(), torch.autograd.grad(expected, theirs)[0].to(dtype))
    (dx,) = torch.autograd.grad(loss * 8, leaf)
    torch.testing.assert_close(
        dx.cpu(), torch.autograd.grad(8 * F.cross_entropy(theirs, y, reduction=reduction).sum(), theirs)[0].to(dtype)
    )
    # what it gave away is its own: the layout of a result whose memory has gaps
    base = torch.zeros(3, 101, 2, dtype=dtype, device=path.device, requires_grad=True)
    (dx,) = torch.autograd.grad(lmops.cross_entropy(base[..., 0], y.to(path.device)) * 2, base)
    assert dx[..., 1].eq(0).all()


def test_float16_keeps_small_gradients(path):
    """A scaled loss, as mixed precision in float16 has it: each entry is rounded with the scale in it."""
    x, y = torch.randn(2, 2_000).half() * 0.01, torch.tensor([0, 1])
    leaf = x.to(path.device).requires_grad_()
    (dx,) = torch.autograd.grad(lmops.cross_entropy(leaf, y.to(path.device), dtype=torch.float32) * 2.0**14, leaf)
    theirs = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(theirs, y) * 2.0**14, theirs)
    torch.testing.assert_close(dx.double().cpu(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("n_cols", [130, 33_001])
def test_inplace_backward(path, reduction, layout, n_cols):
    x, y = torch.randn(3, n_cols), targets((3,), n_cols, 0.3)
    weight = torch.randn(3, n_cols)

    def loss(function, leaf, **options):
        return function(arrange(leaf * 1, layout), y.to(leaf.device), reduction=reduction, **options)

    leaf = x.to(path.device).requires_grad_()
    logits = arrange(leaf * 1, layout)
    before = logits.data_ptr()
    grads = []
    logits.register_hook(lambda g: grads.append(g.data_ptr()))
    actual = lmops.cross_entropy(logits, y.to(path.device), reduction=reduction, inplace_backward=True)
    dy = torch.full_like(actual, 3.0)
    (dx,) = torch.autograd.grad(actual, leaf, dy)
    assert grads == [before]
    theirs = x.clone().requires_grad_()
    expected = F.cross_entropy(theirs, y, reduction=reduction)
    torch.testing.assert_close(actual.cpu(), expected)
    torch.testing.assert_close(dx.cpu(), torch.autograd.grad(expected, theirs, dy.cpu())[0])

    # whoever needs the logits for another gradient is told
    logits = leaf * 1
    other = (logits * logits * weight.to(path.device)).sum()
    actual = lmops.cross_entropy(logits, y.to(path.device), reduction=reduction, inplace_backward=True).sum()
    if reduction == "mean":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (actual + other).backward()
    for wrong in (leaf, leaf[1:], (leaf * 1).sum(0).expand(3, -1)):
        with pytest.raises(ValueError, match="inplace_backward"):
            lmops.cross_entropy(wrong, y.to(path.device)[: wrong.shape[0]], inplace_backward=True)


def test_probabilities():
    """Plain torch: the values, and a gradient for the target too."""
    x, q = torch.randn(4, 9, 3, dtype=FP64), torch.softmax(torch.randn(4, 9, 3, dtype=FP64), 1)
    weight = torch.rand(9, dtype=FP64)
    for reduction in ("mean", "sum", "none"):
        results = []
        for function in (F.cross_entropy, lmops.cross_entropy):
            a, b = x.clone().requires_grad_(), q.clone().requires_grad_()
            y = function(a, b, weight, reduction=reduction, label_smoothing=0.2)
            results.append((y, *torch.autograd.grad(y.sum(), (a, b))))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert lmops.cross_entropy(x.bfloat16(), q.bfloat16()).dtype == torch.bfloat16


def test_signature_is_torchs():
    """Every argument of torch's function, by position and by name, the deprecated ones included."""
    x, y, w = torch.randn(4, 9), torch.tensor([1, 2, 3, 4]), torch.rand(9)
    calls = [
        lambda f: f(x, y, w, None, 2, None, "sum", 0.1),
        lambda f: f(input=x, target=y, weight=w, ignore_index=2, reduction="none", label_smoothing=0.1),
    ]
    for call in calls:
        torch.testing.assert_close(call(lmops.cross_entropy), call(F.cross_entropy))
    with pytest.warns(UserWarning, match="deprecated"):
        assert lmops.cross_entropy(x, y, size_average=False) == F.cross_entropy(x, y, reduction="sum")


# --- the divergence ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 1), (2, 3, 7), (9, 64), (3, 1003)], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_kl_div(path, shape, dtype, reverse):
    x, y = (torch.randn(shape) * 2).to(dtype), (torch.randn(shape) * 2).to(dtype)
    rows, _ = check(path, lmops.kl_div, reference.kl_div, [x], [y, 1.7], reduction="none", reverse=reverse)
    # one number can be right by luck in torch: it is compared with the rows, which were compared with the truth
    leaf = x.to(path.device, copy=True).requires_grad_()
    mean = lmops.kl_div(leaf, y.to(path.device), 1.7, reverse=reverse)
    torch.testing.assert_close(mean, (rows.float().sum() / shape[0]).to(dtype))
    (dx,) = torch.autograd.grad(mean, leaf)
    exact, rounded = x.double().requires_grad_(), x.clone().requires_grad_()
    for a, wide_y in ((exact, y.double()), (rounded, y)):
        reference.kl_div(a, wide_y, 1.7, reverse=reverse).backward()
    assert_accurate(dx, exact.grad, rounded.grad)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n_cols", [17_003, 33_001])
def test_kl_div_of_long_rows(path, n_cols, reverse):
    x, y = (torch.randn(2, n_cols) * 2).bfloat16(), (torch.randn(2, n_cols) * 2).bfloat16()
    check(path, lmops.kl_div, reference.kl_div, [x], [y], reverse=reverse)


@settings(max_examples=12, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(6, 9),
    classes=st.integers(8, 150),
    types=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    reduction=st.sampled_from(["batchmean", "mean", "sum", "none"]),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    reverse=st.booleans(),
    masked=st.booleans(),
)
def test_kl_div_options(path, n, classes, types, layouts, masked, **options):
    x, y = (arrange((torch.randn(n, classes) * 2).to(d), k) for d, k in zip(types, layouts, strict=True))
    mask = torch.rand(n) < 0.7 if masked else None
    if mask is not None:
        mask[0] = True
    check(path, lmops.kl_div, reference.kl_div, [x], [y], mask=mask, **options)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n_cols", [50, 17_003])
def test_kl_div_of_a_masked_vocabulary(path, n_cols, reverse):
    """0 log 0 is 0; only a class that has probability in one and none in the other makes the value infinite."""
    x, y = torch.randn(4, n_cols), torch.randn(4, n_cols)
    hidden = torch.rand(4, n_cols) < 0.4
    x[hidden] = y[hidden] = -INF
    _, dx = check(path, lmops.kl_div, reference.kl_div, [x], [y], reverse=reverse, reduction="none")
    assert (dx.cpu()[hidden] == 0).all()
    one, other = (y, x) if reverse else (x, y)
    one[0, 3], other[0, 3] = -INF, 1.0
    rows = lmops.kl_div(x.to(path.device), y.to(path.device), reverse=reverse, reduction="none").cpu()
    assert rows[0] == INF
    assert rows[1:].isfinite().all()
    other[0, 3], one[0, 3] = -INF, 1.0
    assert lmops.kl_div(x.to(path.device), y.to(path.device), reverse=reverse).isfinite()


@pytest.mark.parametrize("reverse", [False, True])
def test_kl_div_of_huge_logits(path, reverse):
    x, y = torch.randn(3, 300) + 1e4, torch.randn(3, 300) - 3e3
    check(path, lmops.kl_div, reference.kl_div, [x], [y], reverse=reverse, reduction="none")


def test_kl_div_of_nothing_and_of_the_same(path):
    x = torch.randn(3, 90, device=path.device, requires_grad=True)
    value = lmops.kl_div(x, x)
    assert abs(value.item()) < 1e-6
    assert torch.autograd.grad(value, x)[0].abs().max() < 1e-8
    for shape in ((0, 5), (3, 0, 5)):
        x = torch.randn(shape, device=path.device, requires_grad=True)
        assert lmops.kl_div(x, x, reduction="sum").item() == 0
        assert lmops.kl_div(x, x, reduction="none").shape == shape[:-1]
    x, y = torch.randn(2, 40, device=path.device, requires_grad=True), torch.randn(2, 40, device=path.device)
    x.data[1], none = NAN, torch.zeros(2, dtype=torch.bool, device=path.device)
    first = torch.tensor([True, False], device=path.device)
    assert lmops.kl_div(x, y, mask=first).isfinite()
    assert (torch.autograd.grad(lmops.kl_div(x, y, mask=first), x)[0][1] == 0).all()
    assert lmops.kl_div(x, y, mask=none, reduction="mean").isnan()


def test_kl_div_inplace_backward(path):
    x, y = torch.randn(3, 90), torch.randn(3, 90, device=path.device)
    expected = gradients(reference.kl_div, [x], [y.cpu()], torch.tensor(2.0))
    leaf = x.to(path.device).requires_grad_()
    logits = leaf * 1
    kept = logits.detach()
    value = lmops.kl_div(logits, y, inplace_backward=True)
    (dx,) = torch.autograd.grad(value, leaf, torch.tensor(2.0, device=path.device))
    torch.testing.assert_close(dx.cpu(), expected[1])
    torch.testing.assert_close(kept.cpu(), expected[1])


# --- the linear forms ---


@contextmanager
def blocks_of(tokens, classes):
    """Small blocks, so that small inputs have several of them, with shorter ones at the ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_loss, "_head_blocks", lambda *_: Blocks(tokens, classes))
        yield


def linear(n, d, classes, dtype=torch.float32):
    """hidden, weight, bias and target."""
    hidden, weight = torch.randn(n, d), torch.randn(classes, d) / math.sqrt(d)
    return hidden.to(dtype), weight.to(dtype), torch.randn(classes).to(dtype), targets((n,), classes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("blocks", [(16, 71), (7, 24)], ids=str)
def test_linear_cross_entropy(path, dtype, options, blocks):
    hidden, weight, bias, target = linear(16, 24, 71, dtype)
    target[0] = 70
    class_weight = torch.rand(71) + 0.1 if options else None
    for reduction in ("mean", "none"):
        with blocks_of(*blocks):
            check(
                path,
                lambda h, w, b, y, **o: lmops.linear_cross_entropy(h, w, y, b, **o),
                lambda h, w, b, y, **o: reference.linear_cross_entropy(h, w, y, b, **o),
                [hidden, weight, bias],
                [target],
                reduction=reduction,
                dtype=torch.float32,
                class_weight=class_weight,
                **options,
            )


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_linear_gradients_that_are_wanted(path, wanted):
    """Others are not formed: the products of matrices are counted, of which the first is the logits again."""
    inputs = linear(9, 8, 20)
    *tensors, target = (t.to(path.device) for t in inputs)
    leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
    lmops.linear_cross_entropy(leaves[0], leaves[1], target, leaves[2]).backward()
    expected = [t.detach().clone().requires_grad_() for t in inputs[:3]]
    F.cross_entropy(F.linear(*expected), inputs[3]).backward()
    for a, e, w in zip(leaves, expected, wanted, strict=True):
        assert (a.grad is not None) == w
        if w:
            torch.testing.assert_close(a.grad.cpu(), e.grad)

    hidden, weight, bias = tensors
    options = (-100, 0.0, 0.0, 0.0, 1.0)
    state = linear_loss.linear_cross_entropy_forward(hidden, weight, bias, target, None, *options)
    backward = implementation_of("linear_cross_entropy_backward", path)
    with Products() as products:
        backward(hidden, weight, bias, target, None, torch.ones_like(state[0]), state, list(wanted), *options)
    assert products.count == 1 + (wanted[0] or wanted[1])


def implementation_of(name, path):
    """What runs behind an operator, where a mode sees the operators that it calls."""
    return getattr(OPERATORS[name], path.kind)


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


def test_tied_weight(path):
    """The weight is the embedding that the tokens came through: its gradients add up."""
    embedding = nn.Embedding(50, 8).to(path.device)
    tokens = torch.randint(0, 50, (2, 6), device=path.device)
    loss = lmops.linear_cross_entropy(embedding(tokens[:, :-1]), embedding.weight, tokens[:, 1:])
    loss.backward()
    ours, embedding.weight.grad = embedding.weight.grad, None
    logits = F.linear(embedding(tokens[:, :-1]), embedding.weight)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours, embedding.weight.grad)


@pytest.mark.parametrize("hidden_shape", [(6,), (2, 3, 6), (0, 6), (2, 0, 6)], ids=str)
def test_linear_shapes(path, hidden_shape):
    hidden = torch.randn(hidden_shape, device=path.device, requires_grad=True)
    weight = torch.randn(11, 6, device=path.device, requires_grad=True)
    target = targets(hidden_shape[:-1], 11, 0).to(path.device)
    rows = lmops.linear_cross_entropy(hidden, weight, target, reduction="none")
    assert rows.shape == target.shape
    loss = lmops.linear_cross_entropy(hidden, weight, target, reduction="sum")
    torch.testing.assert_close(loss, rows.sum())
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight))
    expected = F.cross_entropy(F.linear(hidden, weight).view(-1, 11), target.view(-1), reduction="sum")
    for a, e in zip((dhidden, dweight), torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, e)
    teacher = lmops.linear_kl_div(hidden, weight, hidden.detach() * 2, weight, reduction="none")
    assert teacher.shape == target.shape


def test_autocast_leaves_float64():
    hidden, weight, bias, target = (t.double() if t.is_floating_point() else t for t in linear(3, 8, 11))
    expected = lmops.linear_cross_entropy(hidden, weight, target, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lmops.linear_cross_entropy(hidden, weight, target, bias), expected)


def test_mixed_precision(path):
    """Under autocast a float32 weight is cast a chunk at a time, and its gradient is added up in float32."""
    hidden, weight, bias, target = linear(33, 16, 71)
    leaves = [t.to(path.device).requires_grad_() for t in (hidden, weight, bias)]
    with blocks_of(8, 24), torch.autocast(path.device, dtype=torch.bfloat16):
        loss = lmops.linear_cross_entropy(leaves[0], leaves[1], target.to(path.device), leaves[2])
    with blocks_of(8, 24):
        actual = torch.autograd.grad(loss, leaves)
    assert [g.dtype for g in actual] == [torch.float32] * 3

    def composite(h, w, b, dtype):
        logits = F.linear(h.to(dtype), w.to(dtype), b.to(dtype))
        return F.cross_entropy(logits if dtype == FP64 else logits.float(), target)

    rounded = [t.bfloat16().float() for t in (hidden, weight, bias)]
    one = torch.tensor(1.0)
    truth = gradients(lambda *t: composite(*t, FP64), [t.double() for t in rounded], [], one.double())
    baseline = gradients(lambda *t: composite(*t, torch.bfloat16), rounded, [], one)
    for a, t, b in zip((loss, *actual), truth, baseline, strict=True):
        assert_accurate(a, t, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("blocks", [(9, 71), (4, 24)], ids=str)
def test_linear_kl_div(path, dtype, reverse, blocks):
    hidden, weight, bias, _ = linear(9, 12, 71, dtype)
    teacher_hidden, teacher_weight, teacher_bias, _ = linear(9, 20, 71, dtype)
    mask = torch.rand(9) < 0.7

    def composite(h, w, b, h2, w2, b2, **options):
        return reference.kl_div(F.linear(h, w, b), F.linear(h2, w2, b2), 1.3, **options)

    def ours(h, w, b, h2, w2, b2, **options):
        return lmops.linear_kl_div(h, w, h2, w2, b, b2, 1.3, **options)

    for reduction in ("mean", "none"):
        with blocks_of(*blocks):
            check(
                path, ours, composite, [hidden, weight, bias], [teacher_hidden, teacher_weight, teacher_bias],
                mask=mask, reduction=reduction, reverse=reverse, dtype=torch.float32,
            )  # fmt: skip


HEADS = {
    "int4": {"bits": 4, "group_size": 16, "symmetric": False},
    "int8": {"bits": 8},
    "fp8": {"bits": 8, "fp8": True},
}


@pytest.mark.parametrize("form", ["cross entropy", "divergence"])
@pytest.mark.parametrize("head", HEADS)
def test_a_quantized_head(path, form, head):
    """As with the weight that it stands for, to the last bit."""
    n, d, classes = 9, 40, 50
    dtype = torch.bfloat16 if head == "int4" else torch.float32
    hidden, weight, bias, target = (t.to(path.device) for t in linear(n, d, classes, dtype))
    quantized = QuantizedTensor.quantize(weight, **HEADS[head])
    dense = quantized.dequantize(dtype)

    def loss(h, w, b):
        if form == "cross entropy":
            return lmops.linear_cross_entropy(h, w, target, b, label_smoothing=0.1)
        return lmops.linear_kl_div(h, w, hidden.flip(0), w, b, bias)

    with blocks_of(16, 24):
        one = torch.ones((), dtype=dtype, device=path.device)
        expected = gradients(lambda h, b: loss(h, dense, b), [hidden, bias], [], one)
        actual = gradients(lambda h, b: loss(h, quantized, b), [hidden, bias], [], one)
        without_gradients = loss(hidden, quantized, bias)
    for a, e in zip((*actual, without_gradients), (*expected, expected[0]), strict=True):
        assert torch.equal(a, e)


class Allocations(TorchDispatchMode):
    """The most memory that results of operators held at once, and the largest of them, in bytes."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.live[id(t)] = (weakref.ref(t), t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        # a view keeps memory as the tensor does that it was made from
        self.live = {key: entry for key, entry in self.live.items() if entry[0]() is not None}
        sizes = dict(entry[1:] for entry in self.live.values())
        self.most, self.largest = max(self.most, sum(sizes.values())), max(self.largest, *sizes.values(), 0)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [1, 2])
def test_memory_of_the_linear_form(path, dtype, factor):
    """What is allocated beyond inputs, gradients and a few numbers a token is what the blocks are chosen for."""
    n, d, classes = 64 * factor, 16, 600 * factor
    *tensors, target = (t.to(path.device) for t in linear(n, d, classes, dtype))
    hidden, weight, bias = tensors
    options = (-100, 0.0, 0.0, 0.0, 1.0)
    size = hidden.element_size()
    logits = 32 * 256 * size
    # for a block of tokens: sums in float32 and a product that is added to them
    sums = 32 * d * (4 + size) if size < 4 else 0
    # statistics and targets of all tokens; torch's function also has the logits in float32 and what it forms of them
    more = 64 * n + 8 * classes + (32 * 256 * 4 * 4 if path.kind == "torch" else 0)
    with blocks_of(32, 256), Allocations() as forward:
        state = implementation_of("linear_cross_entropy_forward", path)(hidden, weight, bias, target, None, *options)
    with blocks_of(32, 256), Allocations() as backward:
        implementation_of("linear_cross_entropy_backward", path)(
            hidden, weight, bias, target, None, torch.ones_like(state[0]), state, [True, True, True], *options
        )
    assert logits <= forward.most <= logits + more
    gradients = hidden.nbytes + weight.nbytes + bias.nbytes
    assert gradients + logits + sums <= backward.most <= gradients + logits + sums + more
    assert backward.most < 4 * n * classes  # all logits would be more
    linear_loss.linear_cross_entropy_forward(hidden, weight, bias, target, None, *options)


@pytest.mark.parametrize("head", HEADS)
def test_memory_with_a_quantized_head(path, head, monkeypatch):
    """The largest allocation is a chunk of the weight, of 16 classes."""
    n, d, classes, options = 8, 64, 240, (-100, 0.0, 0.0, 0.0, 1.0)
    hidden, weight, bias, target = (t.to(path.device) for t in linear(n, d, classes))
    codes, quantized = linear_loss._arguments(QuantizedTensor.quantize(weight, **HEADS[head]))
    dequantize = implementation_of("quantized_embedding_forward", path)
    monkeypatch.setattr(linear_loss, "quantized_embedding_forward", dequantize)
    monkeypatch.setattr(linear_loss, "PIECE", 2 * d)
    forward, backward = (implementation_of(f"linear_cross_entropy_{way}", path) for way in ("forward", "backward"))
    with blocks_of(8, 16), Allocations() as allocations:
        state = forward(hidden, codes, bias, target, None, *options, *quantized)
        ones, wanted = torch.ones_like(state[0]), [True, False, True]
        backward(hidden, codes, bias, target, None, ones, state, wanted, *options, *quantized)
    assert allocations.largest == 16 * d * 4
    # all that lives at once: the chunk, its logits, a piece of it, the gradients, and statistics of the tokens
    assert allocations.most < weight.nbytes / 2
    linear_loss.linear_cross_entropy_forward(hidden, codes, bias, target, None, *options, *quantized)


def test_memory_at_the_size_that_is_promised():
    """8,192 tokens, 131,072 classes, 4,096 features in bfloat16: under 64 MB, with few additions to dweight."""
    hidden = torch.empty(8_192, 4_096, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(131_072, 4_096, dtype=torch.bfloat16, device="meta")
    quantized = QuantizedTensor.empty((131_072, 4_096), device="meta")
    for heads, wanted in (
        ([(hidden, weight)], (False,) * 3),
        ([(hidden, weight)], (True, True, True)),
        ([(hidden, weight), (hidden, weight)], (True, True, True)),
        ([(hidden, weight.float())], (True, True, True)),
        ([(hidden, quantized)], (True, False, True)),
    ):
        blocks = linear_loss._head_blocks(heads, wanted)
        logits = len(heads) * blocks.tokens * blocks.classes * 2
        sums = blocks.tokens * 4_096 * (4 + 2) if wanted[0] else 0
        chunks = {weight: 0, quantized: 1}.get(heads[0][1], 2)  # of the weight, and of its gradient
        cast = chunks * blocks.classes * 4_096 * 2
        a_token = 8_192 * 4 * (6 + 3 + 4) + 131_072 * 4
        assert logits + sums + cast + a_token < 64e6
        assert blocks.tokens >= 900  # 1,824 and more, but for a float32 weight, of which chunks are cast
        assert blocks.classes >= 2_048


@pytest.mark.parametrize("n_tokens", [1, 100, 8_192, 100_000])
@pytest.mark.parametrize("n_classes", [1, 500, 50_257, 262_144])
@pytest.mark.parametrize("width", [64, 4_096, 16_384])
def test_linear_blocks(n_tokens, n_classes, width):
    blocks = linear_blocks(n_tokens, n_classes, 6 * width, 0, 2)
    assert 0 < blocks.tokens <= n_tokens
    assert 0 < blocks.classes <= n_classes
    assert blocks.tokens * (6 * width + blocks.classes * 2) <= 60_000_000
    # no block much smaller than the others
    assert n_tokens % blocks.tokens == 0 or -(-n_tokens // blocks.tokens) * blocks.tokens - n_tokens <= 16 * 1_000


# --- modules, torch's machinery, errors ---


def test_modules(path):
    x, y, w = torch.randn(2, 9, 5, device=path.device), targets((2, 5), 9).to(path.device), torch.rand(9)
    for args in ({}, {"weight": w, "reduction": "sum"}, {"ignore_index": 3, "label_smoothing": 0.1}):
        torch.testing.assert_close(
            CrossEntropyLoss(**args).to(path.device)(x, y.clamp(0)),
            nn.CrossEntropyLoss(**args).to(path.device)(x, y.clamp(0)),
        )
    assert isinstance(CrossEntropyLoss(), nn.CrossEntropyLoss)
    module = CrossEntropyLoss(z_loss=0.1, softcap=3.0, temperature=2.0, dtype=torch.float32)
    expected = reference.cross_entropy(x, y, z_loss=0.1, softcap=3.0, temperature=2.0)
    torch.testing.assert_close(module(x, y), expected)

    head = LinearCrossEntropy(6, 11, bias=True, class_weight=torch.rand(11), label_smoothing=0.1).to(path.device)
    hidden, target = torch.randn(2, 3, 6, device=path.device), torch.randint(0, 11, (2, 3), device=path.device)
    logits = F.linear(hidden, head.weight, head.bias).flatten(0, 1)
    expected = F.cross_entropy(logits, target.flatten(), head.class_weight, label_smoothing=0.1)
    torch.testing.assert_close(head(hidden, target), expected)
    assert sorted(head.state_dict()) == ["bias", "class_weight", "weight"]
    assert "in_features=6, num_classes=11, bias=True, label_smoothing=0.1" in repr(head)
    embedding = nn.Embedding(11, 6)
    tied = LinearCrossEntropy(6, 11, weight=embedding.weight)
    assert tied.weight is embedding.weight
    with pytest.raises(ValueError, match=r"weight must be \(6, 11\), got \(11, 6\)"):
        LinearCrossEntropy(11, 6, weight=embedding.weight)


def test_gradcheck():
    x = torch.randn(3, 5, dtype=FP64, requires_grad=True)
    y, w = torch.tensor([1, -100, 4]), torch.rand(5, dtype=FP64)
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.1, "softcap": 2.0, "temperature": 0.7}
        assert torch.autograd.gradcheck(lambda x, o=options: lmops.cross_entropy(x, y, w, **o), x)
        for reverse in (False, True):
            teacher, mask = torch.randn(3, 5, dtype=FP64), torch.tensor([True, False, True])
            kl = {"reduction": reduction, "reverse": reverse, "mask": mask}
            assert torch.autograd.gradcheck(lambda x, t=teacher, o=kl: lmops.kl_div(x, t, 0.7, **o), x)
        hidden, weight, bias, _ = (t.double().requires_grad_() for t in linear(3, 4, 5))
        with blocks_of(2, 3):
            assert torch.autograd.gradcheck(
                lambda h, v, b, o=options: lmops.linear_cross_entropy(h, v, y, b, class_weight=w, **o),
                (hidden, weight, bias),
            )


def test_second_derivative_is_refused(path):
    x, y = torch.randn(2, 5, device=path.device, requires_grad=True), torch.tensor([1, 2], device=path.device)
    for loss in (lmops.cross_entropy(x, y), lmops.kl_div(x, x.detach().sin()), lmops.linear_cross_entropy(x, x, y % 2)):
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


@pytest.mark.fake_tensors
def test_opcheck(path):
    x, y = torch.randn(3, 5, device=path.device), torch.tensor([1, 2, -100], device=path.device)
    w, g = torch.rand(5, device=path.device), torch.rand(3, device=path.device)
    options = (-100, 0.1, 0.1, 2.0, 0.7)
    check = torch.library.opcheck
    check(ops.cross_entropy_state, (x, y, None, *options))
    check(ops.cross_entropy_forward, (x, y, w, g, torch.zeros_like(x), *options))
    state = ops.cross_entropy_state(x, y, w, *options)
    check(ops.cross_entropy_backward, (x, y, w, g, state, torch.zeros_like(x), *options))
    check(ops.scale_unless_one, (x.clone(), torch.tensor(2.0, device=path.device)))
    mask = torch.tensor([True, False, True], device=path.device)
    check(ops.kl_div_forward, (x, x.sin(), mask, g, torch.zeros_like(x), 0.7, False))
    check(ops.kl_div_state, (x, x.sin(), mask, 0.7, False))
    state = ops.kl_div_state(x, x.sin(), None, 0.7, True)
    check(ops.kl_div_backward, (x, x.sin(), None, g, state, torch.zeros_like(x), 0.7, True))
    hidden, weight, bias = (t.to(path.device) for t in linear(3, 4, 5)[:3])
    check(linear_loss.linear_cross_entropy_forward, (hidden, weight, bias, y, w, *options))
    state = linear_loss.linear_cross_entropy_forward(hidden, weight, None, y, None, *options)
    check(
        linear_loss.linear_cross_entropy_backward,
        (hidden, weight, None, y, None, g, state, [True, True, False], *options),
    )
    heads = (hidden, weight, bias, hidden.sin(), weight, None, mask)
    check(linear_loss.linear_kl_div_forward, (*heads, 0.7, False))
    state = linear_loss.linear_kl_div_forward(*heads, 0.7, False)
    check(linear_loss.linear_kl_div_backward, (*heads, g, state, [True, False, True], 0.7, False))


@pytest.mark.fake_tensors
def test_compile_fullgraph(path):
    def loss(x, hidden, weight, y):
        logits = x * 2
        mean = lmops.cross_entropy(logits, y, label_smoothing=0.1, inplace_backward=True)
        rows = lmops.cross_entropy(x, y, z_loss=0.1, reduction="none")
        distilled = lmops.kl_div(x, x.sin()) + lmops.linear_kl_div(hidden, weight, hidden.sin(), weight)
        distilled = distilled + lmops.linear_kl_div(hidden, frozen, hidden.sin(), frozen)  # the same head twice
        return mean * 3 + rows.sin().sum() + distilled + lmops.linear_cross_entropy(hidden, weight, y)

    x = torch.randn(4, 9, device=path.device, requires_grad=True)
    hidden = torch.randn(4, 6, device=path.device, requires_grad=True)
    weight = torch.randn(9, 6, device=path.device, requires_grad=True)
    frozen = torch.randn(9, 6, device=path.device)
    y = torch.tensor([1, 2, -100, 8], device=path.device)
    expected = loss(x, hidden, weight, y)
    actual = torch.compile(loss, fullgraph=True)(x, hidden, weight, y)
    torch.testing.assert_close(actual, expected)
    leaves = (x, hidden, weight)
    for a, b in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.fake_tensors
@pytest.mark.parametrize("head", ["int4", "int8"])  # with zero points and without; fp8 differs by a name
def test_opcheck_with_a_quantized_head(path, head):
    hidden, weight, bias, y = (t.to(path.device) for t in linear(3, 32, 48))
    codes, quantized = linear_loss._arguments(QuantizedTensor.quantize(weight, **HEADS[head]))
    options, grad = (-100, 0.1, 0.0, 0.0, 1.0), torch.rand(3, device=path.device)
    inputs = hidden, codes, bias, y, None
    check, wanted = torch.library.opcheck, [True, False, True]
    check(linear_loss.linear_cross_entropy_forward, (*inputs, *options, *quantized))
    state = linear_loss.linear_cross_entropy_forward(*inputs, *options, *quantized)
    check(linear_loss.linear_cross_entropy_backward, (*inputs, grad, state, wanted, *options, *quantized))
    heads = hidden, codes, bias, hidden.sin(), codes, None, None
    check(linear_loss.linear_kl_div_forward, (*heads, 0.7, False, *quantized, *quantized))
    state = linear_loss.linear_kl_div_forward(*heads, 0.7, False, *quantized, *quantized)
    check(linear_loss.linear_kl_div_backward, (*heads, grad, state, wanted, 0.7, False, *quantized, *quantized))


@pytest.mark.fake_tensors
def test_compile_with_options_that_vary(path):
    """A number that torch.compile makes a variable is checked too."""
    compiled = torch.compile(lmops.cross_entropy, fullgraph=True, dynamic=True)
    for rows, z_loss in ((5, 1e-3), (7, 1e-2)):
        x, y = torch.randn(rows, 11, device=path.device), torch.randint(0, 11, (rows,), device=path.device)
        actual = compiled(x, y, z_loss=z_loss, label_smoothing=10 * z_loss)
        torch.testing.assert_close(actual, lmops.cross_entropy(x, y, z_loss=z_loss, label_smoothing=10 * z_loss))


@pytest.mark.fake_tensors
def test_compile_fullgraph_with_a_quantized_head(path):
    hidden, weight, bias, y = (t.to(path.device) for t in linear(4, 32, 48))
    quantized = QuantizedTensor.quantize(weight, **HEADS["int4"])
    other = QuantizedTensor.quantize(weight, **HEADS["int8"])

    def loss(hidden, bias):
        hard = lmops.linear_cross_entropy(hidden, quantized, y, bias)
        return hard + lmops.linear_kl_div(hidden, other, hidden.sin(), quantized, bias)

    leaves = hidden.requires_grad_(), bias.requires_grad_()
    expected, actual = loss(*leaves), torch.compile(loss, fullgraph=True)(*leaves)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


X, Y = torch.randn(3, 5), torch.tensor([0, 1, 2])
BAD = [
    (TypeError, "input must be float16.*int64", lambda: lmops.cross_entropy(X.long(), Y)),
    (ValueError, r"input must be \(C,\)", lambda: lmops.cross_entropy(torch.tensor(1.0), Y)),
    (ValueError, "at least one class", lambda: lmops.cross_entropy(X[:, :0], Y)),
    (TypeError, "target must be of an integer type", lambda: lmops.cross_entropy(X, Y.bool())),
    (ValueError, r"target must be \(3,\).*got \(2,\)", lambda: lmops.cross_entropy(X, Y[:2])),
    (ValueError, r"probabilities must be \(3, 5\)", lambda: lmops.cross_entropy(X, Y.float())),
    (ValueError, "target must be on cpu", lambda: lmops.cross_entropy(X, Y.to("meta"))),
    (ValueError, r"weight must be \(5,\)", lambda: lmops.cross_entropy(X, Y, torch.ones(4))),
    (TypeError, "weight must be float16", lambda: lmops.cross_entropy(X, Y, torch.ones(5).long())),
    (NotImplementedError, "weight has no grad", lambda: lmops.cross_entropy(X, Y, torch.ones(5, requires_grad=True))),
    (ValueError, "reduction must be one of mean, sum, none", lambda: lmops.cross_entropy(X, Y, reduction="avg")),
    (ValueError, "label_smoothing must be from 0 to 1", lambda: lmops.cross_entropy(X, Y, label_smoothing=1.1)),
    (ValueError, "label_smoothing must be", lambda: lmops.cross_entropy(X, Y, label_smoothing=-0.1)),
    (ValueError, "z_loss must be finite", lambda: lmops.cross_entropy(X, Y, z_loss=NAN)),
    (ValueError, "softcap must be finite and above 0", lambda: lmops.cross_entropy(X, Y, softcap=0.0)),
    (ValueError, "softcap must be", lambda: lmops.cross_entropy(X, Y, softcap=-1.0)),
    (ValueError, "temperature must be finite and above 0", lambda: lmops.cross_entropy(X, Y, temperature=0.0)),
    (ValueError, "temperature must be", lambda: lmops.cross_entropy(X, Y, temperature=NAN)),
    (TypeError, "dtype must be", lambda: lmops.cross_entropy(X, Y, dtype=torch.int8)),
    (ValueError, r"teacher_logits must be \(3, 5\)", lambda: lmops.kl_div(X, X[:2])),
    (TypeError, "teacher_logits must be float16", lambda: lmops.kl_div(X, X.long())),
    (ValueError, r"student_logits must be \(\.\.\., V\)", lambda: lmops.kl_div(X[:, :0], X[:, :0])),
    (ValueError, "temperature must be", lambda: lmops.kl_div(X, X, 0)),
    (ValueError, "reduction must be one of batchmean", lambda: lmops.kl_div(X, X, reduction="avg")),
    (TypeError, "mask must be bool", lambda: lmops.kl_div(X, X, mask=Y)),
    (ValueError, r"mask must be \(3,\)", lambda: lmops.kl_div(X, X, mask=Y[:2] > 0)),
    (ValueError, r"hidden must be \(\.\.\., d\)", lambda: lmops.linear_cross_entropy(X, X[:, :4], Y)),
    (ValueError, r"bias must be \(3,\)", lambda: lmops.linear_cross_entropy(X, X, Y, X[0])),
    (ValueError, r"class_weight must be \(3,\)", lambda: lmops.linear_cross_entropy(X, X, Y, class_weight=X[0])),
    (ValueError, r"target must be \(3,\)", lambda: lmops.linear_cross_entropy(X, X, Y[:2])),
    (ValueError, "from 0 to 2", lambda: lmops.linear_cross_entropy(X, X, Y + 1)),
    (ValueError, "weight must be on cpu", lambda: lmops.linear_cross_entropy(X, X.to("meta"), Y)),
    (ValueError, r"teacher_hidden must be \(3,\) x d", lambda: lmops.linear_kl_div(X, X, X[:2], X)),
    (ValueError, "teacher_weight must have 3 rows", lambda: lmops.linear_kl_div(X, X, X, X[:2])),
]


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=[m for _, m, _ in BAD])
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


# --- what the compiled code moves ---


@pytest.mark.parametrize("n_cols", [1000, 1003, 4096, 4099, 49_152, 50_257, 90_000])
@pytest.mark.parametrize("backward", [False, True])
def test_bytes_moved(launches, n_cols, backward):
    """What bounds the speed on a GPU, counted in the compiled code: each byte once, 16 at a time."""
    rows = 4 if n_cols < 8192 else 2
    x = torch.randn(rows, n_cols).bfloat16().requires_grad_(backward)
    lmops.cross_entropy(x, targets((rows,), n_cols, 0))
    (launch,) = launches
    times = 2 - 81_920 / n_cols if backward and n_cols > 81_920 else 1  # that many columns are held
    check_traffic(launch, rows, n_cols, x.nbytes, times, backward)
    assert launch.c["unique_bytes_read"] <= x.nbytes + rows * (2 + 8 + 4)  # a target, its logit, the factor
    assert launch.c["global_st_bytes"] == (x.nbytes if backward else 0) + rows * 12
    # what is held goes past L1, if something else is read twice; that comes from L2 once if L1 keeps it
    past_l1 = sum(n for opcode, n in launch.opcodes.items() if opcode.startswith("ld.global.cg"))
    assert past_l1 == (rows * 81_920 * 2 // 512 if n_cols > 81_920 else 0)
    if n_cols > 81_920:
        assert launch.c["l2_load_sectors_unique_per_cta"] <= 1.001 * x.nbytes / 32


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"label_smoothing": 0.1}], ids=lambda o: next(iter(o)))
def test_bytes_moved_with_options(launches, options):
    x = torch.randn(2, 50_257).bfloat16().requires_grad_()
    lmops.cross_entropy(x, targets((2,), 50_257, 0), **options)
    check_traffic(launches[0], 2, 50_257, x.nbytes, 1, True)


def check_traffic(launch, rows, n_cols, read, times, backward):
    """Sectors of 32 bytes and requests of 512 for `read` bytes of 2-byte rows, most of them `times` times.

    Every warp also loads a few numbers a row, which lie in its cache: a request and a sector each.
    """
    assert launch.c["bank_conflicts"] == 0
    assert launch.spills == 0
    threads = 512 if n_cols > 4_096 else softmax_tile(n_cols, rows, 1).threads
    numbers = 12 * rows * threads // 32
    tensors = read // (2 * rows * n_cols)
    ends = tensors * (4 * rows if n_cols % 8 else 0)
    worst = 1 if n_cols % 16 == 0 else 1.1
    assert read / 32 <= launch.c["global_ld_sectors"] <= times * worst * read / 32 + numbers
    aligned = rows * -(-n_cols * 2 // 512)
    assert launch.c["global_ld_requests"] <= times * (tensors * aligned + ends) + numbers
    assert launch.c["global_st_requests"] <= (aligned + ends if backward else 0) + numbers


@pytest.mark.parametrize("n_cols", [4096, 4099, 32_768, 40_000])
@pytest.mark.parametrize("reverse", [False, True])
def test_bytes_moved_by_kl_div(launches, n_cols, reverse):
    x, y = torch.randn(2, n_cols).bfloat16().requires_grad_(), torch.randn(2, n_cols).bfloat16()
    lmops.kl_div(x, y, reverse=reverse)
    (launch,) = launches
    times = 1 if n_cols <= 32_768 else 2 - 24_576 / n_cols  # that many columns of both are held
    check_traffic(launch, 2, n_cols, 2 * x.nbytes, times, True)
    assert launch.c["unique_bytes_read"] <= 2 * x.nbytes + 8
    assert launch.c["global_st_bytes"] == x.nbytes + 2 * 20


def test_ignored_tokens_are_not_read(launches):
    x, y = torch.randn(4, 40_000).bfloat16().requires_grad_(), torch.tensor([-100, 5, -100, -100])
    lmops.cross_entropy(x, y)
    assert launches[0].c["unique_bytes_read"] <= x.nbytes // 4 + 4 * 16


def test_a_gradient_of_one_costs_nothing(launches):
    """Where the gradient of the loss is 1, the backward reads that number and leaves."""
    x, y = torch.randn(4, 5_000).requires_grad_(), targets((4,), 5_000, 0)
    lmops.cross_entropy(x, y).backward()
    assert len(launches) == 2
    assert launches[1].c["global_st_bytes"] == 0
    assert launches[1].c["unique_bytes_read"] == 4
    x.grad = None
    (lmops.cross_entropy(x, y) * 2).backward()
    assert launches[3].c["global_st_bytes"] == x.nbytes
    assert launches[3].c["unique_bytes_read"] == x.nbytes + 4
