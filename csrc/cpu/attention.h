#pragma once
#include "level.h"

namespace fastdiff {
// Values of indices, groups and lengths are checked where they are in host memory.
// Strides in elements; a stride of a dimension of size 1 that is broadcast is 0.
struct AttentionArgs {
  const void *q, *k, *v;  // [B,H,S,D], [B,H,T,D], [B,H,T,D]; unit last stride
  int64_t q_stride[3], k_stride[3], v_stride[3];
  const void* bias;        // null, [B|1,H|1,S,T] or [B|1,H|1,T]; unit last stride
  int64_t bias_stride[3];  // of B, H, S; the last is unused for a bias per key
  bool bias_full, bias_f32;
  const int64_t *query_group, *key_group;        // [B|1,S], [B|1,T], or null
  int64_t query_group_stride, key_group_stride;  // of B
  const float* table;                            // [B|1,H|1,Gq,Gk], last two contiguous
  int64_t table_stride[2], query_groups, key_groups;
  const int64_t* key_lengths;                      // [B] or null
  const int64_t* q_index;                          // [B,rows] or null: rows are 0..S-1
  const int64_t* q_starts;                         // [B+1] or null; then q, out, lse have B = 1:
                                                   // sample b's rows are q_starts[b] and on
  void* out;                                       // [B,rows,H,D] contiguous
  float* lse;                                      // [B,H,rows] contiguous
  int64_t batch, heads, queries, rows, keys, dim;  // queries: S
  float scale;
  Dtype dtype;
  float* scratch;  // threads * attention_scratch(args) floats, 64-byte aligned
  int64_t threads;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(attention, AttentionArgs)

namespace fastdiff {
constexpr int64_t kAttentionKeys = 128;  // keys per block of the online softmax
constexpr int64_t kAttentionLanes = 48;  // most query rows per tile of any level

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Parts of one thread's scratch, in floats, each a multiple of 16 (64 bytes): offsets of the parts
// and the total at the end. Linear in T, D and the number of groups.
struct AttentionScratch {
  int64_t k, v, key_bias, key_offset, q, score, out, lane_bias, total;
  explicit AttentionScratch(const AttentionArgs& a) {
    int64_t keys = round_up(a.keys, 16), dim = round_up(a.dim, 16);
    int64_t lanes = a.bias_full ? kAttentionKeys : a.table ? round_up(a.key_groups, 16) : 0;
    k = 0;
    v = k + keys * dim;
    key_bias = v + keys * dim;
    key_offset = key_bias + keys;
    q = key_offset + 2 * keys;
    score = q + dim * kAttentionLanes;
    out = score + kAttentionKeys * kAttentionLanes;
    lane_bias = out + dim * kAttentionLanes;
    total = lane_bias + lanes * kAttentionLanes;
  }
};
}  // namespace fastdiff
