"""One-line faults of csrc/cuda/quant_attention.cu, or of softmax.h, that
tests/cuda/test_quant_attention.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    # Means
    ("a mean of the warp's keys alone", "sum += shared[32 * w + lane];", "(void)w;"),
    ("keys of a warp follow one another", "key < a.keys; key += kWarps)", "key < a.keys; ++key)"),
    (
        "means before they are summed",
        "  __syncthreads();\n  if (warp) return;",
        "  if (warp) return;",
    ),
    (
        "a channel past the last",
        "if (d < a.dim) {\n    const T* k",
        "if (d <= a.dim) {\n    const T* k",
    ),
    (
        "the mean over the padded keys",
        "float(sum / double(a.keys))",
        "float(sum / double(at.keys))",
    ),
    ("the mean in float32", "double sum = 0.0;", "float sum = 0.0f;"),
    (
        "the means of another head",
        "a.scratch + at.mean + head * at.width : nullptr",
        "a.scratch + at.mean + h * at.width : nullptr",
    ),
    ("keys keep their mean", "const float* mean = a.smooth ?", "const float* mean = !a.smooth ?"),
    # Integers
    ("a mean is added", "x[i] -= m[i];", "x[i] += m[i];"),
    (
        "the means of the neighbouring channels",
        "gpu::load4(mean + d, m);",
        "gpu::load4(mean + 4 * c, m);",
    ),
    (
        "four at once where rows are not aligned",
        "if (aligned) {\n    if (d < dim) gpu::load4",
        "if (true) {\n    if (d < dim) gpu::load4",
    ),
    (
        "four at once past the end",
        "if (d < dim) gpu::load4(row + d, x);",
        "gpu::load4(row + d, x);",
    ),
    ("one element past the end", "if (d + i < dim) x[i]", "if (d + i <= dim) x[i]"),
    ("the largest of one lane", "most = row_max(most);", ""),
    ("the largest of two lanes", "return fmaxf(x, __shfl_xor_sync(gpu::kAll, x, 2));", "return x;"),
    ("a NaN is no size", "fmaxf(most, size < INFINITY ? size : INFINITY)", "fmaxf(most, size)"),
    ("the largest without its sign", "const float size = fabsf(x[i]);", "const float size = x[i];"),
    ("tiny rows have integers", "finite && most >= kTiny", "finite && most > 0.0f"),
    ("the least usable row has none", "most >= kTiny", "most > kTiny"),
    ("halves go up", "rintf(__fmul_rn(x[i], inverse))", "floorf(__fmul_rn(x[i], inverse) + 0.5f)"),
    ("towards zero", "rintf(__fmul_rn(x[i], inverse))", "truncf(__fmul_rn(x[i], inverse))"),
    (
        "a quotient in one step",
        "__fmul_rn(__fdiv_rn(1.0f, most), kLevels)",
        "__fdiv_rn(kLevels, most)",
    ),
    ("128 levels", "constexpr float kLevels = 127.0f;", "constexpr float kLevels = 128.0f;"),
    (
        "what is not finite gives 0",
        "return !finite ? __int_as_float(0x7fc00000) : usable",
        "return usable",
    ),
    (
        "the scale of the key before",
        "if (t == 0) (a.scratch + at.k_scale)[slot] = scale;",
        "if (t == 0) (a.scratch + at.k_scale)[slot ? slot - 1 : 0] = scale;",
    ),
    ("a key past the last is read", "key < a.keys ? k + key", "key <= a.keys ? k + key"),
    ("words in one place", "(to + 16 * c) = word", "(to + 8 * c) = word"),
    # Parts of v
    ("parts for a row past the last", "if (row >= a.keys) return;", "if (row > a.keys) return;"),
    (
        "an infinity in the first part",
        "fabsf(x[j]) < INFINITY ? first_bits(x[j]) : 0.0f",
        "first_bits(x[j])",
    ),
    ("the second part is the first", "          x[j] -= part[j];\n", ""),
    (
        "parts in the place of others",
        "a.keys + row) * 3 + p) * at.dim",
        "a.keys + row) * 3 + 2 - p) * at.dim",
    ),
    ("seven bits", "& 0xffff0000u", "& 0xfffe0000u"),
    ("two parts are enough", "i < kParts - j; ++i", "i < (kParts + 1) / 2 - j; ++i"),
    ("four products", "i < kParts - j; ++i", "i < (j ? 1 : kParts) && i < 2; ++i"),
    ("weights of one part", "        low -= a, high -= b;\n", ""),
    # Tiles
    ("no wait for a tile", "    gpu::cp_async_wait<0>();\n", ""),
    ("no barrier before the next tile", "    __syncthreads();  // this tile", "    // this tile"),
    ("the next tile overwrites this one", "copy(stage ^ 1, first", "copy(stage, first"),
    (
        "a lost tail of keys",
        "if (first + Tile::keys < length) copy",
        "if (first + 2 * Tile::keys <= length) copy",
    ),
    ("a value past the last is read", "key < length ? v + key", "key <= length ? v + key"),
    ("padded keys weigh", "if (first + Tile::keys > length) mask", "if (false) mask"),
    ("one padded key weighs", "n + e % 2 >= length)", "n + e % 2 > length)"),
    (
        "the stride of k for v",
        "Tile::parts * dim : a.v_stride[2]",
        "Tile::parts * dim : a.k_stride[2]",
    ),
    (
        "eight at once where v is not aligned",
        "Tile::parts > 1 || aligned(a, a.v",
        "true || aligned(a, a.v",
    ),
    (
        "four at once where q is not aligned",
        "aligned(a, a.q, a.q_stride, a.rows, a.dim, 4)",
        "true",
    ),
    ("rows that are apart by no multiple", " && (sizes[i] == 1 || stride[i] % many == 0)", ""),
    ("the scales of the first tile", "scale + first + 4 * i", "scale + 4 * i"),
    (
        "a scale of the neighbouring key",
        "k_scale[8 * (n + m) + e % 2]",
        "k_scale[8 * (n + m) + 1 - e % 2]",
    ),
    ("a scale of the other row", "* q_scale[e / 2]", "* q_scale[1 - e / 2]"),
    ("scores in units of e", "a.scale * kLog2e", "a.scale"),
    ("swapped fragment of k", "sum[0], q[d], b[0], b[1]", "sum[0], q[d], b[0], b[2]"),
    ("swapped words of q", "q_part[c / 2][c % 2 * 2 + r]", "q_part[c / 2][r * 2 + c % 2]"),
    ("swapped fragment of v", "out[2 * d], p[i], b[0], b[1]", "out[2 * d], p[i], b[0], b[2]"),
    (
        "banks of k meet",
        "k_pitch = width + 16, v_pitch = dim + 8;",
        "k_pitch = width, v_pitch = dim + 8;",
    ),
    (
        "banks of v meet",
        "k_pitch = width + 16, v_pitch = dim + 8;",
        "k_pitch = width + 16, v_pitch = dim;",
    ),
    # Softmax and output
    ("the sum of one lane", "const float sum = row_sum(total[r]);", "const float sum = total[r];"),
    ("the output keeps its old maximum", "out[d][2 * r] *= shrink, out", "out"),
    ("the sum keeps its old maximum", "    total[r] *= shrink;\n", ""),
    ("overflow below is NaN", "high == -INFINITY ? 0.0f : high", "high"),
    ("without keys NaN", "a.keys ? 1.0f / total : 0.0f", "1.0f / total"),
    ("nothing is NaN", "a.keys ? 1.0f / total : 0.0f", "total > 0.0f ? 1.0f / total : 0.0f"),
    (
        "a row past the last is stored",
        "if (query < a.rows)\n      store",
        "if (query <= a.rows)\n      store",
    ),
    ("a row past the last is read", "query < a.rows ? q + query", "query <= a.rows ? q + query"),
    ("a channel past the last is stored", "if (d + 1 < value_dim) to[d + 1]", "to[d + 1]"),
    ("pairs at odd addresses", "if (value_dim % 2 == 0) {", "if (true) {"),
    (
        "heads and rows change places",
        "((b * a.rows + query) * a.heads + h)",
        "((b * a.heads + h) * a.rows + query)",
    ),
    (
        "fewer tiles than rows",
        "tiles = (a.rows + 16 * warps - 1) / (16 * warps);",
        "tiles = a.rows / (16 * warps) ? a.rows / (16 * warps) : 1;",
    ),
]
