#include "involution_launch.cuh"

FASTIB_INVOLUTION_OF(fastib::bfloat16)
