/* What weights.py says of a matrix of weights, in two passes over it and one over each pair.

Counts and amaxes are exact. Sums are taken in float32 over at most 4096 elements and then in
float64, which is right to 2^-16; the order depends on the shape alone. One thread: the caller has
as many matrices as cores.

The second pass makes the casts of six recipes, yet rounds three times. Where a scale is a power of
two, the rounding of a normal number does not depend on it: rows, blocks and MX share one rounding,
and what differs (subnormals, and with the scale of OCP what is clipped) is put right for the few
blocks of 32 that have such an element. */

#include "floats.h"

enum { SEGMENT = 4096, BAND = 16, TILE = 16, MX = 32, SQUARE = 128, SMALLEST = 27 << 23 };

#ifdef __FMA__
#define SQUARE_OF(x, sum) __builtin_fmaf(x, x, sum)
#else
#define SQUARE_OF(x, sum) ((x) * (x) + (sum))
#endif

INLINE float square_of(float x, float sum) { return SQUARE_OF(x, sum); }

/* x >= 0 on the grid of f, whose largest value it does not exceed. */
INLINE float rounded(float x, int32_t smallest_exponent, const Format f) {
    int32_t exponent = bits(x) & EXPONENT;
    exponent = exponent > smallest_exponent ? exponent : smallest_exponent;
    float step = from_bits(exponent + f.shift);
    return (x + step) - step;
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t units_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

/* --- first pass: what decides the scales, and the moments --- */

typedef struct {
    int32_t *row_amax, *column_amax; /* [rows], [columns]: magnitudes, NaN the largest */
    int32_t *tile_amax;              /* [rows / 16, columns / 16] */
    double *row_power, *column_power;
    double *fourth;                  /* [1]: sum of x^4 */
} Scan;

/* `count` columns of one row or of four, from element `at` on. */
INLINE void scan_rows(const void *x, int half, int64_t at, int64_t columns, int64_t count, int four,
                      int32_t *restrict peaks, float *restrict powers, int32_t *row_amax,
                      double *row_power, double *fourth) {
    int32_t m0 = 0, m1 = 0, m2 = 0, m3 = 0;
    float p0 = 0, p1 = 0, p2 = 0, p3 = 0, q = 0;
    const int64_t second = at + columns, third = second + columns, last = third + columns;
#pragma omp simd reduction(max : m0, m1, m2, m3) reduction(+ : p0, p1, p2, p3, q)
    for (int64_t i = 0; i < count; i++) {
        float a = load(x, at + i, half), s = a * a, sum = s, t = s * s;
        int32_t n = bits(a) & INT32_MAX, most = n;
        m0 = n > m0 ? n : m0, p0 += s;
        if (four) {
            float b = load(x, second + i, half), c = load(x, third + i, half);
            float d = load(x, last + i, half), sb = b * b, sc = c * c, sd = d * d;
            int32_t nb = bits(b) & INT32_MAX, nc = bits(c) & INT32_MAX, nd = bits(d) & INT32_MAX;
            m1 = nb > m1 ? nb : m1, m2 = nc > m2 ? nc : m2, m3 = nd > m3 ? nd : m3;
            p1 += sb, p2 += sc, p3 += sd;
            sum = (s + sb) + (sc + sd);
            t = (s * s + sb * sb) + (sc * sc + sd * sd);
            nb = nb > nc ? nb : nc, most = n > nd ? n : nd, most = most > nb ? most : nb;
        }
        peaks[i] = most > peaks[i] ? most : peaks[i];
        powers[i] += sum, q += t;
    }
    *fourth += q;
    row_amax[0] = m0 > row_amax[0] ? m0 : row_amax[0], row_power[0] += p0;
    if (!four) return;
    row_amax[1] = m1 > row_amax[1] ? m1 : row_amax[1], row_power[1] += p1;
    row_amax[2] = m2 > row_amax[2] ? m2 : row_amax[2], row_power[2] += p2;
    row_amax[3] = m3 > row_amax[3] ? m3 : row_amax[3], row_power[3] += p3;
}

INLINE void scan(const void *x, int half, int64_t rows, int64_t columns, const Scan to) {
    const int64_t across = units_of(columns, TILE);
    for (int64_t left = 0; left < columns; left += SEGMENT) {
        int64_t count = smaller(SEGMENT, columns - left);
        for (int64_t band = 0; band < rows; band += BAND) {
            int32_t peaks[SEGMENT] = {0};
            float powers[SEGMENT] = {0};
            int64_t stop = smaller(band + BAND, rows), row = band;
            for (; row + 4 <= stop; row += 4)
                scan_rows(x, half, row * columns + left, columns, count, 1, peaks, powers,
                          to.row_amax + row, to.row_power + row, to.fourth);
            for (; row < stop; row++)
                scan_rows(x, half, row * columns + left, columns, count, 0, peaks, powers,
                          to.row_amax + row, to.row_power + row, to.fourth);
            for (int64_t i = 0; i < count; i++) {
                int64_t c = left + i;
                int32_t *tile = to.tile_amax + band / BAND * across + c / TILE;
                *tile = peaks[i] > *tile ? peaks[i] : *tile;
                to.column_amax[c] = peaks[i] > to.column_amax[c] ? peaks[i] : to.column_amax[c];
                to.column_power[c] += powers[i];
            }
        }
    }
}

/* x [rows, columns]; rows a multiple of 16 unless they are the last of the matrix. Adds to what the
   arrays hold, of which those of rows and tiles begin where x does. */
void fp8lab_scan(const void *x, int half, int64_t rows, int64_t columns, int32_t *row_amax,
                 int32_t *column_amax, int32_t *tile_amax, double *row_power, double *column_power,
                 double *fourth) {
    const Scan to = {row_amax, column_amax, tile_amax, row_power, column_power, fourth};
    if (half) scan(x, 1, rows, columns, to);
    else scan(x, 0, rows, columns, to);
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
    Loss *loss;                     /* [RECIPES] */
    int64_t *zeros;                 /* [1] */
} Casts;

/* Three roundings of `count` columns of one row; `shared` is the one of all powers of two. Elements
   are at most the amax of what shares their scale, hence E4M3 needs no clipping here. */
INLINE void round_row(const void *x, int half, int64_t at, int64_t count, const Casts *how,
                      const float *restrict tile, const float *restrict tile_inv, double *shared) {
    const Format f = *how->e4m3, g = *how->e2m1;
    const float scale = how->scale;
    float same = 0, current = 0, nvfp4 = 0;
    int32_t flushed = 0, saturated = 0;
#pragma omp simd reduction(+ : same, current, nvfp4, flushed, saturated)
    for (int64_t i = 0; i < count; i++) {
        float size = from_bits(bits(load(x, at + i, half)) & INT32_MAX);
        same = square_of(rounded(size, 0, f) - size, same);
        float y = size * scale;
        current = square_of(rounded(y, f.smallest_exponent, f) - y, current);
        float z = size * tile[i], w = z > g.largest ? g.largest : z;
        w = rounded(w, g.smallest_exponent, g);
        nvfp4 = square_of(w * tile_inv[i] - size, nvfp4);
        flushed += w == 0.0f, saturated += z > g.limit;
    }
    *shared += same;
    how->loss[CURRENT].error += (double)current * how->scale_inv * how->scale_inv;
    how->loss[NVFP4].error += nvfp4;
    how->loss[NVFP4].flushed += flushed, how->loss[NVFP4].saturated += saturated;
}

/* What a power of two does to at most 32 elements, less what the shared rounding does. */
INLINE void put_right_some(const void *x, int half, int64_t from, int64_t count, float scale,
                           const Format f, Lanes *lanes) {
    const float scale_inv = 1.0f / scale;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float size = from_bits(bits(load(x, from + i, half)) & INT32_MAX), y = size * scale;
        float z = rounded(y > f.largest ? f.largest : y, f.smallest_exponent, f);
        float error = z * scale_inv - size, shared = rounded(size, 0, f) - size;
        lanes->errors[i] += error * error - shared * shared;
        lanes->flushed[i] += (z == 0.0f) & (size != 0.0f), lanes->saturated[i] += y > f.limit;
    }
}

INLINE void put_right(const void *x, int half, int64_t from, int64_t count, float scale,
                      const Format f, Lanes *lanes) {
    if (count == MX) put_right_some(x, half, from, MX, scale, f, lanes);
    else put_right_some(x, half, from, count, scale, f, lanes);
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

/* The largest and the smallest magnitude of 32 elements. */
INLINE void range_of(const void *x, int half, int64_t from, int64_t count, int32_t *most,
                     int32_t *least) {
    if (half && count == MX) {
        const uint16_t *codes = (const uint16_t *)x + from;
        uint16_t high = 0, low = UINT16_MAX;
#pragma omp simd reduction(max : high) reduction(min : low)
        for (int i = 0; i < MX; i++) {
            uint16_t n = codes[i] & INT16_MAX;
            high = n > high ? n : high, low = n < low ? n : low;
        }
        *most = high << 16, *least = low << 16;
        return;
    }
    int32_t high = 0, low = INT32_MAX;
#pragma omp simd reduction(max : high) reduction(min : low)
    for (int64_t i = 0; i < count; i++) {
        int32_t n = bits(load(x, from + i, half)) & INT32_MAX;
        high = n > high ? n : high, low = n < low ? n : low;
    }
    *most = high, *least = low;
}

/* One block of 32 in which something is below `bound` or clipped. */
INLINE void look_at_block(const void *x, int half, int64_t from, int64_t width, int32_t most,
                          int below, float row_scale, float square_scale, const Casts *how,
                          Lanes *lanes) {
    const Format f = *how->e4m3;
    const float largest_inv = (float)(1.0 / (double)f.largest);
    const int32_t top = (bits(f.largest) >> 23) - 127;
    float floor = exponent_scale(most, largest_inv, top, 0);
    put_right(x, half, from, width, floor, f, lanes + MXFP8_FLOOR);
    if (!below) return;
    float up = exponent_scale(most, largest_inv, top, 1);
    put_right(x, half, from, width, row_scale, f, lanes + ROWWISE);
    put_right(x, half, from, width, square_scale, f, lanes + BLOCK);
    put_right(x, half, from, width, up, f, lanes + MXFP8);
    for (int64_t i = 0; i < width; i++) {
        float size = from_bits(bits(load(x, from + i, half)) & INT32_MAX);
        int zero = size == 0.0f;
        *how->zeros += zero;
        how->loss[CURRENT].flushed += !zero & (on_grid(size * how->scale, f) == 0.0f);
    }
}

/* Blocks of 32 columns of one row: first which of them need it, for a branch per block is as dear
   as the block. */
INLINE void look_at_blocks(const void *x, int half, int64_t at, int64_t count, float row_scale,
                           const float *squares, const Casts *how, Lanes *lanes) {
    const Format f = *how->e4m3;
    const float flushed = from_bits(f.smallest_exponent) * 0x1p-3f * how->scale_inv;
    const int32_t fraction = bits(f.largest) & 0x7fffff;
    int32_t most[SEGMENT / MX], where[SEGMENT / MX], found = 0;
    for (int64_t left = 0; left < count; left += MX) {
        float square = squares[left / SQUARE], smallest = row_scale < square ? row_scale : square;
        /* The scale of MX is no smaller, or half of it. */
        float normal = from_bits(f.smallest_exponent) / smallest * 2.0f;
        int32_t high, low, bound = bits(normal > flushed ? normal : flushed);
        range_of(x, half, at + left, smaller(MX, count - left), &high, &low);
        int below = (low < bound) | (high < SMALLEST);
        most[found] = high, where[found] = (int32_t)left << 1 | below;
        found += below | ((high & 0x7fffff) > fraction);
    }
    for (int32_t i = 0; i < found; i++) {
        int64_t left = where[i] >> 1;
        look_at_block(x, half, at + left, smaller(MX, count - left), most[i], where[i] & 1,
                      row_scale, squares[left / SQUARE], how, lanes);
    }
    fold(lanes + MXFP8_FLOOR, how->loss + MXFP8_FLOOR);
}

INLINE void cast(const void *x, int half, int64_t rows, int64_t columns, const Casts *how) {
    const int64_t tiles = units_of(columns, TILE), squares = units_of(columns, SQUARE);
    double shared = 0;
    Lanes lanes[RECIPES] = {0};
    for (int64_t left = 0; left < columns; left += SEGMENT) {
        int64_t count = smaller(SEGMENT, columns - left);
        float tile[SEGMENT], tile_inv[SEGMENT];
        for (int64_t row = 0; row < rows; row++) {
            int64_t first = row / BAND * tiles + left / TILE, at = row * columns + left;
            for (int64_t i = 0; row % BAND == 0 && i < count; i += TILE, first++)
                for (int64_t j = 0; j < TILE; j++)
                    tile[i + j] = how->tiles[first], tile_inv[i + j] = how->tiles_inv[first];
            round_row(x, half, at, count, how, tile, tile_inv, &shared);
            const float *square = how->squares + row / SQUARE * squares + left / SQUARE;
            look_at_blocks(x, half, at, count, how->rows[row], square, how, lanes);
        }
    }
    for (int recipe = ROWWISE; recipe <= MXFP8_FLOOR; recipe++) fold(lanes + recipe, how->loss + recipe), how->loss[recipe].error += shared;
    how->loss[NVFP4].flushed -= *how->zeros;
}

/* x [rows, columns]; rows a multiple of 128 unless they are the last of the matrix. Adds to
   errors [6], counts [6, 2] (flushed, saturated) and zeros [1]. All elements are finite. */
void fp8lab_cast_weights(const void *x, int half, int64_t rows, int64_t columns, const Format *e4m3,
                         const Format *e2m1, float scale, float scale_inv, const float *row_scales,
                         const float *squares, const float *tiles, const float *tiles_inv,
                         double *errors, int64_t *counts, int64_t *zeros) {
    Loss loss[RECIPES] = {0};
    int64_t none = 0;
    const Casts how = {e4m3, e2m1, scale, scale_inv, row_scales, squares, tiles, tiles_inv,
                       loss, &none};
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

INLINE void pairs(const void *a, const void *b, const void *c, int half, int64_t rows, int64_t n,
                  double *dots, double *others) {
    for (int64_t row = 0; row < rows; row++) {
        dots[row] = others[row] = 0;
        for (int64_t left = 0; left < n; left += SEGMENT) {
            int64_t at = row * n + left, count = smaller(SEGMENT, n - left);
            float dot = 0, other = 0;
#pragma omp simd reduction(+ : dot, other)
            for (int64_t i = 0; i < count; i++) {
                float g = load(a, at + i, half);
                dot += g * load(b, at + i, half), other += g * load(c, at + i, half);
            }
            dots[row] += dot, others[row] += other;
        }
    }
}

/* Scalar products of each row of a [rows, n] with those of b and of c. */
void fp8lab_pairs(const void *a, const void *b, const void *c, int half, int64_t rows, int64_t n,
                  double *dots, double *others) {
    if (half) pairs(a, b, c, 1, rows, n, dots, others);
    else pairs(a, b, c, 0, rows, n, dots, others);
}
