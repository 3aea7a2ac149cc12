/* The kernels with 8 lanes. */
#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>
#pragma GCC target("avx2,fma")
#define RUN ulsam_run_avx2
#define V 8
#define NATIVE_MAX(a, b) (vf) _mm256_max_ps((__m256)(a), (__m256)(b))
#include "cpu_kernels.h"
#endif
