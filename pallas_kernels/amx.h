// The tile registers of AMX: eight, each of up to 16 rows of 64 bytes.
// https://www.intel.com/content/www/us/en/docs/intrinsics-guide/index.html#techs=AMXFAMILY
#pragma once
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define JAXLLM_AMX 1
#include <cstdint>
#include <cstring>
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
  void set(const Shapes& shapes) {
    if (std::memcmp(&shapes, &set_, sizeof shapes) == 0) return;
    set_ = shapes;
    _tile_loadconfig(&set_);
  }
  Tiles() { set_.palette = 0; }
  Tiles(const Tiles&) = delete;
  ~Tiles() { if (set_.palette) _tile_release(); }

 private:
  Shapes set_;
};

}  // namespace jaxllm
#else
namespace jaxllm {
constexpr bool has_amx() { return false; }
struct Tiles {};
}  // namespace jaxllm
#endif
