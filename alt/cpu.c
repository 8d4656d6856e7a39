/* Casts in one pass over the tensor, equal bit for bit to what casting.py and scaling.py write in plain
   torch.

Every function takes float32 or bfloat16 (`half`) and works in float32, one rounding per operation.
Loops are cut into units which pthreads share; whatever crosses units is an integer maximum or sum,
so the number of threads cannot change a result. Threads live for one call: nothing survives a fork.

Loops say `omp simd` (-fopenmp-simd, no runtime library) rather than `restrict`, because `out` may
be the input itself: each element is read and written at the same index. */

#include <pthread.h>

#include "floats.h"

#define MAX_THREADS 64
/* Columns and rows of a unit of work. Wide, because each jump to another row starts the processor's
   prefetching anew (1024 columns and 32 rows take twice as long). Four rows at once under scales of
   columns, because those scales no longer fit the nearest cache; eight would evict each other. */
enum { WIDTH = 4096, DEPTH = 4 };
enum { ANY, POWERS_OF_TWO, EXPONENTS };

typedef struct {
    const void *x;
    float *out;
    int64_t rows, columns, tile_rows, tile_columns; /* of the tensor, of a tile */
    const float *scale, *scale_inv;                 /* one per tile */
    Format format;
    int half;
    int64_t width, across;                          /* columns in a unit, units side by side */
    int scales;                                     /* how blocks are scaled, where they are here */
    float most;                                     /* what stands for an infinite scale */
} Task;

typedef struct {
    int32_t amax;
    int64_t saturated, flushed;
} Found;

typedef void Piece(const Task *task, int64_t begin, int64_t end, Found *found);

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t units_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

INLINE void cast_one(const void *x, float *out, int64_t i, float scale, float scale_inv,
                     const Format f, int half) {
    float y = load(x, i, half) * scale;
    out[i] = finish(y, on_grid(y, f), f.zero, scale_inv);
}

/* [begin, end) under one scale. */
INLINE void cast_run(const Task *task, int64_t begin, int64_t end, float scale, float scale_inv,
                     int half) {
    const void *x = task->x;
    float *out = task->out;
    const Format f = task->format;
#pragma omp simd
    for (int64_t i = begin; i < end; i++) cast_one(x, out, i, scale, scale_inv, f, half);
}

/* `count` columns of one row or of four from element `begin` on, a scale for each column. */
INLINE void cast_columns(const Task *task, int64_t begin, int64_t count, int four,
                         const float *scale, const float *scale_inv, int half) {
    const void *x = task->x;
    float *out = task->out;
    const Format f = task->format;
    const int64_t second = begin + task->columns, third = second + task->columns;
    const int64_t fourth = third + task->columns;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        cast_one(x, out, begin + i, scale[i], scale_inv[i], f, half);
        if (!four) continue;
        cast_one(x, out, second + i, scale[i], scale_inv[i], f, half);
        cast_one(x, out, third + i, scale[i], scale_inv[i], f, half);
        cast_one(x, out, fourth + i, scale[i], scale_inv[i], f, half);
    }
}

/* Columns [begin, end) of one row, whose tiles' scales start at `scale`; `size` = tile_columns. */
INLINE void cast_tiles(const Task *task, int64_t row, int64_t begin, int64_t end,
                       const float *scale, const float *scale_inv, int64_t size, int half) {
    int64_t start = row * task->columns, tile = begin / size;
    for (; begin + size <= end && begin == tile * size; begin += size, tile++)
        cast_run(task, start + begin, start + begin + size, scale[tile], scale_inv[tile], half);
    while (begin < end) { /* ragged: at the right edge, or a unit inside a wide tile */
        int64_t stop = smaller(++tile * size, end);
        cast_run(task, start + begin, start + stop, scale[tile - 1], scale_inv[tile - 1], half);
        begin = stop;
    }
}

INLINE void cast_unit(const Task *task, int64_t unit, int half) {
    int64_t left = unit % task->across * task->width;
    int64_t right = smaller(left + task->width, task->columns);
    int64_t row = unit / task->across * DEPTH, bottom = smaller(row + DEPTH, task->rows);
    int64_t tiles = units_of(task->columns, task->tile_columns);
    for (; row < bottom; row++) {
        int64_t tile_row = row / task->tile_rows, begin = row * task->columns + left;
        const float *scale = task->scale + tile_row * tiles;
        const float *scale_inv = task->scale_inv + tile_row * tiles;
        switch (task->tile_columns) { /* constants, so that the short loops are unrolled */
        case 1:
            scale += left, scale_inv += left;
            if (row + 3 < bottom && (row + 3) / task->tile_rows == tile_row) {
                cast_columns(task, begin, right - left, 1, scale, scale_inv, half);
                row += 3;
            } else cast_columns(task, begin, right - left, 0, scale, scale_inv, half);
            break;
        case 16: cast_tiles(task, row, left, right, scale, scale_inv, 16, half); break;
        case 32: cast_tiles(task, row, left, right, scale, scale_inv, 32, half); break;
        case 128: cast_tiles(task, row, left, right, scale, scale_inv, 128, half); break;
        default: cast_tiles(task, row, left, right, scale, scale_inv, task->tile_columns, half);
        }
    }
}

static void cast_piece(const Task *task, int64_t begin, int64_t end, Found *found) {
    (void)found;
    for (; begin < end; begin++) {
        if (task->half) cast_unit(task, begin, 1);
        else cast_unit(task, begin, 0);
    }
}

/* One scale; also what the tensor and its cast were like. */
INLINE void count_unit(const Task *task, int64_t begin, int64_t end, Found *found, int half) {
    const void *x = task->x;
    float *out = task->out;
    const Format f = task->format;
    const float scale = *task->scale, scale_inv = *task->scale_inv;
    int32_t amax = found->amax, saturated = 0, flushed = 0;
#pragma omp simd reduction(max : amax) reduction(+ : saturated, flushed)
    for (int64_t i = begin; i < end; i++) {
        float value = load(x, i, half), y = value * scale, rounded = on_grid(y, f);
        int32_t size = magnitude(value);
        amax = size > amax ? size : amax;
        saturated += from_bits(bits(y) & INT32_MAX) > f.limit;
        flushed += (rounded == 0.0f) & (value != 0.0f);
        out[i] = finish(y, rounded, f.zero, scale_inv);
    }
    found->amax = amax;
    found->saturated += saturated;
    found->flushed += flushed;
}

static void count_piece(const Task *task, int64_t begin, int64_t end, Found *found) {
    for (; begin < end; begin++) {
        int64_t left = begin * WIDTH, right = smaller(left + WIDTH, task->columns);
        if (task->half) count_unit(task, left, right, found, 1);
        else count_unit(task, left, right, found, 0);
    }
}

INLINE int32_t amax_run(const void *x, int64_t begin, int64_t end, int half) {
    int32_t amax = 0;
#pragma omp simd reduction(max : amax)
    for (int64_t i = begin; i < end; i++) {
        int32_t size = magnitude(load(x, i, half));
        amax = size > amax ? size : amax;
    }
    return amax;
}

static int32_t amax_of(const void *x, int64_t begin, int64_t end, int half) {
    return half ? amax_run(x, begin, end, 1) : amax_run(x, begin, end, 0);
}

static void amax_piece(const Task *task, int64_t begin, int64_t end, Found *found) {
    int64_t stop = smaller(end * WIDTH, task->columns);
    int32_t amax = amax_of(task->x, begin * WIDTH, stop, task->half);
    found->amax = amax > found->amax ? amax : found->amax;
}

/* Tiles of one row: columns [begin, end) start on a tile. */
INLINE void amax_tiles(const Task *task, int64_t begin, int64_t end, int64_t size, int half) {
    float *amax = task->out + begin / size;
    for (; begin + size <= end; begin += size)
        *amax++ = from_bits(amax_run(task->x, begin, begin + size, half));
    if (begin < end) *amax = from_bits(amax_run(task->x, begin, end, half));
}

INLINE void amax_row(const Task *task, int64_t begin, int64_t end, int half) {
    switch (task->tile_columns) {
    case 16: amax_tiles(task, begin, end, 16, half); break;
    case 32: amax_tiles(task, begin, end, 32, half); break;
    case 128: amax_tiles(task, begin, end, 128, half); break;
    default: amax_tiles(task, begin, end, task->tile_columns, half);
    }
}

/* Rows [top, bottom), columns [begin, end): the maximum down each column, then across each tile. */
INLINE void amax_block(const Task *task, int64_t top, int64_t bottom, int64_t begin, int64_t end,
                       float *amax, int half) {
    int32_t down[WIDTH];
    int64_t count = end - begin, size = task->tile_columns;
    memset(down, 0, sizeof(int32_t) * (size_t)count);
    for (int64_t row = top; row < bottom; row++) {
        int64_t start = row * task->columns + begin;
#pragma omp simd
        for (int64_t i = 0; i < count; i++) {
            int32_t value = magnitude(load(task->x, start + i, half));
            down[i] = value > down[i] ? value : down[i];
        }
    }
    if (size == 1) {
        memcpy(amax + begin, down, sizeof(int32_t) * (size_t)count);
        return;
    }
    for (int64_t i = 0; i < count;) {
        int64_t tile = (begin + i) / size, stop = smaller((tile + 1) * size - begin, count);
        int32_t largest = bits(amax[tile]);
        for (; i < stop; i++) largest = down[i] > largest ? down[i] : largest;
        amax[tile] = from_bits(largest);
    }
}

/* A unit is whole tiles of one tile row, so that no two threads write the same tile. */
static void tile_amax_piece(const Task *task, int64_t begin, int64_t end, Found *found) {
    (void)found;
    int64_t tiles = units_of(task->columns, task->tile_columns);
    for (; begin < end; begin++) {
        int64_t tile_row = begin / task->across, top = tile_row * task->tile_rows;
        int64_t bottom = smaller(top + task->tile_rows, task->rows);
        int64_t left = begin % task->across * task->width;
        int64_t right = smaller(left + task->width, task->columns);
        float *amax = task->out + tile_row * tiles;
        if (task->rows == 1) {
            if (task->half) amax_row(task, left, right, 1);
            else amax_row(task, left, right, 0);
            continue;
        }
        memset(amax + left / task->tile_columns, 0,
               sizeof(float) * (size_t)units_of(right - left, task->tile_columns));
        for (; left < right; left += WIDTH) {
            int64_t stop = smaller(left + WIDTH, right);
            if (task->half) amax_block(task, top, bottom, left, stop, amax, 1);
            else amax_block(task, top, bottom, left, stop, amax, 0);
        }
    }
}

/* scaling.scale_for and its reciprocal: `largest` / amax, `most` where that is infinite, 1 for an
   amax of 0, infinity or NaN. */
void fp8lab_scales(const float *amax, int64_t count, float largest, float most, int power_of_two,
                   float *scale, float *scale_inv) {
    int32_t kept = power_of_two ? EXPONENT : -1;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        float quotient = largest / amax[i];
        quotient = quotient > FLT_MAX ? most : quotient;
        quotient = from_bits(bits(quotient) & kept);
        quotient = amax[i] > 0 && amax[i] <= FLT_MAX ? quotient : 1.0f;
        scale[i] = quotient;
        scale_inv[i] = 1.0f / quotient;
    }
}

/* The powers of two of MXFP8, exponent rounded up (scaling._exponents); `reciprocal` is 1 / max. */
void fp8lab_exponents(const float *amax, int64_t count, float reciprocal, float *scale,
                      float *scale_inv) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        int32_t code = bits(amax[i] * reciprocal);
        int32_t exponent = code <= 0x400000 ? 0 : (code + 0x7fffff) >> 23;
        exponent = exponent > 254 ? 254 : exponent;
        int32_t down = (254 - exponent) << 23, up = exponent << 23;
        scale[i] = from_bits(down > 0x400000 ? down : 0x400000);
        scale_inv[i] = from_bits(up > 0x400000 ? up : 0x400000);
    }
}

/* Amax, scales and cast of the tiles of one row, while they lie in the nearest cache. */
INLINE void block_unit(const Task *task, int64_t left, int64_t right, int half) {
    float amax[WIDTH / 16], scale[WIDTH / 16], scale_inv[WIDTH / 16];
    const Format f = task->format;
    int64_t count = right - left, size = task->tile_columns, tiles = count / size;
    Task part = *task;
    part.x = (const char *)task->x + left * (half ? 2 : 4), part.out = amax;
    amax_row(&part, 0, count, half);
    if (task->scales == EXPONENTS) fp8lab_exponents(amax, tiles, 1 / f.largest, scale, scale_inv);
    else fp8lab_scales(amax, tiles, f.largest, task->most, task->scales == POWERS_OF_TWO, scale,
                       scale_inv);
    part.out = task->out + left;
    if (size == 32) cast_tiles(&part, 0, 0, count, scale, scale_inv, 32, half);
    else cast_tiles(&part, 0, 0, count, scale, scale_inv, size, half);
}

static void block_piece(const Task *task, int64_t begin, int64_t end, Found *found) {
    (void)found;
    for (; begin < end; begin++) {
        int64_t left = begin * task->width, right = smaller(left + task->width, task->columns);
        if (task->half) block_unit(task, left, right, 1);
        else block_unit(task, left, right, 0);
    }
}

typedef struct {
    Piece *piece;
    const Task *task;
    int64_t begin, end;
    Found found;
} Share;

static void *work(void *argument) {
    Share *share = argument;
    share->piece(share->task, share->begin, share->end, &share->found);
    return NULL;
}

/* Run `piece` over all units; a thread that cannot be had is done without. */
static Found spread(Piece *piece, const Task *task, int64_t units, int threads) {
    Share shares[MAX_THREADS];
    pthread_t running[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    int64_t count = smaller(smaller(threads, MAX_THREADS), units);
    Found all = {0, 0, 0};
    for (int64_t i = count - 1; i >= 0; i--) { /* the calling thread takes the first share */
        shares[i] = (Share){piece, task, units * i / count, units * (i + 1) / count, {0, 0, 0}};
        if (i > 0) started[i] = pthread_create(&running[i], NULL, work, &shares[i]) == 0;
        if (!started[i]) work(&shares[i]);
    }
    for (int64_t i = 0; i < count; i++) {
        if (started[i]) pthread_join(running[i], NULL);
        if (shares[i].found.amax > all.amax) all.amax = shares[i].found.amax;
        all.saturated += shares[i].found.saturated;
        all.flushed += shares[i].found.flushed;
    }
    return all;
}

/* Tiles of one row that follow each other without a gap are those of one long row. */
static Task tiled(const void *x, int half, int64_t rows, int64_t columns, int64_t tile_rows,
                  int64_t tile_columns, float *out) {
    Task task = {.x = x, .out = out, .rows = rows, .columns = columns,
                 .tile_rows = tile_rows, .tile_columns = tile_columns, .half = half};
    if (task.tile_rows == 1 && task.columns % task.tile_columns == 0) {
        task.columns *= task.rows;
        task.rows = 1;
    }
    task.width = task.tile_columns > WIDTH ? WIDTH : WIDTH / task.tile_columns * task.tile_columns;
    task.across = units_of(task.columns, task.width);
    return task;
}

void fp8lab_amax(const void *x, int half, int64_t count, float *amax, int threads) {
    Task task = {.x = x, .columns = count, .half = half};
    *amax = from_bits(spread(amax_piece, &task, units_of(count, WIDTH), threads).amax);
}

void fp8lab_tile_amax(const void *x, int half, int64_t rows, int64_t columns, int64_t tile_rows,
                      int64_t tile_columns, float *amax, int threads) {
    Task task = tiled(x, half, rows, columns, tile_rows, tile_columns, amax);
    if (task.tile_columns > task.width) { /* whole tiles, see tile_amax_piece */
        task.width = task.tile_columns;
        task.across = units_of(task.columns, task.width);
    }
    spread(tile_amax_piece, &task, units_of(task.rows, task.tile_rows) * task.across, threads);
}

void fp8lab_cast(const void *x, int half, int64_t rows, int64_t columns, int64_t tile_rows,
                 int64_t tile_columns, const Format *format, const float *scale,
                 const float *scale_inv, float *out, int threads) {
    Task task = tiled(x, half, rows, columns, tile_rows, tile_columns, out);
    task.format = *format, task.scale = scale, task.scale_inv = scale_inv;
    spread(cast_piece, &task, units_of(task.rows, DEPTH) * task.across, threads);
}

/* fp8lab_tile_amax, scales, fp8lab_cast in one go, for rows of whole tiles of 16 to WIDTH. */
void fp8lab_cast_blocks(const void *x, int half, int64_t rows, int64_t columns,
                        int64_t tile_columns, const Format *format, int scales, float most,
                        float *out, int threads) {
    Task task = tiled(x, half, rows, columns, 1, tile_columns, out);
    task.format = *format, task.scales = scales, task.most = most;
    spread(block_piece, &task, task.across, threads);
}

void fp8lab_cast_and_count(const void *x, int half, int64_t count, const Format *format,
                           const float *scale, const float *scale_inv, float *out, float *amax,
                           int64_t *saturated, int64_t *flushed, int threads) {
    Task task = {.x = x, .out = out, .columns = count, .format = *format, .half = half,
                 .scale = scale, .scale_inv = scale_inv};
    Found found = spread(count_piece, &task, units_of(count, WIDTH), threads);
    *amax = from_bits(found.amax);
    *saturated = found.saturated;
    *flushed = found.flushed;
}

/* End of a step under delayed scaling, for one operand (linear.Fp8Linear.move_scales): its column
   of a history [rows, width], of which the first `length` rows count. */
void fp8lab_move_scale(float *history, int64_t length, int64_t width, float largest,
                       int most_recent, float *scale, float *before) {
    float latest = history[0];
    *before = *scale;
    if (latest == 0) return; /* nothing came by: all stays */
    int32_t amax = magnitude(latest);
    for (int64_t i = 1; i < length; i++) {
        float past = history[i * width];
        history[(i - 1) * width] = past;
        if (!most_recent && magnitude(past) > amax) amax = magnitude(past);
    }
    history[(length - 1) * width] = latest;
    history[0] = 0;
    if (amax > 0 && amax < EXPONENT) {
        float quotient = largest / from_bits(amax);
        *scale = quotient > FLT_MAX ? FLT_MAX : quotient;
    }
}
