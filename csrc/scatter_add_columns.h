#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace loki {

// y[n, index[j]] += product[n, j] for distinct columns. Strides in elements; the columns of
// `product` are side by side. rows and k > 0.
cudaError_t scatter_add_columns(void* y, Dtype dtype, int64_t rows, int64_t y_row,
                                int64_t y_column, const int64_t* index, int64_t k,
                                const float* product, int64_t product_row, cudaStream_t stream);

}  // namespace loki
