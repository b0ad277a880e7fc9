"""A Hugging Face model in 4 bits, generating over a paged cache.

python examples/hf_int4.py HuggingFaceTB/SmolLM2-135M-Instruct "What is the capital of France?" "Name a prime number."
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import lmops
from lmops.integrations.transformers import PagedCache


def optimize(name: str) -> PreTrainedModel:
    """The model in 4 bits, with the operators of lmops."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(name).to(device)
    print(lmops.optimize(model, linear="int4", group_size=32))
    return model


def answer(model: PreTrainedModel, inputs: dict[str, torch.Tensor], new_tokens: int) -> torch.Tensor:
    """New tokens of each row. The cache has room for all, in blocks; padding on the left takes none of it."""
    n_rows, n_tokens = inputs["input_ids"].shape
    room = n_rows * (n_tokens + new_tokens + 16)
    cache = PagedCache(model, room, attention_mask=inputs["attention_mask"])
    tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, past_key_values=cache)
    print(cache.paged)
    return tokens[:, n_tokens:]


def main(name: str, *questions: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    model = optimize(name)
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    ).to(model.device)
    tokens = answer(model, inputs, new_tokens=64)
    for question, text in zip(questions, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
        print(f"{question}\n    {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
