"""One-line faults of csrc/cuda/sparse_adamw.cu that tests/cuda/test_sparse_adamw.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    (
        "no barrier after step_size and root",
        "    }\n    __syncthreads();\n",
        "    }\n",
    ),
    (
        "only some threads meet at the barrier",
        "  if (a.step) {\n",
        "  if (a.step && first < a.n) {\n",
    ),
    (
        "reads past the vectors",
        "if (i >= a.n) break;\n    p[k]",
        "p[k]",
    ),
    (
        "writes past the vectors",
        "if (i >= a.n) break;\n    m[k]",
        "m[k]",
    ),
    (
        "a weight in front of the first",
        "to[k] >= 0 && to[k] < a.size",
        "to[k] < a.size",
    ),
    (
        "a weight past the last",
        "to[k] >= 0 && to[k] < a.size",
        "to[k] >= 0 && to[k] <= a.size",
    ),
    (
        "one lerp for both halves",
        "fabsf(a.weight1) < 0.5f;",
        "true;",
    ),
    (
        "first moment in two roundings",
        "fmaf(weight1, __fadd_rn(g[k], -m[k]), near ? m[k] : g[k])",
        "__fadd_rn(__fmul_rn(weight1, __fadd_rn(g[k], -m[k])), near ? m[k] : g[k])",
    ),
    (
        "the square of the gradient first",
        "fmaf(__fmul_rn(a.weight2, g[k]), g[k], ",
        "fmaf(__fmul_rn(g[k], g[k]), a.weight2, ",
    ),
    (
        "old second moment fused",
        "fmaf(__fmul_rn(a.weight2, g[k]), g[k], __fmul_rn(v[k], a.beta2))",
        "fmaf(v[k], a.beta2, __fmul_rn(__fmul_rn(a.weight2, g[k]), g[k]))",
    ),
    (
        "decay fused",
        "__fadd_rn(__fmul_rn(p[k], a.decay), change)",
        "fmaf(p[k], a.decay, change)",
    ),
    (
        "no decay",
        "__fmul_rn(p[k], a.decay)",
        "p[k]",
    ),
    (
        "eps under the root",
        "__fadd_rn(__fdiv_rn(__fsqrt_rn(v[k]), root), a.eps)",
        "__fdiv_rn(__fsqrt_rn(__fadd_rn(v[k], a.eps)), root)",
    ),
    (
        "the quotient first",
        "__fdiv_rn(__fmul_rn(step_size, m[k]), denominator)",
        "__fmul_rn(step_size, __fdiv_rn(m[k], denominator))",
    ),
    (
        "a step in memory is not read",
        "step_size = numbers[0], root = numbers[1];",
        "",
    ),
    (
        "one beta for both corrections",
        "sqrt(1 - exp(t * a.log_beta2))",
        "sqrt(1 - exp(t * a.log_beta1))",
    ),
    (
        "corrections in single",
        "float(-a.lr / (1 - exp(t * a.log_beta1)))",
        "float(-float(a.lr) / (1.0f - expf(float(t) * float(a.log_beta1))))",
    ),
    (
        "blocks overlap",
        "int64_t(blockIdx.x) * kBlock + threadIdx.x",
        "int64_t(blockIdx.x) * (kBlock - 1) + threadIdx.x",
    ),
    (
        "an index of int64 is read as int32",
        "(sparse_adamw_entries<T, true>), grid",
        "(sparse_adamw_entries<T, false>), grid",
    ),
    (
        "the weight has the value before",
        "gpu::from_float<T>(p[k])",
        "gpu::from_float<T>(a.values[i] - change)",
    ),
]
