"""The Triton kernels of the adapted linear layer and its norm; the only file that imports triton. `launch` calls them.

Under Triton's interpreter (``TRITON_INTERPRET=1`` before this file is imported) the same kernels run on CPU tensors.
Matrices are contiguous where no strides are passed. Sums are float32.
"""

import triton
import triton.language as tl


@triton.jit
def _load(ptr, row, col, num_rows, num_cols, row_stride, col_stride, UPCAST: tl.constexpr):
    """A tile of a matrix, zero outside; the interpreter's bfloat16 products are wrong, so there it is cast up."""
    inside = (row[:, None] < num_rows) & (col[None, :] < num_cols)
    tile = tl.load(ptr + row[:, None].to(tl.int64) * row_stride + col[None, :] * col_stride, mask=inside, other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


INTERPRETED = not isinstance(_load, triton.JITFunction)
# how many programs look for a change of A and B, each leaving one flag; the interpreter runs them one by one
NUM_FLAGS: tl.constexpr = tl.constexpr(4 if INTERPRETED else 128)


@triton.jit
def compose_kernel(
    y_ptr, xa_ptr, b_ptr, gain_ptr, bias_ptr, N, O, R, s,
    HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y[n, o] <- g[o] (y[n, o] - bias[o] + s Σ_r xa[n, r] b[o, r]) + bias[o]; where g = 1 and b = 0 no bit changes."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    low_NO = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        xa_NR = _load(xa_ptr, n, r, N, R, R, 1, UPCAST)
        b_OR = _load(b_ptr, o, r, O, R, R, 1, UPCAST)
        low_NO = tl.dot(xa_NR, tl.trans(b_OR), low_NO, input_precision="ieee")
    inside = (n[:, None] < N) & (o[None, :] < O)
    at = n[:, None].to(tl.int64) * O + o[None, :]
    base_NO = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_GAIN:
        g_O = tl.load(gain_ptr + o, mask=o < O, other=1.0).to(tl.float32)
        if HAS_BIAS:
            bias_O = tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)
            # near g = 1 the base output is kept and (g - 1) z added: z + bias - bias + bias would round
            near_O = tl.abs(g_O - 1.0) <= 0.5
            z_NO = base_NO - bias_O[None, :]
            kept_NO = tl.where(near_O[None, :], base_NO, bias_O[None, :])
            base_NO = kept_NO + tl.where(near_O, g_O - 1.0, g_O)[None, :] * z_NO
        else:
            base_NO = g_O[None, :] * base_NO
        low_NO = g_O[None, :] * low_NO
    y_NO = base_NO + s * low_NO
    tl.store(y_ptr + at, y_NO.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def split_kernel(
    dy_ptr, y_ptr, gain_ptr, bias_ptr, b_ptr, dz_ptr, partial_ptr, dzb_ptr, N, O, R, s, chunk,
    HAS_BIAS: tl.constexpr, FUSE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dz = g dy and partial[block, o] = Σ_n dy (y - bias) over the block's rows.

    One program takes BLOCK_N rows and `chunk` columns. With FUSE also dzb[chunk, n, r] = s Σ_o dz[n, o] b[o, r].
    """
    block = tl.program_id(0)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    dzb_NR = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, O), BLOCK_O):
        o = start + tl.arange(0, BLOCK_O)
        inside = (n[:, None] < N) & (o[None, :] < O)
        at = n[:, None].to(tl.int64) * O + o[None, :]
        dy_NO = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        z_NO = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            z_NO -= tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
        tl.store(partial_ptr + block.to(tl.int64) * O + o, tl.sum(dy_NO * z_NO, axis=0), mask=o < O)
        g_O = tl.load(gain_ptr + o, mask=o < O, other=0.0).to(tl.float32)
        dz_NO = (dy_NO * g_O[None, :]).to(dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + at, dz_NO, mask=inside)
        if FUSE:
            b_OR = _load(b_ptr, o, r, O, R, R, 1, UPCAST)
            dzb_NR = tl.dot(dz_NO.to(b_OR.dtype), b_OR, dzb_NR, input_precision="ieee")
    if FUSE:
        at = (tl.program_id(1).to(tl.int64) * N + n[:, None]) * R + r[None, :]
        dzb_NR = (dzb_NR * s).to(dzb_ptr.dtype.element_ty)
        tl.store(dzb_ptr + at, dzb_NR, mask=(n[:, None] < N) & (r[None, :] < R))


@triton.jit
def _contract(
    dy_ptr, x_ptr, w_ptr, o, N, O, I, x_row, x_col, w_row, w_col,
    UPCAST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Σ_i w[o, i] Σ_n dy[n, o] x[n, i], which is Σ_n dy ∘ (x wᵀ) without the product."""
    acc_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for i_start in range(0, I, BLOCK_I):
        i = i_start + tl.arange(0, BLOCK_I)
        dyx_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for n_start in range(0, N, BLOCK_N):
            n = n_start + tl.arange(0, BLOCK_N)
            dy_NO = _load(dy_ptr, n, o, N, O, O, 1, UPCAST)
            x_NI = _load(x_ptr, n, i, N, I, x_row, x_col, UPCAST)
            dyx_OI = tl.dot(tl.trans(dy_NO), x_NI, dyx_OI, input_precision="ieee")
        acc_OI += dyx_OI * _load(w_ptr, o, i, O, I, w_row, w_col, UPCAST).to(tl.float32)
    return tl.sum(acc_OI, axis=1)


@triton.jit
def gain_gradient_kernel(
    partial_ptr, gain_ptr, dy_ptr, x_ptr, w_ptr, xa_ptr, b_ptr, dgain_ptr, num_partials, N, O, I, R, s, tiny_gain,
    x_row, x_col, w_row, w_col,
    UPCAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """dgain[o] = Σ partial[:, o] / g[o]; where g is tiny, y holds nothing to divide, so the product is made again."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    sum_PO = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
    for start in range(0, num_partials, BLOCK_P):
        sum_PO += _load(partial_ptr, start + tl.arange(0, BLOCK_P), o, num_partials, O, O, 1, False)
    g_O = tl.load(gain_ptr + o, mask=o < O, other=float("inf")).to(tl.float32)
    tiny_O = tl.abs(g_O) < tiny_gain
    dgain_O = tl.sum(sum_PO, axis=0) / tl.where(tiny_O, 1.0, g_O)
    if tl.max(tiny_O.to(tl.int32), axis=0) != 0:
        exact_O = _contract(dy_ptr, x_ptr, w_ptr, o, N, O, I, x_row, x_col, w_row, w_col,
                            UPCAST, BLOCK_N, BLOCK_O, BLOCK_I)  # fmt: skip
        exact_O += s * _contract(dy_ptr, xa_ptr, b_ptr, o, N, O, R, R, 1, R, 1, UPCAST, BLOCK_N, BLOCK_O, BLOCK_I)
        dgain_O = tl.where(tiny_O, exact_O, dgain_O)
    tl.store(dgain_ptr + o, dgain_O, mask=o < O)


@triton.jit
def _changed_part(ptr, seen_ptr, count, scale, first, length, BLOCK: tl.constexpr):
    """Whether scale * values differ from what was seen, bit by bit; the difference is remembered at once."""
    differs = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, first + length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        now = tl.load(ptr + at, mask=at < count, other=0.0).to(tl.float32) * scale
        seen = tl.load(seen_ptr + at, mask=at < count, other=0.0)
        new = (now.to(tl.int32, bitcast=True) != seen.to(tl.int32, bitcast=True)) & (at < count)
        tl.store(seen_ptr + at, now, mask=new)
        differs = differs | new.to(tl.int32)
    return tl.max(differs, axis=0)


@triton.jit
def changed_kernel(
    a_ptr, b_ptr, seen_a_ptr, seen_sb_ptr, flags_ptr, num_a, num_b, s, a_length, b_length, BLOCK: tl.constexpr
):
    """flags[program] = 1 if the program's share of A or of s B is not the one seen before."""
    program = tl.program_id(0)
    a_new = _changed_part(a_ptr, seen_a_ptr, num_a, 1.0, program * a_length, a_length, BLOCK)
    b_new = _changed_part(b_ptr, seen_sb_ptr, num_b, s, program * b_length, b_length, BLOCK)
    tl.store(flags_ptr + program, tl.maximum(a_new, b_new))


@triton.jit
def _dot(x, y, acc, DOT: tl.constexpr, UPCAST: tl.constexpr):
    """acc + x y; "split" takes float32 operands as two bfloat16 parts each, three products, error about 2⁻¹⁶."""
    if DOT == "bf16" or DOT == "split":
        KEPT: tl.constexpr = tl.float32 if UPCAST else tl.bfloat16
        x_high, y_high = x.to(tl.bfloat16), y.to(tl.bfloat16)
        if DOT == "split":
            x_low = (x - x_high.to(tl.float32)).to(tl.bfloat16).to(KEPT)
            y_low = (y - y_high.to(tl.float32)).to(tl.bfloat16).to(KEPT)
            acc = tl.dot(x_low, y_high.to(KEPT), acc)
            acc = tl.dot(x_high.to(KEPT), y_low, acc)
        acc = tl.dot(x_high.to(KEPT), y_high.to(KEPT), acc)
    else:
        acc = tl.dot(x, y, acc, input_precision=DOT)
    return acc


@triton.jit
def _length(square_O, AS_DIVISOR: tl.constexpr):
    """Its root; as a divisor infinity for 0, so that m / n is 0 and nothing is NaN."""
    length_O = tl.sqrt(square_O)
    if AS_DIVISOR:
        length_O = tl.where(square_O > 0.0, length_O, float("inf"))
    return length_O


@triton.jit
def norm_kernel(
    w_ptr, a_ptr, b_ptr, flags_ptr, out_ptr, O, I, R, s, w_row, w_col, chunk,
    PREDICATED: tl.constexpr, SPLIT: tl.constexpr, ONE_R: tl.constexpr, DOT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[o] = sqrt Σ_i (w[o, i] + Σ_r (s b[o, r]) a[r, i])², or with SPLIT out[chunk, o], the chunk's part of Σ.

    With PREDICATED every program leaves at once when no flag is set, and a row of length zero is given as infinity.
    """
    if PREDICATED:  # noqa: SIM102 - a constant, unlike the condition inside
        if tl.max(tl.load(flags_ptr + tl.arange(0, NUM_FLAGS)), axis=0) == 0:
            return
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, BLOCK_R)
    square_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    if ONE_R:
        sb_OR = _load(b_ptr, o, r, O, R, R, 1, False).to(tl.float32) * s
    first = tl.program_id(1) * chunk
    for start in range(first, tl.minimum(first + chunk, I), BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        w_OI = _load(w_ptr, o, i, O, I, w_row, w_col, False).to(tl.float32)
        delta_OI = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        if ONE_R:
            a_RI = _load(a_ptr, r, i, R, I, I, 1, False).to(tl.float32)
            delta_OI = _dot(sb_OR, a_RI, delta_OI, DOT, UPCAST)
        else:
            for r_start in range(0, R, BLOCK_R):
                sb_OR = _load(b_ptr, o, r_start + r, O, R, R, 1, False).to(tl.float32) * s
                a_RI = _load(a_ptr, r_start + r, i, R, I, I, 1, False).to(tl.float32)
                delta_OI = _dot(sb_OR, a_RI, delta_OI, DOT, UPCAST)
        v_OI = w_OI + delta_OI
        square_OI += v_OI * v_OI
    total_O = tl.sum(square_OI, axis=1)
    if SPLIT:
        tl.store(out_ptr + tl.program_id(1) * O + o, total_O, mask=o < O)
    else:
        tl.store(out_ptr + o, _length(total_O, PREDICATED), mask=o < O)


@triton.jit
def finish_norm_kernel(part_ptr, flags_ptr, n_ptr, O, num_parts, PREDICATED: tl.constexpr, BLOCK_O: tl.constexpr):
    """n[o] = sqrt Σ part[:, o], if anything changed."""
    if PREDICATED:  # noqa: SIM102 - a constant, unlike the condition inside
        if tl.max(tl.load(flags_ptr + tl.arange(0, NUM_FLAGS)), axis=0) == 0:
            return
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    total_O = tl.zeros((BLOCK_O,), tl.float32)
    for part in range(num_parts):
        total_O += tl.load(part_ptr + part * O + o, mask=o < O, other=0.0)
    tl.store(n_ptr + o, _length(total_O, PREDICATED), mask=o < O)
