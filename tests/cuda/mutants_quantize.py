"""One-line faults of csrc/cuda/quantize.cu that tests/cuda/test_quantize.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    ("a NaN is passed over", "fmaxf(most, size < INFINITY ? size : INFINITY)", "fmaxf(most, size)"),
    ("rows past the last", "if (row >= a.rows) return;", ""),
    ("the least of the range is lost", "most >= kTiny", "most > kTiny"),
    ("rows below the range have a scale", "finite && most >= kTiny", "finite && most > 0.0f"),
    ("no barrier before the warps' maxima are read", "    __syncthreads();\n", ""),
    (
        "a warp's maximum is left out",
        "for (int w = 0; w < kWarps; ++w) most",
        "for (int w = 1; w < kWarps - 1; ++w) most",
    ),
    ("lanes keep their maxima", "most = gpu::warp_max(most);", ""),
    ("halves go away from zero", "rintf(v[i])", "roundf(v[i])"),
    (
        "a quotient in place of the product",
        "__fmul_rn(__fdiv_rn(1.0f, most), kLevels)",
        "__fdiv_rn(kLevels, most)",
    ),
    ("smooth multiplies", "__fdiv_rn(v[i], by.e[i])", "v[i] * by.e[i]"),
    ("one element: smooth of another column", "a.smooth[k])", "a.smooth[0])"),
    (
        "smooth before the activation",
        "if (a.activation == kGeluTanh) v[i]",
        "if (a.activation == kGeluTanh && !a.smooth) v[i]",
    ),
    ("silu is a sigmoid", "v[i] *= gpu::sigmoid(v[i])", "v[i] = gpu::sigmoid(v[i])"),
    ("misaligned smoothing is taken for aligned", "at(a.smooth, 16) && ", ""),
    ("misaligned rows are taken for aligned", "at(a.x, 16) && ", ""),
    ("strides of rows are not looked at", " && (a.rows <= 1 || a.x_stride % 8 == 0)", ""),
    ("rows lie side by side", "row * a.x_stride", "row * a.dim"),
    ("every lane writes the scale of its own", "if (first == 0)", "if (lane == 0)"),
    (
        "shared memory for half of the warps",
        "kWarps * sizeof(float), stream, a",
        "kWarps / 2 * sizeof(float), stream, a",
    ),
    ("unusable rows keep their quotients", "    if (usable) {\n", "    {\n"),
    ("float8 up to 256", "float8 ? 448.0f : 127.0f", "float8 ? 256.0f : 127.0f"),
    ("float8 has the levels of int8", "float8 ? 448.0f : 127.0f", "127.0f"),
    ("float8: neighbours change places", "to_e4m3(v[i], v[i + 1])", "to_e4m3(v[i + 1], v[i])"),
    (
        "float8: the first of two twice",
        "static_cast<signed char>(pair >> 8)",
        "static_cast<signed char>(pair)",
    ),
    (
        "float8: a single one in the high byte",
        "gpu::to_e4m3(v[0], 0.0f)",
        "gpu::to_e4m3(0.0f, v[0])",
    ),
    ("float8 is rounded to integers", "to_e4m3(v[i], v[i + 1])", "to_e4m3(rintf(v[i]), v[i + 1])"),
    ("float8 is int8", "if (a.float8) return", "if (a.float8 && a.smooth) return"),
    (
        "float8: rows are always aligned",
        "if (a.float8) return eight ? launch<T, 8, true>",
        "if (a.float8) return a.dim % 8 == 0 ? launch<T, 8, true>",
    ),
    ("the gate is the value", "gpu::load(x + a.dim + k, gate)", "gpu::load(x + k, gate)"),
    ("the gate is as it comes", "v[i] *= gpu::gelu(gate[i])", "v[i] *= gate[i]"),
]
