// Products of Q5_0 and Q8_0 weights with two or more columns of Q8_0: tokens of prompts, or of several sequences.
//
// llama.cpp's kernels for these types (llamafile/sgemm.cpp) unpack the weights again for every few columns, and add up the
// products of 32 values within a register. Here, a panel of 16 rows (8 with AVX-VNNI) is unpacked once for all
// columns and transposed, so that each lane of a register belongs to one row; then vpdpbusd multiplies it with the
// broadcast values of a column. Meanwhile the next panel is fetched from memory. Numbers: benchmarks/LOG.md.
//
// The result for a row and a column does not depend on the other columns. A single column is left to llama.cpp: transposing
// takes longer there than it saves.

#include "block_gemm.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) || defined(__AVXVNNI__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "quants.h"
#include "simd-mappings.h"

namespace {

constexpr int GROUPS = QK8_0 / 4;  // of four values in a block

// Unpack the 32 values of a block to bytes, increased by `offset` so that they are not negative.
template <typename Block> struct Unpacker;

template <> struct Unpacker<block_q5_0> {
    static constexpr int offset = 16;
    static __m256i unpack(const block_q5_0 & block) {
        const __m128i bytes = _mm_loadu_si128((const __m128i *) block.qs);
        const __m256i values = _mm256_and_si256(
            _mm256_inserti128_si256(_mm256_castsi128_si256(bytes), _mm_srli_epi16(bytes, 4), 1), _mm256_set1_epi8(15));
        int bits;
        memcpy(&bits, block.qh, 4);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
        return _mm256_mask_add_epi8(values, (__mmask32) bits, values, _mm256_set1_epi8(16));
#else
        // Byte i of the result tests bit i % 8 of byte i / 8 of the high bits.
        const __m256i spread = _mm256_shuffle_epi8(
            _mm256_set1_epi32(bits), _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0));
        const __m256i mask = _mm256_set1_epi64x((int64_t) 0x8040201008040201);
        const __m256i is_high = _mm256_cmpeq_epi8(_mm256_and_si256(spread, mask), mask);
        return _mm256_or_si256(values, _mm256_and_si256(is_high, _mm256_set1_epi8(16)));
#endif
    }
};

template <> struct Unpacker<block_q8_0> {
    static constexpr int offset = 128;
    static __m256i unpack(const block_q8_0 & block) {
        return _mm256_xor_si256(_mm256_loadu_si256((const __m256i *) block.qs), _mm256_set1_epi8((char) 0x80));
    }
};

#if defined(__AVX512VNNI__)

constexpr int ROWS = 16, MAX_COLUMNS = 12;
using Integers = __m512i;
using Floats = __m512;

inline Integers zip32_low(Integers a, Integers b) { return _mm512_unpacklo_epi32(a, b); }
inline Integers zip32_high(Integers a, Integers b) { return _mm512_unpackhi_epi32(a, b); }
inline Integers zip64_low(Integers a, Integers b) { return _mm512_unpacklo_epi64(a, b); }
inline Integers zip64_high(Integers a, Integers b) { return _mm512_unpackhi_epi64(a, b); }
inline Integers even_quarters(Integers a, Integers b) { return _mm512_shuffle_i64x2(a, b, 0x88); }
inline Integers odd_quarters(Integers a, Integers b) { return _mm512_shuffle_i64x2(a, b, 0xdd); }
inline Integers broadcast(int value) { return _mm512_set1_epi32(value); }
inline Floats broadcast(float value) { return _mm512_set1_ps(value); }
inline Integers add_products(Integers sum, Integers a, Integers b) { return _mm512_dpbusd_epi32(sum, a, b); }
inline Floats add_scaled(Floats sum, Integers a, Floats scale) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), scale, sum);
}
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats load_halves(const ggml_half * values) { return _mm512_cvtph_ps(_mm256_load_si256((const __m256i *) values)); }

// A register holds a block of two rows, 8 apart; transposed, it has the rows 0-3, 8-11, 4-7, 12-15.
template <typename Block> Integers unpack_rows(const Block * const * rows, int i, int64_t block) {
    const __m256i low = Unpacker<Block>::unpack(rows[i][block]), high = Unpacker<Block>::unpack(rows[i + 8][block]);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
constexpr int ROW_OF_LANE[ROWS] = {0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15};
inline void store(float * out, int n_rows, Floats values) {
    _mm512_mask_storeu_ps(out, (__mmask16) ((1u << n_rows) - 1), _mm512_shuffle_f32x4(values, values, 0xd8));
}
inline __m256i add_products(__m256i sum, __m256i a, __m256i b) { return _mm256_dpbusd_epi32(sum, a, b); }

#else

constexpr int ROWS = 8, MAX_COLUMNS = 6;
using Integers = __m256i;
using Floats = __m256;

inline Integers zip32_low(Integers a, Integers b) { return _mm256_unpacklo_epi32(a, b); }
inline Integers zip32_high(Integers a, Integers b) { return _mm256_unpackhi_epi32(a, b); }
inline Integers zip64_low(Integers a, Integers b) { return _mm256_unpacklo_epi64(a, b); }
inline Integers zip64_high(Integers a, Integers b) { return _mm256_unpackhi_epi64(a, b); }
inline Integers even_quarters(Integers a, Integers b) { return _mm256_permute2x128_si256(a, b, 0x20); }
inline Integers odd_quarters(Integers a, Integers b) { return _mm256_permute2x128_si256(a, b, 0x31); }
inline Integers broadcast(int value) { return _mm256_set1_epi32(value); }
inline Floats broadcast(float value) { return _mm256_set1_ps(value); }
inline Integers add_products(Integers sum, Integers a, Integers b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
inline Floats add_scaled(Floats sum, Integers a, Floats scale) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), scale, sum);
}
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats load_halves(const ggml_half * values) { return _mm256_cvtph_ps(_mm_load_si128((const __m128i *) values)); }

template <typename Block> Integers unpack_rows(const Block * const * rows, int i, int64_t block) {
    return Unpacker<Block>::unpack(rows[i][block]);
}
constexpr int ROW_OF_LANE[ROWS] = {0, 1, 2, 3, 4, 5, 6, 7};
inline void store(float * out, int n_rows, Floats values) {
    alignas(32) float buffer[ROWS];
    _mm256_store_ps(buffer, values);
    memcpy(out, buffer, n_rows * sizeof(float));
}

#endif

// A block of each row of a panel: four values of each row per group, and the scales.
struct alignas(64) PanelBlock {
    Integers values[GROUPS];
    ggml_half scales[ROWS];
};

// A block of a column: its scale, and the sum of its values times -offset, which undoes the offset of the weights.
struct ColumnBlock {
    float scale;
    int correction;
};

// Transpose four registers of rows: in each quarter of the result, register i has group i of the quarter's rows.
inline void transpose(Integers v[4]) {
    const Integers a = zip32_low(v[0], v[1]), b = zip32_high(v[0], v[1]);
    const Integers c = zip32_low(v[2], v[3]), d = zip32_high(v[2], v[3]);
    v[0] = zip64_low(a, c);
    v[1] = zip64_high(a, c);
    v[2] = zip64_low(b, d);
    v[3] = zip64_high(b, d);
}

// Unpack `n_rows` rows; if there are fewer than ROWS, the last one is repeated.
template <typename Block>
void unpack_panel(const Block * weights, int64_t stride, int n_rows, int64_t k, PanelBlock * panel) {
    const Block * rows[ROWS];
    for (int i = 0; i < ROWS; i++) {
        rows[i] = weights + std::min(i, n_rows - 1) * stride;
    }
    for (int64_t block = 0; block < k; block++) {
        for (int i = 0; i < ROWS; i++) {  // the hardware prefetcher cannot follow this many rows
            _mm_prefetch((const char *) (rows[i] + block) + ROWS * stride * sizeof(Block), _MM_HINT_T0);
            panel[block].scales[i] = rows[ROW_OF_LANE[i]][block].d;
        }
        Integers v[8];
        for (int i = 0; i < 8; i++) {
            v[i] = unpack_rows(rows, i, block);
        }
        transpose(v);
        transpose(v + 4);
        for (int i = 0; i < 4; i++) {
            panel[block].values[i] = even_quarters(v[i], v[i + 4]);
            panel[block].values[i + 4] = odd_quarters(v[i], v[i + 4]);
        }
    }
}

inline int sum_values(const block_q8_0 & block) {
    const __m256i values = _mm256_loadu_si256((const __m256i *) block.qs);
    const __m256i fours = add_products(_mm256_setzero_si256(), _mm256_set1_epi8(1), values);
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

// Multiply a panel with N columns.
template <int N>
void multiply_columns(const PanelBlock * panel, const ColumnBlock * columns, const block_q8_0 * b, int64_t stride,
                      int64_t k, float * out, int64_t out_stride, int n_rows) {
    Floats sums[N];
    for (int j = 0; j < N; j++) {
        sums[j] = broadcast(0.0f);
    }
    for (int64_t block = 0; block < k; block++) {
        Integers products[N];
        for (int j = 0; j < N; j++) {
            products[j] = broadcast(columns[j * k + block].correction);
        }
        for (int group = 0; group < GROUPS; group++) {
            const Integers weights = panel[block].values[group];
            for (int j = 0; j < N; j++) {
                int four_values;
                memcpy(&four_values, b[j * stride + block].qs + 4 * group, 4);
                products[j] = add_products(products[j], weights, broadcast(four_values));
            }
        }
        const Floats row_scales = load_halves(panel[block].scales);
        for (int j = 0; j < N; j++) {
            sums[j] = add_scaled(sums[j], products[j], multiply(row_scales, broadcast(columns[j * k + block].scale)));
        }
    }
    for (int j = 0; j < N; j++) {
        store(out + j * out_stride, n_rows, sums[j]);
    }
}

template <int N, typename... Arguments> void multiply_up_to(int count, Arguments... arguments) {
    if (count == N) {
        multiply_columns<N>(arguments...);
    } else if constexpr (N > 1) {
        multiply_up_to<N - 1>(count, arguments...);
    }
}

template <typename Block>
void multiply_matrix(const ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const Block * a, int64_t lda,
                     const block_q8_0 * b, int64_t ldb, float * c, int64_t ldc) {
    thread_local std::vector<PanelBlock> panel;
    thread_local std::vector<ColumnBlock> columns;
    panel.resize(k);
    columns.resize(n * k);
    for (int64_t i = 0; i < n * k; i++) {
        const block_q8_0 & block = b[i / k * ldb + i % k];
        columns[i] = {GGML_CPU_FP16_TO_FP32(block.d), -Unpacker<Block>::offset * sum_values(block)};
    }
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    // Four chunks per thread: each reads a long piece of memory, and a fast core takes more of them.
    const int64_t panels = (m + ROWS - 1) / ROWS, chunks = std::min<int64_t>(panels, params->nth * 4);
    const int64_t parts = (n + MAX_COLUMNS - 1) / MAX_COLUMNS;
    for (int64_t chunk = params->ith; chunk < chunks; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        for (int64_t row = chunk * panels / chunks * ROWS; row < (chunk + 1) * panels / chunks * ROWS; row += ROWS) {
            const int n_rows = (int) std::min<int64_t>(ROWS, m - row);
            unpack_panel(a + row * lda, lda, n_rows, k, panel.data());
            for (int64_t part = 0; part < parts; part++) {
                const int64_t first = part * n / parts;
                const int count = (int) ((part + 1) * n / parts - first);
                multiply_up_to<MAX_COLUMNS>(count, panel.data(), &columns[first * k], b + first * ldb, ldb, k,
                                            c + first * ldc + row, ldc, n_rows);
            }
        }
    }
    ggml_barrier(params->threadpool);  // a node with several matrices resets the counter
}

}  // namespace

bool block_gemm(const ggml_compute_params * params, int64_t m, int64_t n, int64_t k, const void * a, int64_t lda,
                const void * b, int64_t ldb, void * c, int64_t ldc, int a_type, int b_type) {
    if (b_type != GGML_TYPE_Q8_0 || n < 2) {
        return false;
    }
    const auto columns = (const block_q8_0 *) b;
    if (a_type == GGML_TYPE_Q5_0) {
        multiply_matrix(params, m, n, k, (const block_q5_0 *) a, lda, columns, ldb, (float *) c, ldc);
        return true;
    }
    if (a_type == GGML_TYPE_Q8_0) {
        multiply_matrix(params, m, n, k, (const block_q8_0 *) a, lda, columns, ldb, (float *) c, ldc);
        return true;
    }
    return false;
}

#else

bool block_gemm(const ggml_compute_params *, int64_t, int64_t, int64_t, const void *, int64_t, const void *, int64_t,
                void *, int64_t, int, int) {
    return false;
}

#endif
