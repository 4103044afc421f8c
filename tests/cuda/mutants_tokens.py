"""One-line faults of csrc/cuda/tokens.cu that tests/cuda/test_tokens.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    (
        "gather reads the row in front of x",
        "inside = n >= 0 && n < a.N;",
        "inside = n < a.N;",
    ),
    (
        "gather reads the row past x",
        "inside = n >= 0 && n < a.N;",
        "inside = n >= 0 && n <= a.N;",
    ),
    (
        "no barrier before the index is read",
        "last[i] = -1;\n  __syncthreads();",
        "last[i] = -1;",
    ),
    (
        "no barrier after the index is read",
        "atomicMax(&last[n - first], int(k));\n  }\n  __syncthreads();",
        "atomicMax(&last[n - first], int(k));\n  }",
    ),
    (
        "any of several wins",
        "atomicMax(&last[n - first], int(k));",
        "last[n - first] = int(k);",
    ),
    (
        "the index is read as far as there are threads",
        "k < a.A; k += kThreads",
        "k < a.A && k < kThreads; k += kThreads",
    ),
    (
        "the last piece of a sample goes on past it",
        "first + rows < a.N ? first + rows : a.N;",
        "first + rows;",
    ),
    (
        "x plays the part of the gate",
        "fmaf(gpu::to_float(e[2][i]), gpu::to_float(e[1][i]), gpu::to_float(e[0][i]))",
        "fmaf(gpu::to_float(e[0][i]), gpu::to_float(e[1][i]), gpu::to_float(e[2][i]))",
    ),
    (
        "misaligned rows are taken for aligned",
        "reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && ",
        "",
    ),
    (
        "a lane's second load is its first",
        "? source[pack + 32 * i]",
        "? source[pack]",
    ),
    (
        "samples share an index",
        "const int64_t* index = a.index + b * a.index_stride;\n  for (int i",
        "const int64_t* index = a.index;\n  for (int i",
    ),
    (
        "any of several updates",
        "later |= index[i] == n;",
        "later |= index[i] == -7;",
    ),
    (
        "only the first rows after one are looked through",
        "i < a.A; i += 32) later",
        "i < k + 33 && i < a.A; i += 32) later",
    ),
    (
        "an update past the cache",
        "|| n < 0 || n >= a.N) return;",
        "|| n < 0 || n > a.N) return;",
    ),
    (
        "heads share a row of y",
        "copy_row<Bits>(y + h * a.y.h_stride,",
        "copy_row<Bits>(y,",
    ),
    (
        "rows of odd sizes are moved 16 bytes at a time",
        "a.D % int64_t(16 / sizeof(T)) == 0 && aligned<T>(a.cache)",
        "aligned<T>(a.cache)",
    ),
]
