"""One-line bugs of csrc/cuda/fused_step.cu: (name, text, the text with the bug)."""

MUTANTS = [
    (
        "table row not clamped",
        "min(max(a.row.data[row], int64_t(0)), a.rows - 1)",
        "a.row.data[row]",
    ),
    ("one row for all samples", "int64_t row = b * a.row.stride;", "int64_t row = 0;"),
    ("nine rounds of Philox", "round < 10", "round < 9"),
    ("high word of the seed lost", "k1 = uint32_t(noise.seed >> 32)", "k1 = 0"),
    ("counters of the next thread overlap", "uint32_t(thread * 4)}", "uint32_t(thread * 3)}"),
    (
        "region draws the step's noise",
        "a.noise.stream + 1, at.counter",
        "a.noise.stream, at.counter",
    ),
    ("wrong quadrant", "if ((quadrant + 1) & 2)", "if (quadrant & 2)"),
    (
        "no barrier before the sums of warps",
        "  __syncthreads();\n  if (threadIdx.x >= 4) return;",
        "  if (threadIdx.x >= 4) return;",
    ),
    (
        "shared memory too small",
        "4 * kThreads / 32 * sizeof(float)",
        "kThreads / 32 * sizeof(float)",
    ),
    ("one warp left out of the moments", "warp < kWarps; ++warp", "warp < kWarps - 1; ++warp"),
    ("chunks after the 32nd lost", "c < a.chunks; c += 32", "c < 32; c += a.chunks"),
    ("tail counted in the moments", "if (i + e / 4 * kApart + e % 4 >= end) continue;", ""),
    ("moments not shifted", "g0 = first[0][0], p0", "g0 = 0.0f, p0"),
    (
        "last branch of the first sample",
        "const Tm* last = m +",
        "const Tm* last = static_cast<const Tm*>(a.m) +",
    ),
    ("mask not wrapped", "return j < plane ? j : j % plane;", "return j;"),
    (
        "alignment of m not checked",
        "aligned = aligned && quads(a.m, sizeof(Output), a.m_branch) && a.m_sample % 4 == 0;",
        "",
    ),
    (
        "tail of the sample written past",
        "if (i < n) p[i] = gpu::from_float<T>(v[i]);",
        "p[i] = gpu::from_float<T>(v[i]);",
    ),
    (
        "NaN clipped",
        "unclipped > c[kClip] ? c[kClip] : unclipped;",
        "unclipped < c[kClip] ? unclipped : c[kClip];",
    ),
]
