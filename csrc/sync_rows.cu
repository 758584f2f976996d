// A block a row of a layer; the layers' addresses travel in the launch's parameters.
#include "sync_rows.h"

#include <algorithm>
#include <type_traits>

#include "common.cuh"

namespace loki {
namespace {

constexpr int kThreads = 256;
constexpr int kPack = 8;          // elements a thread moves together
constexpr int kMaxSegments = 64;  // a launch; 3.5 KiB of the 4 KiB that parameters may take

struct Segments {
  RowSegment segment[kMaxSegments];
};

__device__ inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Without kStochastic, to the nearest. With it, up or down by chance, so that the rounding error
// is zero on average: 16 random bits are added below the bits that stay.
template <typename T, typename R, bool kStochastic>
__device__ inline T convert(R value, uint32_t stream, int column) {
  if constexpr (kStochastic) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7f800000u) != 0x7f800000u) {  // finite
      const uint32_t noise = mix(stream + column) & 0xffffu;
      return narrow<T>(__uint_as_float((bits + noise) & 0xffff0000u));
    }
  }
  return narrow<T>(widen(value));
}

template <typename T, typename R, bool kStochastic>
__global__ void __launch_bounds__(kThreads)
    sync_rows_kernel(Segments segments, uint32_t seed) {
  const RowSegment& segment = segments.segment[blockIdx.y];
  const int row = blockIdx.x;
  if (row >= segment.k) return;
  T* target = static_cast<T*>(segment.weight) + segment.index[row] * segment.weight_row;
  const R* source = static_cast<const R*>(segment.rows) + row * segment.rows_row;
  const uint32_t stream = mix(mix(seed ^ mix(segment.layer)) + static_cast<uint32_t>(row));
  const bool aligned = (reinterpret_cast<uintptr_t>(target) % alignof(Pack<T, kPack>) == 0) &&
                       (reinterpret_cast<uintptr_t>(source) % alignof(Pack<R, kPack>) == 0);
  const int packed = aligned ? segment.width / kPack * kPack : 0;
  for (int column = threadIdx.x * kPack; column < packed; column += kThreads * kPack) {
    const auto in = *reinterpret_cast<const Pack<R, kPack>*>(source + column);
    Pack<T, kPack> out;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      out.value[i] = convert<T, R, kStochastic>(in.value[i], stream, column + i);
    }
    *reinterpret_cast<Pack<T, kPack>*>(target + column) = out;
  }
  for (int column = packed + threadIdx.x; column < segment.width; column += kThreads) {
    target[column] = convert<T, R, kStochastic>(source[column], stream, column);
  }
}

}  // namespace

cudaError_t sync_rows(const RowSegment* segments, int count, Dtype weight_dtype, Dtype rows_dtype,
                      bool stochastic, uint32_t seed, cudaStream_t stream) {
  for (int first = 0; first < count; first += kMaxSegments) {
    const int size = std::min(kMaxSegments, count - first);
    Segments part{};
    std::copy_n(segments + first, size, part.segment);
    int most = 0;
    for (int i = 0; i < size; ++i) most = std::max(most, part.segment[i].k);
    const dim3 grid(most, size);
    const cudaError_t error = with_type(weight_dtype, [&](auto weight) {
      return with_type(rows_dtype, [&](auto row) {
        using T = decltype(weight);
        using R = decltype(row);
        if constexpr (std::is_same_v<T, __nv_bfloat16> && std::is_same_v<R, float>) {
          if (stochastic) {
            return launch(sync_rows_kernel<T, R, true>, grid, dim3(kThreads), 0, stream, part,
                          seed);
          }
        }
        return stochastic ? cudaErrorInvalidValue
                          : launch(sync_rows_kernel<T, R, false>, grid, dim3(kThreads), 0, stream,
                                   part, seed);
      });
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace loki
