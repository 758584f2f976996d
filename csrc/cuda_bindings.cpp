// The CUDA kernels as torch operators, by torch's stable ABI: one binary serves torch 2.11 and
// newer. The schemas are in loki_kernels/ops/<op>/cuda_impl.py.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <device.h>

#include <string>
#include <vector>

#include "count_lowest.h"
#include "failure.hpp"
#include "sync_rows.h"

namespace loki {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& x) {  // one that has passed Checks::floating
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      return Dtype::float32;
  }
}

// One op's checks: each returns a message that starts with the op's name, or "".
struct Checks {
  const char* op;
  int32_t device;

  Checks(const char* op, const Tensor& first) : op(op), device(first.get_device_index()) {}

  std::string placed(const Tensor& x, const char* name) const {
    LOKI_CHECK(on_device(x), op, ": its tensors must be on a CUDA device");
    LOKI_CHECK(x.get_device_index() == device, op, ": ", name,
               " must be on the first tensor's device");
    return {};
  }

  std::string floating(const Tensor& x, const char* name) const {
    const ScalarType dtype = x.scalar_type();
    LOKI_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half ||
                   dtype == ScalarType::BFloat16,
               op, ": ", name, " must be float32, float16 or bfloat16");
    return placed(x, name);
  }

  std::string of(const Tensor& x, const char* name, std::vector<int64_t> shape,
                 ScalarType dtype) const {
    LOKI_TRY(placed(x, name));
    LOKI_CHECK(x.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
    bool same = x.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; same && i < shape.size(); ++i) same = x.size(i) == shape[i];
    LOKI_CHECK(same, op, ": ", name, " has the wrong shape");
    return {};
  }

  std::string unit_stride(const Tensor& x, const char* name) const {
    const int64_t last = x.dim() - 1;
    LOKI_CHECK(x.numel() == 0 || x.size(last) == 1 || x.stride(last) == 1, op,
               ": the last dimension of ", name, " must be contiguous");
    return {};
  }

  std::string launched(cudaError_t error) const {
    LOKI_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
    return {};
  }
};

const int64_t* numbers(const Tensor& index) {
  return static_cast<const int64_t*>(index.const_data_ptr());
}

std::string count_lowest_op(const Tensor& scores, int64_t k, Tensor counts, bool magnitude) {
  const Checks check("count_lowest", scores);
  LOKI_TRY(check.floating(scores, "scores"));
  LOKI_CHECK(scores.dim() == 3, check.op, ": scores must be [N, L, D]");
  const int64_t samples = scores.size(0), layers = scores.size(1), width = scores.size(2);
  LOKI_TRY(check.unit_stride(scores, "scores"));
  LOKI_TRY(check.of(counts, "counts", {layers, width}, ScalarType::Long));
  LOKI_CHECK(width <= 32768, check.op, ": takes up to 32768 nodes a layer");
  LOKI_CHECK(0 < k && k <= width, check.op, ": k must lie in [1, ", width, "]");
  LOKI_CHECK(samples * layers <= INT32_MAX, check.op, ": too many samples for one launch");
  if (samples == 0 || layers == 0) return {};
  const DeviceGuard guard(check.device);
  return check.launched(count_lowest(
      scores.const_data_ptr(), dtype_of(scores), samples, layers, static_cast<int>(width),
      scores.stride(0), scores.stride(1), static_cast<int>(k), magnitude,
      static_cast<int64_t*>(counts.mutable_data_ptr()), counts.stride(0), counts.stride(1),
      current_stream(check.device)));
}

std::string sync_rows_op(std::vector<Tensor> weights, std::vector<Tensor> base,
                         std::vector<Tensor> updates, std::vector<Tensor> indices) {
  if (weights.empty()) return {};
  const Checks check("sync_rows", weights[0]);
  const size_t count = weights.size();
  LOKI_CHECK(base.size() == count && updates.size() == count && indices.size() == count, check.op,
             ": as many bases, updates and indices as weights are needed");
  LOKI_TRY(check.floating(weights[0], "weights"));
  LOKI_TRY(check.floating(updates[0], "updates"));
  std::vector<RowSegment> segments;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &weight = weights[i], &from = base[i], &update = updates[i], &index = indices[i];
    LOKI_CHECK(weight.dim() == 2 && index.dim() == 1, check.op,
               ": a weight must be [out, in], an index [k]");
    const int64_t k = index.size(0), width = weight.size(1);
    LOKI_TRY(check.of(weight, "weight", {weight.size(0), width}, weights[0].scalar_type()));
    LOKI_TRY(check.of(from, "base", {k, width}, weights[0].scalar_type()));
    LOKI_TRY(check.of(update, "update", {k, width}, updates[0].scalar_type()));
    LOKI_TRY(check.of(index, "index", {k}, ScalarType::Long));
    LOKI_TRY(check.unit_stride(weight, "weight"));
    LOKI_TRY(check.unit_stride(from, "base"));
    LOKI_TRY(check.unit_stride(update, "update"));
    LOKI_TRY(check.unit_stride(index, "index"));
    if (k == 0 || width == 0) continue;
    segments.push_back({weight.mutable_data_ptr(), from.const_data_ptr(), update.const_data_ptr(),
                        numbers(index), weight.stride(0), from.stride(0), update.stride(0),
                        static_cast<int>(k), static_cast<int>(width)});
  }
  if (segments.empty()) return {};
  const DeviceGuard guard(check.device);
  return check.launched(sync_rows(segments.data(), static_cast<int>(segments.size()),
                                  dtype_of(weights[0]), dtype_of(updates[0]),
                                  current_stream(check.device)));
}

}  // namespace
}  // namespace loki

STABLE_TORCH_LIBRARY_IMPL(loki_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("count_lowest", TORCH_BOX(&loki::Caught<&loki::count_lowest_op>::call));
  m.impl("sync_rows", TORCH_BOX(&loki::Caught<&loki::sync_rows_op>::call));
}
