"""One-line bugs of csrc/cuda/layer_norm_modulate.cu: (name, text, the text with the bug)."""

MUTANTS = [
    ("row guard off by one", "if (row >= a.B * a.N) return;", "if (row > a.B * a.N) return;"),
    (
        "lost tail of packs",
        "k < kept; ++k) {\n        const int64_t pack = lane + 32 * k;\n        if",
        "k + 1 < kept; ++k) {\n        const int64_t pack = lane + 32 * k;\n        if",
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
    ("largest value of a lane alone", "most = gpu::warp_max(most);", ""),
    (
        "NaN lost in the maximum",
        "fmaxf(most, size < INFINITY ? size : INFINITY)",
        "fmaxf(most, size)",
    ),
    ("smooth left out", "if (!a.smooth) return;", "return;"),
    ("rows modulated twice", "if (!modulated) {", "if (true) {"),
    ("rounded towards zero", "rintf(__fmul_rn(m[i], inverse))", "truncf(__fmul_rn(m[i], inverse))"),
    (
        "scale of a row without one",
        "usable ? __fdiv_rn(most, kLevels) : 0.0f",
        "__fdiv_rn(most, kLevels)",
    ),
    ("integers of a neighbour", "(a.q) + row * a.D;", "(a.q) + (row ? row - 1 : 0) * a.D;"),
    (
        "alignment of smooth not checked",
        "four = four && aligned<float>(Modulation{a.smooth, 0, 0})",
        "four = four && true",
    ),
    ("eps outside the root", "/ float(a.D) + a.eps)", "/ float(a.D)) + a.eps"),
]
