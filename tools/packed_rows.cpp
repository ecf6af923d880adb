// Packed weights (GPTQ, AWQ) as blocks of Q4_0, Q4_1, Q5_0 and Q8_0: the same bytes as qwenlocal/weights/packed_rows.py,
// in a quarter of the time. Compiled into libggml-base by tools/setup.py. The formulas and layouts are explained there.

#include <cstdint>
#include <cstring>

#include "ggml.h"

namespace {

constexpr int TILE = 64;  // rows: their words fill four cache lines, for which prefetching pays
constexpr uint64_t EACH_BYTE = 0x0101010101010101;

// 0x76543210 becomes 0x0706050403020100.
inline uint64_t spread(uint32_t word) {
    uint64_t wide = word;
    wide = (wide | wide << 16) & 0x0000FFFF0000FFFF;
    wide = (wide | wide << 8) & 0x00FF00FF00FF00FF;
    return (wide | wide << 4) & 0x0F0F0F0F0F0F0F0F;
}

// Bit 4 of each byte, that of byte 0 in bit 0.
inline uint8_t fifth_bits(uint64_t codes) { return ((codes >> 4 & EACH_BYTE) * 0x0102040810204080) >> 56; }

constexpr int GROUPS = TILE / 8;

// Turns eight words of each group, each with a column of eight rows in AWQ's order, into words with eight columns of a row.
template <int STEP> inline void swap_codes(uint32_t (*words)[GROUPS], uint32_t mask) {
    constexpr int SHIFT = 4 * STEP;
    for (int i = 0; i < 8; ++i) {
        if (i & STEP) continue;
        for (int group = 0; group < GROUPS; ++group) {
            const uint32_t swapped = (words[i][group] >> SHIFT ^ words[i + STEP][group]) & mask;
            words[i + STEP][group] ^= swapped;
            words[i][group] ^= swapped << SHIFT;
        }
    }
}

constexpr int AWQ_PLACES[] = {0, 4, 1, 5, 2, 6, 3, 7};  // of rows 0 to 7 in a word, from the lowest bits on

struct Source {
    const uint32_t * words;
    int64_t column_stride, row_stride;  // in words
    bool is_gemm;                       // a word has a column of eight rows

    // Where `read` puts the words of the row `i` of a tile.
    int place(int i) const { return is_gemm ? AWQ_PLACES[i % 8] * GROUPS + i / 8 : i; }

    // Reads `count` words of each of `rows` rows, from word `first` of the row on.
    void read(int64_t first, int count, int64_t row, int rows, uint32_t (*result)[TILE]) const {
        if (is_gemm) {
            for (int word = 0; word < count; ++word) {
                auto codes = reinterpret_cast<uint32_t (*)[GROUPS]>(result[word]);
                const uint32_t * at = words + 8 * (first + word) * column_stride + row / 8;
                for (int i = 0; i < 8; ++i) memcpy(codes[i], at + i * column_stride, rows / 2);
                swap_codes<4>(codes, 0x0000FFFF);
                swap_codes<2>(codes, 0x00FF00FF);
                swap_codes<1>(codes, 0x0F0F0F0F);
            }
            return;
        }
        for (int word = 0; word < count; ++word) {
            const uint32_t * at = words + (first + word) * column_stride + row * row_stride;
            for (int i = 0; i < rows; ++i) result[word][i] = at[i * row_stride];
        }
    }
};

void store_q8_0(const uint32_t (*words)[TILE], int i, uint16_t scale, uint8_t * block) {
    memcpy(block, &scale, 2);
    for (int word = 0; word < 8; ++word) {
        const uint32_t codes = words[word][i] ^ 0x80808080;  // minus 128, in each byte
        memcpy(block + 2 + 4 * word, &codes, 4);
    }
}

inline void store_codes(const uint64_t * quarters, uint8_t * target) {
    const uint64_t halves[] = {quarters[0] | quarters[2] << 4, quarters[1] | quarters[3] << 4};
    memcpy(target, halves, 16);
}

void store_q4(const uint32_t (*words)[TILE], int i, uint16_t scale, const uint16_t * minimum, uint8_t * block) {
    const uint64_t quarters[] = {spread(words[0][i]), spread(words[1][i]), spread(words[2][i]), spread(words[3][i])};
    memcpy(block, &scale, 2);
    if (minimum) memcpy(block + 2, minimum, 2);
    store_codes(quarters, block + (minimum ? 4 : 2));
}

void store_q5_0(const uint32_t (*words)[TILE], int i, uint16_t scale, uint8_t zero, uint8_t * block) {
    const uint64_t offset = (16 - zero) * EACH_BYTE;
    uint64_t quarters[4];
    uint8_t fifth[4];
    for (int quarter = 0; quarter < 4; ++quarter) {
        const uint64_t codes = spread(words[quarter][i]) + offset;  // at most 31 per byte: no carry
        fifth[quarter] = fifth_bits(codes);
        quarters[quarter] = codes & 0x0F * EACH_BYTE;
    }
    memcpy(block, &scale, 2);
    memcpy(block + 2, fifth, 4);
    store_codes(quarters, block + 6);
}

}  // namespace

// Stores `rows` x `columns` codes as blocks of `type` at `target`. A row's next word is `column_stride` words on, the next
// row's word `row_stride`; with `is_gemm`, a word has a column of eight rows, and `rows` is a multiple of 8. `zeros` are
// needed for Q5_0, `minima` for Q4_1. Returns false and writes nothing if the type is not supported.
extern "C" __attribute__((visibility("default"))) bool qwenlocal_pack_rows(
    const uint32_t * words, int64_t column_stride, int64_t row_stride, bool is_gemm, int64_t rows, int64_t columns,
    int type, const uint16_t * scales, const uint8_t * zeros, const uint16_t * minima, uint8_t * target) {
    if (type != GGML_TYPE_Q4_0 && type != GGML_TYPE_Q4_1 && type != GGML_TYPE_Q5_0 && type != GGML_TYPE_Q8_0) return false;
    const Source source{words, column_stride, row_stride, is_gemm};
    const int64_t size = ggml_type_size((ggml_type)type), blocks = columns / 32;
    const int count = type == GGML_TYPE_Q8_0 ? 8 : 4;
    int places[TILE];
    for (int i = 0; i < TILE; ++i) places[i] = source.place(i);
    for (int64_t row = 0; row < rows; row += TILE) {
        const int tile = rows - row < TILE ? rows - row : TILE;
        for (int64_t block = 0; block < blocks; ++block) {
            uint32_t read[8][TILE];
            source.read(count * block, count, row, tile, read);
            for (int i = 0; i < tile; ++i) {
                uint8_t * at = target + ((row + i) * blocks + block) * size;
                const int64_t parameter = block * rows + row + i;
                const int place = places[i];
                if (type == GGML_TYPE_Q8_0) {
                    store_q8_0(read, place, scales[parameter], at);
                } else if (type == GGML_TYPE_Q5_0) {
                    store_q5_0(read, place, scales[parameter], zeros[parameter], at);
                } else {
                    store_q4(read, place, scales[parameter], type == GGML_TYPE_Q4_1 ? minima + parameter : nullptr, at);
                }
            }
        }
    }
    return true;
}
