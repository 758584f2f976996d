// A block a row of a layer; the layers' addresses travel in the launch's parameters.
#include "sync_rows.h"

#include <algorithm>

#include "common.cuh"

namespace loki {
namespace {

constexpr int kThreads = 256;
constexpr int kPack = 8;          // elements a thread moves together
constexpr int kMaxSegments = 48;  // a launch; 3 KiB of the 4 KiB that parameters may take

struct Segments {
  RowSegment segment[kMaxSegments];
};

template <typename T, typename U>
__global__ void __launch_bounds__(kThreads) sync_rows_kernel(Segments segments) {
  const RowSegment& segment = segments.segment[blockIdx.y];
  const int row = blockIdx.x;
  if (row >= segment.k) return;
  T* target = static_cast<T*>(segment.weight) + segment.index[row] * segment.weight_row;
  const T* base = static_cast<const T*>(segment.base) + row * segment.base_row;
  const U* update = static_cast<const U*>(segment.update) + row * segment.update_row;
  const bool aligned = (reinterpret_cast<uintptr_t>(target) % alignof(Pack<T, kPack>) == 0) &&
                       (reinterpret_cast<uintptr_t>(base) % alignof(Pack<T, kPack>) == 0) &&
                       (reinterpret_cast<uintptr_t>(update) % alignof(Pack<U, kPack>) == 0);
  const int packed = aligned ? segment.width / kPack * kPack : 0;
  for (int column = threadIdx.x * kPack; column < packed; column += kThreads * kPack) {
    const auto from = *reinterpret_cast<const Pack<T, kPack>*>(base + column);
    const auto by = *reinterpret_cast<const Pack<U, kPack>*>(update + column);
    Pack<T, kPack> out;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      out.value[i] = narrow<T>(widen(from.value[i]) + widen(by.value[i]));
    }
    *reinterpret_cast<Pack<T, kPack>*>(target + column) = out;
  }
  for (int column = packed + threadIdx.x; column < segment.width; column += kThreads) {
    target[column] = narrow<T>(widen(base[column]) + widen(update[column]));
  }
}

}  // namespace

cudaError_t sync_rows(const RowSegment* segments, int count, Dtype weight_dtype, Dtype update_dtype,
                      cudaStream_t stream) {
  for (int first = 0; first < count; first += kMaxSegments) {
    const int size = std::min(kMaxSegments, count - first);
    Segments part{};
    std::copy_n(segments + first, size, part.segment);
    int most = 0;
    for (int i = 0; i < size; ++i) most = std::max(most, part.segment[i].k);
    const dim3 grid(most, size);
    const cudaError_t error = with_type(weight_dtype, [&](auto weight) {
      return with_type(update_dtype, [&](auto update) {
        return launch(sync_rows_kernel<decltype(weight), decltype(update)>, grid, dim3(kThreads), 0,
                      stream, part);
      });
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace loki
