// Where a launch goes: the tensor's device and torch's current stream there. Included with angle
// brackets, so that the tests can put their CPU emulation in its place.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace loki {

using DeviceGuard = torch::stable::accelerator::DeviceGuard;

inline bool on_device(const torch::stable::Tensor& x) { return x.is_cuda(); }

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "torch has no current stream on CUDA device ", device);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace loki
