"""Hugging Face's `kernels`: a model whose layers are annotated gets ours from a local repository."""

import copy

import pytest
import torch

kernels = pytest.importorskip("kernels")
transformers = pytest.importorskip("transformers")

from lmops.integrations.kernels_hub import kernel_mapping, write_repository  # noqa: E402
from lmops.testing import assert_accurate, implementation  # noqa: E402


def annotated(model, kind, name):
    """The model with its norms of a subclass that says which kernel it takes, as transformers says it."""
    subclass = kernels.use_kernel_forward_from_hub(name)(type(kind.__name__, (kind,), {"forward": kind.forward}))
    for module in model.modules():
        if type(module) is kind:
            module.__class__ = subclass
    return model


def llama():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return annotated(transformers.LlamaForCausalLM(config), LlamaRMSNorm, "RMSNorm")


def gemma():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    config = transformers.GemmaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2,
    )  # fmt: skip
    return annotated(transformers.GemmaForCausalLM(config), GemmaRMSNorm, "RMSNormZeroCentered")


@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING", "TRAINING | TORCH_COMPILE"])
@pytest.mark.parametrize("build", [llama, gemma])
def test_kernelize(build, mode, tmp_path):
    torch.manual_seed(0)
    model, tokens = build(), torch.randint(97, (2, 9))
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data += torch.randn_like(p) * 0.3
    truth, baseline = copy.deepcopy(model).double()(tokens).logits, model(tokens).logits
    modes = [getattr(kernels.Mode, part) for part in mode.split(" | ")]
    with kernels.use_kernel_mapping(kernel_mapping(write_repository(tmp_path))):
        model = kernels.kernelize(model, mode=modes[0] if len(modes) == 1 else modes[0] | modes[1], device="cpu")
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if len(modes) == 2 else model
    with implementation("torch") as calls:
        logits = run(tokens).logits
    assert calls.count == 5
    assert_accurate(logits, truth, baseline)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
