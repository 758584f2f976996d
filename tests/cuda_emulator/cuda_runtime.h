// The part of CUDA that csrc/*.cu uses, on a CPU: a block's threads are fibers of one thread, run in
// random order between barriers, so that a missing barrier shows as a wrong result.
#pragma once

#include <cuda_runtime_api.h>  // CUDA's own: types, and declarations that emulator.cpp defines

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __device__
#undef __global__
#undef __host__
#undef __launch_bounds__
#undef __shared__
#define __device__
#define __global__
#define __host__
#define __launch_bounds__(...)
#define __shared__ thread_local  // blocks run one after another

namespace emulator {

// Runs `body` in every thread of every block.
cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& body);

enum class Scope { block, warp };
// Returns when all threads of the block (that have not ended) or all lanes of the warp are here.
void wait(Scope scope);
// The lane's own slot of 8 bytes, and those of its warp.
uint64_t& slot(int lane);
int lane();
int warp_size();

template <typename T>
T exchange(T value, int from) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  slot(lane()) = bits;
  wait(Scope::warp);
  if (from < 0 || from >= warp_size()) from = lane();
  std::memcpy(&value, &slot(from), sizeof(T));
  wait(Scope::warp);
  return value;
}

}  // namespace emulator

extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;

using std::max;
using std::min;

void __syncthreads();
unsigned __ballot_sync(unsigned mask, int predicate);

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return emulator::exchange(value, from);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  return emulator::exchange(value, emulator::lane() - delta);
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

template <typename T>
T atomicAdd(T* target, T value) {
  const T before = *target;
  *target += value;
  return before;
}

template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  return emulator::run(*config, [=] { kernel(arguments...); });
}
