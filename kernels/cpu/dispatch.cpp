#include "dispatch.h"

#include <atomic>

#include "attention_link.h"
#include "cls_attention.h"
#include "depthwise_block.h"
#include "feature_alignment.h"
#include "generalized_conv.h"
#include "generalized_conv_product.h"
#include "head_token_attention.h"
#include "involution.h"
#include "linear.h"
#include "mhca_attention.h"

// Every kernel with a copy per instruction set: X(name, parameters, arguments).
#define FASTIB_KERNELS(X)                                                                                              \
  X(attention_link, (const AttentionLinkParams& params, int64_t begin, int64_t end), (params, begin, end))             \
  X(cls_attention_backward, (const ClsAttentionGradParams& params, int64_t begin, int64_t end), (params, begin, end))  \
  X(cls_attention_forward, (const ClsAttentionParams& params, int64_t begin, int64_t end), (params, begin, end))       \
  X(depthwise_block_backward, (const DepthwiseBlockGradParams& params, BackwardPass pass, int64_t begin, int64_t end), \
    (params, pass, begin, end))                                                                                        \
  X(depthwise_block_backward_resident,                                                                                 \
    (const DepthwiseBlockGradParams& params, const AfterBackward& after, int64_t begin, int64_t end),                  \
    (params, after, begin, end))                                                                                       \
  X(depthwise_block_forward, (const DepthwiseBlockParams& params, ForwardPass pass, int64_t begin, int64_t end),       \
    (params, pass, begin, end))                                                                                        \
  X(depthwise_block_forward_resident,                                                                                  \
    (const DepthwiseBlockParams& params, const AfterForward& after, int64_t begin, int64_t end),                       \
    (params, after, begin, end))                                                                                       \
  X(feature_alignment_forward, (const FeatureAlignmentParams& params, int64_t begin, int64_t end),                     \
    (params, begin, end))                                                                                              \
  X(feature_alignment_backward, (const FeatureAlignmentGradParams& params, int64_t begin, int64_t end),                \
    (params, begin, end))                                                                                              \
  X(generalized_conv_back, (const GeneralizedConvProductParams& params, int64_t begin, int64_t end),                   \
    (params, begin, end))                                                                                              \
  X(generalized_conv_backward, (const GeneralizedConvGradParams& params, int64_t begin, int64_t end),                  \
    (params, begin, end))                                                                                              \
  X(generalized_conv_forward, (const GeneralizedConvProductParams& params, int64_t begin, int64_t end),                \
    (params, begin, end))                                                                                              \
  X(generalized_conv_into, (const GeneralizedConvProductParams& params, int64_t begin, int64_t end),                   \
    (params, begin, end))                                                                                              \
  X(generalized_conv_shift, (const GeneralizedConvShiftParams& params, int64_t begin, int64_t end),                    \
    (params, begin, end))                                                                                              \
  X(generalized_conv_weight, (const GeneralizedConvWeightParams& params, int64_t parts, int64_t begin, int64_t end),   \
    (params, parts, begin, end))                                                                                       \
  X(head_token_attention_backward, (const HeadTokenAttentionGradParams& params, int64_t begin, int64_t end),           \
    (params, begin, end))                                                                                              \
  X(head_token_attention_forward, (const HeadTokenAttentionParams& params, int64_t begin, int64_t end),                \
    (params, begin, end))                                                                                              \
  X(involution_forward, (const InvolutionParams& params, int64_t begin, int64_t end), (params, begin, end))            \
  X(involution_backward, (const InvolutionGradParams& params, int64_t begin, int64_t end), (params, begin, end))       \
  X(linear, (const LinearParams& params, int64_t begin, int64_t end), (params, begin, end))                            \
  X(linear_weight, (const LinearWeightParams& params, int64_t begin, int64_t end), (params, begin, end))               \
  X(mhca_attention_forward, (const MhcaAttentionParams& params, int64_t begin, int64_t end), (params, begin, end))     \
  X(mhca_attention_backward, (const MhcaAttentionGradParams& params, int64_t begin, int64_t end), (params, begin, end))

namespace fastib {

struct KernelTable {
  const char* isa;
  bool (*supported)();
#define FASTIB_FIELD(name, parameters, arguments) void(*name) parameters;
  FASTIB_KERNELS(FASTIB_FIELD)
#undef FASTIB_FIELD
};

#define FASTIB_DECLARE(name, parameters, arguments) void name parameters;
#define FASTIB_ENTRY(name, parameters, arguments) name,
#define FASTIB_TABLE(isa, condition)                                                \
  namespace isa {                                                                   \
  FASTIB_KERNELS(FASTIB_DECLARE)                                                    \
  static bool supported() { return condition; }                                     \
  static const KernelTable table = {#isa, supported, FASTIB_KERNELS(FASTIB_ENTRY)}; \
  }

#ifdef FASTIB_X86
FASTIB_TABLE(isa_v2, true)
FASTIB_TABLE(isa_v3, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                         __builtin_cpu_supports("bmi2"))
FASTIB_TABLE(isa_v4, isa_v3::supported() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vl"))
FASTIB_TABLE(isa_v4_bf16, isa_v4::supported() && __builtin_cpu_supports("avx512bf16"))
static const KernelTable* const kTables[] = {&isa_v2::table, &isa_v3::table, &isa_v4::table, &isa_v4_bf16::table};
#else
FASTIB_TABLE(isa_portable, true)
static const KernelTable* const kTables[] = {&isa_portable::table};
#endif

static const KernelTable* best_table() {
  const KernelTable* best = kTables[0];
  for (const KernelTable* table : kTables) {
    if (table->supported()) best = table;
  }
  return best;
}

static std::atomic<const KernelTable*>& current_table() {
  static std::atomic<const KernelTable*> table{best_table()};
  return table;
}

static std::string short_name(const KernelTable& table) { return std::string(table.isa).substr(sizeof("isa_") - 1); }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : kTables) {
    if (table->supported()) names.push_back(short_name(*table));
  }
  return names;
}

std::string cpu_isa() { return short_name(*current_table().load(std::memory_order_relaxed)); }

bool set_cpu_isa(const std::string& name) {
  for (const KernelTable* table : kTables) {
    if (table->supported() && short_name(*table) == name) {
      current_table().store(table, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

#define FASTIB_DEFINE(name, parameters, arguments) \
  void name parameters { current_table().load(std::memory_order_relaxed)->name arguments; }
FASTIB_KERNELS(FASTIB_DEFINE)

}  // namespace fastib
