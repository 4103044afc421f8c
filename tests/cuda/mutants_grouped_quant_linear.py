"""One-line faults of csrc/cuda/grouped_quant_linear.cu and of its headers, that
tests/cuda/test_grouped_quant_linear.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    ("the first expert's weight", "group.expert * int(a.all.N)", "0"),
    (
        "the first expert's columns",
        "column(i) < out ? n_of(i) : -1",
        "column(i) < out ? n_of(i) - base : -1",
    ),
    ("the first expert's groups", "a.scale[n_of(i) * G + g]", "a.scale[(n_of(i) - base) * G + g]"),
    ("the first expert's scales", "u[j] * a.scale[of]", "u[j] * a.scale[of - base]"),
    ("the first expert's bias", "gpu::to_float(bias[of])", "gpu::to_float(bias[of - base])"),
    ("rows in their own order", "grouped && a.index ? a.index[m] : m;", "m;"),
    ("blocks without rows go on", "  if (group.begin >= group.end) return;\n", ""),
    ("no tile for a tail", "a.R / rows + (a.E < a.R ? a.E : a.R);", "a.R / rows + 1;"),
    (
        "as many columns with a gate",
        "blockIdx.x) % across * wide",
        "blockIdx.x) % across * kColumns",
    ),
    ("an index past q", "at >= 0 && at < given ?", "at >= 0 && at <= given ?"),
    ("an index in front of q", "at >= 0 && at < given ?", "at >= -1 && at < given ?"),
    ("a row of the next expert", "if (m >= end) return;", "if (m > end) return;"),
    ("halves in turns of sixteen", "gated && (i & 8) != 0", "gated && (i & 16) != 0"),
    ("the first half alone", "gated && (i & 8) != 0 ? out : 0", "gated && (i & 8) != 0 ? 0 : 0"),
    (
        "scales of the first half for both",
        "scaled(8 + j, base + out + n + j)",
        "scaled(8 + j, base + n + j)",
    ),
    ("the first group's scale for all", "a.scale[n_of(i) * G + g]", "a.scale[n_of(i) * G]"),
    ("groups' sums are not begun anew", "          sum[m][n][e] = 0;\n", ""),
    ("a token's scale is that of its row", "at >= 0 ? a.s[at] : 0.0f", "at >= 0 ? a.s[m] : 0.0f"),
    (
        "the other half gates",
        "return u * sigmoid(u) * other;",
        "return u * other * sigmoid(other);",
    ),
    ("the tiles of a group are its first", "begin += (tile - (upto - count)) * rows;", ""),
    ("tokens taken for aligned", "at16(all.q) && at16(all.values) && ", ""),
    ("rows of K taken for aligned", "all.K % 16 == 0 &&", "true &&"),
    ("groups taken for aligned", "(!groups || all.K / all.G % 16 == 0)", "true"),
]
