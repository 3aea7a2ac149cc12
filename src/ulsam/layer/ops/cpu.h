/* Subspace attention on a CPU: what is asked of the kernels. Filled by cpu.py; the order of the fields is in both. */

#ifndef ULSAM_CPU_H
#define ULSAM_CPU_H

#include <stddef.h>
#include <stdint.h>

/* What to do; several at once stay in the cache. x, y, dy, dx: maps [B, C, H, W] in one layout and type. */
enum {
    LOGITS = 1,     /* x -> l [B, g, H, W]: sum_c weight * relu?(maxpool3x3(scale * x) + shift) + bias */
    MULTIPLY = 2,   /* x, l -> y = x * (1 + softmax(relu?(l))) */
    MAPS_BACK = 4,  /* x, dy, l -> dl, dbias */
    INPUT_BACK = 8, /* x, dy, l, dl -> dx, q, r; gradients: scale weight * q, shift weight * r, weight scale q + shift r */
    MOMENTS = 16,   /* x -> of each image's channels: q the mean, r the sum of squared distances from it */
    ADD = 32,       /* dx += q + r * x, a value a channel */
};

struct job {
    const void *x, *dy;
    void *y, *dx;
    float *l, *dl;                           /* [B, g, H, W]; where a later stage is asked too they may be missing */
    const float *scale, *shift, *weight, *bias; /* [C], [C] or 0, [C], [g] or 0 */
    float *q, *r;                            /* [B, C]; of ADD [C] */
    float *dbias;                            /* [B, g] */
    int64_t B, C, H, W, g;
    int64_t stages, relu, channels_last, bf16, threads;
    int64_t isa; /* 0: the best that the processor has; 1: base, 2: AVX2, 3: AVX-512 */
};

/* A layer's forward or backward pass as a whole. Its job's scale is that before norm1, w, its l the logits before norm2;
   bias, dl, q, r, dbias are not read. */
struct training {
    struct job job;
    const float *gamma, *beta, *gamma2, *beta2;         /* norm1's [C], norm2's [g]: of this batch's statistics; or 0 */
    float *moments;                                     /* [2 C + 2 g]: mean and variance of x's channels, of the logits' */
    float *dscale, *dshift, *dweight, *dbias;           /* [C], [C], [C], [g] */
    float *dgamma, *dbeta, *dgamma2, *dbeta2;           /* as gamma and so on */
    float *memory;                                      /* scratch: floats, as many as cpu.py takes */
    double eps;
};

/* OpenMP's functions, by their names in the libraries: GNU's and LLVM's have both kinds, except LLVM's on Windows, which
   has its own alone. Zeros: one thread. */
struct llvm_place {
    int32_t reserved, flags, more[2];
    const char *source;
};
struct openmp {
    int (*number)(void), (*count)(void);                                           /* omp_get_thread_num, _num_threads */
    void (*gnu_parallel)(void (*)(void *), void *, unsigned threads, unsigned flags); /* GOMP_parallel */
    int32_t (*llvm_thread)(struct llvm_place *);                                   /* __kmpc_global_thread_num */
    void (*llvm_push)(struct llvm_place *, int32_t thread, int32_t threads);       /* __kmpc_push_num_threads */
    void (*llvm_fork)(struct llvm_place *, int32_t arguments, void (*)(int32_t *, int32_t *, ...), ...); /* __kmpc_fork_call */
};

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

/* 0, or -1 when there is no memory, or -2 when the processor lacks the instruction set. */
EXPORT int ulsam_run(const struct job *job);
/* The same of training: forward is for norms alone, as without these it is LOGITS | MULTIPLY. */
EXPORT int ulsam_forward(const struct training *training);
EXPORT int ulsam_backward(const struct training *training);
/* The best instruction set here, as in job.isa. */
EXPORT int ulsam_isa(void);
/* The size of a struct training, for the caller to compare with its own. */
EXPORT int ulsam_training_size(void);
/* The OpenMP to use from now on. */
EXPORT void ulsam_use_openmp(const struct openmp *functions);

/* Calls work on at most so many threads at once, each with its number and how many there are. */
void ulsam_parallel(void (*work)(void *task, int thread, int threads), void *task, int threads);
/* At least so many bytes, a multiple of 64 aligned, that a thread keeps from call to call and frees at its end; or 0. */
void *ulsam_memory(size_t size);

int ulsam_run_base(const struct job *job);
int ulsam_run_avx2(const struct job *job);
int ulsam_run_avx512(const struct job *job);

#endif
