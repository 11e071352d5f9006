// Causal attention of packed documents in bfloat16, forward and backward, on processors with AVX-512 or AMX.
//
// The method is FlashAttention-2's (arXiv 2307.08691): blocks of 64 queries against blocks of 64 keys, and no
// score leaves the cache. Scores are made transposed, [keys, queries]: what belongs to a query (its maximum,
// its sum) then lies along a vector, and the weights are already what the next product wants on its left.
// A document (and the key-value head, and a part of its query heads) is done by one thread from end to end.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

using bfloat16 = uint16_t;

// Rows of `dim` numbers, one for each token and head: [tokens, heads, dim] with any strides but the last, 1.
struct Rows {
  bfloat16 *data;
  int64_t token, head;
  bfloat16 *at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

struct Problem {
  const int64_t *documents;  // first token and length of each, the longest first
  int64_t count, tokens;
  int64_t heads, kv_heads, dim;
  int64_t parts;   // of a key-value head's query heads; each is one thread's
  int64_t window;  // keys that a query sees, itself included
  float scale, softcap;  // softcap 0: none
};

#if defined(__AVX512BW__) && defined(__AVX512VL__)

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t BLOCK = 64;
constexpr float LOG2E = 1.44269504f;

int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Sums of products of pairs; to bfloat16, to nearest, ties to even, and NaN stays NaN.
#ifdef __AVX512BF16__
__m512 add_pairs(__m512 sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }

__m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else
__m512 first(__m512i pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); }
__m512 second(__m512i pair) { return _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(-65536))); }
__m512 add_pairs(__m512 sum, __m512i a, __m512i b) {
  return _mm512_fmadd_ps(second(a), second(b), _mm512_fmadd_ps(first(a), first(b), sum));
}

__m256i narrow(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
#endif

#ifdef __AMX_BF16__
// All eight tiles hold 16 rows of 64 bytes. What the thread had before is put back: others keep theirs.
class Tiles {
  alignas(64) char before[64];

 public:
  Tiles() {
    alignas(64) struct {
      char palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      char rows[16] = {};
    } config;
    std::fill_n(config.bytes, 8, 64);
    std::fill_n(config.rows, 8, 16);
    _tile_storeconfig(before);
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before[0])
      _tile_loadconfig(before);
    else
      _tile_release();
  }
};

// c [m, n] = a [m, k] @ b [k, n], or += where `add`; m, n and k are multiples of 32. a lies in rows; of b, two
// rows lie interleaved, as the tiles want them: a word holds numbers 2i and 2i + 1 of a column.
template <bool add>
void product(const bfloat16 *a, int64_t a_step, const uint32_t *b, int64_t b_step, float *c, int64_t c_step,
             int64_t m, int64_t n, int64_t k) {
  for (int64_t i = 0; i < m; i += 32)
    for (int64_t j = 0; j < n; j += 32) {
      float *upper = c + i * c_step + j, *lower = upper + 16 * c_step;
      if (add) {
        _tile_loadd(0, upper, c_step * 4);
        _tile_loadd(1, upper + 16, c_step * 4);
        _tile_loadd(2, lower, c_step * 4);
        _tile_loadd(3, lower + 16, c_step * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t p = 0; p < k; p += 32) {
        _tile_loadd(4, a + i * a_step + p, a_step * 2);
        _tile_loadd(5, a + (i + 16) * a_step + p, a_step * 2);
        _tile_loadd(6, b + p / 2 * b_step + j, b_step * 4);
        _tile_loadd(7, b + p / 2 * b_step + j + 16, b_step * 4);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, upper, c_step * 4);
      _tile_stored(1, upper + 16, c_step * 4);
      _tile_stored(2, lower, c_step * 4);
      _tile_stored(3, lower + 16, c_step * 4);
    }
}

#else
struct Tiles {  // there is nothing to set up
  Tiles() {}
};

// The same in vectors: a pair of a row's numbers with those of 16 columns at a time.
template <bool add>
void product(const bfloat16 *a, int64_t a_step, const uint32_t *b, int64_t b_step, float *c, int64_t c_step,
             int64_t m, int64_t n, int64_t k) {
  constexpr int ROWS = 8, VECTORS = 2;  // of sums that stay in registers
  for (int64_t i = 0; i < m; i += ROWS)
    for (int64_t j = 0; j < n; j += 16 * VECTORS) {
      __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++)
          sums[r][v] = add ? _mm512_loadu_ps(c + (i + r) * c_step + j + 16 * v) : _mm512_setzero_ps();
      for (int64_t p = 0; p < k; p += 2) {
        __m512i right[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) right[v] = _mm512_loadu_si512(b + p / 2 * b_step + j + 16 * v);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
          int32_t pair;
          std::memcpy(&pair, a + (i + r) * a_step + p, 4);
          const __m512i left = _mm512_set1_epi32(pair);
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; v++) sums[r][v] = add_pairs(sums[r][v], left, right[v]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(c + (i + r) * c_step + j + 16 * v, sums[r][v]);
    }
}
#endif

// 2 ** x, to 8e-8; 0 for very small x.
__m512 power(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 result = _mm512_set1_ps(1.327647111e-3f);
  for (float next : {9.675541328e-3f, 5.550713276e-2f, 2.402211972e-1f, 6.931469671e-1f, 1.000000072e0f})
    result = _mm512_fmadd_ps(result, rest, _mm512_set1_ps(next));
  return _mm512_scalef_ps(result, whole);
}

// Scores of `count` pairs: times scale, and softcap * tanh(score / softcap) where there is one.
void scale_scores(float *scores, int64_t count, const Problem &p) {
  if (!p.softcap) return;  // the scale is part of what turns them into powers of 2
  const __m512 inner = _mm512_set1_ps(2 * LOG2E * p.scale / p.softcap), one = _mm512_set1_ps(1);
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 e = power(_mm512_mul_ps(_mm512_load_ps(scores + i), inner));
    const __m512 tanh = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2), _mm512_add_ps(e, one)));
    _mm512_store_ps(scores + i, _mm512_mul_ps(tanh, _mm512_set1_ps(p.softcap)));
  }
}

// What a score is multiplied by to be a power of 2.
float factor_of(const Problem &p) { return p.softcap ? LOG2E : p.scale * LOG2E; }

// Two rows of 16 numbers, interleaved.
__m512i interleaved(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

__m512i steps(int64_t step) {  // 0, step, 2 * step, ... in 16 lanes
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(step)));
}

// `count` rows of `dim` numbers become `padded` rows of `wide`, with zeros for what is not there.
void copy(const bfloat16 *from, int64_t step, int64_t count, int64_t dim, int64_t padded, int64_t wide,
          bfloat16 *to) {
  for (int64_t i = 0; i < padded; i++, to += wide) {
    const int64_t have = i < count ? dim : 0;
    if (have) std::memcpy(to, from + i * step, 2 * have);
    std::memset(to + have, 0, 2 * (wide - have));
  }
}

// rows [n, wide] -> [wide / 2, n] words: the right side of a product over `wide`.
void across(const bfloat16 *rows, int64_t n, int64_t wide, uint32_t *to) {
  const __m512i at = steps(2 * wide);
  for (int64_t d = 0; d < wide; d += 2)
    for (int64_t i = 0; i < n; i += 16, to += 16)
      _mm512_storeu_si512(to, _mm512_i32gather_epi32(at, rows + i * wide + d, 1));
}

// rows [n, wide] -> [n / 2, wide] words: the right side of a product over the rows.
void down(const bfloat16 *rows, int64_t n, int64_t wide, uint32_t *to) {
  for (int64_t i = 0; i < n; i += 2)
    for (int64_t d = 0; d < wide; d += 16, to += 16) {
      const bfloat16 *even = rows + i * wide + d;
      _mm512_storeu_si512(to, interleaved(_mm256_loadu_si256((const __m256i *)even),
                                          _mm256_loadu_si256((const __m256i *)(even + wide))));
    }
}

// rows [n, wide] -> [wide, n] with rows of BLOCK: the left side of a product over the rows.
void transpose(const bfloat16 *rows, int64_t n, int64_t wide, bfloat16 *to) {
  const __m512i at = steps(2 * wide);
  for (int64_t d = 0; d < wide; d += 2, to += 2 * BLOCK)
    for (int64_t i = 0; i < n; i += 16) {
      const __m512i both = _mm512_i32gather_epi32(at, rows + i * wide + d, 1);
      _mm256_storeu_si256((__m256i *)(to + i), _mm512_cvtepi32_epi16(both));
      _mm256_storeu_si256((__m256i *)(to + BLOCK + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
    }
}

// A row of `dim` numbers, read from `from` at every `step`th place and times `factor`.
void write(const float *from, int64_t step, float factor, int64_t dim, bfloat16 *to) {
  const __m512i at = steps(4 * step);
  for (int64_t d = 0; d < dim; d += 16) {
    const __mmask16 some = dim - d < 16 ? (1 << (dim - d)) - 1 : 0xffff;
    const __m512 x = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, at, from + d * step, 1);
    _mm256_mask_storeu_epi16(to + d, some, narrow(_mm512_mul_ps(x, _mm512_set1_ps(factor))));
  }
}

// Which of the queries from `first` on see a key: key <= query < key + window.
__mmask16 seen(int64_t first, int64_t key, int64_t window) {
  const int64_t low = std::clamp<int64_t>(key - first, 0, 16);
  const int64_t high = std::clamp<int64_t>(key - first + window, 0, 16);
  return __mmask16((1u << high) - (1u << low));
}

// Memory that is handed out piece by piece; each begins on a line of the cache.
class Room {
  char *next;

 public:
  explicit Room(char *start) : next(start) {}
  template <typename T>
  T *take(int64_t count) {
    T *piece = reinterpret_cast<T *>(next);
    next += up(count * int64_t(sizeof(T)), 64);
    return piece;
  }
};

// One thread's part: a document, a key-value head and the query heads [first_head, last_head) that it serves.
struct Item {
  int64_t first, length, kv, first_head, last_head, part;
  Item(const Problem &p, int64_t number) {
    const int64_t *document = p.documents + number / (p.kv_heads * p.parts) * 2;
    first = document[0], length = document[1];
    part = number % p.parts, kv = number / p.parts % p.kv_heads;
    const int64_t group = p.heads / p.kv_heads;
    first_head = kv * group + part * group / p.parts;
    last_head = kv * group + (part + 1) * group / p.parts;
  }
};

struct Forward {
  const Problem &p;
  Rows q, k, v, out;
  float *sums;
  int64_t wide, longest;

  int64_t room() const { return 4 * longest * wide + BLOCK * wide * 8 + BLOCK * BLOCK * 6 + 4 * BLOCK * 2; }

  void item(const Item &it, Room room) const {
    bfloat16 *keys = room.take<bfloat16>(longest * wide), *values = room.take<bfloat16>(longest * wide);
    bfloat16 *rows = room.take<bfloat16>(BLOCK * wide);
    uint32_t *queries = room.take<uint32_t>(BLOCK * wide / 2), *weights = room.take<uint32_t>(BLOCK * BLOCK / 2);
    float *scores = room.take<float>(BLOCK * BLOCK), *result = room.take<float>(BLOCK * wide);
    float *high = room.take<float>(BLOCK), *total = room.take<float>(BLOCK);
    const float factor = factor_of(p);

    copy(k.at(it.first, it.kv), k.token, it.length, p.dim, up(it.length, 32), wide, keys);
    for (int64_t j = 0; j < it.length; j += BLOCK) {
      const int64_t real = std::min(BLOCK, it.length - j);
      copy(v.at(it.first + j, it.kv), v.token, real, p.dim, up(real, 32), wide, rows);
      transpose(rows, up(real, 32), wide, values + j * wide);
    }
    for (int64_t h = it.first_head; h < it.last_head; h++)
      for (int64_t i = 0; i < it.length; i += BLOCK) {
        const int64_t real = std::min(BLOCK, it.length - i), n = up(real, 32);
        copy(q.at(it.first + i, h), q.token, real, p.dim, n, wide, rows);
        across(rows, n, wide, queries);
        std::fill_n(high, n, -1e30f);
        std::fill_n(total, n, 0.0f);
        std::fill_n(result, n * wide, 0.0f);
        for (int64_t j = std::max<int64_t>(0, i - p.window + 1) / BLOCK * BLOCK; j <= i; j += BLOCK) {
          const int64_t m = up(std::min(BLOCK, it.length - j), 32);
          const bool edge = j == i || i + n - j > p.window;
          product<false>(keys + j * wide, wide, queries, n, scores, n, m, n, wide);
          scale_scores(scores, m * n, p);
          for (int64_t x = 0; x < n; x += 16) {
            const __m512 before = _mm512_load_ps(high + x);
            __m512 top = _mm512_set1_ps(-1e30f);
            for (int64_t y = 0; y < m; y++) {
              const __mmask16 some = edge ? seen(i + x, j + y, p.window) : 0xffff;
              top = _mm512_mask_max_ps(top, some, top, _mm512_load_ps(scores + y * n + x));
            }
            top = _mm512_max_ps(before, _mm512_mul_ps(top, _mm512_set1_ps(factor)));
            const __m512 shrink = power(_mm512_sub_ps(before, top));
            __m512 sum = _mm512_mul_ps(_mm512_load_ps(total + x), shrink);
            for (int64_t y = 0; y < m; y += 2) {
              const float *even = scores + y * n + x;
              __m512 a = power(_mm512_fmsub_ps(_mm512_load_ps(even), _mm512_set1_ps(factor), top));
              __m512 b = power(_mm512_fmsub_ps(_mm512_load_ps(even + n), _mm512_set1_ps(factor), top));
              if (edge) {
                a = _mm512_maskz_mov_ps(seen(i + x, j + y, p.window), a);
                b = _mm512_maskz_mov_ps(seen(i + x, j + y + 1, p.window), b);
              }
              sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
              _mm512_store_si512(weights + y / 2 * n + x, interleaved(narrow(a), narrow(b)));
            }
            _mm512_store_ps(high + x, top);
            _mm512_store_ps(total + x, sum);
            if (_mm512_cmp_ps_mask(top, before, _CMP_NEQ_UQ))
              for (int64_t d = 0; d < wide; d++) {
                float *at = result + d * n + x;
                _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), shrink));
              }
          }
          product<true>(values + j * wide, BLOCK, weights, n, result, n, wide, n, m);
        }
        for (int64_t x = 0; x < real; x++) {
          const int64_t token = it.first + i + x;
          write(result + x, n, 1 / total[x], p.dim, out.at(token, h));
          sums[h * p.tokens + token] = high[x] / LOG2E + std::log(total[x]);
        }
      }
  }
};

struct Backward {
  const Problem &p;
  Rows grad, q, k, v, out;
  const float *sums;
  Rows dq;
  float *dk, *dv;  // [parts, tokens, kv_heads, dim]
  int64_t wide, longest;

  int64_t room() const { return 14 * longest * wide + BLOCK * wide * 14 + BLOCK * BLOCK * 14 + 4 * BLOCK * 2; }

  void item(const Item &it, Room room) const {
    bfloat16 *keys = room.take<bfloat16>(longest * wide), *values = room.take<bfloat16>(longest * wide);
    bfloat16 *turned_keys = room.take<bfloat16>(longest * wide), *rows = room.take<bfloat16>(BLOCK * wide);
    float *key_slopes = room.take<float>(longest * wide), *value_slopes = room.take<float>(longest * wide);
    uint32_t *q_across = room.take<uint32_t>(BLOCK * wide / 2), *q_down = room.take<uint32_t>(BLOCK * wide / 2);
    uint32_t *g_across = room.take<uint32_t>(BLOCK * wide / 2), *g_down = room.take<uint32_t>(BLOCK * wide / 2);
    float *scores = room.take<float>(BLOCK * BLOCK), *changes = room.take<float>(BLOCK * BLOCK);
    bfloat16 *weights = room.take<bfloat16>(BLOCK * BLOCK), *slopes = room.take<bfloat16>(BLOCK * BLOCK);
    uint32_t *slopes_down = room.take<uint32_t>(BLOCK * BLOCK / 2);
    float *query_slopes = room.take<float>(BLOCK * wide);
    float *total = room.take<float>(BLOCK), *mean = room.take<float>(BLOCK);
    const float factor = factor_of(p);

    const int64_t padded = up(it.length, 32);
    copy(k.at(it.first, it.kv), k.token, it.length, p.dim, padded, wide, keys);
    copy(v.at(it.first, it.kv), v.token, it.length, p.dim, padded, wide, values);
    for (int64_t j = 0; j < it.length; j += BLOCK)
      transpose(keys + j * wide, up(std::min(BLOCK, it.length - j), 32), wide, turned_keys + j * wide);
    std::fill_n(key_slopes, padded * wide, 0.0f);
    std::fill_n(value_slopes, padded * wide, 0.0f);
    for (int64_t h = it.first_head; h < it.last_head; h++)
      for (int64_t i = 0; i < it.length; i += BLOCK) {
        const int64_t real = std::min(BLOCK, it.length - i), n = up(real, 32);
        copy(q.at(it.first + i, h), q.token, real, p.dim, n, wide, rows);
        across(rows, n, wide, q_across);
        down(rows, n, wide, q_down);
        copy(grad.at(it.first + i, h), grad.token, real, p.dim, n, wide, rows);
        across(rows, n, wide, g_across);
        down(rows, n, wide, g_down);
        std::fill_n(total, n, 1e30f);  // queries that are not there have no weights
        std::fill_n(mean, n, 0.0f);
        std::fill_n(query_slopes, n * wide, 0.0f);
        for (int64_t x = 0; x < real; x++) {
          total[x] = sums[h * p.tokens + it.first + i + x] * LOG2E;
          mean[x] = dot(rows + x * wide, out.at(it.first + i + x, h));
        }
        for (int64_t j = std::max<int64_t>(0, i - p.window + 1) / BLOCK * BLOCK; j <= i; j += BLOCK) {
          const int64_t m = up(std::min(BLOCK, it.length - j), 32);
          const bool edge = j == i || i + n - j > p.window;
          product<false>(keys + j * wide, wide, q_across, n, scores, n, m, n, wide);
          scale_scores(scores, m * n, p);
          product<false>(values + j * wide, wide, g_across, n, changes, n, m, n, wide);
          for (int64_t x = 0; x < n; x += 16) {
            const __m512 sum = _mm512_load_ps(total + x), less = _mm512_load_ps(mean + x);
            for (int64_t y = 0; y < m; y += 2) {
              const int64_t even = y * n + x, odd = even + n;
              __m512 a = power(_mm512_fmsub_ps(_mm512_load_ps(scores + even), _mm512_set1_ps(factor), sum));
              __m512 b = power(_mm512_fmsub_ps(_mm512_load_ps(scores + odd), _mm512_set1_ps(factor), sum));
              if (edge) {
                a = _mm512_maskz_mov_ps(seen(i + x, j + y, p.window), a);
                b = _mm512_maskz_mov_ps(seen(i + x, j + y + 1, p.window), b);
              }
              __m512 da = _mm512_mul_ps(a, _mm512_sub_ps(_mm512_load_ps(changes + even), less));
              __m512 db = _mm512_mul_ps(b, _mm512_sub_ps(_mm512_load_ps(changes + odd), less));
              if (p.softcap) {
                da = _mm512_mul_ps(da, tanh_slope(scores + even));
                db = _mm512_mul_ps(db, tanh_slope(scores + odd));
              }
              const __m256i s = narrow(da), t = narrow(db);
              _mm256_store_si256((__m256i *)(weights + even), narrow(a));
              _mm256_store_si256((__m256i *)(weights + odd), narrow(b));
              _mm256_store_si256((__m256i *)(slopes + even), s);
              _mm256_store_si256((__m256i *)(slopes + odd), t);
              _mm512_store_si512(slopes_down + y / 2 * n + x, interleaved(s, t));
            }
          }
          product<true>(weights, n, g_down, wide, value_slopes + j * wide, wide, m, wide, n);
          product<true>(slopes, n, q_down, wide, key_slopes + j * wide, wide, m, wide, n);
          product<true>(turned_keys + j * wide, BLOCK, slopes_down, n, query_slopes, n, wide, n, m);
        }
        for (int64_t x = 0; x < real; x++)
          write(query_slopes + x, n, p.scale, p.dim, dq.at(it.first + i + x, h));
      }
    for (int64_t x = 0; x < it.length; x++) {
      const int64_t at = ((it.part * p.tokens + it.first + x) * p.kv_heads + it.kv) * p.dim;
      for (int64_t d = 0; d < p.dim; d++) {
        dk[at + d] = key_slopes[x * wide + d] * p.scale;
        dv[at + d] = value_slopes[x * wide + d];
      }
    }
  }

  // 1 - tanh ** 2 of 16 capped scores
  __m512 tanh_slope(const float *capped) const {
    const __m512 tanh = _mm512_div_ps(_mm512_load_ps(capped), _mm512_set1_ps(p.softcap));
    return _mm512_fnmadd_ps(tanh, tanh, _mm512_set1_ps(1));
  }

  float dot(const bfloat16 *a, const bfloat16 *b) const {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < p.dim; d += 16) {
      const __mmask16 some = p.dim - d < 16 ? (1 << (p.dim - d)) - 1 : 0xffff;
      const auto wide = [&](const bfloat16 *x) {
        const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x + d));
        return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
      };
      sum = _mm512_fmadd_ps(wide(a), wide(b), sum);
    }
    return _mm512_reduce_add_ps(sum);
  }
};

// All items of a pass, over the threads. Whether there was memory for it.
template <typename Pass>
bool run(Pass pass, const Problem &p, int most_threads) {
  const int64_t items = p.count * p.kv_heads * p.parts, room = up(pass.room(), 4096);
  const int threads = int(std::min<int64_t>(most_threads, items));
  char *memory = static_cast<char *>(std::aligned_alloc(4096, room * threads));
  if (!memory) return false;
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles;
    char *own = memory + omp_get_thread_num() * room;
#pragma omp for schedule(dynamic, 1)
    for (int64_t number = 0; number < items; number++) pass.item(Item(p, number), Room(own));
  }
  std::free(memory);
  return true;
}

}  // namespace

// Asks the system for the tiles, for all threads of the process. Whether it grants them.
extern "C" bool attention_possible() {
#ifdef __AMX_BF16__
  constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
  return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return true;
#endif
}

// `sums` [heads, tokens] becomes the logarithm of each query's sum of exponentials.
extern "C" bool attention_forward(Rows q, Rows k, Rows v, Rows out, float *sums, Problem p, int threads) {
  return run(Forward{p, q, k, v, out, sums, up(p.dim, 32), up(p.documents[1], BLOCK)}, p, threads);
}

// `grad` is the slope of `out`; dk and dv [parts, tokens, kv_heads, dim] are to be summed over the parts.
extern "C" bool attention_backward(Rows grad, Rows q, Rows k, Rows v, Rows out, const float *sums, Rows dq,
                                   float *dk, float *dv, Problem p, int threads) {
  const int64_t wide = up(p.dim, 32), longest = up(p.documents[1], BLOCK);
  return run(Backward{p, grad, q, k, v, out, sums, dq, dk, dv, wide, longest}, p, threads);
}
#endif
