// A stand-in for the CUDA run time, for machines without a GPU: linked with the object files of csrc/*.cu, it hands
// every kernel launch to test_cuda_ptx.py. So grid, block, shared memory and arguments come from the launch code itself.
//
// The ops register under PrivateUse1 rather than CUDA here, beside and not instead of the real library.
#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <string>

struct Three {
  unsigned x, y, z;
};

using Callback = void (*)(const char* kernel, const Three* grid, const Three* block, size_t shared_bytes, void** arguments,
                          void* stream, int guards);

namespace {

std::map<const void*, std::string> kernels;
Callback on_launch = nullptr;
int guards = 0;
char stream_of_guarded_device;

struct Configuration {
  Three grid, block;
  size_t shared_bytes;
  void* stream;
} configuration;

}  // namespace

extern "C" {

void record_launches(Callback callback) { on_launch = callback; }

void* expected_stream() { return &stream_of_guarded_device; }

void** __cudaRegisterFatBinary(void*) { return nullptr; }

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels[host] = name;
}

unsigned __cudaPushCallConfiguration(Three grid, Three block, size_t shared_bytes, void* stream) {
  configuration = {grid, block, shared_bytes, stream};
  return 0;
}

int __cudaPopCallConfiguration(Three* grid, Three* block, size_t* shared_bytes, void** stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  *stream = configuration.stream;
  return 0;
}

int cudaLaunchKernel(const void* host, Three grid, Three block, void** arguments, size_t shared_bytes, void* stream) {
  on_launch(kernels.at(host).c_str(), &grid, &block, shared_bytes, arguments, stream, guards);
  return 0;
}

int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}

int __cudaLaunchKernel(const void* kernel, Three grid, Three block, void** arguments, size_t shared_bytes, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

int cudaGetLastError() { return 0; }

int cudaFuncSetAttribute(const void*, int, int) { return 0; }

int32_t torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char**) {
  if (error) std::abort();
  return 0;
}

void torch_c10_cuda_free_error_msg(char*) {}

int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  ++guards;
  *guard = &guards;
  return 0;
}

int32_t aoti_torch_delete_device_guard(void*) {
  --guards;
  return 0;
}

int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = &stream_of_guarded_device;
  return 0;
}

int32_t aoti_torch_library_init_impl(const char* ns, const char*, const char* file, uint32_t line, void** library) {
  using Function = int32_t (*)(const char*, const char*, const char*, uint32_t, void**);
  const auto real = reinterpret_cast<Function>(dlsym(RTLD_NEXT, "aoti_torch_library_init_impl"));
  return real(ns, "PrivateUse1", file, line, library);
}

}  // extern "C"
