#include "ops/ternary_matmul.h"

#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "ops/moe_ffn_lists.h"
#include "ops/ternary_matmul_lookup.h"
#include "ops/ternary_matmul_panel.h"
#include "ops/ternary_matmul_sums.h"
#include "ops/ternary_matmul_tokens.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

struct FewScratch {
  TileList list;
  LookedUp buffer;
  RowSums sums[kTernaryFew];
};

#if defined(EFFVLM_HAS_AMX)
template <class T>
constexpr bool kTiles = std::is_same_v<T, bf16>;  // many exact tokens run faster as tiles of a dense product
#else
template <class T>
constexpr bool kTiles = false;
#endif

template <class T>
union ManyScratch {
  SumScratch sums;
  PanelScratch panel;
};

template <class T>
struct Ternary {
  const TernaryMatmulArgs& a;
  const TernaryMatmulLayout& at;
  const GapPlanes& w = a.weight;
  i64 blocks = blocks_of(w), groups = groups_of(w);

  template <class P>
  P* scratch(i64 offset) const {
    return reinterpret_cast<P*>(static_cast<char*>(a.workspace) + offset);
  }
  ExpertLists lists() const { return {w.E, scratch<i32>(at.start), scratch<i32>(at.order), scratch<i32>(at.used)}; }
  float* spread(i64 t) const { return scratch<float>(at.x) + t * at.width; }
  std::int8_t* q(i64 t) const { return scratch<std::int8_t>(at.q) + t * at.width; }
  std::uint8_t* steps(i64 t) const { return scratch<std::uint8_t>(at.step) + t * at.strips; }
  T* out(i32 pair, i64 row) const { return static_cast<T*>(a.out) + pair * w.R + row; }
  float scale(i64 e, i64 row) const { return to_f32(a.scale[e * a.scale_stride_e + row * a.scale_stride_r]); }
  const T* contiguous(i64 t) const {
    return a.x_stride_c == 1 ? static_cast<const T*>(a.x) + t * a.x_stride_t : scratch<T>(at.q) + t * w.C;
  }

  void prepare(i64 begin, i64 end) const {
    for (i64 t = begin; t < end; ++t) {
      const T* x = static_cast<const T*>(a.x) + t * a.x_stride_t;
      spread_token(x, a.x_stride_c, w.C, at.strips, spread(t));
      if (a.int8) {
        scratch<float>(at.unit)[t] = quantize_token(spread(t), at.strips, w.levels, q(t), steps(t));
      } else if (a.x_stride_c != 1) {
        for (i64 c = 0; c < w.C; ++c) scratch<T>(at.q)[t * w.C + c] = x[c * a.x_stride_c];
      }
#if defined(__AVX512VBMI2__)
      for (i64 s = 0; s < at.strips && !a.int8; ++s)
        to_planar(spread(t) + s * kTileColumns, scratch<std::uint8_t>(at.planar) + (t * at.strips + s) * kPlanar * kTileColumns);
#endif
      for (i64 k = 0; k < a.K; ++k) {
        const i64 e = a.ids[t * a.ids_stride_t + k * a.ids_stride_k];
        if (e < 0 || e >= w.E) std::memset(static_cast<void*>(out(static_cast<i32>(t * a.K + k), 0)), 0, w.R * sizeof(T));
      }
    }
  }

  void read(i64 e, i64 block, i64 s, const Strip& strip, TileList& list) const {
    read_tile(tile_at(w, e * blocks + block, s, at.strips, groups, strip.pitch), strip.pitch, w.levels, list);
  }

  // ---- few tokens ----

#if defined(__AVX512VBMI2__)
  template <bool Third, class Marks>
  void look_up_all(const TileList& list, const Marks& marks, i64 s, i64 count, const i32* pairs, LookedUp& buffer,
                   RowSums* sums) const {
    for (i64 c = 0; c < count; ++c) {
      const i64 t = pairs[c] / a.K;
      if (a.int8) {
        look_up<Third>(list, marks, w.levels, q(t) + s * kTileColumns, steps(t)[s], buffer, sums[c]);
      } else {
        const auto* planar = scratch<std::uint8_t>(at.planar) + (t * at.strips + s) * kPlanar * kTileColumns;
        look_up<std::is_same_v<T, bf16>, Third>(list, marks, w.levels, planar, buffer, sums[c]);
      }
    }
  }

  // Positions of a list serve all tokens; signs are taken from its planes, and values never made.
  void multiply_tile(i64 e, i64 block, i64 s, i64 count, const i32* pairs, TileList& list, LookedUp& buffer,
                     RowSums* sums) const {
    const Strip strip = strip_at(w.C, s);
    const GapTile tile = tile_at(w, e * blocks + block, s, at.strips, groups, strip.pitch);
    if (tile.bytes < 0) fail_corrupt();
    if (tile.entry.kind == TileKind::dense) {
      read_dense(tile, strip.pitch, w.levels, list);
      return w.levels == 5 ? look_up_all<true>(list, ValueMarks{list.value}, s, count, pairs, buffer, sums)
                           : look_up_all<false>(list, ValueMarks{list.value}, s, count, pairs, buffer, sums);
    }
    list.count = tile.entry.count;
    const PlaneMarks marks{{tile.list(), list.count, planes_of(tile.entry)}, tile.entry.k};
    read_positions(tile, strip.pitch, marks.planes, list);
    tile.entry.kind == TileKind::gaps ? look_up_all<false>(list, marks, s, count, pairs, buffer, sums)
                                      : look_up_all<true>(list, marks, s, count, pairs, buffer, sums);
  }
#else
  void multiply_tile(i64 e, i64 block, i64 s, i64 count, const i32* pairs, TileList& list, LookedUp& found, RowSums* sums) const {
    read(e, block, s, strip_at(w.C, s), list);
    find_places(list, found.place);
    for (i64 c = 0; c < count; ++c) {
      const i64 t = pairs[c] / a.K;
      if (a.int8) {
        look_up(list, q(t) + s * kTileColumns, steps(t)[s], w.levels, found, sums[c]);
      } else {
        look_up(list, spread(t) + s * kTileColumns, w.levels, found, sums[c]);
      }
    }
  }
#endif

  void multiply_few(i64 e, i64 block, i64 count, const i32* pairs, FewScratch& own) const {
    for (i64 c = 0; c < count; ++c) own.sums[c].clear(a.int8);
    for (i64 s = 0; s < at.strips; ++s) multiply_tile(e, block, s, count, pairs, own.list, own.buffer, own.sums);
    const i64 row = block * kTileRows, rows = w.R - row < kTileRows ? w.R - row : kTileRows;
    float scales[kTileRows], sums[kTileRows];
    for (i64 r = 0; r < rows; ++r) scales[r] = scale(e, row + r);
    for (i64 c = 0; c < count; ++c) {
      own.sums[c].add_up(a.int8, sums);
      write_row(sums, scales, rows, pairs[c], row);
    }
  }

  // ---- many tokens ----

  bool is_crowded(i64 e) const { return lists().tokens_of(e) > kTernaryFew; }
  i32* first_block() const { return scratch<i32>(at.first_block); }
  i64 per_block() const { return a.int8 ? 32 : 16; }  // tokens: what a line holds
  const char* packed(i64 e, i64 c) const {
    return scratch<char>(at.packed) + (first_block()[e] + c / per_block()) * at.block_bytes;
  }

  void count_blocks() const {
    first_block()[0] = 0;
    for (i64 e = 0; e < w.E; ++e) {
      const i64 count = is_crowded(e) ? (lists().tokens_of(e) + per_block() - 1) / per_block() : 0;
      first_block()[e + 1] = first_block()[e] + static_cast<i32>(count);
    }
  }

  // Block `number`, counted over all experts.
  void pack(i64 number) const {
    i64 e = 0;
    while (first_block()[e + 1] <= number) ++e;
    const i64 c = (number - first_block()[e]) * per_block(), left = lists().tokens_of(e) - c;
    const i64 some = left < per_block() ? left : per_block();
    const i32* pairs = lists().order + lists().start[e] + c;
    char* to = scratch<char>(at.packed + number * at.block_bytes);
    if (a.int8) {
      const std::int8_t* rows[32] = {};
      for (i64 l = 0; l < some; ++l) rows[l] = q(pairs[l] / a.K);
      return pack_pairs(rows, at.width, reinterpret_cast<std::uint32_t*>(to));
    }
    if constexpr (kTiles<T>) {
      const T* rows[16];
      for (i64 l = 0; l < some; ++l) rows[l] = contiguous(pairs[l] / a.K);
      return pack_block(rows, some, w.C, reinterpret_cast<float*>(to));
    }
    const float* rows[16] = {};
    for (i64 l = 0; l < some; ++l) rows[l] = spread(pairs[l] / a.K);
    pack_words(rows, at.width, reinterpret_cast<float*>(to));
  }

  // E: i16 with sums in i32, or f32. Tiles are read once for all of up to 256 tokens, tables made once for three tiles.
  template <class E, class Sum>
  void multiply_lines(i64 e, i64 first, i64 count, const i32* pairs, const char* packed, int thread, SumScratch& own) const {
    Sum* total = scratch<Sum>(at.sums) + thread * at.chunk * kTernaryRows;
    std::memset(total, 0, sizeof(Sum) * at.chunk * kTernaryRows);
    const i64 tiles = blocks - first < kTernaryRows / kTileRows ? blocks - first : kTernaryRows / kTileRows;
    alignas(64) i32 m[32] = {};
    for (i64 s = 0; s < at.strips; ++s) {
      const Strip strip = strip_at(w.C, s);
      for (i64 i = 0; i < tiles; ++i) read(e, first + i, s, strip, own.list), place_rows(own.list, own.flat, own.places[i]);
      for (i64 c = 0; c < count; c += per_block()) {
        const char* lines = packed + c / per_block() * at.block_bytes + s * kTileColumns * kLine;
        make_table<E>(lines, w.levels, own.table);
        if (a.int8)
          for (i64 l = 0; l < per_block() && c + l < count; ++l) m[l] = steps(pairs[c + l] / a.K)[s];
        for (i64 i = 0; i < tiles; ++i) add_tile(own.places[i], own.table, m, total + i * kTileRows * at.chunk + c, at.chunk);
      }
    }
    write(e, first, count, pairs, [&](i64 c, i64 r, float* sum) {
      const float* rows[16];
      for (i64 i = 0; i < 16; ++i) rows[i] = reinterpret_cast<const float*>(total + (r + i) * at.chunk + c);
      transpose_16x16(rows, sum, 16);
      if (std::is_same_v<Sum, i32>)
        for (int i = 0; i < 16 * 16; ++i) sum[i] = static_cast<float>(static_cast<i32>(f32_to_bits(sum[i])));
    });
  }

  // As dense bf16, by tiles. The panel of up to three tiles of a strip at a time.
  void multiply_panel(i64 e, i64 first, i64 count, const i32* pairs, const char* packed, int thread, PanelScratch& own) const {
    bf16* panel = scratch<bf16>(at.panel) + thread * kTernaryRows * kTileColumns;
    float *total = scratch<float>(at.sums) + thread * at.chunk * kTernaryRows, none[kMoeDownRows] = {};
    float *part = scratch<float>(at.part) + thread * at.chunk * kMoeSums,
          *copy = scratch<float>(at.copy) + thread * kMoeCopiedRows * kTileColumns;
    std::memset(total, 0, 4 * at.chunk * kTernaryRows);
    const bf16* row[kTernaryRows];
    for (i64 r = 0; r < kTernaryRows; ++r) row[r] = panel + r * kTileColumns;
    for (i64 s = 0; s < at.strips; ++s) {
      const Strip strip = strip_at(w.C, s);
      i64 rows = 0;
      for (i64 block = first; block < blocks && rows < kTernaryRows; ++block, rows += kTileRows) {
        read(e, block, s, strip, own.list);
        to_panel(own, strip.pitch, panel + rows * kTileColumns);
      }
      const i64 width = w.C - strip.column < strip.pitch ? w.C - strip.column : strip.pitch;
      const float* tokens = reinterpret_cast<const float*>(packed) + strip.column / 2 * 16;
      for (i64 r = 0; r < rows; r += kMoeDownRows) {
        const i64 n = rows - r < kMoeDownRows ? rows - r : kMoeDownRows;
        product_many(row + r, n, tokens, at.block_bytes / 4, count, width, none, part, copy);
        for (i64 c = 0; c < count; ++c)
          for (i64 i = 0; i < n; i += f32v::width) {
            float* to = total + c * kTernaryRows + r + i;
            store(to, load(to) + load(part + c * kMoeSums + i));
          }
      }
    }
    write(e, first, count, pairs, [&](i64 c, i64 r, float* sum) {
      for (i64 l = 0; l < 16; ++l) std::memcpy(sum + 16 * l, total + (c + l) * kTernaryRows + r, 64);
    });
  }

  // out = sum · (S · scale) of n rows for one choice.
  void write_row(const float* sum, const float* scales, i64 n, i32 pair, i64 row) const {
    const f32v unit = set1(a.int8 ? scratch<float>(at.unit)[pair / a.K] : 1);
    T* to = out(pair, row);
    for_lanes(
        n, [&](i64 r) { store(to + r, load(sum + r) * (unit * load(scales + r))); },
        [&](i64 r, int left) { store(to + r, load(sum + r, left) * (unit * load(scales + r, left)), left); });
  }

  // sums(c0, r0, sum): 16 rows from r0 of 16 choices from c0, as sum[16·choice + row].
  template <class Sums>
  void write(i64 e, i64 first, i64 count, const i32* pairs, Sums&& sums) const {
    const i64 row = first * kTileRows, rows = w.R - row < kTernaryRows ? w.R - row : kTernaryRows;
    float scales[16], sum[16 * 16];
    for (i64 r = 0; r < rows; r += 16) {
      const i64 n = rows - r < 16 ? rows - r : 16;
      for (i64 i = 0; i < n; ++i) scales[i] = scale(e, row + r + i);
      for (i64 c = 0; c < count; c += 16) {
        sums(c, r, sum);
        for (i64 l = 0; l < 16 && c + l < count; ++l) write_row(sum + 16 * l, scales, n, pairs[c + l], row + r);
      }
    }
  }

  void multiply_many(i64 e, i64 first, int thread, ManyScratch<T>& own) const {
    i64 c = 0;
    lists().each_run(e, kTernaryChunk, [&](i64 count, const i32* pairs) {
      if (a.int8) {
        multiply_lines<std::int16_t, i32>(e, first, count, pairs, packed(e, c), thread, own.sums);
      } else if constexpr (kTiles<T>) {
        multiply_panel(e, first, count, pairs, packed(e, c), thread, own.panel);
      } else {
        multiply_lines<float, float>(e, first, count, pairs, packed(e, c), thread, own.sums);
      }
      c += count;
    });
  }

  void run() const {
    lists().sort("ternary_matmul", a.T, a.K, a.ids, a.ids_stride_t, a.ids_stride_k);
    count_blocks();
    parallel_for(a.T, 1, a.threads, [&](i64 begin, i64 end, int) { prepare(begin, end); });
    parallel_for(first_block()[w.E], 1, a.threads, [&](i64 begin, i64 end, int) {
      for (i64 number = begin; number < end; ++number) pack(number);
    });
    constexpr i64 kPer = kTernaryRows / kTileRows;
    const i64 tasks = (blocks + kPer - 1) / kPer;
    parallel_for(lists().count_used() * blocks, 1, a.threads, [&](i64 begin, i64 end, int) {
      FewScratch own;
      for (i64 task = begin; task < end; ++task) {
        const i64 e = lists().used[task / blocks], count = lists().tokens_of(e);
        if (!is_crowded(e)) multiply_few(e, task % blocks, count, lists().order + lists().start[e], own);
      }
    });
    parallel_for(lists().count_used() * tasks, 1, a.threads, [&](i64 begin, i64 end, int thread) {
      ManyScratch<T> own;
      std::memset(own.sums.table, 0, sizeof own.sums.table);
      for (i64 task = begin; task < end; ++task) {
        const i64 e = lists().used[task / tasks];
        if (is_crowded(e)) multiply_many(e, task % tasks * kPer, thread, own);
      }
    });
  }
};

}  // namespace

void ternary_matmul_cpu(const TernaryMatmulArgs& a) {
  const TernaryMatmulLayout at(a);
  EFFVLM_CHECK(at.bytes <= a.workspace_bytes, "ternary_matmul: workspace of %lld bytes is too small",
               static_cast<long long>(a.workspace_bytes));
  by_float_dtype("ternary_matmul", a.dtype, [&](auto type) { Ternary<typename decltype(type)::type>{a, at}.run(); });
}

}  // namespace effvlm::EFFVLM_ISA
