"""Answer one question, printing the text as it comes: the library's parts without the command line.

python examples/stream.py SmolLM2-135M-Instruct.Q4_1.gguf "What is the capital of France?"
"""

import sys

import lmops
from lmops.engine import GenerationStats, generate_stream


def main(path: str, question: str) -> None:
    model, tokenizer = lmops.load(path)
    if tokenizer is None:
        raise SystemExit(f"{path} has no tokenizer")
    prompt = tokenizer.chat(question)
    text, stats = tokenizer.stream(), GenerationStats()
    steps = generate_stream(
        model, [prompt], max_new_tokens=64, temperature=0.0, stop_tokens=tokenizer.stop_tokens, stats=stats
    )
    for (token,) in steps:  # one token for each prompt, None for one that has stopped
        if token is not None:
            print(text.push(token), end="", flush=True)
    print(text.finish())
    print(f"{stats.decode_tokens_per_second:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
