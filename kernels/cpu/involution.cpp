// Involution for one instruction set; see involution.h.
//
// Floors of a pair, forward and backward: 6 K^2 C/G Ho Wo floating-point operations; (2 C/G + K^2) Ho Wo elements moved
// forward and (3 C/G + 2 K^2) Ho Wo backward. At 16 channels a group and K = 7 memory bounds the forward, and memory
// and arithmetic alike the backward: a weight is read once, a row at a time, and the rest of a band stays in the second
// cache.
#include <tuple>

#include "involution_apply.h"
#include "involution_grad_weight.h"

namespace fastib::FASTIB_ISA_NAMESPACE {
namespace {

thread_local Scratch scratch;

// Runs one kind of work, or two side by side, so that the second finds in the cache what the first has read.
template <typename... Works, typename Params>
void run(const Params& params, int64_t begin, int64_t end) {
  std::tuple<Works...> works{Works(params)...};
  std::apply([](auto&... work) { give_memory(scratch, work...); }, works);
  for (int64_t unit = begin; unit < end; ++unit)
    std::apply([unit, later = unit + 1 < end ? unit + 1 : unit](auto&... work) { (work.unit(unit, later), ...); },
               works);
}

}  // namespace

void involution_forward(const InvolutionParams& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { run<InvolutionForward<decltype(element)>>(p, begin, end); });
}

void involution_backward(const InvolutionGradParams& g, int64_t begin, int64_t end) {
  with_element(g.forward.dtype, [&](auto element) {
    using E = decltype(element);
    run<InvolutionGradX<E>, InvolutionGradWeight<E>>(g, begin, end);
  });
}

}  // namespace fastib::FASTIB_ISA_NAMESPACE
