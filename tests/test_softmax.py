"""lmops.softmax and log_softmax: the reference, the CPU implementation and the kernels."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lmops
from lmops.modules import LogSoftmax, Softmax
from lmops.ops.softmax import softmax_backward, softmax_forward, softmax_tile
from lmops.reference.softmax import softmax as reference
from lmops.testing import LAYOUTS, arrange, assert_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF = float("inf")
# one element, under a vector, one tile of several rows, an odd length with edges, a multiple of 8 but not of 16
SHAPES = ((5, 1), (2, 3, 7), (2, 9, 64), (3, 2, 1003), (3, 1032))
FUNCTIONS = {False: lmops.softmax, True: lmops.log_softmax}


def gradients(function, x, temperature, dy, **options):
    """Result and gradients with respect to x and, if it is a tensor, the temperature."""
    x = x.detach().requires_grad_()
    inputs = [x]
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.detach().requires_grad_()
        inputs.append(temperature)
    y = function(x, temperature, **options)
    return y, *torch.autograd.grad(y, inputs, dy)


def double(t):
    return t.double() if isinstance(t, torch.Tensor) else t


def check(path, x, temperature=1.0, *, log=False, dy_layout="contiguous", **options):
    """Result and gradient with respect to x against the reference in float64."""
    dy = arrange(torch.randn(x.shape).to(options.get("dtype") or x.dtype), dy_layout)
    truth = gradients(
        reference, x.double(), double(temperature), dy.double(), log=log, causal=options.get("causal", False)
    )
    baseline = gradients(reference, x, temperature, dy, log=log, **options)
    on_device = temperature.to(path.device) if isinstance(temperature, torch.Tensor) else temperature
    actual = gradients(FUNCTIONS[log], x.to(path.device), on_device, dy.to(path.device), **options)
    assert actual[0].dtype == options.get("dtype", x.dtype)
    for a, t, b in list(zip(actual, truth, baseline, strict=True))[:2]:
        assert_accurate(a, t, b)
    return actual, truth


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 7])
def test_reference_is_torch(temperature, log):
    x = torch.randn(3, 4, 11, dtype=torch.float64)
    dy = torch.randn_like(x)
    torch_softmax = torch.log_softmax if log else torch.softmax
    t = torch.full((3, 4), float(temperature), dtype=torch.float64)
    ours = gradients(reference, x, t, dy, log=log)
    theirs = gradients(lambda x, t: torch_softmax(x / t.unsqueeze(-1), -1), x, t, dy)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    masked = torch.where(torch.ones(4, 11).tril(7) > 0, x, -INF)
    torch.testing.assert_close(reference(x, t, causal=True, log=log), torch_softmax(masked / temperature, -1))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dtype_layout_size(path, shape, dtype, layout):
    x = arrange(torch.randn(shape).to(dtype) * 3, layout)
    check(path, x, 0.7, dy_layout=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_log_softmax(path, shape, dtype):
    check(path, torch.randn(shape).to(dtype) * 3, 1.7, log=True)


@pytest.mark.parametrize("n_cols", [8191, 32768, 32769, 50257])
@pytest.mark.parametrize("log", [False, True])
def test_long_rows(path, n_cols, log):
    check(path, torch.randn(2, n_cols).bfloat16() * 4, 0.9, log=log)


def test_longest_row(path):
    check(path, torch.randn(1, 262_144).half() * 4, torch.tensor([0.5]), log=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -2, 2])
def test_any_dim(path, dim, dtype):
    x = (torch.randn(70, 6, 37) * 3).to(dtype)
    y = lmops.softmax(x.to(path.device), 0.8, dim)
    assert_accurate(y, torch.softmax(x.double() / 0.8, dim), torch.softmax(x.float() / 0.8, dim).to(dtype))
    assert y.stride() == x.stride()


def test_long_columns(path):
    """Rows that are neighbours in memory and too long for a tile of 32 of them."""
    x = torch.randn(2, 2500, 40)
    y = lmops.softmax(x.to(path.device), 1.0, 1)
    assert_accurate(y, torch.softmax(x.double(), 1), torch.softmax(x, 1))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature_a_row(path, dtype, log):
    x = (torch.randn(3, 4, 301) * 2).to(dtype)
    t = (torch.rand(3, 4) + 0.25).to(dtype)
    check(path, x, t, log=log)
    torch_softmax = torch.log_softmax if log else torch.softmax
    # the gradient comes from the returned y: its precision is that of torch's own backward in x's dtype
    ours = gradients(FUNCTIONS[log], x.to(path.device), t.to(path.device), torch.sin(x).to(path.device))[2]
    theirs = gradients(lambda x, t: torch_softmax(x / t.unsqueeze(-1), -1), x, t, torch.sin(x))[2]
    exact = gradients(reference, x.double(), t.double(), torch.sin(x).double(), log=log)[2]
    assert_accurate(ours, exact, theirs)


@pytest.mark.parametrize(
    ("shape", "dim"), [((), -1), ((1,), -1), ((4,), -1), ((3, 1), -1), ((3, 4, 1), -1), ((3, 1, 5), 1), ((5,), 1)]
)
def test_temperature_broadcasts(path, shape, dim):
    x = torch.randn(3, 4, 5)
    t = torch.rand(shape) + 0.5
    rows = (3, 4) if dim == -1 else (3, 5)
    full = (t.squeeze(dim) if t.ndim == 3 else t).expand(rows).unsqueeze(dim)
    dy = torch.randn_like(x)
    to = {"device": path.device}
    y, dx, dt = gradients(lmops.softmax, x.to(**to), t.to(**to), dy.to(**to), dim=dim)
    expected = gradients(lambda x, t: torch.softmax(x / full_like(t, full, dim), dim), x, t, dy)
    for a, b in zip((y, dx, dt), expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)


def full_like(t, full, dim):
    return (t.squeeze(dim) if t.ndim == 3 else t).expand(full.squeeze(dim).shape).unsqueeze(dim)


@pytest.mark.parametrize("n_cols", [9, 2051, 40_000])
@pytest.mark.parametrize("tensor", [False, True])
def test_greedy(path, n_cols, tensor):
    """Temperature 0: the one-hot of the first maximum, whatever else the row holds."""
    x = torch.randn(6, n_cols)
    x[0] = 2.0  # every column is a maximum
    x[1, [3, 5, -1]] = 50.0
    x[2, [6, 7]] = INF
    x[3] = -INF
    x[4, 2] = float("nan")
    x[5, : n_cols - 1] = -INF
    t = torch.zeros(6) if tensor else 0
    for log, no, yes in ((False, 0.0, 1.0), (True, -INF, 0.0)):
        expected = torch.full((6, n_cols), no)
        for row, column in ((0, 0), (1, 3), (2, 6), (5, n_cols - 1)):
            expected[row, column] = yes
        expected[4] = float("nan")
        on_device = t.to(path.device) if tensor else t
        y, dx, *dt = gradients(FUNCTIONS[log], x.to(path.device), on_device, torch.ones(6, n_cols, device=path.device))
        torch.testing.assert_close(y.cpu(), expected, equal_nan=True)
        torch.testing.assert_close(reference(x, t, log=log), expected, equal_nan=True)
        assert (dx[[0, 1, 2, 3, 5]] == 0).all()
        assert not tensor or (dt[0][[0, 1, 2, 3, 5]] == 0).all()


def test_greedy_rows_among_others(path):
    x = torch.randn(4, 37)
    t = torch.tensor([0.0, 1.0, 0.0, 0.5])
    y = lmops.softmax(x.to(path.device), t.to(path.device)).cpu()
    torch.testing.assert_close(y[[1, 3]], torch.softmax(x / t[:, None], -1)[[1, 3]])
    assert torch.equal(y[[0, 2]], nn.functional.one_hot(x.argmax(-1), 37).float()[[0, 2]])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("n_cols", [40, 1003, 33_000])
def test_masked_entries(path, n_cols, log):
    """-inf takes no part; rows of nothing else are 0 (log: -inf), with gradients of 0."""
    x = torch.randn(4, n_cols)
    x[torch.rand(4, n_cols) < 0.4] = -INF
    x[2] = -INF
    t = torch.tensor([1.0, 0.5, 2.0, 1.5])
    actual, _ = check(path, x, t, log=log)
    assert (actual[0][2] == (-INF if log else 0)).all()
    assert all((g[2] == 0).all() for g in actual[1:])


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("shape", [(2, 33, 33), (2, 5, 300), (40, 24), (3, 2, 1, 9), (3, 33_001)], ids=str)
def test_causal(path, shape, log):
    x = torch.randn(shape)
    check(path, x, 0.7, log=log, causal=True)
    check(path, arrange(x, "transposed"), torch.rand(shape[:-1]) + 0.5, log=log, causal=True)


def test_causal_reads_nothing_hidden(path):
    """NaN and inf behind the diagonal, in the scores and in the gradient, reach no result."""
    x, dy = torch.randn(2, 40, 70), torch.randn(2, 40, 70)
    hidden = torch.ones(40, 70, dtype=torch.bool).triu(31)
    clean = gradients(lmops.softmax, x.to(path.device), 1.0, dy.to(path.device), causal=True)
    x[:, hidden], dy[:, hidden] = float("nan"), INF
    dirty = gradients(lmops.softmax, x.to(path.device), 1.0, dy.to(path.device), causal=True)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert (a.cpu()[:, hidden] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_empty(path, shape):
    x = torch.randn(shape, device=path.device, requires_grad=True)
    for function in FUNCTIONS.values():
        y = function(x, torch.ones(x.shape[:-1], device=path.device))
        assert y.shape == x.shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_scalar_input(path):
    assert lmops.softmax(torch.tensor(3.0, device=path.device), 0.1).item() == 1
    assert lmops.log_softmax(torch.tensor(3.0, device=path.device), 0.1).item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(path, dtype):
    top = torch.finfo(dtype).max
    x = torch.tensor([[top, -top, 0.0], [-top, -top, -top], [top, top, -top], [1.0, 1.0001, 0.0]]).to(dtype)
    for temperature in (1e-45, 1e-6, 1.0, 1e30):
        actual = lmops.softmax(x.to(path.device), temperature)
        assert_accurate(
            actual, reference(x.double(), temperature), torch.softmax(x.double() / temperature, -1).to(dtype)
        )


def test_nan_and_inf_spoil_their_row_only(path):
    x = torch.randn(4, 300)
    x[1, 7], x[2, 9] = float("nan"), INF
    for function in FUNCTIONS.values():
        y = function(x.to(path.device), 0.5)
        assert y[1:3].isnan().all()
        assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shift_invariance_and_sum(path, dtype):
    x = torch.randint(-8, 8, (7, 515)).to(dtype)
    y = lmops.softmax(x.to(path.device), 0.5)
    torch.testing.assert_close(lmops.softmax((x + 32).to(path.device), 0.5), y, rtol=0, atol=0)
    total = y.double().sum(-1)
    assert ((total - 1).abs() < 515**0.5 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_result_dtype(path, dtype):
    check(path, torch.randn(3, 4, 333).bfloat16(), 0.7, dtype=dtype)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(path, log, causal):
    x = torch.randn(2, 3, 5, dtype=torch.float64, device=path.device, requires_grad=True)
    t = (torch.rand(2, 3, dtype=torch.float64, device=path.device) + 0.5).requires_grad_()
    # log_softmax is constant at hidden entries, where finite differences of -inf are NaN
    finite = (lambda y: y.masked_fill(y == -INF, 0)) if log else (lambda y: y)
    assert torch.autograd.gradcheck(lambda x, t: finite(FUNCTIONS[log](x, t, causal=causal)), (x, t))


@pytest.mark.fake_tensors
def test_opcheck(path):
    x = torch.randn(3, 5, device=path.device)
    t = torch.rand(3, device=path.device)
    for args in ((x, None, 0.5, False, False, x.dtype), (x.half(), t, 1.0, True, True, x.dtype)):
        torch.library.opcheck(softmax_forward, args)
    y = torch.softmax(x, -1)
    for args in ((x, y, None, 0.5, False, False, x.dtype), (x, y.log(), t, 1.0, True, False, torch.float16)):
        torch.library.opcheck(softmax_backward, args)


@pytest.mark.fake_tensors
def test_compile_fullgraph(path):
    def loss(x, t):
        return lmops.softmax(x, t, 1).sin().sum() + lmops.log_softmax(lmops.softmax(x, causal=True), 0.7).cos().sum()

    x = torch.randn(2, 6, 8, device=path.device, requires_grad=True)
    t = torch.rand(2, 8, device=path.device, requires_grad=True)
    expected = loss(x, t)
    actual = torch.compile(loss, fullgraph=True)(x, t)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(torch.autograd.grad(actual, (x, t)), torch.autograd.grad(expected, (x, t)), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivative_is_refused(path):
    x = torch.randn(2, 5, device=path.device, requires_grad=True)
    (dx,) = torch.autograd.grad(lmops.softmax(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_module_takes_the_place_of_torchs(path):
    for ndim in (1, 2, 3, 4):
        x = torch.randn((3, 4, 5, 6)[:ndim], device=path.device)
        for dim in (None, 0, -1):
            for ours, theirs in ((Softmax, nn.Softmax), (LogSoftmax, nn.LogSoftmax)):
                implicit = pytest.warns(UserWarning, match="Implicit dimension choice")
                with implicit if dim is None else nullcontext():
                    expected = theirs(dim)(x)
                torch.testing.assert_close(ours(dim)(x), expected)


def test_module_learns_its_temperature(path):
    module = Softmax(-1, temperature=nn.Parameter(torch.tensor(2.0))).to(path.device)
    target = torch.softmax(torch.arange(5.0, device=path.device) / 0.5, -1)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (module(torch.arange(5.0, device=path.device)) - target).square().sum().backward()
        optimizer.step()
    assert abs(module.temperature.item() - 0.5) < 0.1
    assert "temperature=learned" in repr(module)
    assert list(module.state_dict()) == ["temperature"]


@pytest.mark.parametrize("temperature", [-1.0, -1e-9, float("nan"), INF])
def test_bad_temperature(temperature):
    x = torch.randn(2, 5)
    with pytest.raises(ValueError, match="temperature must be finite and at least 0, got"):
        lmops.softmax(x, temperature)
    with pytest.raises(ValueError, match="temperature must be finite and at least 0, got"):
        lmops.log_softmax(x, torch.tensor([1.0, temperature]))


def test_kernel_answers_a_bad_temperature_with_nan(path):
    """A kernel cannot raise without stalling the stream: the row is NaN, so that nothing draws from it."""
    if path.kind == "torch":
        with pytest.raises(ValueError, match="got -1"):
            lmops.softmax(torch.randn(1, 5), torch.tensor([-1.0]))
        return
    t = torch.tensor([1.0, -1.0, float("nan"), 0.0, INF])
    y = lmops.softmax(torch.randn(5, 300).to(path.device), t.to(path.device))
    assert y[[1, 2, 4]].isnan().all()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must be float16.*int64", lambda x: lmops.softmax(x.long())),
        (TypeError, "dtype must be", lambda x: lmops.softmax(x, dtype=torch.int8)),
        (ValueError, r"dim must be from -2 to 1 for x of shape \(3, 5\), got 2", lambda x: lmops.softmax(x, dim=2)),
        (ValueError, "causal needs", lambda x: lmops.softmax(x, dim=0, causal=True)),
        (ValueError, "causal needs", lambda x: lmops.softmax(x[0], causal=True)),
        (TypeError, "floating-point tensor, got torch.int64", lambda x: lmops.softmax(x, torch.ones(3).long())),
        (ValueError, r"broadcasts to \(3,\), got \(5,\)", lambda x: lmops.softmax(x, torch.ones(5))),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 5))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    dim=st.integers(-4, 3),
    order=st.permutations(range(4)),
    step=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 1e-3, 0.5, 1.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
    log=st.booleans(),
)
def test_any_view(path, shape, dim, order, step, temperature, dtype, log):
    dim = dim % len(shape)
    base = torch.randn([n * step for n in shape]).to(dtype)
    x = base[tuple(slice(None, None, step) for _ in shape)].permute([d for d in order if d < len(shape)])
    y = FUNCTIONS[log](x.to(path.device), temperature, dim)
    rows = x.movedim(dim, -1)
    truth = reference(rows.double(), temperature, log=log).movedim(-1, dim)
    assert_accurate(y, truth, reference(rows, temperature, log=log).movedim(-1, dim))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("n_cols", [130, 256, 1000, 1003, 4096, 4099, 4104, 32_761, 32_768, 50_257, 131_072])
def test_bytes_moved(launches, n_cols, log):
    """What bounds the speed on a GPU, counted in the compiled code: each byte once, 16 at a time."""
    rows = 8 if n_cols < 8192 else 2
    x = torch.randn(rows, n_cols).half()
    y = FUNCTIONS[log](x)
    softmax_backward(torch.randn_like(x), y, None, 1.0, log, False, x.dtype)
    for launch, tensors_read in zip(launches, (1, 2), strict=True):
        size = x.numel() * x.element_size()
        fits = softmax_tile(n_cols, rows, tensors_read).fits
        loaded, stored = launch.c["global_ld_bytes"] / size, launch.c["global_st_bytes"] / size
        assert loaded == tensors_read if fits else tensors_read < loaded < 2 * tensors_read
        assert stored == 1
        assert launch.c["bank_conflicts"] == 0
        assert launch.spills == 0
        # a warp takes 512 bytes a request, but for the ends of rows that are no multiple of 16 bytes
        whole = n_cols % 8 == 0
        ends = 0 if whole else 4 * rows
        for kind, tensors in (("ld", loaded), ("st", stored)):
            aligned = tensors * rows * -(-n_cols * 2 // 512)
            assert launch.c[f"global_{kind}_requests"] <= aligned + ends * tensors + 32
            worst = 1 if n_cols % 16 == 0 else 1.1 if n_cols > 256 else 1.2
            assert launch.c[f"global_{kind}_sectors"] * 32 / size <= tensors * worst


def test_causal_skips_what_is_hidden(launches):
    """Of a square, no more than the visible triangle is read, to the next 16 bytes; all of the result is written."""
    n = 512
    x = torch.randn(n, n)
    y = lmops.softmax(x, causal=True)
    softmax_backward(x, y, None, 1.0, False, True, x.dtype)
    triangle = 4 * sum(min(n, -(-(i + 1) // 4) * 4) for i in range(n))
    for launch, tensors_read in zip(launches, (1, 2), strict=True):
        assert launch.c["global_ld_bytes"] == tensors_read * triangle
        assert launch.c["global_st_bytes"] == 4 * n * n


@pytest.mark.parametrize("n_cols", [1, 64, 1000, 4096, 16_384, 32_768, 40_000, 262_144])
@pytest.mark.parametrize("registers", [1, 2, 3, 4])
@pytest.mark.parametrize("by_column", [False, True])
def test_tile(n_cols, registers, by_column):
    tile = softmax_tile(n_cols, 1000, registers, by_column)
    assert tile.cols >= n_cols or not tile.fits
    assert by_column or tile.fits == (n_cols * (4 if registers == 3 else registers) <= 32_768)
    assert tile.rows >= 32 or not by_column
    assert math.log2(tile.rows * tile.cols * tile.threads).is_integer()
    assert tile.threads <= 1024
    assert tile.rows * tile.cols * registers <= tile.threads * (32 if tile.threads == 1024 else 64)
