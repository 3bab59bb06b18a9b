// The tile registers of AMX: eight, each of up to 16 rows of 64 bytes.
// https://www.intel.com/content/www/us/en/docs/intrinsics-guide/index.html#techs=AMXFAMILY
#pragma once
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define JAXLLM_AMX 1
#include <cstdint>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace jaxllm {

// Whether the kernel gives the registers to this process, which has to ask for them.
inline bool has_amx() {
  static const bool given = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return given;
}

// The tiles' shapes on this thread, as long as the object lives.
class Tiles {
 public:
  struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    void set(int tile, int tile_rows, int tile_bytes) { rows[tile] = uint8_t(tile_rows), bytes[tile] = uint16_t(tile_bytes); }
  };
  // The shapes that `make(key)` gives, made only where the key is another than before: to build them while the
  // stores of earlier tiles are on their way took a third of a product's time.
  template <class F> void set(int key, F make) {
    if (key == key_) return;
    key_ = key;
    const Shapes shapes = make(key);
    _tile_loadconfig(&shapes);
  }
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  ~Tiles() { if (key_ >= 0) _tile_release(); }

 private:
  int key_ = -1;
};

}  // namespace jaxllm
#else
namespace jaxllm {
constexpr bool has_amx() { return false; }
struct Tiles {};
}  // namespace jaxllm
#endif
