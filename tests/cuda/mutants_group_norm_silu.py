"""One-line bugs of csrc/cuda/group_norm_silu.cu: (name, text, the text with the bug)."""

MUTANTS = [
    (
        "no barrier before partial sums are read",
        "partial[2 * warp + 1] = b;\n  __syncthreads();",
        "partial[2 * warp + 1] = b;",
    ),
    (
        "no barrier before channel maps are read",
        "rest * mul[k];\n  }\n  __syncthreads();",
        "rest * mul[k];\n  }",
    ),
    (
        "one warp left out",
        "for (int w = 0; w < kWarps; ++w) a +=",
        "for (int w = 0; w < kWarps - 1; ++w) a +=",
    ),
    (
        "partial sums overlap",
        "partial[2 * warp] = a, partial[2 * warp + 1] = b;",
        "partial[warp] = a, partial[warp + 1] = b;",
    ),
    ("maps over partial sums", "*mul = shared + 2 * kWarps", "*mul = shared + kWarps"),
    ("shared memory too small", "size_t(2 * kWarps + 2 *", "size_t(2 * kWarps +"),
    ("wrong channel", ": pack * width / positions;", ": pack * width % positions / 4;"),
    (
        "wrong stride of positions",
        "int64_t(i / per_group) * a.C + i % per_group",
        "int64_t(i / per_group) * a.groups + i % per_group",
    ),
    (
        "lost tail",
        "packs = per_group * positions / width;",
        "packs = per_group * positions / width - 1;",
    ),
    ("group of the wrong sample", "b = blockIdx.x / groups, first", "b = 0, first"),
    ("shift ignores the sample", "b * a.shift_stride + c", "c"),
    ("width not checked", "bool four = run % 4 == 0;", "bool four = true;"),
]
