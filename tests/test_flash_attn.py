"""lmops.flash_attn against the documented semantics of the package flash_attn, written again in plain torch."""

import inspect
from functools import partial

import pytest
import torch

from lmops import flash_attn
from lmops.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from lmops.reference.paged_cache import rotate
from lmops.testing import assert_accurate

INF = float("inf")
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])  # of 4 heads
SLOPES_A_SEQUENCE = torch.stack((SLOPES, 3 * SLOPES.flip(0)))


def formula(q, k, v, *, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):
    """(out, softmax_lse) of sequences (batch, seqlen, heads, headdim), with autograd, in q's dtype throughout."""
    q_len, n_heads, k_len = q.shape[1], q.shape[2], k.shape[1]
    k, v = (t.repeat_interleave(n_heads // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    diagonal = torch.arange(q_len)[:, None] + k_len - q_len  # the last query stands at the last key
    keys = torch.arange(k_len)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores).view(-1, n_heads, 1, 1) * (diagonal - keys).abs()
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros(q_len, k_len, dtype=torch.bool)
    if left >= 0:
        hidden |= keys < diagonal - left
    if right >= 0:
        hidden |= keys > diagonal + right
    scores = scores.masked_fill(hidden, -INF)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.masked_fill(lse == -INF, 0)[..., None])
    return torch.einsum("bhij,bjhd->bihd", p, v), lse


def formula_varlen(q, k, v, lengths_q, lengths_k, *, alibi_slopes=None, **options):
    """`formula`, a sequence at a time, and the results one behind the other."""
    results = []
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    for n, sequence in enumerate(parts):
        slopes = None if alibi_slopes is None else alibi_slopes[n]
        results.append([r[0] for r in formula(*(t[None] for t in sequence), alibi_slopes=slopes, **options)])
    out, lse = zip(*results, strict=True)
    return torch.cat(out), torch.cat(lse, 1)


def offsets(lengths, device):
    """cu_seqlens and max_seqlen."""
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return cu, max(lengths)


def random(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in shapes]


def gradients(function, tensors, dout, dlse=None):
    """out, softmax_lse and the tensors' gradients of (out dout).sum(), with dlse of (softmax_lse dlse).sum() too."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    results = function(*tensors)
    seen = [(results[0], dout)] + ([] if dlse is None else [(results[1], dlse)])
    grads = torch.autograd.grad([r for r, _ in seen], tensors, [d.to(r) for r, d in seen])
    return *(r.detach() for r in results[:2]), *grads


def check(path, tensors, ours, theirs, with_lse=False):
    """Results and gradients of `ours` on the path's device against `theirs`, the formula, in float64."""
    truth_out, truth_lse = theirs(*(t.double() for t in tensors))
    dout = torch.randn(truth_out.shape).to(tensors[0].dtype)
    dlse = torch.randn(truth_lse.shape) if with_lse else None
    truth = gradients(theirs, [t.double() for t in tensors], dout, dlse)
    baseline = gradients(theirs, tensors, dout, dlse)
    actual = gradients(ours, [t.to(path.device) for t in tensors], dout, dlse)
    assert actual[0].dtype == tensors[0].dtype
    assert actual[1].dtype == torch.float32
    for i, (a, t, b) in enumerate(zip(actual, truth, baseline, strict=True)):
        assert_accurate(a, t, b.float() if i == 1 else b)
    return actual


def on_device(path, options):
    return {name: value.to(path.device) if torch.is_tensor(value) else value for name, value in options.items()}


MASKS = {
    "causal, fewer queries": ({"causal": True}, "11110 11111"),
    "causal, more queries": ({"causal": True}, "00 00 00 10 11"),
    "window": ({"window_size": (1, 0)}, "01100 00110 00011"),
    "window on the left": ({"window_size": (1, -1)}, "0111 0011"),
    "window on the right": ({"window_size": (-1, 1)}, "100 110 111 111"),
    "causal makes right 0": ({"causal": True, "window_size": (1, 5)}, "100 110 011"),
    "right, as long as the keys": ({"window_size": (-1, 2)}, "00 10 11 11 11"),
}


@pytest.mark.parametrize(("options", "rows"), MASKS.values(), ids=MASKS)
def test_mask(path, options, rows):
    """Equal scores: out is the mask divided by its row sums where the values are the unit vectors."""
    mask = torch.tensor([[float(c) for c in row] for row in rows.split()])
    q_len, k_len = mask.shape
    q, k = torch.zeros(1, q_len, 2, 16), torch.randn(1, k_len, 2, 16)
    v = torch.eye(16)[None, :k_len, None].expand(1, k_len, 2, 16)
    out, lse, _ = flash_attn_func(*(t.to(path.device) for t in (q, k, v)), **options, return_attn_probs=True)
    seen = mask.sum(-1)
    for head in range(2):
        torch.testing.assert_close(out[0, :, head, :k_len].cpu(), mask / seen.clamp(min=1)[:, None])
        torch.testing.assert_close(lse[0, head].cpu(), seen.log())
    assert (out[..., k_len:] == 0).all()


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 4)},
    "softcap": {"softcap": 2.0, "softmax_scale": 0.4},
    "alibi": {"alibi_slopes": SLOPES},
    "all": {
        "causal": True,
        "window_size": (15, -1),
        "softcap": 3.0,
        "softmax_scale": 0.5,
        "alibi_slopes": SLOPES_A_SEQUENCE,
    },
}


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
def test_feature(path, options):
    """Forward and gradients; 4 heads over 2, and 10 queries of 37 that causal leaves without a key."""
    tensors = random((2, 37, 4, 16), (2, 27, 2, 16), (2, 27, 2, 16))
    ours = partial(flash_attn_func, **on_device(path, options), return_attn_probs=True)
    out, lse, dq, *_ = check(path, tensors, ours, partial(formula, **options))
    if options.get("causal"):
        assert (out[:, :10] == 0).all()
        assert (lse[..., :10] == -INF).all()
        assert (dq[:, :10] == 0).all()
        assert (out[:, 10:] != 0).any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(path, dtype):
    tensors = random((1, 21, 2, 32), (1, 33, 2, 32), (1, 33, 2, 32), dtype=dtype)
    ours = partial(flash_attn_func, causal=True, return_attn_probs=True)
    check(path, tensors, ours, partial(formula, causal=True))


def test_softmax_lse_has_gradients(path):
    """Together with those of out, and none from the 6 queries without a key, where softmax_lse is -inf."""
    tensors = random((2, 37, 4, 16), (2, 27, 2, 16), (2, 27, 2, 16))
    options = {"window_size": (9, 4)}
    ours = partial(flash_attn_func, **options, return_attn_probs=True)
    _, lse, dq, *_ = check(path, tensors, ours, partial(formula, **options), with_lse=True)
    assert lse.shape == (2, 4, 37)
    assert (lse[..., :6] == -INF).all()
    assert (dq[:, :6] == 0).all()


VARLEN = {
    "causal": ({"causal": True}, False),
    "window, softcap, lse": ({"window_size": (6, 2), "softcap": 2.0, "softmax_scale": 0.5}, True),
    "alibi": ({"alibi_slopes": torch.cat([SLOPES_A_SEQUENCE * factor for factor in (1, -1, 2)])}, False),
}


@pytest.mark.parametrize(("options", "with_lse"), VARLEN.values(), ids=VARLEN)
def test_varlen_is_a_loop_over_sequences(path, options, with_lse):
    """Also where a sequence has no keys (its queries give 0), no queries, or neither."""
    lengths_q, lengths_k = [5, 3, 0, 0, 17, 1], [9, 0, 4, 0, 12, 1]
    tensors = random((26, 4, 16), (26, 2, 16), (26, 2, 16))
    cu_q, max_q = offsets(lengths_q, path.device)
    cu_k, max_k = offsets(lengths_k, path.device)
    on_path = on_device(path, options)
    out, lse, _, dk, _ = check(
        path,
        tensors,
        lambda *qkv: flash_attn_varlen_func(*qkv, cu_q, cu_k, max_q, max_k, **on_path, return_attn_probs=True),
        lambda *qkv: formula_varlen(*qkv, lengths_q, lengths_k, **options),
        with_lse,
    )
    assert (out.shape, lse.shape) == ((26, 4, 16), (4, 26))
    assert (out[5:8] == 0).all()
    assert (lse[:, 5:8] == -INF).all()
    assert (dk[9:13] == 0).all()


# each changes the result, so that none can be lost or take another's place
OPTIONS = {
    "dropout_p": 0.2,
    "causal": True,
    "window_size": (6, -1),
    "softcap": 5.0,
    "softmax_scale": 0.3,
    "alibi_slopes": SLOPES[:2],
    "return_attn_probs": True,
}


def test_packed_is_unpacked(path):
    (qkv,) = random((2, 11, 3, 2, 16))
    (dout,) = random((2, 11, 2, 16))
    options = on_device(path, OPTIONS)

    def packed_kv(qkv):
        return flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options)

    def unpacked(qkv):
        return flash_attn_func(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], **options)

    check_same(path, unpacked, [packed_kv, lambda qkv: flash_attn_qkvpacked_func(qkv, **options)], qkv, dout)


def test_varlen_packed_is_unpacked(path):
    (qkv,) = random((14, 3, 2, 16))
    (dout,) = random((14, 2, 16))
    cu, longest = offsets([4, 0, 10], path.device)
    options = on_device(path, OPTIONS)

    def packed_kv(qkv):
        return flash_attn_varlen_kvpacked_func(qkv[:, 0], qkv[:, 1:], cu, cu, longest, longest, **options)

    def unpacked(qkv):
        return flash_attn_varlen_func(qkv[:, 0], qkv[:, 1], qkv[:, 2], cu, cu, longest, longest, **options)

    def packed(qkv):
        return flash_attn_varlen_qkvpacked_func(qkv, cu, longest, **options)

    check_same(path, unpacked, [packed_kv, packed], qkv, dout)


def check_same(path, unpacked, functions, qkv, dout):
    """The same bits in out, softmax_lse and the gradient of qkv."""

    def run(function):
        torch.manual_seed(0)
        return gradients(function, [qkv.to(path.device)], dout)

    expected = run(unpacked)
    assert all(t.isfinite().all() for t in expected)
    for function in functions:
        for a, b in zip(run(function), expected, strict=True):
            assert torch.equal(a, b)


def test_layout_of_results(path):
    """out and the gradients of views are contiguous in flash-attn's layout."""
    (qkv,) = random((2, 6, 3, 2, 16))
    q, k, v = (t.detach().requires_grad_() for t in qkv.to(path.device).unbind(2))
    assert not q.is_contiguous()
    out = flash_attn_func(q, k, v)
    assert out.is_contiguous()
    assert all(g.is_contiguous() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    cu, longest = offsets([5, 7], path.device)
    packed = flash_attn_varlen_func(*(t.detach().flatten(0, 1) for t in (q, k, v)), cu, cu, longest, longest)
    assert packed.is_contiguous()


def test_dropout(path):
    """Equal scores, unit vectors as values: out shows which of 16 probabilities are left, and the gradient of v too."""
    q, k = torch.zeros(2, 40, 2, 16, device=path.device), torch.randn(2, 16, 2, 16).to(path.device)
    v = torch.eye(16, device=path.device)[None, :, None].repeat(2, 1, 2, 1).requires_grad_()

    def run(seed):
        torch.manual_seed(seed)
        return flash_attn_func(q, k, v, 0.25, return_attn_probs=True)

    out, lse, s_dmask = run(1)
    assert s_dmask is None
    kept = out != 0
    torch.testing.assert_close(out, kept / (16 * 0.75))
    torch.testing.assert_close(lse, torch.full_like(lse, 16.0).log())
    assert abs(kept.float().mean() - 0.75) < 5 * (0.25 * 0.75 / kept.numel()) ** 0.5
    (dv,) = torch.autograd.grad(out.sum(), v)
    torch.testing.assert_close(dv, out.sum(1)[..., None].expand(2, 2, 16, 16).transpose(1, 2))
    assert torch.equal(run(1)[0], out)
    assert not torch.equal(run(2)[0], out)
    # packed sequences draw as the sequences of a batch do
    cu_q, cu_k = offsets([40, 40], path.device)[0], offsets([16, 16], path.device)[0]
    torch.manual_seed(1)
    packed = flash_attn_varlen_func(*(t.flatten(0, 1) for t in (q, k, v)), cu_q, cu_k, 40, 16, 0.25)
    assert torch.equal(packed.view_as(out), out)


def test_what_changes_nothing(path):
    q, k, v = (t.to(path.device) for t in random((1, 5, 2, 16), (1, 5, 2, 16), (1, 5, 2, 16)))
    expected = flash_attn_func(q, k, v)
    for options in ({"softcap": -1.0}, {"deterministic": True}, {"window_size": (4, 4)}):
        assert torch.equal(flash_attn_func(q, k, v, **options), expected)


@pytest.mark.fake_tensors
def test_a_step_over_a_cache_compiles_whole(path):
    q, (k, v) = torch.randn(2, 1, 4, 32), torch.randn(2, 2, 1, 2, 32)
    lengths, results = torch.tensor([5, 9], dtype=torch.int32), []

    def step(q, k, v, k_cache, v_cache, lengths):
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True)

    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        caches = [torch.zeros(2, 64, 2, 32, device=path.device) for _ in range(2)]
        tensors = [t.to(path.device) for t in (q, k, v)]
        results.append((run(*tensors, *caches, lengths.to(path.device)), *caches))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    for cache, rows in zip(results[0][1:], (k, v), strict=True):
        assert torch.equal(cache[0, 5].cpu(), rows[0, 0])
        assert torch.equal(cache[1, 9].cpu(), rows[1, 0])


@pytest.mark.fake_tensors
def test_compile_fullgraph(path):
    cu, longest = offsets([4, 7], path.device)

    def loss(q, kv):
        k, v = kv.unbind(1)
        out, lse, _ = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True, return_attn_probs=True)
        dense = flash_attn_kvpacked_func(q[None], kv[None], window_size=(3, 1))
        return out.sin().sum() + lse.cos().sum() + dense.square().sum()

    q, kv = (t.to(path.device).requires_grad_() for t in random((11, 2, 16), (11, 2, 2, 16)))
    expected = loss(q, kv)
    actual = torch.compile(loss, fullgraph=True, backend="aot_eager")(q, kv)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(torch.autograd.grad(actual, (q, kv)), torch.autograd.grad(expected, (q, kv)), strict=True):
        torch.testing.assert_close(a, b)


PAGED = torch.tensor([[5, 0, 3], [2, 6, -1]], dtype=torch.int32)  # blocks of 8
LENGTHS = (19, 6)  # tokens in the cache; what else it holds is NaN
ANGLES = torch.arange(24.0)[:, None] * 0.3 ** torch.arange(4)
CACHED = {
    "nothing new": {"n_new": 0},
    "nothing new, several queries": {"n_new": 0, "n_queries": 3, "causal": True},
    "a token": {},
    "no queries": {"n_new": 2, "n_queries": 0},
    "a token, pages": {"paged": True},
    "rotated": {"rotary": True, "causal": True, "n_new": 3, "n_queries": 3},
    "rotated, pages, halves": {"rotary": True, "paged": True, "rotary_interleaved": False, "window_size": (7, 0)},
    "rotated, queries at one place": {"rotary": True, "n_new": 2, "n_queries": 3},
    "rows by number": {"cache_batch_idx": torch.tensor([2, 0], dtype=torch.int32), "causal": True},
    "one length": {"cache_seqlens": 6, "paged": True},
    "padded on the left": {"cache_leftpad": torch.tensor([4, 0], dtype=torch.int32), "softcap": 3.0, "rotary": True},
    "alibi": {"alibi_slopes": SLOPES_A_SEQUENCE, "causal": True, "n_new": 2, "n_queries": 2, "paged": True},
}


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("heads must be a multiple", {"q": torch.randn(2, 1, 3, 8)}),
        ("softcap must be", {"softcap": float("nan")}),
        ("scale must be finite", {"softmax_scale": float("inf")}),
        ("alibi_slopes must have the shape", {"alibi_slopes": torch.ones(3)}),
    ],
)
def test_a_step_that_is_refused_writes_nothing(message, wrong):
    cache, new = torch.zeros(2, 2, 9, 2, 8), torch.randn(2, 1, 2, 8)
    with pytest.raises(ValueError, match=message):
        flash_attn_with_kvcache(**{"q": new, "k_cache": cache[0], "v_cache": cache[1], "k": new, "v": new, **wrong,
                                   "cache_seqlens": 3})  # fmt: skip
    assert not cache.any()


@pytest.mark.parametrize("name", CACHED)
def test_with_kvcache(path, name):
    """Against the formula on each sequence's own keys, appended and rotated by hand."""
    options = dict(CACHED[name])
    paged, rotary = options.pop("paged", False), options.pop("rotary", False)
    n_new, n_queries = options.pop("n_new", 1), options.pop("n_queries", 1)
    lengths = [options["cache_seqlens"]] * 2 if "cache_seqlens" in options else list(LENGTHS)
    rows = options.get("cache_batch_idx", torch.arange(2)).tolist()
    pads = options.get("cache_leftpad", torch.zeros(2)).int().tolist()
    interleaved = options.get("rotary_interleaved", True)
    q = torch.randn(2, n_queries, 4, 16)
    new = [torch.randn(2, n_new, 2, 16) for _ in range(2)]
    held = [[torch.randn(n, 2, 16) for n in lengths] for _ in range(2)]  # of k and v, a sequence
    caches = [torch.full((7, 8, 2, 16) if paged else (3, 24, 2, 16), float("nan")) for _ in range(2)]

    def row(cache, n):
        """The slots of sequence n, one behind the other: a copy."""
        return cache[PAGED[n].clamp(min=0).long()].flatten(0, 1) if paged else cache[rows[n]]

    for cache, sequences in zip(caches, held, strict=True):
        for n, tokens in enumerate(sequences):
            for j in range(pads[n], len(tokens)):
                block, slot = (int(PAGED[n, j // 8]), j % 8) if paged else (rows[n], j)
                cache[block, slot] = tokens[j]
    expected = []
    for n in range(2):
        at = torch.arange(lengths[n], lengths[n] + n_new)
        moving = options.get("causal", False) or "window_size" in options
        places = lengths[n] + torch.arange(n_queries) * int(moving)
        turn = (lambda x, at: rotate(x, ANGLES[at].cos(), ANGLES[at].sin(), interleaved)) if rotary else lambda x, at: x
        keys = torch.cat((held[0][n], turn(new[0][n], at)))[None, pads[n] :]
        values = torch.cat((held[1][n], new[1][n]))[None, pads[n] :]
        given = {k: v for k, v in options.items() if k in ("causal", "window_size", "softcap")}
        slopes = None if "alibi_slopes" not in options else options["alibi_slopes"][n]
        expected.append((*formula(turn(q[n], places)[None], keys, values, alibi_slopes=slopes, **given), keys, values))

    if "cache_seqlens" not in options:
        options["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    if paged:
        options["block_table"] = PAGED
    if rotary:
        options |= {"rotary_cos": ANGLES.cos(), "rotary_sin": ANGLES.sin()}
    if n_new:
        options |= {"k": new[0], "v": new[1]}
    before = [cache.isnan().sum().item() for cache in caches]
    moved = [cache.to(path.device) for cache in caches]
    on = {k: v.to(path.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    out, lse = flash_attn_with_kvcache(q.to(path.device), *moved, return_softmax_lse=True, **on)
    torch.testing.assert_close(out.cpu(), torch.cat([e[0] for e in expected]), atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(lse.cpu(), torch.cat([e[1] for e in expected]), atol=2e-6, rtol=2e-5)
    for kind, cache in enumerate(moved):
        cache = cache.cpu()
        for n in range(2):
            found = row(cache, n)[pads[n] : lengths[n] + n_new]
            torch.testing.assert_close(found, expected[n][2 + kind][0], atol=1e-6, rtol=1e-6)
        assert cache.isnan().sum() == before[kind] - 2 * n_new * 2 * 16  # nothing else was written


def test_varlen_over_pages(path):
    """Queries of two sequences over pages, with their lengths as flash-attn wants them."""
    k, v = (torch.randn(7, 8, 2, 16) for _ in range(2))
    q = torch.randn(5, 4, 16)
    cu_q, cu_k = (torch.tensor([0, *x], dtype=torch.int32) for x in ((3, 5), (19, 32)))
    keys, values = (
        torch.cat([t[PAGED[0].long()].flatten(0, 1)[:19], t[PAGED[1, :2].long()].flatten(0, 1)[:13]]) for t in (k, v)
    )
    expected = formula_varlen(q, keys, values, [3, 2], [19, 13], causal=True)
    on = [t.to(path.device) for t in (q, k, v, cu_q, cu_k)]
    out, lse, _ = flash_attn_varlen_func(
        *on, 3, 19, causal=True, block_table=PAGED.to(path.device), return_attn_probs=True
    )
    torch.testing.assert_close(out.cpu(), expected[0], atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(lse.cpu(), expected[1], atol=2e-6, rtol=2e-5)


TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,"
    " deterministic=False, return_attn_probs=False"
)
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {TAIL})",
    "flash_attn_kvpacked_func": f"(q, kv, {TAIL})",
    "flash_attn_qkvpacked_func": f"(qkv, {TAIL})",
    "flash_attn_varlen_func": (
        f"(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {TAIL}, block_table=None)"
    ),
    "flash_attn_varlen_kvpacked_func": f"(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, {TAIL})",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {TAIL})",
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,"
        " cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,"
        " window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,"
        " return_softmax_lse=False)"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_flash_attns(name):
    """Of versions 2.7.4 to 2.8.4."""
    signature = inspect.signature(getattr(flash_attn, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


Q, K, V = (torch.zeros(2, 6, n, 16) for n in (4, 2, 2))
KV, QKV = torch.stack((K, V), 2), torch.zeros(2, 6, 3, 4, 16)
CU = torch.tensor([0, 2, 6], dtype=torch.int32)


def varlen(q=Q[0], k=K[0], v=V[0], cu_q=CU, cu_k=CU, max_q=4, max_k=4, **options):
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, **options)


N, COS, PAGES = torch.ones(2, dtype=torch.int32), torch.ones(9, 4), torch.zeros(2, 1, dtype=torch.int32)


def kvcache(q=Q, k_cache=K, v_cache=V, **options):
    return flash_attn_with_kvcache(q, k_cache, v_cache, **options)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            ValueError,
            r"^q must be \(batch, seqlen_q, nheads, headdim\), got shape \(6, 4, 16\)",
            lambda: flash_attn_func(Q[0], K, V),
        ),
        (
            ValueError,
            r"^k must be \(batch=2, seqlen_k, nheads_k, headdim=16\), got shape \(1,",
            lambda: flash_attn_func(Q, K[:1], V),
        ),
        (ValueError, r"^k must .*headdim=16\), got shape \(2, 6, 2, 8\)", lambda: flash_attn_func(Q, K[..., :8], V)),
        (
            ValueError,
            r"^v must be \(batch=2, seqlen_k=6, nheads_k=2, headdim_v\), got",
            lambda: flash_attn_func(Q, K, V[:, :5]),
        ),
        (ValueError, "multiple of key's: got 3 and 2", lambda: flash_attn_func(Q[:, :, :3], K, V)),
        (TypeError, "float16.* got torch.int64", lambda: flash_attn_func(Q.long(), K.long(), V.long())),
        (TypeError, "key must be torch.float32", lambda: flash_attn_func(Q, K.half(), V)),
        (TypeError, r"^k must be a tensor .*got list", lambda: flash_attn_func(Q, [1.0], V)),
        (
            ValueError,
            r"^kv must be \(batch=2, seqlen_k, 2, nheads_k, headdim=16\), got",
            lambda: flash_attn_kvpacked_func(Q, QKV),
        ),
        (ValueError, r"^kv must be .*headdim=16\), got", lambda: flash_attn_kvpacked_func(Q, KV[..., :8])),
        (
            ValueError,
            r"^qkv must be \(batch, seqlen, 3, nheads, headdim\), got shape \(2, 6, 2,",
            lambda: flash_attn_qkvpacked_func(KV),
        ),
        (ValueError, "^softmax_scale must be finite.* got nan", lambda: flash_attn_func(Q, K, V, 0, float("nan"))),
        (ValueError, "^dropout_p must be .* got 1", lambda: flash_attn_func(Q, K, V, 1.0)),
        (ValueError, "^softcap must be .* got inf", lambda: flash_attn_func(Q, K, V, softcap=INF)),
        (ValueError, "^window_size must be a pair.* got 3", lambda: flash_attn_func(Q, K, V, window_size=3)),
        (ValueError, r"^window_size must .* got \(-2, 0\)", lambda: flash_attn_func(Q, K, V, window_size=(-2, 0))),
        (
            ValueError,
            r"^alibi_slopes must have the shape \(4,\) or \(2, 4\)",
            lambda: flash_attn_func(Q, K, V, alibi_slopes=SLOPES[:2]),
        ),
        (ValueError, r"^q must be \(total_q, nheads, headdim\), got shape \(2, 6, 4, 16\)", lambda: varlen(q=Q)),
        (ValueError, r"^k must be \(total_k, nheads_k, headdim=16\), got shape", lambda: varlen(k=K)),
        (ValueError, r"^v must be \(total_k=6, nheads_k=2, headdim_v\), got", lambda: varlen(v=V[0, :5])),
        (TypeError, r"^cu_seqlens_q must be a tensor \(batch\+1\), got NoneType", lambda: varlen(cu_q=None, cu_k=None)),
        (ValueError, r"^cu_seqlens_k must be \(batch\+1=3\), got shape \(2,\)", lambda: varlen(cu_k=CU[::2])),
        (ValueError, "^cu_seqlens_q must be int32 .*got torch.int64", lambda: varlen(cu_q=CU.long())),
        (ValueError, r"^cu_seqlens_k must start at 0.* 6 tokens given, got \[0, 4, 12\]", lambda: varlen(cu_k=2 * CU)),
        (ValueError, "^max_seqlen_q is 3, the longest .* 4", lambda: varlen(max_q=3)),
        (
            NotImplementedError,
            "^dropout_p must be 0 with block_table",
            lambda: varlen(block_table=PAGES, dropout_p=0.1),
        ),
        (
            ValueError,
            r"^k must be \(n_blocks, block_size, nheads_k, headdim=16\)",
            lambda: varlen(k=K[0], block_table=PAGES),
        ),
        (
            ValueError,
            r"^cache_leftpad must be None with block_table",
            lambda: kvcache(block_table=PAGES, cache_leftpad=N),
        ),
        (ValueError, r"^cache_seqlens must be int32 of shape \(2,\)", lambda: kvcache(cache_seqlens=N.long())),
        (ValueError, r"^k and v must be given together", lambda: kvcache(k=K)),
        (ValueError, r"^rotary_cos must be None without k and v", lambda: kvcache(rotary_cos=COS, rotary_sin=COS)),
        (ValueError, r"^cache_seqlens with the tokens of k must be at most 6", lambda: kvcache(k=K, v=V)),
        (
            ValueError,
            r"^k_cache must have a row for each of the 2 sequences",
            lambda: kvcache(k_cache=K[:1], v_cache=V[:1]),
        ),
        (
            ValueError,
            r"^kv must be \(total_k, 2, nheads_k, headdim=16\), got",
            lambda: flash_attn_varlen_kvpacked_func(Q[0], KV, CU, CU, 4, 4),
        ),
        (
            ValueError,
            r"^qkv must be \(total, 3, nheads, headdim\), got",
            lambda: flash_attn_varlen_qkvpacked_func(QKV, CU, 4),
        ),
        (
            TypeError,
            r"^cu_seqlens must be a tensor \(batch\+1\), got list",
            lambda: flash_attn_varlen_qkvpacked_func(QKV[0], [0, 6], 6),
        ),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()
