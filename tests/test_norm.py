"""lmops.rms_norm and layer_norm: the reference, the CPU implementation and the kernels."""

from functools import partial

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import nn

import lmops
from lmops.modules import LayerNorm, RMSNorm
from lmops.ops.norm import norm, norm_backward, norm_forward, norm_tile
from lmops.reference.norm import norm as reference
from lmops.testing import LAYOUTS, arrange, assert_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# one element, under a vector, several rows a tile, an odd length with edges, a multiple of 8 but not of 16
SHAPES = ((5, 1), (2, 3, 7), (2, 9, 64), (3, 2, 1003), (3, 1032))


def parameters(n, centred, dtype, parameter_dtype=None):
    """weight, and centred also bias."""
    return [torch.randn(n).to(parameter_dtype or dtype) for _ in range(1 + centred)]


def results(function, inputs, grads):
    """Results of the function and its gradients with respect to all inputs, given those of the results."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    return *out, *torch.autograd.grad(out, leaves, grads[: len(out)])


def call(centred, residual, eps=1e-5, **options):
    """A function of x, [residual], weight, [bias]: ours."""

    def run(x, *rest):
        r, rest = (rest[0], rest[1:]) if residual else (None, rest)
        return (lmops.layer_norm if centred else lmops.rms_norm)(x, *rest, eps=eps, residual=r, **options)

    return run


def plain(centred, residual, eps=1e-5, **options):
    """The same of the reference."""

    def run(x, *rest):
        r, rest = (rest[0], rest[1:]) if residual else (None, rest)
        y, h = reference(x, *rest, eps=eps, residual=r, centred=centred, **options)
        return (y, h) if residual else y

    return run


def check(path, x, *, centred=False, residual=False, parameter_dtype=None, layout="contiguous", **options):
    """Results and gradients with respect to everything against the reference in float64."""
    shape, dtype = x.shape, x.dtype
    inputs = [arrange(x, layout)]
    if residual:
        inputs.append(arrange(torch.randn(shape).to(dtype), layout))
    inputs += parameters(shape[-1], centred, dtype, parameter_dtype)
    grads = [arrange(torch.randn(shape).to(dtype), layout) for _ in range(1 + residual)]
    function = plain(centred, residual, **options)
    baseline = results(function, inputs, grads)
    # h is rounded on the way, so the truth of what follows it is that of the rounded one
    exact = [t.double() for t in inputs]
    if residual:
        exact[0], exact[1] = baseline[1].detach().double(), torch.zeros(shape, dtype=torch.float64)
    truth = results(function, exact, [g.double() for g in grads])
    ours = [t.to(path.device) for t in inputs]
    actual = results(call(centred, residual, **options), ours, [g.to(path.device) for g in grads])
    for a, t, b in zip(actual, truth, baseline, strict=True):
        assert_accurate(a, t, b)
    return actual


@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
def test_reference_is_torch(eps):
    x, w, b = torch.randn(3, 4, 11).double(), torch.randn(11).double(), torch.randn(11).double()
    y, h = reference(x, w, eps=eps)
    torch.testing.assert_close(y, nn.functional.rms_norm(x, (11,), w, eps))
    assert h is x
    y, h = reference(x, w, b, eps=eps, residual=x, centred=True)
    torch.testing.assert_close(y, nn.functional.layer_norm(2 * x, (11,), w, b, eps))
    torch.testing.assert_close(h, 2 * x)
    torch.testing.assert_close(reference(x, w, eps=eps, weight_offset=1.0)[0], reference(x, w + 1, eps=eps)[0])


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dtype_and_size(path, shape, dtype, centred):
    # the gradient of a single element is what eps leaves of it: with a small one, a difference of rounding errors
    eps = 0.3 if shape[-1] == 1 else 1e-5
    check(path, torch.randn(shape).to(dtype) * 3, centred=centred, eps=eps)
    check(path, torch.randn(shape).to(dtype) * 3, centred=centred, residual=True, eps=eps)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_layout(path, layout, centred):
    check(path, torch.randn(3, 9, 64).half(), centred=centred, residual=True, layout=layout)
    check(path, torch.randn(3, 4, 515), centred=centred, layout=layout)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize(
    ("n_cols", "dtype"), [(8192, torch.bfloat16), (40_003, torch.float16), (65_536, torch.float32)]
)
def test_long_rows(path, n_cols, dtype, centred):
    """Rows that fill a tile, and such as are streamed, with and without edges."""
    check(path, torch.randn(2, n_cols).to(dtype), centred=centred, residual=centred)


def test_long_rows_add_a_residual_once(path):
    """What the second pass reads is the sum that the first one wrote."""
    check(path, torch.randn(2, 33_000).bfloat16(), residual=True)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_many_rows_a_program(path, centred):
    """More blocks of rows than programs."""
    check(path, torch.randn(2, 70, 2048), centred=centred)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_parameters_of_another_dtype(path, centred):
    check(path, torch.randn(4, 130).bfloat16(), centred=centred, parameter_dtype=torch.float32)
    check(path, torch.randn(4, 130), centred=centred, parameter_dtype=torch.float16)


def test_weight_offset(path):
    check(path, torch.randn(5, 48).bfloat16(), weight_offset=1.0)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_without_parameters(path, centred):
    """No weight; no bias; parameters that need no gradient; a gradient of parameters alone."""
    function = call(centred, False)
    x, dy = torch.randn(6, 100), torch.randn(6, 100)
    w, b = torch.randn(2, 100)
    for used in ((), (w,), (None, b)) if centred else ((), (w,)):
        on_device = [None if t is None else t.to(path.device) for t in used]
        expected = results(partial(given, plain(centred, False), used), [x.double()], [dy.double()])
        actual = results(partial(given, function, on_device), [x.to(path.device)], [dy.to(path.device)])
        for a, e in zip(actual, expected, strict=True):
            assert_accurate(a, e, e.float())
        if used:  # the last parameter alone takes a gradient
            first = [x.double(), *used[:-1]], [x.to(path.device), *on_device[:-1]]
            _, expected = results(partial(plain(centred, False), *first[0]), [used[-1].double()], [dy.double()])
            _, actual = results(partial(function, *first[1]), [on_device[-1]], [dy.to(path.device)])
            assert_accurate(actual, expected, expected.float())


def given(function, others, x):
    return function(x, *others)


def test_only_one_of_the_results_is_used(path):
    x, r = (torch.randn(3, 20, device=path.device, requires_grad=True) for _ in range(2))
    w = torch.randn(20, device=path.device, requires_grad=True)
    y, h = lmops.rms_norm(x, w, residual=r)
    grads = torch.autograd.grad(h.sum(), (x, r, w), allow_unused=True, retain_graph=True)
    assert (grads[0] == 1).all()
    assert (grads[1] == 1).all()
    assert grads[2] is None
    dy = torch.randn(3, 20)
    expected = results(lambda h, w: reference(h, w)[0], [h.cpu().double(), w.cpu().double()], [dy.double()])
    for a, e in zip(torch.autograd.grad(y, (r, w), dy.to(path.device)), expected[1:], strict=True):
        assert_accurate(a, e, e.float())


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_far_from_zero(path, centred):
    """Rows whose mean is large beside their deviation, rows of equal numbers, of zeros, and tiny ones."""
    x = torch.randn(6, 3001)
    x[0] += 3000
    x[1] = 7
    x[2] = 0
    x[3] *= 1e-3
    x[4, :5] = 1e4
    w = torch.ones(3001)
    for rows in (x[[0]], x[1:3], x[3:]):
        truth = plain(centred, False)(rows.double(), w.double())
        baseline = (
            nn.functional.layer_norm(rows, (3001,), w) if centred else nn.functional.rms_norm(rows, (3001,), w, 1e-5)
        )
        assert_accurate(call(centred, False)(rows.to(path.device), w.to(path.device)), truth, baseline)


def test_nan_and_inf_spoil_their_row_only(path):
    x = torch.randn(4, 300)
    x[1, 7], x[2, 9] = float("nan"), float("inf")
    for function in (lmops.rms_norm, lmops.layer_norm):
        y = function(x.to(path.device))
        assert y[1].isnan().all()
        assert y[2].isnan().any()
        assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_empty(path, shape):
    x = torch.randn(shape, device=path.device, requires_grad=True)
    w = torch.randn(shape[-1], device=path.device, requires_grad=True)
    y, h = lmops.rms_norm(x, w, residual=x)
    assert y.shape == h.shape == lmops.layer_norm(x.detach(), w.detach()).shape == x.shape
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert dx.shape == x.shape
    assert (dw == 0).all()
    assert dw.shape == w.shape


def test_gradients_are_the_same_in_every_run(path):
    x, dy = torch.randn(150, 96, device=path.device), torch.randn(150, 96, device=path.device)
    w, b = torch.randn(2, 96, device=path.device)
    first, again = (results(call(True, False), [x, w, b], [dy]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
def test_gradcheck(path, centred):
    x, r = (torch.randn(2, 4, dtype=torch.float64, device=path.device, requires_grad=True) for _ in range(2))
    more = [torch.randn(4, dtype=torch.float64, device=path.device, requires_grad=True) for _ in range(1 + centred)]
    assert torch.autograd.gradcheck(call(centred, True), (x, r, *more))


@pytest.mark.fake_tensors
def test_opcheck(path):
    x, r, dy = torch.randn(3, 3, 24, device=path.device)
    w, b = torch.randn(2, 24, device=path.device)
    torch.library.opcheck(norm, (x, w, None, 1e-5, 1.0, False))
    torch.library.opcheck(norm, (x.half().T, None, None, 1e-5, 0.0, True))
    for residual, centred in ((None, False), (r, True)):
        arguments = (x, residual, w, b if centred else None, 1e-5, 0.0, centred)
        torch.library.opcheck(norm_forward, arguments)
        stats = norm_forward(*arguments)[2]
        torch.library.opcheck(norm_backward, (dy, residual, x, stats, w, 0.0, centred, True, centred))
    torch.library.opcheck(norm_backward, (dy, None, x, stats, None, 0.0, True, False, False))


@pytest.mark.fake_tensors
def test_compile_fullgraph(path):
    def loss(x, r, w, b):
        y, h = lmops.rms_norm(x, w, residual=r)
        twice, _ = lmops.rms_norm(y, w, residual=y)
        return (lmops.layer_norm(h + y, w, b) * lmops.layer_norm(x) + twice).sin().sum()

    x, r = (torch.randn(2, 6, 8, device=path.device, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(8, device=path.device, requires_grad=True) for _ in range(2))
    expected = loss(x, r, w, b)
    actual = torch.compile(loss, fullgraph=True)(x, r, w, b)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(*(torch.autograd.grad(z, (x, r, w, b)) for z in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e)


def test_second_derivative_is_refused(path):
    x = torch.randn(2, 5, device=path.device, requires_grad=True)
    (dx,) = torch.autograd.grad(lmops.rms_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("shape", [(6,), (5, 6)], ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (RMSNorm, nn.RMSNorm),
        (LayerNorm, nn.LayerNorm),
        (lambda s: RMSNorm(s, eps=1e-3, elementwise_affine=False), lambda s: nn.RMSNorm(s, 1e-3, False)),
        (lambda s: LayerNorm(s, bias=False), lambda s: nn.LayerNorm(s, bias=False)),
    ],
)
def test_modules_take_the_place_of_torchs(path, ours, theirs, shape):
    theirs = theirs(shape).to(path.device)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = ours(shape).to(path.device)
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, type(theirs))
    x = torch.randn(3, 4, 5, 6, device=path.device)
    torch.testing.assert_close(ours(x), theirs(x))
    y, h = ours(x, x)
    torch.testing.assert_close(y, theirs(2 * x))
    assert torch.equal(h, 2 * x)
    with pytest.raises(ValueError, match="to be normalised, got"):
        ours(x[..., :-1])


def test_module_with_gemmas_weights(path):
    module = RMSNorm(6, eps=1e-6, weight_offset=1.0).to(path.device)
    nn.init.zeros_(module.weight)
    x = torch.randn(3, 6, device=path.device)
    torch.testing.assert_close(module(x), nn.functional.rms_norm(x, (6,), eps=1e-6))
    assert "weight_offset=1.0" in repr(module)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must be float16.*int64", lambda x, w: lmops.rms_norm(x.long())),
        (ValueError, "at least one dimension", lambda x, w: lmops.layer_norm(x[0, 0])),
        (TypeError, "weight must be float16.*int64", lambda x, w: lmops.rms_norm(x, w.long())),
        (ValueError, r"weight must have shape \(5,\).*got \(4,\)", lambda x, w: lmops.rms_norm(x, w[:4])),
        (ValueError, r"bias must have shape \(5,\).*got \(1, 5\)", lambda x, w: lmops.layer_norm(x, w, w[None])),
        (ValueError, "eps must be finite and at least 0, got -1", lambda x, w: lmops.rms_norm(x, eps=-1)),
        (ValueError, "eps must be finite and at least 0, got nan", lambda x, w: lmops.rms_norm(x, eps=float("nan"))),
        (ValueError, r"residual must be torch.float32 of shape \(3, 5\)", lambda x, w: lmops.rms_norm(x, residual=w)),
        (ValueError, "got torch.float16", lambda x, w: lmops.rms_norm(x, residual=x.half())),
        (ValueError, "weight must be on cpu like x, got meta", lambda x, w: lmops.rms_norm(x, w.to("meta"))),
        (ValueError, "bias must be on cpu like x, got meta", lambda x, w: lmops.layer_norm(x, w, w.to("meta"))),
        (ValueError, "residual must be on cpu", lambda x, w: lmops.layer_norm(x, residual=x.to("meta"))),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 5), torch.randn(5))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@hypothesis.given(
    shape=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    order=st.permutations(range(4)),
    step=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    centred=st.booleans(),
)
def test_any_view(path, shape, order, step, dtype, centred):
    base = torch.randn([n * step for n in shape]).to(dtype)
    x = base[tuple(slice(None, None, step) for _ in shape)].permute([d for d in order if d < len(shape)])
    y = (lmops.layer_norm if centred else lmops.rms_norm)(x.to(path.device), eps=1e-5)
    truth, baseline = (reference(t, eps=1e-5, centred=centred)[0] for t in (x.double(), x))
    assert_accurate(y, truth, baseline)


@pytest.mark.parametrize("centred", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("n_cols", [576, 1003, 4096, 8192, 40_000])
def test_bytes_moved(launches, n_cols, centred):
    """What bounds the speed on a GPU, counted in the compiled code: each byte once where a row fits, 16 at a time."""
    n_rows = 8 if n_cols < 8192 else 2
    x, r, dy = torch.randn(3, n_rows, n_cols).half()
    more = parameters(n_cols, centred, torch.float16)
    function = call(centred, False)
    function(x, *more)
    _, h, stats = norm_forward(x, r, *more, *([] if centred else [None]), 1e-5, 0.0, centred)
    norm_backward(dy, None, h, stats, more[0], 0.0, centred, True, centred)
    size, whole = x.numel() * 2, n_cols % 8 == 0
    forwards = norm_tile(n_cols, n_rows, 1)
    backwards = norm_tile(n_cols, n_rows, 4 if whole else 8)
    cases = (
        (1, 1, 0, len(more), forwards),
        (2, 2, 1 + centred, len(more), forwards),
        (2, 1, 1 + centred, 1, backwards),
    )
    assert len(launches) == len(cases) + (not backwards.fits)  # long rows' parameters have a kernel of their own
    for launch, (reads, writes, stats, used, tile) in zip(launches, cases, strict=False):
        programs = -(-n_rows // tile.rows)
        stats *= n_rows
        parameters_read = used * 2 * n_cols * (programs if whole or launch is launches[2] else n_rows)
        assert launch.spills == 0
        loaded, stored = launch.c["global_ld_bytes"], launch.c["global_st_bytes"]
        if launch is launches[2]:
            # what every program adds up for the parameters: here a program has one block of rows
            stored -= 4 * n_cols * len(more) * programs if tile.fits else 0
        else:
            stored -= 4 * stats
        assert stored == writes * size
        threads = tile.threads * (1 if whole else 2)
        copies = 4 * stats * threads if launch is launches[2] else 0  # of the statistics, one a thread
        exact = reads * size + parameters_read
        if tile.fits:
            assert exact <= loaded <= exact + copies
        else:  # all but the first tile are read twice, of a sum as what was written
            again = 1 if reads == 2 and launch is not launches[2] else reads
            assert exact < loaded < exact + again * size + parameters_read + copies
        if whole:
            lines = -(-n_cols * 2 // 512)  # what a warp takes at a time
            most = (1 if tile.fits else 2) * lines * (reads * n_rows + used * programs)
            assert launch.c["global_ld_requests"] <= most + copies // 128 + 32


@pytest.mark.parametrize("n_cols", [1, 64, 1000, 4096, 8192, 16_384, 40_000, 262_144])
@pytest.mark.parametrize("held", [1, 2, 4, 5])
def test_tile(n_cols, held):
    tile = norm_tile(n_cols, 1000, held)
    assert tile.cols >= n_cols or not tile.fits
    assert tile.fits or tile.cols == 1024
    assert tile.rows * tile.cols <= 16 * tile.threads
    assert tile.threads <= 1024
