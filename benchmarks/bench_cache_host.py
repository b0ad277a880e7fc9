"""The host side of the paged KV cache on seeded traces: unused slots, prefill tokens saved, time an operation.

    python -m benchmarks cache_host
    python -m benchmarks cache_host --blocks 1000 1000000

Lengths are log-normal (sigma 1 in the logarithm). "chat" has the mean lengths that the vLLM paper (Kwon et al., 2023)
gives for ShareGPT, "instructions" those for Alpaca. No model runs.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import pytest

from lmops.cache import BlockAllocator, OutOfBlocksError, PagedSequence, PrefixCache

MAX_TOKENS = 2_048  # the context that contiguous caches reserve for each request
MEAN_TOKENS = {"chat": (161, 338), "instructions": (19, 58)}  # of prompts and of answers


def log_normal(rng: random.Random, mean: float, sigma: float = 1.0) -> int:
    """At least 1."""
    return max(1, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))


# ---- unused slots


def trace(kind: str, n_requests: int = 1_000) -> list[tuple[int, int]]:
    """(prompt tokens, answer tokens) of each request, together at most MAX_TOKENS."""
    rng = random.Random(0)
    prompt_mean, answer_mean = MEAN_TOKENS[kind]
    requests = []
    for _ in range(n_requests):
        prompt = min(log_normal(rng, prompt_mean), MAX_TOKENS // 2)
        requests.append((prompt, min(log_normal(rng, answer_mean), MAX_TOKENS - prompt)))
    return requests


@dataclass(frozen=True)
class Waste:
    """Sums over all steps. `running`: requests in the batch, the mean over the steps."""

    unused: float
    unused_at_worst: float
    running: float
    preempted: int
    steps: int


def serve(requests: Iterable[tuple[int, int]], block_size: int, n_slots: int) -> Waste:
    """Continuous batching: a request starts when its prompt fits, then every running one appends a token a step.

    Where no block is left, the request that came last gives up its blocks and starts again later.
    """
    allocator = BlockAllocator(n_slots // block_size, block_size)
    waiting = deque(requests)
    running: list[tuple[PagedSequence, tuple[int, int]]] = []
    held = used = steps = batch = preempted = 0
    worst = 0.0
    while waiting or running:
        while waiting:
            try:
                running.append((allocator.allocate(waiting[0][0]), waiting[0]))
            except OutOfBlocksError:
                break
            waiting.popleft()
        for seq, request in list(running):
            while seq.blocks:  # until it has its slot, or is the one that gives up
                try:
                    allocator.append(seq)
                    break
                except OutOfBlocksError:
                    last, its_request = running.pop()
                    allocator.free(last)
                    waiting.appendleft(its_request)
                    preempted += 1
            if seq.n_tokens == sum(request):
                running.remove((seq, request))
                allocator.free(seq)
        step_held = (allocator.n_blocks - allocator.n_available) * block_size
        step_used = sum(seq.n_tokens for seq, _ in running)
        if step_held:
            worst = max(worst, 1 - step_used / step_held)
        held, used, steps, batch = held + step_held, used + step_used, steps + 1, batch + len(running)
    allocator.check_integrity()
    return Waste(1 - used / held, worst, batch / steps, preempted, steps)


def serve_reserved(requests: Iterable[tuple[int, int]], n_slots: int) -> Waste:
    """The same with MAX_TOKENS slots in a row for every running request."""
    waiting = deque(requests)
    running: list[list[int]] = []  # tokens now, tokens at the end
    held = used = steps = batch = 0
    worst = 0.0
    while waiting or running:
        while waiting and (len(running) + 1) * MAX_TOKENS <= n_slots:
            prompt, answer = waiting.popleft()
            running.append([prompt, prompt + answer])
        for request in running:
            request[0] += 1
        running = [request for request in running if request[0] < request[1]]
        step_held, step_used = len(running) * MAX_TOKENS, sum(tokens for tokens, _ in running)
        if step_held:
            worst = max(worst, 1 - step_used / step_held)
        held, used, steps, batch = held + step_held, used + step_used, steps + 1, batch + len(running)
    return Waste(1 - used / held, worst, batch / steps, 0, steps)


def report_waste(n_slots: int = 32 * MAX_TOKENS) -> None:
    print(f"unused slots, 1,000 requests, memory for {n_slots:,} tokens (share of the slots held, over all steps)")
    print(f"{'lengths':14}{'cache':22}{'unused':>9}{'worst step':>12}{'running':>9}{'steps':>8}{'preempted':>11}")
    for kind in MEAN_TOKENS:
        requests = trace(kind)
        rows = [(f"blocks of {size}", serve(requests, size, n_slots)) for size in (1, 8, 16, 32, 64, 128, 256)]
        rows.append((f"{MAX_TOKENS:,} reserved each", serve_reserved(requests, n_slots)))
        for name, w in rows:
            print(
                f"{kind:14}{name:22}{w.unused:9.2%}{w.unused_at_worst:12.2%}{w.running:9.1f}{w.steps:8,}{w.preempted:11,}"
            )
    print()


# ---- prefill tokens saved


def longest_known(trie: dict, tokens: list[int]) -> int:
    """How many of the first tokens are in the trie, from its root on."""
    n = 0
    for token in tokens:
        if token not in trie:
            break
        trie = trie[token]
        n += 1
    return n


def remember(trie: dict, tokens: list[int]) -> None:
    for token in tokens:
        trie = trie.setdefault(token, {})


@dataclass(frozen=True)
class Saved:
    """Prompt tokens: all; those computed before by anybody; of these, those in full blocks; those found."""

    asked: int
    known: int
    known_in_blocks: int
    found: int
    evicted: int
    blocks_in_use: int


def chat(n_blocks: int, block_size: int = 16, conversations: int = 60, turns: int = 8) -> Saved:
    """Conversations in random turns, over 4 system prompts: a prompt is all that was said before and a new message.

    What could be saved is counted beside the cache, in a trie of the tokens of all earlier requests. The last token
    of a prompt is always computed, and so is the last token of an answer where it comes back in the next prompt.
    """
    rng = random.Random(0)

    def draw(n: int) -> list[int]:
        return [rng.randrange(50_000) for _ in range(n)]

    systems = [draw(log_normal(rng, 200)) for _ in range(4)]
    history = [list(rng.choice(systems)) for _ in range(conversations)]
    order = [i for i in range(conversations) for _ in range(turns)]
    rng.shuffle(order)

    allocator = BlockAllocator(n_blocks, block_size)
    cache = PrefixCache(allocator)
    trie: dict = {}
    known = known_in_blocks = most = 0
    for i in order:
        prompt = history[i] + draw(log_normal(rng, 60))
        answer = draw(log_normal(rng, 150))
        before = min(longest_known(trie, prompt), len(prompt) - 1)
        known += before
        known_in_blocks += before // block_size * block_size
        seq = cache.allocate(prompt)
        tokens = list(prompt)
        cache.register(seq, tokens)
        for token in answer[:-1]:
            allocator.append(seq)
            tokens.append(token)
            cache.register(seq, tokens)
        remember(trie, tokens)
        allocator.free(seq)
        most = max(most, n_blocks - allocator.n_free)
        history[i] = prompt + answer
    allocator.check_integrity()
    stats = cache.stats
    return Saved(stats.tokens_asked, known, known_in_blocks, stats.tokens_found, stats.n_evicted, most)


def report_saved() -> None:
    print("prefill tokens found, 60 conversations of 8 turns in random order, 4 system prompts, all seeded")
    print(f"{'blocks':>12}{'pool':>10}{'prompts':>10}{'known':>10}{'in blocks':>11}{'found':>10}", end="")
    print(f"{'of prompts':>12}{'of known':>10}{'of blocks':>11}{'evicted':>9}")
    for block_size in (1, 16, 64, 256):
        everything = chat(1_000_000 // block_size, block_size).blocks_in_use
        for share in (1, 0.5, 0.25) if block_size == 16 else (1,):
            n_blocks = math.ceil(share * everything)
            s = chat(n_blocks, block_size)
            print(f"{f'of {block_size}':>12}{n_blocks:10,}{s.asked:10,}{s.known:10,}{s.known_in_blocks:11,}", end="")
            print(f"{s.found:10,}{s.found / s.asked:12.1%}{s.found / s.known:10.2%}", end="")
            print(f"{s.found / s.known_in_blocks:11.2%}{s.evicted:9,}")
    print()


# ---- time an operation


@dataclass
class Pool:
    """A pool of which 90 % are in use, by sequences of 20 blocks at the mean, and by 8 prompts that are cached."""

    allocator: BlockAllocator
    cache: PrefixCache
    sequences: list[PagedSequence]
    prompts: list[list[int]]
    turn: int = 0

    def next(self) -> PagedSequence:
        self.turn += 1
        return self.sequences[self.turn % len(self.sequences)]


def filled(n_blocks: int, block_size: int = 16) -> Pool:
    rng = random.Random(0)
    allocator = BlockAllocator(n_blocks, block_size)
    cache = PrefixCache(allocator)
    prompts = [[rng.randrange(50_000) for _ in range(20 * block_size)] for _ in range(8)]
    for prompt in prompts:
        cache.register(cache.allocate(prompt), prompt)
    sequences: list[PagedSequence] = []
    for _ in range(2):  # the second time into the holes
        while allocator.n_free > 0.1 * n_blocks:
            sequences.append(allocator.allocate(rng.randint(1, 40 * block_size)))
        rng.shuffle(sequences)
        for seq in sequences[: len(sequences) // 8]:
            allocator.free(seq)
        del sequences[: len(sequences) // 8]
    while allocator.n_free > 0.1 * n_blocks:
        sequences.append(allocator.allocate(rng.randint(1, 40 * block_size)))
    rng.shuffle(sequences)
    return Pool(allocator, cache, sequences, prompts)


# each leaves the pool as full as it was


def append_and_truncate(pool: Pool) -> None:
    seq = pool.next()
    pool.allocator.append(seq)
    pool.allocator.truncate(seq, seq.n_tokens - 1)


def one_slot(pool: Pool) -> None:
    seq = pool.next()
    pool.allocator.slots(seq, seq.n_tokens - 1)


def allocate_and_free(pool: Pool) -> None:
    pool.allocator.free(pool.allocator.allocate(20 * pool.allocator.block_size))


def fork_append_free(pool: Pool) -> None:
    twin = pool.allocator.fork(pool.next())
    pool.allocator.append(twin)
    pool.allocator.free(twin)


def cached_prompt(pool: Pool) -> None:
    pool.next()
    pool.allocator.free(pool.cache.allocate(pool.prompts[pool.turn % len(pool.prompts)], max_new=0))


def new_prompt(pool: Pool) -> None:
    pool.next()
    tokens = [pool.turn, *range(20 * pool.allocator.block_size - 1)]
    seq = pool.cache.allocate(tokens)
    pool.cache.register(seq, tokens)
    pool.allocator.free(seq)


OPERATIONS: dict[str, Callable[[Pool], None]] = {
    "append 1 token, truncate it": append_and_truncate,
    "slot of a token": one_slot,
    "allocate 20 blocks, free": allocate_and_free,
    "fork ~20 blocks, append, free": fork_append_free,
    "prompt of 20 blocks, 19 cached, free": cached_prompt,
    "prompt of 20 new blocks, evicting, free": new_prompt,
}


def prepare(pool: Pool, operation: Callable[[Pool], None]) -> None:
    while operation is new_prompt and pool.allocator.n_free:
        operation(pool)


FEW = 40  # sequences whose state stays in the processor's cache, at any size of the pool


def nanoseconds(call: Callable[[], object]) -> float:
    """Processor time of a call: the median of 50 rounds of 200. No garbage collection, as in timeit."""
    gc.collect()
    gc.disable()
    times = [_seconds(lambda: [call() for _ in range(200)]) / 200 for _ in range(50)]
    gc.enable()
    return 1e9 * statistics.median(times)


def report_times(sizes: list[int]) -> None:
    print("µs of processor time a call, medians, blocks of 16 tokens, 90 % of the blocks in use")
    print(f"{'blocks':42}" + "".join(f"{n:>11,}" for n in sizes) + f"{'last/first':>12}")
    start = [statistics.median(_seconds(partial(BlockAllocator, n, 16)) for _ in range(5)) for n in sizes]
    print(f"{'construction':42}" + "".join(f"{1e6 * t:11.1f}" for t in start))
    rows: dict[str, list[float]] = {}
    for n in sizes:
        pool = filled(n)
        for name, operation in OPERATIONS.items():
            prepare(pool, operation)
            rows.setdefault(name, []).append(nanoseconds(partial(operation, pool)) / 1e3)
        pool.sequences = pool.sequences[:FEW]
        for name in list(OPERATIONS)[:2]:
            time_of_few = nanoseconds(partial(OPERATIONS[name], pool)) / 1e3
            rows.setdefault(f"{name}, of {FEW} sequences", []).append(time_of_few)
        pool.allocator.check_integrity()
    for name, row in rows.items():
        print(f"{name:42}" + "".join(f"{t:11.2f}" for t in row) + f"{row[-1] / row[0]:12.2f}")


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations(benchmark, operation):
    """`pytest benchmarks/`: each operation in a pool of 10,000 blocks."""
    pool = filled(10_000)
    prepare(pool, operation)
    benchmark.group = "paged cache, host side"
    benchmark.pedantic(operation, (pool,), rounds=20, iterations=100, warmup_rounds=1)


def test_unused_slots():
    requests = trace("chat")
    assert serve(requests, 16, 32 * MAX_TOKENS).unused < 0.04
    assert serve_reserved(requests, 32 * MAX_TOKENS).unused > 0.5


def test_all_that_is_possible_is_found():
    saved = chat(10_000, conversations=10, turns=4)
    assert saved.evicted == 0
    assert saved.found == saved.known_in_blocks > 0.5 * saved.asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    if min(args.blocks) < 1_000:
        parser.error(f"--blocks must be at least 1,000, got {min(args.blocks)}")
    report_waste()
    report_saved()
    report_times(args.blocks)


if __name__ == "__main__":
    main()
