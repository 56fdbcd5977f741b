#include "ops/token_score.h"

#include <algorithm>

#include "core/check.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "ops/token_score_tile.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i32 = std::int32_t;

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
static_assert(kScoreKeys % kPanel == 0 && kScoreRows % kTileRows == 0 && kScoreStatRows % kTileRows == 0 && kPanel % 16 == 0);

// The rows of a batch entry that count, by ascending position; the bounds of what they see ascend too.
struct Rows {
  const ScoreRow* row;
  i64 count;

  bool any_sees(i64 begin, i64 end, i64 first_key, i64 last_key) const {
    return row[end - 1].last > first_key && row[begin].first < last_key;
  }
  bool all_see(i64 begin, i64 end, i64 first_key, i64 last_key) const {
    return row[end - 1].first <= first_key && row[begin].last >= last_key;
  }
};

template <class T>
struct Scorer {
  const TokenScoreArgs& a;
  const TokenScoreLayout work{a};
  const i64 depth = is_paired<T>() ? (a.D + 1) / 2 : a.D, words = (depth + 15) / 16 * 16;
  const float scale = static_cast<float>(a.scale * kLog2E);

  template <class U>
  U* at(i64 offset) const {
    return reinterpret_cast<U*>(static_cast<char*>(a.workspace) + offset);
  }
  float* packed_keys(int thread) const { return at<float>(work.packed_keys) + thread * kScoreKeys * work.words; }
  float* packed_rows(int thread) const {
    return at<float>(work.packed_rows) + thread * (a.lse ? kScoreRows : kScoreStatRows) * work.words;
  }
  float* staged(int thread) const { return at<float>(work.staged) + thread * 16 * work.words; }
  float* sums(i64 bh) const { return (a.heads == ScoreHeads::none ? a.out : at<float>(work.sums)) + bh * a.S; }
  Rows rows(i64 b) const { return {at<ScoreRow>(work.rows) + b * a.L, at<i64>(work.counts)[b]}; }

  float weight(i64 b, i64 row) const { return a.weight ? a.weight[b * a.weight_stride_b + row * a.weight_stride_l] : 1.0f; }
  i64 start(i64 t) const { return a.start ? a.start[t * a.start_stride] : t ? a.L : 0; }

  void list_rows(i64 b) const {
    ScoreRow* row = at<ScoreRow>(work.rows) + b * a.L;
    i64& count = at<i64>(work.counts)[b];
    count = 0;
    for (i64 t = 0; t < (a.start ? a.T : 1); ++t) {
      const i64 first = start(t), last = a.start ? start(t + 1) : a.S;
      for (i64 i = first; i < start(t + 1); ++i) {
        const i64 end = a.causal ? std::min(last, i + 1 + a.S - a.L) : last;
        if (first < end && weight(b, i) != 0)
          row[count++] = {static_cast<i32>(i), static_cast<i32>(first), static_cast<i32>(end)};
      }
    }
  }

  // Panels of the keys [first, first + count) of the head's group.
  void pack_keys(i64 b, i64 h, i64 first, i64 count, int thread) const {
    const T* key = static_cast<const T*>(a.key) + b * a.key_stride_b + h / (a.H / a.G) * a.key_stride_g;
    for (i64 k = 0; k < count; k += kPanel)
      pack_panel(key + (first + k) * a.key_stride_s, a.key_stride_s, a.key_stride_d, std::min<i64>(count - k, kPanel), a.D, words,
                 staged(thread), packed_keys(thread) + k * words);
  }

  // Listed rows [begin, end), and zeros up to a whole tile.
  void pack_rows(i64 b, i64 h, const Rows& listed, i64 begin, i64 end, int thread) const {
    const T* query = static_cast<const T*>(a.query) + b * a.query_stride_b + h * a.query_stride_h;
    float* to = packed_rows(thread);
    for (i64 k = begin; k < end; ++k, to += words)
      pack_row(query + listed.row[k].row * a.query_stride_l, a.query_stride_d, a.D, words, to);
    for (i64 k = end; (k - begin) % kTileRows; ++k, to += words) std::memset(to, 0, words * 4);
  }

  // The rounding of lse·log2 e is made up for in the factor.
  ScoreStat stat(i64 b, i64 h, i64 row) const {
    if (!a.lse) return at<ScoreStat>(work.stats)[(b * a.H + h) * a.L + row];
    const double exact = a.lse[b * a.lse_stride_b + h * a.lse_stride_h + row * a.lse_stride_l] * kLog2E;
    const float shift = static_cast<float>(exact);
    return {shift, std::isfinite(shift) ? static_cast<float>(1 + (shift - exact) * kLn2) : 1.0f};
  }

  // ---- sums over rows ----

  // Adds a tile to the sums of its keys: lane l of vector v is key first_key + v·width + l.
  template <int V>
  void add_tile(const f32v (&product)[kTileRows][V], const ScoreStat* stats, f32v (&sum)[V]) const {
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < V; ++v) {
        const f32v p = exp2(fma(product[r][v], set1(scale), set1(-stats[r].shift)));
        sum[v] = fma(p, set1(stats[r].factor), sum[v]);
      }
  }

  // The same where not all rows are there or see all keys.
  template <int V>
  void add_part(const f32v (&product)[kTileRows][V], const ScoreStat* stats, const ScoreRow* row, i64 count, i64 first_key,
                f32v (&sum)[V]) const {
    for (i64 r = 0; r < count; ++r) {
      f32v p[V];
      for (int v = 0; v < V; ++v) p[v] = exp2(fma(product[r][v], set1(scale), set1(-stats[r].shift))) * set1(stats[r].factor);
      hide(row[r], first_key, 0, p);  // last, since the factor may be NaN
      for (int v = 0; v < V; ++v) sum[v] = sum[v] + p[v];
    }
  }

  // Puts `value` in the place of what belongs to keys that the row does not see.
  template <int V>
  static void hide(const ScoreRow& row, i64 first_key, float value, f32v (&x)[V]) {
    constexpr i64 keys = V * f32v::width;
    float lane[keys];
    for (int v = 0; v < V; ++v) store(lane + v * f32v::width, x[v]);
    for (i64 l = 0; l < keys; ++l) lane[l] = first_key + l < row.first || first_key + l >= row.last ? value : lane[l];
    for (int v = 0; v < V; ++v) x[v] = load(lane + v * f32v::width);
  }

  // Adds packed rows [begin, end) to the sums `to` of up to V vectors of keys.
  template <int V>
  void add_rows(const Rows& listed, i64 begin, i64 end, const ScoreStat* stats, const float* packed, const float* panel,
                i64 first_key, i64 last_key, float* to) const {
    f32v sum[V];
    for (int v = 0; v < V; ++v) sum[v] = set1(0);
    for (i64 k = begin; k < end; k += kTileRows) {
      const i64 last = std::min<i64>(k + kTileRows, end);
      if (!listed.any_sees(k, last, first_key, last_key)) continue;
      f32v product[kTileRows][V];
      multiply<T, V>(packed + (k - begin) * words, words, panel, depth, product);
      if (last - k == kTileRows && listed.all_see(k, last, first_key, last_key)) {
        add_tile<V>(product, stats + (k - begin), sum);
      } else {
        add_part<V>(product, stats + (k - begin), listed.row + k, last - k, first_key, sum);
      }
    }
    for (int v = 0; v < V; ++v) {
      const i64 left = last_key - first_key - v * f32v::width;
      float* p = to + v * f32v::width;
      if (left >= f32v::width) {
        store(p, load(p) + sum[v]);
      } else if (left > 0) {
        store(p, load(p, static_cast<int>(left)) + sum[v], static_cast<int>(left));
      }
    }
  }

  void score_keys(i64 b, i64 h, i64 first, i64 count, int thread) const {
    const Rows listed = rows(b);
    const i64 end = first + count;
    float* to = sums(b * a.H + h);
    std::memset(to + first, 0, count * sizeof(float));
    pack_keys(b, h, first, count, thread);
    for (i64 k = 0; k < listed.count; k += kScoreRows) {
      const i64 last = std::min(k + kScoreRows, listed.count);
      if (!listed.any_sees(k, last, first, end)) continue;
      pack_rows(b, h, listed, k, last, thread);
      ScoreStat stats[kScoreRows];
      for (i64 r = k; r < last; ++r) {
        stats[r - k] = stat(b, h, listed.row[r].row);
        stats[r - k].factor *= weight(b, listed.row[r].row);
      }
      for (i64 j = first; j < end; j += kPanel) {
        const float* panel = packed_keys(thread) + (j - first) * words;
        if (end - j > (kVectors - 1) * f32v::width) {
          add_rows<kVectors>(listed, k, last, stats, packed_rows(thread), panel, j, std::min<i64>(j + kPanel, end), to + j);
        } else {
          for (i64 i = j; i < end; i += f32v::width)
            add_rows<1>(listed, k, last, stats, packed_rows(thread), panel + (i - j), i, std::min<i64>(i + f32v::width, end),
                        to + i);
        }
      }
    }
  }

  // ---- sums of rows ----

  struct Running {  // of a row's keys, lane by lane
    f32v max, sum;
  };

  // Exponents are rounded here as they are in add_tile, so that a row that sees one key gives it exactly 1.
  void add_keys(const f32v (&product)[kVectors], const ScoreRow& row, bool sees_all, i64 first_key, Running& to) const {
    f32v x[kVectors], top = to.max;
    for (int v = 0; v < kVectors; ++v) x[v] = product[v] * set1(scale);
    if (!sees_all) hide(row, first_key, -INFINITY, x);
    for (int v = 0; v < kVectors; ++v) top = max(top, x[v]);
    for (int v = 0; v < kVectors; ++v) x[v] = exp2(fma(product[v], set1(scale), set1(0) - top));
    if (!sees_all) hide(row, first_key, 0, x);
    to.sum = to.sum * exp2(to.max - top);
    for (int v = 0; v < kVectors; ++v) to.sum = to.sum + x[v];
    to.max = top;
  }

  void find_stats(i64 b, i64 h, i64 begin, i64 end, int thread) const {
    const Rows listed = rows(b);
    Running running[kScoreStatRows];
    for (i64 k = begin; k < end; ++k) running[k - begin] = {set1(-3e38f), set1(0)};
    pack_rows(b, h, listed, begin, end, thread);
    for (i64 j = listed.row[begin].first; j < listed.row[end - 1].last; j += kPanel) {
      const i64 last_key = std::min<i64>(j + kPanel, listed.row[end - 1].last);
      pack_keys(b, h, j, last_key - j, thread);
      for (i64 k = begin; k < end; k += kTileRows) {
        const i64 last = std::min<i64>(k + kTileRows, end);
        if (!listed.any_sees(k, last, j, last_key)) continue;
        f32v product[kTileRows][kVectors];
        multiply<T, kVectors>(packed_rows(thread) + (k - begin) * words, words, packed_keys(thread), depth, product);
        for (i64 r = k; r < last; ++r)
          add_keys(product[r - k], listed.row[r], listed.all_see(r, r + 1, j, j + kPanel), j, running[r - begin]);
      }
    }
    ScoreStat* stats = at<ScoreStat>(work.stats) + (b * a.H + h) * a.L;
    for (i64 k = begin; k < end; ++k) {
      const Running& row = running[k - begin];
      const float top = reduce_max(row.max);
      stats[listed.row[k].row] = {top, 1 / reduce_add(row.sum * exp2(row.max - set1(top)))};
    }
  }

  // ---- all of it ----

  void reduce_heads(i64 b, i64 begin, i64 end) const {
    float* out = a.out + b * a.S;
    for (i64 j = begin; j < end; ++j) out[j] = sums(b * a.H)[j];
    for (i64 h = 1; h < a.H; ++h) {
      const float* c = sums(b * a.H + h);
      if (a.heads == ScoreHeads::max) {
        for (i64 j = begin; j < end; ++j) out[j] = c[j] > out[j] || c[j] != c[j] ? c[j] : out[j];
      } else {
        for (i64 j = begin; j < end; ++j) out[j] += c[j];
      }
    }
    if (a.heads == ScoreHeads::mean)
      for (i64 j = begin; j < end; ++j) out[j] /= static_cast<float>(a.H);
  }

  // f(b, h, first, count, thread) over blocks of `block` of `count` of every head.
  template <class F>
  void for_blocks(i64 heads, i64 count, i64 block, F&& f) const {
    const i64 blocks = (count + block - 1) / block;
    parallel_for(a.B * heads * blocks, 1, a.threads, [&](i64 begin, i64 end, int thread) {
      for (i64 t = begin; t < end; ++t) {
        const i64 first = t % blocks * block, bh = t / blocks;
        f(bh / heads, bh % heads, first, std::min(block, count - first), thread);
      }
    });
  }

  void run() const {
    for (i64 b = 0; b < a.B; ++b) list_rows(b);
    if (!a.lse)
      for_blocks(a.H, a.L, kScoreStatRows, [&](i64 b, i64 h, i64 first, i64 count, int thread) {
        const i64 end = std::min(first + count, rows(b).count);
        if (first < end) find_stats(b, h, first, end, thread);
      });
    for_blocks(a.H, a.S, kScoreKeys,
               [&](i64 b, i64 h, i64 first, i64 count, int thread) { score_keys(b, h, first, count, thread); });
    if (a.heads != ScoreHeads::none)
      for_blocks(1, a.S, 1024, [&](i64 b, i64, i64 first, i64 count, int) { reduce_heads(b, first, first + count); });
  }
};

void check_start(const TokenScoreArgs& a) {
  i64 before = 0;
  for (i64 t = 0; a.start && t <= a.T; ++t) {
    const i64 place = a.start[t * a.start_stride];
    const bool right = place >= before && (t > 0 || place == 0) && (t < a.T ? place <= a.L : place == a.L);
    EFFVLM_CHECK(right, "token_score: expected start to ascend from 0 to L = %lld, got %lld at place %lld",
                 static_cast<long long>(a.L), static_cast<long long>(place), static_cast<long long>(t));
    before = place;
  }
}

}  // namespace

void token_score_cpu(const TokenScoreArgs& a) {
  check_start(a);
  by_float_dtype("token_score", a.dtype, [&](auto type) { Scorer<typename decltype(type)::type>{a}.run(); });
}

}  // namespace effvlm::EFFVLM_ISA
