"""One-line faults of csrc/cuda/moe.cu that tests/cuda/test_moe.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    ("NaN is the highest", "if (logit != logit) return 1;", "if (logit != logit) return ~0u;"),
    ("two zeros", "  logit = logit == 0 ? 0.0f : logit;\n", ""),
    (
        "negative logits in the order of their bits",
        "return bits >> 31 ? ~bits : bits | 0x80000000u;",
        "return bits ^ 0x80000000u;",
    ),
    ("capacity 0 taken for none", "return a.capacity < 0 ||", "return a.capacity <= 0 ||"),
    ("a sample for each token", "sample * E + e", "t * E + e"),
    (
        "experts past the last",
        "key[i] = e < E ? key_of(logit[i]) : 0;",
        "key[i] = key_of(logit[i]);",
    ),
    ("NaN in one lane", "  nan = __any_sync(gpu::kAll, nan);\n", ""),
    (
        "an expert is chosen twice",
        "if (e == lane + 32 * i) key[i] = 0;",
        "if (e == lane) key[i] = 0;",
    ),
    ("a slot past the 32nd", "if (lane == j % 32) {", "if (lane == j) {"),
    ("half of the sum of gates", "  chosen = gpu::warp_sum(chosen);\n", ""),
    (
        "no barrier before hits are counted",
        "hits[thread] = 0;\n  __syncthreads();",
        "hits[thread] = 0;",
    ),
    (
        "no barrier after hits are counted",
        "// sums of integers have no order\n  }\n  __syncthreads();",
        "// sums of integers have no order\n  }",
    ),
    (
        "hits are added without atomics",
        "atomicAdd(&hits[a.experts[slot]], 1);",
        "hits[a.experts[slot]] += 1;",
    ),
    ("hits past the last slot", "if (slot < slots) atomicAdd", "if (slot <= slots) atomicAdd"),
    (
        "no barrier before parts are summed",
        "sums[part * E + e] = sum;\n  }\n  __syncthreads();",
        "sums[part * E + e] = sum;\n  }",
    ),
    (
        "no barrier before offsets are summed",
        "before += here;\n    }\n  }\n  __syncthreads();\n  if (threadIdx.x >= 32)",
        "before += here;\n    }\n  }\n  if (threadIdx.x >= 32)",
    ),
    ("the last part is short", "(blocks + parts - 1) / parts;", "blocks / parts;"),
    (
        "counts without the dropped",
        "a.counts[e] = total;",
        "a.counts[e] = total < most ? total : most;",
    ),
    (
        "offsets of later experts start anew",
        "    before += __shfl_sync(gpu::kAll, upto, 31);\n",
        "",
    ),
    ("the first offset is not written", "  if (lane == 0) a.offsets[0] = 0;\n", ""),
    (
        "no barrier of a warp before counts rise",
        "mine[expert[i]] + before : 0;\n    __syncwarp();",
        "mine[expert[i]] + before : 0;",
    ),
    (
        "no barrier before warps are summed",
        "    __syncwarp();\n  }\n  __syncthreads();\n  int over = 0;",
        "    __syncwarp();\n  }\n  int over = 0;",
    ),
    (
        "no barrier after warps are summed",
        "earlier[warp] = over;\n  __syncthreads();",
        "earlier[warp] = over;",
    ),
    (
        "no barrier before drops are summed",
        "late[warp] = dropped;\n  __syncthreads();",
        "late[warp] = dropped;",
    ),
    ("the highest bit of an expert", "bit <= E; bit *= 2", "2 * bit <= E; bit *= 2"),
    (
        "slots past the last count",
        "slot < slots ? int(a.experts[slot]) : E;",
        "slot < slots ? int(a.experts[slot]) : 0;",
    ),
    ("drops of blocks before", "over = before > most ? before - most : 0;", "over = 0;"),
    ("drops of warps before", "(w < warp ? late[w] : 0)", "0"),
    ("drops of groups before", "    row += __popc(with);\n", ""),
    (
        "a slot too many is kept",
        "const bool drop = expert[i] < E && rank[i] >= most;",
        "const bool drop = expert[i] < E && rank[i] > most;",
    ),
    ("a dropped slot weighs", "      a.weights[slot] = 0;\n", ""),
    ("a row past y", "row >= 0 && row < a.R;", "row >= 0 && row <= a.R;"),
    ("a row in front of y", "row >= 0 && row < a.R;", "row >= -1 && row < a.R;"),
    (
        "weights of no row count",
        "inside ? a.weights[t * a.K + j] : 0.0f;",
        "a.weights[t * a.K + j];",
    ),
    ("elements past the last", "if (t >= a.T || c >= a.C) return;", "if (t >= a.T) return;"),
    ("y taken for aligned", "reinterpret_cast<uintptr_t>(a.y) % 16 == 0 &&\n", "true &&\n"),
    ("64 experts in 32 lanes", "if (a.E <= 32) return", "if (a.E <= 33) return"),
    (
        "no scan without tokens",
        "if (!error)\n    error = GPU_LAUNCH((moe_scan)",
        "if (!error && blocks)\n    error = GPU_LAUNCH((moe_scan)",
    ),
]
