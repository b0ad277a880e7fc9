"""Train a small GPT on the bytes of a text file, on a GPU or a CPU. Stopped and started again, it goes on where it was.

python examples/train.py shakespeare.txt --steps 2000 --checkpoint shakespeare.pt
"""

import argparse
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import lmops

CONFIG = lmops.GPTConfig(vocab_size=256, context_length=256, n_layers=4, n_heads=4, d_model=128)


def batch(text: torch.Tensor, step: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and the token after each, (rows, length), from places that the step alone decides."""
    starts = torch.randint(len(text) - length, (rows, 1), generator=torch.Generator().manual_seed(step))
    window = text[starts + torch.arange(length + 1)].long()
    return window[:, :-1], window[:, 1:]


def train(
    text: torch.Tensor, steps: int, checkpoint: Path | None = None, *, config: lmops.GPTConfig = CONFIG, rows: int = 16,
    lr: float = 1e-3, save_every: int = 100, device: str = "cpu",
) -> tuple[lmops.GPT, list[float]]:  # fmt: skip
    """The model after `steps` steps and the loss of each; goes on from the checkpoint where there is one."""
    if len(text) <= config.context_length:
        raise ValueError(
            f"the text has {len(text)} bytes; it must have more than the context_length of {config.context_length}"
        )
    torch.manual_seed(0)
    model = lmops.GPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    losses: list[float] = []
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    columns = (TextColumn("loss {task.fields[loss]:.3f}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("train", total=steps, completed=len(losses), loss=losses[-1] if losses else 0.0)
        for step in range(len(losses), steps):
            tokens, targets = batch(text, step, rows, config.context_length)
            loss = model(tokens.to(device), targets.to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.update(task, advance=1, loss=losses[-1])
            if checkpoint and (len(losses) % save_every == 0 or len(losses) == steps):
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
                torch.save(state, unfinished := checkpoint.with_suffix(".unfinished"))
                unfinished.replace(checkpoint)  # a checkpoint is whole, whenever the program is stopped
    return model, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    text = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8)
    model, _ = train(text, args.steps, args.checkpoint, device=args.device)
    length = model.config.context_length - 1
    (sample,) = lmops.generate(model.eval(), [list(b"\n")], max_new_tokens=length, temperature=0.8, top_p=0.95, seed=1)
    print(bytes(sample).decode(errors="replace"))


if __name__ == "__main__":
    main()
