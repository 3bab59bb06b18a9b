// Ragged paged attention for XLA on CPU: writes a step's keys and values into the pages and attends over them.
//
// A pool is [kv_heads, pages, 2, page_size * depth], depth being head_dim rounded up to 16: first a page's keys,
// then its values. Keys lie in groups of `lanes` slots (16, or 8 for pages of 8, else 1), depth-major within a group,
// so that a vector of scores needs no sums across lanes. bfloat16 is kept in pairs that fill 32-bit words, of
// depths in keys and of slots in values: what the bf16 dot instructions of AVX-512 take, and two shifts elsewhere.
//
// The online softmax is https://arxiv.org/abs/1805.02867; merging of partial ones is
// https://arxiv.org/abs/2311.01282.
#include <string>
#include <vector>
#include "cpu_chunk.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace jaxllm;

constexpr int kQueryRows = 96;     // queries that share the reading of keys: 24 tiles of 4, or 6 of AMX
constexpr int kSegment = 1024;     // keys that have a softmax of their own: the least that is worth a task

// Queries, keys or values of the step: [tokens, heads, head_dim] in float32 or bfloat16.
struct Vectors {
  const void* data;
  bool is_bf16;
  int heads, dim;
  int64_t place(int64_t token, int head) const { return (token * heads + head) * dim; }
  float at(int64_t token, int head, int i) const {
    return is_bf16 ? to_float(((const bf16*)data)[place(token, head) + i]) : ((const float*)data)[place(token, head) + i];
  }
};

// Pairs of neighbouring numbers, `stride` words from one to the next; the last may be half full.
inline void copy_pairs(const bf16* from, int count, int stride, uint32_t* to) {
  for (int i = 0; i + 1 < count; i += 2, to += stride) std::memcpy(to, from + i, 4);
  if (count % 2) std::memcpy(to, from + count - 1, 2);
}

template <class E> inline E stored(float x, float scale) {
  if constexpr (std::is_same_v<E, bf16>) return to_bf16(x);
  else if constexpr (std::is_same_v<E, int8_t>) return x != x ? 0 : int8_t(std::nearbyint(std::clamp(x / scale, -127.f, 127.f)));
  else if constexpr (std::is_same_v<E, f8>) return to_f8(x / scale);
  else return x;
}

// Rows of the step, and the pages that hold their keys.
struct Batch {
  const int32_t *start, *kv_lens, *table;
  int rows, columns;
  int count(int row) const { return start[row + 1] - start[row]; }
  const int32_t* pages(int row) const { return table + int64_t{row} * columns; }
};

// A block of a row's queries over a part of its keys, for one kv head.
struct Task {
  int row, token, count, begin, end;
  int64_t partial;  // where its half-way softmax goes; -1: it has all keys, and writes the output
};

template <class E> class Step {
 public:
  Step(const Shape& shape, const Options& options, const Batch& batch, const Vectors& q, const Vectors& k, const Vectors& v, E* pages, void* out)
      : s(shape), o(options), b(batch), q(q), k(k), v(v), pages(pages), out(out) {}

  template <class Pool> void run(Pool& pool) {
    bool chunks = false;
    int64_t work = 0;
    for (int row = 0; row < b.rows; row++) chunks |= b.count(row) > 1, work += int64_t{b.count(row)} * visible(row);
    // below some 20 us of work another thread costs more than it saves
    const int threads = work * s.heads < 4096 ? 1 : std::max<int>(1, pool.num_threads());
    plan(threads);
    if (chunks)  // all is written before anything reads it; a lone token is written by the task that reads it
      parallel_for(pool, tasks.size(), threads, [this](int i, int) { if (is_last(tasks[i])) for (int g = 0; g < s.kv_heads; g++) write(tasks[i], g); });
    parallel_for(pool, tasks.size() * s.kv_heads, threads, [this, chunks](int i, int) {
      const Task& task = tasks[i / s.kv_heads];
      if (!chunks && is_last(task)) write(task, i % s.kv_heads);
      attend(task, i % s.kv_heads);
    });
    for (size_t i = 0; i < tasks.size(); i++) if (tasks[i].partial >= 0 && tasks[i].begin == first_key(tasks[i])) merge(i);
  }

 private:
  Shape s; Options o; Batch b; Vectors q, k, v;
  E* pages; void* out;
  std::vector<Task> tasks;
  std::vector<float> partials;

  int position(int row, int token) const { return b.kv_lens[row] - b.count(row) + token; }
  int first_seen(int position) const { return o.window > 0 ? int(std::max<int64_t>(0, position - o.window + 1)) : 0; }
  int first_key(const Task& t) const { return first_seen(position(t.row, t.token)) / kChunk * kChunk; }
  int end_key(const Task& t) const { return position(t.row, t.token + t.count - 1) + 1; }
  int visible(int row) const { return b.kv_lens[row] - first_seen(position(row, 0)); }
  static int end_of_segment(int key) { return key / kSegment * kSegment + kSegment; }
  bool is_last(const Task& t) const { return t.end == end_key(t); }
  int64_t partial_size(const Task& t) const { return int64_t{t.count} * s.group * (s.depth + 2); }
  E* page(int32_t id, int head) const { return pages + (head * s.num_pages + id) * 2 * s.half(); }

  // Cuts rows into blocks of queries, and contexts into their segments where there are too few tasks to share.
  // Either way each segment has a softmax of its own and they are added up in order, so that a token's result is
  // the same to the last bit, whatever else is in the step and however many threads there are.
  void plan(int threads) {
    const int block = std::max(1, kQueryRows / s.group);
    int64_t units = 0;
    for (int row = 0; row < b.rows; row++) units += (b.count(row) + block - 1) / block;
    units *= s.kv_heads;
    int64_t used = 0;
    for (int row = 0; row < b.rows; row++) for (int token = 0; token < b.count(row); token += block) {
      Task t{row, token, std::min(block, b.count(row) - token), 0, 0, -1};
      const int end = t.end = end_key(t);
      t.begin = first_key(t);
      if (threads == 1 || units >= 4 * threads || end_of_segment(t.begin) >= end) {
        tasks.push_back(t);
        continue;
      }
      for (; t.begin < end; t.begin = t.end) {
        t.end = std::min(end, end_of_segment(t.begin));
        t.partial = used, used += partial_size(t) * s.kv_heads;
        tasks.push_back(t);
      }
    }
    partials.resize(used);
  }

  void write(const Task& t, int g) const {
    const float k_scale = o.k_scale ? o.k_scale[g] : 1.f, v_scale = o.v_scale ? o.v_scale[g] : 1.f;
    for (int i = t.token; i < t.token + t.count; i++) {
      const int at = position(t.row, i), slot = at % s.page_size, n = s.lanes, p = kPack<E>, vp = s.paired() ? p : 1;
      E* keys = page(b.pages(t.row)[at / s.page_size], g);
      E* values = keys + s.half() + int64_t{slot / vp} * s.depth * vp + slot % vp;
      keys += int64_t{slot / n} * s.depth * n + slot % n * p;
      const int64_t token = b.start[t.row] + i;
      if constexpr (std::is_same_v<E, bf16>) if (k.is_bf16 && s.head_dim % 2 == 0) {  // as they are, in pairs
        const bf16 *key = (const bf16*)k.data + k.place(token, g), *value = (const bf16*)v.data + v.place(token, g);
        for (int d = 0; d < s.depth; d += 2) std::memcpy(keys + int64_t{d} * n, d < s.head_dim ? key + d : kZeros, 4);
        for (int d = 0; d < s.depth; d++) values[int64_t{d} * vp] = d < s.head_dim ? value[d] : kZeros[0];
        continue;
      }
      for (int d = 0; d < s.depth; d++) {
        const bool inside = d < s.head_dim;
        keys[int64_t{d / p} * n * p + d % p] = stored<E>(inside ? k.at(token, g, d) : 0.f, k_scale);
        values[int64_t{d} * vp] = stored<E>(inside ? v.at(token, g, d) : 0.f, v_scale);
      }
    }
  }

  void attend(const Task& t, int g) {
    const int rows = t.count * s.group;
    const bool dot = kHasDot && q.is_bf16 && kPack<E> == 2 && s.lanes == 16;
    std::vector<float> qs(dot ? 0 : int64_t{rows} * s.depth), sums(partial_size(t)), more;
    std::vector<uint32_t> words(dot ? int64_t{rows} * s.depth / 2 : 0);
    const bool tiled = dot && fits_tiles(s);
    for (int r = 0, count; r < rows; r += count) {
      count = tile_rows(s, tiled, rows - r);
      for (int i = r; i < r + count; i++) {
        const int64_t token = b.start[t.row] + t.token + i / s.group;
        const int head = g * s.group + i % s.group;
        if (tiled) std::memcpy(words.data() + int64_t{i} * s.depth / 2, (const bf16*)q.data + q.place(token, head), s.head_dim * 2);
        else if (dot) copy_pairs((const bf16*)q.data + q.place(token, head), s.head_dim, count, words.data() + int64_t{r} * s.depth / 2 + i - r);
        else for (int d = 0; d < s.head_dim; d++) qs[int64_t{r} * s.depth + d * count + i - r] = q.at(token, head, d);
      }
    }
    for (int begin = t.begin; begin < t.end; begin = end_of_segment(begin)) {
      std::vector<float>& segment = begin == t.begin ? sums : more;
      segment.assign(partial_size(t), 0.f);
      attend_segment(t, g, begin, std::min(t.end, end_of_segment(begin)), qs, words, segment.data());
      if (begin != t.begin) add(rows, sums.data(), more.data());
    }
    if (t.partial < 0) return finish(t, g, sums.data());
    std::memcpy(partials.data() + t.partial + g * partial_size(t), sums.data(), partial_size(t) * sizeof(float));
  }

  // The softmax of the keys [from, to): weighted sums of values, then the greatest scores, then the sums of weights.
  void attend_segment(const Task& t, int g, int from, int to, const std::vector<float>& qs, const std::vector<uint32_t>& words, float* sums) const {
    const int rows = t.count * s.group;
    float *top = sums + rows * s.depth, *total = top + rows;
    std::fill(top, total, kMasked);
    std::vector<int> seen(2 * rows);
    int *first = seen.data(), *end = first + rows;
    for (int r = 0; r < rows; r++) {
      const int at = position(t.row, t.token + r / s.group);
      first[r] = std::max(from, first_seen(at)), end[r] = std::min(to, at + 1);
    }
    const float scale = o.scale * (o.k_scale ? o.k_scale[g] : 1.f);
    const bool tiled = !words.empty() && fits_tiles(s);
    [[maybe_unused]] Tiles tiles;
    const int lowest = first_seen(position(t.row, t.token)) / s.page_size, last = (to - 1) / s.page_size;
    for (int begin = from; begin < to; begin += kChunk) {
      Chunk<E> chunk;
      chunk.begin = begin, chunk.size = std::min(kChunk, to - begin);
      for (int i = 0; i < kChunk / s.page_size + kAhead; i++) chunk.keys[i] = page(b.pages(t.row)[std::clamp(begin / s.page_size + i, lowest, last)], g);
      for (int r = 0, count; r < rows; r += count) {
        count = tile_rows(s, tiled, rows - r);
        const Tile tile{qs.empty() ? nullptr : qs.data() + r * s.depth, words.empty() ? nullptr : words.data() + r * s.depth / 2, sums + r * s.depth, top + r, total + r, first + r, end + r};
#if JAXLLM_AMX
        if constexpr (std::is_same_v<E, bf16>) if (tiled) {
          step_tiles(tiles, count, r == 0, s, o, scale, tile, chunk);
          continue;
        }
#endif
        attend_tile<E>(count, r == 0, !words.empty(), s, o, scale, tile, chunk);
      }
    }
  }

  // Adds another segment's softmax to one.
  void add(int rows, float* sums, const float* others) const {
    float *top = sums + rows * s.depth, *total = top + rows;
    const float *other_top = others + rows * s.depth, *other_total = other_top + rows;
    for (int r = 0; r < rows; r++) {
      const float most = std::max(top[r], other_top[r]), a = std::exp2(top[r] - most), c = std::exp2(other_top[r] - most);
      for (int d = 0; d < s.depth; d++) sums[r * s.depth + d] = sums[r * s.depth + d] * a + others[r * s.depth + d] * c;
      total[r] = total[r] * a + other_total[r] * c, top[r] = most;
    }
  }

  // Adds up the segments of a block, of which this task has the first.
  void merge(size_t first) {
    const Task& t = tasks[first];
    for (int g = 0; g < s.kv_heads; g++) {
      auto part = [&](size_t i) { return partials.data() + tasks[i].partial + g * partial_size(t); };
      for (size_t i = first + 1; i < tasks.size() && tasks[i].row == t.row && tasks[i].token == t.token; i++) add(t.count * s.group, part(first), part(i));
      finish(t, g, part(first));
    }
  }

  // Writes a block's output. A sink takes part in the softmax and has no value.
  void finish(const Task& t, int g, const float* sums) const {
    const int rows = t.count * s.group;
    const float *top = sums + rows * s.depth, *total = top + rows, v_scale = o.v_scale ? o.v_scale[g] : 1.f;
    for (int r = 0; r < rows; r++) {
      const int head = g * s.group + r % s.group;
      const int64_t place = (int64_t{b.start[t.row] + t.token + r / s.group} * s.heads + head) * s.head_dim;
      const float sink = o.sinks ? o.sinks[head] * kLog2e : kMasked, most = std::max(top[r], sink), rescale = std::exp2(top[r] - most);
      const float factor = v_scale * rescale / (total[r] * rescale + (o.sinks ? std::exp2(sink - most) : 0.f));
      const float* sum = sums + r * s.depth;
      auto write_to = [&](auto* to) {
        int d = 0;
        for (; d + 16 <= s.head_dim; d += 16) put(to + d, load<F16>(sum + d) * factor);
        put_some(to + d, load<F16>(sum + std::min(d, s.depth - 16)) * factor, s.head_dim - d);
      };
      q.is_bf16 ? write_to((bf16*)out + place) : write_to((float*)out + place);
    }
  }
};

ffi::Error invalid(const std::string& what) { return ffi::Error::InvalidArgument("paged_attention: " + what); }

// Whether the metadata stays within the arrays; nothing has been touched yet.
ffi::Error check(const Batch& b, const Shape& s, int64_t tokens, int64_t window) {
  if (b.start[0] != 0) return invalid("query_start[0] is " + std::to_string(b.start[0]) + ", not 0");
  for (int row = 0; row < b.rows; row++) {
    const std::string where = "[" + std::to_string(row) + "]";
    const int64_t count = int64_t{b.start[row + 1]} - b.start[row], kv_len = b.kv_lens[row];
    if (count < 0 || b.start[row + 1] > tokens) return invalid("query_start" + where + " to the next is " + std::to_string(b.start[row]) + " to " + std::to_string(b.start[row + 1]) + " of " + std::to_string(tokens) + " tokens");
    if (count == 0) continue;
    if (kv_len < count) return invalid("kv_lens" + where + " is " + std::to_string(kv_len) + ", less than the row's " + std::to_string(count) + " new tokens");
    if (kv_len > int64_t{b.columns} * s.page_size) return invalid("kv_lens" + where + " is " + std::to_string(kv_len) + ", and its page table holds " + std::to_string(int64_t{b.columns} * s.page_size));
    const int64_t first = window > 0 ? std::max<int64_t>(0, kv_len - count - window + 1) : 0;
    for (int64_t i = first / s.page_size; i * s.page_size < kv_len; i++) {
      const int32_t id = b.pages(row)[i];
      if (id < 0 || id >= s.num_pages) return invalid("page_table[" + std::to_string(row) + ", " + std::to_string(i) + "] is " + std::to_string(id) + " of " + std::to_string(s.num_pages) + " pages");
    }
  }
  return ffi::Error::Success();
}

using S32 = ffi::Buffer<ffi::S32>;
using F32 = ffi::Buffer<ffi::F32>;

ffi::Error attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer pages, S32 start, S32 kv_lens, S32 table, S32 num_rows, F32 sinks, F32 k_scale, F32 v_scale, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> pages_out, float scale, float soft_cap, int64_t window, int64_t page_size) {
  if (pages.untyped_data() != pages_out->untyped_data()) return invalid("the pages are not updated in place");
  auto optional = [](F32& x) { return x.element_count() ? x.typed_data() : nullptr; };
  auto vectors = [](ffi::AnyBuffer& x) { return Vectors{x.untyped_data(), x.element_type() == ffi::BF16, int(x.dimensions()[1]), int(x.dimensions()[2])}; };
  Shape s;
  s.heads = q.dimensions()[1], s.kv_heads = k.dimensions()[1], s.head_dim = q.dimensions()[2], s.depth = (s.head_dim + 15) / 16 * 16;
  s.page_size = page_size, s.lanes = page_size % 16 == 0 ? 16 : page_size % 8 == 0 ? 8 : 1;
  s.group = s.heads / s.kv_heads, s.num_pages = pages.dimensions()[1];
  const Options o{scale, soft_cap, window, optional(sinks), optional(k_scale), optional(v_scale)};
  const int rows = num_rows.typed_data()[1];
  const int64_t tokens = q.dimensions()[0];
  if (rows < 0 || rows > kv_lens.dimensions()[0]) return invalid("num_rows[1] is " + std::to_string(rows) + " of " + std::to_string(kv_lens.dimensions()[0]) + " rows");
  const Batch b{start.typed_data(), kv_lens.typed_data(), table.typed_data(), rows, int(table.dimensions()[1])};
  if (ffi::Error error = check(b, s, tokens, window); error.failure()) return error;
  const size_t token_bytes = size_t(s.heads) * s.head_dim * (q.element_type() == ffi::BF16 ? 2 : 4);
  const int64_t used = rows ? b.start[rows] : 0;
  std::memset((char*)out->untyped_data() + used * token_bytes, 0, (tokens - used) * token_bytes);
  auto run = [&](auto* p) { Step(s, o, b, vectors(q), vectors(k), vectors(v), p, out->untyped_data()).run(pool); };
  switch (pages.element_type()) {
    case ffi::U16: run((bf16*)pages.untyped_data()); break;
    case ffi::F32: run((float*)pages.untyped_data()); break;
    case ffi::S8: run((int8_t*)pages.untyped_data()); break;
    case ffi::U8: run((f8*)pages.untyped_data()); break;
    default: return invalid("pages of this dtype are not served");
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    PagedAttention, attend,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
        .Arg<S32>().Arg<S32>().Arg<S32>().Arg<S32>()
        .Arg<F32>().Arg<F32>().Arg<F32>()
        .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
        .Attr<float>("scale").Attr<float>("soft_cap").Attr<int64_t>("window").Attr<int64_t>("page_size"));
