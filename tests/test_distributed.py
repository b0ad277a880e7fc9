"""DDP and FSDP2 around an optimized model: two processes over gloo compute what one does."""

import os
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist

transformers = pytest.importorskip("transformers")

import lmops  # noqa: E402
from lmops.testing import implementation  # noqa: E402

STEPS = 3


def build():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    lmops.optimize(model)
    return model


def batches():
    return torch.randint(97, (STEPS, 4, 12), generator=torch.Generator().manual_seed(1))


def train(model, rows):
    """Losses and the parameters after a few steps on some rows of the batches."""
    sgd = torch.optim.SGD(model.parameters(), 0.5)
    for tokens in batches()[:, rows]:
        model(input_ids=tokens, labels=tokens).loss.backward()
        sgd.step()
        sgd.zero_grad()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def worker(kind, rank, file):
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{file}.rendezvous")
    model = build()
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        wrapped = fully_shard(model)
    with implementation("torch") as calls:
        train(wrapped, slice(2 * rank, 2 * rank + 2))
    assert calls.count >= STEPS * (2 * 2 + 1)  # attention of two layers, forward and backward; the loss
    parameters = {name: whole(p.detach()) for name, p in model.named_parameters()}
    if rank == 0:
        torch.save(parameters, file)
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind, tmp_path):
    file = tmp_path / "parameters.pt"
    command = [sys.executable, __file__, kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank), str(file)], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    alone = build()
    initial = {name: p.detach().clone() for name, p in alone.named_parameters()}
    train(alone, slice(None))
    together = torch.load(file)
    for name, p in alone.named_parameters():
        moved = (p - initial[name]).abs().max()
        assert moved > 0
        assert (together[name] - p).abs().max() < 1e-3 * moved, name


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), sys.argv[3])
