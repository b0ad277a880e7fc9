"""Which block of a paged KV cache belongs to whom: reference counts, copy-on-write, and cached blocks. No tensors.

A block holds the keys and values of `block_size` tokens. Slot `block * block_size + offset` holds those of one. A
sequence is a table of blocks. Sequences may share blocks, and a block that nobody uses any more stays findable by its
content key until it is needed. docs/design.md has the states of a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

RELEASED = -1  # in a block table: the place of a block behind the sliding window


class OutOfBlocksError(RuntimeError):
    """More blocks were asked for than can be had; nothing was changed.

    Attributes:
        n_asked: blocks that the call needed.
        n_available: blocks that it could have had, free or cached.
    """

    def __init__(self, n_asked: int, n_available: int, n_blocks: int) -> None:
        super().__init__(f"{n_asked} blocks were asked for, {n_available} of {n_blocks} are available")
        self.n_asked = n_asked
        self.n_available = n_available


class BlockCopy(NamedTuple):
    """The first `n_tokens` slots of block `src` are to be copied to block `dst`, in every layer."""

    src: int
    dst: int
    n_tokens: int


class Appended(NamedTuple):
    """What `append` changed: blocks that the table has at its end now, and copies to make before anything is written.

    A copy's dst has replaced its src as the last block that the table had before.
    """

    new_blocks: list[int]
    copies: list[BlockCopy]


@dataclass(slots=True, eq=False)
class PagedSequence:
    """A sequence in the cache: a handle for the methods of its allocator, to be read by others and written by it alone.

    Attributes:
        blocks: the block table. Token i is in blocks[i // block_size] at i % block_size.
        n_tokens: how many tokens have a slot.
        n_cached: how many of them were found in the cache when the sequence began: they need no computation.
        n_released: how many blocks at the start of the table are RELEASED.
        salt: whose it is: content is shared only among sequences of the same salt.
        keys: the content keys of the first blocks, as far as they are registered.
    """

    blocks: list[int] = field(default_factory=list)
    n_tokens: int = 0
    n_cached: int = 0
    n_released: int = 0
    salt: Hashable = None
    keys: list[Any] = field(default_factory=list, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class SwappedSequence:
    """All that is known of a sequence that was swapped out, but its keys and values.

    Attributes:
        block_size: tokens a block.
        n_blocks: how many blocks were to be saved: those of the table that were not RELEASED.
    The others are those of PagedSequence.
    """

    block_size: int
    n_blocks: int
    n_tokens: int
    n_cached: int
    n_released: int
    salt: Hashable
    keys: tuple[Any, ...] = field(repr=False)


class BlockAllocator:
    """Blocks 0 .. n_blocks - 1 of `block_size` tokens each, and the sequences that they belong to.

    Every method is O(1) beside the blocks that it takes, shares, returns or lists, at any n_blocks. A call that raises
    has changed nothing. Not for several threads at once.

    Which blocks: a sequence grows into the block that follows its last one if that is free, else into a free run of
    at least half the size of the largest. There it begins in the middle, which leaves room to grow to it and to the
    sequence before, except in the run at block 0. So the n blocks of a new sequence lie in a row if a run of 2 n is
    free, and those of a sequence that is alone do to the last. Cached blocks are evicted only for what free ones do
    not cover, least recently used first.

    Attributes:
        n_evicted: how many cached blocks were evicted so far.
    """

    def __init__(self, n_blocks: int, block_size: int) -> None:
        """n_blocks: at least 1. block_size: tokens a block, 1 to 256. ValueError and TypeError for others."""
        _check_count("n_blocks", n_blocks, at_least=1)
        _check_count("block_size", block_size, at_least=1)
        if block_size > 256:
            raise ValueError(f"block_size must be 1 to 256 tokens, got {block_size}")
        self.n_blocks = n_blocks
        self.block_size = block_size
        self.n_evicted = 0
        self._refs = [0] * n_blocks  # how many tables of live sequences have the block
        self._free = _FreeRuns(n_blocks)
        self._cached: OrderedDict[int, None] = OrderedDict()  # no references but a key, least recently used first
        self._key_of: dict[int, Hashable] = {}
        self._block_of: dict[Hashable, int] = {}
        self._sequences: set[PagedSequence] = set()

    @property
    def n_free(self) -> int:
        """Blocks with nothing in them."""
        return self._free.n_blocks

    @property
    def n_cached(self) -> int:
        """Blocks that no sequence uses, but that can be found by their content."""
        return len(self._cached)

    @property
    def n_available(self) -> int:
        """Blocks that can be had: free or cached."""
        return self._free.n_blocks + len(self._cached)

    def allocate(self, n_tokens: int = 0, keys: Sequence[Hashable] = (), salt: Hashable = None) -> PagedSequence:
        """A new sequence with slots for n_tokens tokens.

        keys: of cached blocks that hold its first tokens, all of which `find` knows; they are shared, not taken.
        PrefixCache.allocate finds them, and what salt is for is said there.
        OutOfBlocksError if there are not enough blocks for the rest. ValueError for a key that is not found, and for
        more keys than n_tokens has full blocks.
        """
        _check_count("n_tokens", n_tokens)
        n_cached = len(keys) * self.block_size
        if n_cached > n_tokens:
            raise ValueError(f"keys must be of full blocks of {n_tokens} tokens, got {len(keys)} of {self.block_size}")
        blocks = [block for key in keys if (block := self.find(key)) is not None]
        if len(blocks) < len(keys):
            raise ValueError(f"keys must all be of cached blocks, got {len(keys)} of which {len(blocks)} are")
        n_new = self._blocks_for(n_tokens) - len(blocks)
        blocks += self._share_and_take(blocks, n_new, after=blocks[-1] if blocks else RELEASED)
        seq = PagedSequence(blocks, n_tokens, n_cached, salt=salt, keys=list(keys))
        self._sequences.add(seq)
        return seq

    def append(self, seq: PagedSequence, n_tokens: int = 1) -> Appended:
        """Slots for n_tokens more tokens; their numbers are `slots(seq, n_before)`.

        If they begin in a block that is shared, the sequence gets its own copy of it. The copies that calls return are
        to be made in their order, before anything is written, and before another free, truncate, release or swap:
        those may give a block of a copy to somebody else. OutOfBlocksError if there are not enough blocks.
        """
        self._check(seq)
        _check_count("n_tokens", n_tokens)
        if n_tokens == 0:
            return Appended([], [])
        blocks = seq.blocks
        filled = seq.n_tokens % self.block_size
        shared = filled > 0 and self._refs[blocks[-1]] > 1
        n_new = self._blocks_for(seq.n_tokens + n_tokens) - len(blocks)
        copies = []
        new = self._take(n_new + shared, after=blocks[-1] if blocks else RELEASED) if n_new or shared else []
        if shared:
            copies.append(BlockCopy(blocks[-1], new[0], filled))
            self._drop(blocks[-1])
            blocks[-1] = new.pop(0)
        elif filled:
            self._forget(blocks[-1])  # full once, then truncated: what its key says ends here
        blocks += new
        seq.n_tokens += n_tokens
        return Appended(new, copies)

    def append_all(self, seqs: Sequence[PagedSequence], n_tokens: Sequence[int]) -> list[Appended]:
        """`append` of n_tokens[i] to each seqs[i], or, if there are not enough blocks for all, of nothing.

        OutOfBlocksError then; ValueError for a sequence given twice.
        """
        if len(n_tokens) != len(seqs):
            raise ValueError(f"n_tokens must have a number for each of {len(seqs)} sequences, got {len(n_tokens)}")
        if len(set(seqs)) < len(seqs):
            raise ValueError("seqs must be different sequences, got one of them twice")
        n_new = 0
        refs: dict[int, int] = {}
        for seq, n in zip(seqs, n_tokens, strict=True):
            self._check(seq)
            _check_count("n_tokens", n)
            n_new += self._blocks_for(seq.n_tokens + n) - len(seq.blocks)
            if n and seq.n_tokens % self.block_size:
                last = seq.blocks[-1]
                users = refs.get(last, self._refs[last])
                n_new += users > 1
                refs[last] = users - (users > 1)
        if n_new > self.n_available:
            raise OutOfBlocksError(n_new, self.n_available, self.n_blocks)
        return [self.append(seq, n) for seq, n in zip(seqs, n_tokens, strict=True)]

    def fork(self, seq: PagedSequence) -> PagedSequence:
        """A second sequence with the same tokens. It shares all blocks, until one of the two appends."""
        self._check(seq)
        twin = PagedSequence(list(seq.blocks), seq.n_tokens, seq.n_cached, seq.n_released, seq.salt, list(seq.keys))
        for block in twin.blocks[twin.n_released :]:
            self._refs[block] += 1
        self._sequences.add(twin)
        return twin

    def free(self, seq: PagedSequence) -> None:
        """Ends the sequence. Its blocks that nobody else has become cached if they have a key, else free."""
        self._check(seq)
        self._drop_from(seq, seq.n_released)
        self._sequences.remove(seq)
        seq.blocks, seq.keys, seq.n_tokens, seq.n_released = [], [], 0, 0

    def truncate(self, seq: PagedSequence, n_tokens: int) -> None:
        """Keeps the first n_tokens tokens. ValueError for more than there are, or an end behind the window."""
        self._check(seq)
        _check_count("n_tokens", n_tokens)
        least = seq.n_released * self.block_size
        if not least <= n_tokens <= seq.n_tokens:
            raise ValueError(
                f"n_tokens must be {least} to {seq.n_tokens}, the tokens that the sequence has, got {n_tokens}"
            )
        n_blocks = self._blocks_for(n_tokens)
        self._drop_from(seq, n_blocks)
        del seq.blocks[n_blocks:]
        del seq.keys[n_tokens // self.block_size :]
        seq.n_tokens = n_tokens
        seq.n_cached = min(seq.n_cached, n_tokens)

    def release_before(self, seq: PagedSequence, position: int) -> int:
        """Gives up the blocks whose tokens all stand before `position`, and says how many.

        For a sliding window, whose first key is at `position` (n_tokens at most, else ValueError). The table keeps
        RELEASED in their places, so positions stay what they are.
        """
        self._check(seq)
        _check_count("position", position)
        if position > seq.n_tokens:
            raise ValueError(f"position must be 0 to {seq.n_tokens}, the tokens of the sequence, got {position}")
        first, stop = seq.n_released, position // self.block_size
        for i in range(stop - 1, first - 1, -1):
            self._drop(seq.blocks[i])
            seq.blocks[i] = RELEASED
        seq.n_released = max(first, stop)
        return seq.n_released - first

    def slots(self, seq: PagedSequence, start: int = 0, stop: int | None = None) -> list[int]:
        """The slots of the tokens start .. stop - 1 (default: to the last). ValueError for others, or released ones."""
        self._check(seq)
        stop = seq.n_tokens if stop is None else stop
        size = self.block_size
        if not seq.n_released * size <= start <= stop <= seq.n_tokens:
            raise ValueError(
                f"start and stop must be in order and in {seq.n_released * size} .. {seq.n_tokens}, the tokens that "
                f"have a slot, got {start} and {stop}"
            )
        slots: list[int] = []
        while start < stop:
            offset = start % size
            n = min(size - offset, stop - start)
            first = seq.blocks[start // size] * size + offset
            slots += range(first, first + n)
            start += n
        return slots

    def swap_out(self, seq: PagedSequence) -> tuple[list[int], SwappedSequence]:
        """Frees the sequence, to be continued later: the blocks to save, in order, and what `swap_in` needs.

        The blocks are to be read before anything else is written to the cache.
        """
        self._check(seq)
        blocks = seq.blocks[seq.n_released :]
        record = SwappedSequence(
            self.block_size, len(blocks), seq.n_tokens, seq.n_cached, seq.n_released, seq.salt, tuple(seq.keys)
        )
        self.free(seq)
        return blocks, record

    def swap_in(self, record: SwappedSequence) -> tuple[PagedSequence, list[tuple[int, int]]]:
        """The sequence again, and which saved block goes where: pairs (index into the saved blocks, block).

        The saved blocks are to be written before anything is read. Blocks that are still found by their content are
        shared, and not in the list. OutOfBlocksError if there are not enough for the others, ValueError for a record
        of another block size. The record stays good, also for a second sequence.
        """
        if record.block_size != self.block_size:
            raise ValueError(f"record must have blocks of {self.block_size} tokens, got {record.block_size}")
        first = record.n_released
        keys = record.keys[first:]
        found = {i: block for i, key in enumerate(keys) if (block := self.find(key)) is not None}
        new = iter(self._share_and_take(list(found.values()), record.n_blocks - len(found), after=RELEASED))
        blocks = [found[i] if i in found else next(new) for i in range(record.n_blocks)]
        for block, key in zip(blocks, keys, strict=False):  # the last block may not be full
            self._set_key(block, key)
        table = [RELEASED] * first + blocks
        seq = PagedSequence(table, record.n_tokens, record.n_cached, first, record.salt, list(record.keys))
        self._sequences.add(seq)
        return seq, [(i, block) for i, block in enumerate(blocks) if i not in found]

    def find(self, key: Hashable) -> int | None:
        """The block whose content has this key, in use or cached."""
        return self._block_of.get(key)

    def add_key(self, seq: PagedSequence, key: Hashable) -> None:
        """The content key of the sequence's first full block that has none yet, which makes the block findable.

        It stays so until it is evicted or written again. If another block has the key, that one goes on being found.
        ValueError if the sequence has no such block.
        """
        self._check(seq)
        i = len(seq.keys)
        if (i + 1) * self.block_size > seq.n_tokens:
            raise ValueError(f"seq must have a full block without a key, got {i} keys and {seq.n_tokens} tokens")
        if i >= seq.n_released:
            self._set_key(seq.blocks[i], key)
        seq.keys.append(key)

    def check_integrity(self) -> None:
        """RuntimeError if a block is lost, in two states at once, or counted wrongly. Reads everything: for tests."""
        refs = [0] * self.n_blocks
        for seq in self._sequences:
            if len(seq.blocks) != self._blocks_for(seq.n_tokens):
                raise RuntimeError(f"{seq} has {len(seq.blocks)} blocks of {self.block_size} tokens")
            for i, block in enumerate(seq.blocks):
                if (block == RELEASED) != (i < seq.n_released):
                    raise RuntimeError(f"block {i} of {seq} is {block}")
                if block != RELEASED:
                    refs[block] += 1
        if refs != self._refs:
            raise RuntimeError(f"blocks are in {refs} tables, but have {self._refs} references")
        if self._key_of != {block: key for key, block in self._block_of.items()}:
            raise RuntimeError("the keys of blocks and the blocks of keys differ")
        cached = {block for block in self._key_of if refs[block] == 0}
        if cached != set(self._cached):
            raise RuntimeError(f"blocks {cached} have a key and no user, but {set(self._cached)} are cached")
        free = self._free.check_integrity()
        if free != {block for block in range(self.n_blocks) if refs[block] == 0} - cached:
            raise RuntimeError(f"blocks {free} are free, {cached} cached, and have {refs} references")

    def _check(self, seq: PagedSequence) -> None:
        if seq not in self._sequences:
            raise ValueError("seq must be a live sequence of this allocator, got one that was freed or is another's")

    def _blocks_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.block_size)

    def _share_and_take(self, found: Sequence[int], n_new: int, after: int) -> list[int]:
        """A reference to each of the blocks that were found, and n_new more blocks."""
        n_available = self.n_available - sum(block in self._cached for block in found)
        if n_new > n_available:
            raise OutOfBlocksError(n_new, n_available, self.n_blocks)
        for block in found:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1
        return self._take(n_new, after)

    def _take(self, n: int, after: int) -> list[int]:
        """n free blocks with one reference each, from the one that follows `after` on if that is free."""
        if n > self.n_available:
            raise OutOfBlocksError(n, self.n_available, self.n_blocks)
        while self._free.n_blocks < n:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            self._free.add(block)
            self.n_evicted += 1
        blocks = self._free.take(n, after)
        for block in blocks:
            self._refs[block] = 1
        return blocks

    def _drop_from(self, seq: PagedSequence, first: int) -> None:
        """The last blocks go first, so that they are evicted first: the start of a prompt is what others may share."""
        for block in reversed(seq.blocks[first:]):
            self._drop(block)

    def _drop(self, block: int) -> None:
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._free.add(block)

    def _set_key(self, block: int, key: Hashable) -> None:
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def _forget(self, block: int) -> None:
        """What the block holds cannot be found any more."""
        if block in self._key_of:
            del self._block_of[self._key_of.pop(block)]


class _FreeRuns:
    """The free blocks, as runs start .. end - 1 that do not touch, and are found by either end or by their size."""

    __slots__ = ("_by_size", "_end_of", "_start_of", "n_blocks")

    def __init__(self, n_blocks: int) -> None:
        self.n_blocks = 0
        self._end_of: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        # the starts of the runs of 2^(i-1) .. 2^i - 1 blocks; a dict, since `popitem` is O(1) and in a known order
        self._by_size: list[dict[int, None]] = [{} for _ in range(n_blocks.bit_length() + 1)]
        self._insert(0, n_blocks)

    def add(self, block: int) -> None:
        """Block `block` is free from now on."""
        start, end = block, block + 1
        if start in self._start_of:
            start = self._start_of[start]
            self._remove(start, block)
        if end in self._end_of:
            end = self._end_of[end]
            self._remove(block + 1, end)
        self._insert(start, end)

    def take(self, n: int, after: int) -> list[int]:
        """n of the free blocks, of which there are enough."""
        taken: list[int] = []
        while len(taken) < n:
            wanted = n - len(taken)
            start = after + 1
            end = self._end_of.get(start)
            if end is not None:
                first = start
            else:
                start = next(starts for starts in reversed(self._by_size) if starts).popitem()[0]
                end = self._end_of[start]
                # nobody grows into the run at block 0, so it is used from its start
                first = start + max(0, end - start - wanted) // 2 if start else 0
            stop = min(first + wanted, end)
            self._remove(start, end)
            self._insert(start, first)
            self._insert(stop, end)
            taken += range(first, stop)
            after = stop - 1
        return taken

    def check_integrity(self) -> set[int]:
        """The free blocks. RuntimeError if the tables contradict one another."""
        runs = sorted(self._end_of.items())
        by_size = [{s: None for s, e in runs if (e - s).bit_length() == i} for i in range(len(self._by_size))]
        apart = all(end < start for (_, end), (start, _) in pairwise(runs))
        blocks = {block for start, end in runs for block in range(start, end)}
        if (
            not apart
            or by_size != self._by_size
            or self._start_of != {end: start for start, end in runs}
            or len(blocks) != self.n_blocks
        ):
            raise RuntimeError(f"the free runs are inconsistent: {runs}, {self.n_blocks} blocks")
        return blocks

    def _insert(self, start: int, end: int) -> None:
        if start < end:
            self._end_of[start] = end
            self._start_of[end] = start
            self._by_size[(end - start).bit_length()][start] = None
            self.n_blocks += end - start

    def _remove(self, start: int, end: int) -> None:
        del self._end_of[start]
        del self._start_of[end]
        self._by_size[(end - start).bit_length()].pop(start, None)  # `take` has done so
        self.n_blocks -= end - start


def _check_count(name: str, value: int, at_least: int = 0) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
