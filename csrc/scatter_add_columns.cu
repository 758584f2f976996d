// A thread adds to one column: it reads the column's number once and then row after row.
#include "scatter_add_columns.h"

#include "columns.cuh"

namespace loki {
namespace {

template <typename T>
__global__ void __launch_bounds__(kWarp* kRows)
    scatter_add_columns_kernel(T* y, int64_t rows, int64_t y_row, int64_t y_column,
                               const int64_t* index, int64_t k, const float* product,
                               int64_t product_row) {
  const int64_t j = column_thread();
  if (j >= k) return;
  T* column = y + index[j] * y_column;
  for_each_row(rows, [&](int64_t row) {
    T& target = column[row * y_row];
    target = narrow<T>(widen(target) + product[row * product_row + j]);
  });
}

}  // namespace

cudaError_t scatter_add_columns(void* y, Dtype dtype, int64_t rows, int64_t y_row,
                                int64_t y_column, const int64_t* index, int64_t k,
                                const float* product, int64_t product_row, cudaStream_t stream) {
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return launch(scatter_add_columns_kernel<T>, column_grid(k, rows), dim3(kWarp, kRows), 0,
                  stream, static_cast<T*>(y), rows, y_row, y_column, index, k, product,
                  product_row);
  });
}

}  // namespace loki
