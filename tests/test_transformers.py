"""transformers models with attention from lmops against "eager": logits, gradients, padding, caches, generate."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_quantized_checkpoints import awq_tensors, gptq_tensors, groups_of, numbers, weight_of  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import sdpa_mask  # noqa: E402

import lmops.cache  # noqa: E402
import lmops.integrations.transformers as integration  # noqa: E402
from lmops.integrations.transformers import LmopsConfig  # noqa: E402
from lmops.models.checkpoint import CheckpointError  # noqa: E402
from lmops.quantization import QuantLinear, quantize_model  # noqa: E402
from lmops.testing import assert_accurate, implementation  # noqa: E402

LLAMA = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
BERT = {k: LLAMA[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "pad_token_id")}
BERT |= {"num_attention_heads": 4, "max_position_embeddings": 64}
ENCODER_DECODER = {
    "vocab_size": 97, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
GEMMA = {**LLAMA, "head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 16}
MIXTURE = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}

# a window of 5 over 12 tokens; layers alternate where the family's do
DECODERS = {
    "GPT2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1,
             "eos_token_id": None, "pad_token_id": 0, "scale_attn_by_inverse_layer_idx": True},
    "Llama": LLAMA,
    "Mistral": {**LLAMA, "sliding_window": 5},
    "Qwen2": {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "Qwen3": {**LLAMA, "head_dim": 16},
    "Gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "layer_types": ["sliding_attention", "full_attention"]},
    "Gemma3": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3": {**LLAMA, "sliding_window": 5},
    "Mixtral": {**LLAMA, **MIXTURE},
    "GptOss": {**LLAMA, **MIXTURE, "head_dim": 16, "sliding_window": 5,
               "layer_types": ["sliding_attention", "full_attention"]},
    "GPTNeoX": {**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}, "rotary_pct": 0.5},
}  # fmt: skip
CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"), "GPT2": ("GPT2Config", "GPT2LMHeadModel")}


def build(family, head="ForCausalLM", **settings):
    config_name, model_name = CLASSES.get(family, (f"{family}Config", f"{family}{head}"))
    settings = {"attn_implementation": "lmops", **DECODERS.get(family, {}), **settings}
    config = getattr(transformers, config_name)(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config).eval()
    for parameter in model.parameters():  # their own initialisation makes attention nearly uniform
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def plain_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None,
                    position_bias=None, **kwargs):  # fmt: skip
    """The truth in float64: "eager" computes its softmax in float32 and overflows where rows are masked throughout."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if position_bias is None else scores + position_bias
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -1e300)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2).contiguous(), None


def whole_mask(*args, **kwargs):
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register("plain", plain_attention)
AttentionMaskInterface.register("plain", whole_mask)
AttentionMaskInterface.register("added", lambda *a, **k: torch.where(whole_mask(*a, **k), 0.0, -1e30))


def run(model, kind, dtype, inputs, pick):
    """What `pick` takes of the outputs, and all gradients of its weighted sum, with the attention `kind`."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_implementation(kind)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with implementation("torch") as calls:
        out = pick(model(**inputs))
    assert bool(calls.count) == (kind == "lmops")
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights.to(dtype)).sum().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare(model, inputs, pick):
    actual, baseline, truth = (
        run(model, *case, inputs, pick)
        for case in (("lmops", torch.float32), ("eager", torch.float32), ("plain", torch.float64))
    )
    for a, b, t in zip(actual, baseline, truth, strict=True):
        assert (b - t).abs().max() < 1e-4 * t.abs().max(), "the truth is not what the model computes"
        assert_accurate(a, t, b)


def padding(side):
    mask = torch.ones(2, 12, dtype=torch.long)
    if side == "left":
        mask[0, :7] = 0
    elif side == "right":
        mask[0, 5:] = 0
    return mask


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("family", DECODERS)
def test_decoder_logits_and_gradients(family, side):
    mask = padding(side)
    inputs = {"input_ids": torch.randint(3, 97, (2, 12)), "attention_mask": mask, "use_cache": torch.tensor(False)}
    if side == "none":
        del inputs["attention_mask"]
    compare(build(family), inputs, lambda out: out.logits[mask.bool()])


@pytest.mark.parametrize("family", DECODERS)
def test_decoder_generates_the_same(family):
    """Left-padded prompts, with a growing cache, a static one and none; longer than the window."""
    model = build(family)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    inputs = {"input_ids": torch.randint(3, 97, (2, 8)), "attention_mask": mask}
    generates_the_same(model, inputs)
    del inputs["attention_mask"]  # nothing is padded: no mask is made, a static cache's empty end is not looked at
    generates_the_same(model, inputs)


def generates_the_same(model, inputs):
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    found = {}
    for kind in ("eager", "lmops"):
        model.set_attn_implementation(kind)
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            found[kind, str(cache)] = model.generate(**inputs, **options, **cache).tolist()
    assert len({str(tokens) for tokens in found.values()}) == 1, found


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_tokens_in_several_calls(family):
    """A prompt in pieces through a cache that grows: more queries than one, fewer than keys."""
    model = build(family)
    tokens = torch.randint(3, 97, (2, 12))
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(t, past_key_values=cache).logits for t in tokens.split((7, 4, 1), dim=1)]
        whole = model(tokens).logits
        model.set_attn_implementation("eager")
        baseline = model(tokens).logits
        model.set_attn_implementation("plain")
        truth = model.double()(tokens).logits
    assert_accurate(whole, truth, baseline)
    assert_accurate(torch.cat(parts, 1), truth, baseline)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_bert(side):
    model = build("Bert", "ForMaskedLM", **BERT)
    mask = padding(side)
    inputs = {"input_ids": torch.randint(3, 97, (2, 12)), "attention_mask": mask}
    compare(model, inputs, lambda out: out.logits[mask.bool()])


def test_vit():
    sizes = {k: BERT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    model = build("ViT", "ForImageClassification", **sizes, image_size=16, patch_size=4)
    compare(model, {"pixel_values": torch.randn(2, 3, 16, 16)}, lambda out: out.logits)


BART = {
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {"d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8}


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(("family", "sizes"), [("Bart", BART), ("T5", T5)])
def test_encoder_decoder(family, sizes, side):
    """Cross-attention over a padded encoder, a causal decoder; T5 adds a learned bias by distance."""
    model = build(family, "ForConditionalGeneration", **ENCODER_DECODER, **sizes)
    mask = padding(side)
    inputs = {
        "input_ids": torch.randint(3, 97, (2, 12)), "attention_mask": mask,
        "decoder_input_ids": torch.randint(3, 97, (2, 7)), "use_cache": torch.tensor(False),
    }  # fmt: skip
    compare(model, inputs, lambda out: out.logits)
    prompt = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    tokens = []
    for kind in ("eager", "lmops"):
        model.set_attn_implementation(kind)
        tokens.append(model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False).tolist())
    assert tokens[0] == tokens[1]


def test_no_mask_is_made_where_flags_say_it_all(monkeypatch):
    """Causal and causal in a window without padding: what a kernel can skip without reading a mask."""
    masks = []
    attend = integration.attention

    def noting(*args, bias=None, **kwargs):
        masks.append((bias is None, kwargs["left"], kwargs["right"]))
        return attend(*args, bias=bias, **kwargs)

    monkeypatch.setattr(integration, "attention", noting)
    model, tokens = build("Gemma3"), torch.randint(3, 97, (2, 12))
    with torch.no_grad():
        cache = model(tokens, attention_mask=torch.ones_like(tokens)).past_key_values
        assert masks == [(True, 4, 0), (True, None, 0)]
        model(tokens[:, :1], past_key_values=cache)
        assert masks[2:] == [(True, 4, 0), (True, None, 0)]
        model(tokens, attention_mask=padding("left"))
        assert masks[4:] == [(False, None, None)] * 2


def test_a_window_that_layers_are_not_told_comes_as_a_mask():
    """Qwen2-MoE makes a mask with a window, and does not pass the window on."""
    settings = {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_experts": 2}
    settings |= {"num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = build("Qwen2Moe", **settings, experts_implementation="eager")
    compare(model, {"input_ids": torch.randint(3, 97, (2, 12)), "use_cache": torch.tensor(False)}, lambda o: o.logits)


def test_dropout_and_training():
    model = build("Llama", attention_dropout=0.5).train()
    tokens = torch.randint(3, 97, (2, 12))
    outs = [model(tokens).logits for _ in range(2)]
    assert not torch.equal(*outs)
    torch.manual_seed(3)
    first = model(tokens).logits
    torch.manual_seed(3)
    assert torch.equal(first, model(tokens).logits)


def test_kernels_under_transformers(path):
    """The kernels: window, softcap and grouped heads, padded, forward and backward."""
    model = build("Gemma2").to(path.device)
    mask = padding("left").to(path.device)
    tokens = torch.randint(3, 97, (2, 12), device=path.device)
    out = model(tokens, attention_mask=mask).logits[mask.bool()]
    out.sum().backward()
    grad = model.model.layers[0].self_attn.q_proj.weight.grad
    results = {}
    for kind, dtype in (("eager", torch.float32), ("plain", torch.float64)):
        other = copy.deepcopy(model).to(dtype)
        other.zero_grad()
        other.set_attn_implementation(kind)
        y = other(tokens, attention_mask=mask).logits[mask.bool()]
        y.sum().backward()
        results[kind] = y, other.model.layers[0].self_attn.q_proj.weight.grad
    assert_accurate(out, results["plain"][0], results["eager"][0])
    assert_accurate(grad, results["plain"][1], results["eager"][1])


def test_from_pretrained(tmp_path):
    model = build("Llama")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lmops")
    tokens = torch.randint(3, 97, (2, 12))
    with implementation("torch") as calls, torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert calls.count == 4


def test_masks_of_unexpected_rank():
    model, tokens = build("Llama"), torch.randint(3, 97, (2, 12))
    with pytest.raises(ValueError, match=r"attention_mask must be .* got shape \(2, 12, 12\)"):
        model(tokens, attention_mask=torch.ones(2, 12, 12))
    layer, x = model.model.layers[0].self_attn, torch.randn(2, 4, 12, 8)
    with pytest.raises(ValueError, match=r"attention_mask must be .* got shape \(2, 12\)"):
        integration.attention_forward(layer, x, x, x, torch.ones(2, 12))
    with pytest.raises(ValueError, match="attn_mask must broadcast"):
        integration.attention_forward(layer, x, x, x, torch.ones(2, 1, 12, 11))


def test_a_model_that_does_not_ask_the_registry_says_so():
    """BLOOM adds the mask to its scores itself: a boolean one would be misread in silence."""
    model = build("Bloom", vocab_size=97, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(NotImplementedError, match=r"BloomConfig.*eager"):
        model(torch.randint(3, 97, (2, 12)))


# ---- lmops.optimize -------------------------------------------------------------------------------------------------


def test_optimize_changes_one_instance():
    """Two models of one config: attention of one changes, and comes back; its loss too."""
    config = transformers.LlamaConfig(**LLAMA, attn_implementation="eager")
    first, second = (transformers.LlamaForCausalLM(config).eval() for _ in range(2))
    tokens = torch.randint(3, 97, (2, 12))
    labels = tokens.masked_fill(padding("left") == 0, -100)
    expected = first(tokens, labels=labels)
    report = lmops.optimize(first, verify={"input_ids": tokens})
    layers = [f"model.layers.{i}.self_attn" for i in range(2)]
    found = {what: [item.name for item in report.replaced if item.what == what] for what in ("attention", "rope")}
    assert found == {"attention": layers, "rope": layers}
    assert sum(item.what == "rms_norm" for item in report.replaced) == 5
    assert "cross_entropy" in {item.what for item in report.replaced if item.name == ""}
    with implementation("torch") as calls:
        out = first(tokens, labels=labels)
    assert calls.count == 2 + 2 + 5 + 2 + 1  # attention, RoPE, norms, SwiGLU, the loss
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    with implementation("torch") as calls:
        second(tokens, labels=labels)
    assert calls.count == 0
    assert config._attn_implementation == second.config._attn_implementation == "eager"
    assert "model.layers.0.self_attn" in lmops.restore(first)
    assert first.config is config
    with implementation("torch") as calls:
        assert torch.equal(first(tokens, labels=labels).logits, expected.logits)
    assert calls.count == 0


@pytest.mark.parametrize(
    ("family", "settings", "found"),
    [
        ("Llama", {}, "swiglu"),
        ("Phi3", {}, "swiglu"),
        ("Gemma2", {}, "geglu"),
        ("Llama", {"hidden_act": "gelu"}, "geglu, exact"),
        ("Llama", {"hidden_act": "relu"}, None),
    ],
)
def test_gated_activations_are_found_out(family, settings, found):
    model = build(family, **{**DECODERS[family], **settings})
    model.set_attn_implementation("eager")
    tokens = torch.randint(3, 97, (2, 12))
    report = lmops.optimize(model, attention=False, loss=False, verify=tokens)
    names = [f"model.layers.{i}.mlp" for i in range(2)]
    assert [(i.name, i.what) for i in report.replaced if i.name in names] == [(n, found) for n in names if found]
    assert [i.name for i in report.kept] == ([] if found else names)
    others = sum(i.what in ("rms_norm", "rope") for i in report.replaced)
    with implementation("torch") as calls:
        model(tokens).logits.sum().backward()
    assert calls.count == 2 * (others + 2 * bool(found))


@pytest.mark.parametrize(
    ("family", "n_norms"), [("Qwen3", 9), ("Gemma2", 9), ("Gemma3", 13), ("GptOss", 5), ("T5", 12)]
)
def test_norms_are_found_out(family, n_norms):
    """Of weights, or of 1 + weight; of queries and keys; with T5's name for eps."""
    settings = {**ENCODER_DECODER, **T5} if family == "T5" else {}
    model = build(family, "ForConditionalGeneration" if family == "T5" else "ForCausalLM", **settings)
    model.set_attn_implementation("eager")
    tokens = torch.randint(3, 97, (2, 12))
    inputs = {"input_ids": tokens, "decoder_input_ids": tokens} if family == "T5" else {"input_ids": tokens}
    report = lmops.optimize(model, attention=False, loss=False, verify=inputs)
    assert sum(item.what == "rms_norm" for item in report.replaced) == n_norms
    assert not report.kept
    assert {type(m).__name__ for m in model.modules() if "_lmops_eps" in m.__dict__} == {
        "T5LayerNorm" if family == "T5" else f"{family}RMSNorm"
    }


def test_optimize_a_model_inside_another_module():
    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = build("Bert", "Model", **BERT, attn_implementation="sdpa")
            self.head = torch.nn.Linear(32, 3)

        def forward(self, tokens):
            return self.head(self.encoder(tokens).last_hidden_state[:, 0])

    model, tokens = Classifier(), torch.randint(3, 97, (2, 12))
    report = lmops.optimize(model, linear="int8", group_size=16, skip=["pooler", "head"], verify=tokens)
    names = [item.name for item in report.replaced if item.what == "attention"]
    assert names == [f"encoder.encoder.layer.{i}.attention.self" for i in range(2)]
    assert sum(item.what == "int8 weight" for item in report.replaced) == 12
    assert report.agreement == 1


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_bloom(side):
    """ALiBi, in layers that do not ask the registry: their instances get another forward."""
    model = build(
        "Bloom", vocab_size=97, hidden_size=32, n_layer=2, n_head=4, attn_implementation="eager", pad_token_id=0
    )
    mask, tokens = padding(side), torch.randint(3, 97, (2, 12))
    inputs = {"input_ids": tokens, "attention_mask": mask}

    def results(model):
        logits = model(**inputs).logits[mask.bool()]
        logits.square().sum().backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.input_layernorm.weight.normal_(1, 0.3)
    generated = model.generate(**inputs, **options)
    baseline, exact = results(copy.deepcopy(model)), copy.deepcopy(model).double()
    exact.config._attn_implementation = "added"  # as "eager", whose mask overflows in float64
    truth = results(exact)
    report = lmops.optimize(model, loss=False, norm=False)
    assert [item.name for item in report.replaced] == [f"transformer.h.{i}.self_attention" for i in range(2)]
    assert torch.equal(model.generate(**inputs, **options), generated)
    with implementation("torch") as calls:
        actual = results(model)
    assert calls.count == 4
    for a, b, t in zip(actual, baseline, truth, strict=True):
        assert (b - t).abs().max() < 1e-4 * t.abs().max()
        assert_accurate(a, t, b)


def test_layers_that_compute_attention_themselves_are_reported():
    model = transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    report = lmops.optimize(model, norm=False)
    assert [item.name for item in report.replaced] == [""]  # the loss
    assert [item.name for item in report.kept] == [f"transformer.h.{i}.self_attention" for i in range(2)]
    assert "computes attention itself" in str(report)
    assert "attention" not in lmops.restore(model)


def test_skip_cannot_split_the_attention_of_a_model():
    model = build("Llama", attn_implementation="sdpa")
    config = model.config
    with pytest.raises(ValueError, match=r"skip names model.layers.0.self_attn.*attention=False"):
        lmops.optimize(model, skip=["layers.0"])
    assert model.config is config
    assert model.config._attn_implementation == "sdpa"


def test_verify_with_a_truth_that_is_none():
    """transformers' eager attention is NaN in float64 where a row is masked throughout."""
    model = build("Llama", attn_implementation="eager")
    inputs = {"input_ids": torch.randint(3, 97, (2, 12)), "attention_mask": padding("left")}
    with pytest.raises(ValueError, match="no truth to compare with"):
        lmops.optimize(model, verify=inputs)
    model.set_attn_implementation("sdpa")
    assert lmops.optimize(model, verify=inputs).verified


def test_losses():
    """Masked language models, labels shifted by the caller, a number of items."""
    logits, labels = torch.randn(2, 6, 97, requires_grad=True), torch.randint(97, (2, 6))
    labels[0, :3] = -100
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

    for ours, theirs in ((integration.causal_lm_loss, ForCausalLMLoss), (integration.masked_lm_loss, ForMaskedLMLoss)):
        for options in ({}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}):
            assert ours(logits, labels, 97, **options).item() == pytest.approx(
                theirs(logits, labels, 97, **options).item(), rel=1e-6
            )
    shifted = integration.causal_lm_loss(logits, None, 97, shift_labels=labels)
    assert shifted.item() == pytest.approx(ForMaskedLMLoss(logits, labels, 97).item(), rel=1e-6)


def test_learned_queries_are_given_once_for_the_batch():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(4, 2, 5, 8)
    out, _ = integration.attention_forward(torch.nn.Module(), q, k, k, None, is_causal=False)
    again, _ = integration.attention_forward(torch.nn.Module(), q.repeat(4, 1, 1, 1), k, k, None, is_causal=False)
    assert torch.equal(out, again)


# ---- quantized models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("linear", ["int4", "fp8"])
def test_what_optimize_quantized_is_saved_and_loaded(tmp_path, linear, tied):
    """Also a head in 8 bits, which shares no weight with the embedding any more. No other model's config changes."""
    model, tokens = build("Llama", tie_word_embeddings=tied), torch.randint(3, 97, (2, 12))
    other = type(model)(model.config)
    lmops.optimize(model, attention=False, linear=linear, group_size=16)
    with torch.no_grad():
        expected = model(tokens).logits
        model.save_pretrained(tmp_path)
        again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        lmops.restore(model)
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert model.config is model.model.config is not other.config
    assert other.config.tie_word_embeddings == tied
    assert not hasattr(other.config, "quantization_config")


def test_w8a8_is_not_saved(tmp_path):
    model = build("Llama")
    lmops.optimize(model, linear="w8a8")
    with pytest.raises(NotImplementedError, match="W8A8"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("settings", [{}, {"bits": 8}, {"method": "gptq"}, {"symmetric": True}], ids=str)
def test_quantized_as_it_is_loaded_saved_and_loaded(tmp_path, settings):
    model, tokens = build("Llama", attention_bias=True), torch.randint(3, 97, (2, 12))
    model.save_pretrained(tmp_path / "float")
    calibration = [tokens] if settings.get("method") == "gptq" else None
    config = LmopsConfig(**settings, group_size=16, calibration=calibration)
    quantized = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=config, attn_implementation="lmops"
    )
    linear = [name for name, module in quantized.named_modules() if isinstance(module, QuantLinear)]
    assert len(linear) == 2 * 7
    expected = copy.deepcopy(model)
    quantize_model(expected, group_size=16, calibration=calibration, progress=False, **settings)
    with torch.no_grad():
        logits = quantized(tokens).logits
        assert torch.equal(logits, expected(tokens).logits)
    quantized.save_pretrained(tmp_path / "quantized")
    saved = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert saved == {"quant_method": "lmops", "bits": settings.get("bits", 4), "group_size": 16, "skip": ["lm_head"],
                     "method": settings.get("method", "rtn"), "symmetric": "symmetric" in settings}  # fmt: skip
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantized", attn_implementation="lmops", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not any(p.is_meta for p in again.parameters())
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, logits)
    with pytest.raises(ValueError, match="quantized already"):
        lmops.optimize(again, linear="int4")
    exact = again(tokens).logits  # with gradients: without, layers on a CPU may round weights to float16
    floats = again.dequantize()
    assert not any(isinstance(module, QuantLinear) for module in floats.modules())
    baseline, truth = floats(tokens).logits, floats.double()(tokens).logits
    assert_accurate(exact, truth, baseline)


def foreign_checkpoint(folder, method, **changes):
    """A Llama whose linear layers are GPTQ's or AWQ's; the float model that it stands for."""
    model = build("Llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    tensors = {name: t.half() for name, t in model.state_dict().items()}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            n_out, n_in = layer.weight.shape
            codes, zeros, scales = numbers(n_out, n_in, n_in // 16, 4)
            g_idx = groups_of(n_in, 16, shuffled=changes.get("desc_act", False))
            scales = scales / 8
            layer.weight.data = weight_of(codes, zeros, scales, g_idx).float()
            parts = awq_tensors(codes, zeros, scales) if method == "awq" else gptq_tensors(
                codes, zeros, scales, 4, 1, g_idx
            )  # fmt: skip
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{part}": t for part, t in parts.items()}
    from safetensors.torch import save_file

    model.config.dtype = torch.float16
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "gptq": {"bits": 4, "group_size": 16, "sym": False, "desc_act": False, "quant_method": "gptq"},
        "awq": {"bits": 4, "group_size": 16, "zero_point": True, "version": "gemm", "quant_method": "awq"},
    }[method] | changes
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return model


@pytest.mark.parametrize(("method", "changes"), [("gptq", {}), ("gptq", {"desc_act": True}), ("awq", {})], ids=str)
def test_gptq_and_awq_checkpoints_without_their_packages(tmp_path, method, changes):
    expected, tokens = foreign_checkpoint(tmp_path, method, **changes), torch.randint(3, 97, (2, 12))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="lmops", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    logits = model(tokens).logits  # with gradients, see above
    baseline, truth = expected(tokens).logits, expected.double()(tokens).logits
    assert_accurate(logits, truth, baseline)
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="lmops")
    assert torch.equal(again(tokens).logits, logits)


@pytest.mark.parametrize(("changes", "message"), [
    ({"group_size": 32}, "group_size 32 in quantization_config need"),
    ({"bits": 8}, "8 bits with group_size 16"),
    ({"sym": "yes"}, "quantization_config.sym = 'yes' is not supported"),
], ids=str)  # fmt: skip
def test_a_config_that_disagrees_with_its_tensors(tmp_path, changes, message):
    foreign_checkpoint(tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_of_other_sizes(tmp_path):
    foreign_checkpoint(tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(CheckpointError, match=r"mlp.*the checkpoint's weight is \(.*the model's layer \("):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"layers.1.*in the model there is none"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(("settings", "error", "message"), [
    ({"bits": 3}, ValueError, "bits must be 4 or 8, got 3"),
    ({"method": "best"}, ValueError, "method must be one of rtn, gptq, awq, got 'best'"),
    ({"group": 3}, TypeError, "no argument 'group'"),
], ids=str)  # fmt: skip
def test_bad_quantizer_settings(settings, error, message):
    with pytest.raises(error, match=message):
        LmopsConfig(**settings)


# ---- what torch does with whole models ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_compiled_whole(family):
    """torch.compile(fullgraph=True), forward and backward, with the operators inside."""
    model = build(family, attn_implementation="sdpa")
    tokens = torch.randint(3, 97, (2, 12))
    exact = copy.deepcopy(model).double()
    expected = exact(tokens, labels=tokens)
    expected.loss.backward()
    baseline = copy.deepcopy(model)
    baseline(tokens, labels=tokens).loss.backward()
    lmops.optimize(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with implementation("torch") as calls:
        out = compiled(tokens, labels=tokens)
        out.loss.backward()
    assert calls.count >= 2 * 2 + 1
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert_accurate(grads(model), grads(exact), grads(baseline))


def grads(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_exported():
    model = build("Llama").requires_grad_(False)
    lmops.optimize(model, linear="int8", group_size=16)
    tokens = torch.randint(3, 97, (2, 12))
    program = torch.export.export(model, (), {"input_ids": tokens, "use_cache": False}, strict=False)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"lmops.attention_forward.default", "lmops.quantized_matmul_forward.default"} <= names
    loaded = program.module()(input_ids=tokens, use_cache=False).logits
    model.model.embed_tokens.requires_grad_()  # without gradients layers on a CPU may round weights to float16
    assert torch.allclose(loaded, model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """In autocast's type where it would be without lmops: as close to the truth, and trainable."""
    model = build("Llama", attn_implementation="sdpa")
    tokens = torch.randint(3, 97, (2, 12))
    truth = copy.deepcopy(model).double()(tokens).logits
    with torch.autocast("cpu", dtype):
        baseline = model(tokens).logits
        lmops.optimize(model)
        actual = model(tokens, labels=tokens)
    assert actual.logits.dtype == dtype
    assert actual.loss.dtype == torch.float32
    assert_accurate(actual.logits, truth, baseline)
    actual.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model = build("Llama", attention_dropout=0.3).train()
    lmops.optimize(model)
    tokens = torch.randint(3, 97, (2, 12))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(7)
        with implementation("torch") as calls:
            loss = model(tokens, labels=tokens).loss
            loss.backward()
        found.append((calls.count, loss.item(), grads(model)))
    assert found[1][0] == found[0][0] + 2 * 5  # attention, RoPE, two norms, SwiGLU again in the backward
    assert found[0][1] == found[1][1]
    assert torch.allclose(found[0][2], found[1][2], atol=1e-6)


# ---- the paged cache ------------------------------------------------------------------------------------------------

PAGED = ["GPT2", "Llama", "Mistral", "Qwen3", "Gemma2", "Gemma3", "GptOss"]


@pytest.mark.parametrize("family", PAGED)
def test_paged_cache_generates_the_same(family, monkeypatch):
    """Without padding and with, over block ends, reading the pages in place; and with other attention, copied."""
    model, tokens = build(family), torch.randint(3, 97, (2, 8))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    options = {"max_new_tokens": 7, "do_sample": False}
    for inputs in ({"input_ids": tokens}, {"input_ids": tokens, "attention_mask": mask}):
        model.set_attn_implementation("eager")
        expected = model.generate(**inputs, **options)
        cache = integration.PagedCache(model, n_tokens=40, block_size=4)
        assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), expected)  # dense copies
        model.set_attn_implementation("lmops")
        cache = integration.PagedCache(model, n_tokens=40, block_size=4)
        assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), expected)
        cache = integration.PagedCache(model, n_tokens=40, block_size=4, attention_mask=inputs.get("attention_mask"))
        with monkeypatch.context() as patched:
            patched.setattr(integration.PagedStates, "dense", None)
            assert torch.equal(model.generate(**inputs, **options, past_key_values=cache), expected)
        assert cache.get_seq_length() == 14
        assert [seq.n_tokens for seq in cache.sequences] == [14 - 3 * ("attention_mask" in inputs), 14]
        cache.paged.check_integrity()
        cache.reset()
        assert cache.paged.allocator.n_free == 10


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_paged_cache_under_autocast(family):
    """Where rotated keys are in float32, and values, or all, in bfloat16."""
    model, tokens = build(family), torch.randint(3, 97, (2, 8))
    cache = integration.PagedCache(model, n_tokens=40, block_size=4)
    with torch.no_grad():
        truth = model.double()(tokens).logits
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            baseline = model(tokens).logits
            actual = [model(part, past_key_values=cache).logits for part in (tokens[:, :7], tokens[:, 7:])]
    assert_accurate(torch.cat(actual, 1), truth, baseline)


@pytest.mark.parametrize("how", [{"num_beams": 3, "num_return_sequences": 2}, {"num_return_sequences": 3}], ids=str)
def test_paged_cache_with_beams_and_samples(how):
    """Beams fork: they share the blocks of their past."""
    model, tokens = build("Llama"), torch.randint(3, 97, (2, 9))
    options = {"max_new_tokens": 6, "do_sample": "num_beams" not in how, **how}
    torch.manual_seed(1)
    expected = model.generate(tokens, **options)
    torch.manual_seed(1)
    cache = integration.PagedCache(model, n_tokens=120, block_size=4)
    assert torch.equal(model.generate(tokens, **options, past_key_values=cache), expected)
    cache.paged.check_integrity()


def test_paged_cache_under_another_mask():
    """What pages alone cannot say is left to the mask: keys hidden in the middle, beside padding that is known."""
    model, tokens = build("Mistral"), torch.randint(3, 97, (2, 12))
    mask = padding("left")
    cache = integration.PagedCache(model, n_tokens=40, block_size=4, attention_mask=mask)
    mask[1, 4:6] = 0
    with torch.no_grad():
        found = model(tokens, attention_mask=mask, past_key_values=cache).logits[mask.bool()]
        expected = model(tokens, attention_mask=mask).logits[mask.bool()]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_paged_cache_in_pieces_and_cropped():
    model, tokens = build("Mistral"), torch.randint(3, 97, (2, 13))
    with torch.no_grad():
        whole = model(tokens).logits
        cache = integration.PagedCache(model, n_tokens=40, block_size=4)
        parts = [model(part, past_key_values=cache).logits for part in tokens.split((5, 1, 7), 1)]
        assert torch.allclose(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        cache.crop(-9)
        again = model(tokens[:, 4:], past_key_values=cache).logits
        assert torch.allclose(again, whole[:, 4:], rtol=1e-4, atol=1e-5)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        assert cache.get_seq_length() == 13
        next_ = model(tokens[[1, 0], :1], past_key_values=cache).logits
        expected = model(torch.cat([tokens, tokens[:, :1]], 1)[[1, 0]]).logits[:, -1:]
        assert torch.allclose(next_, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_a_padded_paged_cache_change_places():
    model, tokens, mask = build("Llama"), torch.randint(3, 97, (2, 12)), padding("left")
    cache = integration.PagedCache(model, n_tokens=40, block_size=4, attention_mask=mask)
    order = torch.tensor([1, 0])
    with torch.no_grad():
        model(tokens, attention_mask=mask, past_key_values=cache)
        cache.batch_select_indices(order)
        longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)[order]
        found = model(tokens[:, :1], attention_mask=longer, past_key_values=cache).logits
        expected = model(torch.cat([tokens[order], tokens[:, :1]], 1), attention_mask=longer).logits[:, -1:]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pages", ["int8", "int4", "fp8"])
def test_quantized_pages(pages):
    model, tokens = build("Llama"), torch.randint(3, 97, (2, 12))
    with torch.no_grad():
        expected = model(tokens).logits
        cache = integration.PagedCache(model, n_tokens=40, block_size=4, pages=pages)
        found = torch.cat([model(part, past_key_values=cache).logits for part in tokens.split((11, 1), 1)], 1)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < {"int8": 0.01, "fp8": 0.1, "int4": 0.2}[pages]


def test_paged_cache_refuses():
    model, tokens = build("Llama"), torch.randint(3, 97, (2, 12))
    cache = integration.PagedCache(model, n_tokens=16, block_size=4)
    with torch.no_grad():
        with pytest.raises(lmops.cache.OutOfBlocksError):
            model(tokens, past_key_values=cache)
        assert cache.get_seq_length() == 0
        assert cache.paged.allocator.n_free == 4
        model(tokens[:, :8], past_key_values=cache)
        with pytest.raises(ValueError, match="the cache has 2 sequences, the batch 1"):
            model(tokens[:1], past_key_values=cache)
        with pytest.raises(ValueError, match="must be negative"):
            cache.crop(3)
    with pytest.raises(NotImplementedError, match="no gradient"):
        model(tokens[:, :4], past_key_values=integration.PagedCache(model, n_tokens=16))
    for mask, message in ((padding("right"), "with padding elsewhere"), (torch.ones(3), r"got shape \(3,\)$")):
        with pytest.raises(ValueError, match=message):
            integration.PagedCache(model, n_tokens=16, attention_mask=mask)
    cache = integration.PagedCache(model, n_tokens=64, attention_mask=padding("left"))
    with torch.no_grad(), pytest.raises(ValueError, match="attention_mask has 2 rows, the batch 3"):
        model(torch.randint(3, 97, (3, 12)), past_key_values=cache)
    t5 = build("T5", "ForConditionalGeneration", **ENCODER_DECODER, **T5)
    with pytest.raises(ValueError, match="model must be a decoder"):
        integration.PagedCache(t5, n_tokens=16)


def test_kernels_under_a_paged_cache(path):
    """Pages written and read by kernels, padded on the left, in a window."""
    model = build("Gemma2").to(path.device)
    tokens, mask = torch.randint(3, 97, (2, 8), device=path.device), torch.ones(2, 9, device=path.device)
    mask[0, :3] = 0
    with torch.no_grad():
        cache = integration.PagedCache(model, n_tokens=32, block_size=4, attention_mask=mask[:, :8])
        model(tokens, attention_mask=mask[:, :8], past_key_values=cache)
        found = model(tokens[:, :1], attention_mask=mask, past_key_values=cache).logits
        both = torch.cat([tokens, tokens[:, :1]], 1)
        expected = model(both, attention_mask=mask).logits[:, -1:]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_continuous_batching_generates_the_same(family, monkeypatch):
    model = build(family, attn_implementation="eager")
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14] * 9]
    config = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=96)
    alone = [model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts]
    queries = []

    def attention(query, *args, **kwargs):
        queries.append(query.shape[2])
        return integration_attention(query, *args, **kwargs)

    integration_attention = integration.attention
    monkeypatch.setattr(integration, "attention", attention)
    with integration.continuous_batching(model):
        outputs = model.generate_batch(prompts, generation_config=config, progress_bar=False)
    together = [outputs[f"req_{i}"].generated_tokens for i in range(len(prompts))]
    assert together == alone
    assert queries[0] == sum(map(len, prompts))  # one ragged batch, without padding
    assert model.config._attn_implementation == "eager"


def test_continuous_batching_over_a_block_table(path):
    """What a cache of transformers hands over on a GPU, for one token a sequence; the last row is padding."""
    lengths, size, n_heads = [5, 16, 1, 0], 4, 2
    table = torch.tensor([[3, 9, -1, -1], [1, 2, 8, 4], [0, -1, -1, -1], [-1] * 4], dtype=torch.int32)
    dense = [torch.randn(n, 2, n_heads, 16) for n in lengths]  # keys and values of each token
    caches = torch.full((2, 10, size, n_heads, 16), float("nan"))
    for row, tokens in zip(table.tolist(), dense, strict=True):
        for i, (k, v) in enumerate(tokens[:-1]):
            caches[0, row[i // size], i % size], caches[1, row[i // size], i % size] = k, v
    new = torch.stack([t[-1] if len(t) else torch.zeros(2, n_heads, 16) for t in dense], 2)  # (2, heads, sequences, 16)
    query, sinks = torch.randn(1, 4, 4, 16), torch.randn(4)
    caches, table, new, query, sinks = (t.to(path.device) for t in (caches, table, new, query, sinks))
    k_cache, v_cache = caches

    class Cache:
        def update(self, key_states, value_states, layer_idx, kwargs):
            kwargs |= {"k_cache": k_cache, "v_cache": v_cache, "cu_seq_lens_k": kwargs["cu_seq_lens_k"]["full"]}
            return key_states, value_states

    cu = torch.tensor([0, *lengths]).cumsum(0).int().to(path.device)
    out, _ = integration.batching_forward(
        SimpleNamespace(layer_idx=0), query, new[:1], new[1:], None, scaling=0.3, sliding_window=7, softcap=2.0,
        s_aux=sinks, cache=Cache(), cu_seq_lens_q=torch.arange(5).int(), max_length_q=1, block_table=table,
        cu_seq_lens_k={"full": cu},
    )  # fmt: skip
    assert out.shape == (1, 4, 4, 16)
    for s, tokens in enumerate(dense[:-1]):
        seen = tokens[-7:].transpose(0, 1).transpose(1, 2)  # (2, heads, keys, 16)
        truth, _ = plain_attention(
            None, query[:, :, s : s + 1].cpu(), seen[:1], seen[1:], None, scaling=0.3, softcap=2.0, s_aux=sinks.cpu()
        )
        torch.testing.assert_close(out[:, s].cpu(), truth[:, 0])
    assert not out[:, 3].any()


def test_continuous_batching_refuses():
    with pytest.raises(ValueError, match='is for continuous batching only; use "lmops"'):
        integration.batching_forward(None, None, None, None, None)
    with (
        pytest.raises(NotImplementedError, match="BertModel has no generate_batch"),
        integration.continuous_batching(transformers.BertModel(transformers.BertConfig(**BERT))),
    ):
        pass
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4))
    with (
        pytest.raises(NotImplementedError, match="BloomForCausalLM: its layers compute"),
        integration.continuous_batching(bloom),
    ):
        pass
