#include "cpu/attention.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "common.h"

namespace fastdiff {

namespace {

// Of indices in host memory. The GPU kernel looks itself: what lies outside gives NaN there, and
// nothing waits for it.
void check_range(const char* name, const at::Tensor& t, int64_t high) {
  if (on_gpu(t)) return;
  const int64_t* p = t.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < t.numel(); ++i)
    TORCH_CHECK_VALUE(p[i] >= 0 && p[i] < high, "attention: ", name, " has value ", p[i],
                      ", need 0 to ", high - 1);
}

// The same of rows of samples one after another, which are to be all `rows`.
void check_starts(const at::Tensor& starts, int64_t rows) {
  if (on_gpu(starts)) return;
  const int64_t* p = starts.const_data_ptr<int64_t>();
  const int64_t last = starts.numel() - 1;
  TORCH_CHECK_VALUE(p[0] == 0, "attention: q_starts begins with ", p[0], ", need 0");
  for (int64_t i = 0; i < last; ++i)
    TORCH_CHECK_VALUE(p[i] <= p[i + 1], "attention: q_starts has value ", p[i + 1], " after ", p[i],
                      ", need ascending values");
  TORCH_CHECK_VALUE(p[last] == rows, "attention: q_starts ends with ", p[last], ", need ", rows,
                    ", the rows of q");
}

// `t`, made contiguous: int64 of `cols` columns and `batch` rows (or 1 row where `broadcast`).
at::Tensor check_index(const char* name, const at::Tensor& t, const at::Tensor& q, int64_t cols,
                       bool broadcast) {
  const int64_t batch = q.size(0);
  check_device("attention", name, t, q);
  check_dtype("attention", name, t, at::kLong);
  TORCH_CHECK(
      t.dim() == 2 && (t.size(0) == batch || (broadcast && t.size(0) == 1)) && t.size(1) == cols,
      "attention: ", name, " has shape ", t.sizes(), ", need [", batch, ", ", cols, "]");
  return t.contiguous();
}

at::Tensor unit_stride(const at::Tensor& t) { return unit_last(t) ? t : t.contiguous(); }

int64_t stride_of(const at::Tensor& t, int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); }

void set_bias(AttentionArgs& a, at::Tensor& bias, const at::Tensor& q) {
  const int64_t q_rows = q.size(2);
  const at::ScalarType dtype = q.scalar_type();
  check_device("attention", "bias", bias, q);
  a.bias_f32 = bias.scalar_type() == at::kFloat;
  TORCH_CHECK(a.bias_f32 || bias.scalar_type() == dtype, "attention: bias is ", bias.scalar_type(),
              ", need ", dtype, " or float32");
  a.bias_full = bias.dim() == 4;
  TORCH_CHECK((bias.dim() == 3 || (a.bias_full && bias.size(2) == q_rows)) &&
                  (bias.size(0) == 1 || bias.size(0) == a.batch) &&
                  (bias.size(1) == 1 || bias.size(1) == a.heads) && bias.size(-1) == a.keys,
              "attention: bias has shape ", bias.sizes(), ", need [", a.batch, " or 1, ", a.heads,
              " or 1, ", q_rows, ", ", a.keys, "] or the same without the third dimension");
  bias = unit_stride(bias);
  a.bias = bias.const_data_ptr();
  for (int i = 0; i < bias.dim() - 1; ++i) a.bias_stride[i] = stride_of(bias, i);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> attention(
    const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in, double scale,
    const std::optional<at::Tensor>& bias_in, const std::optional<at::Tensor>& query_group_in,
    const std::optional<at::Tensor>& key_group_in, const std::optional<at::Tensor>& table_in,
    const std::optional<at::Tensor>& key_lengths_in, const std::optional<at::Tensor>& q_index_in,
    const std::optional<at::Tensor>& q_starts_in) {
  AttentionArgs a{};
  check_runs("attention", "q", q_in);
  a.dtype = dtype_of("attention", "q", q_in);
  check_dim("attention", "q", q_in, 4);
  check_dim("attention", "k", k_in, 4);
  const at::Tensor& samples = q_starts_in ? k_in : q_in;
  a.batch = samples.size(0), a.heads = q_in.size(1), a.keys = k_in.size(2), a.dim = q_in.size(3);
  TORCH_CHECK(a.dim > 0, "attention: q has shape ", q_in.sizes(), ", need a head dimension > 0");
  for (auto [name, t] : {std::pair{"q", &q_in}, {"k", &k_in}, {"v", &v_in}}) {
    check_device("attention", name, *t, q_in);
    check_dtype("attention", name, *t, q_in.scalar_type());
    if (t != &q_in) check_sizes("attention", name, *t, {a.batch, a.heads, a.keys, a.dim});
  }
  at::Tensor q = unit_stride(q_in), k = unit_stride(k_in), v = unit_stride(v_in);
  for (int i = 0; i < 3; ++i)
    a.q_stride[i] = q.stride(i), a.k_stride[i] = k.stride(i), a.v_stride[i] = v.stride(i);
  a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
  a.scale = float(scale);
  a.queries = a.rows = q.size(2);

  at::Tensor bias, query_group, key_group, table, key_lengths, q_index, q_starts;
  if (q_starts_in) {
    TORCH_CHECK(q_in.size(0) == 1, "attention: q has shape ", q_in.sizes(), ", need [1, ", a.heads,
                ", rows, ", a.dim, "] where q_starts is given");
    TORCH_CHECK(!q_index_in && !table_in && !(bias_in && bias_in->dim() != 3),
                "attention: q_starts is given, need no q_index and no bias but one per key");
    check_device("attention", "q_starts", *q_starts_in, q);
    check_dtype("attention", "q_starts", *q_starts_in, at::kLong);
    check_sizes("attention", "q_starts", *q_starts_in, {a.batch + 1});
    q_starts = q_starts_in->contiguous();
    check_starts(q_starts, a.rows);
    a.q_starts = q_starts.const_data_ptr<int64_t>();
  }
  if (bias_in) {
    bias = *bias_in;
    set_bias(a, bias, q);
  }
  TORCH_CHECK(query_group_in.has_value() == table_in.has_value() &&
                  key_group_in.has_value() == table_in.has_value() && !(bias_in && table_in),
              "attention: need either bias, or query_group, key_group and table, or none of them");
  if (table_in) {
    check_device("attention", "bias.table", *table_in, q);
    check_dtype("attention", "bias.table", *table_in, at::kFloat);
    check_dim("attention", "bias.table", *table_in, 4);
    TORCH_CHECK((table_in->size(0) == 1 || table_in->size(0) == a.batch) &&
                    (table_in->size(1) == 1 || table_in->size(1) == a.heads),
                "attention: bias.table has shape ", table_in->sizes(), ", need [", a.batch,
                " or 1, ", a.heads, " or 1, query groups, key groups]");
    table = table_in->contiguous();
    query_group = check_index("bias.query_group", *query_group_in, q, q.size(2), true);
    key_group = check_index("bias.key_group", *key_group_in, q, a.keys, true);
    check_range("bias.query_group", query_group, table.size(2));
    check_range("bias.key_group", key_group, table.size(3));
    a.table = table.const_data_ptr<float>();
    a.table_stride[0] = stride_of(table, 0), a.table_stride[1] = stride_of(table, 1);
    a.query_groups = table.size(2), a.key_groups = table.size(3);
    a.query_group = query_group.const_data_ptr<int64_t>();
    a.key_group = key_group.const_data_ptr<int64_t>();
    a.query_group_stride = stride_of(query_group, 0);
    a.key_group_stride = stride_of(key_group, 0);
  }
  if (key_lengths_in) {
    check_device("attention", "key_lengths", *key_lengths_in, q);
    check_dtype("attention", "key_lengths", *key_lengths_in, at::kLong);
    check_sizes("attention", "key_lengths", *key_lengths_in, {a.batch});
    key_lengths = key_lengths_in->contiguous();
    check_range("key_lengths", key_lengths, a.keys + 1);
    a.key_lengths = key_lengths.const_data_ptr<int64_t>();
  }
  if (q_index_in) {
    check_dim("attention", "q_index", *q_index_in, 2);
    a.rows = q_index_in->size(1);
    q_index = check_index("q_index", *q_index_in, q, a.rows, false);
    check_range("q_index", q_index, q.size(2));
    a.q_index = q_index.const_data_ptr<int64_t>();
  }

  at::Tensor out = at::empty({q.size(0), a.rows, a.heads, a.dim}, q.options());
  at::Tensor lse = at::empty({q.size(0), a.heads, a.rows}, q.options().dtype(at::kFloat));
  if (lse.numel() && a.batch) {  // starts of a GPU are not checked: rows of no sample
    a.out = out.mutable_data_ptr();
    a.lse = lse.mutable_data_ptr<float>();
    at::Tensor scratch;
    if (!on_gpu(q)) {
      // The one allocation besides the outputs: K and V of the head in work, repacked once per head
      // for all its query tiles, and the tiles themselves; per thread, so linear in T.
      a.threads =
          std::min<int64_t>(at::get_num_threads(), q.size(0) * a.heads * ((a.rows + 7) / 8));
      int64_t floats = a.threads * AttentionScratch(a).total;
      scratch = at::empty({floats + 16}, lse.options());
      auto address = reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr<float>());
      a.scratch = reinterpret_cast<float*>((address + 63) / 64 * 64);
    }
    FASTDIFF_RUN(attention, a, q);
  }
  return {out.transpose(1, 2), lse};
}

}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("attention", &fastdiff::attention); }
TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("attention", &fastdiff::attention); }
