// Launches by the GPU's driver alone, for machines without nvcc: kernels are compiled by NVRTC when
// they are first needed, and found by the names that the host's compiler gives them too.
//
// In this build (-DFASTDIFF_DRIVER) the kernels also compile as plain C++ on csrc/simt. Nothing
// runs them: their addresses tell their names.
#pragma once
#include <tuple>
#include <utility>

extern "C" {
// `file`: the kernel file's path, whose stem names it to the compiler.
int fastdiff_driver_launch(const char* file, const void* kernel, dim3 grid, dim3 block,
                           size_t shared, void* stream, void** arguments);
// An error code, or 0 where the current device has compute capability `least` (89 is 8.9) or above.
int fastdiff_driver_needs(int least);
const char* fastdiff_driver_error(int error);
}

template <class... Parameters, class... Arguments>
inline int driver_launch(const char* file, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                         size_t shared, void* stream, const Arguments&... arguments) {
  std::tuple<Parameters...> values(arguments...);
  return std::apply(
      [&](auto&... each) {
        void* pointers[] = {const_cast<void*>(static_cast<const void*>(&each))...};
        return fastdiff_driver_launch(file, reinterpret_cast<const void*>(kernel), grid, block,
                                      shared, stream, pointers);
      },
      values);
}

#undef GPU_NEEDS
#define GPU_NEEDS(kernel, least) fastdiff_driver_needs(least)
#undef GPU_LAUNCH
#define GPU_LAUNCH(kernel, grid, block, shared, stream, ...) \
  driver_launch(__FILE__, kernel, grid, block, shared, stream, __VA_ARGS__)
