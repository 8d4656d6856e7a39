/* What weights.py says of a matrix of weights, in two passes over it and one over each pair.

Counts and amaxes are exact. Sums are taken in float32 over at most 8192 elements and then in
float64, which is right to 2^-16; the order depends on the shape alone. One thread: the caller has
as many matrices as cores.

The second pass makes the casts of six recipes, yet rounds three times. Where a scale is a power of
two, the rounding of a normal number does not depend on it: rows, blocks and MX share one rounding.
What differs (subnormals, and with the scale of OCP what is clipped) is put right for the few blocks
of 32 that have such an element. Of an error only the square counts, so that a tie may go either
way: E4M3 is rounded in the integers.

bfloat16 is taken two at a time, as the halves of a word: a shift or a mask makes either a float32,
where loading it alone has to spread a vector. What is only compared stays 16 bits wide. */

#include "floats.h"

#ifdef __AVX512BW__
#define WIDE 1
#include "wide.h"
#else
#define WIDE 0
#endif

enum { SEGMENT = 2048, BAND = 16, TILE = 16, MX = 32, TURNED = 32, SQUARE = 128, SMALLEST = 27 << 23 };

#ifdef __FMA__
#define FMA(x, y, sum) __builtin_fmaf(x, y, sum)
#else
#define FMA(x, y, sum) ((x) * (y) + (sum))
#endif

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t units_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

/* How elements lie: float32, bfloat16, or bfloat16 in pairs, which rows of an odd length cannot. */
enum { FULL, HALF, PAIRED };

/* Element `k` of the `i`-th word, from element `at` on; one in a word unless they are paired. */
INLINE float element(const void *x, int64_t at, int64_t i, int k, int how) {
    if (how != PAIRED) return load(x, at + i, how == HALF);
    uint32_t word;
    memcpy(&word, (const uint16_t *)x + at + 2 * i, 4);
    return from_bits((int32_t)(k ? word & 0xffff0000u : word << 16));
}

/* --- first pass: what decides the scales, and the moments --- */

typedef struct {
    int32_t *row_amax, *column_amax; /* [rows], [columns]: magnitudes, NaN the largest */
    int32_t *tile_amax;              /* [rows / 16, columns / 16] */
    double *row_power, *column_power;
    double *fourth;                  /* [1]: sum of x^4 */
} Scan;

/* Amaxes of columns and tiles from those of the columns of at most 16 rows. */
INLINE void settle(const void *peaks, int half, int64_t count, int32_t *restrict column_amax,
                   int32_t *restrict tile_amax) {
    for (int64_t i = 0; i < count; i++) {
        int32_t peak = bits(load(peaks, i, half));
        column_amax[i] = peak > column_amax[i] ? peak : column_amax[i];
    }
    for (int64_t left = 0; left < count; left += TILE) {
        int32_t most = 0;
        for (int64_t i = left; i < left + TILE; i++) {
            int32_t peak = bits(load(peaks, i, half));
            most = peak > most ? peak : most;
        }
        tile_amax[left / TILE] = most;
    }
}

/* Amaxes of at most 16 rows, of elements whose code is the upper part of a float32's. */
#define PEAKS(name, integer, largest, shift)                                                       \
    static void name(const integer *x, int64_t columns, int64_t rows, int64_t count,               \
                     int32_t *row_amax, int32_t *restrict column_amax,                             \
                     int32_t *restrict tile_amax) {                                                \
        integer peaks[SEGMENT] = {0};                                                              \
        for (int64_t row = 0; row < rows; row++) {                                                 \
            const integer *restrict from = x + row * columns;                                      \
            integer most = 0;                                                                      \
            _Pragma("omp simd reduction(max : most)") for (int64_t i = 0; i < count; i++) {        \
                integer n = from[i] & largest;                                                     \
                most = n > most ? n : most, peaks[i] = n > peaks[i] ? n : peaks[i];                \
            }                                                                                      \
            int32_t peak = (int32_t)((uint32_t)most << shift);                                     \
            row_amax[row] = peak > row_amax[row] ? peak : row_amax[row];                           \
        }                                                                                          \
        settle(peaks, sizeof(integer) == 2, count, column_amax, tile_amax);                        \
    }

PEAKS(peaks_of_half, uint16_t, INT16_MAX, 16)
PEAKS(peaks_of_full, uint32_t, INT32_MAX, 0)

/* `words` of one row or of four, from element `at` on. */
INLINE void add_powers(const void *x, int how, int64_t at, int64_t columns, int64_t words, int four,
                       float (*restrict powers)[SEGMENT], double *row_power, double *fourth) {
    float p0 = 0, p1 = 0, p2 = 0, p3 = 0, q = 0;
    const int64_t second = at + columns, third = second + columns, last = third + columns;
#pragma omp simd reduction(+ : p0, p1, p2, p3, q)
    for (int64_t i = 0; i < words; i++)
        for (int k = 0; k < 1 + (how == PAIRED); k++) {
            float a = element(x, at, i, k, how), sum = a * a;
            p0 += sum, q = FMA(sum, sum, q);
            if (four) {
                float b = element(x, second, i, k, how), c = element(x, third, i, k, how);
                float d = element(x, last, i, k, how), sb = b * b, sc = c * c, sd = d * d;
                p1 += sb, p2 += sc, p3 += sd;
                q = FMA(sb, sb, q), q = FMA(sc, sc, q), q = FMA(sd, sd, q);
                sum = (sum + sb) + (sc + sd);
            }
            powers[k][i] += sum;
        }
    *fourth += q;
    row_power[0] += p0;
    if (four) row_power[1] += p1, row_power[2] += p2, row_power[3] += p3;
}

INLINE void scan(const void *x, int how, int64_t rows, int64_t columns, const Scan to) {
    const int64_t across = units_of(columns, TILE), each = 1 + (how == PAIRED);
    for (int64_t left = 0; left < columns; left += SEGMENT) {
        int64_t count = smaller(SEGMENT, columns - left), words = count / each;
        for (int64_t top = 0; top < rows; top += SQUARE) {
            float powers[2][SEGMENT] = {{0}};
            int64_t stop = smaller(top + SQUARE, rows), row = top;
            for (int64_t band = top; band < stop; band += BAND) {
                int64_t at = band * columns + left, end = smaller(band + BAND, stop);
                int32_t *columns_of = to.column_amax + left;
                int32_t *tiles_of = to.tile_amax + band / BAND * across + left / TILE;
                if (how == FULL)
                    peaks_of_full((const uint32_t *)x + at, columns, end - band, count,
                                  to.row_amax + band, columns_of, tiles_of);
                else
                    peaks_of_half((const uint16_t *)x + at, columns, end - band, count,
                                  to.row_amax + band, columns_of, tiles_of);
                for (; row + 4 <= end; row += 4)
                    add_powers(x, how, row * columns + left, columns, words, 1, powers,
                               to.row_power + row, to.fourth);
            }
            for (; row < stop; row++)
                add_powers(x, how, row * columns + left, columns, words, 0, powers,
                           to.row_power + row, to.fourth);
            double *restrict power = to.column_power + left;
            for (int64_t i = 0; i < words; i++)
                for (int64_t k = 0; k < each; k++) power[each * i + k] += powers[k][i];
        }
    }
}

#if WIDE
static void scan_wide(const uint16_t *x, int64_t rows, int64_t columns, const Scan to) {
    static const uint16_t none[SEGMENT];
    const int64_t across = units_of(columns, TILE);
    for (int64_t left = 0; left < columns; left += SEGMENT) {
        const int64_t count = smaller(SEGMENT, columns - left);
        for (int64_t top = 0; top < rows; top += SQUARE) {
            float powers[SEGMENT] = {0};
            uint16_t peaks[SEGMENT];
            for (int64_t row = top; row < smaller(top + SQUARE, rows); row += 4) {
                const int64_t height = smaller(4, rows - row);
                Four four;
                for (int i = 0; i < 4; i++)
                    four.at[i] = i < height ? x + (row + i) * columns + left : none;
                if (row % BAND == 0) memset(peaks, 0, sizeof peaks);
                scan_four(&four, count, peaks, powers, to.row_amax + row, to.row_power + row,
                          height, to.fourth);
                if (row % BAND == BAND - 4 || row + 4 >= rows)
                    settle(peaks, 1, count, to.column_amax + left,
                           to.tile_amax + row / BAND * across + left / TILE);
            }
            double *restrict power = to.column_power + left;
            for (int64_t i = 0; i < units_of(count, 32) * 32; i++)
                if (column_of(i) < count) power[column_of(i)] += powers[i];
        }
    }
}
#endif

/* x [rows, columns]; rows a multiple of 128 unless they are the last of the matrix. Adds to what
   the arrays hold, of which those of rows and tiles begin where x does. */
void fp8lab_scan(const void *x, int half, int64_t rows, int64_t columns, int32_t *row_amax,
                 int32_t *column_amax, int32_t *tile_amax, double *row_power, double *column_power,
                 double *fourth) {
    const Scan to = {row_amax, column_amax, tile_amax, row_power, column_power, fourth};
#if WIDE
    if (half) {
        scan_wide(x, rows, columns, to);
        return;
    }
#endif
    if (!half) scan(x, FULL, rows, columns, to);
    else if (columns % 2) scan(x, HALF, rows, columns, to);
    else scan(x, PAIRED, rows, columns, to);
}

/* --- second pass: casts --- */

enum { CURRENT, ROWWISE, BLOCK, MXFP8, MXFP8_FLOOR, NVFP4, RECIPES };

typedef struct {
    double error;
    int64_t flushed, saturated;
} Loss;

/* The same of corrections, kept apart by position in a block: no sum across a vector. */
typedef struct {
    float errors[MX];
    int32_t flushed[MX], saturated[MX];
} Lanes;

typedef struct {
    const Format *e4m3, *e2m1;
    float scale, scale_inv;         /* of the tensor */
    const float *rows;              /* [rows]: scales, powers of two */
    const float *squares;           /* [rows / 128, columns / 128]: the same */
    const float *tiles, *tiles_inv; /* [rows / 16, columns / 16] */
    Loss *loss;                     /* [RECIPES]; errors of current under its scale */
    Lanes *lanes;                   /* [RECIPES] */
    int64_t *zeros;                 /* [1] */
#if WIDE
    const Tables *tables;
#endif
} Casts;

/* Magnitudes of a part of a row, zeros behind them up to whole blocks of 128. */
typedef union {
    uint16_t halves[SEGMENT];
    uint32_t words[SEGMENT];
} Row;

INLINE void take_row(const void *x, int half, int64_t at, int64_t count, Row *row) {
    const int64_t whole = units_of(count, SQUARE) * SQUARE;
    if (half) {
        const uint16_t *from = (const uint16_t *)x + at;
        for (int64_t i = 0; i < count; i++) row->halves[i] = from[i] & INT16_MAX;
        for (int64_t i = count; i < whole; i++) row->halves[i] = 0;
    } else {
        const uint32_t *from = (const uint32_t *)x + at;
        for (int64_t i = 0; i < count; i++) row->words[i] = from[i] & INT32_MAX;
        for (int64_t i = count; i < whole; i++) row->words[i] = 0;
    }
}

INLINE float size_at(const Row *row, int64_t i, int half) {
    return from_bits((int32_t)(half ? (uint32_t)row->halves[i] << 16 : row->words[i]));
}

/* x >= 0 on the grid of f, whose largest value it does not exceed. */
INLINE float rounded(float x, int32_t smallest_exponent, const Format f) {
    int32_t exponent = bits(x) & EXPONENT;
    exponent = exponent > smallest_exponent ? exponent : smallest_exponent;
    float step = from_bits(exponent + f.shift);
    return (x + step) - step;
}

/* x >= 0 less what it is on the grid of f, had that no smallest exponent; ties go up. */
INLINE float off_grid(float x, const Format f) {
    const int32_t unit = 1 << (f.shift >> 23);
    return x - from_bits((bits(x) + unit / 2) & -unit);
}

/* What the tiles of 16 rows give to each word; and to each bfloat16 the largest code that E2M1
   flushes and the largest that it does not saturate. */
typedef struct {
    float scale[SEGMENT], scale_inv[SEGMENT];
    uint16_t flushed[SEGMENT], held[SEGMENT];
} Strip;

/* The largest bfloat16 code whose product with `scale` is no more than `limit`. */
INLINE uint16_t last_code(float limit, float scale) {
    int32_t code = (bits(limit / scale) >> 16) + 1; /* the quotient is rounded, the code cut off */
    for (int i = 0; i < 2; i++) code -= from_bits(code << 16) * scale > limit;
    return (uint16_t)code;
}

INLINE void take_tiles(const float *scales, const float *scales_inv, int half, int64_t count,
                       const Format g, Strip *strip) {
    const float flushed = from_bits(g.smallest_exponent + g.shift) * 0x1p-24f;
    const int words = half ? TILE / 2 : TILE;
    const int64_t tiles = units_of(count, TILE);
    for (int64_t tile = 0; tile < SQUARE / TILE * units_of(count, SQUARE); tile++) {
        float scale = scales[smaller(tile, tiles - 1)];
        for (int i = 0; i < words; i++) {
            strip->scale[words * tile + i] = half && WIDE ? 4.0f * scale : scale; /* quarters */
            strip->scale_inv[words * tile + i] = scales_inv[smaller(tile, tiles - 1)];
        }
        if (!half) continue;
        uint16_t lost = last_code(flushed, scale), held = last_code(g.limit, scale);
        for (int i = 0; i < TILE; i++)
            strip->flushed[TILE * tile + i] = lost, strip->held[TILE * tile + i] = held;
    }
}

INLINE void count_nvfp4(const Row *row, int64_t count, const Strip *strip, Loss *loss) {
    uint16_t flushed = 0, saturated = 0;
#pragma omp simd reduction(+ : flushed, saturated)
    for (int64_t i = 0; i < count; i++) {
        flushed += row->halves[i] <= strip->flushed[i];
        saturated += row->halves[i] > strip->held[i];
    }
    loss->flushed += flushed, loss->saturated += saturated;
}

/* Three roundings of a part of a row; `shared` is the one of all powers of two. Elements are at
   most the amax of what shares their scale, hence E4M3 needs no clipping here. */
INLINE void round_row(const Row *row, int half, int64_t words, const Casts *how,
                      const Strip *strip, double *shared) {
    const Format f = *how->e4m3, g = *how->e2m1;
    const float scale = how->scale;
    float same = 0, current = 0, nvfp4 = 0;
    int32_t flushed = 0, saturated = 0;
#pragma omp simd reduction(+ : same, current, nvfp4, flushed, saturated)
    for (int64_t i = 0; i < words; i++)
        for (int k = 0; k < 1 + half; k++) {
            uint32_t word = row->words[i];
            float size = from_bits((int32_t)(!half ? word : k ? word & 0xffff0000u : word << 16));
            float off = off_grid(size, f), off_current = off_grid(size * scale, f);
            same = FMA(off, off, same), current = FMA(off_current, off_current, current);
            float y = size * strip->scale[i], z = y > g.largest ? g.largest : y;
            z = rounded(z, g.smallest_exponent, g);
            float off_nvfp4 = FMA(z, strip->scale_inv[i], -size);
            nvfp4 = FMA(off_nvfp4, off_nvfp4, nvfp4);
            if (!half) flushed += z == 0.0f, saturated += y > g.limit;
        }
    *shared += same;
    how->loss[CURRENT].error += current;
    how->loss[NVFP4].error += nvfp4;
    how->loss[NVFP4].flushed += flushed, how->loss[NVFP4].saturated += saturated;
}

/* What a scale does to at most 32 elements of which some become subnormal, less what the rounding
   without a smallest exponent has done. `scale_inv` is 1 where the errors stay under the scale. */
INLINE void put_right(const Row *row, int half, int64_t from, int64_t width, float scale,
                      float scale_inv, const Format f, Lanes *lanes) {
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        float size = size_at(row, from + i, half), y = size * scale;
        float z = rounded(y, f.smallest_exponent, f);
        float error = (z - y) * scale_inv, counted = off_grid(y, f) * scale_inv;
        lanes->errors[i] += error * error - counted * counted;
        lanes->flushed[i] += (z == 0.0f) & (size != 0.0f);
    }
}

/* The same of elements that are clipped. */
INLINE void clip(const Row *row, int half, int64_t from, int64_t width, float scale, const Format f,
                 Lanes *lanes) {
    const float largest = f.largest / scale, limit = f.limit / scale;
#pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        float size = size_at(row, from + i, half);
        float error = size - largest, counted = off_grid(size, f);
        lanes->errors[i] += error > 0.0f ? error * error - counted * counted : 0.0f;
        lanes->saturated[i] += size > limit;
    }
}

INLINE void fold(Lanes *lanes, Loss *loss) {
    float errors = 0;
    int32_t flushed = 0, saturated = 0;
#pragma omp simd reduction(+ : errors, flushed, saturated)
    for (int i = 0; i < MX; i++)
        errors += lanes->errors[i], flushed += lanes->flushed[i], saturated += lanes->saturated[i];
    loss->error += errors, loss->flushed += flushed, loss->saturated += saturated;
    *lanes = (Lanes){0};
}

/* The power of two that TE's MXFP8 (up) or OCP's (floor) gives to a block of that amax. */
INLINE float exponent_scale(int32_t amax, float largest_inv, int32_t top, int up) {
    int32_t code;
    if (up) {
        int32_t scaled = bits(from_bits(amax) * largest_inv);
        code = scaled <= 0x400000 ? 0 : (scaled + 0x7fffff) >> 23;
    } else code = (amax >> 23) - top;
    code = code < 0 ? 0 : code > 254 ? 254 : code;
    int32_t inverse = (254 - code) << 23;
    return from_bits(inverse < 0x400000 ? 0x400000 : inverse);
}

/* One block of 32 in which something may be subnormal. */
static __attribute__((noinline)) void look_at_block(const Row *row, int half, int64_t from,
                                                    int64_t width, float row_scale,
                                                    float square_scale, const Casts *how) {
    const Format f = *how->e4m3;
    const float largest_inv = (float)(1.0 / (double)f.largest);
    const int32_t top = (bits(f.largest) >> 23) - 127;
    int32_t most = 0, zeros = 0;
#pragma omp simd reduction(max : most) reduction(+ : zeros)
    for (int64_t i = 0; i < width; i++) {
        int32_t n = bits(size_at(row, from + i, half));
        most = n > most ? n : most, zeros += n == 0;
    }
    *how->zeros += zeros;
    float up = exponent_scale(most, largest_inv, top, 1);
    float floor = exponent_scale(most, largest_inv, top, 0);
    put_right(row, half, from, width, how->scale, 1.0f, f, how->lanes + CURRENT);
    put_right(row, half, from, width, row_scale, 1.0f / row_scale, f, how->lanes + ROWWISE);
    put_right(row, half, from, width, square_scale, 1.0f / square_scale, f, how->lanes + BLOCK);
    put_right(row, half, from, width, up, 1.0f / up, f, how->lanes + MXFP8);
    put_right(row, half, from, width, floor, 1.0f / floor, f, how->lanes + MXFP8_FLOOR);
}

/* The upper halves of a row's elements, by which it is told which blocks to look at. */
INLINE const uint16_t *upper(const Row *row, int half, int64_t count, uint16_t *memory) {
    if (half) return row->halves;
    for (int64_t i = 0; i < count; i++) memory[i] = (uint16_t)(row->words[i] >> 16);
    return memory;
}

/* Of each two neighbours the larger of `most` and the smaller of `least`. */
INLINE void halve(const uint16_t *restrict most, const uint16_t *restrict least, int64_t count,
                  uint16_t *restrict to_most, uint16_t *restrict to_least) {
#pragma omp simd
    for (int64_t i = 0; i < count / 2; i++) {
        uint16_t a = most[2 * i], b = most[2 * i + 1], c = least[2 * i], d = least[2 * i + 1];
        to_most[i] = a > b ? a : b, to_least[i] = c < d ? c : d;
    }
}

/* The largest and the smallest of each block of 32, in whole blocks. */
INLINE void ranges_of(const uint16_t *codes, int64_t count, uint16_t *most, uint16_t *least) {
    uint16_t m2[SEGMENT / 2], l2[SEGMENT / 2], m4[SEGMENT / 4], l4[SEGMENT / 4];
    halve(codes, codes, count, m2, l2);
    halve(m2, l2, count / 2, m4, l4);
    halve(m4, l4, count / 4, m2, l2);
    halve(m2, l2, count / 8, m4, l4);
    halve(m4, l4, count / 16, most, least);
}

/* Below it something may be subnormal under a scale, or under half of it: MX has no less. */
INLINE float normal_of(float scale, const Format f) {
    return from_bits(f.smallest_exponent) / scale * 2.0f;
}

enum { CLIPPED = 1, SUBNORMAL = 2 };

/* What is to be put right of a block of 32, of whose codes the largest is `most`. */
INLINE uint16_t needs_of(uint16_t most, int below, int32_t fraction) {
    below |= most < SMALLEST >> 16;
    return (uint16_t)(((most & 0x7f) > fraction) | below * SUBNORMAL);
}

/* Which blocks of 32 of a part of a row need to be put right: first all of it, for a branch per
   block is as dear as the block. `bounds` are upper halves, of each block. */
INLINE void look_at_row(const Row *row, int half, int64_t count, const uint16_t *bounds,
                        int32_t fraction, uint16_t *most, uint16_t *needs) {
    uint16_t least[SEGMENT / MX], memory[SEGMENT];
    ranges_of(upper(row, half, count, memory), count, most, least);
#pragma omp simd
    for (int64_t block = 0; block < count / MX; block++)
        needs[block] = needs_of(most[block], least[block] <= bounds[block], fraction);
}

INLINE void put_blocks_right(const Row *row, int half, int64_t count, float row_scale,
                             const float *squares, const uint16_t *most, const uint16_t *needs,
                             const Casts *how) {
    const Format f = *how->e4m3;
    const int32_t top = (bits(f.largest) >> 23) - 127;
    int32_t where[SEGMENT / MX], found = 0;
    for (int32_t block = 0; block < units_of(count, MX); block++)
        where[found] = block, found += needs[block] != 0;
    for (int32_t i = 0; i < found; i++) {
        int64_t from = MX * (int64_t)where[i], width = smaller(MX, count - from);
        Lanes *lanes = how->lanes + MXFP8_FLOOR;
        if (needs[where[i]] & CLIPPED) {
            float floor = exponent_scale(most[where[i]] << 16, 0.0f, top, 0);
#if WIDE
            if (half && most[where[i]] >= FROM_CODE)
                lanes->saturated[0] += clip_block(row->halves + from, most[where[i]], how->tables,
                                                  lanes->errors);
            else
#endif
            if (width == MX) clip(row, half, from, MX, floor, f, lanes);
            else clip(row, half, from, width, floor, f, lanes);
        }
        if (needs[where[i]] & SUBNORMAL)
            look_at_block(row, half, from, width, row_scale, squares[from / SQUARE], how);
    }
}

#if WIDE
/* `take_row`, `round_row`, `count_nvfp4` and `look_at_row` in one. */
INLINE void round_row_wide(const uint16_t *from, int64_t count, const Casts *how,
                           const Strip *strip, const uint16_t *bounds, int32_t fraction, Row *row,
                           uint16_t *most, uint16_t *needs, double *shared) {
    Rounded sums = {0};
    uint32_t below[SEGMENT / MX];
    for (int64_t i = 0; i < count; i += SQUARE)
        round_four(from + i, count - i, how->tables, strip->scale + i / 2, strip->scale_inv + i / 2,
                   strip->flushed + i, strip->held + i, bounds[i / MX], row->halves + i,
                   most + i / MX, below + i / MX, &sums);
#pragma omp simd
    for (int64_t block = 0; block < SQUARE / MX * units_of(count, SQUARE); block++)
        needs[block] = needs_of(most[block], below[block] != 0, fraction);
    *shared += _mm512_reduce_add_ps(sums.same);
    how->loss[CURRENT].error += _mm512_reduce_add_ps(sums.current);
    how->loss[NVFP4].error += _mm512_reduce_add_ps(sums.nvfp4);
    how->loss[NVFP4].flushed += sums.flushed, how->loss[NVFP4].saturated += sums.saturated;
}
#endif

INLINE void cast(const void *x, int half, int64_t rows, int64_t columns, const Casts *how) {
    const int64_t tiles = units_of(columns, TILE), squares = units_of(columns, SQUARE);
    const int32_t fraction = ((bits(how->e4m3->largest) & 0x7fffff) >> 16) - !half;
    double shared = 0;
    for (int64_t left = 0; left < columns; left += SEGMENT) {
        const int64_t count = smaller(SEGMENT, columns - left);
        const int64_t whole = units_of(count, SQUARE) * SQUARE;
        uint16_t bounds[SEGMENT / MX], limits[SEGMENT / MX], most[SEGMENT / MX];
        uint16_t needs[SEGMENT / MX];
        Strip strip;
        Row taken;
        for (int64_t row = 0; row < rows; row++) {
            int64_t tile = row / BAND * tiles + left / TILE;
            const float *square = how->squares + row / SQUARE * squares + left / SQUARE;
            if (row % BAND == 0)
                take_tiles(how->tiles + tile, how->tiles_inv + tile, half, count, *how->e2m1,
                           &strip);
            for (int64_t i = 0; row % SQUARE == 0 && i < whole / MX; i++) {
                float scale = square[MX * i / SQUARE];
                scale = scale < how->scale ? scale : how->scale;
                bounds[i] = (uint16_t)(bits(normal_of(scale, *how->e4m3)) >> 16);
            }
            uint16_t of_row = (uint16_t)(bits(normal_of(how->rows[row], *how->e4m3)) >> 16);
            for (int64_t i = 0; i < whole / MX; i++)
                limits[i] = bounds[i] > of_row ? bounds[i] : of_row;
#if WIDE
            if (half)
                round_row_wide((const uint16_t *)x + row * columns + left, count, how, &strip,
                               limits, fraction, &taken, most, needs, &shared);
            else
#endif
            {
                take_row(x, half, row * columns + left, count, &taken);
                round_row(&taken, half, half ? whole / 2 : whole, how, &strip, &shared);
                if (half) count_nvfp4(&taken, whole, &strip, how->loss + NVFP4);
                look_at_row(&taken, half, whole, limits, fraction, most, needs);
            }
            how->loss[NVFP4].flushed -= whole - count;
            put_blocks_right(&taken, half, count, how->rows[row], square, most, needs, how);
            for (int recipe = CURRENT; (row + 1) % BAND == 0 && recipe <= MXFP8_FLOOR; recipe++)
                fold(how->lanes + recipe, how->loss + recipe);
        }
        for (int recipe = CURRENT; recipe <= MXFP8_FLOOR; recipe++)
            fold(how->lanes + recipe, how->loss + recipe);
    }
    for (int recipe = ROWWISE; recipe <= MXFP8_FLOOR; recipe++) how->loss[recipe].error += shared;
    how->loss[CURRENT].error *= (double)how->scale_inv * how->scale_inv;
    how->loss[NVFP4].flushed -= *how->zeros;
}

/* x [rows, columns]; rows a multiple of 128 unless they are the last of the matrix. Adds to
   errors [6], counts [6, 2] (flushed, saturated) and zeros [1]. All elements are finite. */
void fp8lab_cast_weights(const void *x, int half, int64_t rows, int64_t columns, const Format *e4m3,
                         const Format *e2m1, float scale, float scale_inv, const float *row_scales,
                         const float *squares, const float *tiles, const float *tiles_inv,
                         double *errors, int64_t *counts, int64_t *zeros) {
    Loss loss[RECIPES] = {0};
    Lanes lanes[RECIPES] = {0};
    int64_t none = 0;
#if WIDE
    const Tables tables = tables_of(scale, *e4m3, *e2m1);
#endif
    const Casts how = {e4m3, e2m1, scale, scale_inv, row_scales, squares, tiles, tiles_inv,
                       loss, lanes, &none,
#if WIDE
                       &tables,
#endif
    };
    if (half) cast(x, 1, rows, columns, &how);
    else cast(x, 0, rows, columns, &how);
    *zeros += none;
    for (int recipe = 0; recipe < RECIPES; recipe++) {
        errors[recipe] += loss[recipe].error;
        counts[2 * recipe] += loss[recipe].flushed;
        counts[2 * recipe + 1] += loss[recipe].saturated;
    }
}

/* --- pairs of rows --- */

INLINE void pairs(const void *a, const void *b, const void *c, int how, int64_t rows, int64_t n,
                  double *dots, double *others) {
    for (int64_t row = 0; row < rows; row++) {
        dots[row] = others[row] = 0;
        for (int64_t left = 0; left < n; left += SEGMENT) {
            int64_t at = row * n + left, words = smaller(SEGMENT, n - left) / (1 + (how == PAIRED));
            float dot = 0, other = 0;
#pragma omp simd reduction(+ : dot, other)
            for (int64_t i = 0; i < words; i++)
                for (int k = 0; k < 1 + (how == PAIRED); k++) {
                    float g = element(a, at, i, k, how);
                    dot = FMA(g, element(b, at, i, k, how), dot);
                    other = FMA(g, element(c, at, i, k, how), other);
                }
            dots[row] += dot, others[row] += other;
        }
    }
}

#if WIDE
static void pairs_wide(const uint16_t *a, const uint16_t *b, const uint16_t *c, int64_t rows,
                       int64_t n, double *dots, double *others) {
    for (int64_t row = 0; row < rows; row++, a += n, b += n, c += n) {
        dots[row] = others[row] = 0;
        for (int64_t left = 0; left < n; left += SEGMENT)
            dot_rows(a + left, b + left, c + left, smaller(SEGMENT, n - left), dots + row,
                     others + row);
    }
}
#endif

/* Scalar products of each row of a [rows, n] with those of b and of c. */
void fp8lab_pairs(const void *a, const void *b, const void *c, int half, int64_t rows, int64_t n,
                  double *dots, double *others) {
#if WIDE
    if (half) {
        pairs_wide(a, b, c, rows, n, dots, others);
        return;
    }
#endif
    if (!half) pairs(a, b, c, FULL, rows, n, dots, others);
    else if (n % 2) pairs(a, b, c, HALF, rows, n, dots, others);
    else pairs(a, b, c, PAIRED, rows, n, dots, others);
}

/* --- what lies otherwise --- */

/* One step of a transposition: the index of an element of 32 × 32 is turned left by a bit. */
INLINE void riffle(const uint16_t *restrict from, uint16_t *restrict to) {
    enum { HALF_OF_IT = TURNED * TURNED / 2 };
    for (int i = 0; i < HALF_OF_IT; i++) to[2 * i] = from[i], to[2 * i + 1] = from[HALF_OF_IT + i];
}

INLINE void turn_whole(const uint16_t *from, int64_t step, int64_t stride, int64_t columns,
                       uint16_t *to) {
    uint16_t a[TURNED * TURNED], b[TURNED * TURNED];
    for (int64_t i = 0; i < TURNED; i++)
        for (int64_t row = 0; row < TURNED; row++)
            a[TURNED * i + row] = from[row * step + i * stride];
    riffle(a, b), riffle(b, a), riffle(a, b), riffle(b, a), riffle(a, b);
    for (int64_t row = 0; row < TURNED; row++)
        memcpy(to + row * columns, b + TURNED * row, sizeof(uint16_t) * TURNED);
}

/* to [rows, columns] of elements of 16 bits that lie `step` apart in a column, `stride` in a row. */
void fp8lab_turn(const uint16_t *from, int64_t rows, int64_t columns, int64_t step, int64_t stride,
                 uint16_t *to) {
    for (int64_t top = 0; top < rows; top += TURNED)
        for (int64_t left = 0; left < columns; left += TURNED) {
            const uint16_t *corner = from + top * step + left * stride;
            uint16_t *there = to + top * columns + left;
            int64_t height = smaller(TURNED, rows - top), width = smaller(TURNED, columns - left);
            if (height == TURNED && width == TURNED && step == 1)
                turn_whole(corner, 1, stride, columns, there);
            else if (height == TURNED && width == TURNED && step == 2)
                turn_whole(corner, 2, stride, columns, there);
            else
                for (int64_t row = 0; row < height; row++)
                    for (int64_t i = 0; i < width; i++)
                        there[row * columns + i] = corner[row * step + i * stride];
        }
}

/* NVFP4's scale of each tile and its inverse, from the tiles' amaxes. */
void fp8lab_tile_scales(const float *amax, int64_t count, const Format *e4m3, float factor,
                        float tensor_inv, float *scales, float *scales_inv) {
    const Format f = *e4m3;
    for (int64_t i = 0; i < count; i++) {
        float inverse = on_grid(amax[i] * factor, f) * tensor_inv, scale = 1.0f / inverse;
        scales_inv[i] = inverse, scales[i] = scale < FLT_MAX ? scale : FLT_MAX;
    }
}
