#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "dtype.h"

namespace loki {

// counts[layer, node] += 1 for the k lowest nodes of every sample and layer. Strides in elements;
// the nodes of `scores` are side by side. 0 < k <= width <= 32,768, samples and layers > 0.
cudaError_t count_lowest(const void* scores, Dtype dtype, int64_t samples, int64_t layers,
                         int width, int64_t scores_sample, int64_t scores_layer, int k,
                         bool magnitude, int64_t* counts, int64_t counts_layer,
                         int64_t counts_node, cudaStream_t stream);

}  // namespace loki
