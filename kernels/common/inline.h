// FASTIB_INLINE: a small host-and-device function with internal linkage, since the same header is compiled at several
// instruction sets and the linker must never pick a copy that this machine cannot run.
#pragma once

#if defined(__CUDACC__)
#define FASTIB_INLINE static __host__ __device__ __forceinline__
#else
#define FASTIB_INLINE [[maybe_unused]] static inline __attribute__((always_inline))
#endif
