"""lmops.ops.attention and scaled_dot_product_attention: the reference, the CPU implementation and the kernels."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import lmops
from lmops.ops import attention as module
from lmops.ops.attention import attention, attention_backward, attention_forward
from lmops.reference.attention import attention as reference
from lmops.reference.attention import backward as reference_backward
from lmops.reference.attention import dropout_keep
from lmops.reference.philox import philox
from lmops.testing import LAYOUTS, arrange, assert_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF = float("inf")


def make(*, B=2, H=4, KV=2, Sq=70, Sk=100, D=32, E=None, dtype=torch.float32):
    return [torch.randn(s).to(dtype) for s in ((B, H, Sq, D), (B, KV, Sk, D), (B, KV, Sk, E or D))]


def run(function, tensors, options, d_out, d_lse, keep=None, device="cpu", wide=False):
    """Output, LSE, and gradients with respect to the tensors and to those options that require one."""

    def own(t):
        if not isinstance(t, torch.Tensor):
            return t
        needs = t.requires_grad
        return (t.detach().double() if wide and t.is_floating_point() else t.detach()).to(device).requires_grad_(needs)

    q, k, v = (own(t).requires_grad_() for t in tensors)
    given = {name: own(value) for name, value in options.items()}
    leaves = [q, k, v, *(t for t in given.values() if isinstance(t, torch.Tensor) and t.requires_grad)]
    out, lse = function(q, k, v, **given, **({} if keep is None else {"keep": keep}))
    outputs, grads = [out], [d_out.to(out)]
    if d_lse is not None:
        outputs, grads = [out, lse], [d_out.to(out), d_lse.to(lse)]
    return out, lse, *torch.autograd.grad(outputs, leaves, grads)


def test_reference_backward_is_autograds():
    q, k, v = (t.requires_grad_() for t in make(B=2, Sq=9, Sk=11, D=8, E=6, dtype=torch.float64))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    bias = (
        torch.randn(2, 4, 9, 11, dtype=torch.float64).masked_fill(torch.rand(2, 4, 9, 11) > 0.8, -INF).requires_grad_()
    )
    keep = torch.rand(2, 4, 9, 11) > 0.3
    options = {
        "left": 5, "right": 2, "bottom_right": True, "softcap": 1.5, "alibi_slopes": torch.rand(2, 4), "scale": 0.9,
        "sinks": sinks, "bias": bias, "keep": keep, "dropout_p": 0.3,
    }  # fmt: skip
    out, lse = reference(q, k, v, **options)
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad([out, lse], [q, k, v, bias, sinks], [d_out, d_lse])
    with torch.no_grad():
        actual = reference_backward(d_out, d_lse, q, k, v, lse, **options)
    torch.testing.assert_close(actual, expected)


def check(path, tensors, *, lse_gradient=False, **options):
    """Output, LSE and all gradients against the reference in float64, by the accuracy rule."""
    q, _, v = tensors
    d_out, d_lse, keep = torch.randn(*q.shape[:3], v.shape[3]).to(q.dtype), None, None
    if lse_gradient:
        with torch.no_grad():
            seen = reference(*tensors, **{n: o for n, o in options.items() if n != "dropout_p"})[1] > -INF
        d_lse = torch.randn(q.shape[:3]) * seen
    if options.get("dropout_p"):
        state = torch.get_rng_state()
        keep = dropout_keep(int(torch.randint(2**62, (1,))), options["dropout_p"], *q.shape[:3], v.shape[2])
        torch.set_rng_state(state)
    actual = run(attention, tensors, options, d_out, d_lse, device=path.device)
    truth = run(reference, tensors, options, d_out, d_lse, keep, wide=True)
    baseline = run(reference, tensors, options, d_out, d_lse, keep)
    names = ["out", "lse", "q", "k", "v", *(n for n, o in options.items() if getattr(o, "requires_grad", False))]
    terms = cancelling_terms(tensors, options, d_out)
    for name, a, t, b in zip(names, actual, truth, baseline, strict=True):
        if name == "lse":
            assert_lse(path, q.dtype, a, t, b)
            continue
        least = torch.finfo(q.dtype).eps * terms.get(name, 0.0)
        if t.numel() and t.abs().max() < least:
            assert (a.cpu() - t).abs().max() <= 2 * least
        else:
            assert_accurate(a, t, b)
    return actual


def assert_lse(path, dtype, actual, truth, baseline):
    if path.kind == "torch":  # the scores of torch's flash attention for CPUs are no better than its inputs
        actual, baseline = actual.to(dtype), baseline.to(dtype)
    assert_accurate(actual, truth, baseline)


def cancelling_terms(tensors, options, d_out):
    """Of the gradients of q, k and bias: the largest sum of all that is added and subtracted in them.

    dS = P (dP - delta) cancels where P is 1 to rounding, as where a row sees one key alone, and where it is added up
    over a row. What is left is exactly 0 in torch, which finds delta from the same dP. A kernel finds it from the
    output, and is left with the rounding of the terms: they are the scale of its error where the truth is below that.
    """
    q, k, v, do = (t.detach().double() for t in (*tensors, d_out))
    if not q.numel() or not k.numel():
        return {}
    group, k_len = q.shape[1] // k.shape[1], k.shape[2]
    options = {n: o for n, o in options.items() if n != "dropout_p"}
    with torch.no_grad():
        p = reference(q, k, torch.eye(k_len, dtype=q.dtype).expand(*k.shape[:3], k_len), **options)[0]
    dp = do.abs() @ v.abs().repeat_interleave(group, 1).mT
    terms = p * (dp + (p * dp).sum(-1, keepdim=True))
    scaled = terms * abs(q.shape[3] ** -0.5 if options.get("scale") is None else options["scale"])
    found = {"q": scaled @ k.abs().repeat_interleave(group, 1), "k": scaled.mT @ q.abs()}
    found["k"] = found["k"].unflatten(1, (-1, group)).sum(2)
    if options.get("bias") is not None:
        found["bias"] = terms.sum_to_size(options["bias"].shape)
    return {name: float(t.max()) for name, t in found.items()}


# ------------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": "bias"}, {"attn_mask": "mask"}]
)
def test_reference_is_torch(options):
    q, k, v = make(KV=4, Sq=9, Sk=9, D=8, dtype=torch.float64)
    options = dict(options)
    ours = {"scale": options.get("scale"), "right": 0 if options.get("is_causal") else None}
    if options.get("attn_mask"):
        bias = torch.randn(2, 1, 9, 9, dtype=torch.float64)
        options["attn_mask"] = ours["bias"] = bias if options["attn_mask"] == "bias" else bias > -1
    torch.testing.assert_close(reference(q, k, v, **ours)[0], F.scaled_dot_product_attention(q, k, v, **options))


def test_reference_of_features_by_loops():
    q, k, v = make(B=1, H=2, KV=1, Sq=4, Sk=6, D=3, dtype=torch.float64)
    slopes, sinks = torch.tensor([0.3, 0.7]), torch.tensor([0.2, -0.4], dtype=torch.float64)
    out, lse = reference(
        q, k, v, left=2, right=1, bottom_right=True, softcap=1.5, alibi_slopes=slopes, sinks=sinks, scale=0.9
    )
    for h in range(2):
        for i in range(4):
            total, weighted = math.exp(sinks[h]), torch.zeros(3, dtype=torch.float64)
            for j in range(6):
                distance = i + 2 - j
                if -1 <= distance <= 2:
                    x = 1.5 * math.tanh(0.9 * float(q[0, h, i] @ k[0, 0, j]) / 1.5) - float(slopes[h]) * abs(distance)
                    total += math.exp(x)
                    weighted += math.exp(x) * v[0, 0, j]
            torch.testing.assert_close(out[0, h, i], weighted / total)
            assert float(lse[0, h, i]) == pytest.approx(math.log(total))


def test_philox_gives_the_published_numbers():
    # known answers of Random123: counter and key of zeros, and of ones in all bits
    zero, ones = torch.zeros((), dtype=torch.int64), torch.full((), 0xFFFFFFFF)
    assert [f"{int(w):08x}" for w in philox(0, [zero] * 4)] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert [f"{int(w):08x}" for w in philox(2**64 - 1, [ones] * 4)] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


# -------------------------------------------------------------------------------------------- dtypes, shapes, masks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dtypes(path, dtype, causal):
    check(path, make(Sq=130, Sk=150, dtype=dtype), right=0 if causal else None)


@pytest.mark.parametrize(
    ("D", "E"), [(8, 8), (16, 16), (24, 40), (64, 64), (80, 80), (96, 32), (128, 128), (33, 17), (192, 128), (256, 256)]
)
def test_head_dims(path, D, E):
    check(path, make(B=1, H=2, KV=1, Sq=37, Sk=45, D=D, E=E, dtype=torch.float16), right=0, bottom_right=True)


@pytest.mark.parametrize(("D", "E"), [(256, 256), (160, 96), (96, 160)])
def test_long_head_dims_in_float32(path, D, E):
    """Without tensor cores the scores of long rows are computed in parts, which are added up."""
    check(path, make(B=1, H=2, KV=1, Sq=37, Sk=45, D=D, E=E), right=0, bottom_right=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_head_dim_512_forward(path, dtype):
    q, k, v = make(B=1, H=2, KV=2, Sq=20, Sk=36, D=512, dtype=dtype)
    with torch.no_grad():
        out, lse = attention(*(t.to(path.device) for t in (q, k, v)), right=0)
    truth, lse_truth = reference(q.double(), k.double(), v.double(), right=0)
    baseline, lse_baseline = reference(q, k, v, right=0)
    assert_accurate(out, truth, baseline)
    assert_lse(path, dtype, lse, lse_truth, lse_baseline)


@pytest.mark.parametrize(("H", "KV"), [(1, 1), (4, 4), (6, 2), (5, 1), (9, 3)])
@pytest.mark.parametrize("Sq", [1, 40])
def test_heads(path, H, KV, Sq):
    check(path, make(B=1, H=H, KV=KV, Sq=Sq, Sk=50, D=16, dtype=torch.float16), right=0, bottom_right=True)


@pytest.mark.parametrize("bottom_right", [False, True])
@pytest.mark.parametrize(("Sq", "Sk"), [(1, 1), (1, 77), (77, 1), (5, 2), (64, 64), (129, 257), (257, 129)])
def test_causal_of_unequal_lengths(path, Sq, Sk, bottom_right):
    check(path, make(B=1, H=2, KV=1, Sq=Sq, Sk=Sk, D=16, dtype=torch.float16), right=0, bottom_right=bottom_right)


@pytest.mark.parametrize("bottom_right", [False, True])
@pytest.mark.parametrize(("left", "right"), [(10, 0), (0, 0), (None, 5), (17, None), (70, 3), (3, 70)])
def test_windows(path, left, right, bottom_right):
    tensors = make(B=1, H=2, KV=1, Sq=140, Sk=170, D=16, dtype=torch.float16)
    check(path, tensors, left=left, right=right, bottom_right=bottom_right)


def test_window_over_grouped_heads_of_a_long_head_dim(path):
    tensors = make(B=2, H=2, KV=1, Sq=150, Sk=170, D=80, dtype=torch.float16)
    check(path, tensors, left=90, right=0, bottom_right=True)


@pytest.mark.parametrize(("left", "Sk", "bottom_right"), [(100, 600, True), (40, 700, True), (40, 560, False)])
def test_window_over_a_long_sequence(path, left, Sk, bottom_right):
    q, k, v = make(B=1, H=2, KV=1, Sq=560, Sk=Sk, D=16, dtype=torch.float16)
    actual = attention(*(t.to(path.device) for t in (q, k, v)), left=left, right=0, bottom_right=bottom_right)
    options = {"left": left, "right": 0, "bottom_right": bottom_right}
    truth, baseline = reference(q.double(), k.double(), v.double(), **options), reference(q, k, v, **options)
    assert_accurate(actual[0], truth[0], baseline[0])
    assert_lse(path, torch.float16, actual[1], truth[1], baseline[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(path, layout):
    tensors = [arrange(t, layout) for t in make(H=2, KV=2, Sq=40, Sk=50, D=16, dtype=torch.float16)]
    actual = check(path, tensors, right=0)
    assert actual[0].stride(-1) == 1


def test_heads_behind_positions_stay_there(path):
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in make(Sq=20, Sk=20, D=16))
    out = check(path, (q, k, v), right=0)[0]
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("Sq", "Sk", "B"), [(0, 5, 2), (5, 0, 2), (0, 0, 2), (5, 5, 0)])
def test_empty(path, Sq, Sk, B):
    tensors = [t.to(path.device).requires_grad_() for t in make(B=B, Sq=Sq, Sk=Sk)]
    out, lse = attention(*tensors)
    assert out.shape == (B, 4, Sq, 32)
    assert not out.any()
    assert (lse == -INF).all()
    for t, grad in zip(tensors, torch.autograd.grad(out.sum(), tensors), strict=True):
        assert grad.shape == t.shape
        assert not grad.any()


@pytest.mark.parametrize("shape", [(2, 4, 70, 100), (1, 4, 70, 100), (2, 1, 1, 100), (70, 1), (100,), ()])
@pytest.mark.parametrize("kind", ["mask", "add", "hide"])
def test_bias_broadcasts_and_has_a_gradient(path, shape, kind):
    bias = torch.randn(shape, dtype=torch.float16)
    if kind == "mask":
        bias = bias > -0.5
    elif kind == "hide":
        bias = bias.masked_fill(bias > 0.8, -INF)
    actual = check(path, make(dtype=torch.float16), bias=bias if kind == "mask" else bias.requires_grad_())
    assert len(actual) == (5 if kind == "mask" else 6)


def test_bias_with_bounds_and_group(path):
    bias = torch.randn(4, 70, 100, dtype=torch.float16, requires_grad=True)
    check(path, make(dtype=torch.float16), bias=bias, left=30, right=2, bottom_right=True, softcap=3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softcap(path, dtype):
    check(path, [2 * t for t in make(Sq=40, Sk=40, dtype=dtype)], softcap=3.0, right=0)


@pytest.mark.parametrize("a_row", [False, True])
def test_alibi(path, a_row):
    slopes = torch.rand(2, 4) if a_row else torch.rand(4)
    check(path, make(dtype=torch.float16), alibi_slopes=slopes, right=0 if a_row else None, bottom_right=True)


@pytest.mark.parametrize("Sq", [2, 70])
def test_sinks(path, Sq):
    sinks = torch.randn(4, dtype=torch.float16, requires_grad=True)
    check(path, make(Sq=Sq, dtype=torch.float16), sinks=sinks, left=20, right=0, bottom_right=True)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(0.0, torch.float32), (-0.7, torch.float32), (1.0, torch.float32), (3.0, torch.float16)],
    ids=str,
)
def test_scale(path, scale, dtype):
    check(path, make(Sq=40, Sk=50, D=16, dtype=dtype), scale=scale, right=0)


def test_everything_at_once_for_few_queries(path):
    check(
        path, make(Sq=5, dtype=torch.float16), lse_gradient=True, left=60, right=0, bottom_right=True, softcap=4.0,
        alibi_slopes=torch.rand(2, 4), sinks=torch.randn(4, dtype=torch.float16, requires_grad=True), dropout_p=0.2,
        bias=torch.randn(2, 4, 5, 100, dtype=torch.float16, requires_grad=True),
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"right": 0}, {"left": 9, "right": 0, "bottom_right": True}], ids=str)
def test_lse_gradient(path, options):
    check(path, make(Sq=40, Sk=30, D=16), lse_gradient=True, **options)


def test_lse_gradient_alone(path):
    tensors, results = make(Sq=10, Sk=12, D=16), []
    for function, cast in (
        (attention, lambda t: t.to(path.device)), (reference, torch.Tensor.double), (reference, torch.Tensor.clone)
    ):  # fmt: skip
        leaves = [cast(t).requires_grad_() for t in tensors]
        results.append(torch.autograd.grad(function(*leaves)[1].sum(), leaves, materialize_grads=True))
    for a, t, b in zip(*results, strict=True):
        assert_accurate(a, t, b)


# ---------------------------------------------------------------------------------------------------- packed calls


def packed(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


@pytest.mark.parametrize(
    "options", [{}, {"right": 0}, {"left": 6, "right": 1}, {"softcap": 2.0, "alibi": True}], ids=str
)
def test_packed_sequences_are_the_sequences(path, options):
    lengths_q, lengths_k = [3, 0, 40, 1, 26], [5, 4, 70, 0, 26]
    q, k, v = make(B=1, Sq=sum(lengths_q), Sk=sum(lengths_k), D=16, dtype=torch.float16)
    cu_q, cu_k = packed(lengths_q), packed(lengths_k)
    options = dict(options)
    slopes = torch.rand(5, 4) if options.pop("alibi", False) else None
    sinks = torch.randn(4, dtype=torch.float16)
    d_out, d_lse = torch.randn_like(q), torch.randn(1, 4, sum(lengths_q))

    def by_loop(q, k, v, sinks):
        outs = []
        for n in range(5):
            at_q, at_k = slice(*cu_q[n : n + 2].tolist()), slice(*cu_k[n : n + 2].tolist())
            own = None if slopes is None else slopes[n]
            outs.append(reference(q[:, :, at_q], k[:, :, at_k], v[:, :, at_k], bottom_right=True, sinks=sinks,
                                  alibi_slopes=own, **options))  # fmt: skip
        return torch.cat([o for o, _ in outs], 2), torch.cat([lse for _, lse in outs], 2)

    def ours(q, k, v, sinks):
        given = {"cu_seqlens_q": cu_q.to(q.device), "cu_seqlens_k": cu_k.to(q.device), "max_seqlen_q": 40,
                 "max_seqlen_k": 70, "alibi_slopes": None if slopes is None else slopes.to(q.device)}  # fmt: skip
        return attention(q, k, v, bottom_right=True, sinks=sinks, **given, **options)

    results = []
    for function, cast in ((ours, lambda t: t.to(path.device)), (by_loop, torch.Tensor.double), (by_loop, lambda t: t)):
        leaves = [cast(t).detach().requires_grad_() for t in (q, k, v, sinks)]
        out, lse = function(*leaves)
        results.append([out, lse, *torch.autograd.grad([out, lse], leaves, [d_out.to(out), d_lse.to(lse)])])
    for a, t, b in zip(*results, strict=True):
        assert_accurate(a, t, b)


def test_bounds_of_any_size(path):
    """A window wider than any sequence is none, also where its sum with a position passes 2^31."""
    q, k, v = (t.to(path.device) for t in make(B=1, Sq=9, Sk=9, D=16))
    cu = packed([5, 4]).to(path.device)
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 5, "max_seqlen_k": 5, "bottom_right": True}
    for packing in (options, {}):
        for huge in (2**31 - 1, 2**40):
            expected = attention(q, k, v, right=0, **packing)[0]
            torch.testing.assert_close(attention(q, k, v, left=huge, right=0, **packing)[0], expected)
            expected = attention(q, k, v, left=2, **packing)[0]
            torch.testing.assert_close(attention(q, k, v, left=2, right=huge, **packing)[0], expected)


def test_packed_sequences_do_not_see_each_other(path):
    """NaN in one sequence, in keys, values and gradients, stays there."""
    q, k, v = (t.to(path.device) for t in make(B=1, KV=4, Sq=90, Sk=90, D=16, dtype=torch.float16))
    cu = packed([30, 40, 20]).to(path.device)
    expected = gradients_of_packed(q, k, v, cu, torch.ones_like(q))
    bad, d_out = [t.clone() for t in (q, k, v)], torch.ones_like(q)
    for t in (*bad, d_out):
        t[:, :, 30:70] = float("nan")
    actual = gradients_of_packed(*bad, cu, d_out)
    assert actual[0][:, :, 30:70].isnan().all()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a[:, :, :30], e[:, :, :30])
        torch.testing.assert_close(a[:, :, 70:], e[:, :, 70:])


def gradients_of_packed(q, k, v, cu, d_out):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, _ = attention(*leaves, right=0, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=40, max_seqlen_k=40)
    return out, *torch.autograd.grad(out, leaves, d_out)


# -------------------------------------------------------------------------------------- rows without keys, NaN, inf


@pytest.mark.parametrize("kind", ["mask", "add", "window"])
def test_rows_that_see_nothing(path, kind):
    tensors = make(Sq=40, Sk=20, D=16, dtype=torch.float16)
    options = {"left": 5, "right": 0} if kind == "window" else {"bias": torch.ones(40, 20, dtype=torch.bool)}
    empty = torch.zeros(40, dtype=torch.bool)
    empty[25:] = True
    if kind != "window":
        options["bias"][empty] = False
    if kind == "add":
        options["bias"] = torch.zeros(40, 20).masked_fill(~options["bias"], -INF)
    actual = check(path, tensors, **options)
    assert not actual[0].cpu()[:, :, empty].any()
    assert (actual[1].cpu()[:, :, empty] == -INF).all()
    assert not actual[2].cpu()[:, :, empty].any()


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
@pytest.mark.parametrize("kind", ["causal", "window", "mask", "add", "bottom right"])
def test_what_is_hidden_may_hold_anything(path, value, kind):
    """NaN and inf in keys and values reach only rows that see them, forward and backward."""
    q, k, v = make(H=2, KV=2, Sq=90, Sk=90, D=16, dtype=torch.float16)
    hidden = torch.zeros(90, dtype=torch.bool)
    options = {
        "causal": {"right": 0},
        "window": {"left": 10, "right": 5},
        "bottom right": {"right": 0, "bottom_right": True},
    }
    if kind in options:
        options, hidden[47:49] = options[kind], True
        distance = torch.arange(90)[:, None] - torch.arange(90)
        visible = (distance >= -options["right"]) & (distance <= options.get("left", 90))
    else:
        hidden[[3, 64, 65, 89]] = True
        visible = torch.rand(90, 90) > 0.3
        visible[:, hidden] = False
        visible[7, 64] = True
        options = {"bias": visible if kind == "mask" else torch.randn(90, 90).masked_fill(~visible, -INF)}
    seen = (visible & hidden).any(1)
    bad = [q, k.clone(), v.clone()]
    bad[1][:, :, hidden], bad[2][:, :, hidden] = value, value
    options = {n: o.to(path.device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    expected, actual, truth, baseline = [], [], [], []

    def add(results, function, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out, lse = function(*leaves, **options)
        # the rows that see it are left out of what is compared: their gradients are NaN
        results += [t.cpu()[:, :, ~seen] for t in (out, lse, torch.autograd.grad(out.float().sum(), leaves[0])[0])]

    add(expected, attention, [t.to(path.device) for t in (q, k, v)])
    out, _ = attention(*(t.to(path.device) for t in bad), **options)
    add(actual, attention, [t.to(path.device) for t in bad])
    add(truth, reference, [t.to(path.device).double() for t in bad])
    add(baseline, reference, [t.to(path.device) for t in bad])
    assert seen.any()
    assert not seen.all()
    for i, (a, e, t, b) in enumerate(zip(actual, expected, truth, baseline, strict=True)):
        if path.kind == "triton":
            assert torch.equal(a, e)
        elif i == 1:
            assert_lse(path, q.dtype, a, t, b)
        else:
            assert_accurate(a, t, b)
    assert out.cpu()[:, :, seen].isnan().all(-1).all()


@pytest.mark.parametrize(("Sq", "Sk", "right"), [(1, 1, None), (1, 9, None), (9, 9, None), (9, 9, 0), (70, 70, 0)])
def test_a_query_of_nan_gives_nan(path, Sq, Sk, right):
    """All scores of its row are NaN, of which torch's attention for CPUs makes 0."""
    q, k, v = (t.to(path.device) for t in make(Sq=Sq, Sk=Sk, D=16))
    expected, lse = attention(q, k, v, right=right)
    q[:, :, 0] = float("nan")
    out, actual = attention(q, k, v, right=right)
    assert out[:, :, 0].isnan().all()
    assert actual[:, :, 0].isnan().all()
    torch.testing.assert_close(out[:, :, 1:], expected[:, :, 1:])
    torch.testing.assert_close(actual[:, :, 1:], lse[:, :, 1:])


def test_padding_keys_have_no_gradient(path):
    q, k, v = make(B=1, H=2, KV=2, Sq=20, Sk=40, D=16)
    mask = (torch.arange(40) < 25).to(path.device)
    k[:, :, 25:], v[:, :, 25:] = float("nan"), float("nan")
    leaves = [t.to(path.device).requires_grad_() for t in (q, k, v)]
    grads = torch.autograd.grad(attention(*leaves, bias=mask)[0].sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    assert not grads[1][:, :, 25:].any()
    assert not grads[2][:, :, 25:].any()


def test_large_scores(path):
    q, k, v = make(Sq=40, Sk=50, D=16, dtype=torch.float16)
    check(path, (30 * q, 30 * k, v), right=0, bottom_right=True)


@pytest.mark.kernels_only  # torch's flash attention for CPUs rounds the LSE to one float32, and so P by that of a score
@pytest.mark.parametrize("factor", [8, 200])
def test_large_scores_in_float32(path, factor):
    """Up to where nearly every row has a key of probability 1, which it must get.

    The products are exact, since the interpreter adds them up in another order where it multiplies the other way round;
    the scores, with a scale that is no power of 2, are not.
    """
    q, k, v = make(Sq=40, Sk=50, D=16)
    q, k = ((t * 16).round() / 16 * factor for t in (q, k))
    check(path, (q, k, v), right=0, bottom_right=True, scale=0.3)


# ---------------------------------------------------------------------------------------------------------- dropout


def test_dropout_is_philox_of_the_position(path):
    tensors = make(Sq=20, Sk=30, D=16, dtype=torch.float16)
    check(path, tensors, dropout_p=0.4, right=0, bottom_right=True)
    on_device = [t.to(path.device) for t in tensors]
    torch.manual_seed(5)
    first = attention(*on_device, dropout_p=0.4)[0]
    second = attention(*on_device, dropout_p=0.4)[0]
    torch.manual_seed(5)
    assert torch.equal(attention(*on_device, dropout_p=0.4)[0], first)
    assert not torch.equal(first, second)


def test_dropout_drops_the_share_it_should():
    keep = dropout_keep(123456789123, 0.3, 2, 3, 200, 100)
    n = keep.numel()
    assert abs(float((~keep).double().mean()) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / n)
    assert not torch.equal(keep[0], keep[1])
    assert not torch.equal(keep[0, 0], keep[0, 1])


def test_dropout_of_packed_sequences_is_that_of_a_batch(path):
    q, k, v = (t.to(path.device) for t in make(B=2, Sq=12, Sk=12, D=16))
    torch.manual_seed(3)
    batch = attention(q, k, v, dropout_p=0.5)[0]
    cu = packed([12, 12]).to(path.device)
    torch.manual_seed(3)
    flat = [t.transpose(0, 1).flatten(1, 2)[None] for t in (q, k, v)]
    together = attention(*flat, dropout_p=0.5, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=12, max_seqlen_k=12)[0]
    torch.testing.assert_close(together.view(4, 2, 12, 16).transpose(0, 1), batch)


# ------------------------------------------------------------------------------------------------ memory, launching


def test_results_are_repeatable_and_do_not_depend_on_the_batch(path):
    tensors = [t.to(path.device) for t in make(B=3, Sq=80, Sk=80, D=16, dtype=torch.float16)]
    d_out = torch.randn_like(tensors[0])
    first = run(attention, tensors, {"right": 0}, d_out, None, device=path.device)
    again = run(attention, tensors, {"right": 0}, d_out, None, device=path.device)
    alone = run(attention, [t[1:2] for t in tensors], {"right": 0}, d_out[1:2], None, device=path.device)
    for a, b, c in zip(first, again, alone, strict=True):
        assert torch.equal(a, b)
        if path.kind == "triton":
            assert torch.equal(a[1:2], c)


@pytest.mark.kernels_only  # torch's own kernel allocates as it does
def test_memory_is_linear_in_the_length(path):
    counted = {}
    for length in (128, 256):
        tensors = [t.to(path.device).requires_grad_() for t in make(B=1, H=1, KV=1, Sq=length, Sk=length, D=16)]
        with Allocations() as allocations:
            out, _, base = module._forward_triton(
                *tensors, True, *[None] * 6, length, length, 0.25, None, 0, False, 0.0, 0.0
            )
            module._backward_triton(
                torch.ones_like(out), None, *tensors, out, base, False, *[None] * 6, length, length, 0.25, None, 0,
                False, 0.0, 0.0,
            )  # fmt: skip
        counted[length] = allocations.bytes
        # out, its gradient here, dq, dk, dv; lse, two numbers a row for the backward, three within it
        assert allocations.bytes <= 5 * length * 16 * 4 + 6 * length * 4 + 1024
        attention(*tensors)
    assert counted[256] <= 2 * counted[128]


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of the storages that operators make."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not any(
            isinstance(a, torch.Tensor) and a.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()
            for a in args
        ):
            self.bytes += result.untyped_storage().nbytes()
        return result


@pytest.mark.not_simulated  # a simulator keeps a copy of what it checks
def test_strides_beyond_two_to_the_31(path):
    q, k, v = make(B=1, H=1, KV=1, Sq=3, Sk=3, D=16, dtype=torch.float16)
    torch.utils.deterministic.fill_uninitialized_memory = False
    far = [torch.empty(2 * (2**30 + 8) + 16, dtype=torch.float16, device=path.device) for _ in range(3)]
    far = [t.as_strided((1, 1, 3, 16), (0, 0, 2**30 + 8, 1)) for t in far]
    torch.utils.deterministic.fill_uninitialized_memory = True
    for t, values in zip(far, (q, k, v), strict=True):
        t.copy_(values)
    d_out = torch.randn_like(q)
    expected = run(attention, (q, k, v), {"right": 0}, d_out, None, device=path.device)
    leaves = [t.requires_grad_() for t in far]
    out, lse = attention(*leaves, right=0)
    # dq, dk and dv are dense; the tensors are read where they lie
    grads = torch.autograd.grad(out, leaves, d_out.to(path.device))
    for a, e in zip((out, lse, *grads), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_a_batch_larger_than_a_grid(path, monkeypatch):
    monkeypatch.setattr(module, "MAX_GRID", 2)
    check(path, make(B=5, H=1, KV=1, Sq=20, Sk=24, D=16), right=0)


def test_keys_are_read_once_a_query_tile(path, launches):
    """Counted at a sequence of 1,024 and the shipped tiles of head_dim 128: bytes loaded, bank conflicts, spills."""
    n, D = 1024, 128
    q, k, v = (t.requires_grad_() for t in make(B=1, H=1, KV=1, Sq=n, Sk=n, D=D, dtype=torch.bfloat16))
    out, _ = attention(q, k, v)
    torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    # beside the two tensors that are streamed: q | q, o, do and two numbers a row, by several lanes each | k, v and two
    # numbers a row and tile
    for launch, held in zip(launches, (1, 3.2, 2.6), strict=True):
        c, tiles = launch.c, launch.grid[0]
        loaded = c["global_ld_bytes"] + c["global_cp_bytes"] + c["global_tma_bytes"]
        assert loaded <= (2 * tiles + held) * n * D * 2
        wavefronts = c["shared_ld_wavefronts"] + c["shared_st_wavefronts"] + c["shared_cp_wavefronts"]
        assert c["bank_conflicts"] <= 0.05 * wavefronts
        assert launch.spills == 0


# ------------------------------------------------------------------------------------- autograd, compile, opcheck


def test_gradcheck_of_the_cpu_implementation():
    q, k, v = (t.requires_grad_() for t in make(B=1, H=2, KV=1, Sq=4, Sk=5, D=3, E=2, dtype=torch.float64))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"right": 0}, {"softcap": 2.0}):
        torch.autograd.gradcheck(lambda q, k, v, o=options: attention(q, k, v, **o), (q, k, v))
    torch.autograd.gradcheck(
        lambda q, k, v, s, b: attention(q, k, v, sinks=s, bias=b, left=2, bottom_right=True), (q, k, v, sinks, bias)
    )


@pytest.mark.fake_tensors
def test_opcheck(path):
    q, k, v = (t.to(path.device) for t in make(B=1, Sq=6, Sk=7, D=16))
    sinks, cu_q, cu_k = (t.to(path.device) for t in (torch.zeros(4), packed([2, 4]), packed([3, 4])))
    bias = torch.zeros(1, 1, 6, 7, device=path.device)
    dense = (bias, None, sinks, None, None, None, 6, 7, 0.25, 3, 0, True, 0.0, 0.0)
    flat = (None, torch.ones(4, device=path.device), None, cu_q, cu_k, None, 4, 4, 0.25, None, 0, False, 2.0, 0.0)
    for options in (dense, flat):
        for for_backward in (False, True):
            torch.library.opcheck(attention_forward, (q, k, v, for_backward, *options))
        out, lse, base = attention_forward(q, k, v, True, *options)
        arguments = (torch.ones_like(out), torch.ones_like(lse), q, k, v, out, base, options is dense, *options)
        torch.library.opcheck(attention_backward, arguments)


@pytest.mark.fake_tensors
def test_compile_fullgraph(path):
    def loss(x, w):
        q, k, v = (x @ w).view(2, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = lmops.scaled_dot_product_attention(q, k, v, is_causal=True)
        return y.sin().sum() + lmops.scaled_dot_product_attention(y, y, y, window=(3, 0)).cos().sum()

    x, w = torch.randn(2, 9, 16), torch.randn(16, 48) / 4
    x, w = (t.to(path.device).requires_grad_() for t in (x, w))
    expected = loss(x, w)
    actual = torch.compile(loss, fullgraph=True)(x, w)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(torch.autograd.grad(actual, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.fake_tensors
def test_compile_with_sizes_that_vary(path):
    """A head_dim that torch.compile makes a variable leaves the scale one."""
    compiled = torch.compile(lmops.scaled_dot_product_attention, fullgraph=True, dynamic=True)
    for length, dim in ((9, 16), (17, 8)):
        q, k, v = torch.randn(3, 1, 2, length, dim, device=path.device)
        torch.testing.assert_close(compiled(q, k, v), lmops.scaled_dot_product_attention(q, k, v))


def test_second_derivative_is_refused(path):
    q, k, v = (t.to(path.device).requires_grad_() for t in make(B=1, Sq=3, Sk=3, D=16))
    (dq,) = torch.autograd.grad(attention(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_any_call(path, request):
    """Random shapes and features against the reference."""
    simulated = request.config.option.device.startswith("sm_")  # where each is compiled, and takes seconds
    # the same calls in every run: of the rare one with a handful of numbers, torch may by chance get all of them right

    @settings(max_examples=4 if simulated else 25, deadline=None, derandomize=True)
    @given(data=st.data())
    def one(data):
        draw = data.draw
        torch.manual_seed(draw(st.integers(0, 99)))
        KV, group = draw(st.tuples(st.integers(1, 2), st.integers(1, 3)))
        Sq, Sk = draw(st.tuples(st.integers(1, 80), st.integers(1, 80)))
        D, E = draw(st.sampled_from([(16, 16), (8, 24), (32, 20)]))
        bound = st.none() | st.integers(0, 90)
        options = {"left": draw(bound), "right": draw(bound), "bottom_right": draw(st.booleans())}
        if draw(st.booleans()):
            options["softcap"] = 5.0
        if draw(st.booleans()):
            options["sinks"] = torch.randn(KV * group).to(torch.float16).requires_grad_()
        if draw(st.booleans()):
            options["alibi_slopes"] = torch.rand(KV * group)
        if draw(st.booleans()):
            rows, cols = draw(st.sampled_from([(1, Sk), (Sq, 1), (Sq, Sk)]))
            options["bias"] = torch.randn(rows, cols).to(torch.float16).requires_grad_()
        tensors = make(B=1, H=KV * group, KV=KV, Sq=Sq, Sk=Sk, D=D, E=E, dtype=torch.float16)
        check(path, tensors, **options)

    one()


# --------------------------------------------------------------------------------- torch's function, and its place


def test_takes_the_place_of_torchs(path):
    for ndim in (2, 3, 4, 5):
        shape = (2, 3, 4, 9, 16)[5 - ndim :]
        q, k, v = (torch.randn(shape, device=path.device) for _ in range(3))
        mask = torch.rand(shape[:-1] + (9,), device=path.device) > 0.3
        mask[..., 0] = True
        for arguments in ((), (None, 0.0, True), (mask,), (mask.float(), 0.0, False)):
            expected = F.scaled_dot_product_attention(q, k, v, *arguments, scale=0.4)
            torch.testing.assert_close(lmops.scaled_dot_product_attention(q, k, v, *arguments, scale=0.4), expected)
        out, lse = lmops.scaled_dot_product_attention(q, k, v, return_lse=True, deterministic=True)
        assert out.shape == shape
        assert lse.shape == shape[:-1]


def test_grouped_heads_as_torch_does(path):
    q, k, v = (t.to(path.device) for t in make(Sq=9, Sk=9))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    actual = lmops.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(actual, expected)


def test_window_is_a_mask(path):
    q, k, v = (t.to(path.device) for t in make(KV=4, Sq=30, Sk=40))
    distance = torch.arange(30)[:, None] - torch.arange(40)
    mask = ((distance >= -2) & (distance <= 5)).to(path.device)
    actual = lmops.scaled_dot_product_attention(q, k, v, window=(5, 2))
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(q, k, v, mask))


# ------------------------------------------------------------------------------------------------------- bad input


T = torch.zeros(2, 4, 5, 8)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)


def flat(cu_q=CU, cu_k=CU, t=T[:1], **options):
    return attention(t, t, t, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attention(T[0], T, T), ValueError, r"query must be \(batch, .*\), got shape \(4, 5, 8\)"),
        (lambda: attention(T, T[..., :4], T), ValueError, r"key must be .* head_dim 8, got shape \(2, 4, 5, 4\)"),
        (lambda: attention(T, T[:1], T), ValueError, r"key must be .* batch 2"),
        (lambda: attention(T, T, T[:, :, :3]), ValueError, r"value must have key's batch.* \(2, 4, 5\)"),
        (lambda: attention(T, T[:, :3], T[:, :3]), ValueError, "heads must be a multiple of key's: got 4 and 3"),
        (lambda: attention(T, T.half(), T), TypeError, "key must be torch.float32 on cpu like query"),
        (lambda: attention(*[T.long()] * 3), TypeError, "query must be float16, bfloat16 or float32"),
        (lambda: attention(*[torch.zeros(1, 1, 2, 600)] * 3), ValueError, "head_dim must be 1 to 512, got 600"),
        (lambda: attention(T, T, T, dropout_p=1.0), ValueError, "dropout_p must be at least 0 .*, got 1.0"),
        (lambda: attention(T, T, T, dropout_p=-0.1), ValueError, "dropout_p"),
        (lambda: attention(T, T, T, softcap=-1.0), ValueError, "softcap must be positive"),
        (lambda: attention(T, T, T, scale=INF), ValueError, "scale must be finite"),
        (lambda: attention(T, T, T, left=-1), ValueError, "left must be at least 0 or None, got -1"),
        (lambda: attention(T, T, T, bias=torch.zeros(3, 5)), ValueError, r"attn_mask .* \(2, 4, 5, 5\), got shape"),
        (lambda: attention(T, T, T, bias=torch.zeros(1, 2, 4, 5, 5)), ValueError, "attn_mask must broadcast"),
        (lambda: attention(T, T, T, bias=torch.zeros(5, 5).int()), TypeError, "attn_mask must be boolean"),
        (lambda: attention(T, T, T, alibi_slopes=torch.zeros(3)), ValueError, r"alibi_slopes .* \(4,\) or \(2, 4\)"),
        (lambda: attention(T, T, T, sinks=torch.zeros(4).long()), TypeError, "sinks must be floating-point"),
        (lambda: attention(T, T, T, sinks=torch.zeros(2, 4)), ValueError, r"sinks must have the shape \(4,\)"),
        (lambda: flat(cu_k=None), ValueError, "cu_seqlens_k is missing"),
        (lambda: flat(t=T), ValueError, "packed sequences come as a batch of 1, got a batch of 2"),
        (lambda: flat(CU + 1), ValueError, "cu_seqlens_q must start at 0, not decrease, and end at the 5 tokens"),
        (lambda: flat(CU, torch.tensor([0, 6, 5], dtype=torch.int32)), ValueError, "cu_seqlens_k must start at 0"),
        (lambda: flat(CU - torch.tensor([0, 0, 1]).int()), ValueError, "end at the 5 tokens"),
        (lambda: flat(CU.long()), ValueError, "cu_seqlens_q must be int32 of shape"),
        (lambda: flat(CU, torch.tensor([0, 5], dtype=torch.int32)), ValueError, "must be of equal length, got 3 and 2"),
        (lambda: flat(CU.to("meta")), ValueError, "on cpu, got torch.int32 .* on meta"),
        (lambda: flat(max_seqlen_q=2, max_seqlen_k=3), ValueError, "max_seqlen_q is 2, the longest"),
        (lambda: flat(bias=torch.zeros(5, 5)), ValueError, "bias cannot be combined with cu_seqlens_q"),
        (lambda: lmops.scaled_dot_product_attention(T, T[:, :2], T[:, :2]), ValueError, "unless enable_gqa=True"),
        (lambda: lmops.scaled_dot_product_attention(T, T, T, window=3), ValueError, "window must be a pair"),
        (lambda: lmops.scaled_dot_product_attention(T, T, T, window=(1.5, 2)), ValueError, "window must be a pair"),
        (lambda: lmops.scaled_dot_product_attention(T, T, T, window=(-2, 2)), ValueError, "at least 0, or -1"),
        (lambda: lmops.scaled_dot_product_attention(T, T[0], T[0]), ValueError, "equally many dimensions, got 4, 3"),
        (lambda: lmops.scaled_dot_product_attention(*[T[0]] * 3, T), ValueError, r"broadcast to \(4, 5, 5\), got"),
        (lambda: lmops.scaled_dot_product_attention(*[T[None]] * 3, torch.zeros(3, 2, 4, 5, 5)), ValueError,
         r"attn_mask must broadcast to \(1, 2, 4, 5, 5\), got"),
        (lambda: attention(T, T, T, bias=torch.zeros(5, 5).double()), TypeError, "attn_mask .*, got torch.float64"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_autocast(path):
    q, k, v = (t.to(path.device) for t in make(Sq=9, Sk=9, D=16))
    with torch.autocast(path.device, torch.bfloat16):
        out = lmops.scaled_dot_product_attention(q, k, v.bfloat16(), enable_gqa=True)
    expected = lmops.scaled_dot_product_attention(*(t.bfloat16() for t in (q, k, v)), enable_gqa=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_autocast_leaves_float64():
    q, k, v = (t.double() for t in make(Sq=9, Sk=9, D=16))
    with torch.autocast("cpu", torch.bfloat16):
        assert lmops.scaled_dot_product_attention(q, k, v, enable_gqa=True).dtype == torch.float64


def test_tiles_fit_small_shared_memory():
    """Targets with less shared memory take smaller tiles; unknown ones those of sm_80."""
    for kernel, dim in module.TILES["sm_80"]:
        small, known = (module.attention_tile(kernel, dim, 2, 4096, target, 0) for target in ("sm_86", "sm_80"))
        assert small.block_m * small.block_n <= known.block_m * known.block_n
        assert module.attention_tile(kernel, dim, 2, 4096, "sm_75", 0) == known
    assert module.attention_tile("forward", 128, 2, 1, "sm_90", 0).block_m == 16
