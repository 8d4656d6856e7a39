/* Passes over bfloat16 in vectors of 32 (AVX-512 BW), for weights.c, which does the same elsewhere.

What depends on a mantissa alone is looked up, not computed: seven bits of it have few cases. How
far an element is from E4M3's grid depends on the last four, what is clipped on the last five; a
quarter of E2M1's smallest step says where on its grid a value falls. Squares are summed by the
processor's own dot product of bfloat16, where it has one. Counts are exact, sums as in weights.c. */

#include <immintrin.h>

/* Elements 2i and 2i + 1 of each word, as float32. */
INLINE __m512 even(__m512i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
INLINE __m512 odd(__m512i x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int32_t)0xffff0000)));
}
INLINE __m512i sizes(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi16(INT16_MAX)); }

/* sum + a · b, of the two elements of each word. */
INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    return _mm512_fmadd_ps(odd(a), odd(b), _mm512_fmadd_ps(even(a), even(b), sum));
#endif
}

INLINE uint16_t largest_of(__m256i x) {
    __m128i most = _mm_max_epu16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    most = _mm_minpos_epu16(_mm_xor_si128(most, _mm_set1_epi16(-1)));
    return (uint16_t)~_mm_extract_epi16(most, 0);
}
INLINE uint16_t largest_of_all(__m512i x) {
    return largest_of(_mm256_max_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1)));
}

/* The first `count` of 32, none if that is negative. */
INLINE __mmask32 first(int64_t count) {
    return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0;
}

/* --- first pass --- */

/* Of four rows; what is missing of them points to zeros. */
typedef struct {
    const uint16_t *at[4];
    __m512i peak[4];
    __m512 power[4], fourth;
} Four;

/* 32 columns of them. `powers` are of columns as unpacking finds them: see `column_of`. */
INLINE void scan_block(Four *rows, int64_t i, __mmask32 mask, uint16_t *peaks, float *powers) {
    __m512i x[4], most = _mm512_loadu_si512(peaks);
    for (int row = 0; row < 4; row++) {
        x[row] = sizes(_mm512_maskz_loadu_epi16(mask, rows->at[row] + i));
        rows->peak[row] = _mm512_max_epu16(rows->peak[row], x[row]);
        rows->power[row] = dot(rows->power[row], x[row], x[row]);
        most = _mm512_max_epu16(most, x[row]);
        __m512 a = even(x[row]), b = odd(x[row]);
        a = _mm512_mul_ps(a, a), b = _mm512_mul_ps(b, b);
        rows->fourth = _mm512_fmadd_ps(a, a, _mm512_fmadd_ps(b, b, rows->fourth));
    }
    _mm512_storeu_si512(peaks, most);
    for (int half = 0; half < 2; half++) {
        __m512 sum = _mm512_loadu_ps(powers + 16 * half);
        for (int row = 0; row < 4; row += 2) {
            __m512i two = half ? _mm512_unpackhi_epi16(x[row], x[row + 1])
                               : _mm512_unpacklo_epi16(x[row], x[row + 1]);
            sum = dot(sum, two, two);
        }
        _mm512_storeu_ps(powers + 16 * half, sum);
    }
}

INLINE int64_t column_of(int64_t place) {
    return (place & ~31) | (place & 12) << 1 | (place & 16) >> 2 | (place & 3);
}

INLINE void scan_four(Four *rows, int64_t count, uint16_t *peaks, float *powers,
                      int32_t *row_amax, double *row_power, int64_t height, double *fourth) {
    int64_t i = 0;
    rows->fourth = _mm512_setzero_ps();
    for (int row = 0; row < 4; row++)
        rows->peak[row] = _mm512_setzero_si512(), rows->power[row] = _mm512_setzero_ps();
    for (; i + 32 <= count; i += 32) scan_block(rows, i, ~0u, peaks + i, powers + i);
    if (i < count) scan_block(rows, i, first(count - i), peaks + i, powers + i);
    for (int row = 0; row < height; row++) {
        int32_t most = largest_of_all(rows->peak[row]) << 16;
        row_amax[row] = most > row_amax[row] ? most : row_amax[row];
        row_power[row] += _mm512_reduce_add_ps(rows->power[row]);
    }
    *fourth += _mm512_reduce_add_ps(rows->fourth);
}

/* --- second pass --- */

typedef struct {
    __m512i off;             /* by the last four bits: exponent less that of the distance */
    __m512i clipped;         /* by the last five, beyond 1.75: squared errors, less those counted */
    __m512 lower, upper;     /* E2M1, by quarters */
    float scale;             /* of the tensor */
    uint32_t unit;           /* of E4M3's last bit, in a float32 */
} Tables;

typedef struct {
    __m512 same, current, nvfp4;
    int64_t flushed, saturated;
} Rounded;

/* Beyond so many quarters all is 6. From this code on squares in an exponent's unit are normal. */
enum { MOST_QUARTERS = 25, FROM_CODE = 80 << 7 };

INLINE __m512i distances(void) {
    uint16_t table[32];
    for (int i = 0; i < 32; i++) {
        int low = i & 15, off = low < 8 ? low : 16 - low;
        int32_t above = (bits((float)off) - bits(1.0f)) >> 16;
        table[i] = off ? (uint16_t)((7 << 7) - above) : UINT16_MAX;
    }
    return _mm512_loadu_si512(table);
}

INLINE __m512i clippings(void) {
    uint16_t table[32];
    for (int i = 0; i < 32; i++) {
        int low = i & 15, off = low < 8 ? low : 16 - low;
        table[i] = (uint16_t)(i * i - off * off);
    }
    return _mm512_loadu_si512(table);
}

/* From a quarter, whose last bits are its number, to E2M1. */
INLINE Tables tables_of(float scale, const Format f, const Format g) {
    float grid[32];
    for (int i = 0; i < 32; i++) {
        float middle = i < 31 ? 0.25f * (float)i + 0.125f : 0.0f, z = on_grid(middle, g);
        grid[i] = z;
    }
    return (Tables){distances(), clippings(), _mm512_loadu_ps(grid), _mm512_loadu_ps(grid + 16),
                    scale, 1u << (f.shift >> 23)};
}

/* 32 magnitudes: their three roundings. */
INLINE void round_block(__m512i x, const Tables *by, const float *scale, const float *scale_inv,
                        Rounded *sums) {
    __m512i exponent = _mm512_and_si512(x, _mm512_set1_epi16(EXPONENT >> 16));
    __m512i off = _mm512_subs_epu16(exponent, _mm512_permutexvar_epi16(x, by->off));
    sums->same = dot(sums->same, off, off);
    const __m512i half = _mm512_set1_epi32((int32_t)(by->unit / 2));
    const __m512i kept = _mm512_set1_epi32(-(int32_t)by->unit);
    __m512 quarters = _mm512_loadu_ps(scale), inverse = _mm512_loadu_ps(scale_inv);
    for (int part = 0; part < 2; part++) {
        __m512 size = part ? odd(x) : even(x), y = _mm512_mul_ps(size, _mm512_set1_ps(by->scale));
        __m512i near = _mm512_add_epi32(_mm512_castps_si512(y), half);
        y = _mm512_sub_ps(y, _mm512_castsi512_ps(_mm512_and_si512(near, kept)));
        sums->current = _mm512_fmadd_ps(y, y, sums->current);
        __m512 cell = _mm512_fmadd_ps(size, quarters, _mm512_set1_ps(0x1p23f - 0.5f));
        cell = _mm512_min_ps(cell, _mm512_set1_ps(0x1p23f + MOST_QUARTERS));
        __m512 z = _mm512_permutex2var_ps(by->lower, _mm512_castps_si512(cell), by->upper);
        z = _mm512_fmsub_ps(z, inverse, size);
        sums->nvfp4 = _mm512_fmadd_ps(z, z, sums->nvfp4);
    }
}

/* How many of 64 are not beyond their limits. */
INLINE int64_t within(__m512i a, __m512i b, const uint16_t *limits) {
    __mmask32 one = _mm512_cmple_epu16_mask(a, _mm512_loadu_si512(limits));
    __mmask32 other = _mm512_cmple_epu16_mask(b, _mm512_loadu_si512(limits + 32));
    return __builtin_popcountll(_mm512_kunpackd(one, other));
}

/* The largest of each of four vectors. */
INLINE void largest_of_four(const __m512i x[4], uint16_t *most) {
    __m512i two[2];
    for (int i = 0; i < 2; i++)
        two[i] = _mm512_max_epu16(_mm512_unpacklo_epi16(x[2 * i], x[2 * i + 1]),
                                  _mm512_unpackhi_epi16(x[2 * i], x[2 * i + 1]));
    __m512i all = _mm512_max_epu16(_mm512_unpacklo_epi32(two[0], two[1]),
                                   _mm512_unpackhi_epi32(two[0], two[1]));
    __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
    __m128i last = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    _mm_storel_epi64((__m128i *)most, _mm_max_epu16(last, _mm_unpackhi_epi64(last, last)));
}

/* Four blocks of 32, of which only the first `count` elements are there: kept as magnitudes with
   zeros behind them, rounded and counted; the largest of each, and which are at most `bound`. */
INLINE void round_four(const uint16_t *from, int64_t count, const Tables *by, const float *scale,
                       const float *scale_inv, const uint16_t *flushed, const uint16_t *held,
                       uint16_t bound, uint16_t *kept, uint16_t *most, uint32_t *below,
                       Rounded *sums) {
    __m512i x[4];
    for (int i = 0; i < 4; i++) {
        if (count >= 128) x[i] = _mm512_loadu_si512(from + 32 * i);
        else x[i] = _mm512_maskz_loadu_epi16(first(count - 32 * i), from + 32 * i);
        x[i] = sizes(x[i]);
        _mm512_storeu_si512(kept + 32 * i, x[i]);
        below[i] = _mm512_cmple_epu16_mask(x[i], _mm512_set1_epi16((int16_t)bound));
        round_block(x[i], by, scale + 16 * i, scale_inv + 16 * i, sums);
    }
    for (int i = 0; i < 4; i += 2) {
        sums->flushed += within(x[i], x[i + 1], flushed + 32 * i);
        sums->saturated += 64 - within(x[i], x[i + 1], held + 32 * i);
    }
    largest_of_four(x, most);
}

/* What OCP's scale clips of a block whose largest code is `most`: 4^(exponent - 7) times the table's
   entries; how many there are. Its square has to be a float32. */
INLINE int32_t clip_block(const uint16_t *from, uint16_t most, const Tables *by, float *errors) {
    const __m512i x = _mm512_loadu_si512(from);
    uint16_t largest = (most & ~127) | 0x60;
    __mmask32 beyond = _mm512_cmpgt_epu16_mask(x, _mm512_set1_epi16((int16_t)largest));
    __m512i lost = _mm512_maskz_permutexvar_epi16(beyond, x, by->clipped);
    lost = _mm512_madd_epi16(lost, _mm512_set1_epi16(1));
    __m512 weight = _mm512_set1_ps(from_bits((2 * (most >> 7) - 127 - 14) << 23));
    __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(lost), weight, _mm512_loadu_ps(errors));
    _mm512_storeu_ps(errors, sum);
    return __builtin_popcount(beyond);
}

/* --- pairs of rows --- */

INLINE void dot_rows(const uint16_t *a, const uint16_t *b, const uint16_t *c, int64_t count,
                     double *dots, double *others) {
    __m512 one[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    __m512 other[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < count; i += 64)
        for (int k = 0; k < 2 && i + 32 * k < count; k++) {
            __mmask32 mask = first(count - i - 32 * k);
            __m512i x = _mm512_maskz_loadu_epi16(mask, a + i + 32 * k);
            one[k] = dot(one[k], x, _mm512_maskz_loadu_epi16(mask, b + i + 32 * k));
            other[k] = dot(other[k], x, _mm512_maskz_loadu_epi16(mask, c + i + 32 * k));
        }
    *dots += _mm512_reduce_add_ps(_mm512_add_ps(one[0], one[1]));
    *others += _mm512_reduce_add_ps(_mm512_add_ps(other[0], other[1]));
}
