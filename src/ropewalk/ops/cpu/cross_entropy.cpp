// Softmax cross-entropy of rows of logits, and its gradient in their place: the numbers of
// `ops.linear_cross_entropy.cross_entropy_rows`.

#include "numbers.h"

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

extern "C" void cross_entropy_float(float *logits, int64_t rows, int64_t vocabulary, const int64_t *targets,
                                      float z_loss, const float *factors, bool slopes, float *losses,
                                      int threads) {
  rows_of(logits, rows, vocabulary, targets, z_loss, factors, slopes, losses, threads);
}
