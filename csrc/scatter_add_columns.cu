// A thread adds to one column: it reads the column's number once and then row after row.
#include "scatter_add_columns.h"

#include "common.cuh"

namespace loki {
namespace {

constexpr int kRows = 8;    // rows a block has in flight, one a warp
constexpr int kRounds = 4;  // rows a thread takes

template <typename T>
__global__ void __launch_bounds__(kWarp* kRows)
    scatter_add_columns_kernel(T* y, int64_t rows, int64_t y_row, int64_t y_column,
                               const int64_t* index, int64_t k, const float* product,
                               int64_t product_row) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x;
  if (j >= k) return;
  T* column = y + index[j] * y_column;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kRows * kRounds;
  for (int64_t start = static_cast<int64_t>(blockIdx.y) * kRows * kRounds; start < rows;
       start += step) {
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
      const int64_t row = start + round * kRows + threadIdx.y;
      if (row >= rows) break;
      T& target = column[row * y_row];
      target = narrow<T>(widen(target) + product[row * product_row + j]);
    }
  }
}

}  // namespace

cudaError_t scatter_add_columns(void* y, Dtype dtype, int64_t rows, int64_t y_row,
                                int64_t y_column, const int64_t* index, int64_t k,
                                const float* product, int64_t product_row, cudaStream_t stream) {
  constexpr int64_t kMaxGridY = 65535;
  const int64_t tiles = ceil_div(rows, int64_t{kRows * kRounds});
  const dim3 grid(ceil_div(k, int64_t{kWarp}), tiles < kMaxGridY ? tiles : kMaxGridY);
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return launch(scatter_add_columns_kernel<T>, grid, dim3(kWarp, kRows), 0, stream,
                  static_cast<T*>(y), rows, y_row, y_column, index, k, product, product_row);
  });
}

}  // namespace loki
