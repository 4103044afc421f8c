// What the library of GPU kernels offers besides its kernels.
#include "gpu.h"

#ifndef __CUDACC_RTC__
// The words for an error code that a launch gave.
extern "C" const char* fastdiff_gpu_error_string(int error) {
#ifdef __CUDACC__
  return cudaGetErrorString(cudaError_t(error));
#elif defined(FASTDIFF_DRIVER)
  return fastdiff_driver_error(error);
#else
  (void)error;
  return simt_error();
#endif
}
#endif
