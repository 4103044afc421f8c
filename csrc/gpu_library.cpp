#include "gpu_library.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <atomic>
#include <mutex>
#include <unordered_map>

namespace fastdiff {
namespace {

// A loaded library; its entries are looked up once.
class Library {
 public:
  void load(const std::string& path) {
    void* opened = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    TORCH_CHECK(opened, "load_gpu_library: ", dlerror());
    std::lock_guard<std::mutex> lock(mutex_);
    handle_ = opened;  // an earlier one stays mapped: calls may be running in it
    entries_.clear();
  }

  bool loaded() {
    std::lock_guard<std::mutex> lock(mutex_);
    return handle_ != nullptr;
  }

  void* entry(const std::string& name) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!handle_) return nullptr;
    auto [at, missing] = entries_.try_emplace(name, nullptr);
    if (missing) at->second = dlsym(handle_, ("fastdiff_gpu_" + name).c_str());
    return at->second;
  }

 private:
  std::mutex mutex_;
  void* handle_ = nullptr;
  std::unordered_map<std::string, void*> entries_;
};

Library& library(bool emulated) {
  static Library device, model;
  return emulated ? model : device;
}

std::atomic<bool> emulation{false};

}  // namespace

void load_gpu_library(const std::string& path, bool emulate) { library(emulate).load(path); }

void set_emulating(bool on) { emulation.store(on); }
bool emulating() { return emulation.load(std::memory_order_relaxed); }

std::string why_not_gpu(const std::string& op) {
  Library& from = library(emulating());
  if (!from.loaded()) return "no library of CUDA kernels is loaded (built without nvcc)";
  if (!from.entry(op)) return "the library of CUDA kernels has no " + op;
  return "";
}

void run_gpu(const char* op, const void* args, const at::Tensor& t) {
  const bool emulated = !t.is_cuda();
  Library& from = library(emulated);
  auto* run = reinterpret_cast<int (*)(const void*, void*)>(from.entry(op));
  TORCH_CHECK(run, op, ": ", why_not_gpu(op));
  int error;
  if (emulated) {
    error = run(args, nullptr);
  } else {
    const c10::DeviceGuard guard(t.device());
    const c10::impl::VirtualGuardImpl device(t.device().type());
    error = run(args, device.getStream(t.device()).native_handle());
  }
  if (error == 0) return;
  auto* words = reinterpret_cast<const char* (*)(int)>(from.entry("error_string"));
  TORCH_CHECK(false, op, ": the launch failed: ", words ? words(error) : "unknown error", " (",
              error, ")");
}

}  // namespace fastdiff
