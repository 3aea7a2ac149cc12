/* The best build of the kernels for the processor that this runs on, and the threads and the memory that they use.

   No OpenMP is compiled in: any C compiler will do, and no second library of it, with threads of its own, comes into
   the process. cpu.py hands over the functions of the one that PyTorch has loaded. */

#include "cpu.h"

#include <stdlib.h>
#ifdef _WIN32
#include <windows.h>
#else
#include <pthread.h>
#endif

/* memory */

struct memory {
    size_t size;
    char bytes[];
};

#ifdef _WIN32
static DWORD key;
static INIT_ONCE once = INIT_ONCE_STATIC_INIT;
static void WINAPI free_memory(void *kept) { free(kept); }
static BOOL WINAPI make_key(INIT_ONCE *o, void *p, void **q) { return (key = FlsAlloc(free_memory)) != FLS_OUT_OF_INDEXES; }
static struct memory *get_memory(void) {
    return InitOnceExecuteOnce(&once, make_key, NULL, NULL) ? FlsGetValue(key) : NULL;
}
static int set_memory(struct memory *kept) { return FlsSetValue(key, kept) != 0; }
#else
static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int failed;
static void make_key(void) { failed = pthread_key_create(&key, free); }
static struct memory *get_memory(void) {
    pthread_once(&once, make_key);
    return failed ? NULL : pthread_getspecific(key);
}
static int set_memory(struct memory *kept) { return !failed && pthread_setspecific(key, kept) == 0; }
#endif

void *ulsam_memory(size_t size) {
    struct memory *kept = get_memory();
    if (!kept || kept->size < size) {
        free(kept);
        kept = malloc(sizeof *kept + size + 63);
        if (kept) kept->size = size;
        if (!set_memory(kept)) {
            free(kept);
            kept = NULL;
        }
    }
    return kept ? (void *)(((uintptr_t)kept->bytes + 63) / 64 * 64) : NULL;
}

/* threads */

struct call {
    void (*work)(void *task, int thread, int threads);
    void *task;
};

static struct openmp openmp;

static void one_thread(void *of) {
    const struct call *call = of;
    call->work(call->task, openmp.number(), openmp.count());
}
static void one_llvm_thread(int32_t *global, int32_t *bound, void *of) {
    (void)global, (void)bound;
    one_thread(of);
}

void ulsam_use_openmp(const struct openmp *functions) { openmp = *functions; }

void ulsam_parallel(void (*work)(void *, int, int), void *task, int threads) {
    static struct llvm_place place = {.flags = 2, .source = ";ulsam;ulsam;0;0;;"};
    struct call call = {work, task};
    if (threads > 1 && openmp.gnu_parallel) {
        openmp.gnu_parallel(one_thread, &call, (unsigned)threads, 0);
    } else if (threads > 1 && openmp.llvm_fork) {
        openmp.llvm_push(&place, openmp.llvm_thread(&place), threads);
        openmp.llvm_fork(&place, 1, (void (*)(int32_t *, int32_t *, ...))one_llvm_thread, &call);
    } else {
        work(task, 0, 1);
    }
}

/* the choice */

int ulsam_training_size(void) { return (int)sizeof(struct training); }

int ulsam_isa(void) {
#if defined(__x86_64__) && defined(_WIN32) /* where clang has no library for __builtin_cpu_supports */
    if (IsProcessorFeaturePresent(PF_AVX512F_INSTRUCTIONS_AVAILABLE)) return 3;
    if (IsProcessorFeaturePresent(PF_AVX2_INSTRUCTIONS_AVAILABLE)) return 2;
#elif defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return 3;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 2;
#endif
    return 1;
}

/* Whether AVX2's vectors are filled and twice as wide ones are not: by rows of 7 or 8 pixels; by a group's 20, 24 or 40
   channels, which are pooled at once */
static int fits_avx2(const struct job *job) {
    int64_t G = job->C / job->g;
    if (!job->channels_last) return job->W == 7 || job->W == 8;
    return job->stages & LOGITS && G >= 8 && G < 64 && (G - 1) % 16 < 8;
}

int ulsam_run(const struct job *job) {
    int best = ulsam_isa(), isa = job->isa ? (int)job->isa : best;
    if (isa > best) return -2;
#ifdef __x86_64__
    if (!job->isa && isa == 3 && fits_avx2(job)) isa = 2;
    if (isa == 3) return ulsam_run_avx512(job);
    if (isa == 2) return ulsam_run_avx2(job);
#endif
    return ulsam_run_base(job);
}
