// A block a sample and layer: its scores become keys in shared memory, read from memory once.
#include "count_lowest.h"

#include <type_traits>

#include "common.cuh"

namespace loki {

// The keys of one sample's scores in a layer. 4 bytes a node, so 32,768 take 128 KiB.
extern __shared__ uint32_t layer_keys[];

namespace {

// An unsigned integer in the scores' order; -0 ties with 0.
__device__ uint32_t order_key(float score, bool magnitude) {
  if (magnitude) score = fabsf(score);
  if (score == 0.0f) score = 0.0f;
  // A float's bits order like an integer once a negative one's are inverted and the sign bit of
  // the others is set.
  const uint32_t bits = __float_as_uint(score);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The sum of `value` over the threads before this one. A barrier belongs between two calls.
template <int kThreads>
__device__ int exclusive_sum(int value) {
  __shared__ int warp_sums[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int below = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += below;
  }
  if (lane == kWarp - 1) warp_sums[warp] = sum;
  __syncthreads();
  int before = sum - value;
  for (int i = 0; i < warp; ++i) before += warp_sums[i];
  return before;
}

struct Threshold {
  uint32_t key;  // the k-th lowest
  int wanted;    // how many keys equal to it are among the k
  int equal;     // how many there are
};

// Radix select, most significant digit first. Digits of 11 bits, not 8: the first one then holds
// the sign, the whole exponent and two bits more, so scores of similar size do not all queue for
// one counter.
template <int kThreads>
__device__ Threshold find_threshold(int width, int k) {
  constexpr int kBins = 2048;
  constexpr int kShare = kBins / kThreads;
  __shared__ int histogram[kBins];
  __shared__ Threshold found;
  uint32_t prefix = 0, mask = 0;
  int remaining = k;
#pragma unroll
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
    for (int bin = threadIdx.x; bin < kBins; bin += kThreads) histogram[bin] = 0;
    __syncthreads();  // also: layer_keys are written
    const uint32_t digits = (1u << bits) - 1;
    for (int node = threadIdx.x; node < width; node += kThreads) {
      const uint32_t key = layer_keys[node];
      if ((key & mask) == prefix) atomicAdd(&histogram[(key >> shift) & digits], 1);
    }
    __syncthreads();
    int mine = 0;
    for (int i = 0; i < kShare; ++i) mine += histogram[threadIdx.x * kShare + i];
    int before = exclusive_sum<kThreads>(mine);
    if (before < remaining && remaining <= before + mine) {  // one thread's bins hold the k-th
      int bin = threadIdx.x * kShare;
      while (before + histogram[bin] < remaining) before += histogram[bin++];
      found = {prefix | static_cast<uint32_t>(bin) << shift, remaining - before, histogram[bin]};
    }
    __syncthreads();
    prefix = found.key;
    mask |= digits << shift;
    remaining = found.wanted;
  }
  return found;
}

// Adds 1 to counts[node * stride] for the k lowest of layer_keys, equal ones in index order.
template <int kThreads>
__device__ void count_layer(int width, int k, unsigned long long* counts, int64_t stride) {
  const Threshold threshold = find_threshold<kThreads>(width, k);
  if (threshold.wanted == threshold.equal) {  // no tie to decide
    for (int node = threadIdx.x; node < width; node += kThreads) {
      if (layer_keys[node] <= threshold.key) atomicAdd(&counts[node * stride], 1ull);
    }
    return;
  }
  // A warp takes consecutive nodes, so the ties before its own are those of the warps before it.
  constexpr int kWarps = kThreads / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int share = ceil_div(ceil_div(width, kWarps), kWarp) * kWarp;
  const int begin = min(width, warp * share), end = min(width, begin + share);
  int ties = 0;
  for (int start = begin; start < end; start += kWarp) {
    const bool tie = start + lane < end && layer_keys[start + lane] == threshold.key;
    ties += __popc(__ballot_sync(kAllLanes, tie));
  }
  int rank = exclusive_sum<kThreads>(lane == 0 ? ties : 0);
  rank = __shfl_sync(kAllLanes, rank, 0);
  for (int start = begin; start < end; start += kWarp) {
    const int node = start + lane;
    const uint32_t key = node < end ? layer_keys[node] : 0xffffffffu;
    const bool tie = node < end && key == threshold.key;
    const unsigned tied = __ballot_sync(kAllLanes, tie);
    const int before = rank + __popc(tied & ((1u << lane) - 1));
    if (node < end && (key < threshold.key || (tie && before < threshold.wanted))) {
      atomicAdd(&counts[node * stride], 1ull);
    }
    rank += __popc(tied);
  }
}

// Runs `f` with the block size for layers of this width, as a compile-time constant: a wide one
// leaves room for one block on a multiprocessor, which then has to be a large one.
template <typename F>
cudaError_t with_threads(int width, F&& f) {
  return width <= 8192 ? f(std::integral_constant<int, 256>{})
                       : f(std::integral_constant<int, 512>{});
}

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
