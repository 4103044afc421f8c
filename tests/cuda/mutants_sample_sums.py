"""One-line faults of csrc/cuda/sample_sums.cu that tests/cuda/test_sample_sums.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    (
        "no barrier before the warps' sums are read",
        "shared[threadIdx.x / 32] = of_warp;\n  __syncthreads();",
        "shared[threadIdx.x / 32] = of_warp;",
    ),
    (
        "elements past a sample's end are read",
        "v[k] = i + k < end ? gpu::to_float(p[i + k]) : 0.0f;",
        "v[k] = gpu::to_float(p[i + k]);",
    ),
    (
        "the last element is lost",
        "v[k] = i + k < end ?",
        "v[k] = i + k < end - 1 ?",
    ),
    (
        "a piece goes on to the sample's end",
        "from + kSumsPiece < a.N ? from + kSumsPiece : a.N;",
        "a.N;",
    ),
    (
        "a piece has no end",
        "from + kSumsPiece < a.N ? from + kSumsPiece : a.N;",
        "from + kSumsPiece;",
    ),
    (
        "one warp is left out",
        "for (int w = 0; w < kWarps; ++w)",
        "for (int w = 1; w < kWarps; ++w)",
    ),
    (
        "half of a warp is left out",
        "for (int with = 16; with;",
        "for (int with = 8; with;",
    ),
    (
        "threads add in float32",
        "(double(sums[0]) + double(sums[1])) + (double(sums[2]) + double(sums[3]))",
        "double(float(sums[0] + sums[1]) + sums[2])",
    ),
    (
        "pieces past the lanes of a warp are left out",
        "i < a.pieces; i += 32)",
        "i < a.pieces; i += 64)",
    ),
    (
        "samples past the last are written",
        "  if (b >= a.B) return;\n",
        "",
    ),
    (
        "one y for all is not",
        "static_cast<const T*>(a.y) + b * a.y_stride",
        "static_cast<const T*>(a.y) + b * a.x_stride",
    ),
    (
        "misaligned samples are taken for aligned",
        "reinterpret_cast<uintptr_t>(data) % (4 * sizeof(T)) == 0 && ",
        "",
    ),
    (
        "strides are not looked at",
        " && stride % 4 == 0;",
        ";",
    ),
    (
        "sizes are not looked at",
        "a.N % 4 == 0 && ",
        "",
    ),
    (
        "differences of y and itself",
        "u[k] = v[k] = u[k] - v[k];",
        "u[k] -= v[k];",
    ),
]
