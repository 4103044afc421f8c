"""One-line faults of csrc/cuda/scale_shift.cu that tests/cuda/test_scale_shift.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    ("the row in front of scale counts", "if (rows.data && row >= 0) {", "if (rows.data) {"),
    ("the row past scale counts", "return row < a.A ?", "return row <= a.A ?"),
    ("no row is a scale of 0", "__int_as_float(0x7fc00000) : 0.0f", "0.0f : 0.0f"),
    (
        "samples share a row",
        "const int64_t row = a.index[b * a.index_stride];",
        "const int64_t row = a.index[0];",
    ),
    (
        "the last position of a sample is lost",
        "if (first + r >= a.P) break;",
        "if (first + r >= a.P - 1) break;",
    ),
    (
        "positions past a sample are written",
        "if (first + r >= a.P) break;",
        "",
    ),
    (
        "the second pack of channels is lost",
        "c < a.C; c += 32 * width) {\n    float scale[width], shift[width]",
        "c < a.C && c < 32 * width; c += 32 * width) {\n    float scale[width], shift[width]",
    ),
    (
        "a plane takes its sample's scale",
        "channels<1, S>(a.scale, row, plane % a.C, scale);",
        "channels<1, S>(a.scale, row, plane / a.C, scale);",
    ),
    (
        "no end of a plane's part",
        "from + kPlanePart < a.P ? from + kPlanePart : a.P;",
        "from + kPlanePart;",
    ),
    ("parts of planes past the last", "if (task >= a.B * a.C * parts) return;", ""),
    ("pieces of planes past the last", "if (task >= a.B * a.C * a.pieces) return;", ""),
    (
        "no barrier before the warps' sums are read",
        "= sum_g[i];\n  }\n  __syncthreads();",
        "= sum_g[i];\n  }",
    ),
    (
        "no barrier before the warps' pieces are read",
        "sums[warp * 32 + lane] = sum;\n  __syncthreads();",
        "sums[warp * 32 + lane] = sum;",
    ),
    (
        "a warp's sums are left out",
        "for (int w = 0; w < kWarps; ++w) sum += sums[2 * w * kTile + i];",
        "for (int w = 1; w < kWarps; ++w) sum += sums[2 * w * kTile + i];",
    ),
    (
        "the two sums change places",
        "sums[2 * warp * kTile + lane * width + i] = sum_gx[i];",
        "sums[2 * warp * kTile + lane * width + i] = sum_g[i];",
    ),
    (
        "the gradient of x is not scaled",
        "g[i] *= scale[i];",
        "",
    ),
    (
        "the gradient of planes is not scaled",
        "g[i] *= scale[0];",
        "",
    ),
    (
        "pieces of other rows are added",
        "if (row_of(a, b) != row || c >= a.C) continue;",
        "if (c >= a.C) continue;",
    ),
    (
        "a piece is added twice",
        "for (int64_t n = warp; n < a.pieces; n += kWarps)",
        "for (int64_t n = warp; n < a.pieces; n += kWarps - 1)",
    ),
    (
        "misaligned rows are taken for aligned",
        "return reinterpret_cast<uintptr_t>(x.data) % (4 * sizeof(T)) == 0 && x.b_stride",
        "return x.b_stride",
    ),
    (
        "misaligned scales are taken for aligned",
        "reinterpret_cast<uintptr_t>(rows.data) % (4 * sizeof(S)) == 0 && ",
        "",
    ),
    ("strides of scales are not looked at", " && rows.stride % 4 == 0", ""),
    ("shared memory too small", "2 * kThreads * width * sizeof(float)", "kThreads * sizeof(float)"),
    ("scales past the last channel", "if (channel < a.C) a.parts", "a.parts"),
]
