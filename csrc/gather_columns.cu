// A thread packs 16 bytes of a row: it reads its columns' numbers once and then row after row.
#include "gather_columns.h"

#include "common.cuh"

namespace loki {
namespace {

constexpr int kRows = 8;    // rows a block has in flight, one a warp
constexpr int kRounds = 4;  // rows a thread takes

template <typename T>
__global__ void __launch_bounds__(kWarp* kRows)
    gather_columns_kernel(const T* x, int64_t rows, int64_t x_row, int64_t x_column,
                          const int64_t* index, int64_t k, T* out, int64_t out_row) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x) * kPack;
  if (first >= k) return;
  int64_t column[kPack];
  for (int i = 0; i < kPack; ++i) {
    column[i] = first + i < k ? index[first + i] * x_column : -1;
  }
  const int64_t step = static_cast<int64_t>(gridDim.y) * kRows * kRounds;
  for (int64_t start = static_cast<int64_t>(blockIdx.y) * kRows * kRounds; start < rows;
       start += step) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int64_t row = start + round * kRows + threadIdx.y;
      if (row >= rows) break;
      Pack<T, kPack> packed;
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        packed.value[i] = column[i] >= 0 ? x[row * x_row + column[i]] : T(0);
      }
      *reinterpret_cast<Pack<T, kPack>*>(out + row * out_row + first) = packed;
    }
  }
}

template <typename T>
cudaError_t run(const void* x, int64_t rows, int64_t x_row, int64_t x_column, const int64_t* index,
                int64_t k, void* out, int64_t out_row, cudaStream_t stream) {
  constexpr int64_t kPack = 16 / sizeof(T), kMaxGridY = 65535;
  const int64_t tiles = ceil_div(rows, int64_t{kRows * kRounds});
  const dim3 grid(ceil_div(k, kPack * kWarp), tiles < kMaxGridY ? tiles : kMaxGridY);
  return launch(gather_columns_kernel<T>, grid, dim3(kWarp, kRows), 0, stream,
                static_cast<const T*>(x), rows, x_row, x_column, index, k, static_cast<T*>(out),
                out_row);
}

}  // namespace

cudaError_t gather_columns(const void* x, int itemsize, int64_t rows, int64_t x_row,
                           int64_t x_column, const int64_t* index, int64_t k, void* out,
                           int64_t out_row, cudaStream_t stream) {
  switch (itemsize) {
    case 2:
      return run<uint16_t>(x, rows, x_row, x_column, index, k, out, out_row, stream);
    case 4:
      return run<uint32_t>(x, rows, x_row, x_column, index, k, out, out_row, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace loki
