"""One-line faults of csrc/cuda/quant_linear.cu and of its headers, that
tests/cuda/test_quant_linear.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    ("a row's end is not looked at", "row && k + i < end ? row[k + i] : 0", "row ? row[k + i] : 0"),
    (
        "groups run into each other",
        "if (groups && k >= stop) k = stop, stop += size;",
        "if (groups && k >= stop) stop += size;",
    ),
    ("a group's end is forgotten", "k = stop, stop += size;", "k = stop, stop += 2 * size;"),
    ("the first group's scale for all", "a.scale[n_of(i) * G + g]", "a.scale[n_of(i) * G]"),
    ("groups' sums are not begun anew", "          sum[m][n][e] = 0;\n", ""),
    (
        "scales of the neighbouring column",
        "own + 8 * n + e % 2;",
        "own + 8 * n + (e + 1) % 2;",
    ),
    (
        "scales past the last column",
        "column(i) < out ? a.scale[n_of(i) * G + g] : 0.0f",
        "a.scale[n_of(i) * G + g]",
    ),
    (
        "a group's last slice is not waited for",
        "++part == per;",
        "++part == per - 1;",
    ),
    ("no slice for a tail", "(size + kBytes - 1) / kBytes", "size / kBytes"),
    (
        "a token's scale is that of its tile",
        "const float s = at >= 0 ? a.s[at] : 0.0f;",
        "const float s = a.s[first];",
    ),
    ("rows past the last are written", "if (m >= end) return;", ""),
    (
        "bias is scaled",
        "fmaf(s, x, inside && bias ? gpu::to_float(bias[of]) : 0.0f)",
        "s * (x + (inside && bias ? gpu::to_float(bias[of]) : 0.0f))",
    ),
    ("bias past the last column", "inside && bias ? gpu", "bias ? gpu"),
    ("no columns, and a scale is read", "inside && G ? u[j]", "inside ? u[j]"),
    ("silu is a sigmoid", "y[j] *= gpu::sigmoid(y[j])", "y[j] = gpu::sigmoid(y[j])"),
    ("an element in front of an aligned row", "at16(a.q) && at16(a.values) && ", ""),
    ("groups that are not aligned are taken for it", " && (a.G <= 1 || a.K / a.G % 16 == 0)", ""),
    ("rows of K that are not aligned are taken for it", "a.K % 16 == 0 && ", ""),
    ("the upper half of a slice twice", "16 * part, end,", "16 * (part % 2), end,"),
    ("weights past the last are read", "column(i) < out ? n_of", "column(i) <= out ? n_of"),
    ("no wait for a slice", "    gpu::cp_async_wait<kStages - 2>();\n", ""),
    (
        "halves of a product change places",
        "gpu::mma_16816<T>(sum[m][n], p[m], q[0], q[1]);",
        "gpu::mma_16816<T>(sum[m][n], p[m], q[0], q[2]);",
    ),
    (
        "the slice in use is overwritten",
        "shared + next % kStages * Own::stage;",
        "shared + step % kStages * Own::stage;",
    ),
    ("float8: sums of a whole group", "if (!ends && !float8) return;", "if (!ends) return;"),
    (
        "float8: sums of two slices",
        "if (!ends && !float8) return;",
        "if (!ends && !(float8 && part % 2 == 0)) return;",
    ),
    ("float8: a slice is a group", "if (ends) part = 0, ++g;", "part = 0, ++g;"),
    ("float8 is taken for int8", "if (a.float8) {", "if (a.float8 && a.M > 64) {"),
    ("float8: no group has no columns", "groups && G ? K / G : K;", "groups ? K / G : K;"),
    ("float8: sums become integers", "fmaf(float(sum[m][n][e]),", "fmaf(float(int(sum[m][n][e])),"),
]
