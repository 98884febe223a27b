// Devices and errors: the host functions every launcher uses.
#include <stdexcept>
#include <string>

#include "common.cuh"
#include "launch.h"

namespace flcore {
namespace cuda {

static void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // forget it here: the next launch must not report it a second time
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

int device_count(std::string* why) {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess) return count;
  *why = cudaGetErrorString(status);
  cudaGetLastError();
  return 0;
}

void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

int multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
        "multiprocessor count");
  return count;
}

size_t shared_limit(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory of a block");
  return size_t(bytes);
}

DeviceGuard::DeviceGuard(int device) : previous_(device) {
  check(cudaGetDevice(&previous_), "current device");
  if (previous_ != device) check(cudaSetDevice(device), "choosing the device");
}

DeviceGuard::~DeviceGuard() { cudaSetDevice(previous_); }

}  // namespace cuda
}  // namespace flcore
