"""One-line faults of csrc/cuda/resample.cu that tests/cuda/test_resample.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    (
        "no barrier before the largest of the warps is read",
        "shared[threadIdx.x / 32] = v;\n  __syncthreads();\n  for",
        "shared[threadIdx.x / 32] = v;\n  for",
    ),
    (
        "no barrier before sums of warps and weights are read",
        "shared[threadIdx.x / 32] = v;\n  __syncthreads();\n  v = 0.0;",
        "shared[threadIdx.x / 32] = v;\n  v = 0.0;",
    ),
    (
        "no barrier before edges are read",
        "accumulate(edges, totals, count);\n  __syncthreads();",
        "accumulate(edges, totals, count);",
    ),
    (
        "lanes do not wait for each other's sums",
        "  __syncwarp();\n",
        "",
    ),
    (
        "a lane's own sum is before it",
        "for (int l = 0; l < lane; ++l)",
        "for (int l = 0; l <= lane; ++l)",
    ),
    (
        "the particles of the last lane have no end",
        "to = min(from + each, count);",
        "to = from + each;",
    ),
    (
        "an edge at a point is its parent's",
        "edges[middle] / total > point",
        "edges[middle] / total >= point",
    ),
    (
        "points start anew for every thread",
        "(a.u[blockIdx.x] + double(j)) / double(count)",
        "(a.u[blockIdx.x] + double(thread)) / double(count)",
    ),
    (
        "groups share a number",
        "a.u[blockIdx.x]",
        "a.u[0]",
    ),
    (
        "NaN has a weight",
        "l == l ? exp(l - most) : 0.0",
        "exp(l - most)",
    ),
    (
        "a group without weights is not looked for",
        "most == none || l == most ? 1.0",
        "l == most ? 1.0",
    ),
    (
        "infinite weights are subtracted",
        "most == none || l == most ? 1.0",
        "most == none ? 1.0",
    ),
    (
        "the last point rounds to one",
        "point = point > kBelowOne ? kBelowOne : point;",
        "",
    ),
    (
        "groups that stay take the mean weight",
        "after[j] = did ? mean : logw[j];",
        "after[j] = mean;",
    ),
    (
        "the sum of weights for their mean",
        "log(total) - log(double(count))",
        "log(total)",
    ),
    (
        "weights are not normalised for their effective number",
        "total * total / squares < a.least",
        "total / squares < a.least",
    ),
    (
        "shared memory too small",
        "a->K + 2 * kWarps + 32",
        "a->K + 2 * kWarps",
    ),
]
