#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace loki {

struct PathGradients {
  const void* gradients;  // [samples, points, width], nodes side by side
  int64_t gradients_sample, gradients_point;
  const float* weights;  // [samples, points], points side by side
  int64_t weights_sample;
  const void* z;  // [samples, width] in the gradients' type, or null
  int64_t z_sample;
  const void* baseline;  // the same
  int64_t baseline_sample;
  int64_t samples;
  int points, width;
};

// The scores of integrate_path go from the path gradients straight into count_lowest; sums[sample]
// receives their sum. A sample with a NaN score counts nothing and its sum is NaN.
// 0 <= k <= width <= 32,768, samples > 0.
cudaError_t count_lowest_integrated(const PathGradients& path, Dtype dtype, int k, bool magnitude,
                                    int64_t* counts, int64_t counts_node, double* sums,
                                    cudaStream_t stream);

}  // namespace loki
