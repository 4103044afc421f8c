"""One-line faults of csrc/cuda/grouped_linear.cu that tests/cuda/test_grouped_linear.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    ("no padding of straight slices", "size + 8 : kDeep + 8;", "size + 8 : kDeep;"),
    ("no padding of turned slices", "size + 8 : kDeep + 8;", "size : kDeep + 8;"),
    (
        "elements past the depth",
        "const bool read = row && d < dim;",
        "const bool read = row != nullptr;",
    ),
    (
        "swapped parts of a turned",
        "a + (k + lane % 8 + lane / 16 * 8) * pitch + row + lane / 8 % 2 * 8",
        "a + (k + lane % 16) * pitch + row + lane / 16 * 8",
    ),
    (
        "swapped parts of b",
        "gpu::mma_16816<T>(sum[m][n], p[m], q[0], q[1]);",
        "gpu::mma_16816<T>(sum[m][n], p[m], q[0], q[2]);",
    ),
    ("no wait for a slice", "    gpu::cp_async_wait<kStages - 2>();\n", ""),
    (
        "a wait that leaves one slice too many",
        "gpu::cp_async_wait<kStages - 2>();",
        "gpu::cp_async_wait<kStages - 1>();",
    ),
    (
        "no barrier before a slice is read",
        "    __syncthreads();  // this slice",
        "    // this slice",
    ),
    ("no barrier before sums go out", "  __syncthreads();  // no warp reads", "  // no warp reads"),
    (
        "the next slice overwrites this one",
        "shared + next % kStages * Own::stage;",
        "shared + step % kStages * Own::stage;",
    ),
    (
        "groups are not closed where there is none",
        "if (next < steps) copy(next, to, to + A::elements);\n    gpu::cp_async_commit();",
        "if (next < steps) copy(next, to, to + A::elements), gpu::cp_async_commit();",
    ),
    (
        "no barrier before a warp reads sums",
        "warp / Own::down * Own::columns, own);\n    __syncwarp();",
        "warp / Own::down * Own::columns, own);",
    ),
    (
        "no barrier after a warp wrote sums",
        "sum[m][n][3];\n    }\n    __syncwarp();",
        "sum[m][n][3];\n    }",
    ),
    ("elements past an output row", "if (d < dim) *reinterpret_cast", "*reinterpret_cast"),
    ("offsets that descend across 32 experts", "    end = end > last ? end : last;\n", ""),
    ("offsets that descend", "if (lane >= by && other > end) end = other;", ""),
    (
        "rows of the 33rd expert on",
        "    if (lane == 0) begin = last;\n",
        "    if (lane == 0) begin = 0;\n",
    ),
    ("the tiles of a group are its first", "begin += (tile - (upto - count)) * rows;", ""),
    ("a row of the next group", "if (r >= end) return nullptr;", "if (r > end) return nullptr;"),
    ("an index past x", "at >= 0 && at < a.T ?", "at >= 0 && at <= a.T ?"),
    ("an index in front of x", "at >= 0 && at < a.T ?", "at >= -1 && at < a.T ?"),
    ("GELU's tanh without its cube", "fmaf(0.044715f * x * x, x, x)", "x"),
    (
        "the other half gates",
        "return u * sigmoid(u) * other;",
        "return u * other * sigmoid(other);",
    ),
    ("blocks without rows go on", "  if (group.begin >= group.end) return;\n", ""),
    ("halves in turns of sixteen", "gated && (i & 8) != 0", "gated && (i & 16) != 0"),
    ("the first half alone, turned", "    if (half(own)) weight += out;\n", ""),
    ("weight rows past N", "w[j] = column(i) < out ? weight", "w[j] = column(i) <= out ? weight"),
    (
        "weight past K, turned",
        "return k < K ? weight + k * a.weight_k",
        "return k <= K ? weight + k * a.weight_k",
    ),
    ("the first expert's bias", "+ int64_t(group.expert) * N : nullptr;", ": nullptr;"),
    ("a row past the group is stored", "if (r >= group.end) return;", "if (r > group.end) return;"),
    ("bias past N", "bias && n + j < out;", "bias && n < out;"),
    (
        "the gradient of groups past 32",
        "for (int e = 1 + thread % 32; e <= expert; e += 32) {",
        "if (const int e = 1 + thread % 32; e <= expert) {",
    ),
    (
        "the gradient with the next group's row",
        "return r < end ? grad + int64_t(r) * N",
        "return r <= end ? grad + int64_t(r) * N",
    ),
    ("rows of the gradient past N", "    if (n + row >= N) return;\n", ""),
    ("width not looked at", "at16(p) && width % 8 == 0 &&", "at16(p) &&"),
    ("addresses taken for aligned", "return at16(p) && width", "return width"),
    ("strides taken for aligned", "(size <= 1 || stride % 8 == 0)", "true"),
    ("experts taken for aligned", "(a.E == 1 || a.weight_e % 8 == 0)", "true"),
    ("no tile for a tail", "a.R / rows + (a.E < a.R ? a.E : a.R);", "a.R / rows + 1;"),
]
