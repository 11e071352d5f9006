// Softmax cross-entropy of rows of logits, and its gradient in their place. Plain loops: the compiler makes
// vectors of them. See `ops.linear_cross_entropy.cross_entropy_rows`, whose numbers these are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

using bfloat16 = uint16_t;

static inline float widen(float x) { return x; }
static inline float widen(bfloat16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

static inline void store(float x, float &to) { to = x; }
static inline void store(float x, bfloat16 &to) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = x != x ? 0x7fc00000 : bits + 0x7fff + ((bits >> 16) & 1);
  to = bfloat16(bits >> 16);
}

// e ** x for x <= 0, to 2 units in the last place; 2 ** -126 for anything smaller.
static inline float exponential(float x) {
  x = std::max(x, -87.33654f);
  const float whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // 1.5 * 2 ** 23: adding it rounds
  const float rest = (x * 1.44269504f - whole) + x * 1.925963e-8f;    // log2(e) in two numbers
  float result = 1.534581113e-4f;  // 2 ** rest on [-0.5, 0.5]: the polynomial whose largest error is smallest
  result = result * rest + 1.339993121e-3f;
  result = result * rest + 9.618488960e-3f;
  result = result * rest + 5.550328777e-2f;
  result = result * rest + 2.402264689e-1f;
  result = result * rest + 6.931472057e-1f;
  result = result * rest + 1.0f;
  const int32_t bits = (int32_t(whole) + 127) << 23;
  float two;
  std::memcpy(&two, &bits, 4);
  return result * two;
}

template <typename Number>
static void rows_of(Number *logits, int64_t rows, int64_t vocabulary, const int64_t *targets, float z_loss,
                    const float *factors, bool slopes, float *losses, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    Number *x = logits + row * vocabulary;
    float high = -INFINITY;
    double sum = 0;
#pragma omp simd reduction(max : high)
    for (int64_t i = 0; i < vocabulary; i++) high = std::max(high, widen(x[i]));
    for (int64_t start = 0; start < vocabulary; start += 1024) {  // one long float32 sum would lose digits
      const int64_t end = std::min(start + 1024, vocabulary);
      float some = 0;
#pragma omp simd reduction(+ : some)
      for (int64_t i = start; i < end; i++) some += exponential(widen(x[i]) - high);
      sum += some;
    }
    const float total = float(sum), log_total = high + std::log(total), own = widen(x[targets[row]]);
    losses[row] = log_total - own + z_loss * log_total * log_total;
    if (!slopes) continue;
    const float factor = factors ? factors[row] : 1.0f;
    const float pull = (1 + 2 * z_loss * log_total) * factor / total;
#pragma omp simd
    for (int64_t i = 0; i < vocabulary; i++) store(exponential(widen(x[i]) - high) * pull, x[i]);
    store(exponential(own - high) * pull - factor, x[targets[row]]);
  }
}

extern "C" void cross_entropy_bfloat16(bfloat16 *logits, int64_t rows, int64_t vocabulary,
                                       const int64_t *targets, float z_loss, const float *factors, bool slopes,
                                       float *losses, int threads) {
  rows_of(logits, rows, vocabulary, targets, z_loss, factors, slopes, losses, threads);
}

extern "C" void cross_entropy_float32(float *logits, int64_t rows, int64_t vocabulary, const int64_t *targets,
                                      float z_loss, const float *factors, bool slopes, float *losses,
                                      int threads) {
  rows_of(logits, rows, vocabulary, targets, z_loss, factors, slopes, losses, threads);
}
