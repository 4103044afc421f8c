// The driver's side of driver.h. Types and numbers are those of the CUDA driver API (cuda.h), which
// need not be installed.
#include <dlfcn.h>

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "simt/runtime.h"

namespace {

// Gives the cubin of a kernel file for compute capability 10 * major + minor, to be kept by the
// giver; null, and a sentence in *words, where it cannot.
using Compiler = const void* (*)(const char* stem, int capability, const char** words);

enum : int {  // CUdevice_attribute, CUfunction_attribute
  kMajor = 75,
  kMinor = 76,
  kMaxDynamicShared = 8,
};
enum : int { kOwn = -1 };  // the sentence is in `own_words`; codes of the driver are positive

thread_local std::string own_words;

int fail(std::string words) {
  own_words = std::move(words);
  return kOwn;
}

struct Driver {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  int (*init)(unsigned) = nullptr;
  int (*context)(void**) = nullptr;
  int (*current)(void*) = nullptr;
  int (*retain)(void**, int) = nullptr;
  int (*get)(int*, int) = nullptr;
  int (*device)(int*) = nullptr;
  int (*attribute)(int*, int, int) = nullptr;
  int (*load)(void**, const void*) = nullptr;
  int (*function)(void**, void*, const char*) = nullptr;
  int (*set)(void*, int, int) = nullptr;
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
                void**, void**) = nullptr;
  int (*error)(int, const char**) = nullptr;
  std::string missing;

  template <class F>
  void find(F& f, const char* name) {
    f = reinterpret_cast<F>(dlsym(library, name));
    if (!f && missing.empty()) missing = name;
  }

  Driver() {
    if (!library) return;
    find(init, "cuInit"), find(context, "cuCtxGetCurrent"), find(device, "cuCtxGetDevice");
    find(current, "cuCtxSetCurrent"), find(retain, "cuDevicePrimaryCtxRetain");
    find(get, "cuDeviceGet"), find(attribute, "cuDeviceGetAttribute"),
        find(load, "cuModuleLoadData");
    find(function, "cuModuleGetFunction"), find(set, "cuFuncSetAttribute");
    find(launch, "cuLaunchKernel"), find(error, "cuGetErrorString");
  }
};

Driver& driver() {
  static Driver one;
  return one;
}

Compiler compiler = nullptr;
std::mutex mutex;
std::map<std::pair<void*, std::string>, void*> modules;    // by context and kernel file
std::map<std::pair<void*, const void*>, void*> functions;  // by context and host address

std::string stem(const char* file) {
  std::string path(file);
  const size_t start = path.rfind('/') + 1, end = path.rfind('.');
  return path.substr(start, end - start);
}

// Compute capability of the current context's device, as 89 for 8.9.
int capability_of(int* capability) {
  int device = 0, major = 0, minor = 0;
  if (int e = driver().device(&device)) return e;
  if (int e = driver().attribute(&major, kMajor, device)) return e;
  if (int e = driver().attribute(&minor, kMinor, device)) return e;
  *capability = 10 * major + minor;
  return 0;
}

// The module of `file` in the current context, compiled and loaded at the first call.
int module_of(void* context, const char* file, void** module) {
  const std::string name = stem(file);
  void*& known = modules[{context, name}];
  if (!known) {
    if (!compiler) return fail("no compiler of kernels was set");
    int capability = 0;
    if (int e = capability_of(&capability)) return e;
    const char* words = "";
    const void* cubin = compiler(name.c_str(), capability, &words);
    if (!cubin) return fail(words);
    if (int e = driver().load(&known, cubin)) return known = nullptr, e;
  }
  *module = known;
  return 0;
}

// The thread's context. A thread that has not used CUDA has none: it gets device 0's, as from
// CUDA's runtime, whose cudaSetDevice makes any other device's context current itself.
int context_of_thread(void** context) {
  const Driver& d = driver();
  if (int e = d.context(context)) return e;
  if (*context) return 0;
  int device = 0;
  if (int e = d.get(&device, 0)) return e;
  if (int e = d.retain(context, device)) return e;
  return d.current(*context);
}

int ready() {
  Driver& d = driver();
  if (!d.library) return fail("no CUDA driver is installed (libcuda.so.1)");
  if (!d.missing.empty()) return fail("the CUDA driver lacks " + d.missing);
  static const int error = d.init(0);
  return error;
}

int function_of(const char* file, const void* kernel, void** function) {
  void* context = nullptr;
  if (int e = context_of_thread(&context)) return e;
  std::lock_guard<std::mutex> lock(mutex);
  void*& known = functions[{context, kernel}];
  if (!known) {
    Dl_info info{};
    if (!dladdr(kernel, &info) || !info.dli_sname) return fail("a kernel has no symbol");
    void* module = nullptr;
    if (int e = module_of(context, file, &module)) return e;
    if (int e = driver().function(&known, module, info.dli_sname)) return known = nullptr, e;
  }
  *function = known;
  return 0;
}

}  // namespace

extern "C" {

void fastdiff_driver_compiler(Compiler c) { compiler = c; }

int fastdiff_driver_needs(int least) {
  void* context = nullptr;
  int capability = 0;
  if (int e = ready()) return e;
  if (int e = context_of_thread(&context)) return e;
  if (int e = capability_of(&capability)) return e;
  if (capability >= least) return 0;
  const auto words = [](int c) { return std::to_string(c / 10) + "." + std::to_string(c % 10); };
  return fail("needs compute capability " + words(least) + " or above, this GPU has " +
              words(capability));
}

int fastdiff_driver_launch(const char* file, const void* kernel, dim3 grid, dim3 block,
                           size_t shared, void* stream, void** arguments) {
  Driver& d = driver();
  if (int e = ready()) return e;
  void* function = nullptr;
  if (int e = function_of(file, kernel, &function)) return e;
  if (shared > 48 * 1024)  // more than that has to be asked for
    if (int e = d.set(function, kMaxDynamicShared, int(shared))) return e;
  return d.launch(function, grid.x, grid.y, grid.z, block.x, block.y, block.z, unsigned(shared),
                  stream, arguments, nullptr);
}

const char* fastdiff_driver_error(int error) {
  const char* words = nullptr;
  if (error == kOwn) return own_words.c_str();
  if (error == 9) return "invalid configuration argument";  // the runtime's code: a host check's
  if (driver().error && driver().error(error, &words) == 0 && words) return words;
  return "unknown error of the CUDA driver";
}
}
