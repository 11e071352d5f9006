// Numbers of either type, and what is computed of them. In a loop, the compiler makes vectors of these.

#pragma once

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
