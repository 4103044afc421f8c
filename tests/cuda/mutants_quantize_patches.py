"""One-line faults of csrc/cuda/quantize_patches.cu that tests/cuda/test_quantize_patches.py must
find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    ("a NaN is passed over", "fmaxf(most, size < INFINITY ? size : INFINITY)", "fmaxf(most, size)"),
    ("pixels past the last", "if (row >= a.batch * a.rows * a.columns) return;", ""),
    ("the least of the range is lost", "most >= kTiny", "most > kTiny"),
    ("patches below the range have a scale", "INFINITY && most >= kTiny", "INFINITY && most > 0"),
    ("lanes keep their maxima", "most = gpu::warp_max(most);", ""),
    (
        "halves go away from zero",
        "rintf(__fmul_rn(v[i], inverse))",
        "roundf(__fmul_rn(v[i], inverse))",
    ),
    (
        "a quotient in place of the product",
        "__fmul_rn(__fdiv_rn(1.0f, most), kLevels)",
        "__fdiv_rn(kLevels, most)",
    ),
    (
        "unusable patches keep their quotients",
        "usable ? place(a, x, top, left, k) : nullptr",
        "place(a, x, top, left, k)",
    ),
    ("above the picture is the picture", "if (h < 0 || h >=", "if (h >="),
    ("left of the picture is the picture", "|| w < 0 ||", "||"),
    ("below the picture is the picture", "h >= a.height << up ||", ""),
    ("right of the picture is the picture", " || w >= a.width << up", ""),
    ("the doubled picture is cut", "h >= a.height << up", "h >= a.height"),
    (
        "taps by columns first",
        "h = top + tap / size, w = left + tap % size",
        "h = top + tap % size, w = left + tap / size",
    ),
    ("rows of pixels are not halved", "(h >> up) * a.x_row", "h * a.x_row"),
    ("columns of pixels are not halved", "(w >> up) * a.x_column", "w * a.x_column"),
    ("rows step by one", "line % a.rows * a.stride - a.padding", "line % a.rows - a.padding"),
    (
        "columns step by one",
        "row % a.columns * a.stride - a.padding",
        "row % a.columns - a.padding",
    ),
    ("one picture for all", "line / a.rows * a.x_batch", "0 * a.x_batch"),
    ("misaligned pictures are taken for aligned", "at(a.x, 16) && ", ""),
    ("strides of pictures are not looked at", "a.x_batch % 8 == 0 && ", ""),
    ("strides of rows are not looked at", " && a.x_row % 8 == 0", ""),
    ("strides of pixels are not looked at", " &&\n                     a.x_column % 8 == 0", ""),
    ("channels of a lane cross a tap", "a.channels % 8 == 0 && ", "a.channels % 4 == 0 && "),
]
