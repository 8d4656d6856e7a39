/* Everything that a sketch holds of a tensor, with the amax of every row and column, in one pass.

Layout and meaning of the integers are those of sketch.py. The work is one table: 4096 entries, one
for each value of the top twelve bits (sign, exponent, three mantissa bits), of two 64-bit words,

    how many | how many with low bits of zero << 15 | sum of the low bits << 30
    sum of the squares of the low bits

so that an element costs one load, add and store of 16 bytes, beside the vector instructions that
make its two words. After 2^14 elements, before a field could overflow, the touched part of the table
is added to the result. Zeros, of which tensors are full, take turns at eight spare entries: an entry
that was just stored cannot be loaded at once.

Rows are read twice, first for what vectors can do (extremes, rows and columns), then for the table,
while they lie in the nearest cache. bfloat16 has only 2^16 values: where there are more elements
than these it is enough to count. All results are integer sums and maxima, hence the same whatever
the number of threads. */

#include <stdlib.h>

#include "floats.h"
#include "shares.h"

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Four){__VA_ARGS__})
#endif
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "two elements are read as one 64-bit number, the first in its low half"
#endif

typedef uint64_t Two __attribute__((vector_size(16)));
typedef uint64_t Four __attribute__((vector_size(32)));

enum { BINS = 2048, EXPONENTS = 256, SPARE = 8, CHUNK = 1 << 14, WIDTH = 4096, BLOCK = 64 };
/* Fields of the result: BINS numbers each, then sums by exponent, then extremes. */
enum { COUNTS, EDGES, NEAR, LOW, SQUARES, SQUARES_HIGH, FIELDS };
enum { SIGNED = FIELDS * BINS, EXTREMES = SIGNED + EXPONENTS, PACKED = EXTREMES + 4 };
enum { LARGEST, MINUS_SMALLEST, MINUS_LEAST, GREATEST };
#define LOW_BITS 0xfffffu
#define WORD 0xffffffffull
#define ENTRY sizeof(Two)

typedef struct {
    const void *x;
    int half;
    int64_t rows, columns;
    int64_t *packed; /* [shares, PACKED] */
    int32_t *peaks;  /* [shares, columns] */
    float *tokens;   /* [rows] */
} Task;

typedef struct {
    Two table[2 * BINS + SPARE];
    uint32_t widened[WIDTH];
    int64_t *packed;
    int64_t held;        /* elements in the table */
    int32_t first, last; /* bins in which they can lie, beside that of zero */
} State;

typedef struct {
    int32_t greatest;  /* code of the largest positive element, if there is one */
    uint32_t least;    /* code of the most negative element, if there is one */
    uint32_t smallest; /* magnitude - 1 of the smallest that is not zero */
    uint32_t nearest;  /* low bits - 1, likewise */
    int32_t peak;      /* largest magnitude, NaN ignored */
} Found;

/* The integer that orders like the float. */
INLINE int32_t order(uint32_t code) {
    return (int32_t)(code ^ ((uint32_t)((int32_t)code >> 31) & INT32_MAX));
}

INLINE void keep_larger(int64_t *extreme, int64_t value) {
    if (value > *extreme) *extreme = value;
}

/* An element of a bin is this + its low bits, in units of its exponent's last bit. */
INLINE int64_t significand(int64_t bin) { return (bin < 8 ? bin & 7 : 8 + (bin & 7)) << 20; }

INLINE void add_bin(int64_t *packed, int64_t bin, int negative, int64_t count, int64_t edges,
                    int64_t low, uint64_t squares) {
    packed[COUNTS * BINS + bin] += count;
    packed[EDGES * BINS + bin] += edges;
    packed[LOW * BINS + bin] += low;
    squares += (uint64_t)packed[SQUARES * BINS + bin];
    packed[SQUARES * BINS + bin] = (int64_t)(squares & WORD);
    packed[SQUARES_HIGH * BINS + bin] += (int64_t)(squares >> 32);
    int64_t sum = count * significand(bin) + low;
    packed[SIGNED + bin / 8] += negative ? -sum : sum;
}

INLINE void flush_entry(State *state, int64_t entry, int64_t bin, int negative) {
    Two *words = &state->table[entry];
    uint64_t first = (*words)[0];
    if (!first) return;
    int64_t count = first & 0x7fff, edges = first >> 15 & 0x7fff, low = (int64_t)(first >> 30);
    add_bin(state->packed, bin, negative, count, edges, low, (*words)[1]);
    *words = (Two){0, 0};
}

static void flush(State *state) {
    for (int64_t bin = state->first; bin <= state->last; bin++) {
        flush_entry(state, bin, bin, 0);
        flush_entry(state, BINS + bin, bin, 1);
    }
    for (int64_t i = 0; i < SPARE; i++) flush_entry(state, 2 * BINS + i, 0, 0);
    state->held = 0, state->first = BINS, state->last = 0;
}

INLINE Two *at(Two *table, uint32_t offset) { return (Two *)((char *)table + offset); }

/* Elements 0, 2, 4, 6 of eight: their low bits and where their entries are. */
INLINE void add_four(Two *table, Four low, const uint32_t *offset) {
    Four squares = low * low, words = ((low << 30) | 1) - ((Four)(low == 0) << 15);
    Four even = SHUFFLE(words, squares, 0, 4, 2, 6), odd = SHUFFLE(words, squares, 1, 5, 3, 7);
    *at(table, offset[0]) += (Two){even[0], even[1]};
    *at(table, offset[4]) += (Two){even[2], even[3]};
    *at(table, offset[2]) += (Two){odd[0], odd[1]};
    *at(table, offset[6]) += (Two){odd[2], odd[3]};
}

INLINE void find_entries(const uint32_t *x, int64_t count, uint32_t *offset) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        uint32_t spare = (2 * BINS + ((uint32_t)i & (SPARE - 1))) * ENTRY;
        offset[i] = x[i] << 1 ? x[i] >> 20 << 4 : spare;
    }
}

static void add_to_table(Two *table, const uint32_t *x, int64_t count) {
    uint32_t offset[BLOCK] __attribute__((aligned(64)));
    for (; count >= BLOCK; count -= BLOCK, x += BLOCK) {
        find_entries(x, BLOCK, offset);
        for (int64_t i = 0; i < BLOCK; i += 8) {
            Four pairs;
            memcpy(&pairs, x + i, sizeof pairs);
            add_four(table, pairs & LOW_BITS, offset + i);
            add_four(table, pairs >> 32 & LOW_BITS, offset + i + 1);
        }
    }
    find_entries(x, count, offset);
    for (int64_t i = 0; i < count; i++) {
        uint64_t low = x[i] & LOW_BITS;
        *at(table, offset[i]) += (Two){low << 30 | (uint64_t)(low == 0) << 15 | 1, low * low};
    }
}

/* What vectors find in one row, and the columns' amaxes. */
static Found scan(const uint32_t *x, int64_t count, int32_t *peaks) {
    /* Lifted by as much as makes infinity the largest integer, NaNs are negative. */
    const uint32_t lift = INT32_MAX - EXPONENT;
    int32_t greatest = INT32_MIN, peak = (int32_t)lift;
    uint32_t least = 0, smallest = UINT32_MAX, nearest = UINT32_MAX;
#pragma omp simd reduction(min : smallest, nearest) reduction(max : greatest, least, peak)
    for (int64_t i = 0; i < count; i++) {
        uint32_t code = x[i], below = code - 1;
        int32_t lifted = (int32_t)((code & INT32_MAX) + lift);
        greatest = (int32_t)code > greatest ? (int32_t)code : greatest;
        least = code > least ? code : least;
        smallest = (below & INT32_MAX) < smallest ? below & INT32_MAX : smallest;
        nearest = (below & LOW_BITS) < nearest ? below & LOW_BITS : nearest;
        peaks[i] = lifted > peaks[i] ? lifted : peaks[i];
        peak = lifted > peak ? lifted : peak;
    }
    return (Found){greatest, least, smallest, nearest, peak - (int32_t)lift};
}

/* The least and the greatest finite element of a row of which not both signs are there, or of one
   with an infinity or a NaN: its place in the order of floats. */
static void range_of(const uint32_t *x, int64_t count, int32_t *least, int32_t *greatest) {
    int32_t low = INT32_MAX, high = INT32_MIN;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t i = 0; i < count; i++) {
        int32_t finite = (x[i] & INT32_MAX) < EXPONENT, place = order(x[i]);
        low = finite && place < low ? place : low;
        high = finite && place > high ? place : high;
    }
    *least = low, *greatest = high;
}

static void note_extremes(State *state, const uint32_t *x, int64_t count, Found found) {
    int64_t *extremes = state->packed + EXTREMES;
    int32_t least = order(found.least), greatest = found.greatest;
    /* Below zero and above it, and neither beyond the finite numbers. */
    if (least >= 0 || greatest < 0 || greatest >= EXPONENT || least < order(0xff7fffff)) {
        range_of(x, count, &least, &greatest);
        if (greatest == INT32_MIN) return; /* nothing finite */
    }
    keep_larger(extremes + LARGEST, least < 0 ? -1 - (int64_t)least : least);
    keep_larger(extremes + LARGEST, greatest < 0 ? -1 - (int64_t)greatest : greatest);
    keep_larger(extremes + MINUS_LEAST, -(int64_t)least);
    keep_larger(extremes + GREATEST, greatest);
    if (found.smallest < EXPONENT - 1)
        keep_larger(extremes + MINUS_SMALLEST, -1 - (int64_t)found.smallest);
}

/* At most WIDTH elements of one row; their amax. */
static int32_t take(State *state, const uint32_t *x, int64_t count, int32_t *peaks) {
    Found found = scan(x, count, peaks);
    note_extremes(state, x, count, found);
    if (found.nearest < 2)
        for (int64_t i = 0; i < count; i++)
            if ((x[i] & LOW_BITS) - 1 < 2)
                state->packed[NEAR * BINS + ((x[i] & INT32_MAX) >> 20)]++;
    if (state->held + count > CHUNK) flush(state);
    state->held += count;
    /* With NaNs the peak is not the last: they are in the bins from infinity's on. */
    int nan = found.greatest > EXPONENT || found.least > 0xff800000;
    int32_t first = (int32_t)((found.smallest + 1) >> 20), last = nan ? BINS - 1 : found.peak >> 20;
    if (first < state->first) state->first = first;
    if (last > state->last) state->last = last;
    add_to_table(state->table, x, count);
    return found.peak;
}

static void by_table(void *task_, int64_t share, int64_t begin, int64_t end) {
    Task *task = task_;
    State state = {.packed = task->packed + share * PACKED, .first = BINS};
    int32_t *peaks = task->peaks + share * task->columns;
    for (; begin < end; begin++) {
        int32_t peak = 0;
        for (int64_t left = 0; left < task->columns; left += WIDTH) {
            int64_t start = begin * task->columns + left, count = task->columns - left;
            if (count > WIDTH) count = WIDTH;
            const uint32_t *x = (const uint32_t *)task->x + start;
            if (task->half) {
                const uint16_t *narrow = (const uint16_t *)task->x + start;
                for (int64_t i = 0; i < count; i++) state.widened[i] = (uint32_t)narrow[i] << 16;
                x = state.widened;
            }
            int32_t found = take(&state, x, count, peaks + left);
            peak = found > peak ? found : peak;
        }
        task->tokens[begin] = from_bits(peak);
    }
    flush(&state);
}

/* bfloat16: how often each of its values occurs says everything but rows and columns. */
static void add_values(const uint32_t *counts, int64_t *packed) {
    int64_t *extremes = packed + EXTREMES;
    for (uint32_t value = 0; value < 1 << 16; value++) {
        uint64_t count = counts[value], low = (value & 15) << 16;
        if (!count) continue;
        uint32_t code = value << 16, size = code & INT32_MAX;
        int64_t bin = size >> 20, place = order(code);
        add_bin(packed, bin, value >> 15, (int64_t)count, low ? 0 : (int64_t)count,
                (int64_t)(count * low), 0);
        packed[SQUARES_HIGH * BINS + bin] += (int64_t)((low >> 16) * (low >> 16) * count);
        if (size >= EXPONENT) continue;
        keep_larger(extremes + LARGEST, size);
        if (size) keep_larger(extremes + MINUS_SMALLEST, -(int64_t)size);
        keep_larger(extremes + MINUS_LEAST, -place);
        keep_larger(extremes + GREATEST, place);
    }
}

static void by_value(void *task_, int64_t share, int64_t begin, int64_t end) {
    Task *task = task_;
    int32_t *peaks = task->peaks + share * task->columns;
    const int32_t lift = INT32_MAX - EXPONENT;
    const int64_t columns = task->columns;
    enum { VALUES = 1 << 16 };
    /* Not on the stack: a quarter of a megabyte is all that some threads have. */
    uint32_t *counts = calloc(VALUES, sizeof *counts), held = 0;
    if (!counts) {
        by_table(task, share, begin, end);
        return;
    }
    for (; begin < end; begin++) {
        const uint16_t *x = (const uint16_t *)task->x + begin * columns;
        int32_t peak = lift;
#pragma omp simd reduction(max : peak)
        for (int64_t i = 0; i < columns; i++) {
            int32_t lifted = (int32_t)(((uint32_t)(x[i] & INT16_MAX) << 16) + (uint32_t)lift);
            peaks[i] = lifted > peaks[i] ? lifted : peaks[i];
            peak = lifted > peak ? lifted : peak;
        }
        task->tokens[begin] = from_bits(peak - lift);
        for (int64_t left = 0; left < columns; left += WIDTH) {
            int64_t right = left + WIDTH < columns ? left + WIDTH : columns;
            for (int64_t i = left; i < right; i++) counts[x[i]]++;
            held += WIDTH;
            if (held > INT32_MAX) {
                add_values(counts, task->packed + share * PACKED);
                memset(counts, 0, VALUES * sizeof *counts);
                held = 0;
            }
        }
    }
    add_values(counts, task->packed + share * PACKED);
    free(counts);
}

/* x [rows, columns], float32 or bfloat16 (`half`): packed [PACKED], channels [columns], tokens
   [rows]. `packed` and `channels` are memory for `shares` <= 64 such results. */
void fp8lab_summary(const void *x, int half, int64_t rows, int64_t columns, int64_t shares,
                    int64_t *packed, float *channels, float *tokens) {
    const int32_t lift = INT32_MAX - EXPONENT;
    Task task = {x, half, rows, columns, packed, (int32_t *)channels, tokens};
    int32_t *peaks = task.peaks;
    memset(packed, 0, sizeof *packed * (size_t)(shares * PACKED));
    for (int64_t i = 0; i < shares * columns; i++) peaks[i] = lift;
    for (int64_t i = 0; i < shares; i++) { /* the largest 0, the other three infinite */
        int64_t *extremes = packed + i * PACKED + EXTREMES;
        extremes[MINUS_SMALLEST] = extremes[MINUS_LEAST] = -(int64_t)EXPONENT;
        extremes[GREATEST] = order(0xff800000);
    }
    in_shares(half && rows * columns >= 1 << 17 ? by_value : by_table, &task, rows, shares);
    for (int64_t i = 1; i < shares; i++) {
        const int64_t *other = packed + i * PACKED;
        for (int64_t k = 0; k < EXTREMES; k++) packed[k] += other[k];
        for (int64_t k = EXTREMES; k < PACKED; k++) keep_larger(packed + k, other[k]);
        for (int64_t k = 0; k < columns; k++)
            if (peaks[i * columns + k] > peaks[k]) peaks[k] = peaks[i * columns + k];
    }
    for (int64_t k = 0; k < columns; k++) channels[k] = from_bits(peaks[k] - lift);
    for (int64_t k = 0; k < BINS; k++) { /* carry */
        uint64_t squares = (uint64_t)packed[SQUARES * BINS + k];
        packed[SQUARES * BINS + k] = (int64_t)(squares & WORD);
        packed[SQUARES_HIGH * BINS + k] += (int64_t)(squares >> 32);
    }
}
