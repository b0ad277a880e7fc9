"""GPT against an independent computation in fp64, against itself with a cache, and against published sizes."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lmops.models.gpt
from lmops.models.gpt import (
    GPT,
    GPTConfig,
    KVCache,
    Linear,
    RMSNorm,
    RopeScaling,
    rope_frequencies,
    rope_tables,
    sinusoids,
)
from lmops.testing import assert_accurate

SIZES = {"vocab_size": 61, "context_length": 48, "n_layers": 2, "n_heads": 4, "d_model": 32}
LLAMA = {
    **SIZES,
    "n_kv_heads": 2,
    "d_ff": 48,
    "norm": "rmsnorm",
    "activation": "silu",
    "gated_mlp": True,
    "positions": "rope",
    "bias": False,
    "tie_embeddings": False,
}
SCALINGS = {
    "linear": RopeScaling("linear", factor=4.0),
    "dynamic": RopeScaling("dynamic", factor=2.0, original_context_length=16),
    "llama3": RopeScaling("llama3", factor=8.0, original_context_length=16),
    "yarn": RopeScaling("yarn", factor=4.0, original_context_length=16),
    "longrope": RopeScaling(
        "longrope",
        factor=3.0,
        original_context_length=16,
        short_factor=(1.0, 1.1, 1.2, 1.3),
        long_factor=(1.0, 2.0, 4.0, 8.0),
    ),
}
CONFIGS = {
    "gpt2": GPTConfig(**SIZES),
    "transformer": GPTConfig(**SIZES, positions="sinusoidal", activation="relu"),
    "no positions, gelu": GPTConfig(**SIZES, positions="none", activation="gelu", bias=False),
    "partial rope": GPTConfig(**SIZES, positions="rope", rope_dim=4),
    "llama": GPTConfig(**LLAMA),
    "llama, multi-query": GPTConfig(**{**LLAMA, "n_kv_heads": 1}),
    "mistral": GPTConfig(**LLAMA, attention_window=5),
    "qwen2": GPTConfig(**{**LLAMA, "tie_embeddings": True}, qkv_bias=True),
    "qwen3": GPTConfig(**LLAMA, head_dim=16, qk_norm=True),
    **{kind: GPTConfig(**LLAMA, rope_scaling=scaling) for kind, scaling in SCALINGS.items()},
}
# Keys in a cache keep the rotation they were written with, so dynamic and longrope agree with a pass over the whole
# sequence only while that does not cross the original length.
LENGTH = {"dynamic": 16, "longrope": 16}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small gain nothing from a second thread, and on a busy machine wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(config: GPTConfig, seed: int = 0) -> GPT:
    """A model whose every parameter is random and large enough to matter; initial ones hide errors."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    for name, parameter in model.named_parameters():
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        torch.nn.init.normal_(parameter, centre, 0.2)
    return model


def random_tokens(config: GPTConfig, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=CONFIGS, ids=str)
def case(request) -> tuple[GPT, int]:
    """A model, and how many tokens to run it on."""
    return make_model(CONFIGS[request.param]), LENGTH.get(request.param, 24)


# ---------------------------------------------------------------------------------- an independent computation


def hf_frequencies(config: GPTConfig, length: int) -> tuple[Tensor, float]:
    """What transformers computes for the same RoPE."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = config.rope_scaling
    parameters = {"rope_type": "linear", "factor": 1.0, "rope_theta": config.rope_base}
    if scaling is not None:
        parameters |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.original_context_length:
            parameters["original_max_position_embeddings"] = scaling.original_context_length
        if scaling.attention_factor:
            parameters["attention_factor"] = scaling.attention_factor
        names = {
            "llama3": ["low_freq_factor", "high_freq_factor"],
            "yarn": ["beta_fast", "beta_slow", "truncate"],
            "longrope": ["short_factor", "long_factor"],
        }
        for name in names.get(scaling.kind, []):
            value = getattr(scaling, name)
            parameters[name] = list(value) if isinstance(value, tuple) else value
    original = scaling.original_context_length if scaling else None
    hf = LlamaConfig(
        hidden_size=config.d_model,
        num_attention_heads=config.n_heads,
        head_dim=config.rope_dim,
        max_position_embeddings=original or config.context_length,
        rope_parameters=parameters,
    )
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](hf, "cpu", seq_len=length)


def naive_logits(model: GPT, tokens: list[int]) -> Tensor:
    """The model of one sequence, written as the papers do: one head and one query at a time, complex RoPE, fp64."""
    c, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        if c.norm == "layernorm":
            y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + c.norm_eps).sqrt()
            return y * w[f"{name}.weight"] + w.get(f"{name}.bias", 0.0)
        return rms(x, w[f"{name}.weight"])

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def linear(x: Tensor, name: str, rows: slice = slice(None)) -> Tensor:
        y = x @ w[f"{name}.weight"][rows].T
        return y + w[f"{name}.bias"][rows] if f"{name}.bias" in w else y

    def activate(x: Tensor) -> Tensor:
        return {
            "gelu": lambda: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
            "gelu_tanh": lambda: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
            "relu": lambda: x.clamp(min=0),
            "silu": lambda: x / (1 + torch.exp(-x)),
        }[c.activation]()

    def rotate(x: Tensor, position: int) -> Tensor:
        if c.positions != "rope":
            return x
        frequencies, factor = hf_frequencies(c, len(tokens))
        half, rest = c.rope_dim // 2, x[c.rope_dim :]
        z = torch.complex(x[:half], x[half : c.rope_dim])
        z = z * torch.polar(torch.full((half,), float(factor)).double(), position * frequencies.double())
        return torch.cat((z.real, z.imag, rest))

    T, D = len(tokens), c.head_dim
    x = w["embed.weight"][tokens]
    if c.positions == "learned":
        x = x + w["positions.weight"][:T]
    if c.positions == "sinusoidal":
        x = x * math.sqrt(c.d_model)
        for t in range(T):
            for i in range(c.d_model):
                angle = t / 10000 ** ((i - i % 2) / c.d_model)
                x[t, i] += math.cos(angle) if i % 2 else math.sin(angle)
    for layer in range(c.n_layers):
        block = f"blocks.{layer}"
        qkv = linear(norm(x, f"{block}.attn_norm"), f"{block}.attn.qkv").view(T, c.n_heads + 2 * c.n_kv_heads, D)
        heads = []
        for h in range(c.n_heads):
            kv = h // (c.n_heads // c.n_kv_heads)
            q, k, v = qkv[:, h], qkv[:, c.n_heads + kv], qkv[:, c.n_heads + c.n_kv_heads + kv]
            if c.qk_norm:
                q, k = rms(q, w[f"{block}.attn.q_norm.weight"]), rms(k, w[f"{block}.attn.k_norm.weight"])
            q = torch.stack([rotate(row, t) for t, row in enumerate(q)])
            k = torch.stack([rotate(row, t) for t, row in enumerate(k)])
            rows = []
            for t in range(T):
                first = 0 if c.attention_window is None else max(0, t - c.attention_window + 1)
                scores = torch.tensor([float(q[t] @ k[s]) / math.sqrt(D) for s in range(first, t + 1)]).double()
                weights = scores.exp() / scores.exp().sum()
                rows.append(weights @ v[first : t + 1])
            heads.append(torch.stack(rows))
        x = x + linear(torch.cat(heads, dim=-1), f"{block}.attn.out")
        y = norm(x, f"{block}.mlp_norm")
        if c.gated_mlp:
            y = activate(linear(y, f"{block}.mlp.up", slice(c.d_ff))) * linear(
                y, f"{block}.mlp.up", slice(c.d_ff, None)
            )
        else:
            y = activate(linear(y, f"{block}.mlp.up"))
        x = x + linear(y, f"{block}.mlp.down")
    return norm(x, "norm") @ w["head.weight"].T


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_formulas(name):
    model = make_model(CONFIGS[name])
    tokens = random_tokens(model.config, 2, 20)  # longer than the original context of the scaled ones
    with torch.no_grad():
        logits = model(tokens)
        truth = torch.stack([naive_logits(model, row) for row in tokens.tolist()])
    assert truth.abs().max() > 1
    torch.testing.assert_close(logits.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [10, 16, 17, 40])
@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_frequencies_are_those_of_transformers(kind, length):
    config = GPTConfig(**LLAMA, rope_base=500000.0, rope_scaling=SCALINGS[kind])
    ours, factor = rope_frequencies(config, torch.arange(length)[None])
    theirs, their_factor = hf_frequencies(config, length)
    torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-6, atol=0)
    assert factor == pytest.approx(their_factor, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama3", {"low_freq_factor": 2.0, "high_freq_factor": 3.0}),
        ("yarn", {"beta_fast": 4.0, "beta_slow": 2.0}),
        ("yarn", {"truncate": False}),
        ("yarn", {"attention_factor": 1.5}),
        ("yarn", {"original_context_length": 4096, "factor": 1.0}),
        ("longrope", {"attention_factor": 0.7}),
    ],
)
def test_rope_scaling_fields_do_what_they_do_in_transformers(kind, changes):
    before = dataclasses.replace(SCALINGS[kind], original_context_length=1024)
    plain = GPTConfig(**LLAMA, rope_scaling=before)
    config = dataclasses.replace(plain, rope_scaling=dataclasses.replace(before, **changes))
    positions = torch.arange(20)[None]
    ours, factor = rope_frequencies(config, positions)
    theirs, their_factor = hf_frequencies(config, 20)
    torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-6, atol=0)
    assert factor == pytest.approx(their_factor, rel=1e-12)
    unchanged, unchanged_factor = rope_frequencies(plain, positions)
    assert factor != unchanged_factor or not torch.equal(ours, unchanged)


def test_rope_tables_of_a_bf16_model_are_computed_in_fp32():
    config = dataclasses.replace(GPTConfig.llama3_8b())
    positions = torch.tensor([[8000, 8191]])
    cos, sin = rope_tables(config, positions, torch.bfloat16)
    exponents = torch.arange(0, 128, 2).double() / 128
    angles = positions[..., None].double() / 500000.0**exponents
    half_ulp = 2.0**-9
    assert cos.dtype == sin.dtype == torch.bfloat16
    assert (cos[0, 0, :, :64] - angles[0].cos()).abs().max() < half_ulp + 1e-3
    assert (sin[0, 0, :, 64:] - angles[0].sin()).abs().max() < half_ulp + 1e-3
    assert torch.equal(sin[..., :64], -sin[..., 64:])


def test_sinusoids_interleave_sine_and_cosine():
    table = sinusoids(torch.tensor([[3]]), 4)
    expected = torch.tensor([math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)])
    torch.testing.assert_close(table[0, 0], expected)


# ------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2_medium", 354_823_168),
        ("gpt2_large", 774_030_080),
        ("gpt2_xl", 1_557_611_200),
        ("llama3_8b", 8_030_261_248),
        ("llama3_1_8b", 8_030_261_248),
        ("mistral_7b", 7_241_732_096),
        ("qwen2_5_0_5b", 494_032_768),
        ("qwen3_0_6b", 596_049_920),
        ("smollm2_135m", 134_515_008),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, parameters):
    with torch.device("meta"):
        model = GPT(getattr(GPTConfig, preset)())
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("preset", "billions"),
    [
        ("gpt3_small", 0.125),
        ("gpt3_medium", 0.350),
        ("gpt3_large", 0.760),
        ("gpt3_xl", 1.3),
        ("gpt3_2_7b", 2.7),
        ("gpt3_6_7b", 6.7),
        ("gpt3_13b", 13.0),
        ("gpt3_175b", 175.0),
    ],
)
def test_gpt3_presets_have_the_sizes_of_the_paper(preset, billions):
    with torch.device("meta"):
        model = GPT(getattr(GPTConfig, preset)())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.02)


def test_gpt3_has_175_181_291_520_weights_in_its_matrices():
    """Embedding and unembedding counted apart, though the model ties them; no biases, norms or positions."""
    with torch.device("meta"):
        model = GPT(GPTConfig.gpt3_175b())
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items() if name.endswith("weight")}

    assert sizes["embed.weight"] == sizes["head.weight"] == 617_558_016 == 50_257 * 12_288
    assert model.head.weight is model.embed.weight
    attention = sum(n for name, n in sizes.items() if name.endswith(("attn.qkv.weight", "attn.out.weight")))
    mlp = sum(n for name, n in sizes.items() if name.endswith(("mlp.up.weight", "mlp.down.weight")))
    assert attention == 96 * 4 * 12_288 * 12_288
    assert mlp == 96 * 2 * 4 * 12_288 * 12_288
    assert sizes["embed.weight"] + sizes["head.weight"] + attention + mlp == 175_181_291_520


def test_parameter_names_and_shapes():
    """What checkpoint loading relies on."""
    shapes = {n: tuple(p.shape) for n, p in make_model(CONFIGS["qwen3"]).named_parameters() if "blocks.1" not in n}
    assert shapes == {
        "embed.weight": (61, 32),
        "blocks.0.attn_norm.weight": (32,),
        "blocks.0.attn.qkv.weight": ((4 + 2 * 2) * 16, 32),
        "blocks.0.attn.q_norm.weight": (16,),
        "blocks.0.attn.k_norm.weight": (16,),
        "blocks.0.attn.out.weight": (32, 4 * 16),
        "blocks.0.mlp_norm.weight": (32,),
        "blocks.0.mlp.up.weight": (2 * 48, 32),
        "blocks.0.mlp.down.weight": (32, 48),
        "norm.weight": (32,),
        "head.weight": (61, 32),
    }
    names = {n for n, _ in make_model(CONFIGS["gpt2"]).named_parameters() if "blocks.1" not in n}
    block = {f"blocks.0.{m}.{p}" for m in ("attn.qkv", "attn.out", "mlp.up", "mlp.down") for p in ("weight", "bias")}
    block |= {f"blocks.0.{m}.{p}" for m in ("attn_norm", "mlp_norm") for p in ("weight", "bias")}
    assert names == block | {"embed.weight", "positions.weight", "norm.weight", "norm.bias"}


def test_initial_weights_are_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=512, context_length=256, n_layers=8, n_heads=4, d_model=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith(("attn.out.weight", "mlp.down.weight")) else 0.02  # 4 = sqrt(2 * 8 layers)
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name


# ------------------------------------------------------------------------------------------------------- cache


def poisoned_cache(model: GPT, batch_size: int, capacity: int, padding: list[int] | None = None) -> KVCache:
    """Slots that were never written hold NaN, so reading one shows."""
    cache = model.new_cache(batch_size, capacity, padding)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    return cache


def run_in_chunks(model: GPT, tokens: Tensor, chunks: list[int], padding: list[int] | None = None) -> Tensor:
    cache = poisoned_cache(model, len(tokens), tokens.shape[1] + 3, padding)
    with torch.inference_mode():
        logits = torch.cat([model(chunk, cache=cache) for chunk in tokens.split(chunks, dim=1)], dim=1)
    assert cache.length == tokens.shape[1]
    return logits


def test_a_cache_changes_no_logit(case):
    model, length = case
    tokens = random_tokens(model.config, 2, length)
    with torch.inference_mode():
        expected = model(tokens)
    for chunks in ([length], [1] * length, [9, length - 9], [3, 4] + [1] * (length - 7)):
        torch.testing.assert_close(run_in_chunks(model, tokens, chunks), expected, rtol=1e-4, atol=1e-5)


def test_left_padded_rows_are_as_if_alone(case):
    model, length = case
    lengths = [length, 4, length - 7]
    prompts = [random_tokens(model.config, 1, n, seed=n) for n in lengths]
    padding = [length - n for n in lengths]
    tokens = torch.cat([F.pad(prompt, (pad, 0)) for prompt, pad in zip(prompts, padding, strict=True)])
    for chunks in ([length], [2, length - 5, 1, 1, 1]):
        logits = run_in_chunks(model, tokens, chunks, padding)
        for prompt, pad, row in zip(prompts, padding, logits, strict=True):
            with torch.inference_mode():
                torch.testing.assert_close(row[None, pad:], model(prompt), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [None, [0, 3]])
@pytest.mark.parametrize(("name", "visible"), [("llama", [7, 11, 12]), ("mistral", [7, 8, 5])])
def test_a_mask_is_built_for_padding_alone(name, visible, padding, monkeypatch):
    """None of (T, S): not for a window of 5, not for tokens behind a cache."""
    masks: list[Tensor | None] = []
    attention = lmops.models.gpt.attention
    monkeypatch.setattr(
        lmops.models.gpt, "attention", lambda *a, bias, **k: masks.append(bias) or attention(*a, bias=bias, **k)
    )
    model = make_model(CONFIGS[name])
    tokens = random_tokens(model.config, 2, 12)
    run_in_chunks(model, tokens, [7, 4, 1], padding)
    assert len(masks) == 3 * model.config.n_layers
    if padding is None:
        assert masks == [None] * len(masks)
    else:
        assert [tuple(m.shape) for m in masks[:: model.config.n_layers]] == [(2, 1, 1, n) for n in visible]
        assert (~masks[0][:, 0, 0]).nonzero().tolist() == [[1, 0], [1, 1], [1, 2]]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_length_depends_on_the_rows_own(kind):
    model = make_model(CONFIGS[kind])
    short, long = random_tokens(model.config, 1, 6), random_tokens(model.config, 1, 30)
    with torch.inference_mode():
        logits = model(torch.cat((F.pad(short, (24, 0)), long)), cache=model.new_cache(2, 30, padding=[24, 0]))
        torch.testing.assert_close(logits[:1, 24:], model(short), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[1:], model(long), rtol=1e-4, atol=1e-5)


def test_only_the_last_logits(case):
    model, length = case
    tokens = random_tokens(model.config, 2, length)
    with torch.inference_mode():
        last = model(tokens, cache=model.new_cache(2, length), last_only=True)
        torch.testing.assert_close(last, model(tokens)[:, -1:], rtol=1e-4, atol=1e-5)


def test_a_shortened_cache_continues_from_there():
    model = make_model(CONFIGS["mistral"])
    tokens = random_tokens(model.config, 1, 12)
    cache = poisoned_cache(model, 1, 12)
    with torch.inference_mode():
        first = model(tokens, cache=cache)[:, 8:]
        cache.length = 8
        torch.testing.assert_close(model(tokens[:, 8:], cache=cache), first, rtol=1e-4, atol=1e-5)


def test_a_window_hides_what_is_before_it():
    config = dataclasses.replace(CONFIGS["mistral"], n_layers=1)
    model = make_model(config)
    tokens = random_tokens(config, 1, 12)
    other = tokens.clone()
    other[0, 3] = (other[0, 3] + 1) % config.vocab_size
    with torch.inference_mode():
        changed = (model(tokens) != model(other)).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]  # window 5: the token and the four after it


def test_later_tokens_do_not_change_earlier_logits(case):
    model, length = case
    tokens = random_tokens(model.config, 1, length)
    other = tokens.clone()
    other[0, 8] = (other[0, 8] + 1) % model.config.vocab_size
    with torch.inference_mode():
        before, after = model(tokens), model(other)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8], after[:, 8])


# ---------------------------------------------------------------------------- training, devices, dtypes, compile


def test_gradients_reach_every_parameter(case):
    model, length = case
    tokens = random_tokens(model.config, 2, length + 1)
    F.cross_entropy(model.train()(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_model_learns_a_sequence_by_heart():
    torch.manual_seed(0)
    model = GPT(CONFIGS["llama"])
    tokens = random_tokens(model.config, 1, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(61), rel=0.05)
    assert losses[-1] < 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_targets_give_the_loss_and_its_gradients(name):
    """As by cross-entropy of the logits; a head that is the embedding gets both gradients in one."""
    model = make_model(CONFIGS[name])
    tokens = random_tokens(model.config, 2, 13)
    tokens, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 3] = -100
    loss = model(tokens, targets)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_targets_of_another_shape_are_refused():
    model = make_model(CONFIGS["gpt2"])
    tokens = random_tokens(model.config, 2, 5)
    with pytest.raises(ValueError, match=r"targets has shape \(2, 4\); it must be that of tokens, \(2, 5\)"):
        model(tokens, tokens[:, 1:])
    with pytest.raises(ValueError, match="last_only must be False"):
        model(tokens, tokens, last_only=True)
    with pytest.raises(ValueError, match="target must be"):
        model(tokens, tokens + model.config.vocab_size)


def test_inference_leaves_the_model_trainable():
    model = make_model(CONFIGS["yarn"])
    tokens = random_tokens(model.config, 1, 8)
    with torch.inference_mode():
        model(tokens)
    model(tokens).sum().backward()
    assert model.embed.weight.grad is not None


def test_dropout_acts_in_training_only():
    model = make_model(GPTConfig(**SIZES, dropout=0.2))
    tokens = random_tokens(model.config, 1, 8)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_attention_residual_and_embedding_dropout_are_all_there(monkeypatch):
    """Each kind switched on alone changes the logits: attention weights, residual branches, embeddings."""
    config = GPTConfig(**SIZES, dropout=0.5)
    calls = []
    attention = lmops.models.gpt.attention
    dropout = F.dropout
    monkeypatch.setattr(
        lmops.models.gpt, "attention", lambda *a, **k: calls.append(k["dropout_p"]) or attention(*a, **k)
    )
    monkeypatch.setattr(F, "dropout", lambda x, p: calls.append(p) or dropout(x, p))
    make_model(config).train()(random_tokens(config, 1, 8))
    assert calls == [0.5] + [0.5, 0.5, 0.5] * config.n_layers


@pytest.mark.parametrize("how", ["to_empty", "assign", "assign without head"])
def test_a_model_from_the_meta_device_is_the_same(case, how):
    model, length = case
    tokens = random_tokens(model.config, 1, length)
    state = model.state_dict()
    with torch.device("meta"):
        other = GPT(model.config)
    if how == "to_empty":
        other.to_empty(device="cpu")
    if how == "assign without head" and model.config.tie_embeddings:
        del state["head.weight"]
    other.load_state_dict(state, assign=how != "to_empty")
    assert (other.head.weight is other.embed.weight) == model.config.tie_embeddings
    assert all(parameter.device.type == "cpu" for parameter in other.parameters())
    assert torch.equal(other.eval()(tokens), model(tokens))


def test_init_weights_after_to_empty_makes_a_new_model():
    config = CONFIGS["qwen3"]
    expected = GPT(config)
    torch.manual_seed(0)
    expected.init_weights()
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(parameter, other), name


@pytest.mark.parametrize("name", ["gpt2", "transformer", "llama", "qwen3", "yarn"])
def test_bf16(name):
    model = make_model(CONFIGS[name]).bfloat16()
    tokens = random_tokens(model.config, 1, 24)
    with torch.inference_mode():
        logits = model(tokens)
        truth = copy.deepcopy(model).double()(tokens)  # the same rounded weights
        cache = model.new_cache(1, 24)
        cached = torch.cat([model(chunk, cache=cache) for chunk in tokens.split([20, 1, 1, 1, 1], dim=1)], dim=1)
    assert logits.dtype == cache.keys.dtype == torch.bfloat16
    scale = truth.square().mean().sqrt()
    for result in (logits, cached):
        assert (result - truth).square().mean().sqrt() < 0.02 * scale  # 2^-8 a rounding, a few of them in a row


@torch.no_grad()
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 3, 64)])
def test_norm_of_one_row_is_as_accurate_as_torchs(shape):
    norm = RMSNorm(64, eps=1e-5)
    norm.weight.normal_()
    x = torch.randn(*shape, 2).select(-1, 0)  # not contiguous
    truth = F.rms_norm(x.double(), (64,), norm.weight.double(), 1e-5)
    assert_accurate(norm(x), truth, F.rms_norm(x, (64,), norm.weight, 1e-5))
    small = 1e-4 * x  # where eps counts
    truth = F.rms_norm(small.double(), (64,), norm.weight.double(), 1e-5)
    assert_accurate(norm(small), truth, F.rms_norm(small, (64,), norm.weight, 1e-5))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of any RMSNorm there
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_autocast(name, cached):
    """Rotated queries and keys are float32 there, values bfloat16, and a cache has the dtype of the weights."""
    model = make_model(CONFIGS[name])
    tokens = random_tokens(model.config, 1, 12)
    expected = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = run_in_chunks(model, tokens, [8, 4]) if cached else model(tokens)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).square().mean().sqrt() < 0.03 * expected.square().mean().sqrt()
    if not cached:
        logits.sum().backward()
        assert model.blocks[0].attn.qkv.weight.grad.isfinite().all()


def test_moving_and_casting_keeps_positions_and_ties():
    model = make_model(CONFIGS["qwen2"])
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model = model.bfloat16().float()
    tokens = random_tokens(model.config, 1, 24)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(tokens), rounded(tokens))
    assert list(model.buffers()) == []


def test_save_and_load(tmp_path):
    model = make_model(CONFIGS["gpt2"])
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    tokens = random_tokens(model.config, 1, 5)
    assert torch.equal(other(tokens), model(tokens))


@pytest.mark.parametrize("name", ["gpt2", "mistral", "yarn"])
def test_forward_is_one_graph(name):
    model = make_model(CONFIGS[name])
    tokens = random_tokens(model.config, 2, 12)
    torch.compiler.reset()  # other tests' graphs count towards the limit of recompilations
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    compiled(tokens).sum().backward()
    assert model.embed.weight.grad is not None
    with torch.inference_mode():
        cache, expected = model.new_cache(2, 12), model.new_cache(2, 12)
        for chunk in tokens.split([10, 1, 1], dim=1):
            torch.testing.assert_close(compiled(chunk, cache=cache), model(chunk, cache=expected), rtol=1e-4, atol=1e-5)
    assert cache.length == 12


def test_compiled_by_inductor():
    model = make_model(dataclasses.replace(CONFIGS["llama"], n_layers=1))
    tokens = random_tokens(model.config, 1, 12)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(tokens), model(tokens), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be at least 1"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"context_length": -1}, "context_length is -1"),
        ({"n_heads": 5}, "d_model is 32; without head_dim, n_heads=5 must divide it"),
        ({"n_kv_heads": 3}, "n_kv_heads is 3; it must divide n_heads=4"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'; allowed are 'layernorm', 'rmsnorm'"),
        ({"activation": "swish"}, "activation is 'swish'; allowed are 'gelu'"),
        ({"positions": "alibi"}, "positions is 'alibi'; allowed are 'learned'"),
        ({"positions": "rope", "head_dim": 7}, "rope_dim is 7; it must be even and between 2 and head_dim=7"),
        ({"positions": "rope", "rope_dim": 10}, "rope_dim is 10; it must be even and between 2 and head_dim=8"),
        ({"positions": "sinusoidal", "d_model": 33, "head_dim": 8}, "d_model is 33; sinusoidal positions need an even"),
        ({"rope_scaling": SCALINGS["linear"]}, "rope_scaling is set, but positions is 'learned'"),
        (
            {"positions": "rope", "head_dim": 16, "rope_scaling": SCALINGS["longrope"]},
            "RopeScaling.short_factor has 4 values; it must have rope_dim / 2 = 8",
        ),
        ({"attention_window": 0}, "attention_window is 0"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
    ],
)
def test_configurations_without_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SIZES, **changes})


def test_rope_scaling_without_meaning_is_refused():
    with pytest.raises(ValueError, match="kind is 'su'; allowed are 'linear'"):
        RopeScaling("su")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"factor is 0.5; it must be at least 1"):
        RopeScaling("linear", factor=0.5)
    with pytest.raises(ValueError, match="original_context_length is missing; kind='yarn' needs it"):
        RopeScaling("yarn", factor=2.0)


def test_tokens_that_do_not_fit_are_refused():
    model = make_model(CONFIGS["gpt2"])
    with pytest.raises(ValueError, match=r"tokens has shape \(3,\); it must be \(batch, tokens\)"):
        model(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="the sequence has 49 tokens; context_length is 48"):
        model(torch.zeros(1, 49, dtype=torch.long))
    cache = model.new_cache(2, 10)
    with pytest.raises(ValueError, match="tokens has 1 rows; the cache was made for 2"):
        model(torch.zeros(1, 3, dtype=torch.long), cache=cache)
    model(torch.zeros(2, 8, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="the cache is full: 8 of 10 columns are taken, 3 more came"):
        model(torch.zeros(2, 3, dtype=torch.long), cache=cache)
    assert cache.length == 8
    cache = model.new_cache(1, 100)
    model(torch.zeros(1, 48, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="the sequence has 49 tokens; context_length is 48"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_a_cache_without_meaning_is_refused():
    config = CONFIGS["gpt2"]
    with pytest.raises(ValueError, match="capacity is 0"):
        KVCache(config, 1, 0)
    with pytest.raises(ValueError, match=r"padding is \[1\]; it must be one number >= 0 for each of 2 rows"):
        KVCache(config, 2, 4, padding=[1])
    with pytest.raises(ValueError, match=r"padding is \[-1, 0\]"):
        KVCache(config, 2, 4, padding=[-1, 0])


# ---- the linear layer for few rows on a CPU -----------------------------------------------------------------------


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the batched product is for MKL builds of torch")
@pytest.mark.parametrize("shape", [(1, 1), (3,), (2, 2), (16,), (17,), (0, 2), ()], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_linear_of_few_rows(shape, bias, threads, monkeypatch):
    """The same result as torch's, by a product a thread for 1 to 16 rows, 101 outputs not being a multiple of any."""
    calls = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *args: calls.append(args) or bmm(*args))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    layer = Linear(33, 101, bias=bias)
    x = torch.randn(*shape, 33)
    with torch.no_grad():
        actual = layer(x)
    assert len(calls) == (threads > 1 and 0 < x.numel() // 33 <= 16)
    torch.testing.assert_close(actual, F.linear(x, layer.weight, layer.bias).detach())
    calls.clear()
    assert layer(x).requires_grad
    assert not calls
