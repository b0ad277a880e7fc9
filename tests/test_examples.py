"""The example programs do what they say."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lmops.models.gpt
import lmops.quantization
import lmops.testing
from lmops.models.gpt import GPTConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIG = GPTConfig(vocab_size=256, context_length=32, n_layers=2, n_heads=2, d_model=32)
TEXT = "".join(f"{i} bottles of beer on the wall, take one down, pass it around, " for i in range(99, 0, -1))


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load("train")


@pytest.fixture
def text():
    return torch.frombuffer(bytearray(TEXT.encode()), dtype=torch.uint8)


def plain_torch(monkeypatch) -> None:
    """torch's own attention and cross-entropy in the place of ours."""
    monkeypatch.setattr(
        lmops.models.gpt,
        "attention",
        lambda q, k, v, **options: (F.scaled_dot_product_attention(q, k, v, is_causal=True), None),
    )
    monkeypatch.setattr(
        lmops.models.gpt,
        "linear_cross_entropy",
        lambda x, weight, targets: F.cross_entropy(F.linear(x, weight).flatten(0, 1), targets.flatten()),
    )


def test_the_loss_curve_is_that_of_plain_torch(path, example, text, monkeypatch):
    _, losses = example.train(text, 4, config=CONFIG, rows=2, device=path.device)
    with monkeypatch.context() as patch:
        plain_torch(patch)
        _, expected = example.train(text, 4, config=CONFIG, rows=2, device=path.device)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len(set(losses)) == 4


def test_training_learns_and_goes_on_from_its_checkpoint(example, text, tmp_path):
    model, losses = example.train(text, 60, config=CONFIG, rows=8, lr=3e-3)
    assert losses[0] == pytest.approx(5.55, abs=0.1)  # ln 256: nothing is known yet
    assert losses[-1] < 3.2

    checkpoint = tmp_path / "model.pt"
    arguments = {"config": CONFIG, "rows": 8, "lr": 3e-3, "save_every": 10}
    example.train(text, 25, checkpoint, **arguments)
    assert torch.load(checkpoint)["losses"] == losses[:25]
    resumed, all_losses = example.train(text, 60, checkpoint, **arguments)
    assert all_losses == losses
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert not list(tmp_path.glob("*.unfinished"))


def test_the_command_line(example, tmp_path, monkeypatch, capsys):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    monkeypatch.setattr(sys, "argv", ["train.py", str(file), "--steps", "2", "--device", "cpu"])
    monkeypatch.setitem(example.train.__kwdefaults__, "config", CONFIG)
    example.main()
    assert len(capsys.readouterr().out) >= 31
    file.write_text("short")
    with pytest.raises(ValueError, match="the text has 5 bytes; it must have more than the context_length of 32"):
        example.main()


def test_nanogpt_learns(capsys):
    nanogpt = load("nanogpt")
    with lmops.testing.implementation("torch") as calls:
        losses = nanogpt.main(20)
    assert calls.count > 20 * 2 * (2 + 5)  # forward and backward of two attentions and five norms
    assert losses[-1] < losses[0] - 1
    assert "h.* (2)       Block      scaled_dot_product_attention in its forward" in capsys.readouterr().out


def test_qlora_learns_and_goes_on(tmp_path, text):
    qlora, config = load("qlora"), {"length": 24, "rank": 4, "lr": 1e-2, "save_every": 4}

    def model():
        torch.manual_seed(0)
        made = lmops.GPT(CONFIG)
        made.head.weight.data *= 4  # an untrained model has hardly anything to say
        lmops.quantization.quantize_model(made, group_size=32, progress=False)
        return made

    losses = qlora.train(model(), text.long(), tmp_path / "one.pt", 24, **config)
    assert sum(losses[-4:]) < sum(losses[:4]) - 1
    trained = qlora.train(model(), text.long(), tmp_path / "two.pt", 10, **config)
    assert trained == losses[:10]
    assert qlora.train(model(), text.long(), tmp_path / "two.pt", 24, **config) == pytest.approx(losses, rel=1e-5)
    saved = torch.load(tmp_path / "two.pt")["adapters"]
    assert len(saved) == 2 * 4 * 2
    assert all(name.startswith("blocks.") and name.endswith((".a", ".b")) for name in saved)
    with pytest.raises(ValueError, match="it must have more than 24"):
        qlora.train(model(), text[:20], tmp_path / "none.pt", 1, **config)


def test_a_hugging_face_model_in_four_bits(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    example = load("hf_int4")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = example.optimize(str(tmp_path))
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    inputs = {"input_ids": torch.randint(3, 97, (2, 9)), "attention_mask": mask}
    tokens = example.answer(model, inputs, 6)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, 9:]
    assert torch.equal(tokens, expected)
    assert "int4 weight" in capsys.readouterr().out
