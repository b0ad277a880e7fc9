"""LoRA of Hugging Face's PEFT over quantized layers: it trains, is saved, and comes off again."""

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import lmops  # noqa: E402
from lmops.quantization import QuantLinear  # noqa: E402
from lmops.testing import implementation  # noqa: E402


def quantized(linear="int4"):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.lm_head.weight.data *= 20  # as drawn, its logits would hardly differ from 0
    lmops.optimize(model, linear=linear, group_size=16)
    return model


def with_adapters(model):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def train(model, tokens, steps=20):
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("linear", ["int4", "int8", "w8a8"])
def test_adapters_alone_are_trained(linear, tmp_path):
    model = with_adapters(quantized(linear))
    tokens = torch.randint(97, (2, 12))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 3 * 2
    assert all("lora_" in name for name in trainable)
    with implementation("torch") as calls:
        losses = train(model, tokens)
    assert calls.count > 20 * 14
    assert losses[-1] < losses[0] - 0.5
    after = model.state_dict()
    changed = {name for name, t in after.items() if not torch.equal(t, before[name])}
    assert changed == {name for name in before if "lora_" in name}

    model.eval()
    with torch.no_grad():
        logits = model(tokens).logits
        with model.disable_adapter():
            base = model(tokens).logits
    assert not torch.allclose(logits, base, atol=0.1)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(linear), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, logits)
        plain = model.unload()
        assert torch.equal(plain(tokens).logits, base)
    assert sum(type(m).__name__ in ("QuantLinear", "W8A8Linear") for m in plain.modules()) == (
        14 if linear == "w8a8" else 15  # with the head
    )


def test_merging_into_quantized_weights_is_refused():
    """Nothing is lost in silence: the layer says what to do, and that works."""
    model = with_adapters(quantized())
    tokens = torch.randint(97, (2, 12))
    train(model, tokens, 3)
    model.eval().enable_input_require_grads()  # without gradients layers on a CPU may round weights to float16
    logits = model(tokens).logits.detach()
    with pytest.raises(RuntimeError, match=r"quantized and cannot be written to.*dequantize\(\)"):
        model.merge_and_unload()
    assert torch.equal(model(tokens).logits, logits)
    for module in model.modules():
        if isinstance(getattr(module, "base_layer", None), QuantLinear):
            module.base_layer = module.base_layer.dequantize()
    merged = model.merge_and_unload()
    assert (merged(tokens).logits - logits).abs().max() < 1e-5 * logits.abs().max()
    assert not any("lora" in name for name, _ in merged.named_parameters())
