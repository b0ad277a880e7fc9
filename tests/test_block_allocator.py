"""BlockAllocator: what each call takes, shares and gives back, where blocks lie, and every refusal. Memory planning."""

import ast
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmops.cache
from lmops.cache import RELEASED, BlockAllocator, BlockCopy, OutOfBlocksError, plan_cache


def state(allocator):
    allocator.check_integrity()
    return allocator.n_free, allocator.n_cached, list(allocator._refs), dict(allocator._free._end_of)


@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
@pytest.mark.parametrize("n_blocks", [0, 1, 2, 5])
def test_allocate_takes_what_the_tokens_need(block_size, n_blocks):
    for n_tokens in {max(0, (n_blocks - 1) * block_size + 1), n_blocks * block_size} if n_blocks else {0}:
        allocator = BlockAllocator(8, block_size)
        seq = allocator.allocate(n_tokens)
        assert len(seq.blocks) == n_blocks
        assert (allocator.n_free, allocator.n_available) == (8 - n_blocks, 8 - n_blocks)
        assert allocator.slots(seq) == [
            seq.blocks[i // block_size] * block_size + i % block_size for i in range(n_tokens)
        ]
        allocator.free(seq)
        assert state(allocator) == (8, 0, [0] * 8, {0: 8})


def test_append_says_which_blocks_are_new():
    allocator = BlockAllocator(8, 4)
    seq = allocator.allocate()
    expected = [[0], [], [], [], [1], [], [], [], [2]]
    assert [allocator.append(seq).new_blocks for _ in expected] == expected
    assert allocator.append(seq, 0) == ([], [])
    assert allocator.append(seq, 8) == ([3, 4], [])
    assert seq.blocks == [0, 1, 2, 3, 4]
    assert allocator.slots(seq, 9) == list(range(9, 17))
    assert allocator.slots(seq, 2, 5) == [2, 3, 4]


def test_a_fork_copies_a_block_only_when_it_writes_into_it():
    allocator = BlockAllocator(8, 4)
    seq = allocator.allocate(6)
    twins = [allocator.fork(seq) for _ in range(2)]
    assert allocator.n_free == 6
    assert allocator.append(seq) == ([], [BlockCopy(src=1, dst=2, n_tokens=2)])
    assert allocator.append(twins[0], 3) == ([5], [BlockCopy(1, 4, 2)])
    assert allocator.append(twins[1]) == ([], [])  # the last one writes in place
    assert [s.blocks for s in (seq, *twins)] == [[0, 2], [0, 4, 5], [0, 1]]
    for s in (seq, *twins):
        allocator.free(s)
    assert state(allocator) == (8, 0, [0] * 8, {0: 8})


def test_a_fork_of_whole_blocks_copies_nothing():
    allocator = BlockAllocator(8, 4)
    seq = allocator.allocate(8)
    twin = allocator.fork(seq)
    assert allocator.append(twin) == ([2], [])
    assert allocator.append(seq).copies == []
    assert seq.blocks[:2] == twin.blocks[:2]
    assert seq.blocks[2] != twin.blocks[2]


def test_truncate_rolls_back():
    allocator = BlockAllocator(8, 4)
    seq = allocator.allocate(18)
    for n_tokens, n_blocks in ((18, 5), (17, 5), (16, 4), (7, 2), (0, 0)):
        allocator.truncate(seq, n_tokens)
        assert (seq.n_tokens, len(seq.blocks)) == (n_tokens, n_blocks)
        assert allocator.n_free == 8 - n_blocks
        allocator.check_integrity()
    assert allocator.append(seq, 5).new_blocks == [0, 1]


def test_a_truncated_fork_does_not_write_into_the_other():
    allocator = BlockAllocator(8, 4)
    seq = allocator.allocate(8)
    twin = allocator.fork(seq)
    allocator.truncate(twin, 5)
    assert allocator.append(twin).copies == [BlockCopy(1, 2, 1)]
    assert seq.blocks == [0, 1]


def test_blocks_behind_a_window_are_released():
    allocator = BlockAllocator(8, 4)
    seq = allocator.allocate(18)
    assert allocator.release_before(seq, 3) == 0
    assert allocator.release_before(seq, 9) == 2
    assert allocator.release_before(seq, 4) == 0
    assert seq.blocks == [RELEASED, RELEASED, 2, 3, 4]
    assert (seq.n_released, allocator.n_free) == (2, 5)
    assert allocator.slots(seq, 8, 10) == [8, 9]
    twin = allocator.fork(seq)
    assert allocator.release_before(seq, 18) == 2
    assert allocator.n_free == 5  # the fork still has them
    assert allocator.append(seq).copies == [BlockCopy(4, 5, 2)]
    allocator.truncate(twin, 8)
    assert twin.blocks == [RELEASED] * 2
    assert len(allocator.append(twin).new_blocks) == 1
    allocator.free(twin)
    allocator.free(seq)
    assert state(allocator) == (8, 0, [0] * 8, {0: 8})


def test_a_window_that_ends_on_a_block_releases_all():
    allocator = BlockAllocator(4, 4)
    seq = allocator.allocate(8)
    assert allocator.release_before(seq, 8) == 2
    assert (seq.blocks, allocator.n_free) == ([RELEASED] * 2, 4)
    assert allocator.slots(seq, 8) == []
    assert allocator.append(seq).new_blocks == [0]
    assert allocator.slots(seq, 8) == [0]


def test_swap_out_and_in():
    allocator = BlockAllocator(8, 4)
    seq = allocator.allocate(18)
    allocator.release_before(seq, 4)
    saved, record = allocator.swap_out(seq)
    assert saved == [1, 2, 3, 4]
    assert (allocator.n_free, record.n_blocks) == (8, 4)
    other = allocator.allocate(17)
    before = state(allocator)
    with pytest.raises(OutOfBlocksError, match="4 blocks were asked for, 3 of 8 are available"):
        allocator.swap_in(record)
    assert state(allocator) == before
    allocator.free(other)
    back, copies = allocator.swap_in(record)
    assert [index for index, _ in copies] == [0, 1, 2, 3]
    assert back.blocks == [RELEASED, *(block for _, block in copies)]
    assert (back.n_tokens, back.n_released) == (18, 1)
    again, _ = allocator.swap_in(record)
    assert not set(again.blocks[1:]) & set(back.blocks[1:])
    allocator.check_integrity()
    with pytest.raises(ValueError, match="record must have blocks of 8 tokens, got 4"):
        BlockAllocator(8, 8).swap_in(record)


@pytest.mark.parametrize(
    ("call", "asked", "available"),
    [
        (lambda a, seq, twin: a.allocate(17), 5, 4),
        (lambda a, seq, twin: a.append(seq, 16), 5, 4),  # one of them for the copy
        (lambda a, seq, twin: a.append(twin, 1_000), 251, 4),
    ],
)
def test_out_of_blocks_changes_nothing(call, asked, available):
    allocator = BlockAllocator(8, 4)
    seq = allocator.allocate(14)
    twin = allocator.fork(seq)
    before = state(allocator), list(seq.blocks), seq.n_tokens
    with pytest.raises(OutOfBlocksError, match=rf"{asked} blocks were asked for, {available} of 8 are av") as error:
        call(allocator, seq, twin)
    assert (error.value.n_asked, error.value.n_available) == (asked, available)
    assert (state(allocator), list(seq.blocks), seq.n_tokens) == before
    allocator.append(seq, 14)  # what is there can be had
    assert allocator.n_free == 0


def test_out_of_blocks_for_a_copy_alone():
    allocator = BlockAllocator(1, 4)
    seq = allocator.allocate(2)
    twin = allocator.fork(seq)
    with pytest.raises(OutOfBlocksError, match="1 blocks were asked for, 0 of 1 are available"):
        allocator.append(seq)
    allocator.free(twin)
    assert allocator.append(seq) == ([], [])


@pytest.mark.parametrize("use", ["append", "fork", "free", "swap_out", "slots"])
def test_a_sequence_that_is_not_alive(use):
    allocator = BlockAllocator(8, 4)
    freed = allocator.allocate(4)
    allocator.free(freed)
    before = state(allocator)
    for seq in (freed, BlockAllocator(8, 4).allocate(4)):
        with pytest.raises(ValueError, match="seq must be a live sequence of this allocator, got one that was freed"):
            getattr(allocator, use)(seq)
    for name in ("truncate", "release_before"):
        with pytest.raises(ValueError, match="seq must be a live sequence"):
            getattr(allocator, name)(freed, 0)
    assert state(allocator) == before


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda a, seq: BlockAllocator(0, 4), ValueError, "n_blocks must be at least 1, got 0"),
        (lambda a, seq: BlockAllocator(4, 0), ValueError, "block_size must be at least 1, got 0"),
        (lambda a, seq: BlockAllocator(4, 257), ValueError, "block_size must be 1 to 256 tokens, got 257"),
        (lambda a, seq: BlockAllocator(4.0, 4), TypeError, "n_blocks must be an int, got 4.0 of type float"),
        (lambda a, seq: a.allocate(-1), ValueError, "n_tokens must be at least 0, got -1"),
        (lambda a, seq: a.append(seq, -1), ValueError, "n_tokens must be at least 0, got -1"),
        (lambda a, seq: a.append(seq, 1.5), TypeError, "n_tokens must be an int, got 1.5"),
        (lambda a, seq: a.truncate(seq, 11), ValueError, "n_tokens must be 4 to 10, .* got 11"),
        (lambda a, seq: a.truncate(seq, 3), ValueError, "n_tokens must be 4 to 10, .* got 3"),
        (lambda a, seq: a.truncate(seq, -1), ValueError, "n_tokens must be at least 0, got -1"),
        (lambda a, seq: a.release_before(seq, 11), ValueError, "position must be 0 to 10, .* got 11"),
        (lambda a, seq: a.slots(seq), ValueError, r"must be in order and in 4 \.\. 10, .* got 0 and 10"),
        (lambda a, seq: a.slots(seq, 5, 11), ValueError, r"must be in order and in 4 \.\. 10, .* got 5 and 11"),
        (lambda a, seq: a.slots(seq, 6, 5), ValueError, "must be in order"),
    ],
)
def test_bad_arguments_change_nothing(call, error, says):
    allocator = BlockAllocator(8, 4)
    seq = allocator.allocate(10)
    allocator.release_before(seq, 4)
    before = state(allocator), list(seq.blocks), seq.n_tokens
    with pytest.raises(error, match=says):
        call(allocator, seq)
    assert (state(allocator), list(seq.blocks), seq.n_tokens) == before


# ---- where blocks lie


def consecutive(blocks):
    return blocks == list(range(blocks[0], blocks[0] + len(blocks)))


def test_a_single_sequence_has_all_blocks_in_a_row():
    allocator = BlockAllocator(100, 1)
    seq = allocator.allocate(10)
    for n in [1] * 40 + [7, 43]:
        allocator.append(seq, n)
    assert seq.blocks == list(range(100))


@pytest.mark.parametrize("n_sequences", [2, 4, 8, 16])
def test_sequences_that_grow_together_have_room(n_sequences):
    """A pool for exactly 16 blocks each: all are in a row to their last block."""
    allocator = BlockAllocator(16 * n_sequences, 1)
    sequences = [allocator.allocate(2) for _ in range(n_sequences)]
    for _ in range(14):
        for seq in sequences:
            allocator.append(seq)
    assert allocator.n_free == 0
    assert all(consecutive(seq.blocks) for seq in sequences)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.booleans(), min_size=1, max_size=64), st.integers(1, 32))
def test_blocks_lie_in_a_row_if_twice_as_many_do(kept, n):
    """In a pool of any holes."""
    allocator = BlockAllocator(len(kept), 1)
    single = [allocator.allocate(1) for _ in kept]
    for seq in single:
        if not kept[seq.blocks[0]]:
            allocator.free(seq)
    runs = "".join("x" if k else "." for k in kept).split("x")
    longest = max(map(len, runs))
    if n <= kept.count(False):
        blocks = allocator.allocate(n).blocks
        assert consecutive(blocks) or longest < 2 * n
        assert not any(kept[block] for block in blocks)
    allocator.check_integrity()


def test_evicted_neighbours_are_a_run_again():
    allocator = BlockAllocator(6, 1)
    seq = allocator.allocate(6)
    for key in "abcdef":
        allocator.add_key(seq, key)
    allocator.free(seq)
    assert (allocator.n_free, allocator.n_cached) == (0, 6)
    assert allocator.allocate(3).blocks == [3, 4, 5]
    assert (allocator.n_cached, allocator.n_evicted) == (3, 3)
    assert [allocator.find(key) for key in "abcdef"] == [0, 1, 2, None, None, None]


def test_a_block_keeps_the_key_that_it_was_given_first():
    allocator = BlockAllocator(4, 4)
    seq = allocator.allocate(8)
    twin = allocator.fork(seq)
    for s, key in ((seq, "a"), (twin, "b"), (allocator.allocate(4), "a")):
        allocator.add_key(s, key)
    assert [allocator.find(key) for key in "ab"] == [0, None]
    allocator.check_integrity()


# ---- check_integrity sees what it is for


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda a, seq: a._refs.__setitem__(0, 2), "references"),
        (lambda a, seq: seq.blocks.pop(), "has 1 blocks"),
        (lambda a, seq: seq.blocks.__setitem__(0, RELEASED), "block 0 of .* is -1"),
        (lambda a, seq: a._sequences.clear(), "references"),  # a leak
        (lambda a, seq: a._free.add(0), "are free"),
        (lambda a, seq: a._free.take(1, 7), "are free"),
        (lambda a, seq: a._cached.__setitem__(3, None), "are cached"),
        (lambda a, seq: a._key_of.__setitem__(0, "key"), "the keys of blocks and the blocks of keys differ"),
        (lambda a, seq: a._free._start_of.clear(), "the free runs are inconsistent"),
        (lambda a, seq: a._free._by_size[3].clear(), "the free runs are inconsistent"),
    ],
)
def test_integrity_check_finds_damage(damage, says):
    allocator = BlockAllocator(8, 4)
    seq = allocator.allocate(8)
    allocator.check_integrity()
    damage(allocator, seq)
    with pytest.raises(RuntimeError, match=says):
        allocator.check_integrity()


# ---- memory planning


@pytest.mark.parametrize(
    ("bytes_per_element", "scale_bytes", "block_bytes"),
    [(2, 0, 368_640), (4, 0, 737_280), (1, 4, 195_840), (0.5, 4, 103_680)],
)
def test_plan(bytes_per_element, scale_bytes, block_bytes):
    """SmolLM2-135M: 30 layers, 3 KV heads of 64, K and V, 16 tokens."""
    shape = {"n_layers": 30, "n_kv_heads": 3, "head_dim": 64, "block_size": 16}
    plan = plan_cache(
        1 << 30, **shape, bytes_per_element=bytes_per_element, scale_bytes=scale_bytes
    )  # fmt: skip
    assert plan.block_bytes == block_bytes
    assert plan.n_blocks == (1 << 30) // block_bytes
    assert plan.n_bytes <= 1 << 30 < plan.n_bytes + block_bytes
    assert plan.n_tokens == 16 * plan.n_blocks
    allocator = BlockAllocator(plan.n_blocks, plan.block_size)
    assert len(allocator.allocate(plan.n_tokens).blocks) == plan.n_blocks


def test_plan_in_a_line():
    plan = plan_cache(2 << 30, n_layers=30, n_kv_heads=3, head_dim=64)
    assert str(plan) == "93,200 tokens fit: 5,825 blocks of 16, 360 KiB each, 2 GiB of 2 GiB"
    nothing = plan_cache(1_000, n_layers=30, n_kv_heads=3, head_dim=64)
    assert str(nothing) == "0 tokens fit: 0 blocks of 16, 360 KiB each, 0 bytes of 1000 bytes"


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"n_layers": 0}, ValueError, "n_layers must be at least 1, got 0"),
        ({"head_dim": 64.0}, TypeError, "head_dim must be an int, got 64.0"),
        ({"scale_bytes": -1}, ValueError, "scale_bytes must be at least 0, got -1"),
        ({"head_dim": 5, "bytes_per_element": 0.5}, ValueError, "whole bytes of head_dim = 5, got 0.5"),
        ({"bytes_per_element": 0}, ValueError, "whole bytes of head_dim = 64, got 0"),
        ({"budget": -1}, ValueError, "budget must be at least 0, got -1"),
    ],
)
def test_plan_refuses(change, error, says):
    given = {"budget": 1 << 20, "n_layers": 2, "n_kv_heads": 2, "head_dim": 64, **change}
    with pytest.raises(error, match=says):
        plan_cache(given.pop("budget"), **given)


@pytest.mark.parametrize("name", ["allocator", "prefix", "plan"])
def test_the_host_side_is_plain_python(name):
    file = Path(lmops.cache.__file__).with_name(f"{name}.py")
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    assert names
    assert {n for n in names if n.partition(".")[0] not in sys.stdlib_module_names} <= {"lmops.cache.allocator"}
