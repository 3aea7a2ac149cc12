/* The kernels with 16 lanes. */
#ifdef __x86_64__
#include <immintrin.h>
#define RUN ulsam_run_avx512
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#define V 16
#define NATIVE_MAX(a, b) (vf) _mm512_max_ps((__m512)(a), (__m512)(b))
#define NATIVE_512
#include "cpu_kernels.h"
#endif
