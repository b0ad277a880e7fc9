"""lmops.rope: the reference, the CPU implementation and the kernel."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lmops
from lmops.ops.rope import rope_forward, rope_inplace, rope_tile
from lmops.reference.rope import rope as reference
from lmops.testing import assert_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tables(n, r):
    """cos and sin of n positions, (n, r)."""
    angles = torch.arange(n)[:, None] * 100.0 ** -(torch.arange(r) / r)
    return angles.cos(), angles.sin()


def check(path, q, k, cos, sin, **options):
    """Results and gradients, out of place and in place, against the reference in float64."""
    chosen = options.get("positions")
    c, s = (cos, sin) if chosen is None else (cos[chosen], sin[chosen])
    interleaved = options.get("interleaved", False)
    on_device = {name: x.to(path.device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    given_tables = cos.to(path.device), sin.to(path.device)
    leaves = [x.detach().to(path.device).requires_grad_() for x in (q, k) if x is not None]
    out = lmops.rope(leaves[0], leaves[1] if k is not None else None, *given_tables, **on_device)
    out = [x for x in out if x is not None]
    grads = [torch.randn(x.shape).to(x.dtype) for x in out]
    actual = torch.autograd.grad(out, leaves, [g.to(path.device) for g in grads])
    copies = [x.detach().clone() for x in leaves]
    again = lmops.rope(copies[0], copies[1] if k is not None else None, *given_tables, **on_device, inplace=True)
    for x, y, d, dy, copy, in_place in zip([q, k], out, actual, grads, copies, again, strict=False):
        assert_accurate(
            y, reference(x.double(), c, s, interleaved=interleaved), reference(x, c, s, interleaved=interleaved)
        )
        # the transpose of a rotation is the rotation back
        back, plain = (reference(t, c, -s, interleaved=interleaved) for t in (dy.double(), dy))
        assert_accurate(d, back, plain)
        assert in_place is copy
        assert torch.equal(copy, y.detach()) or path.kind == "torch"
        assert_accurate(copy, reference(x.double(), c, s, interleaved=interleaved), y.detach())


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_is_a_rotation(interleaved):
    """By complex numbers; its gradient is that of autograd, which the tests then take to be the rotation back."""
    x = torch.randn(7, 3, 10, dtype=torch.float64, requires_grad=True)
    cos, sin = (t.double() for t in tables(7, 4))
    y = reference(x, cos, sin, interleaved=interleaved)
    pairs = x[..., :8].unflatten(-1, (4, 2)) if interleaved else x[..., :8].unflatten(-1, (2, 4)).mT
    z = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)[:, None])
    expected = torch.cat((z.flatten(-2) if interleaved else z.mT.flatten(-2), x[..., 8:]), -1)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, reference(dy, cos, -sin, interleaved=interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "dim", "r"),
    [
        ((1,), (1, 1), 2, 1),
        ((5,), (3, 1), 64, 32),
        ((2, 19), (4, 2), 40, 20),
        ((3, 1), (2, 2), 96, 24),
        ((70,), (1, 3), 36, 16),
    ],
    ids=str,
)
def test_dtype_and_size(path, tokens, heads, dim, r, dtype, interleaved):
    q, k = (torch.randn(*tokens, n, dim).to(dtype) for n in heads)
    check(
        path,
        q,
        k,
        *tables(tokens[-1] + 3, r)[:2],
        positions=torch.randint(0, tokens[-1] + 3, tokens),
        interleaved=interleaved,
    )
    cos, sin = tables(tokens[-1], r)
    check(path, q, None, cos, sin, interleaved=interleaved)


def test_views(path):
    """Queries and keys as a model has them: parts of one product, transposed to (B, H, T, D); tables a batch."""
    qkv = torch.randn(2, 9, (4 + 2 + 2) * 32).half()
    cos, sin = (t.expand(2, 9, 16) for t in tables(9, 16))
    heads_first = qkv.unflatten(-1, (8, 32)).transpose(1, 2)
    q, k = heads_first[:, :4].transpose(1, 2), heads_first[:, 4:6].transpose(1, 2)
    check(path, q, k, cos, sin)
    check(path, q, k, *tables(9, 16))
    dense = heads_first[:, :4].contiguous().transpose(1, 2)
    y, _ = lmops.rope(dense.to(path.device), None, cos.to(path.device), sin.to(path.device))
    assert y.transpose(1, 2).is_contiguous()
    every_second = torch.randn(6, 3, 128)[..., ::2]
    check(path, every_second, every_second[:, :1], *tables(6, 32))
    check(
        path,
        every_second.expand(2, 6, 3, 64).clone(),
        None,
        *tables(6, 32),
        positions=torch.arange(6)[None].int().expand(2, 6),
    )


def test_in_place_leaves_its_neighbours_alone(path):
    """Queries and keys rotated within one product, whose values stay."""
    qkv = torch.randn(7, 8, 32)
    cos, sin = tables(7, 12)
    expected = torch.cat((reference(qkv[:, :6], cos, sin), qkv[:, 6:]), 1)
    qkv = qkv.to(path.device)
    lmops.rope(qkv[:, :4], qkv[:, 4:6], cos.to(path.device), sin.to(path.device), inplace=True)
    torch.testing.assert_close(qkv.cpu(), expected)


def test_in_place_with_gradients(path):
    x = torch.randn(7, 6, 32, device=path.device, requires_grad=True)
    cos, sin = (t.to(path.device) for t in tables(7, 16))
    dy = torch.randn(7, 6, 32, device=path.device)
    (expected,) = torch.autograd.grad(reference(x, cos, sin), x, dy)
    for has_keys in (False, True):
        qk = x * 1
        if has_keys:
            lmops.rope(qk[:, :4], qk[:, 4:], cos, sin, inplace=True)
        else:
            lmops.rope(qk, None, cos, sin, inplace=True)
        torch.testing.assert_close(torch.autograd.grad(qk, x, dy)[0], expected)


def test_gradient_of_one_of_both(path):
    q, k = (torch.randn(5, 2, 8, device=path.device, requires_grad=True) for _ in range(2))
    cos, sin = (t.to(path.device) for t in tables(5, 4))
    y_q, y_k = lmops.rope(q, k, cos, sin)
    for y, x, other in ((y_q, q, k), (y_k, k, q)):
        dx, nothing = torch.autograd.grad(y.sum(), (x, other), allow_unused=True, retain_graph=True)
        torch.testing.assert_close(dx, reference(torch.ones_like(x), cos, -sin))
        assert nothing is None


def test_positions_outside_the_tables(path):
    q = torch.randn(4, 2, 8)
    cos, sin = tables(6, 4)
    positions = torch.tensor([0, 6, 5, -1])
    arguments = [t.to(path.device) for t in (cos, sin, positions)]
    if path.kind == "torch":
        with pytest.raises(ValueError, match="positions must be from 0 to 5, the rows of cos, got 6"):
            lmops.rope(q, None, cos, sin, positions=positions)
        return
    y, _ = lmops.rope(q.to(path.device), None, *arguments[:2], positions=arguments[2])
    assert y[[1, 3]].isnan().all()
    torch.testing.assert_close(y[[0, 2]].cpu(), reference(q[[0, 2]], cos[[0, 5]], sin[[0, 5]]))


@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8)], ids=str)
def test_empty(path, shape):
    q = torch.randn(shape, device=path.device, requires_grad=True)
    cos, sin = (t.to(path.device) for t in tables(shape[0], 4))
    y, k = lmops.rope(q, q[:, :0], cos, sin)
    assert y.shape == shape
    assert k.shape == (shape[0], 0, 8)
    assert torch.autograd.grad(y.sum(), q)[0].shape == shape


@pytest.mark.fake_tensors
def test_opcheck(path):
    q, k = torch.randn(2, 5, 3, 8, device=path.device), torch.randn(2, 5, 1, 8, device=path.device)
    cos, sin = (t.to(path.device) for t in tables(5, 4))
    positions = torch.zeros(2, 5, dtype=torch.int64, device=path.device)
    for args in (
        (q, k, cos, sin, positions, False, False),
        (q, None, cos.expand(2, 5, 4), sin.expand(2, 5, 4), None, True, True),
    ):
        torch.library.opcheck(rope_forward, args)
        torch.library.opcheck(rope_inplace, args)


@pytest.mark.fake_tensors
def test_compile_fullgraph(path):
    def loss(q, k, cos, sin):
        y, z = lmops.rope(q, k, cos, sin)
        y, _ = lmops.rope(y * 2, None, cos, sin, interleaved=True)
        both = lmops.rope(z, z, cos, sin)
        return (y.sin() * z).sum() + both[0].sin().sum() + both[1].sum()

    q, k = (torch.randn(5, 2, 8, device=path.device, requires_grad=True) for _ in range(2))
    cos, sin = (t.to(path.device) for t in tables(5, 4))
    expected = loss(q, k, cos, sin)
    actual = torch.compile(loss, fullgraph=True)(q, k, cos, sin)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(*(torch.autograd.grad(z, (q, k)) for z in (actual, expected)), strict=True):
        torch.testing.assert_close(a, e)

    def within(x):
        lmops.rope(x, None, cos, sin, inplace=True)
        return x * 2

    x = torch.randn(5, 2, 8, device=path.device)
    torch.testing.assert_close(torch.compile(within, fullgraph=True)(x.clone()), within(x.clone()))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "q must be float16.*int64", lambda q, c: lmops.rope(q.long(), None, c, c)),
        (ValueError, r"q must have shape \(\*tokens", lambda q, c: lmops.rope(q[0], None, c, c)),
        (ValueError, "k must be torch.float32 of shape", lambda q, c: lmops.rope(q, q[:2], c, c)),
        (ValueError, "got torch.float16", lambda q, c: lmops.rope(q, q.half(), c, c)),
        (TypeError, "cos and sin must be float16", lambda q, c: lmops.rope(q, q, c.int(), c)),
        (ValueError, "with 2 r from 2 to D = 8", lambda q, c: lmops.rope(q, q, c[:, :3], c)),
        (ValueError, "with 2 r from 2 to D = 6", lambda q, c: lmops.rope(q[..., :6], None, c, c)),
        (ValueError, r"must broadcast to \(5, 4\)", lambda q, c: lmops.rope(q, q, c[:3], c[:3])),
        (TypeError, "positions must be int64", lambda q, c: lmops.rope(q, q, c, c, positions=c[:, 0])),
        (ValueError, "positions must broadcast", lambda q, c: lmops.rope(q, q, c, c, positions=torch.arange(3))),
        (
            ValueError,
            r"\(n_positions, r\) with positions",
            lambda q, c: lmops.rope(q, q, c[None], c[None], positions=torch.arange(5)),
        ),
        (ValueError, "q shares memory", lambda q, c: lmops.rope(q[:1].expand(5, 2, 8), q, c, c, inplace=True)),
        (
            NotImplementedError,
            "require gradients",
            lambda q, c: lmops.rope(q.requires_grad_(), q, c.requires_grad_(), c),
        ),
        (NotImplementedError, "require gradients", lambda q, c: lmops.rope(q, q, c, c.requires_grad_())),
        (ValueError, "k must be on cpu like q, got meta", lambda q, c: lmops.rope(q, q.to("meta"), c, c)),
        (ValueError, "sin must be on cpu like q, got meta", lambda q, c: lmops.rope(q, None, c, c.to("meta"))),
        (
            ValueError,
            "positions must be on cpu like q, got meta",
            lambda q, c: lmops.rope(q, None, c, c, positions=torch.arange(5, device="meta")),
        ),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.randn(5, 2, 8), torch.randn(5, 4))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    heads=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    r=st.integers(1, 9),
    rest=st.integers(0, 5),
    order=st.permutations(range(5)),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
)
def test_any_view(path, tokens, heads, r, rest, order, dtype, interleaved):
    """Any order of the dimensions in memory, any size of them."""
    cos, sin = torch.randn(2, *tokens, r)
    inputs = []
    for n in heads:
        shape = (*tokens, n, 2 * r + rest)
        places = [d for d in order if d < len(shape)]
        memory = torch.randn([shape[d] for d in places]).to(dtype)
        inputs.append(memory.permute([places.index(d) for d in range(len(shape))]))
    out = lmops.rope(
        *(x.to(path.device) for x in inputs), cos.to(path.device), sin.to(path.device), interleaved=interleaved
    )
    for x, y in zip(inputs, out, strict=True):
        truth, baseline = (reference(t, cos, sin, interleaved=interleaved) for t in (x.double(), x))
        assert_accurate(y, truth, baseline)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tokens", [1, 64])
def test_bytes_moved(launches, tokens, interleaved):
    """One launch; queries and keys once, 16 bytes at a time; cosines once for all the heads of a program."""
    q, k = torch.randn(tokens, 8, 128).half(), torch.randn(tokens, 2, 128).half()
    cos, sin = (t.half() for t in tables(tokens, 64))
    lmops.rope(q, k, cos, sin, interleaved=interleaved, inplace=True)
    (launch,) = launches
    size = 2 * (q.numel() + k.numel())
    tile = rope_tile(tokens, 1, 8, 2, 64)
    programs = -(-8 // tile.heads) + -(-2 // tile.heads)
    assert launch.c["unique_bytes_read"] == size + 4 * cos.numel()
    assert launch.c["global_ld_bytes"] - size <= programs * 4 * cos.numel() * (1 if tokens > 1 else 4)
    assert launch.c["global_st_bytes"] == size
    assert launch.spills == 0
    assert launch.c["bank_conflicts"] == 0
    if tokens > 1:
        assert launch.c["global_st_requests"] == size // 512


@pytest.mark.parametrize("n_tokens", [1, 17, 4096])
@pytest.mark.parametrize("half", [1, 20, 64, 128])
def test_tile(n_tokens, half):
    tile = rope_tile(n_tokens, 2, 32, 8, half)
    assert tile.block >= half
    assert tile.tokens * tile.block <= 1024
    assert 32 <= tile.threads <= 128
    assert 1 <= tile.heads <= 32
    assert tile.heads == 1 or n_tokens > 17
