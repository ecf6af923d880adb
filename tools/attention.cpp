// Attention with an online softmax ("flash attention", https://arxiv.org/abs/2205.14135), over the cells of the KV cache that
// at least one of the tokens sees.
//
// llama.cpp's own node (ops.cpp, ggml_compute_forward_flash_attn_ext) transposes the keys value by value for every 64
// tokens of every head, reads the cells of all sequences one by one for a single token, and shares nothing between the
// heads that have the same keys. Here, cells that no token sees are left out first. The others are multiplied in blocks
// in which each lane of a register is one query, so that neither keys, values nor sums have to be transposed. Numbers:
// benchmarks/LOG.md.

#include "attention.h"

#if defined(__GNUC__)
#define EXPORT extern "C" __attribute__((visibility("default")))
#else
#define EXPORT extern "C"
#endif

#if defined(__GNUC__) && (defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)))

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "simd-mappings.h"
#include "vec.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, VECTORS = 4;
using Floats = __m512;
inline Floats load(const float * p) { return _mm512_loadu_ps(p); }
inline void store(float * p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats load_halves(const ggml_fp16_t * p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline float sum_lanes(Floats x) { return _mm512_reduce_add_ps(x); }
#else
constexpr int LANES = 8, VECTORS = 2;
using Floats = __m256;
inline Floats load(const float * p) { return _mm256_loadu_ps(p); }
inline void store(float * p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats load_halves(const ggml_fp16_t * p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)); }
inline Floats broadcast(float x) { return _mm256_set1_ps(x); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline float sum_lanes(Floats x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
#endif

constexpr int CELLS = 64;       // per block
constexpr int MAX_ROWS = 128;   // queries at once: tokens times heads
constexpr int FEW = 4;          // too few rows to use a lane for each
constexpr int ROW_BLOCK = 4;    // rows of A in registers
constexpr float LOWEST = -1e30f;  // lower than any score, but finite: the difference of two infinities is undefined
constexpr ggml_fp16_t DEAD = 0xfc00;  // the mask's -infinity

// The dimensions of a node, and what a thread works on at a time: some tokens, and some heads with the same keys.
struct Attention {
    const ggml_tensor * q, * k, * v, * mask;
    float * out;
    float scale;
    int64_t size, n_tokens, n_cells, n_heads, n_kv_heads;  // `size` of a head
    int heads, tokens;  // per item

    int group() const { return (int) (n_heads / n_kv_heads); }
    int64_t head_parts() const { return (group() + heads - 1) / heads; }
    int64_t token_parts() const { return (n_tokens + tokens - 1) / tokens; }
    int64_t items() const { return n_kv_heads * head_parts() * token_parts(); }
    const ggml_fp16_t * mask_of(int64_t token) const {
        return (const ggml_fp16_t *) ((const char *) mask->data + token * mask->nb[1]);
    }
    const float * query(int64_t token, int64_t head) const {
        return (const float *) ((const char *) q->data + token * q->nb[1] + head * q->nb[2]);
    }
    const ggml_fp16_t * cell(const ggml_tensor * t, int64_t cell, int64_t kv_head) const {
        return (const ggml_fp16_t *) ((const char *) t->data + cell * t->nb[1] + kv_head * t->nb[2]);
    }
    float * result(int64_t token, int64_t head) const { return out + (token * n_heads + head) * size; }
};

struct Buffers {
    std::vector<int> cells;  // seen by at least one token
    std::vector<uint16_t> seen, masked;  // for each cell of the cache, see scan_mask
    std::vector<float> queries;         // [size][rows]
    std::vector<float> keys, values;    // [CELLS][size]
    std::vector<float> scores;          // [CELLS][rows]
    std::vector<float> mask;            // [CELLS][tokens]
    std::vector<float> sums;            // [size][rows]
    float highest[MAX_ROWS], total[MAX_ROWS], factor[MAX_ROWS];
};

// Note which cells a token sees: bits of `seen` and of `masked` are set if any token sees the cell, or does not see it fully.
void scan_mask(const ggml_fp16_t * __restrict mask, int64_t n, uint16_t * __restrict seen, uint16_t * __restrict masked) {
    for (int64_t i = 0; i < n; i++) {
        seen[i] |= mask[i] ^ DEAD;
        masked[i] |= mask[i];
    }
}

// List the cells that at least one of the tokens sees.
void list_cells(const Attention & a, int64_t first_token, int n_tokens, Buffers & buffers) {
    buffers.seen.assign(a.n_cells, 0);
    buffers.masked.assign(a.n_cells, 0);
    for (int t = 0; t < n_tokens; t++) {
        scan_mask(a.mask_of(first_token + t), a.n_cells, buffers.seen.data(), buffers.masked.data());
    }
    buffers.cells.clear();
    for (int64_t i = 0; i < a.n_cells; i++) {
        if (buffers.seen[i]) {
            buffers.cells.push_back((int) i);
        }
    }
}

// Compute C = C * factor + A B for N vectors of columns. A[i][k] is at a[i * row + k * column]; `width` columns in B and C.
template <int N>
void multiply_block(float * c, const float * factor, const float * a, int64_t row, int64_t column, const float * b, int width,
                    int depth) {
    Floats sums[ROW_BLOCK][N];
    for (int i = 0; i < ROW_BLOCK; i++) {
        for (int j = 0; j < N; j++) {
            sums[i][j] = factor ? load(c + i * width + j * LANES) * load(factor + j * LANES) : broadcast(0.0f);
        }
    }
    for (int k = 0; k < depth; k++) {
        Floats columns[N];
        for (int j = 0; j < N; j++) {
            columns[j] = load(b + (int64_t) k * width + j * LANES);
        }
        for (int i = 0; i < ROW_BLOCK; i++) {
            const Floats x = broadcast(a[i * row + k * column]);
            for (int j = 0; j < N; j++) {
                sums[i][j] = multiply_add(x, columns[j], sums[i][j]);
            }
        }
    }
    for (int i = 0; i < ROW_BLOCK; i++) {
        for (int j = 0; j < N; j++) {
            store(c + i * width + j * LANES, sums[i][j]);
        }
    }
}

template <int N, typename... Arguments> void multiply_up_to(int count, Arguments... arguments) {
    if (count == N) {
        multiply_block<N>(arguments...);
    } else if constexpr (N > 1) {
        multiply_up_to<N - 1>(count, arguments...);
    }
}

void multiply(float * c, const float * factor, const float * a, int64_t row, int64_t column, const float * b, int n_rows,
              int width, int depth) {
    for (int j = 0; j < width; j += VECTORS * LANES) {
        const int count = std::min(VECTORS, (width - j) / LANES);
        for (int i = 0; i < n_rows; i += ROW_BLOCK) {
            multiply_up_to<VECTORS>(count, c + i * width + j, factor ? factor + j : nullptr, a + i * row, row, column, b + j,
                                    width, depth);
        }
    }
}

// Replace scores by exp(score - highest), and note by which factor earlier sums shrink.
void update_softmax(const Attention & a, Buffers & buffers, int n_cells, int width, bool is_masked) {
    for (int j = 0; j < width; j += LANES) {
        float * scores = buffers.scores.data() + j;
        const float * mask = buffers.mask.data() + j % a.tokens;
        const Floats old = load(buffers.highest + j);
        Floats highest = old;
        for (int i = 0; i < n_cells; i++) {
            Floats x = load(scores + i * width);
            if (is_masked) {
                x = x + (a.tokens == 1 ? broadcast(buffers.mask[i]) : load(mask + i * a.tokens));
                store(scores + i * width, x);
            }
            highest = maximum(highest, x);
        }
        const Floats factor = ggml_v_expf(old - highest);
        Floats total = load(buffers.total + j) * factor;
        for (int i = 0; i < n_cells; i++) {
            const Floats x = ggml_v_expf(load(scores + i * width) - highest);
            store(scores + i * width, x);
            total = total + x;
        }
        store(buffers.highest + j, highest);
        store(buffers.factor + j, factor);
        store(buffers.total + j, total);
    }
}

// Unpack the keys and values of a block of cells; repeat none: rows up to a multiple of ROW_BLOCK are zero.
void load_cells(const Attention & a, int64_t kv_head, const int * cells, int n_cells, int n_next, Buffers & buffers) {
    for (int i = 0; i < n_cells; i++) {
        const ggml_fp16_t * key = a.cell(a.k, cells[i], kv_head), * value = a.cell(a.v, cells[i], kv_head);
        if (i < n_next) {  // the next block: the hardware prefetcher cannot follow this many short pieces
            const char * next_key = (const char *) a.cell(a.k, cells[n_cells + i], kv_head);
            const char * next_value = (const char *) a.cell(a.v, cells[n_cells + i], kv_head);
            for (int64_t byte = 0; byte < 2 * a.size; byte += 64) {
                _mm_prefetch(next_key + byte, _MM_HINT_T0);
                _mm_prefetch(next_value + byte, _MM_HINT_T0);
            }
        }
        for (int64_t d = 0; d < a.size; d += LANES) {
            store(&buffers.keys[i * a.size + d], load_halves(key + d));
            store(&buffers.values[i * a.size + d], load_halves(value + d));
        }
    }
}

void load_mask(const Attention & a, int64_t first_token, int n_tokens, const int * cells, int n_cells, Buffers & buffers) {
    for (int t = 0; t < a.tokens; t++) {
        const ggml_fp16_t * mask = t < n_tokens ? a.mask_of(first_token + t) : nullptr;
        for (int i = 0; i < n_cells; i++) {
            buffers.mask[i * a.tokens + t] = mask ? GGML_CPU_FP16_TO_FP32(mask[cells[i]]) : 0.0f;
        }
    }
}

// Compute an item with a lane for each query: lane head * tokens + token.
void attend_many(const Attention & a, int64_t kv_head, int64_t first_head, int n_heads, int64_t first_token, int n_tokens,
                 Buffers & buffers) {
    const int rows = n_heads * a.tokens, width = (rows + LANES - 1) / LANES * LANES, size = (int) a.size;
    std::fill_n(buffers.queries.begin(), size * width, 0.0f);
    for (int h = 0; h < n_heads; h++) {
        for (int t = 0; t < n_tokens; t++) {
            const float * query = a.query(first_token + t, first_head + h);
            for (int d = 0; d < size; d++) {
                buffers.queries[d * width + h * a.tokens + t] = query[d] * a.scale;
            }
        }
    }
    std::fill_n(buffers.sums.begin(), size * width, 0.0f);
    std::fill_n(buffers.highest, width, LOWEST);
    std::fill_n(buffers.total, width, 0.0f);
    const int n_all = (int) buffers.cells.size();
    for (int first = 0; first < n_all; first += CELLS) {
        const int * cells = &buffers.cells[first];
        const int n_cells = std::min(CELLS, n_all - first);
        load_cells(a, kv_head, cells, n_cells, std::min(n_cells, n_all - first - n_cells), buffers);
        const bool is_masked =
            std::any_of(cells, cells + n_cells, [&](int cell) { return buffers.masked[cell] != 0; });
        if (is_masked) {
            load_mask(a, first_token, n_tokens, cells, n_cells, buffers);
        }
        const int padded = (n_cells + ROW_BLOCK - 1) / ROW_BLOCK * ROW_BLOCK;  // finite leftovers: ignored below
        multiply(buffers.scores.data(), nullptr, buffers.keys.data(), size, 1, buffers.queries.data(), padded, width, size);
        update_softmax(a, buffers, n_cells, width, is_masked);
        multiply(buffers.sums.data(), buffers.factor, buffers.values.data(), 1, size, buffers.scores.data(), size, width,
                 n_cells);
    }
    for (int h = 0; h < n_heads; h++) {
        for (int t = 0; t < n_tokens; t++) {
            const int row = h * a.tokens + t;
            const float inverse = buffers.total[row] > 0 ? 1 / buffers.total[row] : 0;
            float * out = a.result(first_token + t, first_head + h);
            for (int d = 0; d < size; d++) {
                out[d] = buffers.sums[d * width + row] * inverse;
            }
        }
    }
}

// Compute one query, with its values along the lanes.
template <int VECTORS_PER_HEAD>
void attend_one(const Attention & a, int64_t kv_head, int64_t head, int64_t token, Buffers & buffers) {
    Floats query[VECTORS_PER_HEAD], sums[VECTORS_PER_HEAD];
    for (int j = 0; j < VECTORS_PER_HEAD; j++) {
        query[j] = load(a.query(token, head) + j * LANES) * broadcast(a.scale);
        sums[j] = broadcast(0.0f);
    }
    const ggml_fp16_t * mask = a.mask_of(token);
    const int n_all = (int) buffers.cells.size();
    float highest = LOWEST, total = 0;
    alignas(64) float scores[CELLS];
    for (int first = 0; first < n_all; first += CELLS) {
        const int * cells = &buffers.cells[first];
        const int n_cells = std::min(CELLS, n_all - first), n_next = std::min(CELLS, n_all - first - n_cells);
        float block_highest = highest;
        for (int i = 0; i < n_cells; i++) {
            const ggml_fp16_t * key = a.cell(a.k, cells[i], kv_head);
            if (i < n_next) {
                const char * next = (const char *) a.cell(a.k, cells[n_cells + i], kv_head);
                for (int byte = 0; byte < 2 * VECTORS_PER_HEAD * LANES; byte += 64) {
                    _mm_prefetch(next + byte, _MM_HINT_T0);
                }
            }
            Floats products = load_halves(key) * query[0];
            for (int j = 1; j < VECTORS_PER_HEAD; j++) {
                products = multiply_add(load_halves(key + j * LANES), query[j], products);
            }
            scores[i] = sum_lanes(products) + GGML_CPU_FP16_TO_FP32(mask[cells[i]]);
            block_highest = std::max(block_highest, scores[i]);
        }
        const float factor = expf(highest - block_highest);
        highest = block_highest;
        for (int i = n_cells; i < CELLS; i++) {
            scores[i] = -INFINITY;
        }
        Floats block_total = broadcast(0.0f);
        for (int i = 0; i < CELLS; i += LANES) {
            const Floats x = ggml_v_expf(load(scores + i) - broadcast(highest));
            store(scores + i, x);
            block_total = block_total + x;
        }
        total = total * factor + sum_lanes(block_total);
        for (int j = 0; j < VECTORS_PER_HEAD; j++) {
            sums[j] = sums[j] * broadcast(factor);
        }
        for (int i = 0; i < n_cells; i++) {
            const ggml_fp16_t * value = a.cell(a.v, cells[i], kv_head);
            if (i < n_next) {
                const char * next = (const char *) a.cell(a.v, cells[n_cells + i], kv_head);
                for (int byte = 0; byte < 2 * VECTORS_PER_HEAD * LANES; byte += 64) {
                    _mm_prefetch(next + byte, _MM_HINT_T0);
                }
            }
            for (int j = 0; j < VECTORS_PER_HEAD; j++) {
                sums[j] = multiply_add(load_halves(value + j * LANES), broadcast(scores[i]), sums[j]);
            }
        }
    }
    float * out = a.result(token, head);
    for (int j = 0; j < VECTORS_PER_HEAD; j++) {
        store(out + j * LANES, sums[j] * broadcast(total > 0 ? 1 / total : 0));
    }
}

__attribute__((noinline)) void attend(const Attention & a, int64_t item, Buffers & buffers) {
    const int64_t token_part = item % a.token_parts(), rest = item / a.token_parts();
    const int64_t kv_head = rest / a.head_parts(), first_in_group = rest % a.head_parts() * a.heads;
    const int64_t first_head = kv_head * a.group() + first_in_group, first_token = token_part * a.tokens;
    const int n_heads = std::min(a.heads, a.group() - (int) first_in_group);
    const int n_tokens = (int) std::min<int64_t>(a.tokens, a.n_tokens - first_token);
    list_cells(a, first_token, n_tokens, buffers);
    if (a.tokens == 1 && n_heads <= FEW) {
        for (int h = 0; h < n_heads; h++) {
            if (a.size == 64) {
                attend_one<64 / LANES>(a, kv_head, first_head + h, first_token, buffers);
            } else {
                attend_one<128 / LANES>(a, kv_head, first_head + h, first_token, buffers);
            }
        }
        return;
    }
    attend_many(a, kv_head, first_head, n_heads, first_token, n_tokens, buffers);
}

// Choose how many heads and tokens an item has: a register for the tokens, or one token if there are few.
void choose_item_size(Attention & a, int n_threads) {
    const int vectors = (int) std::min<int64_t>(std::max(1, 64 / LANES / a.group()), (a.n_tokens + LANES - 1) / LANES);
    a.tokens = a.n_tokens < LANES ? 1 : LANES * vectors;
    a.heads = std::min(a.group(), MAX_ROWS / a.tokens);
    while (a.heads > 1 && a.items() < n_threads) {
        a.heads = (a.heads + 1) / 2;
    }
}

}  // namespace

bool compute_attention(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0], * k = dst->src[1], * v = dst->src[2], * mask = dst->src[3];
    float scale, max_bias, softcap;
    memcpy(&scale, (const float *) dst->op_params, sizeof(float));
    memcpy(&max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&softcap, (const float *) dst->op_params + 2, sizeof(float));
    const int64_t size = k->ne[0];
    if (params->use_ref || !mask || dst->src[4] || max_bias != 0 || softcap != 0 || mask->type != GGML_TYPE_F16 ||
        q->type != GGML_TYPE_F32 || k->type != GGML_TYPE_F16 || v->type != GGML_TYPE_F16 || q->ne[3] != 1 ||
        k->ne[3] != 1 || mask->ne[2] != 1 || v->ne[0] != size || v->ne[2] != k->ne[2] || (size != 64 && size != 128)) {
        return false;
    }
    Attention a = {q, k, v, mask, (float *) dst->data, scale, size, q->ne[1], k->ne[1], q->ne[2], k->ne[2], 1, 1};
    choose_item_size(a, params->nth);
    thread_local Buffers thread_buffers;
    Buffers & buffers = thread_buffers;
    buffers.queries.resize(size * MAX_ROWS);
    buffers.keys.resize(size * CELLS);
    buffers.values.resize(size * CELLS);
    buffers.scores.resize(CELLS * MAX_ROWS);
    buffers.mask.resize(CELLS * a.tokens);
    buffers.sums.resize(size * MAX_ROWS);
    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);
    const int64_t items = a.items();
    for (int64_t item = params->ith; item < items; item = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        attend(a, items - 1 - item, buffers);  // the last tokens of a prompt, which take longest, first
    }
    return true;
}

EXPORT int qwenlocal_has_attention() { return 1; }

#else

bool compute_attention(const ggml_compute_params *, ggml_tensor *) { return false; }

EXPORT int qwenlocal_has_attention() { return 0; }

#endif
