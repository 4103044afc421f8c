// How the C++ entries of ops reach GPU kernels: a library of csrc/cuda/*.cu that is loaded at run
// time, so that one build of this extension serves CPU and CUDA torch alike.
#pragma once
#include <ATen/core/Tensor.h>

#include <string>

#include "cpu/level.h"

namespace fastdiff {

// Loads a library that exports fastdiff_gpu_<op>. With `emulate` its kernels are CUDA's model on
// the CPU (csrc/simt): then, and only while emulating, they are what runs for tensors of the CPU.
void load_gpu_library(const std::string& path, bool emulate);
void set_emulating(bool on);
bool emulating();
// The sentence why GPU kernel `op` cannot run, or "".
std::string why_not_gpu(const std::string& op);

// Whether calls with this tensor go to GPU kernels.
inline bool on_gpu(const at::Tensor& t) { return t.is_cuda() || (t.is_cpu() && emulating()); }
// Calls fastdiff_gpu_<op>(args, stream) on the current stream of t's device. Raises what a launch
// reports.
void run_gpu(const char* op, const void* args, const at::Tensor& t);

}  // namespace fastdiff

// Runs kernel `name` where tensor `t` is: the CPU's at the current level, or the GPU's.
#define FASTDIFF_RUN(name, args, t) FASTDIFF_RUN_BY(FASTDIFF_CALL_KERNEL, name, args, t)
#define FASTDIFF_RUN_INT8(name, args, t) FASTDIFF_RUN_BY(FASTDIFF_CALL_INT8_KERNEL, name, args, t)
#define FASTDIFF_RUN_BY(call, name, args, t)  \
  do {                                        \
    if (::fastdiff::on_gpu(t)) {              \
      ::fastdiff::run_gpu(#name, &(args), t); \
    } else {                                  \
      call(name, args);                       \
    }                                         \
  } while (0)
