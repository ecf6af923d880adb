// The peak rate of the instructions that llama.cpp's kernels multiply quantized weights with, for `qwenlocal bench`.
//
// qwenlocal_integer_peak runs `rounds` rounds of independent multiply-accumulate instructions on registers and returns
// the number of operations, where a multiplication and an addition count as two, as in "TOPS"; 0 if this processor has
// no such instruction. Callers time it, in one thread per core.

#include <stdint.h>

#define CHAINS 12  // independent accumulators: enough to hide the latency of the instruction
#define REPEAT(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

#if defined(__AVX512VNNI__)
#include <immintrin.h>
typedef __m512i vector;
#define PRODUCTS 64
#define SET(value) _mm512_set1_epi8(value)
#define MULTIPLY_ADD(i) sum##i = _mm512_dpbusd_epi32(sum##i, a, b);
#define OPAQUE "+v"
#elif defined(__AVXVNNI__)
#include <immintrin.h>
typedef __m256i vector;
#define PRODUCTS 32
#define SET(value) _mm256_set1_epi8(value)
#define MULTIPLY_ADD(i) sum##i = _mm256_dpbusd_avx_epi32(sum##i, a, b);
#define OPAQUE "+x"
#elif defined(__AVX2__)
#include <immintrin.h>
typedef __m256i vector;
#define PRODUCTS 32
#define SET(value) _mm256_set1_epi8(value)
#define MULTIPLY_ADD(i) \
    sum##i = _mm256_add_epi32(sum##i, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_xor_si256(a, sum##i), b), b));
#define OPAQUE "+x"
#elif defined(__ARM_FEATURE_MATMUL_INT8)
#include <arm_neon.h>
typedef int32x4_t vector;
#define PRODUCTS 32
#define SET(value) vreinterpretq_s32_s8(vdupq_n_s8(value))
#define MULTIPLY_ADD(i) sum##i = vmmlaq_s32(sum##i, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
#define OPAQUE "+w"
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
typedef int32x4_t vector;
#define PRODUCTS 16
#define SET(value) vreinterpretq_s32_s8(vdupq_n_s8(value))
#define MULTIPLY_ADD(i) sum##i = vdotq_s32(sum##i, vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b));
#define OPAQUE "+w"
#endif

__attribute__((visibility("default"))) int64_t qwenlocal_integer_peak(int64_t rounds) {
#ifdef MULTIPLY_ADD
    vector a = SET(3), b = SET(1);
#define DECLARE(i) vector sum##i = SET(0);
#define HIDE(i) __asm__ volatile("" : OPAQUE(sum##i));  // or the compiler would compute one sum for all
    REPEAT(DECLARE)
    REPEAT(HIDE)
    for (int64_t round = 0; round < rounds; round++) {
        REPEAT(MULTIPLY_ADD)
        __asm__ volatile("" : OPAQUE(a));  // the compiler cannot know the next products
    }
    REPEAT(HIDE)
    return rounds * CHAINS * PRODUCTS * 2;
#else
    (void) rounds;
    return 0;
#endif
}
