// Compute `round_blocks` of functional/block_floats.py in one pass over memory; results are
// bit-identical. The text of cpu.cpp precedes this file when it is compiled.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

inline float power_below(float x) { return float_of(bits_of(x) & 0x7F800000u); }

// The nearest value of a format. spacing: distance between neighbouring values from 1 to 2; lowest: the smallest
// normal value.
// Adding and subtracting a large number removes the digits that the format does not have.
inline float nearest(float u, float spacing, float lowest, float highest) {
    float size = fabsf(u);
    size = size > highest ? highest : size;
    float power = power_below(size);
    power = power < lowest ? lowest : power;
    const float large = power * (spacing * 12582912.0f);
    return float_of(bits_of((size + large) - large) | (bits_of(u) & 0x80000000u));
}

// The largest magnitude. Non-negative floats have the order of their bits as integers, with NaN above infinity.
inline float largest_of(const float* x, size_t n) {
    int32_t most = 0;
#pragma omp simd reduction(max : most)
    for (size_t i = 0; i < n; i++) {
        const int32_t size = int32_t(bits_of(x[i]) & 0x7FFFFFFFu);
        most = size > most ? size : most;
    }
    return float_of(uint32_t(most));
}

// Scales of blocks from their largest magnitudes. t: the scale of the tensor, or null.
inline void find_scales(const float* largest, float* scales, size_t n, float highest, const float* t) {
    if (t) {
        const float of_tensor = *t, divisor = of_tensor == 0 ? INFINITY : of_tensor;
#pragma omp simd
        for (size_t i = 0; i < n; i++) scales[i] = nearest(largest[i] / highest / divisor, 0.125f, 1.0f / 64, 448.0f) * of_tensor;
    } else {
        // The highest scale is 2^128 / unit; 254u << 23 are the bits of 2^127.
        const float unit = power_below(highest), highest_scale = float_of(254u << 23) / unit * 2;
#pragma omp simd
        for (size_t i = 0; i < n; i++) {
            float scale = power_below(largest[i]) / unit;
            scale = scale < TINY ? 0.0f : scale;
            scale = scale > highest_scale ? highest_scale : scale;
            scales[i] = largest[i] == largest[i] ? scale : largest[i];
        }
    }
}

// Round one block with scale s; with g, write the gradient instead.
inline void round_one(const float* x, const float* g, float* y, size_t n, float s, float spacing, float lowest, float highest) {
    const float divisor = s == 0 ? INFINITY : s;
    if (g) {
#pragma omp simd
        for (size_t i = 0; i < n; i++) y[i] = fabsf(x[i] / divisor) > highest ? 0.0f : g[i];
    } else {
#pragma omp simd
        for (size_t i = 0; i < n; i++) y[i] = nearest(x[i] / divisor, spacing, lowest, highest) * s;
    }
}

// Number of blocks whose scales are computed together.
const size_t CHUNK = 64;

template <size_t BLOCK>
void round_rows(const float* x, const float* g, float* y, size_t rows, size_t length, float spacing, float lowest, float highest, const float* t,
                int threads) {
    const size_t whole = length / BLOCK, rest = length % BLOCK, blocks = whole + (rest > 0);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (size_t r = 0; r < rows; r++) {
        for (size_t first = 0; first < blocks; first += CHUNK) {
            const size_t n = blocks - first < CHUNK ? blocks - first : CHUNK, full = first + n > whole ? n - 1 : n;
            const size_t at = r * length + first * BLOCK, end = at + full * BLOCK;
            float largest[CHUNK], scales[CHUNK];
            for (size_t i = 0; i < full; i++) largest[i] = largest_of(x + at + i * BLOCK, BLOCK);
            if (full < n) largest[full] = largest_of(x + end, rest);
            find_scales(largest, scales, n, highest, t);
            for (size_t i = 0; i < full; i++) {
                const size_t j = at + i * BLOCK;
                round_one(x + j, g ? g + j : g, y + j, BLOCK, scales[i], spacing, lowest, highest);
            }
            if (full < n) round_one(x + end, g ? g + end : g, y + end, rest, scales[full], spacing, lowest, highest);
        }
    }
}

}  // namespace

extern "C" {

// y: the nearest values, or if g is not null the gradients of x. g: gradients of the nearest values, or null.
// block: 16 or 32.
void round_blocks(const float* x, const float* g, float* y, size_t rows, size_t length, size_t block, float spacing, float lowest, float highest,
                  const float* t, int threads) {
    (block == 16 ? round_rows<16> : round_rows<32>)(x, g, y, rows, length, spacing, lowest, highest, t, threads);
}

}  // extern "C"
