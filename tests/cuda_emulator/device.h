// In the place of csrc/device.h: every tensor is on "the device", and there are no streams.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

namespace loki {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline bool on_device(const torch::stable::Tensor&) { return true; }

inline cudaStream_t current_stream(int32_t) { return nullptr; }

}  // namespace loki
