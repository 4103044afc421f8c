"""One-line faults of csrc/cuda/lora.cu that tests/cuda/test_lora.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    ("no padding of the product", "int pitch = R + 8;", "int pitch = R;"),
    ("no wait for a slice", "    gpu::cp_async_wait<kStages - 2>();\n", ""),
    (
        "no barrier before a slice is read",
        "    __syncthreads();  // this slice",
        "    // this slice",
    ),
    (
        "no barrier before the product is written",
        "  __syncthreads();  // no warp reads its slices",
        "  // no warp reads its slices",
    ),
    (
        "no barrier before the product is kept",
        "    __syncthreads();  // the product is there",
        "    // the product is there",
    ),
    (
        "no barrier before a tile is read",
        "    __syncthreads();  // the product and this tile",
        "    // the product and this tile",
    ),
    ("no wait for a tile", "    gpu::cp_async_wait<1>();\n", ""),
    (
        "no barrier before the next tile",
        "    __syncthreads();  // no warp reads this tile",
        "    __syncwarp();  // no warp reads this tile",
    ),
    (
        "no barrier before a warp reads sums",
        "    __syncwarp();\n    constexpr int packs",
        "    constexpr int packs",
    ),
    ("an adapter past the last", "chosen <= a.A;", "chosen <= a.A + 1;"),
    ("an adapter before the first", "chosen > 0 &&", "chosen >= 0 &&"),
    ("a scale of 0 is added", "neutral = scale == 0.0f ||", "neutral = !known ||"),
    ("rows of x past the sample", "x[0] = thread / 4 < rows", "x[0] = thread / 4 <= rows"),
    ("rows of down past the rank", "i < rank ? down", "i <= rank ? down"),
    ("the first half of the rank alone", "half * (R / 2) + 8 * n, k, lane", "8 * n, k, lane"),
    (
        "swapped parts of down",
        "gpu::mma_16816<T>(low[n], p, q[0], q[1]);",
        "gpu::mma_16816<T>(low[n], p, q[0], q[2]);",
    ),
    (
        "swapped parts of up",
        "gpu::mma_16816<T>(sum[m + 1], p, q[2], q[3]);",
        "gpu::mma_16816<T>(sum[m + 1], p, q[1], q[3]);",
    ),
    ("a row past the sample is stored", "if (r >= rows ||", "if (r > rows ||"),
    ("the product is kept by the second stretch", "blockIdx.y == 0 ?", "blockIdx.y == 1 ?"),
    (
        "no product where there is no adapter",
        "if (kept && !known)",
        "if (kept && known && neutral)",
    ),
    ("a copy past its columns", "j < 8 && n + j < to; ++j", "j < 8; ++j"),
    (
        "a copy of seven rows in eight",
        "i < rows * packs; i += kThreads",
        "i < rows / 8 * 7 * packs; i += kThreads",
    ),
    ("stretches of 64 columns", "from = int(blockIdx.y) * share,", "from = int(blockIdx.y) * 64,"),
    ("samples of x taken for aligned", "x_b = a.B == 1 || a.x_b % 8 == 0,", "x_b = true,"),
    ("samples of y taken for aligned", "y_b = a.B == 1 || a.y_b % 8 == 0;", "y_b = true;"),
    ("up taken for aligned", "rows_aligned(a.up, a.A * a.N, a.rank, a.rank)", "true"),
    ("down taken for aligned", "rows_aligned(a.down, a.A * a.rank, a.K, a.K)", "true"),
    ("out taken for aligned", "rows_aligned(a.out, a.T, a.N, a.N)", "true"),
    ("one tile of up for all columns", "turn ^= 1) {", "turn ^= 0) {"),
    (
        "the next tile overwrites this one",
        "ups + (turn ^ 1) * Own::wide",
        "ups + turn * Own::wide",
    ),
    ("no slice for a tail", "steps = (K + kDeep - 1) / kDeep;", "steps = K / kDeep;"),
    ("no scale", "fmaf(scale, u[j], gpu::to_float(base.e[j]))", "u[j] + gpu::to_float(base.e[j])"),
    (
        "the first adapter's up",
        "static_cast<const T*>(a.up) + adapter * a.N * a.rank",
        "static_cast<const T*>(a.up)",
    ),
    (
        "the first adapter's down",
        "static_cast<const T*>(a.down) + adapter * a.rank * a.K",
        "static_cast<const T*>(a.down)",
    ),
    ("y past N", "column + j < N ? source[column + j]", "true ? source[column + j]"),
    ("the rows of the first sample", "+ b * a.x_b + (t + thread / 4)", "+ (t + thread / 4)"),
]
