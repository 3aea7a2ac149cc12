/* The kernels with 8 lanes. */
#ifdef __x86_64__
#include <immintrin.h>
#define RUN ulsam_run_avx2
#define TARGET "avx2,fma"
#define V 8
#define NATIVE_MAX(a, b) (vf) _mm256_max_ps((__m256)(a), (__m256)(b))
#define LOAD_PART(p, lanes) (vf) _mm256_maskload_ps(p, (__m256i)(lanes))
#include "cpu_kernels.h"
#endif
