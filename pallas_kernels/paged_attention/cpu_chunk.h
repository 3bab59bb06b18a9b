// One chunk of a row's keys taken into account for some of its queries: scores, softmax, and weighted values.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include "amx.h"
#include "vectors.h"

namespace {

using namespace jaxllm;

#if defined(__AVX512BF16__)
constexpr bool kHasDot = true;  // a product of pairs of bfloat16
#else
constexpr bool kHasDot = false;
#endif
constexpr int kChunk = 256;        // keys whose scores are held at once: with their values 64 KB of bf16, half of an L2
constexpr float kMasked = -1e30f;  // finite, so that differences of two are no NaN
#if defined(__AVX512F__)
constexpr int kRows = 12, kGroups = 2;  // 24 of 32 registers are sums
#else
constexpr int kRows = 4, kGroups = 1;
#endif
constexpr int kScores = kChunk + kGroups * 16;  // from a row of scores to the next: not a power of two, which caches like less
constexpr int kAhead = 2 * kGroups;  // pages from the one in use to the one fetched
constexpr int kFewRows = 4;  // the most that take as many instantiations

struct f8 { uint8_t bits; };
constexpr bf16 kZeros[2] = {};

inline f8 to_f8(float x) {  // e4m3: 448 is the largest, to nearest even
  uint32_t u; std::memcpy(&u, &x, 4);
  uint8_t sign = (u >> 24) & 0x80;
  if (x != x) return {uint8_t(sign | 0x7f)};
  float a = std::min(std::fabs(x), 448.f);
  if (a < 0.015625f) return {uint8_t(sign | uint8_t(std::nearbyint(a * 512.f)))};  // subnormal: steps of 2^-9
  std::memcpy(&u, &a, 4);
  u += 0x7ffff + ((u >> 20) & 1);
  return {uint8_t(sign | ((u >> 20) - (120 << 3)))};
}

template <int N> inline void widen(const float* p, Floats<N>* x) { x[0] = load<Floats<N>>(p); }
template <int N> inline void widen(const bf16* p, Floats<N>* x) {  // the even elements, then the odd ones
  Words<N> w = load<Words<N>>(p);
  x[0] = (Floats<N>)(w << 16); x[1] = (Floats<N>)(w & 0xffff0000u);
}
template <int N> inline void widen(const int8_t* p, Floats<N>* x) { x[0] = __builtin_convertvector(load<Bytes<N>>(p), Floats<N>); }
template <int N> inline void widen(const f8* p, Floats<N>* x) {
  Words<N> w = __builtin_convertvector(load<UBytes<N>>(p), Words<N>);
  Words<N> magnitude = w & 0x7f, mantissa = w & 7;
  Words<N> normal = (magnitude << 20) + (120u << 23);
  Words<N> small = (Words<N>)(__builtin_convertvector((Ints<N>)mantissa, Floats<N>) * 0.001953125f);
  Words<N> bits = (magnitude < 8) ? small : normal;
  bits = (magnitude == 0x7f) ? (bits | 0x7fc00000u) : bits;
  x[0] = (Floats<N>)(bits | ((w & 0x80) << 24));
}
template <class E> constexpr int kPack = std::is_same_v<E, bf16> ? 2 : 1;

struct Shape {
  int heads, kv_heads, head_dim, depth, page_size, lanes, group;
  int64_t num_pages;
  int64_t half() const { return int64_t{page_size} * depth; }  // elements of a page's keys, and of its values
  bool paired() const { return page_size % 2 == 0; }           // whether values of bf16 lie in pairs of slots
};

struct Options {
  float scale, soft_cap;
  int64_t window;
  const float *sinks, *k_scale, *v_scale;
};

// Queries that are handled together, and where their softmax stands; scores are in units of log2.
struct Tile {
  const float* q;      // [depth, rows]
  const uint32_t* qw;  // the same as pairs of bf16; for tiles of AMX [rows, depth / 2]
  float *out, *top, *total;
  const int *first, *end;  // the keys that each query sees
};

// One chunk of a row's keys: pages that hold them.
template <class E> struct Chunk {
  const E* keys[kChunk + kAhead];
  int begin, size;
};

// The scores of R queries and G groups of N slots, each row of which is `kScores` after the last.
template <class E, int N, int R, int G, bool Dot>
inline void score(const Shape& s, const Tile& t, const E* const (&k)[G], float* scores) {
  constexpr int P = kPack<E>;
  const int steps = s.depth / P;
  Floats<N> sum[R][G] = {};
  for (int i = 0; i < steps; i++) {
#if defined(__AVX512BF16__)
    if constexpr (Dot) {
      __m512bh x[G];
      for (int g = 0; g < G; g++) x[g] = (__m512bh)load<__m512i>(k[g] + i * N * P);
      for (int r = 0; r < R; r++) for (int g = 0; g < G; g++) sum[r][g] = (Floats<N>)_mm512_dpbf16_ps((__m512)sum[r][g], x[g], (__m512bh)_mm512_set1_epi32(t.qw[i * R + r]));
      continue;
    }
#endif
    Floats<N> x[G][P];
    for (int g = 0; g < G; g++) widen<N>(k[g] + i * N * P, x[g]);
    for (int r = 0; r < R; r++) for (int g = 0; g < G; g++) for (int j = 0; j < P; j++) sum[r][g] += x[g][j] * t.q[(i * P + j) * R + r];
  }
  for (int r = 0; r < R; r++) for (int g = 0; g < G; g++) store(scores + r * kScores + g * N, sum[r][g]);
}

// Adds the weighted values of the slots [begin, end) of one page to 16 * C columns of the outputs.
template <class E, int R, int C, bool Dot>
inline void add_values(const Shape& s, const E* v, int begin, int end, const float* weights, const bf16* rounded, F16 (&sum)[R][C]) {
  if (kPack<E> == 2 && s.paired()) {
    for (int i = begin / 2; 2 * i < end; i++) {
      // a slot that no query sees may hold NaN
      const uint32_t mask = (2 * i < begin ? 0xffff0000u : ~0u) & (2 * i + 1 >= end ? 0x0000ffffu : ~0u);
      Words<16> w[C];
      for (int c = 0; c < C; c++) w[c] = load<Words<16>>(v + (int64_t{i} * s.depth + 16 * c) * 2) & mask;
#if defined(__AVX512BF16__)
      if constexpr (Dot) {
        for (int r = 0; r < R; r++) {
          const __m512bh pair = (__m512bh)_mm512_set1_epi32(load<int>(rounded + r * kScores + 2 * i));
          for (int c = 0; c < C; c++) sum[r][c] = (F16)_mm512_dpbf16_ps((__m512)sum[r][c], (__m512bh)w[c], pair);
        }
        continue;
      }
#endif
      for (int c = 0; c < C; c++) {
        F16 even = (F16)(w[c] << 16), odd = (F16)(w[c] & 0xffff0000u);
        for (int r = 0; r < R; r++) sum[r][c] += even * weights[r * kScores + 2 * i] + odd * weights[r * kScores + 2 * i + 1];
      }
    }
    return;
  }
  for (int i = begin; i < end; i++) for (int c = 0; c < C; c++) {
    F16 x[2];
    const E* place = v + int64_t{i} * s.depth + 16 * c;
    if constexpr (std::is_same_v<E, bf16>) {
      x[0] = (F16)(__builtin_convertvector(load<Halves>(place), Words<16>) << 16);
    } else {
      widen<16>(place, x);
    }
    for (int r = 0; r < R; r++) sum[r][c] += x[0] * weights[r * kScores + i];
  }
}

template <class E, int R, int C, bool Dot>
inline void add_columns(const Shape& s, int column, const Chunk<E>& chunk, int begin, int end, const float* weights, const bf16* rounded, const float* rescale, float* out) {
  F16 sum[R][C];
  for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) sum[r][c] = load<F16>(out + r * s.depth + column + 16 * c) * rescale[r];
  for (int slot = begin; slot < end;) {
    const int page = slot / s.page_size, base = page * s.page_size;
    const int last = std::min(end, base + s.page_size);
    const E* values = chunk.keys[page] + s.half() + column * (s.paired() ? kPack<E> : 1);
    add_values<E, R, C, Dot>(s, values, slot - base, last - base, weights + base, rounded + base, sum);
    slot = last;
  }
  for (int r = 0; r < R; r++) for (int c = 0; c < C; c++) store(out + r * s.depth + column + 16 * c, sum[r][c]);
}

// The slots of a chunk that a query sees, and the groups of 16 that have any of them.
struct Seen {
  int first, last, from, to;
  Seen(int begin, int end, int low, int high) : first(begin), last(end) {
    from = std::min(high, std::max(low, first / 16 * 16));
    to = std::max(from, std::min(high, (last + 15) / 16 * 16));
  }
  // x where the query sees the slots from i on, else `other`.
  F16 mask(int i, F16 x, float other) const {
    if (i >= first && i + 16 <= last) return x;
    const Ints<16> at = Ints<16>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + i;
    return ((at >= first) & (at < last)) ? x : (F16{} + other);
  }
};

// From scores to weights: the softmax of up to 16 queries so far, and by what it rescales what was added up before.
template <bool Dot>
void soften(int rows, const Options& o, float scale, const Tile& t, int chunk, int size, int low, int high, float* scores, bf16* rounded, float* rescale) {
  const bool capped = o.soft_cap > 0, direct = !capped && scale > 0;
  const float factor = direct ? scale * kLog2e : 1.f, inner = capped ? scale / o.soft_cap : scale, outer = capped ? o.soft_cap * kLog2e : kLog2e;
  auto seen = [&](int r) { return Seen(t.first[r] - chunk, std::min(t.end[r] - chunk, size), low, high); };
  F16 top = {}, before = {};
  for (int r = 0; r < rows; r++) {
    float* row = scores + r * kScores;
    const Seen s = seen(r);
    F16 most = F16{} + kMasked;
    for (int i = s.from; i < s.to; i += 16) {
      F16 x = load<F16>(row + i);
      if (!direct) store(row + i, x = (capped ? tanh(x * inner) : x * inner) * outer);
      x = s.mask(i, x, kMasked);
      most = (x > most) ? x : most;
    }
    before[r] = t.top[r], top[r] = std::max(t.top[r], greatest(most) * factor);
  }
  const F16 factors = exp2(before - top);
  for (int r = 0; r < rows; r++) {
    float* row = scores + r * kScores;
    const Seen s = seen(r);
    const float highest = top[r];
    F16 sums = {};
    auto weigh = [&](int i, F16 x) {
      if constexpr (Dot) store(rounded + r * kScores + i, to_bf16(x));
      else store(row + i, x);
    };
    for (int i = low; i < s.from; i += 16) weigh(i, F16{});
    for (int i = s.from; i < s.to; i += 16) {
      const F16 x = s.mask(i, exp2<Dot>(load<F16>(row + i) * factor - highest), 0.f);  // a score of NaN stays one
      sums += x;
      weigh(i, x);
    }
    for (int i = s.to; i < high; i += 16) weigh(i, F16{});
    rescale[r] = factors[r];
    t.top[r] = highest;
    t.total[r] = t.total[r] * rescale[r] + total(sums);
  }
}

// Takes one chunk of keys into account for R queries; `fetch` asks for its pages ahead.
template <class E, int N, int R, bool Dot>
void step(bool fetch, const Shape& s, const Options& o, float scale, const Tile& t, const Chunk<E>& chunk) {
  constexpr int G = N == 16 ? kGroups : 1, C = 4, V = R > kFewRows ? R / 2 : R;  // V x C sums of values
  alignas(64) float scores[R * kScores];
  alignas(64) bf16 rounded[R * kScores];
  int begin = kChunk, end = 0;
  for (int r = 0; r < R; r++) begin = std::min(begin, t.first[r] - chunk.begin), end = std::max(end, t.end[r] - chunk.begin);
  begin = std::max(begin, 0), end = std::min(end, chunk.size);
  if (begin >= end) return;
  const int low = begin / 16 * 16, high = (end + 15) / 16 * 16;
  auto keys = [&](int slot) { return chunk.keys[slot / s.page_size] + int64_t{slot % s.page_size} * s.depth; };
  for (int slot = begin / N * N; slot < end; slot += N * G) {
    const E* k[G];
    for (int g = 0; g < G; g++) {
      const int group = std::min(slot + g * N, (end - 1) / N * N);  // beyond the last one its scores again, for nobody
      k[g] = keys(group);
      if (!fetch) continue;
      // the values of this page and the keys some pages on: hardware stops at 4 KB
      const int page = group / s.page_size;
      const char *values = (const char*)(k[g] + s.half()), *ahead = (const char*)(chunk.keys[page + kAhead] + (k[g] - chunk.keys[page]));
      for (int line = 0; line < int(s.depth * N * sizeof(E)); line += 64) __builtin_prefetch(values + line), __builtin_prefetch(ahead + line);
    }
    score<E, N, R, G, Dot>(s, t, k, scores + slot);
  }
  float rescale[R];
  soften<Dot>(R, o, scale, t, chunk.begin, chunk.size, low, high, scores, rounded, rescale);
  for (int r = 0; r < R; r += V) {
    const float* weights = scores + r * kScores;
    const bf16* halves = rounded + r * kScores;
    float* out = t.out + r * s.depth;
    int column = 0;
    for (; column + 16 * C <= s.depth; column += 16 * C) add_columns<E, V, C, Dot>(s, column, chunk, begin, end, weights, halves, rescale + r, out);
    for (; column < s.depth; column += 16) add_columns<E, V, 1, Dot>(s, column, chunk, begin, end, weights, halves, rescale + r, out);
  }
}

constexpr int kTileRows = 16, kMostDepth = 256;

bool fits_tiles(const Shape& s) { return has_amx() && s.lanes == 16 && s.depth % 32 == 0 && s.depth <= kMostDepth; }

// How many of the queries that are left are handled together; with small pages, which are right, not fast, one.
int tile_rows(const Shape& s, bool tiled, int left) {
  if (s.lanes < 16) return 1;
  return std::min(left, tiled ? kTileRows : left >= kRows ? kRows : kFewRows);
}

#if JAXLLM_AMX

// Tiles 0 to 3 are sums, 4 queries, 5 weights of 16 slots, 6 keys of 16 slots, 7 their values.
Tiles::Shapes shapes(int rows) {
  Tiles::Shapes result;
  for (int i = 0; i < 5; i++) result.set(i, rows, 64);
  result.set(5, rows, 32), result.set(6, 16, 64), result.set(7, 8, 64);
  return result;
}

// Some columns of the values of 16 slots, zero but in [from, to): a slot that no query sees may hold NaN.
const uint32_t* clean(const Shape& s, const uint32_t* v, int columns, int from, int to, uint32_t* copy) {
  for (int i = 0; i < 8; i++) {
    const bool even = 2 * i >= from && 2 * i < to, odd = 2 * i + 1 >= from && 2 * i + 1 < to;
    const uint32_t mask = (even ? 0x0000ffffu : 0) | (odd ? 0xffff0000u : 0);
    for (int c = 0; c < columns; c++) copy[i * s.depth + c] = v[i * s.depth + c] & mask;
  }
  return copy;
}

// As `step` of bfloat16, for up to 16 queries and pages of 16 slots or a multiple that `fits_tiles`.
void step_tiles(Tiles& tiles, int rows, bool fetch, const Shape& s, const Options& o, float scale, const Tile& t, const Chunk<bf16>& chunk) {
  alignas(64) float scores[kTileRows * kScores];
  alignas(64) bf16 rounded[kTileRows * kScores];
  alignas(64) uint32_t seen[8 * kMostDepth];
  int begin = kChunk, end = 0;
  for (int r = 0; r < rows; r++) begin = std::min(begin, t.first[r] - chunk.begin), end = std::max(end, t.end[r] - chunk.begin);
  begin = std::max(begin, 0), end = std::min(end, chunk.size);
  if (begin >= end) return;
  tiles.set(rows, shapes);
  const int low = begin / 16 * 16, high = (end + 15) / 16 * 16;
  const int queries = s.depth * 2, values = s.depth * 4;  // bytes of a row
  auto keys = [&](int slot) { return chunk.keys[slot / s.page_size] + int64_t{slot % s.page_size} * s.depth; };
  for (int slot = low; slot < high; slot += 32) {
    const bf16 *k = keys(slot), *k2 = keys(std::min(slot + 16, high - 16));
    if (fetch) for (const bf16* p : {k, k2}) {  // the hardware stops at each 4 KB
      const char *value = (const char*)(p + s.half()), *ahead = (const char*)(keys(slot + 32) + (p - k));
      for (int line = 0; line < s.depth * 32; line += 64) __builtin_prefetch(value + line), __builtin_prefetch(ahead + line);
    }
    _tile_zero(0); _tile_zero(1);
    for (int d = 0; d < s.depth; d += 32) {
      _tile_loadd(4, t.qw + d / 2, queries);
      _tile_loadd(6, k + d * 16, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(6, k2 + d * 16, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    _tile_stored(0, scores + slot, kScores * 4);
    if (slot + 16 < high) _tile_stored(1, scores + slot + 16, kScores * 4);
  }
  float rescale[kTileRows];
  soften<true>(rows, o, scale, t, chunk.begin, chunk.size, low, high, scores, rounded, rescale);
  for (int r = 0; r < rows; r++) for (int d = 0; d < s.depth; d += 16) store(t.out + r * s.depth + d, load<F16>(t.out + r * s.depth + d) * rescale[r]);
  for (int column = 0; column < s.depth; column += 64) {
    const int count = std::min(4, (s.depth - column) / 16);
    float* out = t.out + column;
    _tile_loadd(0, out, values);
    if (count > 1) _tile_loadd(1, out + 16, values);
    if (count > 2) _tile_loadd(2, out + 32, values);
    if (count > 3) _tile_loadd(3, out + 48, values);
    for (int slot = low; slot < high; slot += 16) {
      const uint32_t* v = (const uint32_t*)(keys(slot) + s.half()) + column;
      if (slot < begin || slot + 16 > end) v = clean(s, v, 16 * count, begin - slot, end - slot, seen);
      _tile_loadd(5, rounded + slot, kScores * 2);
      _tile_loadd(7, v, values);
      _tile_dpbf16ps(0, 5, 7);
      if (count > 1) { _tile_loadd(7, v + 16, values); _tile_dpbf16ps(1, 5, 7); }
      if (count > 2) { _tile_loadd(7, v + 32, values); _tile_dpbf16ps(2, 5, 7); }
      if (count > 3) { _tile_loadd(7, v + 48, values); _tile_dpbf16ps(3, 5, 7); }
    }
    _tile_stored(0, out, values);
    if (count > 1) _tile_stored(1, out + 16, values);
    if (count > 2) _tile_stored(2, out + 32, values);
    if (count > 3) _tile_stored(3, out + 48, values);
  }
}
#endif

template <class E, int N, bool Dot>
void steps(int rows, bool fetch, const Shape& s, const Options& o, float scale, const Tile& t, const Chunk<E>& chunk) {
  switch (rows) {
    case 1: return step<E, N, 1, Dot>(fetch, s, o, scale, t, chunk);
    case 2: return step<E, N, 2, Dot>(fetch, s, o, scale, t, chunk);
    case 3: return step<E, N, 3, Dot>(fetch, s, o, scale, t, chunk);
    case kFewRows: return step<E, N, kFewRows, Dot>(fetch, s, o, scale, t, chunk);
    default: return step<E, N, kRows, Dot>(fetch, s, o, scale, t, chunk);
  }
}

// As `step`, for as many queries as `tile_rows` says.
template <class E>
void attend_tile(int rows, bool fetch, bool dot, const Shape& s, const Options& o, float scale, const Tile& t, const Chunk<E>& chunk) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, bf16>) if (dot) return steps<E, 16, true>(rows, fetch, s, o, scale, t, chunk);
#endif
  if (s.lanes == 16) return steps<E, 16, false>(rows, fetch, s, o, scale, t, chunk);
  s.lanes == 8 ? step<E, 8, 1, false>(false, s, o, scale, t, chunk) : step<E, 1, 1, false>(false, s, o, scale, t, chunk);
}

}  // namespace
