// The element types that every kernel takes.
#pragma once

namespace loki {

enum class Dtype { float32, float16, bfloat16 };

}  // namespace loki
