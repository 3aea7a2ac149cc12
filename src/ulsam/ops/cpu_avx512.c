/* The kernels with 16 lanes. */
#if defined(__x86_64__) && !defined(__clang__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define RUN ulsam_run_avx512
#define V 16
#define NATIVE_MAX(a, b) (vf) _mm512_max_ps((__m512)(a), (__m512)(b))
#define NATIVE_512
#include "cpu_kernels.h"
#endif
