"""lmops.swiglu and geglu: the reference, the CPU implementation and the kernels."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lmops
from lmops.ops.activation import gated_backward, gated_forward, gated_tile
from lmops.reference.activation import gated as reference
from lmops.testing import LAYOUTS, arrange, assert_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FUNCTIONS = {
    "silu": lmops.swiglu,
    "gelu": lambda *x: lmops.geglu(*x, approximate="none"),
    "gelu_tanh": lmops.geglu,
}


def results(function, inputs, dy):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, dy)


def check(path, activation, gate, up, *, packed=False, dy_layout="contiguous"):
    """Result and gradients against the reference in float64."""
    dy = arrange(torch.randn(gate.shape).to(gate.dtype), dy_layout)

    def plain(x, up=None):
        return reference(*(x.chunk(2, -1) if up is None else (x, up)), activation)

    inputs = [torch.cat((gate, up), -1)] if packed else [gate, up]
    truth = results(plain, [t.double() for t in inputs], dy.double())
    baseline = results(plain, inputs, dy)
    actual = results(FUNCTIONS[activation], [t.to(path.device) for t in inputs], dy.to(path.device))
    for a, t, b in zip(actual, truth, baseline, strict=True):
        assert_accurate(a, t, b)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_reference_is_torch(activation):
    gate, up = torch.randn(2, 5, 7).double()
    expected = {
        "silu": gate * torch.sigmoid(gate),
        "gelu": gate * (1 + torch.erf(gate / 2**0.5)) / 2,
        "gelu_tanh": gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) / 2,
    }
    torch.testing.assert_close(reference(gate, up, activation), expected[activation] * up)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_and_size(path, dtype, activation, packed):
    """One element; an odd length, whose packed halves are not aligned alike; longer than a tile, also with edges."""
    for shape in ((3, 1), (2, 3, 7), (3, 1100), (2, 1064)):
        gate, up = (torch.randn(2, *shape) * 3).to(dtype)
        check(path, activation, gate, up, packed=packed)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_layout(path, layout):
    """Each tensor in another layout than the result; and odd rows with edges, which are aligned alike."""
    gate, up = (arrange(t, layout) for t in torch.randn(2, 3, 9, 68))
    check(path, "silu", gate, up.contiguous())
    check(path, "silu", gate.contiguous(), up, dy_layout=layout)
    check(path, "silu", gate, up, dy_layout=layout)


def test_edges(path):
    """Rows of 2,201 elements padded to 2,208: all start on a boundary and end off it."""
    gate, up, dy = torch.randn(3, 2, 2208).half()[..., :2201]
    y = lmops.swiglu(gate.to(path.device), up.to(path.device))
    assert_accurate(y, reference(gate.double(), up.double(), "silu"), reference(gate, up, "silu"))
    d = gated_backward(dy.to(path.device), gate.to(path.device), up.to(path.device), "silu")
    function = lambda gate, up: reference(gate, up, "silu")  # noqa: E731
    truth = results(function, [gate.double(), up.double()], dy.double())[1:]
    for a, t, b in zip(d, truth, results(function, [gate, up], dy)[1:], strict=True):
        assert_accurate(a, t, b)


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_extremes(path, activation):
    """Large gates let through all or nothing; NaN stays NaN."""
    gate = torch.tensor([1e4, -1e4, 80.0, -80.0, 0.0, -0.0, 5.0, -5.0, float("nan"), 30.0])
    up = torch.full_like(gate, 2.0)
    actual = results(FUNCTIONS[activation], [gate.to(path.device), up.to(path.device)], up.to(path.device))
    truth, baseline = (
        results(lambda g, u: reference(g, u, activation), [t.to(d) for t in (gate, up)], up.to(d))
        for d in (torch.float64, torch.float32)
    )
    for a, t, b in zip(actual, truth, baseline, strict=True):
        assert_accurate(a, t, b)
    torch.testing.assert_close(actual[0][[0, 1]].cpu(), torch.tensor([2e4, 0.0]))


@pytest.mark.parametrize("shape", [(0,), (0, 6), (6, 0)], ids=str)
def test_empty(path, shape):
    gate = torch.randn(shape, device=path.device, requires_grad=True)
    for y, n in ((lmops.swiglu(gate, gate), shape[-1]), (lmops.geglu(gate), shape[-1] // 2)):
        assert y.shape == (*shape[:-1], n)
        assert torch.autograd.grad(y.sum(), gate)[0].shape == shape


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_gradcheck(path, activation):
    gate, up = (torch.randn(2, 3, dtype=torch.float64, device=path.device, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(FUNCTIONS[activation], (gate, up))


@pytest.mark.fake_tensors
def test_opcheck(path):
    gate, up, dy = torch.randn(3, 3, 6, device=path.device)
    torch.library.opcheck(gated_forward, (gate, up, "silu"))
    torch.library.opcheck(gated_forward, (gate.mT, None, "gelu"))
    torch.library.opcheck(gated_backward, (dy, gate, up, "gelu_tanh"))
    torch.library.opcheck(gated_backward, (dy[:, :3], gate, None, "silu"))


@pytest.mark.fake_tensors
def test_compile_fullgraph(path):
    def loss(gate, up):
        one = lmops.swiglu(gate, up) + lmops.geglu(torch.cat((up, gate), -1), approximate="none")
        return (one + lmops.swiglu(up, up)).sin().sum()

    inputs = [torch.randn(2, 6, device=path.device, requires_grad=True) for _ in range(2)]
    expected = loss(*inputs)
    actual = torch.compile(loss, fullgraph=True)(*inputs)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(*(torch.autograd.grad(z, inputs) for z in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e)


def test_second_derivative_is_refused(path):
    x = torch.randn(2, 6, device=path.device, requires_grad=True)
    (dx,) = torch.autograd.grad(lmops.swiglu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "gate must be float16.*int64", lambda x: lmops.swiglu(x.long())),
        (ValueError, r"gate without up must have shape \(\.\.\., 2 n\), got \(3, 5\)", lambda x: lmops.swiglu(x)),
        (ValueError, r"up must be torch.float32 of shape \(3, 5\)", lambda x: lmops.geglu(x, x[:2])),
        (ValueError, "got torch.float16", lambda x: lmops.geglu(x, x.half())),
        (ValueError, "up must be on cpu like gate, got meta", lambda x: lmops.geglu(x, x.to("meta"))),
        (ValueError, "approximate must be", lambda x: lmops.geglu(x, x, approximate="erf")),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 5))


def test_torchs_gelu_is_ours(path):
    x = torch.randn(4, 50)
    one = torch.ones_like(x)
    for approximate in ("tanh", "none"):
        y = lmops.geglu(x.to(path.device), one.to(path.device), approximate=approximate)
        truth = F.gelu(x.double(), approximate=approximate)
        assert_accurate(y, truth, F.gelu(x, approximate=approximate))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 13), min_size=1, max_size=4),
    order=st.permutations(range(4)),
    step=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_view(path, shape, order, step, dtype):
    base = torch.randn([n * step for n in shape]).to(dtype)
    gate = base[tuple(slice(None, None, step) for _ in shape)].permute([d for d in order if d < len(shape)])
    up = torch.randn(gate.shape).to(dtype)
    y = lmops.swiglu(gate.to(path.device), up.to(path.device))
    assert_accurate(y, reference(gate.double(), up.double(), "silu"), reference(gate, up, "silu"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("n_cols", [1536, 1003])
def test_bytes_moved(launches, n_cols, packed):
    """Each byte once, 16 at a time but at the ends of rows; packed halves of odd rows are not aligned alike."""
    x = torch.randn(4, 2 * n_cols).half() if packed else torch.randn(4, n_cols).half()
    up = None if packed else torch.randn(4, n_cols).half()
    dy = gated_forward(x, up, "silu")
    gated_backward(dy, x, up, "silu")
    size = dy.numel() * 2
    for launch, reads, writes in zip(launches, (2, 3), (1, 2), strict=True):
        assert launch.c["global_ld_bytes"] == reads * size
        assert launch.c["global_st_bytes"] == writes * size
        assert launch.spills == 0
        width = 64 if packed and n_cols % 8 else 512
        assert launch.c["global_ld_requests"] <= reads * (-(-size // width) + 4 * 32)


@pytest.mark.parametrize("n_cols", [1, 16, 100, 1024, 1025, 1 << 20])
@pytest.mark.parametrize("by_column", [False, True])
def test_tile(n_cols, by_column):
    tile = gated_tile(n_cols, by_column)
    assert tile.rows * tile.cols == 1024
    assert tile.rows >= 64 or not by_column
    assert tile.fits == (tile.cols >= n_cols)
