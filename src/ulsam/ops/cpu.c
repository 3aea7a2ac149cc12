/* The best build of the kernels for the processor that this runs on. */

#include <pthread.h>
#include <stdlib.h>

#include "cpu.h"

struct memory {
    size_t size;
    _Alignas(64) char bytes[];
};

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void make_key(void) { pthread_key_create(&key, free); }

void *ulsam_memory(size_t size) {
    pthread_once(&once, make_key);
    struct memory *kept = pthread_getspecific(key);
    if (!kept || kept->size < size) {
        free(kept);
        kept = aligned_alloc(64, (sizeof *kept + size + 63) / 64 * 64);
        if (kept) kept->size = size;
        pthread_setspecific(key, kept);
    }
    return kept ? kept->bytes : NULL;
}

int ulsam_job_size(void) { return (int)sizeof(struct job); }

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
