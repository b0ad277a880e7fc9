"""Sampling of a token a row: noise, filters without sorting, and verification of drafts (docs/kernels.md, "Sampling").

One program takes one row. Whatever decides is arithmetic with one result, written as in lmops.reference.sampling and
compiled without contraction of products and sums: the CPU implementation draws the same tokens. Hardware exponentials
are only used for log-probabilities and for bounds with a margin.

"Slots": a loop over tiles of BLOCK columns keeps, for each of BLOCK slots, what it needs of the columns slot,
slot + BLOCK, ...; the slots are put together once, behind the loop. "Positions": a row whose length is no multiple of
16 bytes need not begin at one either. Loads of 16 bytes do, so a row is walked through from the one at or before it,
`shift` columns early; position p is the column p - shift. Where noise is drawn for whole tiles, in fours of
neighbouring ids, shift must be 0. The "list": the tokens that the filters may keep, packed (`pack`), which a program
writes to memory of its own and searches there.
"""

import triton
import triton.language as tl

LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
LOG2E: tl.constexpr = tl.constexpr(1.4426950216293335)
LN2: tl.constexpr = tl.constexpr(0.6931471824645996)
SQRT_HALF: tl.constexpr = tl.constexpr(0x3F3504F3)
GREEDY_BELOW: tl.constexpr = tl.constexpr(1e-5)
LOWEST_KEY: tl.constexpr = tl.constexpr(-2147483648)
NO_ID: tl.constexpr = tl.constexpr(2147483647)
NO_TOKEN: tl.constexpr = tl.constexpr(9223372036854775807)
NOTHING: tl.constexpr = tl.constexpr(-2139095041 << 32)  # `pack` of -inf and NO_ID
CUT_STEP: tl.constexpr = tl.constexpr(65536)


# ------------------------------------------------------------------------- arithmetic with one result on every device


@triton.jit
def ln_of_split(e, t):
    """ln(2^e (1 + t))."""
    q = t * -0.10347994416952133 + 0.16278991103172302
    q = q * t + -0.17201559245586395
    q = q * t + 0.1989399641752243
    q = q * t + -0.2497338503599167
    q = q * t + 0.33335089683532715
    q = q * t + -0.5000028610229492
    return e.to(tl.float32) * LN2 + t * (q * t + 1)


@triton.jit
def split(x):
    """Exponent e and t of a positive normal x = 2^e (1 + t), with 1 + t from sqrt(1/2) to sqrt(2)."""
    bits = x.to(tl.int32, bitcast=True) - SQRT_HALF
    return bits >> 23, ((bits & 0x7FFFFF) + SQRT_HALF).to(tl.float32, bitcast=True) - 1


@triton.jit
def ln(x):
    e, t = split(x)
    return ln_of_split(e, t)


@triton.jit
def exp2(y):
    """2^y for y from -64 to 0; what is below counts as -64."""
    y = tl.where(y < -64.0, -64.0, y)
    whole = tl.floor(y)
    f = y - whole
    r = f * 0.0018671300495043397 + 0.009017030708491802
    r = r * f + 0.05579991266131401
    r = r * f + 0.24016444385051727
    r = r * f + 0.6931512951850891
    p = r * f + 1
    return (p.to(tl.int32, bitcast=True) + (whole.to(tl.int32) << 23)).to(tl.float32, bitcast=True)


@triton.jit
def weigh(y):
    """2^y as a whole number of 2^-40ths, so that sums do not depend on their order."""
    return (exp2(y) * 1099511627776.0).to(tl.int64)


@triton.jit
def gumbel(word):
    """-ln(-ln u), u = (word + 1/2) / 2^32; near 1 by way of 1 - u, which has all its digits."""
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    e, t = split(u)
    return -ln(-ln_of_split(e, tl.where(e == 0, -rest, t)))


@triton.jit
def words(fours, seed, offset, STREAM: tl.constexpr):
    """Four random words for each counter (id // 4, offset, STREAM) under the key `seed`."""
    low, high = (offset & 0xFFFFFFFF).to(tl.uint32), ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, fours, low, high, (offset * 0 + STREAM).to(tl.uint32))


@triton.jit
def noise_of_tile(start, seed, offset, STREAM: tl.constexpr, BLOCK: tl.constexpr):
    """Gumbel noise (BLOCK,) of the ids from start, a multiple of 4, on: four from a call of Philox."""
    w0, w1, w2, w3 = words((start // 4 + tl.arange(0, BLOCK // 4)), seed, offset, STREAM)
    return gumbel(tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape((BLOCK,)))


@triton.jit
def noise_of_ids(ids, seed, offset, STREAM: tl.constexpr):
    """Gumbel noise of any ids: the word id % 4 of their calls."""
    w0, w1, w2, w3 = words(ids >> 2, seed, offset, STREAM)
    low = tl.where((ids & 1) == 0, w0, w1)
    high = tl.where((ids & 1) == 0, w2, w3)
    return gumbel(tl.where((ids & 2) == 0, low, high))


@triton.jit
def noisy(x, noise, inverse):
    """x / temperature + noise, -inf where x is; a number stays one, however large."""
    z = x * inverse
    z = tl.where(z > LARGEST, LARGEST, tl.where(z < -LARGEST, -LARGEST, z))
    return tl.where(x > float("-inf"), z + noise, float("-inf"))


@triton.jit
def order_key(x):
    """int32 in the order of float32 numbers; -0 and 0 are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


# ------------------------------------------------------------------------------------------------------------ a row


@triton.jit
def parameter(value, row, stride, TYPE: tl.constexpr = tl.float32):
    """The row's entry of a tensor, or where stride is None a number."""
    if stride is None:
        return tl.full((), 0, TYPE) + value
    else:
        return tl.load(value + row.to(tl.int64) * stride)


@triton.jit
def tile_of(ptr, start, lanes, stride):
    """Addresses of the columns start + lanes of a row at ptr: one scalar moves, the lanes' offsets stay."""
    return ptr + tl.cast(start, tl.int64) * stride + lanes.to(tl.int64) * stride


@triton.jit
def row_start(ptr, offset, VEC: tl.constexpr, SHIFTED: tl.constexpr):
    """Where the positions of the row at ptr + offset begin, and its shift."""
    if SHIFTED:
        return ptr + offset // VEC * VEC, (offset % VEC).to(tl.int32)
    else:
        return ptr + offset, 0


@triton.jit
def groups(start, lanes, shift, n_cols, VEC: tl.constexpr):
    """Positions that are columns: those of groups of VEC wholly in the row; the others, and whether there are any."""
    p = start + lanes
    last = (shift + n_cols) // VEC * VEC
    whole = (p >= (shift + VEC - 1) // VEC * VEC) & (p < last)
    others = (whole == 0) & (p >= shift) & (p < shift + n_cols)
    return whole, others, (start + lanes.shape[0] > last) | (start < shift)


@triton.jit
def load_columns(ptr, start, lanes, stride, shift, n_cols, fill: tl.constexpr, VEC: tl.constexpr):
    """A tile of positions, `fill` where they are no columns; with VEC, groups of VEC at a time."""
    at = tile_of(ptr, start, lanes, stride)
    if VEC == 1:
        x = tl.load(at, mask=start + lanes < n_cols, other=fill)
    else:
        whole, others, edge = groups(start, lanes, shift, n_cols, VEC)
        x = tl.load(at, mask=whole, other=fill)
        if edge:
            x = tl.where(whole, x, tl.load(at, mask=others, other=fill))
    return x


@triton.jit
def load_tile(
    row_ptrs, col_strides, penalties, shift, start, lanes, n_cols,
    BIAS: tl.constexpr, ALLOWED: tl.constexpr, COUNTS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Logits of positions start + lanes as they are, and adjusted: with bias, mask and penalties, at most LARGEST."""
    raw = load_columns(row_ptrs[0], start, lanes, col_strides[0], shift, n_cols, float("-inf"), VEC).to(tl.float32)
    x = raw
    if BIAS:
        x += load_columns(row_ptrs[1], start, lanes, col_strides[1], shift, n_cols, 0.0, VEC).to(tl.float32)
    if ALLOWED:
        allowed = load_columns(row_ptrs[2], start, lanes, col_strides[2], shift, n_cols, 0, VEC)
        x = tl.where(allowed != 0, x, float("-inf"))
    if COUNTS:
        count = load_columns(row_ptrs[3], start, lanes, col_strides[3], shift, n_cols, 0, VEC)
        repetition, presence, frequency = penalties
        penalized = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        penalized = penalized - presence - count.to(tl.float32) * frequency
        x = tl.where(count > 0, penalized, x)
    return raw, tl.where(x > LARGEST, LARGEST, x)


@triton.jit
def add_up(x, m, l, scale):
    """Slots' running maximum m (at first -LARGEST) and sum l of 2^((x - m) scale), with one exponential."""
    smaller = tl.exp2(-tl.abs(x - m) * scale)
    above = x > m
    return tl.where(above, x, m), tl.where(above, l * smaller + 1, l + smaller)


@triton.jit
def log_sum(m, l):
    """LSE of what `add_up` took into the slots with LOG2E."""
    top = tl.max(m, 0)
    return top + tl.log2(tl.sum(l * tl.exp2((m - top) * LOG2E), 0)) * LN2


@triton.jit
def take_best(key, start, best, at):
    """Slots' largest key so far and the start of its tile; the first of equal ones."""
    better = key > best
    return tl.where(better, key, best), tl.where(better, start, at)


@triton.jit
def first_of_best(best, ids):
    """Largest key of the slots, and the lowest of their ids that has it."""
    peak = tl.max(best, 0)
    return peak, tl.min(tl.where(best == peak, ids, NO_ID), 0)


@triton.jit
def draw_unfiltered(
    row_ptrs, col_strides, penalties, n_cols, good, greedy, inverse, seed, offset,
    BIAS: tl.constexpr, ALLOWED: tl.constexpr, COUNTS: tl.constexpr, FILTERS: tl.constexpr, LOGPROBS: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row's token, whether it has one (`good`: its temperature is allowed), and with LOGPROBS the LSE of its logits.

    That of the logits as they are.
    """
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK,), tl.int32)
    m = tl.full((BLOCK,), -LARGEST, tl.float32)
    l = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_cols, BLOCK):
        raw, x = load_tile(row_ptrs, col_strides, penalties, 0, start, lanes, n_cols, BIAS, ALLOWED, COUNTS, VEC)
        key = x
        if greedy == 0:
            # beside the code of filters, see `choose_by_bisection` for the 0
            seed_here = seed ^ (start >> 31) if FILTERS else seed
            key = noisy(x, noise_of_tile(start, seed_here, offset, 0, BLOCK), inverse)
        best, at = take_best(tl.where(x != x, float("inf"), key), start, best, at)
        if LOGPROBS:
            m, l = add_up(raw, m, l, LOG2E)
    peak, token = first_of_best(best, at + lanes)
    valid = good & (peak > float("-inf")) & (peak < float("inf"))
    lse = peak
    if LOGPROBS:
        lse = log_sum(m, l)
    return tl.where(valid, token, 0), valid, lse


# ------------------------------------------------------------------------------------------- filters without sorting


@triton.jit
def pack(x, ids):
    """int64 in the order of tokens by x, and of equal ones by descending id."""
    return (order_key(x).to(tl.int64) << 32) + (ids ^ NO_ID)


@triton.jit
def unpack(packed):
    """x, and the id."""
    return from_key((packed >> 32).to(tl.int32)), packed.to(tl.int32) ^ NO_ID


@triton.jit
def load_list(list_ptr, start, n, BLOCK: tl.constexpr):
    """BLOCK of the n entries of a list, packed, and their x; -inf behind the last."""
    at = start + tl.arange(0, BLOCK)
    packed = tl.load(list_ptr + at, mask=at < n, other=NOTHING)
    return packed, from_key((packed >> 32).to(tl.int32))


@triton.jit
def keeps(packed, x, last, peak, scale, least):
    """Which tokens belong to the prefix that ends with the packed token `last`, and are not below min-p."""
    return (packed >= last) & ((x - peak) * scale >= least) & (x > float("-inf"))


@triton.jit
def threshold(
    first, list_ptr, n, lo, hi, goal, peak, scale, BY_MASS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest int64 from lo to hi such that the entries with packed >> SHIFT >= it count, or weigh, at least goal.

    lo where there is none. first: of the n entries of the list the first BLOCK, which stay in registers.
    """
    keys = first >> SHIFT
    measures = weigh((unpack(first)[0] - peak) * scale) if BY_MASS else tl.full((BLOCK,), 1, tl.int32)
    while lo < hi:
        middle = hi - ((hi - lo) >> 1)
        total = tl.where(keys >= middle, measures, 0)
        for start in range(BLOCK, n, BLOCK):
            packed, x = load_list(list_ptr, start, n, BLOCK)
            total += tl.where(packed >> SHIFT >= middle, weigh((x - peak) * scale) if BY_MASS else 1, 0)
        if tl.sum(total, 0) >= goal:
            lo = middle
        else:
            hi = middle - 1
    return lo


@triton.jit
def tally(list_ptr, n, key, peak, scale, BLOCK: tl.constexpr):
    """How many entries are above `key`, how many equal it, what those above weigh, and what one that equals it does."""
    above = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, n, BLOCK):
        packed, x = load_list(list_ptr, start, n, BLOCK)
        above += (packed >> 32 > key).to(tl.int32)
        equal += (packed >> 32 == key).to(tl.int32)
        mass += tl.where(packed >> 32 > key, weigh((x - peak) * scale), 0)
    one = weigh((from_key(key.to(tl.int32)) - peak) * scale)
    return tl.sum(above, 0).to(tl.int64), tl.sum(equal, 0).to(tl.int64), tl.sum(mass, 0), one


@triton.jit
def choose_by_bisection(
    list_ptr, n, lo, peak, scale, inverse, use_k, use_p, top_k, top_p, least, total, seed, offset, BLOCK: tl.constexpr
):
    """The exact prefix among the n entries of the list, none of whose keys is below lo: a token from it, and its last.

    total: the mass of the row, for use_p without use_k. The last token is packed; the token is drawn from those of the
    prefix that min-p keeps.
    """
    hi = order_key(peak).to(tl.int64)
    key = lo.to(tl.int64)
    count = tl.zeros((), tl.int64) + n  # of the prefix
    ties = count * 0  # how many tokens that equal the key are in it, and are there
    equal = ties
    first, _ = load_list(list_ptr, 0, n, BLOCK)
    if use_k:
        key = threshold(first, list_ptr, n, key, hi, top_k.to(tl.int64), peak, scale, False, 32, BLOCK)
        above, equal, mass, one = tally(list_ptr, n, key, peak, scale, BLOCK)
        ties = tl.minimum(top_k.to(tl.int64) - above, equal)
        count = above + ties
        total = mass + ties * one
    if use_p:
        target = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        key = threshold(first, list_ptr, n, key, hi, target, peak, scale, True, 32, BLOCK)
        above, equal, mass, one = tally(list_ptr, n, key, peak, scale, BLOCK)
        one = tl.maximum(one, 1)
        ties = tl.minimum((target - mass + one - 1) // one, equal)
        count = above + ties
    last = key << 32
    if ties < equal:
        last = threshold(first, list_ptr, n, last, last + NO_ID, count, peak, scale, False, 0, BLOCK)

    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_id = tl.full((BLOCK,), NO_ID, tl.int32)
    for start in range(0, n, BLOCK):
        packed, _ = load_list(list_ptr, start, n, BLOCK)
        x, ids = unpack(packed)
        keep = keeps(packed, x, last, peak, scale, least)
        # 0, which the compiler cannot know: else it holds the 20 keys of Philox's rounds in scalar registers throughout
        zero = ids >> 31
        draw = tl.where(keep, noisy(x, noise_of_ids(ids, seed ^ zero, offset, 0), inverse), float("-inf"))
        better = (draw > best) | ((draw == best) & (ids < best_id))
        best, best_id = tl.where(better, draw, best), tl.where(better, ids, best_id)
    _, token = first_of_best(best, tl.where(best > float("-inf"), best_id, 0))
    return token, last


@triton.jit
def choose_by_rank(
    list_ptr, n, peak, scale, inverse, use_k, use_p, top_k, top_p, least, total, seed, offset,
    BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    """The same of at most BLOCK entries, each compared with each, OTHERS at a time: few steps, and no bisection."""
    packed, x = load_list(list_ptr, 0, n, BLOCK)
    before = tl.zeros((BLOCK, OTHERS), tl.int32)
    above = tl.zeros((BLOCK, OTHERS), tl.int64)
    for start in range(0, n, OTHERS):
        others, y = load_list(list_ptr, start, n, OTHERS)
        comes_before = others[None, :] > packed[:, None]
        before += comes_before.to(tl.int32)
        above += tl.where(comes_before, weigh((y - peak) * scale)[None, :], 0)
    kept = x > float("-inf")
    if use_k:
        kept = kept & (tl.sum(before, 1) < top_k)
        total = tl.sum(tl.where(kept, weigh((x - peak) * scale), 0), 0)
    if use_p:
        target = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        kept = kept & (tl.sum(above, 1) < target)
    last = tl.min(tl.where(kept, packed, NO_TOKEN), 0)
    _, ids = unpack(packed)
    noise = noise_of_ids(ids, seed ^ (ids >> 31), offset, 0)  # the 0 as in `choose_by_bisection`
    draw = tl.where(keeps(packed, x, last, peak, scale, least), noisy(x, noise, inverse), float("-inf"))
    _, token = first_of_best(draw, tl.where(draw > float("-inf"), ids, 0))
    return token, last


@triton.jit
def cut_of_slots(slot, slot_mass, goal, by_k, top):
    """A key that at least `goal` slots' maxima reach (by_k), or ones of that mass; LOWEST_KEY without one.

    Each maximum is an entry of its own, so as many entries of the row, or as much mass, reach it too. It is the largest
    such key but for CUT_STEP, at most 1/128 of its number: to find it exactly would take 16 steps more, each a sum over
    the block, and spare the list few entries.
    """
    keys = order_key(slot)
    measures = tl.where(by_k, tl.where(slot_mass > 0, 1.0, 0.0), slot_mass)
    lo = top.to(tl.int64) * 0 + LOWEST_KEY
    hi = top.to(tl.int64)
    while hi - lo >= CUT_STEP:
        middle = hi - ((hi - lo) >> 1)
        if tl.sum(tl.where(keys >= middle, measures, 0.0), 0) >= goal:
            lo = middle
        else:
            hi = middle - 1
    return lo.to(tl.int32)


@triton.jit
def select(x, ids, count, floor, list_ptr):
    """Append what of a tile is at least `floor` to the list; how many entries there are by now."""
    chosen = (x >= floor) & (x > float("-inf"))
    found = tl.sum(chosen.to(tl.int32), 0)
    if found > 0:
        # unsigned: addresses take fewer registers
        place = (count - 1 + tl.cumsum(chosen.to(tl.int32), 0)).to(tl.uint32)
        tl.store(list_ptr + place, pack(x, ids), mask=chosen)
    return count + found


@triton.jit
def look_through(
    row_ptrs, col_strides, penalties, shift, n_cols, scale,
    BIAS: tl.constexpr, ALLOWED: tl.constexpr, COUNTS: tl.constexpr, LOGPROBS: tl.constexpr, FITS: tl.constexpr,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The first read of a row with filters: its first tile, peak, the slots' maxima and 2^((them - peak) scale).

    And the row's sum z of 2^((x - peak) scale), whether it has a token, and with LOGPROBS the LSE of the logits as
    they are.
    """
    lanes = tl.arange(0, BLOCK)
    slot = tl.full((BLOCK,), -LARGEST, tl.float32)
    l = tl.zeros((BLOCK,), tl.float32)
    raw_m = tl.full((BLOCK,), -LARGEST, tl.float32)
    raw_l = tl.zeros((BLOCK,), tl.float32)
    if FITS:
        raw, x = load_tile(row_ptrs, col_strides, penalties, shift, 0, lanes, n_cols, BIAS, ALLOWED, COUNTS, VEC)
        slot, l = add_up(x, slot, l, scale)
        if LOGPROBS:
            raw_m, raw_l = add_up(raw, raw_m, raw_l, LOG2E)
    else:
        # backwards: the second read begins with what was read last, the likeliest to lie in a cache
        for back in range(0, shift + n_cols, BLOCK):
            start = (shift + n_cols - 1) // BLOCK * BLOCK - back
            raw, x = load_tile(
                row_ptrs, col_strides, penalties, shift, start, lanes, n_cols, BIAS, ALLOWED, COUNTS, VEC
            )
            slot, l = add_up(x, slot, l, scale)
            if LOGPROBS:
                raw_m, raw_l = add_up(raw, raw_m, raw_l, LOG2E)
        x = slot
    peak = tl.max(slot, 0)
    one = tl.where(l == 0, 0.0, tl.exp2((slot - peak) * scale))
    z = tl.sum(l * one, 0)
    lse = z
    if LOGPROBS:
        lse = log_sum(raw_m, raw_l)
    return x, peak, slot, one, z, (z == z) & (z > 0), lse


@triton.jit
def draw_filtered(
    x, peak, slot, one, z, valid, list_ptr, row_ptrs, col_strides, penalties, shift, n_cols, scale, inverse,
    top_k, top_p, min_p, seed, offset,
    BIAS: tl.constexpr, ALLOWED: tl.constexpr, COUNTS: tl.constexpr, FITS: tl.constexpr,
    BLOCK: tl.constexpr, LIST_BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A token from those that the filters keep, 0 without any; and what `keeps` takes: last and least.

    x to valid: of `look_through`.
    """
    lanes = tl.arange(0, BLOCK)
    use_k = (top_k > 0) & (top_k < n_cols)
    use_p = top_p < 1
    least = tl.where(min_p > 0, ln(tl.maximum(min_p, 1e-37)) * LOG2E, float("-inf"))
    # a bound of what the filters keep, so that few entries go to the list: what is left out weighs nothing where
    # masses of the list are taken, or is counted in `total`
    by_k = use_k & (top_k <= BLOCK)
    goal = tl.where(by_k, top_k.to(tl.float32), top_p * z * 1.0001)
    cut = order_key(peak) * 0 + LOWEST_KEY
    bound = tl.where(use_k & use_p, float("-inf"), least)
    if by_k | (use_p & (use_k == 0)):
        cut = cut_of_slots(slot, one, goal, by_k, order_key(peak))
    if use_p & (use_k == 0):
        # tokens lighter than this together weigh less than the 1 - top_p that may be left out
        bound = tl.maximum(bound, tl.log2((1 - top_p) * z / n_cols * 0.9999))
    # the same for x: a little less, since what is right at a bound is decided by `keeps`
    below = tl.where(bound == 0, 0.0, bound / scale)
    floor = peak + below - (tl.abs(peak) - below) * 1e-6
    floor = tl.where(cut > LOWEST_KEY, tl.maximum(floor, from_key(cut)), floor)
    floor = tl.where(valid, floor, float("inf"))  # which leaves nothing of a row without a token
    count = cut * 0
    if FITS:
        total = tl.sum(weigh((x - peak) * scale), 0)
        count = select(x, lanes - shift, count, floor, list_ptr)
    else:
        mass = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, shift + n_cols, BLOCK):
            _, x = load_tile(row_ptrs, col_strides, penalties, shift, start, lanes, n_cols, BIAS, ALLOWED, COUNTS, VEC)
            if use_p & (use_k == 0):
                mass += weigh((x - peak) * scale)
            count = select(x, start + lanes - shift, count, floor, list_ptr)
        total = tl.sum(mass, 0)
    tl.debug_barrier()
    RANKED: tl.constexpr = min(LIST_BLOCK, 256)
    if count <= RANKED:
        token, last = choose_by_rank(
            list_ptr, count, peak, scale, inverse, use_k, use_p, top_k, top_p, least, total, seed, offset,
            RANKED, min(16, BLOCK // RANKED),
        )  # fmt: skip
    else:
        token, last = choose_by_bisection(
            list_ptr, count, cut, peak, scale, inverse, use_k, use_p, top_k, top_p, least, total, seed, offset,
            LIST_BLOCK,
        )  # fmt: skip
    return token, last, least


@triton.jit
def row_temperature(value, row, stride):
    """Whether the row's temperature t is allowed, and greedy; 1 / t and log2(e) / t (of 1 where it is greedy)."""
    temperature = parameter(value, row, stride).to(tl.float32)
    good = (temperature >= 0) & (temperature < float("inf"))
    greedy = (temperature < GREEDY_BELOW) | (good == 0)
    divisor = tl.where(greedy, 1.0, temperature)
    return good, greedy, tl.div_rn(1.0, divisor), tl.div_rn(LOG2E, divisor)


@triton.jit
def row_filters(parameters, row, strides, n_cols):
    """top_k (0: none), top_p and min_p of the row, each brought into its range."""
    k = parameter(parameters[1], row, strides[1])  # compared as it is, so that no conversion overflows
    p = parameter(parameters[2], row, strides[2]).to(tl.float32)
    min_p = parameter(parameters[3], row, strides[3]).to(tl.float32)
    top_p = tl.where(p < 1, tl.where(p > 0, p, 1e-30), 1.0)
    return tl.where((k > 0) & (k < n_cols), k, 0).to(tl.int32), top_p, tl.where(min_p > 1, 1.0, min_p)


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def store_state(valid, lse, row, valid_ptr, lse_ptr, LOGPROBS: tl.constexpr):
    tl.store(valid_ptr + row, valid)
    if LOGPROBS:
        tl.store(lse_ptr + row, lse)


@triton.jit(do_not_specialize=("seed", "offset", "first_row"))
def sample_kernel(
    logits_ptr, bias_ptr, allowed_ptr, counts_ptr, tokens_ptr, valid_ptr, logprobs_ptr, lse_ptr, lists_ptr,
    parameters, seed, offset, first_row, n_cols, row_strides, col_strides, parameter_strides,
    BIAS: tl.constexpr, ALLOWED: tl.constexpr, COUNTS: tl.constexpr, FILTERS: tl.constexpr, LOGPROBS: tl.constexpr,
    FITS: tl.constexpr, BLOCK: tl.constexpr, LIST_BLOCK: tl.constexpr, VEC: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """token = argmax of x / temperature + Gumbel noise over what top-k, top-p and min-p keep, x the adjusted logits.

    logits, bias, allowed (uint8), counts: (B, V) with any strides, of which row_strides and col_strides have one each.
    parameters: temperature, top_k, top_p, min_p and the three penalties, each a number or a pointer to (B,); seed and
    offset likewise; parameter_strides: one each, None for a number. tokens (B,) int64, valid (B,) bool, logprobs and
    lse (B,) float32. lists: (programs, V) int64, to write what may be kept; programs take the rows from first_row on.
    FILTERS: rows may have filters. FITS: V, with SHIFTED V + VEC - 1, <= BLOCK. VEC: columns of 16 bytes of logits
    where these begin at a multiple of 16 bytes, and so does each row unless SHIFTED; 1 if V says all that is to know.
    """
    row = first_row + tl.program_id(0)
    r = row.to(tl.int64)
    row_ptrs = (
        logits_ptr + r * row_strides[0], bias_ptr + r * row_strides[1], allowed_ptr + r * row_strides[2],
        counts_ptr + r * row_strides[3],
    )  # fmt: skip
    good, greedy, inverse, scale = row_temperature(parameters[0], row, parameter_strides[0])
    penalties = (
        parameter(parameters[4], row, parameter_strides[4]).to(tl.float32),
        parameter(parameters[5], row, parameter_strides[5]).to(tl.float32),
        parameter(parameters[6], row, parameter_strides[6]).to(tl.float32),
    )
    seed = parameter(seed, row, parameter_strides[7], tl.int64).to(tl.int64)
    offset = parameter(offset, row, parameter_strides[8], tl.int64).to(tl.int64)
    if FILTERS:
        top_k, top_p, min_p = row_filters(parameters, row, parameter_strides, n_cols)
        if (greedy == 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
            list_ptr = lists_ptr + tl.program_id(0).to(tl.int64) * n_cols
            start, shift = row_start(logits_ptr, r * row_strides[0], VEC, SHIFTED)
            walk_ptrs = (
                start, row_ptrs[1] - shift * col_strides[1], row_ptrs[2] - shift * col_strides[2],
                row_ptrs[3] - shift * col_strides[3],
            )  # fmt: skip
            x, peak, slot, one, z, valid, lse = look_through(
                walk_ptrs, col_strides, penalties, shift, n_cols, scale,
                BIAS, ALLOWED, COUNTS, LOGPROBS, FITS, BLOCK, VEC,
            )  # fmt: skip
            store_state(valid, lse, row, valid_ptr, lse_ptr, LOGPROBS)  # first, so that no register holds it longer
            token, _, _ = draw_filtered(
                x, peak, slot, one, z, valid, list_ptr, walk_ptrs, col_strides, penalties, shift, n_cols, scale,
                inverse, top_k, top_p, min_p, seed, offset,
                BIAS, ALLOWED, COUNTS, FITS, BLOCK, LIST_BLOCK, VEC,
            )  # fmt: skip
        else:
            token, valid, lse = draw_unfiltered(
                row_ptrs, col_strides, penalties, n_cols, good, greedy, inverse, seed, offset,
                BIAS, ALLOWED, COUNTS, FILTERS, LOGPROBS, BLOCK, 1 if SHIFTED else VEC,
            )  # fmt: skip
            store_state(valid, lse, row, valid_ptr, lse_ptr, LOGPROBS)
    else:
        token, valid, lse = draw_unfiltered(
            row_ptrs, col_strides, penalties, n_cols, good, greedy, inverse, seed, offset,
            BIAS, ALLOWED, COUNTS, FILTERS, LOGPROBS, BLOCK, 1 if SHIFTED else VEC,
        )  # fmt: skip
        store_state(valid, lse, row, valid_ptr, lse_ptr, LOGPROBS)
    row += token.to(tl.int32) >> 31  # 0 too: else multiples of the row are held in scalar registers throughout
    tl.store(tokens_ptr + row, token.to(tl.int64))
    if LOGPROBS:
        chosen = tl.load(row_ptrs[0] + token.to(tl.int64) * col_strides[0]).to(tl.float32)
        tl.store(logprobs_ptr + row, chosen - lse)


@triton.jit(do_not_specialize=("first_row",))
def filter_kernel(
    logits_ptr, out_ptr, lists_ptr, parameters, first_row, n_cols,
    row_strides, col_strides, parameter_strides,
    FITS: tl.constexpr, BLOCK: tl.constexpr, LIST_BLOCK: tl.constexpr, VEC: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """out = logits with -inf in place of what top-k, top-p and min-p do not keep; a bad row is -inf throughout.

    parameters: temperature, top_k, top_p, min_p; these, lists and the flags as in `sample_kernel`. With VEC, out
    is laid out as logits are.
    """
    row = first_row + tl.program_id(0)
    r = row.to(tl.int64)
    ptr, shift = row_start(logits_ptr, r * row_strides[0], VEC, SHIFTED)
    out_ptr, _ = row_start(out_ptr, r * row_strides[1], VEC, SHIFTED)
    row_ptrs, strides, penalties = (ptr, ptr, ptr, ptr), (col_strides[0], 0, 0, 0), (1.0, 0.0, 0.0)
    good, greedy, inverse, scale = row_temperature(parameters[0], row, parameter_strides[0])
    top_k, top_p, min_p = row_filters(parameters, row, parameter_strides, n_cols)
    list_ptr = lists_ptr + tl.program_id(0).to(tl.int64) * n_cols
    none = r * 0
    x, peak, slot, one, z, valid, _ = look_through(
        row_ptrs, strides, penalties, shift, n_cols, scale, False, False, False, False, FITS, BLOCK, VEC
    )
    _, last, least = draw_filtered(
        x, peak, slot, one, z, valid, list_ptr, row_ptrs, strides, penalties, shift, n_cols, scale, inverse,
        tl.where(greedy, 1, top_k), tl.where(greedy, 1.0, top_p), tl.where(greedy, 0.0, min_p), none, none,
        False, False, False, FITS, BLOCK, LIST_BLOCK, VEC,
    )  # fmt: skip
    least = tl.where(good & valid, least, float("inf"))  # what a bad row keeps is nothing
    lanes = tl.arange(0, BLOCK)
    for start in range(0, shift + n_cols, BLOCK):
        raw, x = load_tile(row_ptrs, strides, penalties, shift, start, lanes, n_cols, False, False, False, VEC)
        keep = keeps(pack(x, start + lanes - shift), x, last, peak, scale, least)
        out = tl.where(keep, raw, float("-inf")).to(out_ptr.dtype.element_ty)
        at = tile_of(out_ptr, start, lanes, col_strides[1])
        if VEC == 1:
            tl.store(at, out, mask=start + lanes < n_cols)
        else:
            whole, others, edge = groups(start, lanes, shift, n_cols, VEC)
            tl.store(at, out, mask=whole)
            if edge:
                tl.store(at, out, mask=others)


@triton.jit
def draft_weights(base_ptr, offset, stride, n_cols, scale, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Of a row of logits: its largest x (NaN if it has one), the first token that has it, and 2^40 / its whole mass."""
    ptr, shift = row_start(base_ptr, offset, VEC, VEC > 1)
    row_ptrs, strides, penalties = (ptr, ptr, ptr, ptr), (stride, 0, 0, 0), (1, 0, 0)
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, shift + n_cols, BLOCK):
        _, x = load_tile(row_ptrs, strides, penalties, shift, start, lanes, n_cols, False, False, False, VEC)
        best, at = take_best(tl.where(x != x, float("inf"), x), start, best, at)
    peak, token = first_of_best(best, at + lanes - shift)
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, shift + n_cols, BLOCK):
        _, x = load_tile(row_ptrs, strides, penalties, shift, start, lanes, n_cols, False, False, False, VEC)
        total += tl.where(x > float("-inf"), weigh((x - peak) * scale), 0)
    return peak, token, tl.div_rn(1099511627776.0, tl.sum(total, 0).to(tl.float32))


@triton.jit
def probability(x, peak, share, scale):
    return tl.where(x > float("-inf"), exp2((x - peak) * scale) * share, 0.0)


@triton.jit(do_not_specialize=("seed", "offset"))
def accept_kernel(
    target_ptr, draft_ptr, draft_tokens_ptr, accepted_ptr, sums_ptr, temperature, seed, offset, n_drafts, n_cols,
    target_strides, draft_strides, token_strides, parameter_strides,
    DRAFT: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Whether draft token d at position i of a row is accepted: u q(d) < p(d), with p = softmax(target / temperature).

    q is the same of the draft's logits (DRAFT), or 1. Temperature 0: whether d is the target's first maximum.
    target (B, n_drafts + 1, V), draft (B, n_drafts, V), draft_tokens and accepted (B, n_drafts).
    sums (B, n_drafts, 4): peak and 1 / mass of p and q, for `redraw_kernel`. VEC: 1, or columns of 16 bytes, where
    target and draft begin at multiples of 16 bytes but their rows do not.
    """
    row, i = tl.program_id(0) // n_drafts, tl.program_id(0) % n_drafts
    r, j = row.to(tl.int64), i.to(tl.int64)
    good, greedy, _, scale = row_temperature(temperature, row, parameter_strides[0])
    seed = parameter(seed, row, parameter_strides[1], tl.int64).to(tl.int64)
    offset = parameter(offset, row, parameter_strides[2], tl.int64).to(tl.int64) + j
    at = r * target_strides[0] + j * target_strides[1]
    peak, first, share = draft_weights(target_ptr, at, target_strides[2], n_cols, scale, BLOCK, VEC)
    token = tl.load(draft_tokens_ptr + r * token_strides[0] + j * token_strides[1]).to(tl.int64)
    known = (token >= 0) & (token < n_cols) & good & (peak > float("-inf")) & (peak < float("inf"))
    x = tl.load(target_ptr + at + token * target_strides[2], mask=known, other=float("-inf")).to(tl.float32)
    p = probability(tl.where(x > LARGEST, LARGEST, x), peak, share, scale)
    q = p * 0 + 1
    sums = sums_ptr + tl.program_id(0) * 4
    tl.store(sums, peak)
    tl.store(sums + 1, share)
    if DRAFT:
        at = r * draft_strides[0] + j * draft_strides[1]
        peak, _, share = draft_weights(draft_ptr, at, draft_strides[2], n_cols, scale, BLOCK, VEC)
        x = tl.load(draft_ptr + at + token * draft_strides[2], mask=known, other=float("-inf")).to(tl.float32)
        q = probability(tl.where(x > LARGEST, LARGEST, x), peak, share, scale)
        known = known & (peak < float("inf"))
        tl.store(sums + 2, peak)
        tl.store(sums + 3, share)
    word, _, _, _ = words(tl.program_id(0) * 0, seed, offset, 1)
    u = (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    accepted = known & tl.where(greedy, token == first, u * q < p)
    tl.store(accepted_ptr + tl.program_id(0), accepted.to(tl.uint8))


@triton.jit(do_not_specialize=("seed", "offset"))
def redraw_kernel(
    target_ptr, draft_ptr, draft_tokens_ptr, accepted_ptr, sums_ptr, lens_ptr, tokens_ptr, counts_ptr, valid_ptr,
    temperature, seed, offset, n_drafts, n_cols, target_strides, draft_strides, token_strides, parameter_strides,
    DRAFT: tl.constexpr, LENS: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The accepted drafts of a row, then a token from normalise(max(p - q, 0)), or from p where all were accepted.

    Without the draft's logits q is 1 at the draft's token, so it is p without that token. lens (B,), with LENS: how
    many drafts the row has. tokens (B, n_drafts + 1), -1 behind the last; counts, valid (B,); POSITIONS > n_drafts.
    """
    row = tl.program_id(0)
    r = row.to(tl.int64)
    good, greedy, inverse, scale = row_temperature(temperature, row, parameter_strides[0])
    length = row * 0 + n_drafts
    if LENS:
        given = tl.load(lens_ptr + r * parameter_strides[3])
        length = tl.minimum(tl.maximum(given, 0), n_drafts).to(tl.int32)
    positions = tl.arange(0, POSITIONS)
    drafted = positions < length
    accepted = tl.load(accepted_ptr + r * n_drafts + positions, mask=drafted, other=0)
    n = tl.min(tl.where(accepted == 0, positions, POSITIONS), 0)
    rejected = (n < length) & (greedy == 0)
    seed = parameter(seed, row, parameter_strides[1], tl.int64).to(tl.int64)
    offset = parameter(offset, row, parameter_strides[2], tl.int64).to(tl.int64) + n
    token_ptrs = draft_tokens_ptr + r * token_strides[0] + positions.to(tl.int64) * token_strides[1]
    drafts = tl.load(token_ptrs, mask=drafted, other=-1).to(tl.int64)
    refused = tl.max(tl.where((positions == n) & rejected, drafts, -1), 0)
    sums = sums_ptr + (row * n_drafts + n) * 4
    peak = tl.load(sums, mask=rejected, other=0.0)
    share = tl.load(sums + 1, mask=rejected, other=0.0)
    q_peak = tl.load(sums + 2, mask=rejected & DRAFT, other=0.0)
    q_share = tl.load(sums + 3, mask=rejected & DRAFT, other=0.0)

    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK,), tl.int32)
    p_ptr = target_ptr + r * target_strides[0] + n.to(tl.int64) * target_strides[1]
    q_ptr = draft_ptr + r * draft_strides[0] + n.to(tl.int64) * draft_strides[1]
    for start in range(0, n_cols, BLOCK):
        ids = start + lanes
        _, x = load_tile(
            (p_ptr, p_ptr, p_ptr, p_ptr), (target_strides[2], 0, 0, 0), (1, 0, 0), 0, start, lanes, n_cols,
            False, False, False, 1,
        )  # fmt: skip
        key = x
        if greedy == 0:
            noise = noise_of_tile(start, seed, offset, 2, BLOCK)
            key = noisy(x, noise, inverse)
            if DRAFT:
                if rejected:
                    _, y = load_tile(
                        (q_ptr, q_ptr, q_ptr, q_ptr), (draft_strides[2], 0, 0, 0), (1, 0, 0), 0, start, lanes, n_cols,
                        False, False, False, 1,
                    )  # fmt: skip
                    left = probability(x, peak, share, scale) - probability(y, q_peak, q_share, scale)
                    some = left > 1e-37
                    key = tl.where(some, ln(tl.where(some, left, 1.0)) + noise, float("-inf"))
            else:
                key = tl.where(ids == refused, float("-inf"), key)
        best, at = take_best(tl.where(x != x, float("inf"), key), start, best, at)
    top, token = first_of_best(best, at + lanes)
    # nothing is left by rounding alone, where p = q: the draft's token is as good
    same = rejected & (top == float("-inf")) & (refused >= 0) & (refused < n_cols)
    same = same & (peak > float("-inf"))
    token = tl.where(same, refused, token.to(tl.int64))
    # q_peak is inf where the draft's logits have NaN: then nothing can be drawn
    valid = good & (q_peak < float("inf")) & (same | ((top > float("-inf")) & (top < float("inf"))))
    token = tl.where(valid, token, 0)
    out = tl.where(positions < n, drafts, tl.where(positions == n, token, -1))
    tl.store(tokens_ptr + r * (n_drafts + 1) + positions, out, mask=positions <= n_drafts)
    tl.store(counts_ptr + row, n.to(tl.int64))
    tl.store(valid_ptr + row, valid.to(tl.uint8))
