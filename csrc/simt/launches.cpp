// Stands in for CUDA's runtime library: notes what every launch asks for, and runs nothing. Kernels
// that nvcc compiled, linked with this, tell their grids and shared memory where there is no GPU.
#include <cstddef>
#include <map>
#include <string>
#include <vector>

namespace {

struct dim3 {
  unsigned x, y, z;
};

struct Launch {
  std::string kernel;  // mangled
  dim3 grid, block;
  size_t shared;  // dynamic
};

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> all;
  return all;
}
std::vector<Launch> launches;
Launch configured;
void* handle = nullptr;

}  // namespace

extern "C" {

// Launch i of those since the last call with i < 0: its kernel, and (grid, block, shared) in `out`;
// null past the last one.
const char* fastdiff_launch(int i, size_t out[7]) {
  if (i < 0) launches.clear();
  if (i < 0 || size_t(i) >= launches.size()) return nullptr;
  const Launch& at = launches[size_t(i)];
  const size_t fields[7] = {at.grid.x,  at.grid.y,  at.grid.z, at.block.x,
                            at.block.y, at.block.z, at.shared};
  for (int k = 0; k < 7; ++k) out[k] = fields[k];
  return at.kernel.c_str();
}

// What nvcc's host code calls; arguments as in crt/host_runtime.h and cuda_runtime_api.h.
void** __cudaRegisterFatBinary(void*) { return &handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*,
                            void*, void*, int*) {
  kernels()[host] = device;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void*) {
  configured.grid = grid, configured.block = block, configured.shared = shared;
  return 0;
}
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configured.grid, *block = configured.block, *shared = configured.shared;
  *static_cast<void**>(stream) = nullptr;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared, void*) {
  launches.push_back({kernels().at(kernel), grid, block, shared});
  return 0;
}
int cudaFuncSetAttribute(const void*, int, int) { return 0; }
struct cudaFuncAttributes {  // its beginning, as in driver_types.h
  size_t shared, constant, local;
  int threads, registers, ptxVersion;
};
// What the code is said to be compiled for, as 89 for 8.9.
int fastdiff_compiled_for = 120;
int cudaFuncGetAttributes(cudaFuncAttributes* has, const void*) {
  has->ptxVersion = fastdiff_compiled_for;
  return 0;
}
int cudaGetLastError() { return 0; }
const char* cudaGetErrorString(int) { return "no error: nothing ran"; }
}
