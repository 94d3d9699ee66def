// STABLE_TORCH_ERROR_CODE_CHECK, whose message says what torch said, where the headers of torch 2.11 lack it.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif
