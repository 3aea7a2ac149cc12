/* The best build of the kernels for the processor that this runs on. */

#include "cpu.h"

int ulsam_isa(void) {
#if defined(__x86_64__) && !defined(__clang__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return 3;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 2;
#endif
    return 1;
}

int ulsam_run(const struct job *job) {
    int best = ulsam_isa(), isa = job->isa ? (int)job->isa : best;
    if (isa > best) return -2;
#if defined(__x86_64__) && !defined(__clang__)
    if (isa == 3) return ulsam_run_avx512(job);
    if (isa == 2) return ulsam_run_avx2(job);
#endif
    return ulsam_run_base(job);
}
