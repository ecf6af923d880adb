// Quantizers for Q4_K, Q5_K, Q6_K and Q8_0, and for all K-quants with an importance matrix, that give the same bytes as
// ggml's, in a fraction of the time. Compiled into libggml-base by tools/setup.py.
//
// For every small block, ggml-quants.c tries some twenty scales, and for each it sums the block's values one after the
// other, so the processor waits for each addition. The order of additions decides the last bit, so they cannot be
// reordered; but eight or sixteen blocks can be processed at once, one per lane of a vector. Each lane does what the
// function of ggml named in the comment does, operation by operation (this is also why floating-point contraction is
// off).

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "ggml.h"
#define GGML_COMMON_DECL_C
#include "ggml-common.h"

namespace {

typedef uint16_t bf16;  // the upper half of a float

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int VECTORS_PER_BLOCK = 16 / LANES;  // Q2_K, Q3_K and Q6_K, which have 16 small blocks in each block
constexpr int BLOCKS_PER_VECTOR = LANES / 8;   // Q4_K and Q5_K, which have eight
typedef float floats __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), may_alias));

// Transposes `LANES` blocks of N values at `source`: result[i] has value i of each block.
template <int N> inline void transpose(const float * source, floats * result) {
    for (int i = 0; i < N; ++i) {
        for (int lane = 0; lane < LANES; ++lane) result[i][lane] = source[N * lane + i];
    }
}

inline floats magnitude(floats x) { return (floats)((ints)x & 0x7fffffff); }

inline floats to_float(ints x) { return __builtin_convertvector(x, floats); }

// nearest_int
inline ints nearest(floats x) {
    return ((ints)(x + 12582912.f) & 0x007fffff) - 0x00400000;
}

inline int nearest(float x) {
    const float shifted = x + 12582912.f;
    int bits;
    memcpy(&bits, &shifted, sizeof(bits));
    return (bits & 0x007fffff) - 0x00400000;
}

inline ints clamp(ints x, int low, int high) {
    x = x > high ? (ints{} + high) : x;
    return x < low ? (ints{} + low) : x;
}

inline int clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

inline bool any(ints mask) {
    for (int lane = 0; lane < LANES; ++lane) {
        if (mask[lane]) return true;
    }
    return false;
}

// make_qkx2_quants and make_qkx3_quants: computes scales, (negated) minima and levels of `LANES` blocks of N values.
// The search tries the scales (first + delta * step + top) / range for the steps from 0 on.
template <int N>
void scales_and_minima(const floats * x, const floats * weight, int top, float first, float delta, int steps,
                       float * scales, float * minima, uint8_t * levels) {
    floats level[N];
    floats low = x[0], high = x[0], sum_w = weight[0], sum_x = sum_w * x[0];
    for (int i = 1; i < N; ++i) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        sum_w += weight[i];
        sum_x += weight[i] * x[i];
    }
    low = low > 0.f ? floats{} : low;
    const ints is_flat = high == low;
    const floats lowest = low;

    // The levels follow from the best scale and the minimum at that time, so only these two are kept.
    floats inverse = (float)top / (high - low), best_inverse = inverse, best_low = low;
    floats scale = 1 / inverse, error = {};
    for (int i = 0; i < N; ++i) {
        const floats difference = scale * to_float(clamp(nearest(inverse * (x[i] - low)), 0, top)) + low - x[i];
        error += weight[i] * (difference * difference);
    }
    for (int step = 0; step <= steps; ++step) {
        inverse = (first + delta * step + top) / (high - low);
        floats sum_l = {}, sum_l2 = {}, sum_xl = {};
        for (int i = 0; i < N; ++i) {
            level[i] = to_float(clamp(nearest(inverse * (x[i] - low)), 0, top));
            const floats weighted = weight[i] * level[i];
            sum_l += weighted;
            sum_l2 += weighted * level[i];
            sum_xl += weighted * x[i];
        }
        const floats determinant = sum_w * sum_l2 - sum_l * sum_l;
        floats this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        floats this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        const ints is_above = this_low > 0.f;
        this_low = is_above ? floats{} : this_low;
        this_scale = is_above ? sum_xl / sum_l2 : this_scale;
        floats this_error = {};
        for (int i = 0; i < N; ++i) {
            const floats difference = this_scale * level[i] + this_low - x[i];
            this_error += weight[i] * (difference * difference);
        }
        const ints is_better = (determinant > 0.f) & (this_error < error);
        best_inverse = is_better ? inverse : best_inverse;
        best_low = is_better ? low : best_low;
        error = is_better ? this_error : error;
        scale = is_better ? this_scale : scale;
        low = is_better ? this_low : low;
    }
    scale = is_flat ? floats{} : scale;
    low = is_flat ? lowest : low;
    for (int i = 0; i < N; ++i) {
        const ints best_level = clamp(nearest(best_inverse * (x[i] - best_low)), 0, top);
        for (int lane = 0; lane < LANES; ++lane) levels[N * lane + i] = is_flat[lane] ? 0 : best_level[lane];
    }
    for (int lane = 0; lane < LANES; ++lane) {
        scales[lane] = scale[lane];
        minima[lane] = -low[lane];
    }
}

// Scales and minima of blocks of Q4_K or Q5_K, with the weights of quantize_row_q4_K_ref.
void scales_and_minima(const float * source, int top, float first, int steps, float * scales, float * minima,
                       uint8_t * levels) {
    constexpr int N = 32;
    floats x[N], weight[N];
    transpose<N>(source, x);
    floats sum_x2 = {};
    for (int i = 0; i < N; ++i) sum_x2 += x[i] * x[i];
    floats mean;
    for (int lane = 0; lane < LANES; ++lane) mean[lane] = sqrtf(sum_x2[lane] / N);
    for (int i = 0; i < N; ++i) weight[i] = mean + magnitude(x[i]);
    scales_and_minima<N>(x, weight, top, first, 0.1f, steps, scales, minima, levels);
}

// The six bits of each scale and minimum of a block of Q4_K or Q5_K (get_scale_min_k4).
template <typename Block> void store_scales(const uint8_t * scale_of, const uint8_t * min_of, Block & block) {
    for (int j = 0; j < 4; ++j) {
        block.scales[j] = scale_of[j] | (scale_of[j + 4] >> 4) << 6;
        block.scales[j + 4] = min_of[j] | (min_of[j + 4] >> 4) << 6;
        block.scales[j + 8] = (scale_of[j + 4] & 0xF) | (min_of[j + 4] & 0xF) << 4;
    }
}

// The levels with the rounded scales and minima.
template <typename Block>
void fit_levels(const float * x, int top, const uint8_t * scale_of, const uint8_t * min_of, const Block & block,
                uint8_t * levels) {
    for (int j = 0; j < 8; ++j) {
        const float d = ggml_fp16_to_fp32(block.d) * scale_of[j];
        if (!d) continue;  // keep the levels of the search
        const float dm = ggml_fp16_to_fp32(block.dmin) * min_of[j];
        for (int i = 32 * j; i < 32 * j + 32; ++i) levels[i] = clamp(nearest((x[i] + dm) / d), 0, top);
    }
}

// The common part of quantize_row_q4_K_ref and quantize_row_q5_K_ref: the header of a block, and its 256 levels.
template <typename Block>
void fit_block(const float * x, int top, const float * scales, const float * minima, Block & block, uint8_t * levels) {
    float max_scale = 0, max_min = 0;
    for (int j = 0; j < 8; ++j) {
        if (scales[j] > max_scale) max_scale = scales[j];
        if (minima[j] > max_min) max_min = minima[j];
    }
    const float inverse_scale = max_scale > 0 ? 63.f / max_scale : 0.f;
    const float inverse_min = max_min > 0 ? 63.f / max_min : 0.f;
    uint8_t scale_of[8], min_of[8];
    for (int j = 0; j < 8; ++j) {
        const uint8_t s = nearest(inverse_scale * scales[j]), m = nearest(inverse_min * minima[j]);
        scale_of[j] = s < 63 ? s : 63;
        min_of[j] = m < 63 ? m : 63;
    }
    store_scales(scale_of, min_of, block);
    block.d = ggml_fp32_to_fp16(max_scale / 63.f);
    block.dmin = ggml_fp32_to_fp16(max_min / 63.f);
    fit_levels(x, top, scale_of, min_of, block, levels);
}

void store_levels(const uint8_t * levels, block_q4_K & block) {
    for (int i = 0; i < QK_K / 2; ++i) {
        const int at = i / 32 * 64 + i % 32;
        block.qs[i] = levels[at] | levels[at + 32] << 4;
    }
}

void store_levels(const uint8_t * levels, block_q5_K & block) {
    memset(block.qh, 0, sizeof(block.qh));
    for (int i = 0; i < QK_K / 2; ++i) {
        const int pair = i / 32, at = pair * 64 + i % 32;
        block.qs[i] = (levels[at] & 0xF) | (levels[at + 32] & 0xF) << 4;
        block.qh[i % 32] |= (levels[at] >> 4) << (2 * pair) | (levels[at + 32] >> 4) << (2 * pair + 1);
    }
}

template <typename Block>
void to_q45_K(const float * x, int top, float first, int steps, Block * blocks) {
    float scales[LANES], minima[LANES];
    uint8_t levels[QK_K * BLOCKS_PER_VECTOR];
    scales_and_minima(x, top, first, steps, scales, minima, levels);
    for (int i = 0; i < BLOCKS_PER_VECTOR; ++i) {
        uint8_t * block_levels = levels + QK_K * i;
        fit_block(x + QK_K * i, top, scales + 8 * i, minima + 8 * i, blocks[i], block_levels);
        store_levels(block_levels, blocks[i]);
    }
}

void to_q4_K(const float * x, const float *, block_q4_K * blocks) { to_q45_K(x, 15, -1.f, 20, blocks); }

void to_q5_K(const float * x, const float *, block_q5_K * blocks) { to_q45_K(x, 31, -0.5f, 15, blocks); }

// make_qx_quants with nmax = TOP and rmse_type = 1: computes scales and levels of `LANES` blocks of N values.
template <int N, int TOP>
void signed_scales(const floats * x, const floats * weight, float * scales, int8_t * levels) {
    floats weighted[N];
    floats extreme = {}, largest = {};
    for (int i = 0; i < N; ++i) {
        const floats size = magnitude(x[i]);
        const ints is_larger = size > largest;
        largest = is_larger ? size : largest;
        extreme = is_larger ? x[i] : extreme;
        weighted[i] = weight[i] * x[i];
    }
    const ints is_zero = largest < 1e-15f;  // GROUP_MAX_EPS
    floats scale = {}, best = {}, best_inverse = {};
    for (int trial = 0; trial <= 18; ++trial) {  // steps 0, -9 … -1, 1 … 9
        const int step = trial == 0 ? 0 : trial <= 9 ? trial - 10 : trial - 9;
        const floats inverse = (step ? -(TOP + 0.1f * step) : -TOP) / extreme;
        floats sum_lx = {}, sum_l2 = {};
        for (int i = 0; i < N; ++i) {
            const floats level = to_float(clamp(nearest(inverse * x[i]), -TOP, TOP - 1));
            sum_lx += weighted[i] * level;
            sum_l2 += weight[i] * level * level;
        }
        if (trial == 0) {
            scale = sum_l2 != 0.f ? sum_lx / sum_l2 : floats{};
            best = scale * sum_lx;
            best_inverse = inverse;
            continue;
        }
        const ints is_better = (sum_l2 > 0.f) & (sum_lx * sum_lx > best * sum_l2);
        if (!any(is_better)) continue;
        best_inverse = is_better ? inverse : best_inverse;
        scale = is_better ? sum_lx / sum_l2 : scale;
        best = is_better ? scale * sum_lx : best;
    }
    for (int i = 0; i < N; ++i) {
        const ints best_level = clamp(nearest(best_inverse * x[i]), -TOP, TOP - 1) + TOP;
        for (int lane = 0; lane < LANES; ++lane) levels[N * lane + i] = is_zero[lane] ? 0 : best_level[lane];
    }
    for (int lane = 0; lane < LANES; ++lane) scales[lane] = is_zero[lane] ? 0 : scale[lane];
}

// Scales and levels of `LANES` small blocks of Q6_K, with the weights x * x if there is no importance.
void q6_K_scales(const float * source, const float * importance, float * scales, int8_t * levels) {
    constexpr int N = 16;
    floats x[N], weight[N];
    transpose<N>(source, x);
    if (importance) {
        transpose<N>(importance, weight);
    } else {
        for (int i = 0; i < N; ++i) weight[i] = x[i] * x[i];
    }
    signed_scales<N, 32>(x, weight, scales, levels);
}

// quantize_row_q6_K_ref, and quantize_row_q6_K_impl with importance
void fit_q6_K(const float * x, const float * importance, block_q6_K & block) {
    int8_t levels[QK_K];
    float scales[QK_K / 16];
    for (int i = 0; i < VECTORS_PER_BLOCK; ++i) {
        const int at = QK_K / VECTORS_PER_BLOCK * i;
        q6_K_scales(x + at, importance ? importance + at : nullptr, scales + LANES * i, levels + at);
    }
    float max_scale = 0, largest = 0;
    for (float scale : scales) {
        if (fabsf(scale) > largest) {
            largest = fabsf(scale);
            max_scale = scale;
        }
    }
    if (largest < 1e-15f) {  // GROUP_MAX_EPS
        memset(&block, 0, sizeof(block));
        return;
    }
    const float inverse = -128.f / max_scale;
    block.d = ggml_fp32_to_fp16(1 / inverse);
    for (int j = 0; j < QK_K / 16; ++j) {
        const int scale = nearest(inverse * scales[j]);
        block.scales[j] = scale < 127 ? scale : 127;
        const float d = ggml_fp16_to_fp32(block.d) * block.scales[j];
        if (!d) continue;  // keep the levels of the search
        for (int i = 16 * j; i < 16 * j + 16; ++i) levels[i] = clamp(nearest(x[i] / d), -32, 31) + 32;
    }
    for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 32; ++i) {
            const int8_t * l = levels + 128 * half + i;
            uint8_t * low = block.ql + 64 * half + i;
            low[0] = (l[0] & 0xF) | (l[64] & 0xF) << 4;
            low[32] = (l[32] & 0xF) | (l[96] & 0xF) << 4;
            block.qh[32 * half + i] = l[0] >> 4 | (l[32] >> 4) << 2 | (l[64] >> 4) << 4 | (l[96] >> 4) << 6;
        }
    }
}

void to_q6_K(const float * x, const float *, block_q6_K * block) { fit_q6_K(x, nullptr, *block); }

void to_weighted_q6_K(const float * x, const float * importance, block_q6_K * block) {
    fit_q6_K(x, importance, *block);
}

// --- with the importance of each column (an importance matrix): quantize_row_q…_K_impl

// The weights of `N` x `LANES` values: importance * sqrt(sigma2 + x * x).
template <int N> void weigh(const float * importance, const floats * x, floats sigma2, floats * weight) {
    transpose<N>(importance, weight);
    for (int i = 0; i < N; ++i) {
        const floats square = sigma2 + x[i] * x[i];
        for (int lane = 0; lane < LANES; ++lane) weight[i][lane] *= sqrtf(square[lane]);
    }
}

inline float sum_of_squares(const float * x) {
    float sum = 0;
    for (int i = 0; i < QK_K; ++i) sum += x[i] * x[i];
    return sum;
}

template <int N> void sum_weights(const floats * weight, float * sums) {
    floats sum = {};
    for (int i = 0; i < N; ++i) sum += weight[i];
    for (int lane = 0; lane < LANES; ++lane) sums[lane] = sum[lane];
}

// make_qp_quants: the levels of n positive values, and their scale.
float positive_levels(int n, int top, const float * x, uint8_t * levels, const float * weight) {
    float max = 0;
    for (int i = 0; i < n; ++i) max = max > x[i] ? max : x[i];
    if (max < 1e-15f) {  // GROUP_MAX_EPS
        memset(levels, 0, n);
        return 0.f;
    }
    float inverse = top / max, scale = 1 / inverse, best = 0;
    for (int i = 0; i < n; ++i) {
        levels[i] = nearest(inverse * x[i]);
        const float difference = x[i] - scale * levels[i];
        best += weight[i] * difference * difference;
    }
    for (int step = -4; step <= 4; ++step) {
        if (step == 0) continue;
        const float this_inverse = (0.1f * step + top) / max, this_scale = 1 / this_inverse;
        float error = 0;
        for (int i = 0; i < n; ++i) {
            const int level = nearest(this_inverse * x[i]);
            const float difference = x[i] - this_scale * (level < top ? level : top);
            error += weight[i] * difference * difference;
        }
        if (error < best) {
            best = error;
            inverse = this_inverse;
        }
    }
    float sum_lx = 0, sum_l2 = 0;
    for (int i = 0; i < n; ++i) {
        const int level = nearest(inverse * x[i]);
        levels[i] = level < top ? level : top;
        sum_lx += weight[i] * x[i] * levels[i];
        sum_l2 += weight[i] * levels[i] * levels[i];
    }
    for (int attempt = 0; attempt < 5; ++attempt) {
        bool has_changed = false;
        for (int i = 0; i < n; ++i) {
            float lx = sum_lx - weight[i] * x[i] * levels[i], l2 = sum_l2 - weight[i] * levels[i] * levels[i];
            if (!(lx > 0 && l2 > 0)) continue;
            int level = nearest(x[i] * l2 / lx);
            level = level < top ? level : top;
            if (level == levels[i]) continue;
            lx += weight[i] * x[i] * level;
            l2 += weight[i] * level * level;
            if (lx * lx * sum_l2 > sum_lx * sum_lx * l2) {
                levels[i] = level;
                sum_lx = lx;
                sum_l2 = l2;
                has_changed = true;
            }
        }
        if (!has_changed) break;
    }
    return sum_l2 > 0.0f ? sum_lx / sum_l2 : 0.0f;
}

// make_qx_quants with nmax = 32 and rmse_type = 1, for the 16 scales of a block of Q3_K.
float signed_levels(const float * x, int8_t * levels, const float * weight) {
    constexpr int N = 16, TOP = 32;
    float max = 0, largest = 0;
    for (int i = 0; i < N; ++i) {
        if (fabsf(x[i]) > largest) {
            largest = fabsf(x[i]);
            max = x[i];
        }
    }
    if (largest < 1e-15f) {  // GROUP_MAX_EPS
        memset(levels, 0, N);
        return 0.f;
    }
    float best_scale = 0, best = 0;
    for (int trial = 0; trial <= 18; ++trial) {  // steps 0, -9 … -1, 1 … 9
        const int step = trial == 0 ? 0 : trial <= 9 ? trial - 10 : trial - 9;
        const float inverse = (step ? -(TOP + 0.1f * step) : -TOP) / max;
        float sum_lx = 0, sum_l2 = 0;
        int8_t trial_levels[N];
        for (int i = 0; i < N; ++i) {
            const int level = clamp(nearest(inverse * x[i]), -TOP, TOP - 1);
            trial_levels[i] = level + TOP;
            sum_lx += weight[i] * x[i] * level;
            sum_l2 += weight[i] * level * level;
        }
        const bool is_better = sum_l2 > 0 && sum_lx * sum_lx > best * sum_l2;
        if (trial && !is_better) continue;
        memcpy(levels, trial_levels, N);
        best_scale = sum_l2 ? sum_lx / sum_l2 : 0.0f;
        best = best_scale * sum_lx;
    }
    return best_scale;
}

// quantize_row_q2_K_impl
void to_weighted_q2_K(const float * x, const float * importance, block_q2_K * blocks) {
    block_q2_K & block = *blocks;
    constexpr int N = 16;
    const float sigma2 = sum_of_squares(x) / QK_K;
    uint8_t levels[QK_K], scale_of[16], min_of[16];
    float scales[16], minima[16], sums[16];
    for (int i = 0; i < VECTORS_PER_BLOCK; ++i) {
        const int at = QK_K / VECTORS_PER_BLOCK * i;
        floats values[N], weight[N];
        transpose<N>(x + at, values);
        weigh<N>(importance + at, values, floats{} + sigma2, weight);
        sum_weights<N>(weight, sums + LANES * i);
        scales_and_minima<N>(values, weight, 3, -0.9f, 0.05f, 36, scales + LANES * i, minima + LANES * i,
                             levels + at);
    }
    block.d = ggml_fp32_to_fp16(positive_levels(16, 15, scales, scale_of, sums));
    block.dmin = ggml_fp32_to_fp16(positive_levels(16, 15, minima, min_of, sums));
    const float scale = ggml_fp16_to_fp32(block.d), minimum = ggml_fp16_to_fp32(block.dmin);
    for (int j = 0; j < 16; ++j) {
        block.scales[j] = scale_of[j] | min_of[j] << 4;
        const float d = scale * (block.scales[j] & 0xF);
        if (!d) continue;
        const float m = minimum * (block.scales[j] >> 4);
        for (int i = 16 * j; i < 16 * j + 16; ++i) levels[i] = clamp(nearest((x[i] + m) / d), 0, 3);
    }
    for (int j = 0; j < QK_K; j += 128) {
        for (int i = j; i < j + 32; ++i) {
            block.qs[j / 4 + i - j] = levels[i] | levels[i + 32] << 2 | levels[i + 64] << 4 | levels[i + 96] << 6;
        }
    }
}

// quantize_row_q3_K_impl
void to_weighted_q3_K(const float * x, const float * importance, block_q3_K * blocks) {
    block_q3_K & block = *blocks;
    constexpr int N = 16;
    const float sigma2 = 2 * sum_of_squares(x) / QK_K;
    int8_t levels[QK_K], scale_of[16];
    float scales[16], sums[16];
    for (int i = 0; i < VECTORS_PER_BLOCK; ++i) {
        const int at = QK_K / VECTORS_PER_BLOCK * i;
        floats values[N], weight[N];
        transpose<N>(x + at, values);
        weigh<N>(importance + at, values, floats{} + sigma2, weight);
        sum_weights<N>(weight, sums + LANES * i);
        signed_scales<N, 4>(values, weight, scales + LANES * i, levels + at);
    }
    block.d = ggml_fp32_to_fp16(signed_levels(scales, scale_of, sums));
    memset(block.scales, 0, sizeof(block.scales));
    for (int j = 0; j < 16; ++j) {
        block.scales[j % 8] |= (scale_of[j] & 0xF) << (j < 8 ? 0 : 4);
        block.scales[j % 4 + 8] |= scale_of[j] >> 4 << 2 * (j / 4);
        const float d = ggml_fp16_to_fp32(block.d) * (scale_of[j] - 32);
        if (!d) continue;
        for (int i = 16 * j; i < 16 * j + 16; ++i) levels[i] = clamp(nearest(x[i] / d), -4, 3) + 4;
    }
    memset(block.hmask, 0, sizeof(block.hmask));
    for (int i = 0; i < QK_K; ++i) block.hmask[i % 32] |= (levels[i] >> 2) << i / 32;
    for (int j = 0; j < QK_K; j += 128) {
        for (int i = j; i < j + 32; ++i) {
            block.qs[j / 4 + i - j] = (levels[i] & 3) | (levels[i + 32] & 3) << 2 | (levels[i + 64] & 3) << 4 |
                                      (levels[i + 96] & 3) << 6;
        }
    }
}

// quantize_row_q4_K_impl and quantize_row_q5_K_impl
template <typename Block, int TOP> void to_weighted_q45_K(const float * x, const float * importance, Block * blocks) {
    constexpr int N = 32;
    floats sigma2, values[N], weight[N];
    for (int lane = 0; lane < LANES; lane += 8) {
        const float mean_square = 2 * sum_of_squares(x + N * lane) / QK_K;
        for (int j = 0; j < 8; ++j) sigma2[lane + j] = mean_square;
    }
    uint8_t levels[QK_K * BLOCKS_PER_VECTOR];
    float scales[LANES], minima[LANES], sums[LANES];
    transpose<N>(x, values);
    weigh<N>(importance, values, sigma2, weight);
    sum_weights<N>(weight, sums);
    scales_and_minima<N>(values, weight, TOP, -0.9f, 0.05f, 36, scales, minima, levels);
    for (int i = 0; i < BLOCKS_PER_VECTOR; ++i) {
        Block & block = blocks[i];
        uint8_t scale_of[8], min_of[8], * block_levels = levels + QK_K * i;
        block.d = ggml_fp32_to_fp16(positive_levels(8, 63, scales + 8 * i, scale_of, sums + 8 * i));
        block.dmin = ggml_fp32_to_fp16(positive_levels(8, 63, minima + 8 * i, min_of, sums + 8 * i));
        store_scales(scale_of, min_of, block);
        fit_levels(x + QK_K * i, TOP, scale_of, min_of, block, block_levels);
        store_levels(block_levels, block);
    }
}

// Rounds to half precision like ggml, with the processor's instruction if it has one: Q8_0 needs it every 32 values.
inline ggml_fp16_t to_half(float x) {
#ifdef __F16C__
    return _cvtss_sh(x, 0);
#else
    return ggml_fp32_to_fp16(x);
#endif
}

// roundf: halves are rounded away from zero. NaN and infinity give whatever the conversion to int gives.
inline ints rounded(floats x) {
    const ints whole = __builtin_convertvector(x, ints);
    const floats rest = x - to_float(whole);
    return whole - ((rest >= 0.5f) & (rest < 1.f)) + ((rest <= -0.5f) & (rest > -1.f));
}

// quantize_row_q8_0_ref, which calls a function to round each value, so compilers cannot vectorize it. `x` must be
// aligned to a vector.
void to_q8_0(const float * x, const float *, block_q8_0 * blocks) {
    block_q8_0 & block = *blocks;
    constexpr int N = QK8_0 / LANES;
    const floats * vectors = (const floats *)x;
    floats largest = {};
    for (int i = 0; i < N; ++i) {
        const floats size = magnitude(vectors[i]);
        largest = size > largest ? size : largest;
    }
    float max = 0;
    for (int lane = 0; lane < LANES; ++lane) max = largest[lane] > max ? largest[lane] : max;
    const float scale = max / 127, inverse = scale ? 1.f / scale : 0.f;
    block.d = to_half(scale);
    alignas(4 * LANES) int32_t levels[QK8_0];
    for (int i = 0; i < N; ++i) *(ints *)(levels + LANES * i) = rounded(vectors[i] * inverse);
    for (int i = 0; i < QK8_0; ++i) block.qs[i] = levels[i];
}

inline float as_float(float x) { return x; }

inline float as_float(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

struct half {
    ggml_fp16_t bits;
};

template <int N, typename Number> inline void load(const Number * source, float * x) {
    for (int i = 0; i < N; ++i) x[i] = as_float(source[i]);
}

template <int N> inline void load(const half * source, float * x) {
#ifdef __F16C__  // compilers do not vectorize the conversion
    for (int i = 0; i < N; i += 8) {
        _mm256_store_ps(x + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(source + i))));
    }
#else
    for (int i = 0; i < N; ++i) x[i] = ggml_fp16_to_fp32(source[i].bits);
#endif
}

// Quantizes `COUNT` blocks of N values at a time, with floats that stay in the L1 cache. `importance` has a weight for
// each column, or is null. Returns the bits of the largest magnitude.
template <int N, int COUNT, typename Block, void quantize(const float *, const float *, Block *), typename Number>
int64_t quantize_rows(const Number * source, void * target, int64_t rows, int64_t columns, const float * importance) {
    Block * blocks = static_cast<Block *>(target);
    alignas(4 * LANES) float x[N * COUNT];
    ints largest = {};
    for (int64_t i = 0; i < rows * columns;) {
        const int64_t column = i % columns;
        const float * weights = importance ? importance + column : nullptr;
        int count = COUNT;
        if (column + N * COUNT <= columns) {
            load<N * COUNT>(source + i, x);
            quantize(x, weights, blocks);
        } else {  // the last block of a row with an odd number of them
            float padded[N * COUNT] = {};
            Block results[COUNT];
            count = 1;
            memset(x, 0, sizeof(x));
            load<N>(source + i, x);
            if (weights) memcpy(padded, weights, N * sizeof(float));
            quantize(x, padded, results);
            *blocks = *results;
        }
        for (int j = 0; j < N * COUNT; j += LANES) {
            const ints size = *(const ints *)(x + j) & 0x7fffffff;
            largest = size > largest ? size : largest;
        }
        blocks += count;
        i += N * count;
    }
    int32_t max = 0;
    for (int lane = 0; lane < LANES; ++lane) max = largest[lane] > max ? largest[lane] : max;
    return max;
}

template <typename Number> int64_t quantize_from(const Number * source, int type, void * target, int64_t count) {
    switch (type) {
        case GGML_TYPE_Q4_K:
            return quantize_rows<QK_K, BLOCKS_PER_VECTOR, block_q4_K, to_q4_K>(source, target, 1, count, nullptr);
        case GGML_TYPE_Q5_K:
            return quantize_rows<QK_K, BLOCKS_PER_VECTOR, block_q5_K, to_q5_K>(source, target, 1, count, nullptr);
        case GGML_TYPE_Q6_K: return quantize_rows<QK_K, 1, block_q6_K, to_q6_K>(source, target, 1, count, nullptr);
        case GGML_TYPE_Q8_0: return quantize_rows<QK8_0, 1, block_q8_0, to_q8_0>(source, target, 1, count, nullptr);
        default: return -1;
    }
}

template <typename Number>
int64_t quantize_weighted_from(const Number * source, int type, void * target, int64_t rows, int64_t columns,
                               const float * importance) {
    switch (type) {
        case GGML_TYPE_Q2_K:
            return quantize_rows<QK_K, 1, block_q2_K, to_weighted_q2_K>(source, target, rows, columns, importance);
        case GGML_TYPE_Q3_K:
            return quantize_rows<QK_K, 1, block_q3_K, to_weighted_q3_K>(source, target, rows, columns, importance);
        case GGML_TYPE_Q4_K:
            return quantize_rows<QK_K, BLOCKS_PER_VECTOR, block_q4_K, to_weighted_q45_K<block_q4_K, 15>>(
                source, target, rows, columns, importance);
        case GGML_TYPE_Q5_K:
            return quantize_rows<QK_K, BLOCKS_PER_VECTOR, block_q5_K, to_weighted_q45_K<block_q5_K, 31>>(
                source, target, rows, columns, importance);
        case GGML_TYPE_Q6_K:
            return quantize_rows<QK_K, 1, block_q6_K, to_weighted_q6_K>(source, target, rows, columns, importance);
        default: return -1;
    }
}

}  // namespace

// Quantizes `count` values (whole blocks) of type `from` to `type` at `target`. Returns the bits of the largest
// magnitude as float32: from 0x7f800000 on, a value is infinite or NaN, and the output is invalid. Returns -1 and
// writes nothing if a type is not supported.
extern "C" __attribute__((visibility("default"))) int64_t qwenlocal_quantize_blocks(int from, const void * source,
                                                                                  int type, void * target,
                                                                                  int64_t count) {
    switch (from) {
        case GGML_TYPE_F32: return quantize_from(static_cast<const float *>(source), type, target, count);
        case GGML_TYPE_F16: return quantize_from(static_cast<const half *>(source), type, target, count);
        case GGML_TYPE_BF16: return quantize_from(static_cast<const bf16 *>(source), type, target, count);
        default: return -1;
    }
}

// As `qwenlocal_quantize_blocks`, for rows whose columns have the given importance.
extern "C" __attribute__((visibility("default"))) int64_t
qwenlocal_quantize_weighted(int from, const void * source, int type, void * target, int64_t rows, int64_t columns,
                            const float * importance) {
    switch (from) {
        case GGML_TYPE_F32:
            return quantize_weighted_from(static_cast<const float *>(source), type, target, rows, columns, importance);
        case GGML_TYPE_F16:
            return quantize_weighted_from(static_cast<const half *>(source), type, target, rows, columns, importance);
        case GGML_TYPE_BF16:
            return quantize_weighted_from(static_cast<const bf16 *>(source), type, target, rows, columns, importance);
        default: return -1;
    }
}
