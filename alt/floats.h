/* float32 by its bits, and what it becomes on the grid of a format: for every source here. */

#include <float.h>
#include <stdint.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16 /* 16: only _Float16 is wider than it says */
#error "float arithmetic is done in a wider type: results would be rounded twice"
#endif

#define INLINE static inline __attribute__((always_inline))
enum { EXPONENT = 0x7f800000 };

/* A format, from FloatFormat (kernels/__init__.py). */
typedef struct {
    float largest;
    float limit;                /* beyond it an element counts as saturated */
    float zero;                 /* +0 where the format has no negative zero, else -0 */
    int32_t smallest_exponent;  /* exponent field of its smallest normal number, as a float32 */
    int32_t shift;              /* 23 - mantissa bits, in the exponent field */
} Format;

INLINE int32_t bits(float value) {
    int32_t code;
    memcpy(&code, &value, 4);
    return code;
}

INLINE float from_bits(int32_t code) {
    float value;
    memcpy(&value, &code, 4);
    return value;
}

INLINE float load(const void *x, int64_t i, int half) {
    return half ? from_bits((int32_t)((uint32_t)((const uint16_t *)x)[i] << 16))
                : ((const float *)x)[i];
}

/* |value| as an integer, which orders like the float; 0 for NaN. */
INLINE int32_t magnitude(float value) {
    int32_t code = bits(value) & INT32_MAX;
    return code <= EXPONENT ? code : 0;
}

/* |y| on the format's grid: nearest, ties to even, saturating; NaN stays NaN.

`step` is the power of two whose last mantissa bit weighs as much as the format's last bit does at
|y|'s exponent (or at the smallest normal's, where the subnormals are), so that adding it rounds |y|
there, and subtracting it is exact. Ties fall to even: step is an even multiple of that bit. */
INLINE float on_grid(float y, const Format f) {
    float size = from_bits(bits(y) & INT32_MAX);
    size = size > f.largest ? f.largest : size;
    int32_t exponent = bits(size) & EXPONENT;
    exponent = exponent > f.smallest_exponent ? exponent : f.smallest_exponent;
    float step = from_bits((int32_t)((uint32_t)exponent + (uint32_t)f.shift));
    return (size + step) - step;
}

INLINE float finish(float y, float rounded, float zero, float scale_inv) {
    return (from_bits(bits(rounded) | (bits(y) & INT32_MIN)) + zero) * scale_inv;
}
