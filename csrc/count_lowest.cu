// A block a sample and layer: its scores become keys in shared memory, read from memory once.
#include "count_lowest.h"

#include "lowest.cuh"

namespace loki {
namespace {

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads)
    count_lowest_kernel(const T* scores, int64_t layers, int width, int64_t scores_sample,
                        int64_t scores_layer, int k, bool magnitude, unsigned long long* counts,
                        int64_t counts_layer, int64_t counts_node) {
  // Layers vary fastest, so that blocks running together add to different counters.
  const int64_t sample = blockIdx.x / layers, layer = blockIdx.x % layers;
  const T* values = scores + sample * scores_sample + layer * scores_layer;
  for (int node = threadIdx.x; node < width; node += kThreads) {
    layer_keys[node] = order_key(widen(values[node]), magnitude);
  }
  count_layer<kThreads>(width, k, counts + layer * counts_layer, counts_node);
}

}  // namespace

cudaError_t count_lowest(const void* scores, Dtype dtype, int64_t samples, int64_t layers,
                         int width, int64_t scores_sample, int64_t scores_layer, int k,
                         bool magnitude, int64_t* counts, int64_t counts_layer,
                         int64_t counts_node, cudaStream_t stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return with_threads(width, [&](auto block) {
      constexpr int kThreads = decltype(block)::value;
      return launch(count_lowest_kernel<T, kThreads>, dim3(samples * layers), dim3(kThreads),
                    width * sizeof(uint32_t), stream, static_cast<const T*>(scores), layers, width,
                    scores_sample, scores_layer, k, magnitude,
                    reinterpret_cast<unsigned long long*>(counts), counts_layer, counts_node);
    });
  });
}

}  // namespace loki
