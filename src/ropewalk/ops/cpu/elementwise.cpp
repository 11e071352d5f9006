// RMSNorm, rotary positions and gated units, forward and backward, each in one pass over memory. See `ops.norm`,
// `ops.rope` and `ops.gated`.

#include "numbers.h"

template <typename Number>
static void norm(const Number *x, const float *scale, float epsilon, int64_t rows, int64_t size, Number *y,
                 float *inverse, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const Number *from = x + row * size;
    Number *to = y + row * size;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < size; i++) squares += widen(from[i]) * widen(from[i]);
    const float r = inverse[row] = 1 / std::sqrt(squares / size + epsilon);
#pragma omp simd
    for (int64_t i = 0; i < size; i++) store(widen(from[i]) * r * scale[i], to[i]);
  }
}

// The gradient of x, of y = x * r * scale: r * (u - n * mean(u * n)), u = grad * scale, n = x * r. And that of
// scale, grad * n, summed over the rows of each part of them: `scale_slopes` [parts, size], or null.
template <typename Number>
static void norm_slopes(const Number *grad, const Number *x, const float *scale, const float *inverse,
                        int64_t rows, int64_t size, Number *slopes, float *scale_slopes, int64_t parts,
                        int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t part = 0; part < parts; part++) {
    float *sums = scale_slopes ? scale_slopes + part * size : nullptr;
    if (sums) std::fill_n(sums, size, 0.0f);
    for (int64_t row = part * rows / parts; row < (part + 1) * rows / parts; row++) {
      const Number *g = grad + row * size, *from = x + row * size;
      Number *to = slopes + row * size;
      const float r = inverse[row];
      float mean = 0;
#pragma omp simd reduction(+ : mean)
      for (int64_t i = 0; i < size; i++) mean += widen(g[i]) * scale[i] * widen(from[i]);
      mean *= r / size;
#pragma omp simd
      for (int64_t i = 0; i < size; i++)
        store(r * (widen(g[i]) * scale[i] - widen(from[i]) * r * mean), to[i]);
      if (!sums) continue;
#pragma omp simd
      for (int64_t i = 0; i < size; i++) sums[i] += widen(g[i]) * widen(from[i]) * r;
    }
  }
}

// Rotates numbers i and pairs + i of each head of x [tokens, heads, size] by the angle of which `cos` and `sin`
// [tokens, pairs] are; back where `inverse`. What lies beyond both halves is copied.
template <typename Number>
static void rotate(const Number *x, const Number *cos, const Number *sin, int64_t tokens, int64_t heads,
                   int64_t size, int64_t pairs, bool inverse, Number *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t token = 0; token < tokens; token++) {
    const Number *c = cos + token * pairs, *s = sin + token * pairs;
    const float sign = inverse ? -1.0f : 1.0f;
    for (int64_t head = token * heads; head < (token + 1) * heads; head++) {
      const Number *from = x + head * size;
      Number *to = out + head * size;
#pragma omp simd
      for (int64_t i = 0; i < pairs; i++) {
        const float a = widen(from[i]), b = widen(from[pairs + i]), sine = sign * widen(s[i]);
        store(a * widen(c[i]) - b * sine, to[i]);
        store(b * widen(c[i]) + a * sine, to[pairs + i]);
      }
      std::copy(from + 2 * pairs, from + size, to + 2 * pairs);
    }
  }
}

static inline float sigmoid(float x) {
  const float small = exponential(-std::abs(x));
  return (x < 0 ? small : 1.0f) / (1 + small);
}

constexpr int64_t CHUNK = 1 << 14;

// silu(gate) * up
template <typename Number>
static void gated(const Number *gate, const Number *up, int64_t count, Number *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < count; start += CHUNK) {
    const int64_t end = std::min(start + CHUNK, count);
#pragma omp simd
    for (int64_t i = start; i < end; i++) {
      const float x = widen(gate[i]);
      store(x * sigmoid(x) * widen(up[i]), out[i]);
    }
  }
}

template <typename Number>
static void gated_slopes(const Number *grad, const Number *gate, const Number *up, int64_t count,
                         Number *gate_slopes, Number *up_slopes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < count; start += CHUNK) {
    const int64_t end = std::min(start + CHUNK, count);
#pragma omp simd
    for (int64_t i = start; i < end; i++) {
      const float g = widen(grad[i]), x = widen(gate[i]), s = sigmoid(x);
      store(g * x * s, up_slopes[i]);
      store(g * widen(up[i]) * s * (1 + x * (1 - s)), gate_slopes[i]);
    }
  }
}

#define EXPORT(NUMBER)                                                                                       \
  extern "C" void norm_##NUMBER(const NUMBER *x, const float *scale, float epsilon, int64_t rows,            \
                                int64_t size, NUMBER *y, float *inverse, int threads) {                      \
    norm(x, scale, epsilon, rows, size, y, inverse, threads);                                                \
  }                                                                                                          \
  extern "C" void norm_slopes_##NUMBER(const NUMBER *grad, const NUMBER *x, const float *scale,              \
                                       const float *inverse, int64_t rows, int64_t size, NUMBER *slopes,     \
                                       float *scale_slopes, int64_t parts, int threads) {                    \
    norm_slopes(grad, x, scale, inverse, rows, size, slopes, scale_slopes, parts, threads);                  \
  }                                                                                                          \
  extern "C" void rotate_##NUMBER(const NUMBER *x, const NUMBER *cos, const NUMBER *sin, int64_t tokens,     \
                                  int64_t heads, int64_t size, int64_t pairs, bool inverse, NUMBER *out,     \
                                  int threads) {                                                             \
    rotate(x, cos, sin, tokens, heads, size, pairs, inverse, out, threads);                                  \
  }                                                                                                          \
  extern "C" void gated_##NUMBER(const NUMBER *gate, const NUMBER *up, int64_t count, NUMBER *out,           \
                                 int threads) {                                                              \
    gated(gate, up, count, out, threads);                                                                    \
  }                                                                                                          \
  extern "C" void gated_slopes_##NUMBER(const NUMBER *grad, const NUMBER *gate, const NUMBER *up,            \
                                        int64_t count, NUMBER *gate_slopes, NUMBER *up_slopes,               \
                                        int threads) {                                                       \
    gated_slopes(grad, gate, up, count, gate_slopes, up_slopes, threads);                                    \
  }

EXPORT(float)
EXPORT(bfloat16)
