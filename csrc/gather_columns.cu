// A thread packs 16 bytes of a row: it reads its columns' numbers once and then row after row.
#include "gather_columns.h"

#include "columns.cuh"

namespace loki {
namespace {

template <typename T>
__global__ void __launch_bounds__(kWarp* kRows)
    gather_columns_kernel(const T* x, int64_t rows, int64_t x_row, int64_t x_column,
                          const int64_t* index, int64_t k, T* out, int64_t out_row) {
  constexpr int kPack = 16 / sizeof(T);
  const int64_t first = column_thread() * kPack;
  if (first >= k) return;
  int64_t column[kPack];
  for (int i = 0; i < kPack; ++i) {
    column[i] = first + i < k ? index[first + i] * x_column : -1;
  }
  for_each_row(rows, [&](int64_t row) {
    Pack<T, kPack> packed;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      packed.value[i] = column[i] >= 0 ? x[row * x_row + column[i]] : T(0);
    }
    *reinterpret_cast<Pack<T, kPack>*>(out + row * out_row + first) = packed;
  });
}

template <typename T>
cudaError_t run(const void* x, int64_t rows, int64_t x_row, int64_t x_column, const int64_t* index,
                int64_t k, void* out, int64_t out_row, cudaStream_t stream) {
  constexpr int64_t kPack = 16 / sizeof(T);
  return launch(gather_columns_kernel<T>, column_grid(ceil_div(k, kPack), rows),
                dim3(kWarp, kRows), 0, stream, static_cast<const T*>(x), rows, x_row, x_column,
                index, k, static_cast<T*>(out), out_row);
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
