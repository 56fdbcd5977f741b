#include "ops/ternary_unpack.h"

#include "core/cpu/gap_planes_read.h"
#include "core/cpu/parallel.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;

void write_tile(const TileList& list, const Strip& strip, std::int8_t* corner, i64 rows, i64 C) {
  const i64 width = C - strip.column < strip.pitch ? C - strip.column : strip.pitch;
  for (i64 r = 0; r < rows; ++r) {
    std::int8_t* to = corner + r * C;
    std::memset(to, 0, width);
    for (int i = list.row[r]; i < list.row[r + 1]; ++i) {
      const i64 c = list.column[i] % strip.pitch;
      if (c < width) to[c] = list.value[i];  // bridges may stand behind the last column
    }
  }
}

}  // namespace

void ternary_unpack_cpu(const TernaryUnpackArgs& a) {
  const GapPlanes& w = a.weight;
  const i64 strips = strips_of(w.C), groups = groups_of(w), blocks = blocks_of(w);
  parallel_for(w.E * blocks, 1, a.threads, [&](i64 begin, i64 end, int) {
    TileList list;
    for (i64 block = begin; block < end; ++block) {
      const i64 row = block % blocks * kTileRows, rows = w.R - row < kTileRows ? w.R - row : kTileRows;
      for (i64 s = 0; s < strips; ++s) {
        const Strip strip = strip_at(w.C, s);
        read_tile(tile_at(w, block, s, strips, groups, strip.pitch), strip.pitch, w.levels, list);
        write_tile(list, strip, a.out + (block / blocks * w.R + row) * w.C + strip.column, rows, w.C);
      }
    }
  });
}

}  // namespace effvlm::EFFVLM_ISA
