// Host checks of products over groups of rows.
#pragma once
#include <string>

#include "common.h"
#include "cpu/grouped_linear.h"

namespace fastdiff {

using Optional = std::optional<at::Tensor>;

inline int activation_of(const char* op, const std::optional<std::string>& name) {
  if (!name) return kGroupedNone;
  const char* names[] = {"gelu", "gelu_tanh", "silu", "geglu", "swiglu", "swishglu"};
  for (int i = 0; i < 6; ++i)
    if (*name == names[i]) return i + 1;
  TORCH_CHECK(false, op, ": activation is ", *name,
              ", need gelu, gelu_tanh, silu, geglu, swiglu or swishglu");
}

// Offsets [E + 1] and the row of x of every row: what entries of grouped products share. Checked on
// the host; a GPU's kernels clamp the former and skip what is out of range of the latter.
template <class Args>
void groups(const char* op, Args& args, const at::Tensor& x, const at::Tensor& offsets,
            const Optional& index, int64_t rows) {
  check_device(op, "offsets", offsets, x);
  check_dtype(op, "offsets", offsets, at::kLong);
  check_sizes(op, "offsets", offsets, {args.E + 1});
  args.offsets = offsets.const_data_ptr<int64_t>();
  args.R = rows, args.T = x.size(0);
  if (index) {
    check_device(op, "index", *index, x);
    check_dtype(op, "index", *index, at::kLong);
    check_sizes(op, "index", *index, {rows});
    args.index = index->const_data_ptr<int64_t>();
  } else {
    TORCH_CHECK(rows == args.T, op, ": x has shape ", x.sizes(), ", need ", rows, " rows");
  }
  if (on_gpu(x)) return;
  int64_t last = 0;
  for (int64_t e = 0; e <= args.E; ++e) {
    const int64_t to = args.offsets[e];
    TORCH_CHECK_VALUE(to >= last && to <= rows && (e || !to), op, ": offsets has value ", to,
                      " at ", e, ", need ascending values from 0 to at most ", rows);
    last = to;
  }
  if (args.index)
    for (int64_t r = 0; r < last; ++r)
      TORCH_CHECK_VALUE(args.index[r] >= 0 && args.index[r] < args.T, op, ": index has value ",
                        args.index[r], ", need 0 to ", args.T - 1);
}

}  // namespace fastdiff
