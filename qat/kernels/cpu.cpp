// Compute the LSQ and StatsQ functions of reference.py in one pass over memory. Forward results are
// bit-identical: products and sums are not fused, division rounds to nearest, rounding is half to
// even, and comparisons let NaN pass unchanged. `omp simd` is allowed where two arguments are the
// same memory, because each element is read before it is written.
#include <cmath>
#include <cstddef>
#include <cstdlib>

namespace {

const float FLOOR = 1e-5f;
const float TINY = 1.17549435e-38f;

inline float at_least_floor(float s) { return s < FLOOR ? FLOOR : s; }

inline float clamped(float u, float low, float high) {
    u = u < low ? low : u;
    return u > high ? high : u;
}

// Move the codes to start at 0 if `sign` says that the input has no negative values.
inline void choose_bounds(const float* sign, float& low, float& high) {
    if (sign && !(*sign > 0)) {
        high -= low;
        low = 0;
    }
}

// `CodeRange.nearest` in C++: the nearest value in steps; with half steps, the highest value is half a step below the end of the range.
template <bool HALF>
inline float rounded(float u, float high) {
    if (!HALF) return rintf(u);
    const float k = rintf(u - 0.5f);
    return (k > high - 1 ? high - 1 : k) + 0.5f;
}

template <bool HALF>
inline float quantized(float x, float s, float low, float high) {
    return rounded<HALF>(clamped(x / s, low, high), high) * s;
}

// The gradient passes where the value is in the range or is NaN; elsewhere it is zero. The
// comparison uses the clamped value, because compilers turn a comparison with the bounds into
// branches, which take four times as long.
inline float passed(float upstream, float u, float clamped_u) {
    return clamped_u == u || !(u == u) ? upstream : 0.0f;
}

struct Part {
    size_t first, last;
};

// Each thread gets a fixed share of the rows, so that sums do not depend on the speed of threads.
inline Part part_of(size_t rows, int thread, int threads) {
    return {rows * thread / threads, rows * (thread + 1) / threads};
}

// The forward result that backward writes: none, the result without an offset after the quantizer, or the result with this offset.
// Compilers turn a test for each element into branches, which take nine times as long.
enum Levels { NONE, BARE, SHIFTED };

template <bool BEFORE, Levels LEVELS, bool HALF>
inline float backward_row(const float* g, const float* x, const float* a, const float* c, float* dx, float* y, size_t length, float s, float low,
                          float high) {
    float step_grad = 0;
#pragma omp simd reduction(+ : step_grad)
    for (size_t i = 0; i < length; i++) {
        const float u = (BEFORE ? x[i] + a[i] : x[i]) / s, clamped_u = clamped(u, low, high);
        const float upstream = g[i], inner = passed(upstream, u, clamped_u);  // dx may be g
        const float rounded_u = rounded<HALF>(clamped_u, high);
        dx[i] = inner;
        step_grad += upstream * rounded_u - inner * clamped_u;
        if (LEVELS == BARE) y[i] = rounded_u * s;
        if (LEVELS == SHIFTED) y[i] = rounded_u * s + c[i];
    }
    return step_grad;
}

template <Levels LEVELS, bool HALF>
inline float backward_row(const float* g, const float* x, const float* a, const float* c, float* dx, float* y, size_t length, float s, float low,
                          float high) {
    return (a ? backward_row<true, LEVELS, HALF> : backward_row<false, LEVELS, HALF>)(g, x, a, c, dx, y, length, s, low, high);
}

template <bool BEFORE, bool HALF>
inline void backward_columns(const float* g, const float* x, const float* a, float* dx, size_t length, const float* s, float low, float high,
                             float* step_grad) {
#pragma omp simd
    for (size_t i = 0; i < length; i++) {
        const float u = (BEFORE ? x[i] + a[i] : x[i]) / at_least_floor(s[i]);
        const float clamped_u = clamped(u, low, high);
        const float upstream = g[i], inner = passed(upstream, u, clamped_u);  // dx may be g
        dx[i] = inner;
        step_grad[i] += upstream * rounded<HALF>(clamped_u, high) - inner * clamped_u;
    }
}

// Turn the gradient `dx` of a softmax's probabilities `p` into the gradient of its scores, which were multiplied by `factor`.
inline void through_softmax(float* dx, const float* p, size_t length, float factor) {
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (size_t i = 0; i < length; i++) dot += dx[i] * p[i];
#pragma omp simd
    for (size_t i = 0; i < length; i++) dx[i] = (dx[i] - dot) * p[i] * factor;
}

inline void add(float* sum, const float* row, size_t length) {
#pragma omp simd
    for (size_t i = 0; i < length; i++) sum[i] += row[i];
}

template <bool HALF>
void forward(const float* x, size_t x_stride, float* y, size_t rows, size_t length, const float* scale, size_t steps, int by_column,
             const float* before, const float* after, float low, float high, const float* sign, int threads) {
    choose_bounds(sign, low, high);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (size_t r = 0; r < rows; r++) {
        const float* in = x + r * x_stride;
        float* out = y + r * length;
        const float s = at_least_floor(scale[r % steps]);  // not used with by_column
        if (by_column) {
#pragma omp simd
            for (size_t i = 0; i < length; i++) {
                const float shifted = before ? in[i] + before[i] : in[i], level = quantized<HALF>(shifted, at_least_floor(scale[i]), low, high);
                out[i] = after ? level + after[i] : level;
            }
        } else if (before && after) {
#pragma omp simd
            for (size_t i = 0; i < length; i++) out[i] = quantized<HALF>(in[i] + before[i], s, low, high) + after[i];
        } else if (before) {
#pragma omp simd
            for (size_t i = 0; i < length; i++) out[i] = quantized<HALF>(in[i] + before[i], s, low, high);
        } else {
#pragma omp simd
            for (size_t i = 0; i < length; i++) out[i] = after ? quantized<HALF>(in[i], s, low, high) + after[i] : quantized<HALF>(in[i], s, low, high);
        }
    }
}

// step_grads: gradients of the step sizes, one number per row (overwritten), or with by_column one
// per column and thread (zero at first, added to).
// sum_dx, sum_g: column sums of dx and g, one row per thread and zero at first, or null.
// levels: where the forward result is written, or null; always null with by_column.
// softmax: true if x is the result of a softmax and dx the gradient of the scores; needs whole rows, and is false with by_column.
template <bool HALF>
void backward(const float* g, size_t g_stride, const float* x, size_t x_stride, float* dx, size_t dx_stride, size_t rows, size_t length,
              const float* scale, size_t steps, int by_column, const float* before, float low, float high, const float* sign, float* step_grads,
              float* sum_dx, float* sum_g, const float* after, float* levels, int softmax, float factor, int threads) {
    choose_bounds(sign, low, high);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int thread = 0; thread < threads; thread++) {
        const Part part = part_of(rows, thread, threads);
        for (size_t r = part.first; r < part.last; r++) {
            const float *grad = g + r * g_stride, *in = x + r * x_stride;
            float* out = dx + r * dx_stride;
            if (sum_g) add(sum_g + thread * length, grad, length);  // out may be grad
            if (by_column) {
                float* step_grad = step_grads + thread * length;
                before ? backward_columns<true, HALF>(grad, in, before, out, length, scale, low, high, step_grad)
                       : backward_columns<false, HALF>(grad, in, before, out, length, scale, low, high, step_grad);
            } else {
                const float s = at_least_floor(scale[r % steps]);
                float* y = levels ? levels + r * length : nullptr;
                const auto row = !y ? backward_row<NONE, HALF> : after ? backward_row<SHIFTED, HALF> : backward_row<BARE, HALF>;
                step_grads[r] = row(grad, in, before, after, out, y, length, s, low, high);
            }
            if (sum_dx) add(sum_dx + thread * length, out, length);
            if (softmax) through_softmax(out, in, length, factor);
        }
    }
}

}  // namespace

extern "C" {

void lsq_forward(const float* x, size_t x_stride, float* y, size_t rows, size_t length, const float* scale, size_t steps, int by_column,
                 const float* before, const float* after, float low, float high, int half, const float* sign, int threads) {
    (half ? forward<true> : forward<false>)(x, x_stride, y, rows, length, scale, steps, by_column, before, after, low, high, sign, threads);
}

void lsq_backward(const float* g, size_t g_stride, const float* x, size_t x_stride, float* dx, size_t dx_stride, size_t rows, size_t length,
                  const float* scale, size_t steps, int by_column, const float* before, float low, float high, int half, const float* sign,
                  float* step_grads, float* sum_dx, float* sum_g, const float* after, float* levels, int softmax, float factor,
                  int threads) {
    (half ? backward<true> : backward<false>)(g, g_stride, x, x_stride, dx, dx_stride, rows, length, scale, steps, by_column, before, low, high,
                                              sign, step_grads, sum_dx, sum_g, after, levels, softmax, factor, threads);
}

void statsq_forward(const float* w, float* y, size_t rows, size_t length, const float* scale, int bits, float top_clip, int threads) {
    const float n = float(1 << (bits - 1));
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (size_t r = 0; r < rows; r++) {
        const float s = scale[r], divisor = s < TINY ? TINY : s;
#pragma omp simd
        for (size_t i = 0; i < length; i++) {
            const float u = clamped(w[r * length + i] / divisor, -1.0f, top_clip);
            y[r * length + i] = (rintf(u * n - 0.5f) + 0.5f) / n * s;
        }
    }
}

}  // extern "C"
