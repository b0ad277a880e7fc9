"""`lmops.optimize` and `restore`: what is replaced in which model, what stays, and that nothing else changes."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lmops
from lmops.integrations.optimize import NothingToReplaceError, VerificationError
from lmops.quantization import QuantLinear
from lmops.quantization.w8a8 import W8A8Linear
from lmops.testing import assert_accurate, implementation


class CausalSelfAttention(nn.Module):
    """nanoGPT's: the function in the forward of a user's module."""

    def __init__(self, d=32, n_heads=4):
        super().__init__()
        self.c_attn, self.c_proj, self.n_heads = nn.Linear(d, 3 * d), nn.Linear(d, d), n_heads

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (
            y.view(b, t, self.n_heads, d // self.n_heads).transpose(1, 2) for y in self.c_attn(x).split(d, dim=2)
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, d))


class NanoBlock(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(d), CausalSelfAttention(d), nn.LayerNorm(d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, vocab=97, d=32):
        super().__init__()
        self.wte, self.h = nn.Embedding(vocab, d), nn.ModuleList([NanoBlock(d) for _ in range(2)])
        self.lm_head = nn.Linear(d, vocab, bias=False)

    def forward(self, idx, targets=None):
        x = self.wte(idx)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(x)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


TOKENS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(5))


def items(report):
    return {item.name: item.what for item in report.replaced}


def test_nanogpt_in_one_line():
    model, other = NanoGPT(), NanoGPT()
    baseline, loss = model(TOKENS, TOKENS)
    truth, _ = copy.deepcopy(model).double()(TOKENS)
    report = lmops.optimize(model, verify=TOKENS)
    assert items(report) == {
        "": "cross_entropy in its forward",
        **{f"h.{i}.attn": "scaled_dot_product_attention in its forward" for i in range(2)},
        **{f"h.{i}.ln_{j}": "layer_norm" for i in range(2) for j in (1, 2)},
    }
    with implementation("torch") as calls:
        logits, ours = model(TOKENS, TOKENS)
        ours.backward()
    # forward and backward of two attentions and four norms; the loss, and a look at its gradient
    assert calls.count == 2 * 2 + 2 * 4 + 2
    assert_accurate(logits, truth, baseline)
    assert ours.item() == pytest.approx(loss.item(), rel=1e-6)
    with implementation("torch") as calls:
        other(TOKENS, TOKENS)
    assert calls.count == 0  # another instance of the class
    assert set(lmops.restore(model)) == set(items(report))
    with implementation("torch") as calls:
        assert torch.equal(model(TOKENS)[0], baseline)
    assert calls.count == 0


def test_the_report_is_a_table():
    report = lmops.optimize(NanoGPT(), linear="int4", group_size=32, verify=TOKENS)
    text = str(report)
    assert "h.*.attn (2)" in text
    assert "int4 weight" in text
    assert f"{report.bytes_before:,} bytes before, {report.bytes_after:,} after" in text
    assert report.bytes_after < 0.55 * report.bytes_before
    assert "attention_forward: torch (tensors on the CPU)" in text
    assert report.kl_divergence > 0
    assert "KL divergence" in text
    assert report.implementations["quantized_matmul_forward"].startswith("torch")


class Zoo(nn.Module):
    """Every module of torch that is replaced."""

    def __init__(self):
        super().__init__()
        self.softmax, self.log_softmax, self.loss = nn.Softmax(-1), nn.LogSoftmax(1), nn.CrossEntropyLoss()
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)
        self.rms_norm = nn.RMSNorm(16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x):
        y = self.mha(x, x, x, need_weights=False)[0] + self.layer(self.rms_norm(x))
        return self.softmax(y) + self.log_softmax(y), self.loss(y.flatten(0, 1), y.flatten(0, 1).argmax(-1))


def test_modules_of_torch():
    model, x = Zoo(), torch.randn(2, 5, 16)
    truth = copy.deepcopy(model).double()(x.double())
    baseline = model(x)
    report = lmops.optimize(model)
    assert set(items(report)) == {
        "softmax", "log_softmax", "loss", "mha", "layer.self_attn", "layer.norm1", "layer.norm2", "rms_norm",
    }  # fmt: skip
    for mode in (model.train, model.eval):
        mode()
        with implementation("torch") as calls, torch.no_grad():
            ours = model(x)
        assert calls.count == 8
        for a, b, t in zip(ours, baseline, truth, strict=True):
            assert_accurate(a, t, b)
    assert type(model.softmax) is nn.Softmax


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", ["self", "cross", "widths", "bool", "float", "padding", "both", "heads", "unbatched"])
def test_multihead_attention(case, batch_first):
    options = {"kdim": 12, "vdim": 20} if case == "widths" else {}
    model = nn.MultiheadAttention(16, 2, batch_first=batch_first, **options)
    nn.init.normal_(model.in_proj_bias)
    q = torch.randn(3, 5, 16)
    k, v = (torch.randn(3, 7, width) for width in ((12, 20) if case == "widths" else (16, 16)))
    if case == "self":
        k = v = q
    kwargs = {"need_weights": False}
    mask = torch.randn(5, 7) > 1
    if case in ("bool", "both"):
        kwargs["attn_mask"] = mask
    if case == "float":
        kwargs["attn_mask"] = torch.randn(5, 7)
    if case == "heads":
        kwargs["attn_mask"] = torch.randn(6, 5, 7) > 1
    if case in ("padding", "both"):
        kwargs["key_padding_mask"] = torch.arange(7) >= torch.tensor([[7], [4], [5]])
    if case == "unbatched":
        q, k, v = q[0], k[0], v[0]
    elif not batch_first:
        q, k, v = (q.transpose(0, 1),) * 3 if case == "self" else (t.transpose(0, 1) for t in (q, k, v))
    double = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in kwargs.items()}
    truth = copy.deepcopy(model).double()(q.double(), k.double(), v.double(), **double)[0]
    baseline = model(q, k, v, **kwargs)[0]
    lmops.optimize(model)
    with implementation("torch") as calls:
        actual, weights = model(q, k, v, **kwargs)
    assert calls.count == 1
    assert weights is None
    assert_accurate(actual, truth, baseline)
    if case == "self":  # the layer's own, which has them
        assert model(q, k, v)[1].shape == (3, 5, 5)


def test_a_multihead_attention_that_cannot_be_replaced_is_reported():
    model = nn.Sequential(nn.MultiheadAttention(16, 2, add_zero_attn=True), nn.Softmax(-1))
    report = lmops.optimize(model)
    assert [(item.name, item.what) for item in report.kept] == [
        ("0", "add_bias_kv and add_zero_attn are not supported")
    ]
    assert "unchanged: add_bias_kv" in str(report)


class Norms(nn.Module):
    """nanoGPT's own LayerNorm, an RMSNorm by function, and several dimensions, which stay torch's."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8)), None
        self.planes = nn.LayerNorm((5, 8))

    def forward(self, x):
        y = F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5) + F.rms_norm(x, (8,), self.weight)
        return y + F.layer_norm(x, (5, 8)) + self.planes(x)


def test_norms():
    model, x = Norms(), torch.randn(2, 5, 8)
    baseline, truth = model(x), copy.deepcopy(model).double()(x.double())
    report = lmops.optimize(model)
    assert items(report) == {"": "layer_norm, rms_norm in its forward"}
    assert [(item.name, item.what) for item in report.kept] == [("planes", "normalizes over several dimensions")]
    with implementation("torch") as calls:
        actual = model(x)
    assert calls.count == 2
    assert_accurate(actual, truth, baseline)


class Manual(nn.Module):
    """Functions in helpers, as methods of tensors, in other types than a kernel takes, and an attribute of the name."""

    def attend(self, q):
        return helper(q @ q.mT) @ q + (q.softmax(-1) + torch.log_softmax(q, dim=1)).sum()

    def forward(self, x):
        return self.attend(x) + F.softmax(x, dim=-1, dtype=torch.float64).to(x.dtype)


def helper(scores):
    return F.softmax(scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf), -1)


def test_functions_that_a_forward_calls():
    model, x = Manual(), torch.randn(2, 5, 8)
    baseline, truth = model(x), copy.deepcopy(model).double()(x.double())
    report = lmops.optimize(model)
    assert items(report) == {"": "softmax, log_softmax in its forward"}
    with implementation("torch") as calls:
        actual = model(x)
    assert calls.count == 4
    assert_accurate(actual, truth, baseline)


class Calls(nn.Module):
    """What torch's functions take beside what they are documented to."""

    def forward(self, q, k, v):
        y = F.scaled_dot_product_attention(q, k, v)
        return torch.softmax(y, -1, torch.float64) + F.rms_norm(y, y.shape[-1:])


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 4, 5, 8), (2, 1, 5, 8), (2, 1, 5, 8)),  # heads are broadcast
        ((2, 4, 5, 8), (1, 4, 3, 8), (4, 3, 8)),  # and batches
        ((1, 2, 3, 300), (1, 2, 3, 300), (1, 2, 3, 300)),  # too wide for a gradient of ours
        ((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 600)),
    ],
)
def test_functions_take_what_torchs_do(q, k, v):
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (q, k, v)]
    model = Calls()
    expected = model(*given)
    gradients = torch.autograd.grad(expected.square().sum(), given)
    lmops.optimize(model)
    actual = model(*given)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.square().sum(), given), gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rms_norm_of_small_numbers_without_eps(dtype):
    """torch takes the one of float32 for types of 16 bits, in which these numbers would vanish beside their own."""
    model, x = nn.Sequential(nn.RMSNorm(8)).to(dtype), torch.randn(3, 8).to(dtype) * 1e-3
    expected = model(x)
    lmops.optimize(model)
    for actual in (model(x), lmops.modules.RMSNorm(8, dtype=dtype)(x)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norms_of_another_length_are_refused_as_before(norm):
    model = nn.Sequential(norm(8, elementwise_affine=False))
    lmops.optimize(model)
    with pytest.raises(RuntimeError, match=r"normalized_shape=\[8\]"):
        model(torch.randn(3, 9))


def test_an_encoder_with_padding_in_inference():
    """Where torch's fused layer gets nested tensors, which ours do not take."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, hidden = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=hidden)
        lmops.optimize(model)
        actual = model(x, src_key_padding_mask=hidden)
        torch.testing.assert_close(actual[~hidden], expected[~hidden], rtol=1e-4, atol=1e-5)
        lmops.restore(model)
        assert torch.equal(model(x, src_key_padding_mask=hidden), expected)


@pytest.mark.parametrize("linear", ["int4", "int8", "fp8", "w8a8"])
def test_the_head_keeps_more_bits(linear):
    """int8 beside int4 and int8 layers, and as it was beside the others; also if an embedding has the same weight."""
    model = NanoGPT()
    model.lm_head.weight = model.wte.weight
    float_weight = model.wte.weight.detach().clone()
    report = lmops.optimize(model, linear=linear, group_size=16)
    what = {item.name: item.what for item in report.replaced}.get("lm_head")
    if linear in ("fp8", "w8a8"):
        assert "weight" not in (what or "")
        assert model.lm_head.weight is model.wte.weight
    else:
        assert what == "int8 weight"
        assert model.lm_head.quantized.bits == 8
        step = float_weight.abs().amax(1, keepdim=True) / 127
        assert ((model.lm_head.quantized.dequantize() - float_weight).abs() <= step).all()
    assert torch.equal(model.wte.weight, float_weight)


def test_skip():
    model = NanoGPT()
    report = lmops.optimize(model, linear="int8", group_size=16, skip=["h.0", "lm_head", "*.mlp.0"])
    assert set(items(report)) == {
        "", "h.1.ln_1", "h.1.ln_2", "h.1.attn", "h.1.attn.c_attn", "h.1.attn.c_proj", "h.1.mlp.2",
    }  # fmt: skip
    with implementation("torch") as calls:
        model(TOKENS)
    assert calls.count == 1 + 2 + 3  # one attention, two norms, three linear layers


def test_a_skipped_function_is_not_reached_from_outside():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Manual()

        def forward(self, x):
            return torch.softmax(self.inner(x), -1)

    model = nn.ModuleDict({"outer": Outer(), "softmax": nn.Softmax(-1)})
    report = lmops.optimize(model, skip=["inner"])
    assert items(report) == {"softmax": "softmax"}
    assert [item.what for item in report.kept] == ["it calls softmax functions, but so does outer.inner inside it"]


@pytest.mark.parametrize("linear", ["int4", "int8", "fp8", "w8a8"])
def test_linear(linear):
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
    x = torch.randn(3, 64)
    before = model(x)
    report = lmops.optimize(model, linear=linear, group_size=32, verify=x)
    assert {type(m) for m in model if not isinstance(m, nn.GELU)} == {W8A8Linear if linear == "w8a8" else QuantLinear}
    assert {m.format for m in model if isinstance(m, QuantLinear)} == {linear if linear != "w8a8" else "int8"}
    name = "int8_matmul_forward" if linear == "w8a8" else "quantized_matmul_forward"
    assert list(report.implementations) == [name, "quantized_matmul_backward"]
    error = (model(x) - before).norm() / before.norm()
    assert 0 < error < (0.3 if linear == "int4" else 0.06)
    model(x.requires_grad_()).sum().backward()
    assert x.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="quantized already: 0 is one of 2"):
        lmops.optimize(model, linear=linear)


def state(model):
    """All that `optimize` might leave behind."""
    return {
        name: (type(m), set(m.__dict__), [(k, id(c)) for k, c in m._modules.items()], m.training)
        for name, m in model.named_modules()
    }


def bad_cases():
    yield "nothing", nn.Sequential(nn.GELU()), {}, NothingToReplaceError, "nothing to replace"
    yield "already", lmops.integrations.optimize, {}, TypeError, "model must be a torch.nn.Module, got module"
    yield "linear", NanoGPT(), {"linear": "int3"}, ValueError, "linear must be None or one of int8.*got 'int3'"
    yield "skip", NanoGPT(), {"skip": "h.0"}, TypeError, "skip must be a list"
    yield "group", NanoGPT(), {"linear": "int4", "group_size": 48}, ValueError, "group_size"
    poisoned = NanoGPT()
    poisoned.h[1].mlp[2].weight.data[0, 0] = math.nan
    for linear in ("int4", "fp8", "w8a8"):
        options = {"linear": linear, "group_size": 32}
        yield f"layer-{linear}", copy.deepcopy(poisoned), options, ValueError, r"h\.1\.mlp\.2 has NaN"
    yield "verify", NanoGPT(), {"verify": torch.randint(97, (2, 3, 4))}, ValueError, "too many values"
    yield "no tensor", nn.Sequential(nn.Softmax(-1), Nothing()), {"verify": torch.ones(3)}, TypeError, "no tensor"


class Nothing(nn.Module):
    def forward(self, x):
        return None


@pytest.mark.parametrize(("model", "options", "error", "message"), [c[1:] for c in bad_cases()],
                         ids=[c[0] for c in bad_cases()])  # fmt: skip
def test_bad_input_leaves_the_model_as_it_was(model, options, error, message):
    before = state(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        lmops.optimize(model, **options)
    if before is not None:
        assert state(model) == before


def test_verify_finds_a_wrong_operator(monkeypatch):
    model = NanoGPT().train()
    before = state(model)
    functions = lmops.integrations.layers.FUNCTIONS
    wrong = {
        F.scaled_dot_product_attention: ("attention", lambda *a, **k: 1.01 * F.scaled_dot_product_attention(*a, **k))
    }
    monkeypatch.setattr("lmops.integrations.layers.FUNCTIONS", functions | wrong)
    with pytest.raises(VerificationError, match="max error"):
        lmops.optimize(model, linear="int4", group_size=32, verify=(TOKENS,))
    assert state(model) == before


def test_restore_what_was_never_changed():
    with pytest.raises(ValueError, match="has not been optimized"):
        lmops.restore(NanoGPT())


def test_twice_changes_nothing_more():
    model = NanoGPT()
    lmops.optimize(model)
    with pytest.raises(NothingToReplaceError, match="its forward has been replaced before"):
        lmops.optimize(model)
    lmops.restore(model)
    assert "forward" not in model.__dict__


def test_copies_and_pickles():
    """A copy is optimized, by itself; a pickle comes back as the class says."""
    model = NanoGPT()
    lmops.optimize(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.wte.weight.zero_()
    with implementation("torch") as calls:
        assert not torch.equal(twin(TOKENS)[0], model(TOKENS)[0])
    assert calls.count == 2 * 6
    lmops.restore(twin)
    with implementation("torch") as calls:
        twin(TOKENS), model(TOKENS)
    assert calls.count == 6
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.allclose(loaded(TOKENS)[0], model(TOKENS)[0])
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert set(model.state_dict()) == set(NanoGPT().state_dict())


def test_hooks_stay():
    model, seen = nn.Sequential(nn.Softmax(-1)), []
    model[0].register_forward_hook(lambda *args: seen.append(1))
    lmops.optimize(model)
    model(torch.randn(2, 3))
    assert seen == [1]


def test_training_goes_on_as_before():
    losses = {}
    for optimized in (False, True):
        torch.manual_seed(3)
        model = NanoGPT()
        if optimized:
            lmops.optimize(model)
        adam = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(8):
            loss = model(TOKENS, TOKENS)[1]
            loss.backward()
            adam.step()
            adam.zero_grad()
        losses[optimized] = loss.item()
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True] < 3


def test_compiled_whole():
    model = NanoGPT()
    lmops.optimize(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with implementation("torch") as calls:
        _, loss = compiled(TOKENS, TOKENS)
        loss.backward()
    assert calls.count >= 5
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(TOKENS, TOKENS)[1].backward()
    for a, p in zip(grads, model.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-4, atol=1e-6)


def llama(family="Llama"):
    pytest.importorskip("transformers")
    from test_transformers import build

    return build(family, attn_implementation="eager")


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "Phi3", "GptOss", "GPTNeoX"])
def test_rope_and_residuals_of_transformers(family):
    """Rotations of halves, of a part of a head, and by tables that are not repeated; layers built as Llama's or not."""
    model, ids = llama(family), TOKENS.clamp(min=3)
    before = model(ids, labels=ids)
    before.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    report = lmops.optimize(model, verify={"input_ids": ids})
    attention = [name for name, what in items(report).items() if what == "rope"]
    blocks = [name for name, what in items(report).items() if what == "rms_norm with the residual"]
    assert len(attention) == 2
    assert len(blocks) == (2 if family in ("Llama", "Qwen3") else 0)
    with torch.profiler.profile() as profile:
        after = model(ids, labels=ids)
        after.loss.backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["lmops::rope"] == 4  # forward, and backwards by the same operator
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-5)
    for name, p in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-5)
    lmops.restore(model)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_residuals_of_gpt2():
    """Logits, gradients, generation with a cache; layers whose norm is skipped, or has a hook, stay themselves."""
    model, ids = llama("GPT2"), TOKENS.clamp(min=3)
    before = model(ids, labels=ids)
    before.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    words = model.generate(ids, max_new_tokens=6, do_sample=False)
    report = lmops.optimize(model, skip=["h.1.ln_2"], verify={"input_ids": ids})
    blocks = [name for name, what in items(report).items() if what == "layer_norm with the residual"]
    assert blocks == ["transformer.h.0"]
    with torch.profiler.profile() as profile:
        after = model(ids, labels=ids)
        after.loss.backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["lmops::norm_forward"] == 4  # two layers' first, one's second with its sum, the last
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-5)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), words)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, before.logits, rtol=1e-4, atol=1e-5)
    seen = []
    model.transformer.h[0].ln_2.register_forward_hook(lambda module, args, y: seen.append(type(y)))
    torch.testing.assert_close(model(ids).logits, before.logits, rtol=1e-4, atol=1e-5)
    assert seen == [torch.Tensor]
    lmops.restore(model)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_a_layer_with_another_rotation_is_reported(monkeypatch):
    model = llama()
    scope = type(model.model.layers[0].self_attn).forward.__globals__
    theirs = scope["apply_rotary_pos_emb"]
    monkeypatch.setitem(scope, "apply_rotary_pos_emb", lambda q, k, cos, sin: theirs(q, k, cos, -sin))
    report = lmops.optimize(model)
    kept = {item.name: item.what for item in report.kept}
    assert kept["model.layers.0.self_attn"] == "its apply_rotary_pos_emb is not the rotation of halves"


def test_a_llama_compiled_and_its_checkpoints_and_hooks():
    model, ids = llama(), TOKENS.clamp(min=3)
    lmops.optimize(model)
    expected = model(ids).logits
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(ids).logits, expected)
    text = "".join(graphs)
    assert "apply_rotary_pos_emb" not in text
    assert text.count("rope") >= 2
    seen = []
    norm = model.model.layers[0].post_attention_layernorm
    norm.register_forward_hook(lambda module, args, y: seen.append(type(y)))  # as before it gets one tensor
    torch.testing.assert_close(model(ids).logits, expected)
    assert seen == [torch.Tensor]
    model.train()
    model.gradient_checkpointing_enable()
    with torch.profiler.profile() as profile:
        model(ids, labels=ids, use_cache=False).loss.backward()
    forwards = sum(e.count for e in profile.key_averages() if e.key == "lmops::attention_forward")
    assert forwards == 4  # of two layers, each computed again for its backward
