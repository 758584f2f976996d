// Blocks of kWarp threads across the columns that take rows one after another: a thread works out
// its columns once for all of them.
#pragma once

#include "common.cuh"

namespace loki {

constexpr int kRows = 8;    // rows a block has in flight, one a warp
constexpr int kRounds = 4;  // rows a thread takes

// A grid for `threads` across the columns.
inline dim3 column_grid(int64_t threads, int64_t rows) {
  constexpr int64_t kMaxGridY = 65535;
  const int64_t tiles = ceil_div(rows, int64_t{kRows * kRounds});
  return dim3(ceil_div(threads, int64_t{kWarp}), tiles < kMaxGridY ? tiles : kMaxGridY);
}

// This thread's place across the columns.
__device__ inline int64_t column_thread() {
  return static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
}

// f(row) for every row that this thread takes.
template <typename F>
__device__ inline void for_each_row(int64_t rows, F&& f) {
  const int64_t step = static_cast<int64_t>(gridDim.y) * kRows * kRounds;
  for (int64_t start = static_cast<int64_t>(blockIdx.y) * kRows * kRounds; start < rows;
       start += step) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int64_t row = start + round * kRows + threadIdx.y;
      if (row >= rows) break;
      f(row);
    }
  }
}

}  // namespace loki
