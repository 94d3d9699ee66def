// Element types a kernel can be asked for.
#pragma once

#include <cstdint>

namespace fastib {

enum class DType : int32_t { float32, bfloat16, float16, float64 };

}  // namespace fastib
