// The CUDA kernels as torch operators, by torch's stable ABI: one binary serves torch 2.11 and
// newer. The schemas are in loki_kernels/ops/<op>/cuda_impl.py.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <device.h>

#include <vector>

#include "count_lowest.h"
#include "sync_rows.h"

namespace loki {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& x, const char* op, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float16 or bfloat16");
  }
}

// One op's checks, each a message that starts with the op's name.
struct Checks {
  const char* op;
  int32_t device;

  Checks(const char* op, const Tensor& first) : op(op), device(first.get_device_index()) {
    STD_TORCH_CHECK(on_device(first), op, ": its tensors must be on a CUDA device");
  }

  void of(const Tensor& x, const char* name, std::vector<int64_t> shape, ScalarType dtype) const {
    STD_TORCH_CHECK(on_device(x) && x.get_device_index() == device, op, ": ", name,
                    " must be on the first tensor's device");
    STD_TORCH_CHECK(x.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
    bool same = x.dim() == static_cast<int64_t>(shape.size());
    for (size_t i = 0; same && i < shape.size(); ++i) same = x.size(i) == shape[i];
    STD_TORCH_CHECK(same, op, ": ", name, " has the wrong shape");
  }

  void unit_stride(const Tensor& x, const char* name) const {
    const int64_t last = x.dim() - 1;
    STD_TORCH_CHECK(x.numel() == 0 || x.size(last) == 1 || x.stride(last) == 1, op,
                    ": the last dimension of ", name, " must be contiguous");
  }

  void launched(cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
  }
};

const int64_t* numbers(const Tensor& index) {
  return static_cast<const int64_t*>(index.const_data_ptr());
}

void count_lowest_op(const Tensor& scores, int64_t k, Tensor counts, bool magnitude) {
  const Checks check("count_lowest", scores);
  STD_TORCH_CHECK(scores.dim() == 3, check.op, ": scores must be [N, L, D]");
  const int64_t samples = scores.size(0), layers = scores.size(1), width = scores.size(2);
  check.unit_stride(scores, "scores");
  check.of(counts, "counts", {layers, width}, ScalarType::Long);
  STD_TORCH_CHECK(width <= 32768, check.op, ": takes up to 32768 nodes a layer");
  STD_TORCH_CHECK(0 < k && k <= width, check.op, ": k must lie in [1, ", width, "]");
  STD_TORCH_CHECK(samples * layers <= INT32_MAX, check.op, ": too many samples for one launch");
  if (samples == 0 || layers == 0) return;
  const DeviceGuard guard(check.device);
  check.launched(count_lowest(scores.const_data_ptr(), dtype_of(scores, check.op, "scores"),
                              samples, layers, static_cast<int>(width), scores.stride(0),
                              scores.stride(1), static_cast<int>(k), magnitude,
                              static_cast<int64_t*>(counts.mutable_data_ptr()), counts.stride(0),
                              counts.stride(1), current_stream(check.device)));
}

void sync_rows_op(std::vector<Tensor> weights, std::vector<Tensor> base,
                  std::vector<Tensor> updates, std::vector<Tensor> indices) {
  if (weights.empty()) return;
  const Checks check("sync_rows", weights[0]);
  const size_t count = weights.size();
  STD_TORCH_CHECK(base.size() == count && updates.size() == count && indices.size() == count,
                  check.op, ": as many bases, updates and indices as weights are needed");
  std::vector<RowSegment> segments;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &weight = weights[i], &from = base[i], &update = updates[i], &index = indices[i];
    STD_TORCH_CHECK(weight.dim() == 2 && index.dim() == 1, check.op,
                    ": a weight must be [out, in], an index [k]");
    const int64_t k = index.size(0), width = weight.size(1);
    check.of(weight, "weight", {weight.size(0), width}, weights[0].scalar_type());
    check.of(from, "base", {k, width}, weights[0].scalar_type());
    check.of(update, "update", {k, width}, updates[0].scalar_type());
    check.of(index, "index", {k}, ScalarType::Long);
    check.unit_stride(weight, "weight");
    check.unit_stride(from, "base");
    check.unit_stride(update, "update");
    check.unit_stride(index, "index");
    if (k == 0 || width == 0) continue;
    segments.push_back({weight.mutable_data_ptr(), from.const_data_ptr(), update.const_data_ptr(),
                        numbers(index), weight.stride(0), from.stride(0), update.stride(0),
                        static_cast<int>(k), static_cast<int>(width)});
  }
  if (segments.empty()) return;
  const DeviceGuard guard(check.device);
  check.launched(sync_rows(segments.data(), static_cast<int>(segments.size()),
                           dtype_of(weights[0], check.op, "weights"),
                           dtype_of(updates[0], check.op, "updates"), current_stream(check.device)));
}

}  // namespace
}  // namespace loki

STABLE_TORCH_LIBRARY_IMPL(loki_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("count_lowest", TORCH_BOX(&loki::count_lowest_op));
  m.impl("sync_rows", TORCH_BOX(&loki::sync_rows_op));
}
