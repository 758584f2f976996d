// The C++ implementation for CPU tensors: a radix step narrows the candidates for the k-th score to
// a few hundred, instead of sorting the layer.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "failure.hpp"

namespace loki {
namespace {

using torch::stable::Tensor;

// An unsigned integer in the scores' order; -0 ties with 0.
inline uint32_t order_key(float score, bool magnitude) {
  if (magnitude) score = std::fabs(score);
  score += 0.0f;  // -0 becomes 0
  // A float's bits order like an integer once a negative one's are inverted and the sign bit of
  // the others is set.
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

inline uint64_t order_key(double score, bool magnitude) {
  if (magnitude) score = std::fabs(score);
  score += 0.0;
  uint64_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return bits ^ (static_cast<uint64_t>(static_cast<int64_t>(bits) >> 63) | (1ull << 63));
}

// What one thread needs for one layer after another.
template <typename Key>
struct Workspace {
  static constexpr int kBits = 11, kShift = 8 * sizeof(Key) - kBits;
  std::vector<Key> keys, candidates;
  int histogram[1 << kBits];

  explicit Workspace(int64_t width) : keys(width) {}

  // The k-th lowest key, and how many of those equal to it are among the k.
  std::pair<Key, int64_t> threshold(int64_t k) {
    std::fill(std::begin(histogram), std::end(histogram), 0);
    for (const Key key : keys) ++histogram[key >> kShift];
    Key digit = 0;
    while (histogram[digit] < k) k -= histogram[digit++];
    candidates.clear();
    for (const Key key : keys) {
      if (key >> kShift == digit) candidates.push_back(key);
    }
    const auto kth = candidates.begin() + (k - 1);
    std::nth_element(candidates.begin(), kth, candidates.end());
    // Those before the k-th are at most it; of these, the equal ones and itself are wanted.
    return {*kth, 1 + std::count(candidates.begin(), kth, *kth)};
  }
};

template <typename T, typename Wide, bool kShared>
void count_layer(const T* scores, int64_t scores_node, int64_t k, bool magnitude, int64_t* counts,
                 int64_t counts_node,
                 Workspace<decltype(order_key(Wide{}, true))>& workspace) {
  auto& keys = workspace.keys;
  const int64_t width = keys.size();
  for (int64_t node = 0; node < width; ++node) {
    keys[node] = order_key(static_cast<Wide>(scores[node * scores_node]), magnitude);
  }
  auto [threshold, wanted] = workspace.threshold(k);
  for (int64_t node = 0; node < width; ++node) {
    const bool tie = keys[node] == threshold;
    const bool taken = keys[node] < threshold || (tie && wanted > 0);
    wanted -= tie;
    if constexpr (kShared) {
      if (taken) __atomic_fetch_add(&counts[node * counts_node], 1, __ATOMIC_RELAXED);
    } else {
      counts[node * counts_node] += taken;
    }
  }
}

template <typename T, typename Wide>
void run(const Tensor& scores, int64_t k, Tensor& counts, bool magnitude) {
  const int64_t samples = scores.size(0), layers = scores.size(1), width = scores.size(2);
  const T* data = static_cast<const T*>(scores.const_data_ptr());
  int64_t* counters = static_cast<int64_t*>(counts.mutable_data_ptr());
  const int64_t sample_stride = scores.stride(0), layer_stride = scores.stride(1),
                node_stride = scores.stride(2), counts_layer = counts.stride(0),
                counts_node = counts.stride(1);
  const auto count = [&](auto shared, int64_t sample, int64_t layer, auto& workspace) {
    count_layer<T, Wide, decltype(shared)::value>(
        data + sample * sample_stride + layer * layer_stride, node_stride, k, magnitude,
        counters + layer * counts_layer, counts_node, workspace);
  };
  using Space = Workspace<decltype(order_key(Wide{}, true))>;
  if (layers >= torch::stable::get_num_threads()) {  // a thread has its layers' counters to itself
    torch::stable::parallel_for(0, layers, 1, [&](int64_t begin, int64_t end) {
      Space workspace(width);
      for (int64_t layer = begin; layer < end; ++layer) {
        for (int64_t sample = 0; sample < samples; ++sample) {
          count(std::false_type{}, sample, layer, workspace);
        }
      }
    });
    return;
  }
  torch::stable::parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
    Space workspace(width);
    for (int64_t sample = begin; sample < end; ++sample) {
      for (int64_t layer = 0; layer < layers; ++layer) {
        count(std::true_type{}, sample, layer, workspace);
      }
    }
  });
}

std::string count_lowest(const Tensor& scores, int64_t k, Tensor counts, bool magnitude) {
  using torch::headeronly::ScalarType;
  LOKI_CHECK(scores.is_cpu() && counts.is_cpu(), "count_lowest: both tensors must be on a CPU");
  LOKI_CHECK(scores.dim() == 3, "count_lowest: scores must be [N, L, D]");
  LOKI_CHECK(counts.dim() == 2 && counts.size(0) == scores.size(1) &&
                 counts.size(1) == scores.size(2) &&
                 counts.scalar_type() == ScalarType::Long,
             "count_lowest: counts must be int64 [L, D]");
  LOKI_CHECK(0 < k && k <= scores.size(2), "count_lowest: k must lie in [1, D]");
  switch (scores.scalar_type()) {
    case ScalarType::Float:
      run<float, float>(scores, k, counts, magnitude);
      return {};
    case ScalarType::Double:
      run<double, double>(scores, k, counts, magnitude);
      return {};
    case ScalarType::Half:
      run<torch::headeronly::Half, float>(scores, k, counts, magnitude);
      return {};
    case ScalarType::BFloat16:
      run<torch::headeronly::BFloat16, float>(scores, k, counts, magnitude);
      return {};
    default:
      return "count_lowest: scores must be float64, float32, float16 or bfloat16";
  }
}

}  // namespace
}  // namespace loki

STABLE_TORCH_LIBRARY_IMPL(loki_kernels_cpp, CompositeExplicitAutograd, m) {
  m.impl("count_lowest", TORCH_BOX(&loki::Caught<&loki::count_lowest>::call));
}
