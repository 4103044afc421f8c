"""One-line faults of csrc/cuda/select_tokens.cu that tests/cuda/test_select_tokens.py must find.

A fault is (name, text that occurs once in the file, text in its place).
"""

MUTANTS = [
    (
        "no barrier before sums of warps are written",
        "count, with);\n  __syncthreads();",
        "count, with);",
    ),
    (
        "no barrier before sums of warps are read",
        "shared[threadIdx.x / 32] = count;\n  __syncthreads();",
        "shared[threadIdx.x / 32] = count;",
    ),
    (
        "no barrier before counts of warps are written",
        "int(threadIdx.x) / 32;\n  __syncthreads();",
        "int(threadIdx.x) / 32;",
    ),
    (
        "one token too many of those that tie",
        "rank < left))",
        "rank <= left))",
    ),
    (
        "ties of later passes start anew",
        "    left -= equal;\n",
        "",
    ),
    (
        "the lowest bit of a threshold is not built",
        "bit >= 0; --bit",
        "bit > 0; --bit",
    ),
    (
        "two zeros",
        "value = value == 0 ? 0.0f : value;",
        "",
    ),
    (
        "negative values in the order of their bits",
        "bits >> 31 ? ~bits : bits | 0x80000000u",
        "bits ^ 0x80000000u",
    ),
    (
        "NaN is compared",
        "    score = 0;\n",
        "",
    ),
    (
        "waits past the table",
        "drops < 0 ? 0 : drops < a.steps ? drops : a.steps - 1",
        "drops",
    ),
    (
        "the second order is that of the lowest",
        "side ? ~value : value",
        "value",
    ),
    (
        "places of later passes start anew",
        "    index += total;\n",
        "",
    ),
]
