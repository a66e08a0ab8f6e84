"""Tree attention in Triton: block-sparse FlashAttention-2 over a depth-first fold.

Row q sees row kv if and only if `kv <= q < subtree_end[kv]`, and, with a window, if also
`depth[q] - depth[kv] < window`. A tile of queries holds all query heads of one key head, so that
keys and values are read once for the whole group. Which blocks of keys a tile visits stands in lists
that the core makes from the trie (`Fold.block_mask`): the kernels depend on no size of the batch,
and a new batch compiles nothing.

Forward and backward follow FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile_and_head(kv_heads, IN_A_ROW: tl.constexpr):
    """What this program computes. A tile's IN_A_ROW key heads start together, then those of the next tile."""
    tiles = tl.num_programs(0) // kv_heads
    first = tl.program_id(0) // (tiles * IN_A_ROW) * IN_A_ROW
    heads = tl.minimum(kv_heads - first, IN_A_ROW)
    at = tl.program_id(0) - tiles * first
    return at // heads, first + at % heads


@triton.jit
def _load_heads(base, row, head, dim, stride_row, stride_head, valid, HEAD_DIM: tl.constexpr, EVEN: tl.constexpr):
    """A tile [rows, dim] whose every row has a head of its own; zeros where it is not `valid`."""
    at = base + row[:, None].to(tl.int64) * stride_row + head[:, None] * stride_head + dim[None, :]
    return tl.load(at, mask=valid[:, None] if EVEN else valid[:, None] & (dim[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def _load_through(tensor, row, head, COUNT: tl.constexpr, DIM: tl.constexpr):
    """The COUNT (row, head) pairs of a tensor descriptor's block from there on: zeros beyond the tensor's ends."""
    return tensor.load([row, head, 0]).reshape(COUNT, DIM)


@triton.jit
def _scores(q, k, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores [queries, keys], the factor that brings them to base 2, and their slope by the scaled product."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        t = 1 - 2 / (tl.exp2(s * (2 * scale / softcap * LOG2_E)) + 1)
        s, factor, slope = t, softcap * LOG2_E, 1 - t * t
    else:
        s, factor, slope = s, scale * LOG2_E, 1.0
    return s, factor, slope


@triton.jit
def _visible(row, key, subtree_end, depth, rows, window, WINDOW: tl.constexpr):
    """Whether `row` sees `key`, in their common shape."""
    end = tl.load(subtree_end + key, mask=key < rows, other=0)
    seen = (key <= row) & (row < end)
    if WINDOW:
        query_depth = tl.load(depth + row, mask=row < rows, other=0)
        key_depth = tl.load(depth + key, mask=key < rows, other=0)
        seen = seen & (query_depth - key_depth < window)
    return seen


@triton.jit
def _forward_tile(
    acc, total, peak, q, K, V, kv_head, start, row, subtree_end, depth, rows, scale, softcap, window,
    KEY_BLOCK: tl.constexpr, DIM: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the keys `start..start + KEY_BLOCK`."""
    key = start + tl.arange(0, KEY_BLOCK)
    k = _load_through(K, start, kv_head, KEY_BLOCK, DIM)
    s, factor, _ = _scores(q, k, scale, softcap, SOFTCAP, PRECISION)
    if MASKED:
        s = tl.where(_visible(row[:, None], key[None, :], subtree_end, depth, rows, window, WINDOW), s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1) * factor)
    # A row that has seen nothing yet keeps its peak at -inf: subtract 0 there, not -inf.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak) if MASKED else new_peak
    p = tl.exp2(s * factor - shift[:, None])
    fade = tl.exp2(peak - shift)
    v = _load_through(V, start, kv_head, KEY_BLOCK, DIM)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, total * fade + tl.sum(p, 1), new_peak


@triton.jit(do_not_specialize=["rows", "window"])
def forward(
    Q, K, V, Out, Lse, subtree_end, depth, full, partial, blocks,
    rows, kv_heads, scale, softcap, window,
    stride_q, stride_qh, stride_o, stride_oh,
    GROUP: tl.constexpr, TILE: tl.constexpr, KEY_BLOCK: tl.constexpr, IN_A_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head = _tile_and_head(kv_heads, IN_A_ROW)
    # Late blocks have the longest lists: they start first.
    block = tl.num_programs(0) // kv_heads - 1 - tile
    EVEN: tl.constexpr = HEAD_DIM == DIM
    entry = tl.arange(0, TILE)
    row = block * (TILE // GROUP) + entry // GROUP
    head = kv_head * GROUP + entry % GROUP
    valid = (entry < TILE // GROUP * GROUP) & (row < rows)
    dim = tl.arange(0, DIM)
    q = _load_heads(Q, row, head, dim, stride_q, stride_qh, valid, HEAD_DIM, EVEN)

    acc = tl.zeros([TILE, DIM], tl.float32)
    total = tl.zeros([TILE], tl.float32)
    peak = tl.full([TILE], float("-inf"), tl.float32)
    for i in range(tl.load(full + block), tl.load(full + block + 1)):
        start = tl.load(blocks + i) * KEY_BLOCK
        acc, total, peak = _forward_tile(
            acc, total, peak, q, K, V, kv_head, start, row, subtree_end, depth, rows, scale, softcap, window,
            KEY_BLOCK, DIM, WINDOW, SOFTCAP, WINDOW, PRECISION,
        )  # fmt: skip
    for i in range(tl.load(partial + block), tl.load(partial + block + 1)):
        start = tl.load(blocks + i) * KEY_BLOCK
        acc, total, peak = _forward_tile(
            acc, total, peak, q, K, V, kv_head, start, row, subtree_end, depth, rows, scale, softcap, window,
            KEY_BLOCK, DIM, True, SOFTCAP, WINDOW, PRECISION,
        )  # fmt: skip

    # An entry that is no query has seen nothing.
    total = tl.where(valid, total, 1.0)
    out = Out + row[:, None].to(tl.int64) * stride_o + head[:, None] * stride_oh + dim[None, :]
    tl.store(out, (acc / total[:, None]).to(Out.dtype.element_ty), mask=valid[:, None] & (dim[None, :] < HEAD_DIM))
    tl.store(Lse + head * rows + row, (peak + tl.log2(total)) / LOG2_E, mask=valid)


@triton.jit
def _query_gradient_tile(
    acc, q, dout, lse, delta, K, V, kv_head, start, row, subtree_end, depth, rows, scale, softcap, window,
    KEY_BLOCK: tl.constexpr, DIM: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key = start + tl.arange(0, KEY_BLOCK)
    k = _load_through(K, start, kv_head, KEY_BLOCK, DIM)
    v = _load_through(V, start, kv_head, KEY_BLOCK, DIM)
    s, factor, slope = _scores(q, k, scale, softcap, SOFTCAP, PRECISION)
    p = tl.exp2(s * factor - lse[:, None])
    if MASKED:
        p = tl.where(_visible(row[:, None], key[None, :], subtree_end, depth, rows, window, WINDOW), p, 0.0)
    ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None]) * slope
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["rows", "window"])
def query_gradient(
    Q, K, V, Out, DOut, Lse, Delta, DQ, subtree_end, depth, full, partial, blocks,
    rows, kv_heads, scale, softcap, window,
    stride_q, stride_qh, stride_out, stride_outh, stride_o, stride_oh, stride_dq, stride_dqh,
    GROUP: tl.constexpr, LISTED: tl.constexpr, TILE: tl.constexpr, KEY_BLOCK: tl.constexpr, IN_A_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes `Delta`, the products of each query's output and its gradient, as well: `key_gradient` reads it.

    The block lists are those of LISTED entries, and serve each of the tiles that these are cut into.
    """
    tile, kv_head = _tile_and_head(kv_heads, IN_A_ROW)
    tile = tl.num_programs(0) // kv_heads - 1 - tile
    PARTS: tl.constexpr = LISTED // TILE
    block = tile // PARTS
    EVEN: tl.constexpr = HEAD_DIM == DIM
    entry = tile % PARTS * TILE + tl.arange(0, TILE)
    row = block * (LISTED // GROUP) + entry // GROUP
    head = kv_head * GROUP + entry % GROUP
    valid = (entry < LISTED // GROUP * GROUP) & (row < rows)
    dim = tl.arange(0, DIM)
    q = _load_heads(Q, row, head, dim, stride_q, stride_qh, valid, HEAD_DIM, EVEN)
    dout = _load_heads(DOut, row, head, dim, stride_o, stride_oh, valid, HEAD_DIM, EVEN)
    lse = tl.load(Lse + head * rows + row, mask=valid, other=0.0) * LOG2_E
    out = _load_heads(Out, row, head, dim, stride_out, stride_outh, valid, HEAD_DIM, EVEN)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(Delta + head * rows + row, delta, mask=valid)

    acc = tl.zeros([TILE, DIM], tl.float32)
    for i in range(tl.load(full + block), tl.load(full + block + 1)):
        start = tl.load(blocks + i) * KEY_BLOCK
        acc = _query_gradient_tile(
            acc, q, dout, lse, delta, K, V, kv_head, start, row, subtree_end, depth, rows, scale, softcap, window,
            KEY_BLOCK, DIM, WINDOW, SOFTCAP, WINDOW, PRECISION,
        )  # fmt: skip
    for i in range(tl.load(partial + block), tl.load(partial + block + 1)):
        start = tl.load(blocks + i) * KEY_BLOCK
        acc = _query_gradient_tile(
            acc, q, dout, lse, delta, K, V, kv_head, start, row, subtree_end, depth, rows, scale, softcap, window,
            KEY_BLOCK, DIM, True, SOFTCAP, WINDOW, PRECISION,
        )  # fmt: skip
    dq = DQ + row[:, None].to(tl.int64) * stride_dq + head[:, None] * stride_dqh + dim[None, :]
    tl.store(dq, (acc * scale).to(DQ.dtype.element_ty), mask=valid[:, None] & (dim[None, :] < HEAD_DIM))


@triton.jit
def _key_gradient_tile(
    dk, dv, k, v, Q, DOut, Lse, Delta, start, key, kv_head, dim, subtree_end, depth, rows, scale, softcap, window,
    stride_q, stride_qh, stride_o, stride_oh,
    GROUP: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr, THROUGH: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the query rows `start..start + TILE // GROUP` send to the keys. Scores are [keys, queries]."""
    entry = tl.arange(0, TILE)
    row = start + entry // GROUP
    head = kv_head * GROUP + entry % GROUP
    valid = (entry < TILE // GROUP * GROUP) & (row < rows)
    if THROUGH:
        q = _load_through(Q, start, kv_head * GROUP, TILE, DIM)
        dout = _load_through(DOut, start, kv_head * GROUP, TILE, DIM)
    else:
        q = _load_heads(Q, row, head, dim, stride_q, stride_qh, valid, HEAD_DIM, HEAD_DIM == DIM)
        dout = _load_heads(DOut, row, head, dim, stride_o, stride_oh, valid, HEAD_DIM, HEAD_DIM == DIM)
    # An entry that is no query has zeros for q and dout: it must only not overflow.
    lse = tl.load(Lse + head * rows + row, mask=valid, other=0.0) * LOG2_E
    delta = tl.load(Delta + head * rows + row, mask=valid, other=0.0)
    s, factor, slope = _scores(k, q, scale, softcap, SOFTCAP, PRECISION)
    p = tl.exp2(s * factor - lse[None, :])
    if MASKED:
        p = tl.where(_visible(row[None, :], key[:, None], subtree_end, depth, rows, window, WINDOW), p, 0.0)
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :]) * slope
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["rows", "window"])
def key_gradient(
    Q, DOut, K, V, Lse, Delta, DK, DV, Sums, key_block, first_step, walk_end, part,
    subtree_end, depth, rows, kv_heads, scale, softcap, window,
    stride_q, stride_qh, stride_o, stride_oh,
    stride_dk, stride_dkh, stride_dv, stride_dvh,
    GROUP: tl.constexpr, TILE: tl.constexpr, KEY_BLOCK: tl.constexpr, IN_A_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, THROUGH: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One walk of a block of keys through rows that see it: an interval, from its start to its last subtree's end.

    Walk i of the lists is that of block `key_block[i]`, from its step `first_step[i]` to row `walk_end[i]`. Where that
    is a part of the interval, the sums go to place `part[i] - 1` of `Sums` [parts, kv_heads, 2, KEY_BLOCK, DIM],
    float32, which `add_parts` adds.

    With THROUGH, `Q` and `DOut` are tensor descriptors of a step's rows and a key head's queries.
    """
    walk, kv_head = _tile_and_head(kv_heads, IN_A_ROW)
    first = tl.load(key_block + walk) * KEY_BLOCK
    STEP: tl.constexpr = TILE // GROUP
    # The step, not the row: from rows in the list Triton 3.6 made gradients that are wrong for 7 heads of a key head.
    start_at, end_at = first + tl.load(first_step + walk) * STEP, tl.load(walk_end + walk)
    key = first + tl.arange(0, KEY_BLOCK)
    dim = tl.arange(0, DIM)
    k = _load_through(K, first, kv_head, KEY_BLOCK, DIM)
    v = _load_through(V, first, kv_head, KEY_BLOCK, DIM)
    every = tl.min(tl.load(subtree_end + key, mask=key < rows, other=2147483647))
    # Rows before `own` hold the keys themselves, all from there to `whole` see all of the keys.
    own = first + tl.cdiv(KEY_BLOCK, STEP) * STEP
    whole = own if WINDOW else own + tl.maximum(every - own, 0) // STEP * STEP

    dk = tl.zeros([KEY_BLOCK, DIM], tl.float32)
    dv = tl.zeros([KEY_BLOCK, DIM], tl.float32)
    for start in range(start_at, tl.minimum(own, end_at), STEP):
        dk, dv = _key_gradient_tile(
            dk, dv, k, v, Q, DOut, Lse, Delta, start, key, kv_head, dim, subtree_end, depth, rows, scale, softcap,
            window, stride_q, stride_qh, stride_o, stride_oh, GROUP, TILE, HEAD_DIM, DIM, THROUGH,
            True, SOFTCAP, WINDOW, PRECISION,
        )  # fmt: skip
    for start in range(tl.maximum(own, start_at), tl.minimum(whole, end_at), STEP):
        dk, dv = _key_gradient_tile(
            dk, dv, k, v, Q, DOut, Lse, Delta, start, key, kv_head, dim, subtree_end, depth, rows, scale, softcap,
            window, stride_q, stride_qh, stride_o, stride_oh, GROUP, TILE, HEAD_DIM, DIM, THROUGH,
            False, SOFTCAP, WINDOW, PRECISION,
        )  # fmt: skip
    for start in range(tl.maximum(whole, start_at), end_at, STEP):
        dk, dv = _key_gradient_tile(
            dk, dv, k, v, Q, DOut, Lse, Delta, start, key, kv_head, dim, subtree_end, depth, rows, scale, softcap,
            window, stride_q, stride_qh, stride_o, stride_oh, GROUP, TILE, HEAD_DIM, DIM, THROUGH,
            True, SOFTCAP, WINDOW, PRECISION,
        )  # fmt: skip
    place = tl.load(part + walk)
    if place:
        at = _part(Sums, place - 1, kv_heads, kv_head, KEY_BLOCK, DIM)
        tl.store(at, dk)
        tl.store(at + KEY_BLOCK * DIM, dv)
    else:
        _store_keys(DK, dk * scale, key, kv_head, dim, rows, stride_dk, stride_dkh, HEAD_DIM)
        _store_keys(DV, dv, key, kv_head, dim, rows, stride_dv, stride_dvh, HEAD_DIM)


@triton.jit
def _part(Sums, place, kv_heads, kv_head, KEY_BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Where the keys' sums of this place are, [KEY_BLOCK, DIM]; the values' follow."""
    within = tl.arange(0, KEY_BLOCK)[:, None] * DIM + tl.arange(0, DIM)[None, :]
    return Sums + (place * kv_heads + kv_head).to(tl.int64) * (2 * KEY_BLOCK * DIM) + within


@triton.jit
def _store_keys(to, sums, key, kv_head, dim, rows, stride, stride_head, HEAD_DIM: tl.constexpr):
    at = to + key[:, None].to(tl.int64) * stride + kv_head * stride_head + dim[None, :]
    tl.store(at, sums.to(to.dtype.element_ty), (key[:, None] < rows) & (dim[None, :] < HEAD_DIM))


@triton.jit(do_not_specialize=["rows"])
def add_parts(
    Sums, DK, DV, split_block, first_part, rows, kv_heads, scale, stride_dk, stride_dkh, stride_dv, stride_dvh,
    KEY_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The gradients of key block `split_block[i]`, from its parts `first_part[i]..first_part[i + 1]`, in order."""
    split, kv_head = tl.program_id(0), tl.program_id(1)
    dk = tl.zeros([KEY_BLOCK, DIM], tl.float32)
    dv = tl.zeros([KEY_BLOCK, DIM], tl.float32)
    for place in range(tl.load(first_part + split), tl.load(first_part + split + 1)):
        at = _part(Sums, place, kv_heads, kv_head, KEY_BLOCK, DIM)
        dk += tl.load(at)
        dv += tl.load(at + KEY_BLOCK * DIM)
    key = tl.load(split_block + split) * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    dim = tl.arange(0, DIM)
    _store_keys(DK, dk * scale, key, kv_head, dim, rows, stride_dk, stride_dkh, HEAD_DIM)
    _store_keys(DV, dv, key, kv_head, dim, rows, stride_dv, stride_dvh, HEAD_DIM)
