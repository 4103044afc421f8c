"""One-line bugs of csrc/cuda/layer_norm_modulate.cu: (name, text, the text with the bug)."""

MUTANTS = [
    ("row guard off by one", "if (row >= a.B * a.N) return;", "if (row > a.B * a.N) return;"),
    (
        "lost tail of packs",
        "for (int k = 0; k < kept; ++k)\n      if (lane + 32 * k < packs)",
        "for (int k = 0; k + 1 < kept; ++k)\n      if (lane + 32 * k < packs)",
    ),
    ("padding not zeroed", "if (pack >= packs) held[k][i] = 0.0f;", ""),
    ("padding counted in variance", "if (pack < packs) square =", "square ="),
    (
        "wrong sample",
        "const int64_t b = row / a.N, n = row % a.N, packs",
        "const int64_t b = row % a.N, n = row / a.N, packs",
    ),
    ("mean not divided", "gpu::warp_sum(sum) / float(a.D)", "gpu::warp_sum(sum) / float(a.D + 1)"),
    ("rms keeps the mean", "a.rms ? 0.0f :", "!a.rms ? 0.0f :"),
    ("scale without one", "fmaf(m[i], p[i], m[i])", "m[i] * p[i]"),
    ("alignment not checked", "bool four = a.D % 4 == 0;", "bool four = true;"),
    ("residual dropped", "store<width>(r, residual + d);", ""),
    ("eps outside the root", "/ float(a.D) + a.eps)", "/ float(a.D)) + a.eps"),
]
