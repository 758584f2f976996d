#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace loki {

// One layer: weight[index[r], :] = base[r, :] + update[r, :]. Strides in elements; the columns of all
// three matrices are side by side.
struct RowSegment {
  void* weight;
  const void* base;
  const void* update;
  const int64_t* index;
  int64_t weight_row, base_row, update_row;
  int k, width;
};

// All layers, summed in float32 and rounded to the nearest. count > 0, every k and width > 0. The
// base has the weights' dtype.
cudaError_t sync_rows(const RowSegment* segments, int count, Dtype weight_dtype, Dtype update_dtype,
                      cudaStream_t stream);

}  // namespace loki
