"""Ways to choose codes and scales, and the conversion of whole models, ours and those of transformers."""

import copy
import json
import warnings

import pytest
import torch
import transformers
from test_cli import assert_one_line, run
from test_loading import make
from test_tokenizer import train
from torch import nn
from torch.nn import functional as F

from lmops.models import GPT, GPTConfig, load, save
from lmops.modules import QuantLinear
from lmops.quantization import (
    QuantizedTensor,
    fake_quantize,
    gptq,
    quantize,
    quantize_model,
    round_to_nearest,
    smooth_quantize,
)

LLAMA = GPTConfig(
    61, 64, 2, 4, 32, n_kv_heads=2, norm="rmsnorm", activation="silu", gated_mlp=True, positions="rope", bias=False
)
GPT2 = GPTConfig(61, 64, 2, 4, 32)
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
T = transformers
MODELS = {
    "gpt llama": lambda: GPT(LLAMA),
    "gpt gpt2": lambda: GPT(GPT2),
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**WIDE)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**WIDE, head_dim=16)),
    "gpt2": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ),
    "opt": lambda: T.OPTForCausalLM(T.OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32)),
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**WIDE, head_dim=8)),
}
TOKENS = torch.arange(320).mul(37).remainder(61).view(10, 32)


def build(name):
    """A model whose norms and biases are not all 1 and 0."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model


@torch.no_grad()
def logits(model, tokens=TOKENS):
    y = model(tokens)
    return y if isinstance(y, torch.Tensor) else y.logits


def distance(model, expected):
    return ((logits(model) - expected).norm() / expected.norm()).item()


def convert(model, method="rtn", **options):
    calibration = None if method == "rtn" else TOKENS.split(3)
    options = {"bits": 4, "group_size": 16, "calibration": calibration, "progress": False, **options}
    return quantize_model(model, method=method, **options)


# ---- one weight ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32, 48])
def test_chosen_scales_cost_less_than_those_that_clip_nothing(symmetric, group_size):
    w = torch.randn(33, 130)
    for g in range(3):
        w[g, 40 * g] = 9.0
    plain = QuantizedTensor.quantize(w, 4, group_size, symmetric=symmetric).dequantize()
    chosen = round_to_nearest(w, 4, group_size, symmetric=symmetric).dequantize()
    assert (chosen - w).square().sum(1).le((plain - w).square().sum(1) * 1.01).all()
    assert (chosen - w).square().sum() < 0.95 * (plain - w).square().sum()


def test_importance_decides_what_is_clipped():
    w = torch.randn(16, 64)
    w[:, 7] = 6.0
    importance = torch.full((64,), 1e-3)
    importance[7] = 1.0
    weighted = round_to_nearest(w, 4, -1, importance=importance).dequantize()
    plain = round_to_nearest(w, 4, -1).dequantize()
    assert (weighted - w)[:, 7].abs().max() < 0.2 * (plain - w)[:, 7].abs().max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_without_a_range(bits, symmetric):
    w = torch.zeros(3, 32)
    w[1] = 2.5
    w[2] = -1e-30
    q = round_to_nearest(w, bits, 16, symmetric=symmetric)
    assert torch.equal(q.dequantize()[0], w[0])
    torch.testing.assert_close(q.dequantize(), w, rtol=0.02, atol=1e-30)


@pytest.mark.parametrize("symmetric", [True, False])
def test_errors_whose_squares_overflow(symmetric):
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    q = round_to_nearest(w * 2.0**100, 4, 32, symmetric=symmetric)
    assert (q.dequantize() / 2.0**100 - w).abs().max() < 0.15 * w.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_in_the_type_of_the_weight(dtype):
    w = torch.randn(8, 64, dtype=dtype)
    for method in (lambda: round_to_nearest(w, 4, 32), lambda: gptq(w, torch.eye(64), 4, 32)):
        q = method()
        assert q.scales.dtype == dtype
        assert (q.dequantize() - w.float()).square().mean() < 0.02
    assert round_to_nearest(w, 4, 32, scale_dtype=torch.float32).scales.dtype == torch.float32


def correlated(n, n_in):
    x = torch.randn(n, n_in // 4) @ torch.randn(n_in // 4, n_in) / (n_in // 4) ** 0.5
    return x + 0.1 * torch.randn(n, n_in)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "n_in"), [(4, 32, 160), (4, 48, 130), (4, -1, 200), (8, 64, 64)])
def test_gptq_beats_rounding_on_inputs_that_go_together(bits, group_size, n_in, symmetric):
    w, x, unseen = torch.randn(40, n_in), *correlated(2000, n_in).split(1000)
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}

    def error(q):
        return F.linear(unseen, q.dequantize() - w).square().mean().item()

    assert error(gptq(w, x.T @ x, **options)) < 0.6 * error(round_to_nearest(w, **options))


def test_gptq_without_correlation_rounds_to_nearest():
    w = torch.randn(9, 96)
    moments = torch.rand(96) + 0.5
    q = gptq(w, torch.diag(moments), 4, 32, damping=1e-8)
    assert torch.equal(q.codes(), round_to_nearest(w, 4, 32, importance=moments).codes())


def test_gptq_with_inputs_that_are_always_zero_or_all_alike():
    w = torch.randn(9, 64)
    x = torch.randn(20, 64)
    x[:, ::3] = 0
    dead = gptq(w, x.T @ x, 4, 32).dequantize()
    assert (dead - w)[:, ::3].square().mean() < 0.05  # rounded to nearest, not given up
    assert gptq(w, torch.zeros(64, 64), 4, 32).dequantize().isfinite().all()
    assert gptq(w, torch.ones(64, 64) * 1e6, 4, 32).dequantize().isfinite().all()


def test_bad_weights_and_moments():
    w, gram = torch.randn(8, 64), torch.eye(64)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = w.clone()
        broken[3, 5] = bad
        with pytest.raises(ValueError, match=r"weight of a\.b has NaN or infinite values"):
            round_to_nearest(broken, name="a.b", group_size=32)
        with pytest.raises(ValueError, match="calibration inputs of x have NaN"):
            gptq(w, broken[3:4].expand(64, -1), 4, 32, name="x")
    with pytest.raises(ValueError, match=r"gram must be \(64, 64\), got \(8, 8\)"):
        gptq(w, torch.eye(8), 4, 32)
    with pytest.raises(ValueError, match="bits must be 4 or 8, got 2"):
        round_to_nearest(w, 2, 32)
    with pytest.raises(ValueError, match="group_size must be at most the 64 columns"):
        gptq(w, gram, 4, 128)
    with pytest.raises(TypeError, match="weight must be floating point"):
        round_to_nearest(w.long(), 4, 32)
    with pytest.raises(ValueError, match=r"too large for scales in torch\.float16"):
        round_to_nearest(w * 1e7, 4, 32, scale_dtype=torch.float16)


# ---- whole models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, method):
    model = build(name)
    expected = logits(model)
    linears = [n for n, m in model.named_modules() if quantize._is_linear(m) and n not in ("head", "lm_head")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # awq's, which another test reads
        names = convert(model, method, bits=8)
    assert sorted(names) == sorted(linears)
    assert all(isinstance(model.get_submodule(n), QuantLinear) for n in names)
    assert not any(quantize._is_linear(m) for n, m in model.named_modules() if n not in ("head", "lm_head"))
    # with 8 bits nothing but rounding has changed: folded scales, copied biases and norms are all in place
    assert distance(model, expected) < 0.03


@pytest.mark.parametrize("name", ["gpt llama", "llama", "gpt2"])
def test_gptq_beats_rounding_in_a_model(name):
    expected = logits(build(name))
    rounded, model = build(name), build(name)
    convert(rounded)
    convert(model, "gptq")
    assert distance(model, expected) < 0.9 * distance(rounded, expected)


@pytest.mark.parametrize("name", ["gpt llama", "llama"])
def test_awq_beats_rounding_where_channels_stand_out(name):
    """As they do behind the norms of real models."""

    def prepared():
        model = build(name)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key.endswith(("attn_norm.weight", "mlp_norm.weight", "layernorm.weight")):
                    p[[3, 17]] *= 20
        return model

    expected = logits(prepared())
    rounded, model = prepared(), prepared()
    convert(rounded)
    convert(model, "awq")
    assert distance(model, expected) < 0.7 * distance(rounded, expected)


@pytest.mark.parametrize("name", MODELS)
def test_awq_says_what_it_could_not_scale(name):
    unscaled = {
        "gpt llama": "",
        "gpt gpt2": "mlp.down (2 of 2)",
        "llama": "",
        "qwen3": "",
        "gpt2": "mlp.c_proj (2 of 2)",
        "opt": "",  # ReLU passes scales on
        # its norms multiply by 1 + weight, and the one with Llama's name stands elsewhere
        "gemma2": "mlp.gate_proj (2 of 2), mlp.up_proj (2 of 2), self_attn.k_proj (2 of 2), self_attn.q_proj (2 of 2),"
        " self_attn.v_proj (2 of 2)",
    }[name]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        convert(build(name), "awq")
    told = [str(w.message).rpartition("of the output: ")[2] for w in seen if "awq" in str(w.message)]
    assert told == ([unscaled] if unscaled else [])


def test_scaling_channels_changes_nothing_that_a_block_computes():
    model = build("gpt llama")
    block = model.blocks[0]
    x = torch.randn(2, 8, 32) * torch.rand(32).exp2()

    def output(b):
        return b(x, None, None, None)

    inputs = quantize._inputs(block, {n: m for n, m in block.named_modules() if quantize._is_linear(m)}, "", [x],
                              [((None, None, None), {})])  # fmt: skip
    scaled = copy.deepcopy(block)
    found = quantize.scale_channels(scaled, output, inputs, bits=4, group_size=16, symmetric=True)
    assert found.keys() == inputs.keys()
    assert any(s.max() > 1.2 for s in found.values())
    assert not torch.equal(scaled.attn_norm.weight, block.attn_norm.weight)
    torch.testing.assert_close(output(scaled), output(block), rtol=1e-4, atol=1e-5)


def test_names_and_what_is_skipped():
    model = build("gpt llama")
    before = dict(model.named_modules())
    names = convert(model, skip=("head", "blocks.0.attn", "*.down"))
    assert names == ["blocks.0.mlp.up", "blocks.1.attn.qkv", "blocks.1.attn.out", "blocks.1.mlp.up"]
    kept = [n for n, m in before.items() if isinstance(m, nn.Linear) and n not in names]
    assert all(model.get_submodule(n) is before[n] for n in kept)
    assert convert(model, skip=("head",)) == ["blocks.0.attn.qkv", "blocks.0.attn.out", "blocks.0.mlp.down",
                                              "blocks.1.mlp.down"]  # fmt: skip


def test_a_layer_in_two_places_stays_one():
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert convert(model) == ["0"]
    assert isinstance(model[0], QuantLinear)
    assert model[0] is model[2]


def test_any_module_can_be_rounded():
    model = nn.ModuleDict({"a": nn.Linear(32, 8, bias=False), "attention": nn.MultiheadAttention(32, 4)})
    out = model["attention"].out_proj
    assert convert(model, bits=8, group_size=-1) == ["a"]
    assert model["attention"].out_proj is out  # torch reads its weight without calling it
    assert model["a"].format == "int8"


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_modes_gradients_and_biases_stay(method):
    model = build("gpt2").train()
    model.transformer.h[0].mlp.eval()
    model.transformer.h[1].mlp.c_fc.bias.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(model, method)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not model.transformer.h[1].mlp.c_fc.bias.requires_grad
    assert model.transformer.h[0].mlp.c_fc.bias.requires_grad
    assert not any(module._forward_pre_hooks for module in model.modules())
    model(TOKENS, labels=TOKENS).loss.backward()
    assert model.transformer.wte.weight.grad is not None


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_float_weights_and_cpu_forms_are_let_go(method):
    import gc
    import weakref

    model = build("gpt llama")
    old = [weakref.ref(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "head"]
    convert(model, method)
    gc.collect()
    assert [ref() for ref in old] == [None] * len(old)
    if method != "rtn":  # which calls no layer
        layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
        assert [layer._cpu_weight for layer in layers] == [None] * len(layers)
        logits(model)
        assert all(layer._cpu_weight is not None for layer in layers)  # that there is something to let go


def test_progress(capsys):
    convert(build("gpt llama"), progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "quantized blocks.0.attn.qkv (1 of 8)"
    assert lines[-1] == "quantized blocks.1.mlp.down (8 of 8)"
    convert(build("gpt llama"))
    assert capsys.readouterr().err == ""


def test_calibration_as_mappings_rows_and_generators():
    plain, other = build("llama"), build("llama")
    convert(plain, "gptq", calibration=list(TOKENS.split(1)))
    convert(other, "gptq", calibration=({"input_ids": row[None]} for row in TOKENS))
    assert torch.equal(logits(plain), logits(other))
    third = build("llama")
    convert(third, "gptq", calibration=(row for row in TOKENS))
    assert torch.equal(logits(plain), logits(third))


# ---- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_a_failure_leaves_the_model_as_it_was(method, error, monkeypatch):
    model = build("gpt2").train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    calls = []

    def fail_at_the_seventh(*arguments, **options):
        calls.append(1)
        if len(calls) == 7:
            raise error("out of something")
        return from_quantized(*arguments, **options)

    from_quantized = QuantLinear.from_quantized
    monkeypatch.setattr(QuantLinear, "from_quantized", fail_at_the_seventh)
    with pytest.raises(error, match="out of something"):
        convert(model, method)
    assert len(calls) == 7
    found = dict(model.named_modules())
    assert found.keys() == modules.keys()
    assert all(found[name] is module for name, module in modules.items())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_nan_weights_are_found_before_anything_changes(method):
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"weight of model\.layers\.1\.mlp\.up_proj has NaN or infinite values"):
        convert(model, method)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_activations_that_overflow_name_the_layer(method):
    model = build("llama")
    model.model.layers[1].input_layernorm.weight.data[5] = float("inf")
    before = logits(model)
    with pytest.raises(ValueError, match=r"calibration inputs of model\.layers\.1\.self_attn\.q_proj have NaN"):
        convert(model, method)
    assert torch.equal(logits(model), before) or before.isnan().any()
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_bad_arguments():
    model = build("gpt llama")

    def error(kind, match, method="rtn", subject=model, **options):
        with pytest.raises(kind, match=match):
            convert(subject, method, **options)

    error(ValueError, "method must be one of rtn, gptq, awq, got 'best'", "best")
    error(ValueError, "bits must be 4 or 8, got 5", bits=5)
    error(ValueError, r"group_size of blocks\.0\.attn\.qkv must be at most the 32 columns", group_size=64)
    error(ValueError, "group_size of .* must be -1", group_size=8)
    error(ValueError, "must be float16, bfloat16 or float32, got torch.float64", scale_dtype=torch.float64)
    error(TypeError, "skip must be a list of names, got the string 'head'", skip="head")
    error(ValueError, "no torch.nn.Linear but those that skip", skip=("blocks", "head"))
    error(ValueError, "calibration is missing: method='gptq' needs batches", "gptq", calibration=None)
    error(ValueError, "calibration is missing", "awq", calibration=None)
    error(ValueError, "calibration has no tokens", "gptq", calibration=[torch.zeros(0, dtype=torch.int64)])
    error(ValueError, "calibration has no tokens", "awq", calibration=[])
    error(TypeError, "calibration must be batches of tokens.* got str", "gptq", calibration=["text"])
    error(TypeError, r"got torch.float32 \(2, 3\)", "gptq", calibration=[torch.zeros(2, 3)])
    error(ValueError, "the sequence has 70 tokens", "gptq", calibration=[torch.zeros(70, dtype=torch.int64)])
    error(ValueError, "a model whose layers stand in a ModuleList", "gptq", nn.Sequential(nn.Linear(32, 32)))
    error(ValueError, "model is itself a Linear", subject=nn.Linear(32, 32))
    error(ValueError, "model has no torch.nn.Linear", subject=nn.Sequential(nn.ReLU()))
    with torch.device("meta"):
        unloaded = GPT(LLAMA)
    error(ValueError, r"weight of blocks\.0\.attn\.qkv is on the meta device", subject=unloaded)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())


def test_a_block_that_calibration_does_not_reach():
    model = build("gpt llama")
    model.forward = lambda tokens: model.blocks[1](model.embed(tokens), None, None, None)
    with pytest.raises(ValueError, match=r"blocks\.0 ran 0 times for 4 calibration batches"):
        convert(model, "gptq")


# ---- quantization-aware training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quantize_is_what_the_layer_will_have(symmetric):
    layer = nn.Linear(70, 12)
    options = {"bits": 4, "group_size": 32, "symmetric": symmetric}
    fake = fake_quantize(layer.weight, **options)
    dy = torch.randn(12, 70)
    fake.backward(dy)
    assert torch.equal(layer.weight.grad, dy)
    assert torch.equal(QuantLinear.from_float(layer, **options).quantized.dequantize(), fake)


def test_training_through_rounding_pays():
    x, layer = correlated(256, 32), nn.Linear(32, 16)
    target = F.linear(x, torch.randn(16, 32))
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.lstsq(x, target).solution.T)
        layer.bias.zero_()

    def loss(module):
        with torch.no_grad():
            return F.mse_loss(module(x), target).item()

    before = loss(QuantLinear.from_float(layer, 4, 32))
    optimizer = torch.optim.Adam(layer.parameters())
    for step in range(60):
        optimizer.param_groups[0]["lr"] = 0.003 * (1 - step / 60)
        optimizer.zero_grad()
        F.mse_loss(F.linear(x, fake_quantize(layer.weight, 4, 32), layer.bias), target).backward()
        optimizer.step()
    assert loss(QuantLinear.from_float(layer, 4, 32)) < 0.7 * before


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [("head",), ()])
@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_save_and_load(config, skip, tmp_path):
    torch.manual_seed(0)
    model = GPT(config).eval()
    convert(model, skip=skip, symmetric=False)
    save(model, None, tmp_path / "model")
    loaded, tokenizer = load(tmp_path / "model")
    assert tokenizer is None
    assert loaded.config == config
    assert (loaded.head.weight is loaded.embed.weight) == bool(skip)
    assert torch.equal(logits(loaded), logits(model))
    half, _ = load(tmp_path / "model", dtype=torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16
    assert half.blocks[0].mlp.up.scales.dtype == torch.float32


def test_damaged_folders(tmp_path):
    model = GPT(LLAMA)
    convert(model)
    folder = tmp_path / "model"
    save(model, None, folder)
    with pytest.raises(FileExistsError, match="exists already"):
        save(model, None, folder)
    config, weights = (folder / "config.json").read_text(), (folder / "model.safetensors").read_bytes()
    for change, match in (
        ({"version": 99}, r"config\.json: version is 99, supported is 1"),
        ({"gpt": {**json.loads(config)["gpt"], "n_layers": 0}}, r"config\.json: gpt: n_layers is 0"),
        ({"gpt": {**json.loads(config)["gpt"], "d_ff": 96}}, r"model\.safetensors: does not fit its configuration"),
    ):
        (folder / "config.json").write_text(json.dumps({**json.loads(config), **change}))
        with pytest.raises(ValueError, match=match):
            load(folder)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights[:-20])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: the file is missing"):
        load(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("model")
    backend = train()
    make(vocab_size=backend.get_vocab_size()).save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (folder / "text.txt").write_text("def f(x):\n    return x + 1\n" * 40)
    return folder


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "smoothquant"])
def test_the_command(folder, tmp_path, method):
    out = tmp_path / "out"
    options = () if method == "rtn" else ("--calibration", folder / "text.txt", "--sequence", 32)
    options += () if method == "smoothquant" else ("--group-size", 16)
    arguments = ("--model", folder, "--out", out, "--method", method, *options)
    result = run("quantize", *arguments, "--calibration-tokens", 200, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    bits = 8 if method == "smoothquant" else 4
    assert f"8 layers in {bits} bits" in result.stderr.splitlines()[-1]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    model, tokenizer = load(out)
    expected, words = load(folder)
    if method == "rtn":
        convert(expected)
    else:
        batches = torch.tensor(words.encode((folder / "text.txt").read_text())[:200]).split(32)
        if method == "smoothquant":
            smooth_quantize(expected, batches)
        else:
            convert(expected, method, calibration=batches)
    tokens = torch.tensor([words.encode("def f(x):")])
    assert torch.equal(logits(model, tokens), logits(expected, tokens))
    assert tokenizer.encode("def f(x):") == words.encode("def f(x):")
    assert (tokenizer.stop_tokens, tokenizer.chat_template) == (words.stop_tokens, words.chat_template)
    assert run("generate", "--model", out, "--prompt", "def", "--max-new-tokens", 3).exit_code == 0


def test_mistakes_at_the_command_line_leave_nothing_behind(folder, tmp_path, monkeypatch):
    out, text = tmp_path / "out", folder / "text.txt"

    def mistake(*options, parts):
        assert_one_line(run("quantize", "--model", folder, "--out", out, *options), *parts)
        assert list(tmp_path.iterdir()) == []

    mistake("--method", "gptq", parts=("--method gptq needs --calibration",))
    mistake("--method", "awq", "--calibration", folder / "none.txt", parts=("none.txt",))
    mistake("--bits", 3, parts=("bits must be 4 or 8, got 3",))
    mistake("--method", "smoothquant", parts=("--method smoothquant needs --calibration",))
    mistake("--method", "smoothquant", "--bits", 4, "--calibration", text, parts=("8 bits and a scale a row",))
    mistake("--method", "best", parts=("--method is 'best'; allowed are rtn, gptq, awq, smoothquant",))
    mistake(parts=("group_size of blocks.0.attn.qkv must be at most", "got 128"))
    mistake("--group-size", 16, "--out", tmp_path / "no" / "out", parts=("there is no folder",))
    assert_one_line(run("quantize", "--model", folder, "--out", folder), "exists already")
    for bad, what in ((b"", "is empty"), (b"\xff\xfe", "is no text in UTF-8")):
        (folder / "bad.txt").write_bytes(bad)
        mistake("--method", "awq", "--calibration", folder / "bad.txt", parts=("bad.txt", what))

    def full(tensors, file):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    result = run("quantize", "--model", folder, "--out", out, "--group-size", 16)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, "lmops: no space left on device")
    assert list(tmp_path.iterdir()) == []
