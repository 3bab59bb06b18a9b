// Products of rows with a packed weight, for XLA on CPU.
//
// A weight [in, out] is packed as [panels, depth, 32] words of four bytes: a panel has 32 columns, and a word is a
// float32, or a pair of bfloat16 of two neighbouring inputs, the even one in the low half. This is what the tiles of
// AMX and the bf16 dot instruction of AVX-512 take, and two shifts elsewhere. Depth and columns are padded with zeros.
//
// A panel of a gated weight has 16 columns of the gate and then the 16 that it is for.
//
// What comes before a product in a model, a norm of the rows, and after it, the residual, is done with it: XLA would
// take 4 passes over memory for them, and as many calls.
//
// Every element is summed over the inputs in one order, whatever the number of rows and threads: a row's result is the
// same to the last bit in any company. The blocking is that of https://dl.acm.org/doi/10.1145/1356052.1356053.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include "amx.h"
#include "parallel.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace jaxllm;

constexpr int kPanel = 32;  // columns of a panel: two tiles of AMX, two vectors of AVX-512
constexpr int kTile = 16;   // words that the depth is padded to: a tile of AMX
constexpr int kBlock = 32;  // rows of two tiles of AMX: the most that are summed at once

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 2, kRows = 12;  // 24 of 32 registers are sums
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors = 2, kRows = 4;
#else
constexpr int kLanes = 4, kVectors = 4, kRows = 4;
#endif

using Row = Floats<kLanes>;
using Word = Words<kLanes>;

template <class E> constexpr int kPack = 4 / sizeof(E);  // inputs of a word

// sum += the word's inputs times a row's.
inline void multiply(float*, Row& sum, Word w, uint32_t x) { sum += (Row)w * (Row)(Word{} + x); }
inline void multiply(bf16*, Row& sum, Word w, uint32_t x) {
#if defined(__AVX512BF16__)
  sum = (Row)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
#else
  sum += (Row)(w << 16) * (Row)(Word{} + (x << 16));
  sum += (Row)(w & 0xffff0000u) * (Row)(Word{} + (x & 0xffff0000u));
#endif
}

// Weights to be fetched while others are multiplied: the hardware stops at each 4 KB.
struct Fetch {
  const char* from;
  int bytes;  // for each word of depth
  void operator()(int word) const {
    const char* line = from + int64_t{word} * bytes;
    __builtin_prefetch(line, 0, 2);
    if (bytes > 64) __builtin_prefetch(line + 64, 0, 2);
  }
};

// sums[r][...] = x[r][...] times a panel, for R rows; kVectors vectors of columns at a time.
template <class E, int R> void multiply_rows(const uint32_t* const* x, const uint32_t* panel, int depth, const Fetch& fetch, float* sums) {
  for (int column = 0; column < kPanel; column += kLanes * kVectors) {
    Row sum[R][kVectors] = {};
    const uint32_t* w = panel + column;
    for (int i = 0; i < depth; i++, w += kPanel) {
      if (column == 0) fetch(i);
      Word word[kVectors];
      for (int v = 0; v < kVectors; v++) word[v] = load<Word>(w + v * kLanes);
      for (int r = 0; r < R; r++) for (int v = 0; v < kVectors; v++) multiply((E*)nullptr, sum[r][v], word[v], x[r][i]);
    }
    for (int r = 0; r < R; r++) for (int v = 0; v < kVectors; v++) store(sums + r * kPanel + column + v * kLanes, sum[r][v]);
  }
}

template <class E, int R = kRows> void multiply_rows(int rows, const uint32_t* const* x, const uint32_t* panel, int depth, const Fetch& fetch, float* sums) {
  if constexpr (R > 0) {
    if (rows == R) multiply_rows<E, R>(x, panel, depth, fetch, sums);
    else multiply_rows<E, R - 1>(rows, x, panel, depth, fetch, sums);
  }
}

#if JAXLLM_AMX
// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights.
Tiles::Shapes shapes(int rows) {
  const int first = std::min(16, rows), second = std::max(1, rows - 16);
  const int of[8] = {first, first, second, second, first, second, 16, 16};
  Tiles::Shapes result;
  for (int i = 0; i < 8; i++) result.set(i, of[i], 64);
  return result;
}

// As `multiply_rows` of bfloat16, for up to 32 rows.
void multiply_tiles(Tiles& tiles, int rows, const uint32_t* x, const uint32_t* panel, int depth, const Fetch& fetch, float* sums) {
  constexpr int kLine = kPanel * 4;
  const int64_t stride = int64_t{depth} * 4;
  const uint32_t* x2 = x + 16 * depth;
  float* sums2 = sums + 16 * kPanel;
  const bool both = rows > 16;
  tiles.set(rows, shapes);
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int i = 0; i < depth; i += kTile) {
    const uint32_t* w = panel + i * kPanel;
    for (int j = 0; j < kTile; j++) fetch(i + j);
    _tile_loadd(6, w, kLine);
    _tile_loadd(7, w + 16, kLine);
    _tile_loadd(4, x + i, stride);
    if (both) _tile_loadd(5, x2 + i, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (both) { _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7); }
  }
  _tile_stored(0, sums, kLine); _tile_stored(1, sums + 16, kLine);
  if (both) { _tile_stored(2, sums2, kLine); _tile_stored(3, sums2 + 16, kLine); }
}
#endif

enum Gate : int64_t { kNone, kSilu, kGeluTanh };

struct Product {
  const uint32_t *x, *weight;  // [rows, depth], [panels, depth, 32]
  int rows, depth, columns;    // of the result
  Gate gate;                   // of panels whose first half is the gate of the second
  int width() const { return gate == kNone ? kPanel : kPanel / 2; }  // columns of the result that a panel makes
  int panels() const { return (columns + width() - 1) / width(); }
};

// Writes the sums of a panel, `columns` of each row, with the residual added to them if there is one.
template <class Out> void write(const float* sums, int rows, int columns, Gate gate, const Out* residual, int64_t stride, Out* out) {
  for (int r = 0; r < rows; r++, sums += kPanel, out += stride) {
    F16 x[2] = {load<F16>(sums), load<F16>(sums + 16)};
    if (gate != kNone) x[0] = x[1] * (gate == kSilu ? silu(x[0]) : gelu_tanh(x[0]));
    Out part[kPanel] = {};
    Out* to = columns % 16 ? part : out;
    if (residual) {
      const Out* from = residual + r * stride;
      if (to == part) from = (const Out*)std::memcpy(part, from, columns * sizeof(Out));
      x[0] += get(from);
      if (columns > 16) x[1] += get(from + 16);
    }
    put(to, x[0]);
    if (columns > 16) put(to + 16, x[1]);
    if (to == part) std::memcpy(out, part, columns * sizeof(Out));
  }
}

// An RMSNorm of rows, https://arxiv.org/abs/1910.07467: x / sqrt(mean(x^2) + epsilon) * (offset + weight).
struct Norm {
  const void* weight;  // of the rows' type; null: rows are taken as they are
  float epsilon, offset;
};

// A row as the product reads it: normalized, and padded with zeros to `size`, a multiple of 16.
template <class E> void prepare(const E* x, int inputs, int size, const Norm& norm, E* out) {
  const int rest = inputs % 16, last = inputs - rest;
  if (!norm.weight) {
    std::memcpy((char*)out, x, inputs * sizeof(E));
    return void(std::memset((char*)(out + inputs), 0, (size - inputs) * sizeof(E)));
  }
  const E* weight = (const E*)norm.weight;
  F16 squares = {};
  for (int i = 0; i < last; i += 16) { const F16 y = get(x + i); squares += y * y; }
  const F16 end = get_some(x + last, rest);
  const float scale = 1.f / std::sqrt(total(squares + end * end) / inputs + norm.epsilon);
  auto normalized = [&](F16 y, F16 w) { return y * scale * (norm.offset + w); };
  for (int i = 0; i < last; i += 16) put(out + i, normalized(get(x + i), get(weight + i)));
  std::memset((char*)(out + last), 0, (size - last) * sizeof(E));
  if (rest) put(out + last, normalized(end, get_some(weight + last, rest)));
}

// The rows [first, end) times one panel; the one that comes after it is fetched.
template <class E, class Out> void multiply_panel(const Product& p, int panel, int following, int first, int end, const Out* residual, Out* out, Tiles& tiles) {
  const uint32_t* weight = p.weight + int64_t{panel} * p.depth * kPanel;
  const bool amx = kPack<E> == 2 && has_amx();
  const int most = amx ? kBlock : kRows;
  const int blocks = (end - first + most - 1) / most;
  const int part = (kPanel * 4 + blocks - 1) / blocks;  // bytes of each word of depth that a block fetches: all of the panel in the end
  const char* next = (const char*)(p.weight + int64_t{following} * p.depth * kPanel);
  alignas(64) float sums[kBlock * kPanel];
  for (int block = 0, row = first; block < blocks; block++) {
    const Fetch fetch{next + int64_t{block} * part * p.depth, part};
    const int rows = amx ? std::min(most, end - row) : (end - row) / (blocks - block);
    const uint32_t* x = p.x + int64_t{row} * p.depth;
    if (amx) {
#if JAXLLM_AMX
      multiply_tiles(tiles, rows, x, weight, p.depth, fetch, sums);
#endif
    } else {
      const uint32_t* each[kRows];
      for (int r = 0; r < rows; r++) each[r] = x + int64_t{r} * p.depth;
      multiply_rows<E>(rows, each, weight, p.depth, fetch, sums);
    }
    const int64_t at = int64_t{row} * p.columns + panel * p.width();
    write(sums, rows, std::min(p.width(), p.columns - panel * p.width()), p.gate, residual ? residual + at : nullptr, p.columns, out + at);
    row += rows;
  }
}

// Which weight came after which the last time: a model's products come in the same order in every step.
class Order {
 public:
  // Notes the weight, and tells threads that will be waiting which one comes next.
  void came(const void* weight, int64_t bytes) {
    Entry& before = entry(last_.exchange(weight));
    before.next.store(weight), before.bytes.store(bytes);
    const Entry& here = entry(weight);
    if (const void* next = here.next.load()) lobby.expect((const char*)next, here.bytes.load());
  }

 private:
  struct Entry { std::atomic<const void*> next{nullptr}; std::atomic<int64_t> bytes{0}; };
  Entry entries_[1024];
  std::atomic<const void*> last_{nullptr};
  Entry& entry(const void* weight) { return entries_[(uintptr_t(weight) >> 12) * 0x9E3779B1u >> 7 & 1023]; }
};
Order order;

template <class E, class Out, class Pool> void multiply_all(const Product& p, const Out* residual, Out* out, Pool& pool) {
  const int threads = std::max<int>(1, pool.num_threads());
  // below some 20 us of work another thread costs more than it saves
  const int64_t words = int64_t{p.panels()} * kPanel * p.depth;
  const bool small = words < 1 << 16 && words * p.rows < 1 << 20;
  const int parts = std::max(1, std::min(p.rows / kBlock, threads * 4 / p.panels()));
  // neighbouring panels go to one task, so that what is fetched ahead is used
  const int together = std::max(1, p.panels() * parts / (threads * 8)), groups = (p.panels() + together - 1) / together;
  order.came(p.weight, words * 4);
  parallel_for(pool, groups * parts, small ? 1 : threads, [&](int task, int way) {
    const int part = task % parts, begin = task / parts * together, stop = std::min(begin + together, p.panels());
    const int first = int64_t{p.rows} * part / parts, end = int64_t{p.rows} * (part + 1) / parts;
    Tiles tiles;
    for (int panel = way > 0 ? begin : stop - 1; begin <= panel && panel < stop; panel += way) {
      const int following = std::clamp(panel + way, 0, p.panels() - 1);
      multiply_panel<E>(p, panel, following, first, end, residual, out, tiles);
    }
  });
}

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("packed_matmul: " + what); }

// `prepared` has room for the rows where they are not read as they are.
template <class E, class Out, class Pool> void run(Pool& pool, const void* x, int inputs, uint32_t* prepared, Product p, const Norm& norm, const void* residual, void* out) {
  const int size = p.depth * kPack<E>, tasks = (p.rows + kBlock - 1) / kBlock;
  if (prepared) parallel_for(pool, tasks, tasks < 4 ? 1 : std::max<int>(1, pool.num_threads()), [&](int task, int) {
    for (int64_t row = int64_t{task} * kBlock; row < std::min<int64_t>(p.rows, (task + 1) * kBlock); row++)
      prepare((const E*)x + row * inputs, inputs, size, norm, (E*)prepared + row * size);
  });
  p.x = prepared ? prepared : (const uint32_t*)x;
  multiply_all<E>(p, (const Out*)residual, (Out*)out, pool);
}

ffi::Error call(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weight, ffi::AnyBuffer norm_weight, ffi::AnyBuffer residual, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::Buffer<ffi::U32>> prepared, int64_t gate, float epsilon, float offset) {
  const auto xs = x.dimensions(), ws = weight.dimensions(), os = out->dimensions();
  const bool halves = x.element_type() == ffi::BF16;
  if (xs.size() != 2 || ws.size() != 3 || os.size() != 2 || os[0] != xs[0]) return invalid("x is to be [rows, in], the weight [panels, depth, 32], the result [rows, out]");
  const int64_t depth = ws[1], bytes = xs[1] * (halves ? 2 : 4);
  if (gate < kNone || gate > kGeluTanh) return invalid("there is no gate " + std::to_string(gate));
  const int width = gate == kNone ? kPanel : kPanel / 2;
  if (ws[2] != kPanel || ws[0] != (os[1] + width - 1) / width || depth % kTile || depth != (bytes + 63) / 64 * kTile)
    return invalid("a weight [" + std::to_string(ws[0]) + ", " + std::to_string(depth) + ", " + std::to_string(ws[2]) + "] does not go with " + std::to_string(xs[1]) + " inputs and " + std::to_string(os[1]) + " outputs");
  if (weight.element_type() != (halves ? ffi::U32 : ffi::F32)) return invalid("rows of bfloat16 go with words of uint32, rows of float32 with float32");
  const int64_t normed = norm_weight.element_count(), added = residual.element_count();
  if (normed && (normed != xs[1] || norm_weight.element_type() != x.element_type())) return invalid("the norm's weight is to have an element of the rows' type for each of " + std::to_string(xs[1]) + " inputs");
  if (added && (added != os[0] * os[1] || residual.element_type() != out->element_type())) return invalid("the residual is to be like the result");
  const bool as_they_are = !normed && bytes == depth * 4;
  if (!as_they_are && int64_t(prepared->element_count()) != xs[0] * depth) return invalid("there is no room for rows of " + std::to_string(depth) + " words");
  const Product p{nullptr, (const uint32_t*)weight.untyped_data(), int(xs[0]), int(depth), int(os[1]), Gate(gate)};
  const Norm norm{normed ? norm_weight.untyped_data() : nullptr, epsilon, offset};
  auto with = [&](auto* row, auto* result) {
    using E = std::remove_pointer_t<decltype(row)>;
    using Out = std::remove_pointer_t<decltype(result)>;
    run<E, Out>(pool, x.untyped_data(), int(xs[1]), as_they_are ? nullptr : prepared->typed_data(), p, norm, added ? residual.untyped_data() : nullptr, out->untyped_data());
  };
  if (halves && out->element_type() == ffi::BF16) with((bf16*)nullptr, (bf16*)nullptr);
  else if (halves && out->element_type() == ffi::F32) with((bf16*)nullptr, (float*)nullptr);
  else if (x.element_type() == ffi::F32 && out->element_type() == ffi::F32) with((float*)nullptr, (float*)nullptr);
  else return invalid("rows and result are to be float32 both, or the rows bfloat16 and the result either");
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    PackedMatmul, call,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::U32>>()
        .Attr<int64_t>("gate").Attr<float>("epsilon").Attr<float>("offset"));
