// A block a sample: each thread sums its nodes over the path points, and only keys are kept.
#include "count_lowest_integrated.h"

#include "lowest.cuh"

namespace loki {
namespace {

template <int kThreads>
__device__ double block_sum(double value) {
  __shared__ double warp_sums[kThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_down_sync(kAllLanes, value, step);
  }
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) sum += warp_sums[i];
  return sum;
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    count_lowest_integrated_kernel(PathGradients path, int k, bool magnitude,
                                   unsigned long long* counts, int64_t counts_node, double* sums) {
  const int64_t sample = blockIdx.x;
  const T* gradients = static_cast<const T*>(path.gradients) + sample * path.gradients_sample;
  const float* weights = path.weights + sample * path.weights_sample;
  const T* z = path.z ? static_cast<const T*>(path.z) + sample * path.z_sample : nullptr;
  const T* baseline =
      path.baseline ? static_cast<const T*>(path.baseline) + sample * path.baseline_sample : nullptr;
  double sum = 0;
  bool undefined = false;
  for (int node = threadIdx.x; node < path.width; node += kThreads) {
    float score = 0;
    for (int point = 0; point < path.points; ++point) {
      score += weights[point] * widen(gradients[point * path.gradients_point + node]);
    }
    if (z) score *= widen(z[node]) - (baseline ? widen(baseline[node]) : 0.0f);
    layer_keys[node] = order_key(score, magnitude);
    sum += score;
    undefined |= score != score;
  }
  sum = block_sum<kThreads>(sum);
  undefined = __syncthreads_or(undefined);
  // A sum over infinities of both signs is NaN too, though their ranks are sound.
  if (threadIdx.x == 0) sums[sample] = sum;
  if (k > 0 && !undefined) count_layer<kThreads>(path.width, k, counts, counts_node);
}

}  // namespace

cudaError_t count_lowest_integrated(const PathGradients& path, Dtype dtype, int k, bool magnitude,
                                    int64_t* counts, int64_t counts_node, double* sums,
                                    cudaStream_t stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return with_threads(path.width, [&](auto block) {
      constexpr int kThreads = decltype(block)::value;
      return launch(count_lowest_integrated_kernel<T, kThreads>, dim3(path.samples),
                    dim3(kThreads), path.width * sizeof(uint32_t), stream, path, k, magnitude,
                    reinterpret_cast<unsigned long long*>(counts), counts_node, sums);
    });
  });
}

}  // namespace loki
