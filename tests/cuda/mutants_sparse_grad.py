"""One-line faults of csrc/cuda/sparse_grad.cu that tests/cuda/test_sparse_grad.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    ("the search ends early", "  while (low < high) {\n", "  while (low + 1 < high) {\n"),
    ("an entry at the column is passed over", "col[middle] < column;", "col[middle] <= column;"),
    (
        "the search goes the other way",
        "low = below ? middle + 1 : low, high = below ? high : middle;",
        "low = below ? low : middle + 1, high = below ? middle : high;",
    ),
    ("rows past O", "    if (o < a.O) {\n", "    if (o <= a.O) {\n"),
    (
        "rows begin in front of the entries",
        "begin < 0 ? 0 : begin > nnz",
        "begin > nnz",
    ),
    (
        "rows begin past the entries",
        "begin < 0 ? 0 : begin > nnz ? nnz : begin;",
        "begin < 0 ? 0 : begin;",
    ),
    ("rows end past the entries", "      end = end > nnz ? nnz : end;\n", ""),
    (
        "the first block's columns alone",
        "column / block_cols);\n      high",
        "column);\n      high",
    ),
    (
        "a block that begins in front of the tile",
        "column / block_cols);\n      high",
        "(column + block_cols - 1) / block_cols);\n      high",
    ),
    (
        "a block that ends past the tile",
        "(column + kColumns - 1) / block_cols + 1);",
        "(column + kColumns) / block_cols);",
    ),
    (
        "rows of blocks taken for rows",
        "a.crow[o / block_rows], end = a.crow[o / block_rows + 1];",
        "a.crow[o], end = a.crow[o + 1];",
    ),
    (
        "no barrier after the search",
        "found->any[i / 32] = any;\n  }\n  __syncthreads();\n",
        "found->any[i / 32] = any;\n  }\n",
    ),
    ("the first warp alone finds", "w < kFinders; ++w)", "w < 1; ++w)"),
    (
        "tiles without entries go on",
        "if (!find(a, row, column, a.block_rows, a.block_cols, found)) return;",
        "find(a, row, column, a.block_rows, a.block_cols, found);",
    ),
    (
        "convolutions' tiles without entries go on",
        "if (!find(a, row, column, 1, 1, found)) return;",
        "find(a, row, column, 1, 1, found);",
    ),
    ("every second entry", "% 32 / 16; e < high; e += 2)", "% 32 / 16 * 2; e < high; e += 4)"),
    ("an entry past the row", "e < high; e += 2)", "e <= high; e += 2)"),
    (
        "the row of another block row",
        "(row + first + i) % block_rows;",
        "(first + i) % block_rows;",
    ),
    ("the tile's column alone", "block_cols - (column + from);", "block_cols - column;"),
    (
        "columns in front of a piece",
        "if (at + j >= 0 && at + j < Own::columns)",
        "if (at + j < Own::columns)",
    ),
    ("columns past a piece", "if (at + j >= 0 && at + j < Own::columns)", "if (at + j >= 0)"),
    (
        "rows of a block in a row",
        "(int64_t(e) * block_rows + within) * block_cols;",
        "(int64_t(e) * block_rows) * block_cols;",
    ),
    ("the same row for all", "    own += i * Own::pitch;\n", ""),
    (
        "rows of grad past T",
        "return t < tokens ? grad + int64_t(t)",
        "return t <= tokens ? grad + int64_t(t)",
    ),
    (
        "rows of x past T",
        "return t < tokens ? x + int64_t(t)",
        "return t <= tokens ? x + int64_t(t)",
    ),
    (
        "the last tokens are left out",
        "multiply<T, true, true, kColumns>(shared, (tokens + kDeep - 1) / kDeep",
        "multiply<T, true, true, kColumns>(shared, tokens / kDeep",
    ),
    (
        "the last pixels are left out",
        "multiply<T, false, false, kColumns>(shared, (tokens + kDeep - 1) / kDeep",
        "multiply<T, false, false, kColumns>(shared, tokens / kDeep",
    ),
    (
        "grad's rows of x's tile",
        "to_grad, step * kDeep, row + own, O,",
        "to_grad, step * kDeep, column + own, O,",
    ),
    (
        "Found lies in the slices",
        "reinterpret_cast<Found*>(shared + kStages * Own::stage);\n  const int tokens",
        "reinterpret_cast<Found*>(shared + (kStages - 1) * Own::stage);\n  const int tokens",
    ),
    ("shared memory without Found", "Own::shared + sizeof(Found), stream", "Own::shared, stream"),
    (
        "shared memory without taps",
        "Own::shared + kColumns * sizeof(Tap) + sizeof(Found)",
        "Own::shared + sizeof(Found)",
    ),
    ("columns past the weight's end", "    if (n >= columns) tap.down = kOutside;\n", ""),
    (
        "kernel rows and columns swapped",
        "n / kw % kh * a.dilation[0], right = n % kw * a.dilation[1];",
        "n % kh * a.dilation[0], right = n / kh % kw * a.dilation[1];",
    ),
    (
        "dilation of rows for both",
        "right = n % kw * a.dilation[1];",
        "right = n % kw * a.dilation[0];",
    ),
    ("channels last taken for first", "x_w = a.x_last ? a.C : 1,", "x_w = 1,"),
    ("grad channels last taken for first", "g_o = a.grad_last ? 1 : pixels;", "g_o = pixels;"),
    ("pixels past the last", "const bool live = t < tokens;", "const bool live = t <= tokens;"),
    ("grad's channels past O", "if (live && row + n < O)", "if (live && row + n <= O)"),
    ("above the picture", "y >= 0 && y < H && z", "y < H && z"),
    ("below the picture", "y >= 0 && y < H && z", "y >= 0 && y <= H && z"),
    ("left of the picture", "z >= 0 && z < W)", "z < W)"),
    ("right of the picture", "z >= 0 && z < W)", "z >= 0 && z <= W)"),
    (
        "no padding at the left",
        "left = int(w * a.stride[1] - a.padding[1]);",
        "left = int(w * a.stride[1]);",
    ),
    ("stride of rows for both", "left = int(w * a.stride[1]", "left = int(w * a.stride[0]"),
    ("the first sample alone", "const T* from = x + b * a.C * H * W;", "const T* from = x;"),
    ("the first sample's gradient alone", "grad + b * O * pixels + (", "grad + ("),
    ("half of the columns", "n < kColumns; n += kWarps)", "n < kColumns / 2; n += kWarps)"),
    ("no barrier before sums go out", "  __syncthreads();  // no warp reads", "  // no warp reads"),
    ("no wait for a slice", "    gpu::cp_async_wait<kStages - 2>();\n", ""),
    (
        "no barrier before a slice is read",
        "    __syncthreads();  // this slice",
        "    // this slice",
    ),
    (
        "the next slice overwrites this one",
        "shared + next % kStages * Own::stage;",
        "shared + step % kStages * Own::stage;",
    ),
    (
        "no barrier after a warp wrote sums",
        "sum[m][n][3];\n    }\n    __syncwarp();",
        "sum[m][n][3];\n    }",
    ),
    (
        "no barrier before the next piece",
        "warp / Own::down * Own::columns, own);\n    __syncwarp();",
        "warp / Own::down * Own::columns, own);",
    ),
    ("width of a row not looked at", "at16(p) && width % 8 == 0 &&", "at16(p) &&"),
    ("addresses taken for aligned", "return at16(p) && width", "return width"),
    ("strides taken for aligned", "(size <= 1 || stride % 8 == 0)", "true"),
]
