"""One-line faults of csrc/cuda/aggregate_features.cu that its tests in the model must find.
A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    (
        "an infinite logit is taken from itself",
        "return logit == most ? 1.0f : expf(logit - most);",
        "return expf(logit - most);",
    ),
    (
        "the first model's logit is the largest",
        "most[i] = fmaxf(most[i], v[i]);",
        "most[i] = k ? most[i] : v[i];",
    ),
    (
        "no logit above -inf is a share of all",
        "most[i] > -INFINITY ? 1.0f / share[i] : __int_as_float(0x7fc00000);",
        "1.0f / share[i];",
    ),
    (
        "elements past the last",
        "if (task >= a.B * packs) return;\n  const int64_t b = task / packs, at = task % packs * "
        "width;\n  float most[width], share[width], v[width], x[width], sum[width] = {};",
        "const int64_t b = task / packs, at = task % packs * width;\n"
        "  float most[width], share[width], v[width], x[width], sum[width] = {};",
    ),
    (
        "the mean of the slopes is left out",
        "v[i] = w * (g[i] * x[i] - mean[i]);",
        "v[i] = w * (g[i] * x[i]);",
    ),
    ("weights are not those of the gradient", "x[i] = w * g[i];", "x[i] = g[i];"),
    (
        "gradients of models change places",
        "const int64_t to = (k * a.B + b) * size + at;",
        "const int64_t to = (b * a.K + k) * size + at;",
    ),
    (
        "no barrier before a warp's weights are read",
        "most[0]) * share[0];\n  __syncwarp();",
        "most[0]) * share[0];",
    ),
    (
        "warps share their weights",
        "float* w = shared + threadIdx.x / 32 * kMaxModels;",
        "float* w = shared;",
    ),
    (
        "the last model has no weight",
        "if (lane < a.K)\n    w[lane]",
        "if (lane < a.K - 1)\n    w[lane]",
    ),
    (
        "the second pack of channels is lost",
        "for (int64_t c = lane * width; c < a.C; c += 32 * width) {\n    float x[width], sum",
        "for (int64_t c = lane * width; c < a.C && c < 32 * width; c += 32 * width) {\n"
        "    float x[width], sum",
    ),
    ("a lane's sum is the warp's", "sum = gpu::warp_sum(sum);", ""),
    (
        "a lane's mean is the warp's",
        "const float mean = gpu::warp_sum(mine * d);",
        "const float mean = mine * d;",
    ),
    (
        "no barrier before the block's weights are read",
        "  __syncthreads();\n  if (!live) return;",
        "  if (!live) return;",
    ),
    (
        "only as many models as warps have weights",
        "for (int k = warp; k < K; k += kWarps) {",
        "for (int k = warp; k < K && k < kWarps; k += kWarps) {",
    ),
    (
        "planes past the last group",
        "first + kChannels < a.C ? first + kChannels : a.C;",
        "first + kChannels;",
    ),
    (
        "a group of planes is lost",
        "blocks(a.P, 32 * width) * blocks(a.C, kChannels)",
        "blocks(a.P, 32 * width) * (a.C / kChannels ? a.C / kChannels : 1)",
    ),
    (
        "no barrier before the warps' shares are read",
        "  __syncthreads();\n  if (warp || !live) return;",
        "  if (warp || !live) return;",
    ),
    (
        "a warp's share is left out",
        "for (int other = 0; other < kWarps; ++other)",
        "for (int other = 1; other < kWarps; ++other)",
    ),
    (
        "a plane of a warp is lost",
        "for (int64_t c = warp; c < a.C; c += kWarps) {\n        const float g",
        "for (int64_t c = warp; c + kWarps < a.C; c += kWarps) {\n        const float g",
    ),
    (
        "misaligned samples are taken for aligned",
        "return reinterpret_cast<uintptr_t>(m.data) % (4 * sizeof(T)) == 0 && m.k_stride",
        "return m.k_stride",
    ),
    ("strides of models are not looked at", "m.k_stride % 4 == 0 &&", ""),
    (
        "logits are taken for aligned",
        "if (a.maps != Maps::kRows) yes = yes && aligned<L>(a.logits);",
        "",
    ),
    (
        "shared memory too small",
        "size_t(kWarps) * a.K * 32 * sizeof(float)",
        "size_t(a.K) * 32 * sizeof(float)",
    ),
]
