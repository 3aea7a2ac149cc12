/* The kernels with 4 lanes, for any processor (SSE2, NEON). */
#define RUN ulsam_run_base
#define V 4
#include "cpu_kernels.h"
