"""lmops.sample, filter_logits and verify_draft: the reference, the CPU implementation and the kernels."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lmops
from lmops.modules import Sampler
from lmops.ops.sampling import _draw_unfiltered, filter_op, sample_op, sampling_tile, verify_op
from lmops.reference import sampling as reference
from lmops.testing import LAYOUTS, arrange, assert_accurate, implementation

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TO_FLOAT32 = 2.0**-20  # the share of the mass to which float32 weights meet top_p
FILTERS = (
    {},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.9},
    {"top_p": 0.95, "min_p": 0.02, "temperature": 0.7},
    {"top_k": 12, "top_p": 0.7, "min_p": 0.01, "temperature": 1.6},
)


def columns(n_rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Parameters as the reference takes them, with float32's value where they are not whole."""
    fp32 = [torch.as_tensor(v, dtype=torch.float32).double().expand(n_rows) for v in (temperature, top_p, min_p)]
    return fp32[0], torch.as_tensor(top_k).expand(n_rows), fp32[1], fp32[2]


def bounds(x, **parameters):
    """The exact sets for filters a little stricter and a little looser, by what float32 weights can be wrong."""
    t, k, p, m = columns(x.shape[0], **parameters)
    x = reference.adjust(x.double())
    inner = reference.kept(x, t, k, torch.where(p < 1, p * (1 - TO_FLOAT32), p), m * (1 + TO_FLOAT32 * (m < 1)))
    outer = reference.kept(x, t, k, torch.where(p < 1, (p * (1 + TO_FLOAT32)).clamp(max=1), p), m * (1 - TO_FLOAT32))
    return inner, outer


def awkward(n_rows, n_cols, scale=3.0):
    """Logits with ties, duplicates and -inf; the first row has nothing special."""
    x = torch.randn(n_rows, n_cols) * scale
    for row in range(1, n_rows):
        kind = row % 4
        if kind == 1:
            x[row] = x[row].round()
        elif kind == 2:
            x[row, torch.rand(n_cols) < 0.3] = -INF
        elif kind == 3:
            x[row] = x[row, 0]
    return x


def on(device, parameters):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in parameters.items()}


def same_as_on_the_cpu(function, path, *args, **parameters):
    """The result on the path, once it was compared bit by bit with that of the torch implementation."""
    if path.kind == "torch":
        return function(*args, **parameters)
    with implementation("torch"):
        expected = function(*args, **parameters)
    actual = function(*(a.to(path.device) for a in args), **on(path.device, parameters))
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and not a.is_floating_point():
            assert torch.equal(a.cpu(), b)
    return actual


def chi_square(tokens, probabilities):
    """The chance of tokens at least as far from the distribution (V,); cells of few are put together."""
    counts = torch.bincount(tokens, minlength=probabilities.shape[0]).double()
    assert (counts[probabilities == 0] == 0).all()
    expected = probabilities * tokens.numel()
    few = expected < 10
    counts = torch.cat([counts[~few], counts[few].sum()[None]])
    expected = torch.cat([expected[~few], expected[few].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor(max(1, len(counts) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(degrees, statistic / 2).item()


# -------------------------------------------------------------------------------------------------- the arithmetic


def test_noise_is_gumbels():
    edges = torch.arange(4096)
    words = torch.cat([edges, torch.randint(0, 1 << 32, (1 << 18,)), (1 << 32) - 1 - edges])
    g = reference.gumbel(words)
    u, rest = (words.double() + 0.5) / 2**32, (((1 << 32) - 1 - words).double() + 0.5) / 2**32
    exact = -(-torch.where(u < 0.5, u.log(), torch.log1p(-rest))).log()
    assert_accurate(g, exact, (-(-torch.where(u < 0.5, u.log(), torch.log1p(-rest))).float().log()))
    assert -3.14 < g.min() < g.max() < 22.88


def test_functions_are_accurate():
    y = -torch.rand(1 << 16) * 60
    assert ((reference.exp2(y).double() / torch.exp2(y.double()) - 1).abs() < 2.0**-22).all()
    assert reference.exp2(torch.zeros(1)).item() == 1
    x = torch.exp((torch.rand(1 << 16) - 0.5) * 160)
    assert_accurate(reference.ln(x), x.double().log(), x.log())
    assert reference.ln(torch.ones(1)).item() == 0
    assert reference.weights(torch.tensor([0.0, -40.0, -41.0, -INF])).tolist() == [1 << 40, 1, 0, 0]


def test_kernel_has_the_same_bits(path):
    """Everything that decides is equal bit by bit: noise, weights and logarithms, over many values."""
    same_as_on_the_cpu(lmops.sample, path, torch.zeros(1, 4), seed=1)
    if path.kind == "torch":
        return
    from sampling_probe import noise_kernel, probe_kernel

    n, block = 1 << 14, 1 << 12
    edges = torch.arange(1024)
    word = torch.cat([edges, (1 << 32) - 1 - edges, torch.randint(0, 1 << 32, (n - 2048,))])
    y = torch.cat([-torch.rand(n - 4) * 70, torch.tensor([0.0, -1.0, -64.0, -INF])])
    x = torch.exp((torch.rand(n) - 0.5) * 160)
    to = path.device
    results = [torch.zeros(n, dtype=d, device=to) for d in (torch.float32, torch.float32, torch.int64, torch.float32)]
    words = torch.where(word < 1 << 31, word, word - (1 << 32)).to(torch.int32)
    probe_kernel[(n // block,)](
        words.to(to), y.to(to), x.to(to), *results, BLOCK=block, enable_fp_fusion=False
    )  # fmt: skip
    expected = reference.gumbel(word), reference.exp2(y), reference.weights(y), reference.ln(x)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a.cpu(), b)

    by_tile, by_id = torch.zeros(n, device=to), torch.zeros(n, device=to)
    seed, offset = -(1 << 61) - 12345, (1 << 40) + 7
    noise_kernel[(n // block,)](by_tile, by_id, seed, offset, BLOCK=block, enable_fp_fusion=False)
    seed, offset = torch.tensor([[seed]]), torch.tensor([[offset]])
    assert torch.equal(by_tile.cpu(), reference.noise_of_all(n, seed, offset, 0)[0])
    assert torch.equal(by_id.cpu(), reference.noise(torch.arange(n)[None], seed, offset, 0)[0])


@pytest.mark.parametrize("scale", [0, 1e-3, 3, 1e4, 1e38])
def test_the_cpu_finds_the_largest_of_all_noise(scale):
    """It forms the noise of few tokens only: with many rows, equal logits, and words from both ends of their range."""
    z = torch.cat([torch.randn(400, 3_000), awkward(200, 3_000)]) * scale
    z = z.nan_to_num(neginf=-INF)
    z[:, :5] = -INF
    words = torch.randint(0, 1 << 32, z.shape)
    words[1::3] = torch.randint(0, 300, words[1::3].shape)
    words[2::3] = (1 << 32) - 1 - torch.randint(0, 300, words[2::3].shape)
    assert torch.equal(_draw_unfiltered(z, words), (z + reference.gumbel(words)).argmax(-1))


# ------------------------------------------------------------------------------------------------- what may be drawn


@pytest.mark.parametrize("n_cols", [1, 2, 5, 37, 1003])
def test_filters_keep_the_exact_set(path, n_cols):
    x = awkward(8 if path.kind == "torch" else 4, n_cols)
    for parameters in (*FILTERS, {"top_k": 1}, {"top_k": n_cols + 5}, {"top_p": 1e-6}, {"min_p": 1.0}):
        if path.kind == "triton" and parameters not in FILTERS[:5]:
            continue
        kept = lmops.filter_logits(x.to(path.device), **parameters).cpu()
        inner, outer = bounds(x, **parameters)
        assert ((kept > -INF) >= inner).all()
        assert ((kept > -INF) <= outer).all()
        assert torch.equal(kept[kept > -INF], x[kept > -INF])


def test_parameters_a_row(path):
    x = awkward(6, 300)
    parameters = {
        "temperature": torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 1.0]),
        "top_k": torch.tensor([0, 3, 5, 0, 1000, 0]),
        "top_p": torch.tensor([0.5, 0.1, 1.0, 0.99, 0.7, 1.0]),
        "min_p": torch.tensor([0.0, 0.3, 0.1, 0.0, 0.0, 0.0]),
    }
    kept = lmops.filter_logits(x.to(path.device), **on(path.device, parameters)).cpu() > -INF
    inner, outer = bounds(x, **parameters)
    assert (kept >= inner).all()
    assert (kept <= outer).all()
    offsets = torch.arange(6)
    s = same_as_on_the_cpu(lmops.sample, path, x, seed=offsets * 7, offset=offsets, **parameters)
    assert outer.gather(1, s.tokens[:, None].cpu()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_are_members(path, dtype):
    n_rows = 500 if path.kind == "torch" else 4
    x = (torch.randn(n_rows, 130) * 3).to(dtype)
    x[:, 7] = x[:, 11]
    for i, parameters in enumerate(FILTERS):
        if path.kind == "torch" or i in (0, 4, 6):
            s = same_as_on_the_cpu(lmops.sample, path, x, seed=5, offset=torch.arange(n_rows), **parameters)
            assert s.valid.all()
            assert bounds(x, **parameters)[1].gather(1, s.tokens[:, None].cpu()).all()


@pytest.mark.parametrize("parameters", FILTERS, ids=str)
def test_distribution(path, parameters):
    """100,000 draws against the exact distribution; where kernels are simulated, as many as to compare with these."""
    fast = path.kind == "torch" or path.device == "cuda"
    n_rows = 100_000 if fast else 6
    x = torch.randn(30, generator=torch.Generator().manual_seed(3)) * 2
    rows = x.expand(n_rows, 30)
    exact = reference.probabilities(x[None].double(), *columns(1, **parameters))[0]
    tokens = same_as_on_the_cpu(
        lmops.sample, path, rows, seed=11, offset=torch.arange(n_rows), **parameters
    ).tokens.cpu()
    assert (exact[tokens] > 0).all()
    if fast:
        assert chi_square(tokens, exact) > 1e-3


def test_neighbouring_seeds_are_not_alike():
    x = torch.randn(30)
    tokens = lmops.sample(x.expand(100_000, 30), seed=torch.arange(100_000)).tokens
    assert chi_square(tokens, torch.softmax(x.double(), -1)) > 1e-3


def test_chi_square_would_notice():
    p = torch.softmax(torch.randn(30), -1).double()
    draw = torch.multinomial(p, 100_000, replacement=True)
    assert chi_square(draw, p) > 1e-3
    shifted = p + 0.05 * (p.roll(1) - p)
    assert chi_square(draw, shifted) < 1e-6


def test_penalties_bias_and_mask_shift_the_distribution():
    n_rows, n_cols = 100_000, 12
    g = torch.Generator().manual_seed(1)
    x, bias = torch.randn(n_cols, generator=g), torch.randn(n_cols, generator=g)
    counts = torch.randint(0, 3, (n_cols,), generator=g).int()
    allowed = torch.arange(n_cols) != 4
    adjusted = torch.where(allowed, (x + bias).double(), -INF)
    penalized = torch.where(adjusted > 0, adjusted / 1.3, adjusted * 1.3) - 0.4 - 0.25 * counts
    adjusted = torch.where(counts > 0, penalized, adjusted)
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.25}
    shifts = {"token_counts": counts.expand(n_rows, -1), "logit_bias": bias, "allowed_mask": allowed}
    s = lmops.sample(x.expand(n_rows, -1), temperature=0.8, seed=2, offset=torch.arange(n_rows), **shifts, **penalties)
    assert chi_square(s.tokens, torch.softmax(adjusted / 0.8, -1)) > 1e-3


@pytest.mark.parametrize("n_cols", [1, 9, 1003, 5000])
def test_same_tokens_with_every_feature(path, n_cols):
    n_rows = 4
    x = awkward(n_rows, n_cols)
    every = {
        "token_counts": torch.randint(0, 3, (n_rows, n_cols), dtype=torch.int32),
        "logit_bias": torch.randn(n_cols),
        "allowed_mask": torch.rand(n_rows, n_cols) > 0.2,
        "repetition_penalty": torch.tensor([1.0, 1.3, 0.7, 2.0]),
        "presence_penalty": 0.2,
        "frequency_penalty": -0.1,
        "offset": torch.arange(n_rows) << 33,
    }
    for filters in ({}, {"temperature": 0.0}, {"top_p": 0.9, "top_k": 40, "temperature": 0.9}):
        s = same_as_on_the_cpu(lmops.sample, path, x, seed=(1 << 64) - 3, **every, **filters)
        assert ((s.tokens >= 0) & (s.tokens < n_cols)).all()
        assert every["allowed_mask"].gather(1, s.tokens[:, None].cpu())[s.valid.cpu()].all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(path, layout):
    x = arrange(torch.randn(3, 77).half(), layout)
    mask = arrange(torch.rand(3, 77).half(), layout) > 0.3
    same_as_on_the_cpu(lmops.sample, path, x, seed=1, allowed_mask=mask)
    kept = lmops.filter_logits(x.to(path.device), top_k=4).cpu()
    assert torch.equal(kept > -INF, bounds(x, top_k=4)[0])


def test_rows_may_begin_anywhere(path):
    """A row alone, rows with padding between, and rows and memory that begin at no multiple of 16 bytes."""
    n = 259
    memory = (torch.randn(3, 272) * 3).bfloat16().to(path.device)
    for x in (memory[:1, :n], memory[:, :n], memory.flatten()[: 3 * n].view(3, n), memory[:, 1 : n + 1]):
        for filters in ({}, {"top_k": 30, "logit_bias": memory[0, :n]}):
            with implementation("torch"):
                expected = lmops.sample(x.cpu(), seed=3, **on("cpu", filters)).tokens
            assert torch.equal(lmops.sample(x, seed=3, **filters).tokens.cpu(), expected)
        assert torch.equal(lmops.filter_logits(x, top_k=9).cpu() > -INF, bounds(x.cpu().float(), top_k=9)[0])


def test_greedy(path):
    x = awkward(8, 515)
    x[4, [100, 200, 514]] = 50.0
    x[5] = -1.0
    x[5, 2], x[5, 3] = -0.0, 0.0
    x[6, [40, 50]] = INF
    expected = x.argmax(-1)
    for temperature in (0, 1e-6, torch.zeros(8)):
        s = lmops.sample(x.to(path.device), **on(path.device, {"temperature": temperature}), seed=1, top_k=3)
        assert torch.equal(s.tokens.cpu(), expected)


def test_a_draw_depends_on_its_row_alone(path):
    x = torch.randn(5, 200)
    seeds, offsets = torch.tensor([4, 4, 9, -1, 4]), torch.tensor([0, 1, 2, 1 << 35, 0])
    to = path.device
    every = lmops.sample(x.to(to), seed=seeds.to(to), offset=offsets.to(to)).tokens.cpu()
    for row in range(5):
        alone = lmops.sample(x[row].to(to), seed=int(seeds[row]), offset=int(offsets[row]))
        assert alone.tokens.shape == ()
        assert alone.tokens.item() == every[row]
    again = lmops.sample(x[:1].expand(2, -1).to(to), seed=4, offset=torch.tensor([0, 1], device=to)).tokens.cpu()
    assert again[0] == every[0]


def test_bad_rows(path):
    """NaN anywhere that counts, or nothing finite: the flag, and token 0; a mask hides NaN."""
    x = torch.randn(7, 600)
    x[1, 3] = NAN
    x[2] = -INF
    x[3, 5] = NAN
    x[4, [7, 9]] = INF
    x[5] = -3e38
    x[6] = 3e38
    allowed = torch.ones(7, 600, dtype=torch.bool)
    allowed[3, 5] = False
    for filters in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}):
        s = same_as_on_the_cpu(lmops.sample, path, x, seed=3, offset=1, allowed_mask=allowed, **filters)
        assert s.valid.tolist() == [True, False, False, True, True, True, True]
        assert s.tokens[[1, 2]].tolist() == [0, 0]
        assert s.tokens[4] == 7


def test_values_on_a_gpu_read_nothing_outside(path):
    """What a kernel cannot refuse, it brings into range: a temperature that is not allowed makes the row not valid."""
    if path.kind == "torch":
        with pytest.raises(ValueError, match="top_p must be above 0 and at most 1, got -1"):
            lmops.sample(torch.randn(1, 5), seed=1, top_p=torch.tensor([-1.0]))
        return
    x = torch.randn(5, 300)
    bad = {
        "temperature": torch.tensor([1.0, NAN, -1.0, INF, 1.0]),
        "top_k": torch.tensor([-5, 0, 0, 0, 1 << 40]),
        "top_p": torch.tensor([-1.0, 1.0, 1.0, 1.0, NAN]),
        "min_p": torch.tensor([0.0, 0.0, 0.0, 0.0, 7.0]),
    }
    s = lmops.sample(x.to(path.device), seed=1, **on(path.device, bad))
    assert s.valid.tolist() == [True, False, False, False, True]
    assert s.tokens[[0, 4]].tolist() == x[[0, 4]].argmax(-1).tolist()
    assert (s.tokens[1:4] == 0).all()


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}], ids=str)
def test_logprobs(path, filters):
    x = torch.randn(4, 1003).half() * 4
    s = same_as_on_the_cpu(
        lmops.sample, path, x, seed=1, offset=2, temperature=0.5, return_logprobs=3, logit_bias=torch.randn(1003),
        **filters,
    )  # fmt: skip
    truth, baseline = torch.log_softmax(x.double(), -1), torch.log_softmax(x.float(), -1)
    tokens = s.tokens[:, None].cpu()
    assert_accurate(s.logprobs.cpu(), truth.gather(1, tokens)[:, 0], baseline.gather(1, tokens)[:, 0])
    assert_accurate(s.top_logprobs.cpu(), truth.topk(3).values, baseline.topk(3).values)
    assert torch.equal(x.gather(1, s.top_tokens.cpu()), x.topk(3).values)
    assert lmops.sample(x.to(path.device), seed=1).logprobs is None


def test_flat_rows_fill_the_list(path, monkeypatch):
    """Large nuclei of flat rows, and a launch for each of several groups of rows."""
    monkeypatch.setattr("lmops.ops.sampling.LISTS_AT_ONCE", 20_000)
    x = (torch.rand(3, 9001) * 0.01).bfloat16().float()
    for parameters in ({"top_p": 0.99}, {"top_k": 8951, "top_p": 0.98}):
        s = same_as_on_the_cpu(lmops.sample, path, x, seed=1, offset=torch.arange(3), **parameters)
        assert bounds(x, **parameters)[1].gather(1, s.tokens[:, None].cpu()).all()
    kept = lmops.filter_logits(x.to(path.device), top_k=8000).cpu()
    assert torch.equal(kept > -INF, bounds(x, top_k=8000)[0])


def test_short_and_long_lists(path):
    """256 entries are ranked, more are bisected; most of them are equal, so the last ones that are kept are ties."""
    x = torch.randint(0, 5, (2, 700)).float()
    x[1, 300:] -= 100
    for parameters in ({"top_k": 256}, {"top_k": 40, "top_p": 0.6}, {"top_k": 400, "top_p": 0.8}):
        kept = lmops.filter_logits(x.to(path.device), **parameters).cpu()
        inner, outer = bounds(x, **parameters)
        assert ((kept > -INF) >= inner).all()
        assert ((kept > -INF) <= outer).all()
        same_as_on_the_cpu(lmops.sample, path, x, seed=3, offset=torch.arange(2), **parameters)


def test_longest_row(path):
    x = torch.randn(1, 262_144).bfloat16() * 2
    for parameters in ({}, {"top_k": 50, "top_p": 0.9}):
        s = same_as_on_the_cpu(lmops.sample, path, x, seed=9, **parameters)
        assert bounds(x, **parameters)[1][0, s.tokens.item()]


def test_empty(path):
    s = lmops.sample(torch.empty(0, 5, device=path.device), seed=1, return_logprobs=2, top_k=2)
    assert s.tokens.shape == (0,)
    assert s.top_logprobs.shape == (0, 2)
    assert lmops.filter_logits(torch.empty(0, 5, device=path.device), top_k=2).shape == (0, 5)
    v = lmops.verify_draft(torch.empty(0, 3, 5, device=path.device), torch.empty(0, 2, dtype=torch.int64), seed=1)
    assert v.tokens.shape == (0, 3)


# ----------------------------------------------------------------------------------------------------------- drafts


def drafted(n_rows, n_drafts, n_cols, spread, seed=0):
    """Logits of the target (B, K + 1, V) and of a draft that is like it, and tokens drawn from the draft."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randn(n_drafts + 1, n_cols, generator=g) * 1.5
    draft = target[:-1] + spread * torch.randn(n_drafts, n_cols, generator=g)
    tokens = torch.multinomial(torch.softmax(draft, -1), n_rows, replacement=True, generator=g).T
    return target.expand(n_rows, -1, -1), draft.expand(n_rows, -1, -1), tokens


@pytest.mark.parametrize("with_logits", [True, False])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.8, "temperature": 0.7}], ids=str)
def test_verified_tokens_are_the_targets(path, with_logits, filters):
    """The first two tokens, together, are distributed as the target's: here its logits do not depend on the drafts."""
    fast = path.kind == "torch" or path.device == "cuda"
    n_rows = 100_000 if fast else 5
    target, draft, drafts = drafted(n_rows, 3, 6, spread=1.0)
    if with_logits and filters:
        t = filters.get("temperature", 1.0)
        of_draft = lmops.filter_logits(draft[0].to(path.device), **filters).cpu()
        p = torch.softmax(of_draft / t, -1)
        drafts = torch.multinomial(p, n_rows, replacement=True, generator=torch.Generator().manual_seed(1)).T
        draft = of_draft.expand(n_rows, -1, -1)
    drafts_of = (target, drafts, draft) if with_logits else (target, drafts)
    offsets = 4 * torch.arange(n_rows)
    v = same_as_on_the_cpu(lmops.verify_draft, path, *drafts_of, seed=7, offset=offsets, **filters)
    tokens, counts = v.tokens.cpu(), v.counts.cpu()
    assert v.valid.all()
    position = torch.arange(4)
    assert torch.equal(tokens >= 0, position <= counts[:, None])
    before = (position[:3] < counts[:, None]) & (tokens[:, :3] != drafts)
    assert not before.any()
    if fast:
        exact = reference.probabilities(target[0].double(), *columns(4, **filters))
        assert chi_square(tokens[:, 0], exact[0]) > 1e-3
        two = tokens[counts >= 1]
        # whether there is a second token depends on the first: its acceptance
        share = torch.bincount(two[:, 0], minlength=6) / len(two)
        joint = (share[:, None].double() * exact[1]).flatten()
        assert chi_square(two[:, 0] * 6 + two[:, 1], joint) > 1e-3


def test_drafts_like_the_target_are_accepted(path):
    target, _, drafts = drafted(40 if path.kind == "torch" else 4, 3, 50, spread=0.0)
    v = lmops.verify_draft(target.to(path.device), drafts.to(path.device), target[:, :3].to(path.device), seed=1)
    assert (v.counts == 3).all()


def test_greedy_drafts(path):
    x = torch.randn(4, 4, 90)
    drafts = x[:, :3].argmax(-1)
    drafts[1, 1] += 1 if drafts[1, 1] < 89 else -1
    drafts[2, 0] = -7
    drafts[3, 2] = 1 << 20
    lens = torch.tensor([3, 3, 3, 2])
    v = same_as_on_the_cpu(lmops.verify_draft, path, x, drafts, seed=1, temperature=0.0, draft_lens=lens)
    assert v.counts.tolist() == [3, 1, 0, 2]
    for row, n in enumerate(v.counts.tolist()):
        assert torch.equal(v.tokens[row, : n + 1].cpu(), x[row, : n + 1].argmax(-1))
        assert (v.tokens[row, n + 1 :] == -1).all()


def test_verification_of_bad_rows(path):
    target, draft, drafts = (t.clone() for t in drafted(4, 2, 40, spread=0.5))
    target[1, 0, 3] = NAN
    target[2] = -INF
    draft[3] = NAN
    lens = torch.tensor([2, 2, 2, 1 << 20])
    v = same_as_on_the_cpu(lmops.verify_draft, path, target, drafts, draft, seed=1, draft_lens=lens)
    assert v.valid.tolist() == [True, False, False, False]
    assert v.counts[1:].tolist() == [0, 0, 0]
    assert v.tokens[1:, 0].tolist() == [0, 0, 0]


def test_no_drafts_is_a_draw(path):
    x = torch.randn(3, 1, 70)
    v = same_as_on_the_cpu(lmops.verify_draft, path, x, torch.empty(3, 0, dtype=torch.int64), seed=1)
    assert v.counts.tolist() == [0, 0, 0]
    assert (v.tokens >= 0).all()


# ------------------------------------------------------------------------------------------------ torch, and errors


@pytest.mark.fake_tensors
def test_opcheck(path):
    x = torch.randn(3, 20, device=path.device)
    rows = torch.ones(3, device=path.device)
    numbers = [0.7, 5.0, 0.9, 0.0, 1.0, 0.0, 0.0]
    torch.library.opcheck(sample_op, (x, [None] * 9, numbers, 1, 2, None, None, None, 2))
    torch.library.opcheck(sample_op, (x, [rows, *[None] * 7, rows.long()], numbers, 1, 0, x.int(), x[0], x > 0, 0))
    torch.library.opcheck(filter_op, (x, [None, None, rows / 2, None], numbers[:4]))
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=path.device)
    for draft in (None, x[None, :2]):
        torch.library.opcheck(verify_op, (x[None], tokens, draft, [None] * 4, 1.0, 1, 2))


@pytest.mark.fake_tensors
def test_compile_fullgraph(path):
    def draw(x, t, offset):
        s = lmops.sample(x, temperature=t, top_k=5, seed=1, offset=offset, return_logprobs=1)
        v = lmops.verify_draft(x[:, None].expand(-1, 3, -1), s.top_tokens.expand(-1, 2), seed=offset)
        return s.tokens, v.tokens, lmops.filter_logits(x, top_p=0.9)

    x, t = torch.randn(2, 33, device=path.device), torch.rand(2, device=path.device)
    compiled = torch.compile(draw, fullgraph=True)
    for offset in (torch.tensor([1, 2], device=path.device), torch.tensor([3, 4], device=path.device)):
        for a, b in zip(compiled(x, t, offset), draw(x, t, offset), strict=True):
            assert torch.equal(a, b)


def test_no_gradient_is_asked_for(path):
    x = torch.randn(2, 9, device=path.device, requires_grad=True)
    s = lmops.sample(x, seed=1, return_logprobs=1)
    assert not s.logprobs.requires_grad


def test_module(path):
    bias = torch.randn(33)
    sampler = Sampler(torch.tensor([0.5, 1.0]), top_k=4, logit_bias=bias, return_logprobs=1).to(path.device)
    x = torch.randn(2, 33, device=path.device)
    parameters = on(path.device, {"temperature": torch.tensor([0.5, 1.0]), "logit_bias": bias})
    expected = lmops.sample(x, seed=3, offset=8, top_k=4, return_logprobs=1, **parameters)
    for a, b in zip(sampler(x, seed=3, offset=8), expected, strict=True):
        assert torch.equal(a, b)
    assert "top_k=4" in repr(sampler)
    assert not sampler.state_dict()


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", NAN),
        ("temperature", INF),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", NAN),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -2.0),
        ("presence_penalty", NAN),
        ("frequency_penalty", INF),
    ],
)  # fmt: skip
def test_bad_values(name, value, tensor):
    counts = torch.ones(2, 5, dtype=torch.int32)
    value = torch.tensor([value, value]) if tensor else value
    with pytest.raises(ValueError, match=f"{name} must be .*, got"):
        lmops.sample(torch.randn(2, 5), seed=1, token_counts=counts, **{name: value})


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "logits must be float32.*float64", lambda x: lmops.sample(x.double(), seed=1)),
        (ValueError, r"logits must be \(B, V\)", lambda x: lmops.sample(x[None], seed=1)),
        (ValueError, r"V from 1", lambda x: lmops.sample(x[:, :0], seed=1)),
        (ValueError, r"one a row, \(3,\), got \(2,\)", lambda x: lmops.sample(x, seed=1, top_p=torch.ones(2))),
        (TypeError, "top_k must be .*int32 or int64", lambda x: lmops.sample(x, seed=1, top_k=torch.ones(3))),
        (TypeError, "top_k must be an integer", lambda x: lmops.sample(x, seed=1, top_k=2.5)),
        (TypeError, "top_p must be .*floating", lambda x: lmops.sample(x, seed=1, top_p=torch.ones(3).int())),
        (TypeError, "top_p must be a number or a tensor", lambda x: lmops.sample(x, seed=1, top_p=None)),
        (ValueError, "token_counts must be given", lambda x: lmops.sample(x, seed=1, repetition_penalty=1.2)),
        (ValueError, "token_counts must be given", lambda x: lmops.sample(x, seed=1, presence_penalty=torch.ones(3))),
        (TypeError, "seed must be", lambda x: lmops.sample(x, seed=torch.ones(3))),
        (TypeError, "seed must be an integer", lambda x: lmops.sample(x, seed=1.5)),
        (ValueError, "at most 64 bits", lambda x: lmops.sample(x, seed=1 << 64)),
        (TypeError, "token_counts must be", lambda x: lmops.sample(x, seed=1, token_counts=x)),
        (ValueError, "token_counts must be", lambda x: lmops.sample(x, seed=1, token_counts=x[:2].int())),
        (ValueError, r"\(V,\) or \(B, V\)", lambda x: lmops.sample(x, seed=1, logit_bias=torch.ones(4))),
        (TypeError, "allowed_mask must be torch.bool", lambda x: lmops.sample(x, seed=1, allowed_mask=x)),
        (ValueError, "return_logprobs must be from 0 to the 5", lambda x: lmops.sample(x, seed=1, return_logprobs=6)),
        (ValueError, r"\(B, K \+ 1, V\)", lambda x: lmops.verify_draft(x, x.long(), seed=1)),
        (ValueError, r"draft_tokens must be \(1, 2\)", lambda x: lmops.verify_draft(x[None], x.long(), seed=1)),
        (TypeError, "draft_logits", lambda x: lmops.verify_draft(x[None], torch.ones(1, 2).long(), x.int(), seed=1)),
        (ValueError, "draft_lens", lambda x: lmops.verify_draft(
            x[None], torch.ones(1, 2).long(), seed=1, draft_lens=torch.ones(3).long())),
        (ValueError, "top_p must be", lambda x: lmops.filter_logits(x, top_p=0)),
    ],
)  # fmt: skip
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 5))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(-(1 << 63), (1 << 64) - 1),
    offset=st.integers(0, (1 << 63) - 1),
    n_rows=st.integers(1, 4),
    n_cols=st.integers(1, 90),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e30]),
    temperature=st.sampled_from([0.0, 1e-4, 0.5, 1.0, 100.0]),
    top_k=st.integers(0, 100),
    top_p=st.floats(1e-6, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_any_parameters(seed, offset, n_rows, n_cols, scale, temperature, top_k, top_p, min_p):
    """On the CPU: drawn tokens are kept by the filters, which keep the exact set."""
    x = awkward(n_rows, n_cols, scale)
    parameters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    s = lmops.sample(x, seed=seed, offset=offset, **parameters)
    some = (x > -INF).any(-1)
    assert torch.equal(s.valid, some)
    kept = lmops.filter_logits(x, **parameters) > -INF
    assert kept.gather(1, s.tokens[:, None])[some].all()
    inner, outer = bounds(x, **parameters)
    assert (kept >= inner)[some].all()
    assert (kept <= outer)[some].all()


# ------------------------------------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize(("n_rows", "n_cols"), [(2, 1000), (2, 8192), (2, 32_768), (2, 50_257), (1, 50_257)])
@pytest.mark.parametrize("top_k", [0, 20])
def test_bytes_read(launches, n_rows, n_cols, top_k):
    """The logits are read once; with filters twice, where the row does not fit the registers; 16 bytes at a time."""
    x = torch.randn(n_rows, n_cols).half()
    lmops.sample(x, seed=1, top_k=top_k)
    (launch,) = launches
    reads = 1 if not top_k or sampling_tile(n_cols, True).fits else 2
    loaded, size = launch.c["global_ld_bytes"], x.numel() * x.element_size()
    if not top_k:
        assert loaded == size
    # but for rows without filters that begin in between: their noise is that of aligned fours of ids
    if top_k or n_rows == 1 or n_cols % 16 == 0:
        of_list = 80 if top_k else 0
        assert launch.c["global_ld_requests"] <= n_rows * (reads * -(-n_cols * 2 // 512) + 32 + of_list)
    # what survives the cut is a handful of 8 bytes, which every pass over it reads again
    assert loaded <= reads * size + 2 * 8 * 64 * top_k
    assert launch.c["unique_bytes_read"] <= size + 2 * 8 * 4 * top_k
    assert launch.spills == 0


@pytest.mark.parametrize("n_cols", [1, 17, 4096, 8192, 8193, 151_936, 262_144])
@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("lanes", [32, 64])
def test_tile(n_cols, filters, extras, lanes):
    tile = sampling_tile(n_cols, filters, extras, lanes)
    assert tile.fits == (tile.cols >= n_cols)
    assert tile.cols % tile.list_cols == 0
    assert math.log2(tile.cols * tile.threads).is_integer()
