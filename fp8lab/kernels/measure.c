/* What measure.py computes, each in one pass; its plain torch is what these have to equal.

Counts and amaxes are equal. Sums are taken in float64, each in an order that the shape fixes, hence
the same for any number of threads, which share columns or units and never one sum. */

#include <math.h>

#include "floats.h"
#include "shares.h"

enum { WIDTH = 256, UNIT = 4096 }; /* columns whose sums stay in the nearest cache; of a long row */

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* --- sentinel: amax of every channel, where NaN is larger than anything --- */

typedef struct {
    const void *x;
    int half;
    int64_t columns;
    int32_t *peaks; /* [shares, columns] */
} Sentinel;

INLINE int32_t larger(int32_t peak, const void *x, int64_t i, int half) {
    int32_t size = bits(load(x, i, half)) & INT32_MAX;
    return size > peak ? size : peak;
}

INLINE void peaks_of_rows(const Sentinel *task, int32_t *peaks, int64_t begin, int64_t end,
                          int half) {
    const void *x = task->x;
    const int64_t n = task->columns;
    int64_t at = begin * n;
    for (; begin + 4 <= end; begin += 4, at += 4 * n) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            int32_t one = larger(peaks[i], x, at + i, half), two = larger(0, x, at + n + i, half);
            one = larger(one, x, at + 2 * n + i, half), two = larger(two, x, at + 3 * n + i, half);
            peaks[i] = one > two ? one : two;
        }
    }
    for (; begin < end; begin++, at += n) {
#pragma omp simd
        for (int64_t i = 0; i < n; i++) peaks[i] = larger(peaks[i], x, at + i, half);
    }
}

static void peaks_of_share(void *task_, int64_t share, int64_t begin, int64_t end) {
    Sentinel *task = task_;
    int32_t *peaks = task->peaks + share * task->columns;
    if (task->half) peaks_of_rows(task, peaks, begin, end, 1);
    else peaks_of_rows(task, peaks, begin, end, 0);
}

/* found [2]: the largest magnitude, NaN if there is one, and the first channel that has it. `peaks`
   is memory for `shares` <= 64 of `columns`. */
void fp8lab_sentinel(const void *x, int half, int64_t rows, int64_t columns, int64_t shares,
                     int32_t *peaks, double *found) {
    Sentinel task = {x, half, columns, peaks};
    memset(peaks, 0, sizeof *peaks * (size_t)(shares * columns));
    in_shares(peaks_of_share, &task, rows, shares);
    int32_t best = -1;
    for (int64_t i = 0; i < columns; i++) {
        int32_t peak = peaks[i];
        for (int64_t k = 1; k < shares; k++)
            if (peaks[k * columns + i] > peak) peak = peaks[k * columns + i];
        if (peak > EXPONENT) peak = EXPONENT + 1; /* all NaNs are alike */
        if (peak > best) best = peak, found[1] = (double)i;
    }
    found[0] = from_bits(best);
}

/* --- amax and power of a whole tensor --- */

typedef struct {
    const void *x;
    int half, silu; /* of x, or of silu(x) */
    int64_t count;
    double *sums; /* [units] */
    int32_t peaks[MAX_SHARES];
} Power;

/* exp(x) to two units in the last place, for |x| < 87.4 (beyond: of that), by the usual reduction to
   2^n e^r with |r| < log(2) / 2 and a polynomial. NaN gives anything: silu does not mind. */
INLINE float exponential(float x) {
    x = x > 87.3f ? 87.3f : x;
    x = x < -87.3f ? -87.3f : x;
    float shifted = x * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r * r + r) + 1.0f;
    uint32_t exponent = (uint32_t)bits(shifted) - (uint32_t)bits(0x1.8p23f) + 127;
    return p * from_bits((int32_t)(exponent << 23));
}

/* Below -87.3 it is less than 2^-119, which is counted as zero. */
INLINE float silu(float x) {
    float value = x / (1.0f + exponential(-x));
    return x < -87.3f && x >= -FLT_MAX ? 0.0f : value;
}

INLINE void power_of_silu(Power *task, int64_t share, int64_t begin, int64_t end) {
    int32_t peak = 0;
    float values[WIDTH];
    for (; begin < end; begin++) {
        double sum = 0;
        int64_t stop = smaller((begin + 1) * UNIT, task->count);
        for (int64_t at = begin * UNIT; at < stop; at += WIDTH) {
            const float *x = (const float *)task->x + at;
            int64_t count = smaller(stop - at, WIDTH);
#pragma omp simd
            for (int64_t i = 0; i < count; i++) values[i] = silu(x[i]);
#pragma omp simd reduction(+ : sum) reduction(max : peak)
            for (int64_t i = 0; i < count; i++) {
                peak = larger(peak, values, i, 0);
                sum += (double)values[i] * values[i];
            }
        }
        task->sums[begin] = sum;
    }
    task->peaks[share] = peak;
}

INLINE void power_of_units(Power *task, int64_t share, int64_t begin, int64_t end, int half) {
    int32_t peak = 0;
    for (; begin < end; begin++) {
        double sum = 0;
        int64_t stop = smaller((begin + 1) * UNIT, task->count);
        const void *x = task->x;
#pragma omp simd reduction(+ : sum) reduction(max : peak)
        for (int64_t i = begin * UNIT; i < stop; i++) {
            double value = load(x, i, half);
            peak = larger(peak, x, i, half);
            sum += value * value;
        }
        task->sums[begin] = sum;
    }
    task->peaks[share] = peak;
}

static void power_of_share(void *task, int64_t share, int64_t begin, int64_t end) {
    if (((Power *)task)->silu) power_of_silu(task, share, begin, end);
    else if (((Power *)task)->half) power_of_units(task, share, begin, end, 1);
    else power_of_units(task, share, begin, end, 0);
}

/* found [2]: the largest magnitude, NaN if there is one, and the sum of squares; with `silu`, of
   silu(x), and x is float32. `sums` is memory for one number for every 4096 elements. */
void fp8lab_power(const void *x, int half, int silu, int64_t count, int64_t shares, double *sums,
                  double *found) {
    Power task = {.x = x, .half = half, .silu = silu, .count = count, .sums = sums};
    int64_t units = (count + UNIT - 1) / UNIT;
    shares = smaller(shares, units);
    in_shares(power_of_share, &task, units, shares);
    int32_t peak = 0;
    for (int64_t i = 0; i < shares; i++)
        if (task.peaks[i] > peak) peak = task.peaks[i];
    found[0] = from_bits(peak), found[1] = 0;
    for (int64_t i = 0; i < units; i++) found[1] += sums[i];
}

/* The same of what sketch.py packs; NaN where there is an infinity or a NaN. */
void fp8lab_power_of_packed(const int64_t *packed, double *found) {
    enum { BINS = 2048, LOW = 3 * BINS, SQUARES = 4 * BINS, HIGH = 5 * BINS, AMAX = 6 * BINS + 256 };
    int64_t special = 0, first = -packed[AMAX + 1] >> 20, last = packed[AMAX] >> 20;
    double power = 0;
    for (int64_t bin = EXPONENT >> 20; bin < BINS; bin++) special |= packed[bin];
    for (int64_t bin = first; bin <= last; bin++) {
        if (!packed[bin]) continue;
        double edge = (double)(bin < 8 ? bin : 8 + (bin & 7)) * 0x1p20;
        double sum = edge * (edge * (double)packed[bin] + 2 * (double)packed[LOW + bin]);
        sum += (double)packed[SQUARES + bin] + 0x1p32 * (double)packed[HIGH + bin];
        power += ldexp(sum, 2 * (int)((bin < 8 ? 1 : bin >> 3) - 150));
    }
    found[0] = special ? NAN : from_bits((int32_t)packed[AMAX]);
    found[1] = special ? NAN : power;
}

/* --- weights of the channels: rows of gate and up, columns of down --- */

typedef struct {
    const void *gate, *up, *down;
    int half[3];
    int64_t channels, dim, outputs;
    double *alignment, *permuted, *gate_norm, *up_norm, *down_norm; /* [channels] */
} Weights;

INLINE void weight_row(const Weights *task, int64_t row, int gate_half, int up_half) {
    const void *gate = task->gate, *up = task->up;
    int64_t other_row = (row + task->channels / 2) % task->channels;
    int64_t n = task->dim, at = row * n, other_at = other_row * n;
    double dot = 0, other_dot = 0, gate_power = 0, up_power = 0;
#pragma omp simd reduction(+ : dot, other_dot, gate_power, up_power)
    for (int64_t i = 0; i < n; i++) {
        double g = load(gate, at + i, gate_half), u = load(up, at + i, up_half);
        double other = load(up, other_at + i, up_half);
        dot += g * u, other_dot += g * other, gate_power += g * g, up_power += u * u;
    }
    task->alignment[row] = dot, task->permuted[row] = other_dot;
    task->gate_norm[row] = sqrt(gate_power), task->up_norm[row] = sqrt(up_power);
}

static void weight_rows(void *task_, int64_t share, int64_t begin, int64_t end) {
    const Weights *task = task_;
    (void)share;
    for (; begin < end; begin++) {
        if (task->half[0] && task->half[1]) weight_row(task, begin, 1, 1);
        else if (!task->half[0] && !task->half[1]) weight_row(task, begin, 0, 0);
        else weight_row(task, begin, task->half[0], task->half[1]);
    }
}

INLINE void squares_down(const void *x, int64_t at, int64_t count, double *sums, int half) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        double value = load(x, at + i, half);
        sums[i] += value * value;
    }
}

static void weight_columns(void *task_, int64_t share, int64_t begin, int64_t end) {
    const Weights *task = task_;
    (void)share;
    for (; begin < end; begin++) {
        int64_t left = begin * WIDTH, count = smaller(WIDTH, task->channels - left);
        double sums[WIDTH] = {0};
        for (int64_t row = 0; row < task->outputs; row++) {
            int64_t at = row * task->channels + left;
            if (task->half[2]) squares_down(task->down, at, count, sums, 1);
            else squares_down(task->down, at, count, sums, 0);
        }
        for (int64_t i = 0; i < count; i++) task->down_norm[left + i] = sqrt(sums[i]);
    }
}

/* gate, up [channels, dim] and down [outputs, channels], bfloat16 where `halves` has 1, 2, 4, and
   amaxes [channels] of product, gate and up: `matrix` [8, channels] of measure.CHANNEL_COLUMNS. */
void fp8lab_weights(const void *gate, const void *up, const void *down, int halves,
                    int64_t channels, int64_t dim, int64_t outputs, int64_t shares,
                    const float *product_amax, const float *gate_amax, const float *up_amax,
                    double *matrix) {
    for (int64_t i = 0; i < channels; i++) {
        matrix[i] = product_amax[i];
        matrix[channels + i] = gate_amax[i], matrix[2 * channels + i] = up_amax[i];
    }
    double *columns = matrix + 3 * channels;
    Weights task = {gate, up, down, {halves & 1, halves >> 1 & 1, halves >> 2 & 1}, channels, dim,
                    outputs, columns, columns + channels, columns + 2 * channels,
                    columns + 3 * channels, columns + 4 * channels};
    in_shares(weight_rows, &task, channels, smaller(shares, channels));
    int64_t blocks = (channels + WIDTH - 1) / WIDTH;
    in_shares(weight_columns, &task, blocks, smaller(shares, blocks));
    for (int64_t row = 0; row < channels; row++) {
        int64_t other = (row + channels / 2) % channels;
        task.alignment[row] /= task.gate_norm[row] * task.up_norm[row];
        task.permuted[row] /= task.gate_norm[row] * task.up_norm[other];
    }
}

/* samples [1 + followed, 1 + 2n]: a channel, then every `stride`-th weight of its gate row and its
   up row [channels, dim]: first of the channel with the largest amax, then of `followed`. */
void fp8lab_samples(const void *gate, const void *up, int halves, int64_t channels, int64_t dim,
                    int64_t stride, const float *amax, const int64_t *followed, int64_t count,
                    double *samples) {
    int64_t hottest = 0;
    for (int64_t i = 1; i < channels; i++)
        if (amax[i] > amax[hottest]) hottest = i;
    for (int64_t k = -1; k < count; k++) {
        int64_t channel = k < 0 ? hottest : followed[k], at = channel * dim;
        *samples++ = (double)channel;
        for (int64_t i = 0; i < dim; i += stride) *samples++ = load(gate, at + i, halves & 1);
        for (int64_t i = 0; i < dim; i += stride) *samples++ = load(up, at + i, halves >> 1 & 1);
    }
}

/* --- operand: what a cast did to a tensor --- */

typedef struct {
    int64_t nonzero, saturated, flushed, subnormal;
} Counts;

typedef struct {
    const void *x;
    int half;
    int64_t rows, columns, tile_rows, tile_columns;
    const Format *format;
    const float *scale, *scale_inv; /* one per tile */
    const float *balance;           /* [columns], has multiplied x; or NULL */
    double *sums;                   /* [4, columns]: error, power, power of the cast, product */
    float *peaks;                   /* [columns] */
    Counts counts[MAX_SHARES];
} Operand;

typedef struct {
    float scale[WIDTH], scale_inv[WIDTH];
    double error[WIDTH], power[WIDTH], cast_power[WIDTH], product[WIDTH];
    int32_t peaks[WIDTH];
    Counts counts;
} Block;

INLINE void cast_row(const Operand *task, Block *b, int64_t at, int64_t count,
                     const float *balance, int half) {
    const void *x = task->x;
    const Format f = *task->format;
    const float normal = from_bits(f.smallest_exponent);
    int32_t nonzero = 0, saturated = 0, flushed = 0, subnormal = 0;
#pragma omp simd reduction(+ : nonzero, saturated, flushed, subnormal)
    for (int64_t i = 0; i < count; i++) {
        float value = load(x, at + i, half), y = value * b->scale[i], rounded = on_grid(y, f);
        double original = value, cast = finish(y, rounded, f.zero, b->scale_inv[i]);
        if (balance) original /= balance[i], cast /= balance[i];
        nonzero += original != 0;
        saturated += from_bits(bits(y) & INT32_MAX) > f.limit;
        flushed += (cast == 0) & (original != 0);
        subnormal += (rounded > 0) & (rounded < normal);
        b->error[i] += (cast - original) * (cast - original);
        b->power[i] += original * original;
        b->cast_power[i] += cast * cast;
        b->product[i] += original * cast;
        b->peaks[i] = larger(b->peaks[i], x, at + i, half);
    }
    b->counts.nonzero += nonzero, b->counts.saturated += saturated;
    b->counts.flushed += flushed, b->counts.subnormal += subnormal;
}

/* The scales of one row's columns, from those of its tiles. */
static void spread_scales(const Operand *task, Block *b, int64_t row, int64_t left, int64_t count) {
    int64_t across = (task->columns + task->tile_columns - 1) / task->tile_columns;
    int64_t first = row / task->tile_rows * across;
    for (int64_t i = 0; i < count;) {
        int64_t tile = (left + i) / task->tile_columns;
        int64_t stop = smaller((tile + 1) * task->tile_columns - left, count);
        float scale = task->scale[first + tile], scale_inv = task->scale_inv[first + tile];
        for (; i < stop; i++) b->scale[i] = scale, b->scale_inv[i] = scale_inv;
    }
}

static void operand_blocks(void *task_, int64_t share, int64_t begin, int64_t end) {
    Operand *task = task_;
    const int64_t n = task->columns;
    for (; begin < end; begin++) {
        Block b = {0};
        int64_t left = begin * WIDTH, count = smaller(WIDTH, n - left);
        const float *balance = task->balance ? task->balance + left : NULL;
        for (int64_t row = 0; row < task->rows; row++) {
            int64_t at = row * n + left;
            if (row % task->tile_rows == 0) spread_scales(task, &b, row, left, count);
            if (balance) cast_row(task, &b, at, count, balance, task->half);
            else if (task->half) cast_row(task, &b, at, count, NULL, 1);
            else cast_row(task, &b, at, count, NULL, 0);
        }
        size_t size = sizeof(double) * (size_t)count;
        memcpy(task->sums + left, b.error, size);
        memcpy(task->sums + n + left, b.power, size);
        memcpy(task->sums + 2 * n + left, b.cast_power, size);
        memcpy(task->sums + 3 * n + left, b.product, size);
        memcpy(task->peaks + left, b.peaks, sizeof(float) * (size_t)count);
        task->counts[share].nonzero += b.counts.nonzero;
        task->counts[share].saturated += b.counts.saturated;
        task->counts[share].flushed += b.counts.flushed;
        task->counts[share].subnormal += b.counts.subnormal;
    }
}

/* counts [4]: non-zero, saturated, flushed, subnormal; sums [4, columns] as above; peaks [columns]:
   the largest magnitude of x, NaN if there is one. */
void fp8lab_operand(const void *x, int half, int64_t rows, int64_t columns, int64_t tile_rows,
                    int64_t tile_columns, const Format *format, const float *scale,
                    const float *scale_inv, const float *balance, int64_t shares, int64_t *counts,
                    double *sums, float *peaks) {
    Operand task = {.x = x, .half = half, .rows = rows, .columns = columns,
                    .tile_rows = tile_rows, .tile_columns = tile_columns, .format = format,
                    .scale = scale, .scale_inv = scale_inv, .balance = balance, .sums = sums,
                    .peaks = peaks};
    int64_t blocks = (columns + WIDTH - 1) / WIDTH;
    shares = smaller(shares, blocks);
    in_shares(operand_blocks, &task, blocks, shares);
    memset(counts, 0, 4 * sizeof *counts);
    for (int64_t i = 0; i < shares; i++) {
        counts[0] += task.counts[i].nonzero, counts[1] += task.counts[i].saturated;
        counts[2] += task.counts[i].flushed, counts[3] += task.counts[i].subnormal;
    }
}
