#pragma once
#include "level.h"

namespace fastdiff {
// Row (b, n) starts at data[b * b_stride + n * n_stride]: strides in elements, last stride 1;
// n_stride 0 for one row per sample; data null: absent.
struct TokenRows {
  const void* data;
  int64_t b_stride, n_stride;
};

// out[b, a] = x[b, index[b, a]].
struct GatherTokensArgs {
  TokenRows x;           // [B, N, D]
  const int64_t* index;  // [B, A]: a sample's are contiguous, samples index_stride apart
  int64_t index_stride;
  void* out;  // [B, A, D] contiguous
  int64_t B, N, A, D;
  Dtype dtype;
};

// out = x with row index[b, a] replaced by y[b, a], or with gate * y[b, a] added to it. Of several
// a with one index the last counts.
struct ScatterTokensArgs {
  TokenRows x;           // [B, N, D]
  TokenRows y;           // [B, A, D]
  TokenRows gate;        // [B, D] or [B, A, D]; absent: rows are replaced
  const int64_t* index;  // as above
  int64_t index_stride;
  const int32_t* last;  // [B, N]: the last a with index[b, a] == n, or -1. The GPU kernel takes
                        // null: it finds them itself.
  void* out;            // [B, N, D] contiguous
  int64_t B, N, A, D;
  Dtype dtype;
};

// Row (b, h, n) starts at data[b * b_stride + h * h_stride + n * n_stride].
struct HeadRows {
  void* data;
  int64_t b_stride, h_stride, n_stride;
};

// cache[b, h, index[b, a]] = y[b, h, a], in place. Of several a with one index the last counts.
struct UpdateTokensArgs {
  HeadRows cache;        // [B, H, N, D]
  HeadRows y;            // [B, H, A, D]
  const int64_t* index;  // as above
  int64_t index_stride;
  int64_t B, H, N, A, D;
  Dtype dtype;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(update_tokens, UpdateTokensArgs)
FASTDIFF_DECLARE_KERNEL(gather_tokens, GatherTokensArgs)
FASTDIFF_DECLARE_KERNEL(scatter_tokens, ScatterTokensArgs)
