#pragma once

#include <cstdint>

struct ggml_compute_params;

// Compute c = a^T b as llamafile_sgemm does (llamafile/sgemm.cpp), or return false. Columns have k blocks.
bool block_gemm(const ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * a, int64_t lda,
                const void * b, int64_t ldb, void * c, int64_t ldc, int a_type, int b_type);
