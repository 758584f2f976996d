#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace loki {

// out[n, j] = x[n, index[j]] for elements of 2 or 4 bytes. Strides in elements; `out` and its rows
// start at multiples of 16 bytes, and what pads a row to one becomes zero. rows and k > 0.
cudaError_t gather_columns(const void* x, int itemsize, int64_t rows, int64_t x_row,
                           int64_t x_column, const int64_t* index, int64_t k, void* out,
                           int64_t out_row, cudaStream_t stream);

}  // namespace loki
