"""One-line bugs of csrc/cuda/attention.cu: (name, text, the text with the bug)."""

MUTANTS = [
    (
        "no wait for the next tile",
        "gpu::cp_async_wait<0>();\n    __syncthreads();  // this",
        "__syncthreads();  // this",
    ),
    (
        "no barrier before the next tile",
        "    __syncthreads();  // this tile is there",
        "    // this tile is there",
    ),
    (
        "no wait for q and the first tile",
        "q_part[dim / 16][4];\n  gpu::cp_async_wait<0>();",
        "q_part[dim / 16][4];",
    ),
    (
        "no barrier before q is read",
        "gpu::cp_async_wait<0>();\n  __syncthreads();\n#pragma unroll",
        "gpu::cp_async_wait<0>();\n#pragma unroll",
    ),
    (
        "q and the first keys share memory",
        "T* q_tile = shared + Tile::stage;",
        "T* q_tile = shared;",
    ),
    (
        "the next tile overwrites this one",
        "shared + (stage ^ 1) * Tile::stage",
        "shared + stage * Tile::stage",
    ),
    (
        "a lost tail of keys",
        "if (first + Tile::keys < length)",
        "if (first + 2 * Tile::keys <= length)",
    ),
    (
        "a key past the length is read",
        "const bool seen = key < length;",
        "const bool seen = key <= length;",
    ),
    (
        "a key past the length counts",
        "if (first + 8 * n + e % 2 >= length)",
        "if (first + 8 * n + e % 2 > length)",
    ),
    ("elements past the head dimension", "row && d < dim;", "row != nullptr;"),
    ("the stride of k for v", "v + key * a.v_stride[2]", "v + key * a.k_stride[2]"),
    ("the q_index of another sample", "a.q_index[b * a.rows + row]", "a.q_index[row]"),
    ("a query past the end", "query < a.queries ?", "query <= a.queries ?"),
    ("swapped fragment of k", "q[d], b[0], b[1]);", "q[d], b[0], b[2]);"),
    (
        "swapped fragment of weights",
        "gpu::pack<T>(weight[2 * n][2], weight[2 * n][3])",
        "gpu::pack<T>(weight[2 * n + 1][2], weight[2 * n + 1][3])",
    ),
    (
        "swapped rows of q",
        "(warp * 16 + lane % 16) * Tile::pitch + d * 16",
        "(warp * 16 + (lane ^ 8) % 16) * Tile::pitch + d * 16",
    ),
    (
        "sums not rescaled",
        "out[d][2 * r] *= shrink, out[d][2 * r + 1] *= shrink;",
        "out[d][2 * r] *= shrink;",
    ),
    ("denominator not rescaled", "total[r] *= shrink;", ""),
    ("the maximum of a row with no key", "high == -INFINITY ? 0.0f : high;", "high;"),
    ("the sum of half a row", "return x + __shfl_xor_sync(gpu::kAll, x, 2);", "return x;"),
    (
        "the maximum of half a row",
        "return fmaxf(x, __shfl_xor_sync(gpu::kAll, x, 2));",
        "return x;",
    ),
    ("the bias in natural units", "fmaf(bias(e / 2, key), kLog2e,", "fmaf(bias(e / 2, key), 1.0f,"),
    ("the bias of the other row", "fmaf(bias(e / 2, key)", "fmaf(bias(e % 2, key)"),
    (
        "a key group past the table",
        "group < 0 || group >= a.key_groups",
        "group < 0 || group > a.key_groups",
    ),
    ("a query group past the table", "group < 0 || group >= a.query_groups", "group < 0"),
    ("one table for all samples", "a.table + b * a.table_stride[0] + h", "a.table + h"),
    ("log-sum-exp in base 2", "(top + log2f(total)) * kLn2;", "top + log2f(total);"),
    ("a dead row divided by 0", "const bool dead = total == 0.0f;", "const bool dead = false;"),
    ("a row past the end is stored", "if (row + 8 * r < a.rows)", "if (row + 8 * r <= a.rows)"),
    ("pairs in rows of odd length", "if (a.dim % 2 == 0) {", "if (a.dim > 0) {"),
    ("no padding of rows", "pitch = dim + 8;", "pitch = dim;"),
    ("alignment of v not checked", "rows_aligned(a, a.v, a.v_stride, a.keys)", "true"),
    ("unknown lengths taken for 0", "known[r] ? sum : not_a_number()", "sum"),
]
