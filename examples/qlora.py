"""QLoRA: adapters over a model whose weights stay in 4 bits, trained on a text file. Started again, it goes on.

python examples/qlora.py SmolLM2-135M-Instruct.Q4_1.gguf text.txt adapters.pt --steps 100
"""

import argparse
from pathlib import Path

import torch
from rich.progress import track

import lmops
from lmops.modules import LoRALinear
from lmops.quantization import QuantLinear


def add_adapters(model: torch.nn.Module, rank: int) -> dict[str, torch.nn.Parameter]:
    """A LoRALinear over every quantized layer of the blocks; the parameters that are trained, by name."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear) and name.startswith("blocks."):
            model.set_submodule(name, LoRALinear(layer, rank, alpha=2 * rank))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(model: lmops.GPT, tokens: torch.Tensor, file: Path, steps: int, length: int = 256, rank: int = 8,
          lr: float = 1e-3, save_every: int = 10) -> list[float]:  # fmt: skip
    """The loss of every step, also of those before this run. `file` has adapters, optimizer and losses."""
    if len(tokens) <= length:
        raise ValueError(f"the text has {len(tokens)} tokens; it must have more than {length}")
    adapters = add_adapters(model.train(), rank)
    adam, losses = torch.optim.AdamW(adapters.values(), lr), []
    if file.exists():
        state = torch.load(file)
        model.load_state_dict(state["adapters"], strict=False)
        adam.load_state_dict(state["adam"])
        losses = state["losses"]
    for step in track(range(len(losses), steps), "training"):  # the step alone decides what is read
        start = torch.randint(len(tokens) - length, (), generator=torch.Generator().manual_seed(step))
        window = tokens[start : start + length + 1][None]
        (loss := model(window[:, :-1], window[:, 1:])).backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
        if len(losses) % save_every == 0 or len(losses) == steps:
            torch.save({"adapters": adapters, "adam": adam.state_dict(), "losses": losses}, f"{file}.unfinished")
            Path(f"{file}.unfinished").replace(file)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs=3, type=Path, metavar=("model", "text", "adapters"))
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    model, tokenizer = lmops.load(args.paths[0])
    losses = train(model, torch.tensor(tokenizer.encode(args.paths[1].read_text())), args.paths[2], args.steps)
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    print(f"loss of the first ten steps {first:.3f}, of the last ten {last:.3f}")
