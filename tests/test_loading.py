"""Loading gives the model that transformers has, from every supported kind of checkpoint, or an error that says why."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as GGML
from safetensors.torch import load_file, save_file

from lmops.models import CheckpointError, RopeScaling, load
from lmops.models.gguf import SUPPORTED_TYPES
from lmops.testing import assert_accurate

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
DECODER = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 96, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
TOKENS = torch.randint(96, (2, 40), generator=torch.Generator().manual_seed(1))


def rope(kind, **values):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


LLAMA3_ROPE = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
YARN_ROPE = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LONG_ROPE = rope(
    "longrope", factor=4.0, original_max_position_embeddings=16, short_factor=[1, 1, 1.5, 2], long_factor=[1, 2, 3, 4]
)

# name: (transformers' configuration class, its arguments)
MODELS = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt2_untied": ("GPT2Config", GPT2 | {"tie_word_embeddings": False}),
    "gpt2_relu_inner": ("GPT2Config", GPT2 | {"activation_function": "relu", "n_inner": 80}),
    "gpt2_exact_gelu": ("GPT2Config", GPT2 | {"activation_function": "gelu", "layer_norm_epsilon": 0.1}),
    "llama": ("LlamaConfig", DECODER | {"rms_norm_eps": 0.1}),
    "llama_tied": ("LlamaConfig", DECODER | {"tie_word_embeddings": True}),
    "llama_no_gqa": ("LlamaConfig", DECODER | {"num_key_value_heads": 4}),
    "llama_one_kv_head": ("LlamaConfig", DECODER | {"num_key_value_heads": 1}),
    "llama_head_dim": ("LlamaConfig", DECODER | {"head_dim": 12}),
    "llama_bias": ("LlamaConfig", DECODER | {"attention_bias": True, "mlp_bias": True}),
    "llama_gelu": ("LlamaConfig", DECODER | {"hidden_act": "gelu_pytorch_tanh"}),
    "llama_rope_theta": ("LlamaConfig", DECODER | rope("default")),
    "llama_rope_linear": ("LlamaConfig", DECODER | rope("linear", factor=3.0)),
    "llama_rope_llama3": ("LlamaConfig", DECODER | LLAMA3_ROPE),
    "llama_rope_yarn": ("LlamaConfig", DECODER | YARN_ROPE),
    "llama_rope_yarn_all": (
        "LlamaConfig",
        DECODER
        | rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=8.0,
            beta_slow=2.0,
            mscale=1.2,
            mscale_all_dim=0.8,
            truncate=False,
        ),
    ),
    "llama_rope_dynamic": ("LlamaConfig", DECODER | rope("dynamic", factor=2.0) | {"max_position_embeddings": 32}),
    "llama_rope_longrope": ("LlamaConfig", DECODER | LONG_ROPE),
    "mistral": ("MistralConfig", DECODER | {"sliding_window": None}),
    "mistral_window": ("MistralConfig", DECODER | {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", DECODER),
    "qwen2_tied_yarn": ("Qwen2Config", DECODER | YARN_ROPE | {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2Config",
        DECODER | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3Config", DECODER | {"head_dim": 12}),
    "qwen3_tied": ("Qwen3Config", DECODER | {"head_dim": 8, "tie_word_embeddings": True}),
}


def make(name="llama", **changes):
    """A transformers model with random parameters, large enough for each to matter in the logits."""
    config_class, arguments = MODELS[name]
    config = getattr(transformers, config_class)(**{**arguments, "attn_implementation": "eager", **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


def save(folder, name="llama", *, config=None, drop=(), **changes):
    """Save such a model, then change its config.json: set `config`, delete the keys in `drop`."""
    model = make(name, **changes)
    model.save_pretrained(folder)
    file = Path(folder) / "config.json"
    settings = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps({**settings, **(config or {})}))
    return model


@torch.no_grad()
def assert_same_logits(model, expected, tokens=TOKENS):
    """`expected`, a transformers model in float32, is the baseline; in float64 it is the truth."""
    baseline = expected(tokens).logits
    truth = expected.double()(tokens).logits
    assert_accurate(model(tokens), truth, baseline)


# ---- Hugging Face folders -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path, name):
    expected = save(tmp_path, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every key that transformers writes is known
        model, tokenizer = load(tmp_path)
    assert tokenizer is None
    assert not model.training
    assert_same_logits(model, expected)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2_tied_yarn"])
def test_sharded_checkpoints(tmp_path, name):
    expected = make(name)
    expected.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_logits(load(tmp_path)[0], expected)


@pytest.mark.parametrize("name", ["gpt2", "llama_tied"])
def test_a_base_model_has_names_without_prefix(tmp_path, name):
    expected = make(name)
    expected.base_model.save_pretrained(tmp_path)
    assert not any(name.startswith(("model.", "transformer.")) for name in load_file(tmp_path / "model.safetensors"))
    assert_same_logits(load(tmp_path)[0], expected)


@pytest.mark.parametrize(
    ("new", "old"),
    [
        (rope("default"), {"rope_theta": 500.0}),
        (rope("linear", factor=3.0), {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 3.0}}),
        (LLAMA3_ROPE, {"rope_theta": 500.0, "rope_scaling": {**LLAMA3_ROPE["rope_parameters"], "rope_theta": None}}),
    ],
)
def test_rope_as_transformers_4_wrote_it(tmp_path, new, old):
    save(tmp_path / "new", **new)
    save(tmp_path / "old", drop=["rope_parameters"], config=old)
    assert load(tmp_path / "old")[0].config == load(tmp_path / "new")[0].config


@pytest.mark.parametrize(
    ("name", "drop"),
    [
        ("llama", ["rms_norm_eps", "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias", "head_dim"]),
        ("mistral_window", ["sliding_window", "rms_norm_eps", "tie_word_embeddings"]),
        ("qwen2", ["use_sliding_window", "sliding_window", "max_window_layers", "layer_types", "tie_word_embeddings"]),
        ("gpt2", ["n_inner", "activation_function", "layer_norm_epsilon", "tie_word_embeddings"]),
    ],
)
def test_missing_keys_have_the_defaults_of_transformers(tmp_path, name, drop):
    save(tmp_path, name, drop=drop)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert not settings.keys() & set(drop)
    loaded = load(tmp_path)[0].config
    default = getattr(transformers, MODELS[name][0])()
    assert loaded.norm_eps == (default.layer_norm_epsilon if name == "gpt2" else default.rms_norm_eps)
    assert loaded.tie_embeddings == default.tie_word_embeddings
    assert loaded.activation == ("gelu_tanh" if name == "gpt2" else "silu")
    assert loaded.attention_window == (default.sliding_window if name == "mistral_window" else None)


def test_the_dtype_is_that_of_the_checkpoint_unless_given(tmp_path):
    make().bfloat16().save_pretrained(tmp_path)
    stored = load(tmp_path)[0]
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    wide = load(tmp_path, dtype=torch.float32)[0]
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    for a, b in zip(stored.parameters(), wide.parameters(), strict=True):
        assert torch.equal(a.float(), b)


def test_a_tied_head_is_one_parameter_also_where_it_is_stored_twice(tmp_path):
    save(tmp_path, "llama_tied")
    model = load(tmp_path)[0]
    assert model.head.weight is model.embed.weight
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    assert load(tmp_path)[0].head.weight.shape == (96, 32)
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"tensors .*'lm_head.weight'.* differ, but the configuration ties them"):
        load(tmp_path)


def test_stored_masks_and_rope_tables_are_not_weights(tmp_path):
    for name, extra in {
        "gpt2": {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)},
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    }.items():
        expected = save(tmp_path / name, name)
        file = tmp_path / name / "model.safetensors"
        save_file(load_file(file) | extra, file)
        assert_same_logits(load(tmp_path / name)[0], expected)


# ---- what can't be loaded -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("llama", {"model_type": "mamba"}, "model_type = 'mamba' is not supported .known: gpt2, llama"),
        ("llama", {"model_type": None}, "model_type = None is not supported"),
        ("llama", {"hidden_act": "xielu"}, "hidden_act = 'xielu' is not supported"),
        ("llama", {"mlp_bias": True}, "attention_bias = False with mlp_bias = True is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias = True with mlp_bias = False is not supported"),
        ("llama", {"quantization_config": {"quant_method": "hqq"}}, "quantization_config.quant_method = 'hqq' is not"),
        ("llama", {"rope_parameters": {"rope_type": "axial"}}, "RoPE parameters .*axial.* are not supported"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "new": 1}}, "RoPE parameters .*'new': 1.* not supported"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "lack 'factor'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported"),
        ("llama", {"hidden_size": None}, "'hidden_size' is missing"),
        ("llama", {"num_attention_heads": 5}, "not the configuration of a model: .* must divide n_heads=5"),
        ("llama", {"num_attention_heads": 0}, "not the configuration of a model"),
        ("llama", {"hidden_size": "big"}, "not the configuration of a model"),
        ("qwen3", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .* only one"),
        (
            "qwen2",
            {"layer_types": None, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "max_window_layers = 1: only one",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is not supported"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True is not supported"),
    ],
)
def test_a_feature_that_the_model_lacks_is_an_error_with_key_and_value(tmp_path, name, config, message):
    save(tmp_path, name, config=config)
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path)
    assert "config.json" in str(error.value)


def test_an_unknown_key_is_a_warning(tmp_path):
    save(tmp_path, config={"logit_softcap": 30})
    with pytest.warns(UserWarning, match=r"config.json: these keys are unknown and have no effect: logit_softcap"):
        load(tmp_path)


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.down_proj.weight"),
            r"missing tensor 'model.layers.1.mlp.down_proj.weight' of shape \(32, 48\)",
        ),
        (lambda t: t.pop("lm_head.weight"), r"missing tensor 'lm_head.weight' of shape \(96, 32\)"),
        (lambda t: t.update(extra=torch.zeros(3)), r"model.safetensors: unexpected tensor 'extra' of shape \(3,\)"),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(32, 32)}),
            r"'model.layers.0.self_attn.k_proj.weight' has shape \(32, 32\), the configuration needs \(16, 32\)",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
            r"unexpected tensor 'model.layers.0.self_attn.q_proj.bias'",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)}),
            r"'model.norm.weight' has type I8, supported are F64, F32, F16, BF16",
        ),
        (lambda t: t.update({"norm.weight": torch.zeros(32)}), r"unexpected tensor 'norm.weight'"),
    ],
)
def test_tensors_must_be_exactly_those_of_the_model(tmp_path, change, message):
    save(tmp_path)
    edit(tmp_path / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("size", [0, 4, 100, 4000, -1])
def test_a_cut_off_safetensors_file(tmp_path, size):
    save(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model.safetensors: not a whole safetensors file"):
        load(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file or folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config.json is missing \(found nothing\)"):
        load(tmp_path)
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor .* \(found .*pytorch_model.bin"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON"):
        load(tmp_path)


def test_shards_that_do_not_agree_with_the_index(tmp_path):
    make().save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**files, "model.ghost.weight": files["model.norm.weight"]}}))
    with pytest.raises(
        CheckpointError, match=r"index.json: tensor 'model.ghost.weight' should be in model-.*, and is not"
    ):
        load(tmp_path)
    both = (tmp_path / files["model.norm.weight"], tmp_path / files["lm_head.weight"])
    original = both[0].read_bytes()
    edit(both[0], lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 32)}))
    index.write_text(json.dumps({"weight_map": files}))
    with pytest.raises(CheckpointError, match=f"'lm_head.weight' is stored twice: in .*{both[0].name}|{both[1].name}"):
        load(tmp_path)
    both[0].write_bytes(original)
    load(tmp_path)
    both[0].unlink()
    with pytest.raises(CheckpointError, match=f"{files['model.norm.weight']}: the file is missing"):
        load(tmp_path)


# ---- the hub ------------------------------------------------------------------------------------------------------


def test_a_hub_name_is_downloaded_with_the_needed_files_only(tmp_path, monkeypatch):
    """No hub is asked: this shows what load() asks huggingface_hub for, and that it uses the answer."""
    import huggingface_hub

    expected = save(tmp_path)
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or tmp_path,
    )
    model, _ = load("someone/some-model.v2")
    assert asked == [("someone/some-model.v2", ["*.json", "*.safetensors", "*.jinja", "merges.txt"])]
    assert_same_logits(model, expected)


def test_a_hub_name_that_cannot_be_had(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"someone/model: no such file or folder here, .*: no network$"):
        load("someone/model")


# ---- GGUF ---------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def interleave(array, heads):
    """llama.cpp's order of the rows of q and k: 0, half, 1, half + 1, ... in each head."""
    half = len(array) // heads // 2
    order = [head * 2 * half + i + side * half for head in range(heads) for i in range(half) for side in (0, 1)]
    return array[order]


# where the float16 scales are in a block of the types that the package can't quantize to
SCALES = {GGML.Q2_K: [80, 82], GGML.Q3_K: [108], GGML.Q4_K: [0, 2], GGML.Q5_K: [0, 2], GGML.Q6_K: [208]}


def random_blocks(shape, kind):
    """Random bytes as rows of blocks, with moderate scales."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, size), dtype=np.uint8)
    scales = SCALES[kind]
    for at in scales:
        values = rng.uniform(1e-4, 4e-4, raw.shape[:-1]).astype(np.float16)
        raw[..., at : at + 2] = values[..., None].view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def quantize(array, kind):
    if kind in SCALES:
        return random_blocks(array.shape, kind)
    return gguf.quants.quantize(array, kind)


def llama_tensors(model):
    """GGUF name, parameter, heads (0 where the rows stay as they are) for a transformers model."""
    config, core = model.config, model.model
    permuted = config.model_type == "llama"
    heads, kv_heads = (config.num_attention_heads, config.num_key_value_heads) if permuted else (0, 0)
    yield "token_embd", core.embed_tokens.weight, 0
    yield "output_norm", core.norm.weight, 0
    if not config.tie_word_embeddings:
        yield "output", model.lm_head.weight, 0
    for i, layer in enumerate(core.layers):
        attention = layer.self_attn
        yield f"blk.{i}.attn_norm", layer.input_layernorm.weight, 0
        yield f"blk.{i}.ffn_norm", layer.post_attention_layernorm.weight, 0
        yield f"blk.{i}.attn_q", attention.q_proj.weight, heads
        yield f"blk.{i}.attn_k", attention.k_proj.weight, kv_heads
        yield f"blk.{i}.attn_v", attention.v_proj.weight, 0
        yield f"blk.{i}.attn_output", attention.o_proj.weight, 0
        yield f"blk.{i}.ffn_gate", layer.mlp.gate_proj.weight, 0
        yield f"blk.{i}.ffn_up", layer.mlp.up_proj.weight, 0
        yield f"blk.{i}.ffn_down", layer.mlp.down_proj.weight, 0
        if config.model_type == "qwen2":
            yield f"blk.{i}.attn_q.bias", attention.q_proj.bias, 0
            yield f"blk.{i}.attn_k.bias", attention.k_proj.bias, 0
            yield f"blk.{i}.attn_v.bias", attention.v_proj.bias, 0
        if config.model_type == "qwen3":
            yield f"blk.{i}.attn_q_norm", attention.q_norm.weight, 0
            yield f"blk.{i}.attn_k_norm", attention.k_norm.weight, 0


def gpt2_tensors(model):
    core = model.transformer
    yield "token_embd", core.wte.weight, 0
    yield "position_embd", core.wpe.weight, 0
    modules = {"output_norm": core.ln_f}
    for i, layer in enumerate(core.h):
        modules |= {
            f"blk.{i}.attn_norm": layer.ln_1,
            f"blk.{i}.attn_qkv": layer.attn.c_attn,
            f"blk.{i}.attn_output": layer.attn.c_proj,
            f"blk.{i}.ffn_norm": layer.ln_2,
            f"blk.{i}.ffn_up": layer.mlp.c_fc,
            f"blk.{i}.ffn_down": layer.mlp.c_proj,
        }
    for name, module in modules.items():
        yield name, module.weight if module.weight.ndim == 1 else module.weight.T, 0  # Conv1D keeps (in, out)
        yield f"{name}.bias", module.bias, 0


def metadata(model):
    config, name = model.config, model.config.model_type
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }
    if name == "gpt2":
        values |= {"feed_forward_length": 4 * config.n_embd, "attention.layer_norm_epsilon": config.layer_norm_epsilon}
    else:
        values |= {
            "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": config.rope_parameters["rope_theta"],
        }
    if name == "qwen3":
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    return {f"{name}.{key}": value for key, value in values.items()}


def add_value(writer, key, value):
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[type(value)](key, value)


@torch.no_grad()
def write_gguf(file, model, kind=GGML.F32, *, extra_metadata=None, extra_tensors=()):
    """Write `model` with its matrices in `kind`, or kind(name), and change it to hold what was written."""
    writer = gguf.GGUFWriter(str(file), model.config.model_type)
    for key, value in {**metadata(model), **(extra_metadata or {})}.items():
        add_value(writer, key, value)
    tensors = gpt2_tensors if model.config.model_type == "gpt2" else llama_tensors
    for name, parameter, heads in tensors(model):
        name = name if name.endswith("bias") else f"{name}.weight"
        stored_kind = GGML.F32 if parameter.ndim != 2 else kind if isinstance(kind, GGML) else kind(name)
        data = quantize(np.ascontiguousarray(parameter.numpy()), stored_kind)
        parameter.copy_(torch.from_numpy(gguf.quants.dequantize(data, stored_kind).copy()))
        # blocks lie in rows, so exchanging rows exchanges whole blocks
        writer.add_tensor(name, interleave(data, heads) if heads else data, raw_dtype=stored_kind)
    for name, data in extra_tensors:
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", SUPPORTED_TYPES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gguf_types(tmp_path, name, kind):
    expected = make(name, **({"n_embd": 256} if name == "gpt2" else WIDE))
    write_gguf(tmp_path / "model.gguf", expected, GGML[kind])
    model, tokenizer = load(tmp_path / "model.gguf", quantized="dequantize")
    assert tokenizer is None
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same_logits(model, expected)


@pytest.mark.parametrize("name", ["llama_tied", "llama_no_gqa", "llama_rope_theta", "qwen2", "qwen3", "qwen3_tied"])
def test_gguf_architectures(tmp_path, name):
    expected = make(name)
    write_gguf(tmp_path / "model.gguf", expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = load(tmp_path / "model.gguf")
    assert_same_logits(model, expected)


@pytest.mark.parametrize(
    ("rope_parameters", "values"),
    [
        (rope("linear", factor=3.0), {"type": "linear", "factor": 3.0}),
        (YARN_ROPE, {"type": "yarn", "factor": 4.0, "original_context_length": 16, "finetuned": True}),
    ],
)
def test_gguf_rope_scaling(tmp_path, rope_parameters, values):
    expected = make(**rope_parameters)
    extra = {f"llama.rope.scaling.{key}": value for key, value in values.items()}
    write_gguf(tmp_path / "model.gguf", expected, extra_metadata=extra)
    assert_same_logits(load(tmp_path / "model.gguf")[0], expected)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_llama3_scaling_is_recognised_by_its_divisors(tmp_path, factor):
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters = {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 8192, **scaling}
    expected = make(rope_parameters=parameters, **WIDE)
    base = 5e5 ** (-np.arange(0, 64, 2) / 64)
    divisors = (base / expected.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert divisors.max() == pytest.approx(factor, rel=1e-5)
    write_gguf(tmp_path / "model.gguf", expected, extra_tensors=[("rope_freqs.weight", divisors)])
    model, _ = load(tmp_path / "model.gguf")
    assert model.config.rope_scaling == RopeScaling("llama3", factor, original_context_length=8192)
    assert_same_logits(model, expected)
    write_gguf(tmp_path / "other.gguf", expected, extra_tensors=[("rope_freqs.weight", divisors * 1.01)])
    with pytest.raises(CheckpointError, match=r"other.gguf: tensor 'rope_freqs.weight' is not Llama 3.1's"):
        load(tmp_path / "other.gguf")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count = 8 is not supported"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count = 4 is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type = 'longrope' is not supported"),
        ({"llama.attention.sliding_window": 8}, "llama.attention.sliding_window = 8 is not supported"),
        ({"llama.feed_forward_length": 40}, r"ffn_.*.weight' has shape \(48, 32\), the configuration needs \(40, 32\)"),
        ({"llama.block_count": 3}, r"missing tensor 'blk.2.attn_q.weight' of shape \(32, 32\) \(and 8 more\)"),
        ({"llama.block_count": 1 << 31}, "2147483648 layers, but only 21 tensors"),
        ({"general.alignment": 0}, "alignment: must be a non-zero power of two"),
        ({"llama.block_count": 1}, r"unexpected tensor 'blk.1.attn_norm.weight' of shape \(32,\) \(and 8 more\)"),
    ],
)
def test_gguf_features_that_the_model_lacks(tmp_path, extra, message):
    write_gguf(tmp_path / "model.gguf", make(), extra_metadata=extra)
    with pytest.raises(CheckpointError, match=message) as error:
        load(tmp_path / "model.gguf")
    assert "model.gguf" in str(error.value)


def test_gguf_unknown_key_is_a_warning(tmp_path):
    write_gguf(tmp_path / "model.gguf", make(), extra_metadata={"llama.logit_softcap": 30.0})
    with pytest.warns(UserWarning, match=r"these keys are unknown and have no effect: logit_softcap"):
        load(tmp_path / "model.gguf")


def test_gguf_unknown_architecture_and_type(tmp_path):
    write_gguf(tmp_path / "a.gguf", make(), extra_tensors=[("x", np.zeros((2, 32), np.int32))])
    with pytest.raises(CheckpointError, match=r"a.gguf: tensor 'x' has type I32, supported are F32, F16, .*Q6_K"):
        load(tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    write_gguf(tmp_path / "b.gguf", make())
    (tmp_path / "b.gguf").write_bytes((tmp_path / "b.gguf").read_bytes().replace(b"llama", b"mamba"))
    with pytest.raises(CheckpointError, match=r"general.architecture = 'mamba' is not supported"):
        load(tmp_path / "b.gguf")
    at = data.index(b"\x01\0\0\0\0\0\0\0x") + 9 + 4 + 16  # name, count of dimensions, two dimensions
    assert struct.unpack_from("<I", data, at)[0] == GGML.I32
    (tmp_path / "c.gguf").write_bytes(data[:at] + struct.pack("<I", 999) + data[at + 4 :])
    with pytest.raises(CheckpointError, match=r"c.gguf: .*damaged.*999.* is not a valid"):
        load(tmp_path / "c.gguf")


def test_gguf_cut_off_anywhere(tmp_path):
    write_gguf(tmp_path / "whole.gguf", make())
    data = (tmp_path / "whole.gguf").read_bytes()
    file = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 10, 30, 100, 300, 1000, 2000, len(data) // 2, len(data) - 32]:
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=rf"cut.gguf: not a GGUF file, damaged, or cut off \({size} bytes\)"):
            load(file)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (4, struct.pack("<I", 1), "version 1 which we cannot handle"),
        (4, struct.pack(">I", 3), "byte order|damaged"),
        (16, struct.pack("<Q", 1 << 60), "damaged, or cut off"),
        (24, struct.pack("<Q", 1 << 62), "damaged, or cut off"),
    ],
)
def test_gguf_damaged_header(tmp_path, at, value, message):
    write_gguf(tmp_path / "model.gguf", make())
    data = bytearray((tmp_path / "model.gguf").read_bytes())
    data[at : at + len(value)] = value
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model.gguf")


# ---- memory and imports -------------------------------------------------------------------------------------------


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "gguf"])
def test_memory_stays_near_the_size_of_the_model(tmp_path, kind):
    """75 or 151 MB of weights, and never the checkpoint beside them."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 4096}
    expected = make(**shape, num_attention_heads=8, num_key_value_heads=8)
    if kind == "gguf":
        source = tmp_path / "model.gguf"
        write_gguf(source, expected, GGML.F16)
    else:
        source = tmp_path
        expected.to(getattr(torch, kind)).save_pretrained(source)
    width = 2 if kind == "bfloat16" else 4
    model_size = width * sum(parameter.numel() for parameter in expected.parameters())
    largest = 4 * max(parameter.numel() for parameter in expected.parameters())
    script = """
        import sys
        import gguf, safetensors, torch
        from lmops.models import load
        def peak():  # not getrusage: its maximum is inherited from the process that started this one
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
        torch.zeros(1 << 20).to(torch.bfloat16)
        before = peak()
        model, _ = load(sys.argv[1])
        print((peak() - before) * 1024)
    """
    grown = int(run(script, source))
    print(f"{grown / 1e6:.0f} MB for {model_size / 1e6:.0f} MB")
    assert grown > 0.9 * model_size  # the measurement sees the model
    assert grown < model_size + largest + (24 << 20)


def test_importing_lmops_imports_no_optional_package():
    script = """
        import sys
        import lmops.models
        print([name for name in ("transformers", "gguf", "safetensors", "tokenizers", "huggingface_hub", "jinja2")
               if name in sys.modules])
    """
    assert run(script) == "[]"


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch):
    write_gguf(tmp_path / "model.gguf", make())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"'gguf': pip install \"lmops\[models\]\""):
        load(tmp_path / "model.gguf")
