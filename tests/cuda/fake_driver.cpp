// Stands in for libcuda.so.1 in tests: notes every call in the file FAKE_LOG, fails in the function
// that FAKE_FAIL names, and runs nothing.
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {
int note(const char* name, const char* words = "") {
  if (FILE* file = std::fopen(std::getenv("FAKE_LOG"), "a")) {
    std::fprintf(file, "%s %s\n", name, words);
    std::fclose(file);
  }
  const char* fails = std::getenv("FAKE_FAIL");
  return fails && !std::strcmp(fails, name) ? 700 : 0;
}
char names[64][256];
int count = 0;
int primary;
void* context = nullptr;
}  // namespace

extern "C" {
int cuInit(unsigned) { return note("cuInit"); }
int cuCtxGetCurrent(void** current) {  // FAKE_NO_CONTEXT: a thread that has not used CUDA
  *current = std::getenv("FAKE_NO_CONTEXT") ? context : &primary;
  return note("cuCtxGetCurrent");
}
int cuCtxSetCurrent(void* to) {
  context = to;
  return note("cuCtxSetCurrent");
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return note("cuDeviceGet");
}
int cuDevicePrimaryCtxRetain(void** retained, int) {
  *retained = &primary;
  return note("cuDevicePrimaryCtxRetain");
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return note("cuCtxGetDevice");
}
int cuDeviceGetAttribute(int* value, int which, int) {
  const char* given = std::getenv("FAKE_CAPABILITY");  // 10 * major + minor
  const int capability = given ? std::atoi(given) : 90;
  *value = which == 75 ? capability / 10 : capability % 10;
  return note("cuDeviceGetAttribute");
}
int cuModuleLoadData(void** module, const void* image) {
  *module = const_cast<void*>(image);
  return note("cuModuleLoadData", static_cast<const char*>(image));
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = std::strncpy(names[count++ % 64], name, 255);
  return note("cuModuleGetFunction", name);
}
int cuFuncSetAttribute(void* function, int which, int value) {
  char words[400];
  std::snprintf(words, sizeof words, "%s %d %d", static_cast<char*>(function), which, value);
  return note("cuFuncSetAttribute", words);
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** arguments, void**) {
  char words[1000];
  int at = std::snprintf(words, sizeof words, "%s %u %u %u %u %u %u %u %d ",
                         static_cast<char*>(function), gx, gy, gz, bx, by, bz, shared,
                         stream != nullptr);
  for (int i = 0; i < 64; ++i)  // the argument struct: its first words
    at += std::snprintf(words + at, sizeof words - size_t(at), "%02x",
                        static_cast<unsigned char*>(arguments[0])[i]);
  return note("cuLaunchKernel", words);
}
int cuGetErrorString(int error, const char** words) {
  *words = "an illegal memory access was encountered";
  return error == 700 ? 0 : 1;
}
}
