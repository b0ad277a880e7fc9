"""SelfAttention and CrossAttention: against their formula in float64, against torch's layer, and as modules."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmops.models.gpt import GPT, GPTConfig
from lmops.modules import CrossAttention, SelfAttention
from lmops.modules.attention import alibi_slopes
from lmops.reference.attention import attention as reference
from lmops.testing import assert_accurate


def randomize(layer: nn.Module) -> nn.Module:
    """Every parameter random and large enough to matter; initial ones hide errors."""
    for name, parameter in layer.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    return layer


def formula(layer, state: dict[str, Tensor], x: Tensor, memory: Tensor | None = None, bias=None, slopes=None) -> Tensor:
    """The layer of (B, T, d_model), from its parameters by name, with the reference as attention."""
    H, KV, D = layer.n_heads, layer.n_kv_heads, layer.head_dim

    def project(x: Tensor, name: str, first: int, heads: int) -> Tensor:
        rows = slice(first * D, (first + heads) * D)
        y = x @ state[f"{name}.weight"][rows].T
        y = y + state[f"{name}.bias"][rows] if f"{name}.bias" in state else y
        return torch.stack([y[..., h * D : (h + 1) * D] for h in range(heads)], 1)

    if memory is None:
        q, k, v = project(x, "qkv", 0, H), project(x, "qkv", H, KV), project(x, "qkv", H + KV, KV)
    else:
        q, k, v = project(x, "q", 0, H), project(memory, "kv", 0, KV), project(memory, "kv", KV, KV)
    if "q_norm.weight" in state:
        q, k = (
            t * (t.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * state[f"{name}_norm.weight"]
            for name, t in (("q", q), ("k", k))
        )
    o, _ = reference(
        q, k, v, bias=bias, left=layer.left, right=0 if layer.causal else layer.right, softcap=layer.softcap or 0.0,
        scale=layer.scale, alibi_slopes=slopes, sinks=state.get("sinks"),
    )  # fmt: skip
    y = torch.cat([o[:, h] for h in range(H)], -1) @ state["out.weight"].T
    return y + state["out.bias"] if "out.bias" in state else y


def cast(t, dtype: torch.dtype):
    return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t


def of_formula(layer, inputs: list[Tensor], dy: Tensor, dtype: torch.dtype, lengths=None, **options) -> list[Tensor]:
    """Result, gradients of the inputs and of the parameters, in this dtype. lengths: of sequences, a list an input."""
    inputs = [t.detach().cpu().to(dtype).requires_grad_() for t in inputs]
    state = {n: p.detach().cpu().to(dtype).requires_grad_() for n, p in layer.named_parameters()}
    options = {name: cast(t, dtype) for name, t in options.items()}
    parts = [inputs] if lengths is None else zip(*map(Tensor.split, inputs, lengths, [1] * len(inputs)), strict=True)
    y = torch.cat([formula(layer, state, *part, **options) for part in parts], 1)
    return [y, *torch.autograd.grad(y, [*inputs, *state.values()], dy.cpu().to(dtype))]


def check(path, layer, inputs: list[Tensor], called: dict | None = None, **options) -> None:
    """Result and all gradients against the formula in float64. called: what the layer itself is called with."""
    layer = randomize(layer).to(path.device)
    inputs = [t.to(path.device).requires_grad_() for t in inputs]
    called = {name: t.to(path.device) if isinstance(t, Tensor) else t for name, t in (called or {}).items()}
    y = layer(*inputs, **called)
    dy = torch.randn(y.shape)
    actual = [y, *torch.autograd.grad(y, [*inputs, *layer.parameters()], dy.to(path.device))]
    truth = of_formula(layer, inputs, dy, torch.float64, **options)
    baseline = of_formula(layer, inputs, dy, torch.float32, **options)
    for a, t, b in zip(actual, truth, baseline, strict=True):
        assert t.abs().max() > 1e-3
        assert_accurate(a, t, b)


FEATURES = {
    "plain": {},
    "gqa, causal, window": {"n_kv_heads": 2, "causal": True, "window": (7, -1), "bias": False},
    "softcap, alibi": {"softcap": 2.0, "alibi": True, "head_dim": 32},
    "mqa, sinks, norm, scale": {"n_kv_heads": 1, "sinks": True, "qk_norm": True, "scale": 0.4},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_features(path, features):
    layer = SelfAttention(64, 4, **features)
    slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]) if "alibi" in features else None
    check(path, layer, [torch.randn(2, 21, 64)], slopes=slopes)


@pytest.mark.parametrize("kind", ["padding", "boolean", "float"])
def test_masks(path, kind):
    layer = SelfAttention(32, 2, causal=True)
    T = 18
    key_padding = torch.ones(2, T, dtype=torch.bool)
    key_padding[0, 11:], key_padding[1, :3] = False, False
    visible = key_padding[:, None, None]
    if kind == "padding":
        called, bias = {}, visible
    elif kind == "boolean":
        mask = torch.rand(2, T, T) < 0.7
        called, bias = {"attn_mask": mask}, visible & mask
    else:
        mask = torch.randn(T, T)
        called, bias = {"attn_mask": mask}, mask.masked_fill(~visible, -math.inf)
    check(path, layer, [torch.randn(2, T, 32)], called | {"key_padding": key_padding}, bias=bias)


@pytest.mark.parametrize(
    "features", [{}, {"n_kv_heads": 2, "alibi": [0.5, 0.1, 0.0, 0.3]}], ids=["plain", "gqa, alibi"]
)
def test_cross_attention(path, features):
    layer = CrossAttention(64, 4, 24, **features)
    key_padding = torch.arange(13).expand(2, 13) < torch.tensor([[13], [8]])
    slopes = torch.tensor(features["alibi"]) if features else None
    inputs = [torch.randn(2, 9, 64), torch.randn(2, 13, 24)]
    check(path, layer, inputs, {"key_padding": key_padding}, bias=key_padding[:, None, None], slopes=slopes)


def packed(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@pytest.mark.parametrize("longest", [{}, {"max_seqlen": 11, "max_seqlen_memory": 9}], ids=["found", "given"])
def test_packed_sequences(path, longest):
    """Each as if alone, in result and gradient."""
    lengths, memory_lengths = [5, 1, 11], [3, 9, 2]
    called = {"cu_seqlens": packed(lengths)} | {n: longest[n] for n in longest if n == "max_seqlen"}
    check(path, SelfAttention(32, 2, causal=True), [torch.randn(1, 17, 32)], called, lengths=[lengths])
    called |= {"cu_seqlens_memory": packed(memory_lengths)} | longest
    inputs = [torch.randn(1, 17, 32), torch.randn(1, 14, 24)]
    check(path, CrossAttention(32, 2, 24), inputs, called, lengths=[lengths, memory_lengths])


# ------------------------------------------------------------------------------------- torch.nn.MultiheadAttention


def masks(kind: str, Tq: int, Tk: int) -> tuple[dict, dict]:
    """The arguments of the same masks for ours and for theirs."""
    if kind == "padding":
        key_padding = torch.arange(Tk).expand(2, Tk) < torch.tensor([[Tk], [3]])
        return {"key_padding": key_padding}, {"key_padding_mask": ~key_padding}
    if kind == "boolean":
        mask = torch.rand(Tq, Tk) < 0.6
        mask[:, 0] = True
        return {"attn_mask": mask}, {"attn_mask": ~mask}
    if kind == "float, padding":
        mask = torch.randn(2, 4, Tq, Tk).double()
        ours, theirs = masks("padding", Tq, Tk)
        theirs = {"key_padding_mask": torch.zeros(2, Tk).double().masked_fill(~ours["key_padding"], -math.inf)}
        return ours | {"attn_mask": mask}, theirs | {"attn_mask": mask.flatten(0, 1)}
    return {}, {}


def compare(ours, theirs, inputs: list[Tensor], kind: str = "none", causal: bool = False) -> None:
    """Results and gradients, of inputs in the layout of `theirs`."""
    x, memory = inputs[0], inputs[-1]
    length = 1 if theirs.batch_first else 0
    options, their_options = masks(kind, x.shape[length], memory.shape[length])
    if causal:
        their_options["attn_mask"] = torch.ones(x.shape[length], memory.shape[length]).bool().triu(1)
    y = ours(*inputs, **options)
    expected, _ = theirs(x, memory, memory, **their_options)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [*inputs, *ours.parameters()], dy)
    torch.testing.assert_close(
        list(grads[: len(inputs)]), list(torch.autograd.grad(expected, inputs, dy, retain_graph=True))
    )
    of_theirs = dict(
        zip(dict(theirs.named_parameters()), torch.autograd.grad(expected, list(theirs.parameters()), dy), strict=True)
    )
    of_ours = dict(zip(dict(ours.named_parameters()), grads[len(inputs) :], strict=True))
    for kind in ("weight", "bias"):
        separate = [of_theirs.get(f"{c}_proj_{kind}") for c in "qkv"]
        merged = of_theirs.get(f"in_proj_{kind}")
        merged = torch.cat([g.flatten() for g in separate]) if merged is None and separate[0] is not None else merged
        got = [of_ours[n].flatten() for n in of_ours if n.endswith(kind) and not n.startswith("out")]
        assert (merged is None) == (not got)
        if got:
            torch.testing.assert_close(torch.cat(got), merged.flatten())
            torch.testing.assert_close(of_ours[f"out.{kind}"], of_theirs[f"out_proj.{kind}"])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["none", "padding", "boolean", "float, padding"])
def test_self_attention_from_torch(batch_first, bias, kind):
    theirs = randomize(nn.MultiheadAttention(32, 4, bias=bias, batch_first=batch_first, dtype=torch.float64))
    x = torch.randn(2, 9, 32).double()
    x = (x if batch_first else x.transpose(0, 1)).requires_grad_()
    compare(SelfAttention.from_torch(theirs), theirs, [x], kind)


def test_causal_self_attention_from_torch():
    theirs = randomize(nn.MultiheadAttention(32, 4, dtype=torch.float64))
    x = torch.randn(9, 2, 32).double().requires_grad_()
    compare(SelfAttention.from_torch(theirs, causal=True), theirs, [x], causal=True)
    windowed = SelfAttention.from_torch(theirs, window=(2, 0))
    mask = torch.ones(9, 9).bool().tril().triu(-2)
    torch.testing.assert_close(windowed(x), theirs(x, x, x, attn_mask=~mask)[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("bias", "d_memory"), [(True, 32), (False, 32), (True, 12), (False, 12)])
@pytest.mark.parametrize("kind", ["none", "padding", "boolean", "float, padding"])
def test_cross_attention_from_torch(batch_first, bias, d_memory, kind):
    theirs = nn.MultiheadAttention(
        32, 4, bias=bias, kdim=d_memory, vdim=d_memory, batch_first=batch_first, dtype=torch.float64
    )
    inputs = [torch.randn(2, 6, 32).double(), torch.randn(2, 9, d_memory).double()]
    inputs = [(t if batch_first else t.transpose(0, 1)).requires_grad_() for t in inputs]
    compare(CrossAttention.from_torch(randomize(theirs)), theirs, inputs, kind)


def test_without_a_batch():
    theirs = randomize(nn.MultiheadAttention(32, 4, kdim=12, vdim=12)).eval()
    x, memory = torch.randn(6, 32), torch.randn(9, 12)
    key_padding = torch.arange(9) < 7
    y = CrossAttention.from_torch(theirs)(x, memory, key_padding=key_padding)
    torch.testing.assert_close(y, theirs(x, memory, memory, key_padding_mask=~key_padding)[0])


@pytest.mark.parametrize("which", [SelfAttention, CrossAttention])
def test_from_torch_takes_over_everything_and_shares_nothing(which):
    theirs = nn.MultiheadAttention(32, 4, dropout=0.3, dtype=torch.bfloat16).eval()
    theirs.in_proj_weight.requires_grad_(False)
    state = torch.get_rng_state()
    ours = which.from_torch(theirs)
    assert torch.equal(torch.get_rng_state(), state)
    assert (ours.dropout, ours.training, ours.batch_first) == (0.3, False, False)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    frozen = {n for n, p in ours.named_parameters() if not p.requires_grad}
    assert frozen == {f"{name}.weight" for name in which.projections}
    theirs_before = copy.deepcopy(theirs.state_dict())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(7)
    for name, t in theirs.state_dict().items():
        assert torch.equal(t, theirs_before[name]), name
    assert which.from_torch(theirs.train()).training


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (TypeError, "mha must be a torch.nn.MultiheadAttention, got Linear", lambda: nn.Linear(3, 3)),
        (NotImplementedError, "add_bias_kv=True; only", lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True)),
        (NotImplementedError, "add_zero_attn=True; only", lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True)),
        (ValueError, "kdim=8 and vdim=6", lambda: nn.MultiheadAttention(8, 2, vdim=6)),
    ],
)
@pytest.mark.parametrize("which", [SelfAttention, CrossAttention])
def test_what_from_torch_refuses(which, error, message, make):
    with pytest.raises(error, match=message):
        which.from_torch(make())


def test_self_attention_has_one_width():
    with pytest.raises(ValueError, match="kdim=6 and vdim=6; self-attention needs both to be embed_dim=8"):
        SelfAttention.from_torch(nn.MultiheadAttention(8, 2, kdim=6, vdim=6))


# ------------------------------------------------------------------------------------------------------- behaviour


@pytest.mark.parametrize("n_heads", [1, 2, 7, 8, 12, 16])
def test_alibi_slopes_are_those_of_the_paper(n_heads):
    def slopes(n: int) -> list[float]:
        """`get_slopes` of the authors' code."""
        if math.log2(n).is_integer():
            start = 2 ** (-(2 ** -(math.log2(n) - 3)))
            return [start * start**i for i in range(n)]
        below = 2 ** math.floor(math.log2(n))
        return slopes(below) + slopes(2 * below)[0::2][: n - below]

    torch.testing.assert_close(alibi_slopes(n_heads), torch.tensor(slopes(n_heads)), rtol=1e-6, atol=0)


def test_a_cast_does_not_round_the_slopes():
    layer = SelfAttention(96, 12, alibi=True)
    assert list(layer.bfloat16().state_dict()) == ["qkv.weight", "qkv.bias", "out.weight", "out.bias"]
    assert list(layer.buffers()) == []


def test_a_token_that_sees_nothing_gets_the_bias():
    layer = randomize(SelfAttention(32, 2, causal=True))
    y = layer(torch.randn(2, 6, 32), key_padding=torch.tensor([[False] * 2 + [True] * 4, [True] * 6]))
    assert torch.equal(y[0, :2], layer.out.bias.expand(2, 32))
    assert not (y[0, 2:] == layer.out.bias).all(-1).any()
    assert not (y[1] == layer.out.bias).all(-1).any()


def test_what_padding_holds_does_not_matter():
    layer = randomize(SelfAttention(32, 2))
    x = torch.randn(2, 6, 32)
    key_padding = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    expected = layer(x, key_padding=key_padding)
    x[0, 4:] = math.nan
    y = layer(x, key_padding=key_padding)
    torch.testing.assert_close(y[key_padding], expected[key_padding])
    torch.testing.assert_close(y[0, :4], layer(x[0, :4]))


def test_dropout_drops_probabilities_in_training_alone():
    """Equal scores over an identity: the result is the probabilities."""
    n, p = 64, 0.3
    layer = SelfAttention(n, 1, dropout=p, bias=False)
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.cat((torch.zeros(2 * n, n), torch.eye(n))))
        layer.out.weight.copy_(torch.eye(n))
    torch.testing.assert_close(layer.eval()(torch.eye(n)), torch.full((n, n), 1 / n))
    torch.manual_seed(0)
    y = layer.train()(torch.eye(n))
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full((int(kept.sum()),), 1 / n / (1 - p)))
    assert abs(1 - kept.float().mean() - p) < 4 * math.sqrt(p * (1 - p) / n**2)
    assert not torch.equal(layer(torch.eye(n)), y)
    torch.manual_seed(0)
    assert torch.equal(layer(torch.eye(n)), y)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of any RMSNorm under autocast
def test_autocast():
    layer = randomize(SelfAttention(32, 2, qk_norm=True, sinks=True))
    x = torch.randn(2, 9, 32)
    expected = layer(x)
    for norm in (layer.q_norm, layer.k_norm):  # as autocast does on a GPU
        norm.register_forward_hook(lambda _, inputs, y: y.float())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters() if p is not layer.qkv.bias)


LAYERS = {
    "self": lambda **to: SelfAttention(
        32, 4, n_kv_heads=2, causal=True, alibi=[0.5, 0.4, 0.3, 0.2], sinks=True, qk_norm=True, **to
    ),
    "cross": lambda **to: CrossAttention(32, 4, 24, bias=False, window=(3, 3), softcap=3.0, alibi=True, **to),
}


def inputs_of(layer, **to) -> list[Tensor]:
    return [torch.randn(2, 9, 32, **to), *([torch.randn(2, 7, 24, **to)] if isinstance(layer, CrossAttention) else [])]


@pytest.fixture(params=LAYERS)
def make(request):
    return LAYERS[request.param]


def test_states_and_copies(make, tmp_path):
    layer = randomize(make())
    inputs = inputs_of(layer)
    expected = layer(*inputs)
    other = make()
    assert not torch.equal(other(*inputs), expected)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(*inputs), expected)
    torch.save(layer, tmp_path / "layer.pt")
    for twin in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        assert torch.equal(twin(*inputs), expected)
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in layer.parameters()}
    assert torch.equal(layer.to(torch.float64)(*[t.double() for t in inputs]).float(), expected) is False
    torch.testing.assert_close(layer(*[t.double() for t in inputs]).float(), expected)


def test_the_weights_of_gpts_layers_fit():
    config = GPTConfig(
        vocab_size=7,
        context_length=9,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        d_model=32,
        positions="none",
        attention_window=3,
    )
    theirs = randomize(GPT(config).blocks[0].attn)
    ours = SelfAttention(32, 4, n_kv_heads=2, causal=True, window=(2, 0))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 32)
    assert torch.equal(ours(x), theirs(x, rope=None, mask=None, cache=None))


def test_meta_device(make):
    layer = make(device="meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    y = layer(*inputs_of(layer, device="meta"))
    assert (y.device.type, tuple(y.shape)) == ("meta", (2, 9, 32))
    expected = randomize(make())
    layer.load_state_dict(expected.state_dict(), assign=True)
    inputs = inputs_of(layer)
    assert torch.equal(layer(*inputs), expected(*inputs))


def test_reset_parameters_after_to_empty():
    with torch.device("meta"):
        layer = SelfAttention(32, 4, sinks=True, qk_norm=True, alibi=True)
    layer.to_empty(device="cpu")
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    expected = SelfAttention(32, 4, sinks=True, qk_norm=True, alibi=True)
    for (name, a), b in zip(layer.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not layer.sinks.any()


def test_from_torch_on_the_meta_device():
    layer = SelfAttention.from_torch(nn.MultiheadAttention(32, 4, device="meta"))
    assert {p.device.type for p in layer.parameters()} == {"meta"}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(make, backend):
    layer = randomize(make())
    inputs = [t.requires_grad_() for t in inputs_of(layer)]
    key_padding = torch.arange(inputs[-1].shape[1]).expand(2, -1) < torch.tensor([[6], [7]])
    wanted = [*inputs, *layer.parameters()]
    expected = layer(*inputs, key_padding=key_padding)
    torch.compiler.reset()  # other tests' graphs count towards the limit of recompilations
    y = torch.compile(layer, fullgraph=True, backend=backend)(*inputs, key_padding=key_padding)
    torch.testing.assert_close(y, expected)
    for a, b in zip(*(torch.autograd.grad(t.sin().sum(), wanted) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compile_fullgraph_of_packed_sequences():
    layer = randomize(SelfAttention(32, 4, causal=True))
    x, cu = torch.randn(12, 32), torch.tensor([0, 5, 12], dtype=torch.int32)
    torch.compiler.reset()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, cu_seqlens=cu, max_seqlen=7)
    torch.testing.assert_close(y, torch.cat((layer(x[:5]), layer(x[5:]))))


def test_repr_names_what_differs_from_the_defaults():
    assert repr(SelfAttention(32, 4)).startswith("SelfAttention(\n  d_model=32, n_heads=4, n_kv_heads=4, head_dim=8\n")
    layer = CrossAttention(
        32, 4, 24, n_kv_heads=2, head_dim=16, window=(3, None), softcap=3.0, sinks=True, dropout=0.1, batch_first=False
    )
    assert layer.extra_repr() == (
        "d_model=32, n_heads=4, n_kv_heads=2, head_dim=16, window=(3, None), softcap=3.0, sinks=True, dropout=0.1,"
        " batch_first=False, d_memory=24"
    )
    assert SelfAttention(32, 4, causal=True, alibi=True, scale=0.5).extra_repr().endswith(
        "causal=True, scale=0.5, alibi=True"
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 0}, "d_model is 0; it must be at least 1"),
        ({"n_heads": 0}, "n_heads is 0; it must be at least 1"),
        ({"n_heads": 5}, "d_model is 32; without head_dim, n_heads=5 must divide it"),
        ({"n_kv_heads": 3}, "n_kv_heads is 3; it must divide n_heads=4"),
        ({"n_kv_heads": 0}, "n_kv_heads is 0; it must be at least 1"),
        ({"head_dim": 0}, "head_dim is 0; it must be at least 1"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ({"softcap": -1.0}, "softcap is -1.0; it must be positive, or None"),
        ({"window": 3}, r"window must be a pair \(left, right\).*got 3"),
        ({"window": (-2, 0)}, r"window must hold numbers of keys at least 0.*got \(-2, 0\)"),
        ({"alibi": [0.5]}, r"alibi has shape \(1,\); it must be True, or 4 slopes, one a head"),
    ],
)
@pytest.mark.parametrize("which", [SelfAttention, CrossAttention])
def test_settings_without_meaning_are_refused(which, options, message):
    with pytest.raises(ValueError, match=message):
        which(**{"d_model": 32, "n_heads": 4, **options})


def test_a_memory_without_width_is_refused():
    with pytest.raises(ValueError, match="d_memory is 0; it must be at least 1"):
        CrossAttention(32, 4, 0)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"x must be \(B, T, 32\) or \(T, 32\), got shape \(2, 6, 31\)", {"x": torch.zeros(2, 6, 31)}),
        (r"x must be .* got shape \(32,\)", {"x": torch.zeros(32)}),
        (
            r"key_padding must be boolean \(True is a token\) of shape \(2, 6\) on cpu, got torch.int64 of shape",
            {"key_padding": torch.ones(2, 6).long()},
        ),
        (r"key_padding must be .* got torch.bool of shape \(6,\)", {"key_padding": torch.ones(6).bool()}),
        (r"attn_mask must broadcast to \(2, 4, 6, 6\), got shape \(5, 6\)", {"attn_mask": torch.ones(5, 6).bool()}),
        (
            r"attn_mask must broadcast to \(2, 4, 6, 6\), got shape \(6, 5\)",
            {"attn_mask": torch.ones(6, 5).bool(), "key_padding": torch.ones(2, 6).bool()},
        ),
        (
            "attn_mask cannot be combined with cu_seqlens",
            {"attn_mask": torch.ones(6, 6).bool(), "cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)},
        ),
        (
            "key_padding cannot be combined with cu_seqlens",
            {"key_padding": torch.ones(2, 6).bool(), "cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)},
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(message, options):
    with pytest.raises(ValueError, match=message):
        SelfAttention(32, 4)(**{"x": torch.zeros(2, 6, 32), **options})


def test_a_memory_that_does_not_fit_is_refused():
    layer = CrossAttention(32, 4, 24, batch_first=False)
    x = torch.zeros(6, 2, 32)
    with pytest.raises(ValueError, match=r"memory must be \(T, B, 24\) or \(T, 24\), got shape \(5, 2, 32\)"):
        layer(x, torch.zeros(5, 2, 32))
    for memory in (torch.zeros(5, 3, 24), torch.zeros(5, 24)):
        with pytest.raises(ValueError, match=r"memory must have the batch of x, \(6, 2, 32\), got shape"):
            layer(x, memory)


def test_integer_masks_are_refused():
    x, mask = torch.zeros(2, 6, 32), torch.ones(6, 6).long()
    for options in ({}, {"key_padding": torch.ones(2, 6).bool()}):
        with pytest.raises(TypeError, match=r"attn_mask must be boolean .* got torch.int64"):
            SelfAttention(32, 4)(x, mask, **options)
