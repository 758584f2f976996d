#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace loki {

// One layer: weight[index[r], :] = rows[r, :]. Strides in elements; both matrices' columns are side
// by side.
struct RowSegment {
  void* weight;
  const void* rows;
  const int64_t* index;
  int64_t weight_row, rows_row;
  int k, width;
};

// All layers, rounded to the nearest. count > 0, every k and width > 0.
cudaError_t sync_rows(const RowSegment* segments, int count, Dtype weight_dtype, Dtype rows_dtype,
                      cudaStream_t stream);

}  // namespace loki
