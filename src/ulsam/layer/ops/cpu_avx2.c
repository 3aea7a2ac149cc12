/* The kernels with 8 lanes. */
#ifdef __x86_64__
#include <immintrin.h>
#define RUN ulsam_run_avx2
#define TARGET "avx2,fma"
#define V 8
#define NATIVE_MAX(a, b) (vf) _mm256_max_ps((__m256)(a), (__m256)(b))
#define LOAD_PART(p, lanes) (vf) _mm256_maskload_ps(p, (__m256i)(lanes))
#define NATIVE_256
#define UNPACK_LOW(a, b) (vf) _mm256_unpacklo_ps((__m256)(a), (__m256)(b)) /* of each half a0 b0 a1 b1 */
#define UNPACK_HIGH(a, b) (vf) _mm256_unpackhi_ps((__m256)(a), (__m256)(b))
#define PAIRS_LOW(a, b) (vf) _mm256_shuffle_ps((__m256)(a), (__m256)(b), 0x44) /* of each half a0 a1 b0 b1 */
#define PAIRS_HIGH(a, b) (vf) _mm256_shuffle_ps((__m256)(a), (__m256)(b), 0xee)
#define HALVES_LOW(a, b) (vf) _mm256_permute2f128_ps((__m256)(a), (__m256)(b), 0x20) /* the halves of a and of b */
#define HALVES_HIGH(a, b) (vf) _mm256_permute2f128_ps((__m256)(a), (__m256)(b), 0x31)
#include "cpu_kernels.h"
#endif
