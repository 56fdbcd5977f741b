#include "core/check.h"
#include "core/cpu/math.h"
#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "ops/moe_ffn.h"
#include "ops/moe_ffn_lists.h"
#include "ops/moe_ffn_turned.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

template <class T>
struct Experts {
  const MoeFfnArgs& a;
  const MoeFfnLayout& at;

  template <class P>
  P* scratch(i64 offset) const {
    return reinterpret_cast<P*>(static_cast<char*>(a.workspace) + offset);
  }
  ExpertLists lists() const { return {a.E, scratch<i32>(at.start), scratch<i32>(at.order), scratch<i32>(at.used)}; }
  T* hidden(i64 pair) const { return scratch<T>(at.hidden) + pair * at.hidden_stride; }

  const T* token(i64 t) const {
    if (a.x_stride_h != 1) return scratch<T>(at.x) + t * at.x_stride;
    return static_cast<const T*>(a.x) + t * a.x_stride_t;
  }

  void pack_tokens() const {
    if (a.x_stride_h == 1) return;
    for (i64 t = 0; t < a.T; ++t)
      for (i64 h = 0; h < a.H; ++h)
        scratch<T>(at.x)[t * at.x_stride + h] = static_cast<const T*>(a.x)[t * a.x_stride_t + h * a.x_stride_h];
  }

  // The tokens [c0, c0 + count) of a crowded expert as blocks: this thread's last ones, or packed now.
  const float* token_blocks(i64 e, i64 c0, i64 count, int thread) const {
    float* blocks = scratch<float>(at.x_blocks) + thread * (at.chunk / kMoeBlock) * at.x_block;
    i64& packed = scratch<i64>(at.packed)[thread];
    const i64 first = lists().start[e] + c0;
    if (packed == first) return blocks;
    packed = first;
    for (i64 c = 0; c < count; c += kMoeBlock) {
      const T* rows[kMoeBlock];
      const i64 n = count - c < kMoeBlock ? count - c : kMoeBlock;
      for (i64 l = 0; l < n; ++l) rows[l] = token(lists().order[first + c + l] / a.K);
      pack_block(rows, n, a.H, blocks + c / kMoeBlock * at.x_block);
    }
    return blocks;
  }
  float* hidden_block(i64 e, i64 c) const {
    return scratch<float>(at.hidden_blocks) + (scratch<i32>(at.first_block)[e] + c / kMoeBlock) * at.hidden_block;
  }
  float* copy(int thread) const { return scratch<float>(at.copy) + thread * kMoeCopiedRows * at.row_stride; }
  float* sums(int thread) const { return scratch<float>(at.sums) + thread * at.chunk * kMoeSums; }

  f32v activate(f32v g) const {
    switch (a.act) {
      case Act::silu: return g * sigmoid(set1(a.alpha) * g);
      case Act::gelu: return gelu(g);
      case Act::gelu_tanh: return gelu_tanh(g);
      case Act::relu: return max(set1(0), g);
      case Act::relu2: g = max(set1(0), g); return g * g;
      default: return g;
    }
  }

  // h[i] for i < n from the first product's sums of gate rows (all rows, where there is no gate) and of up rows.
  void gate(const float* sums, const float* ups, i64 n, T* h) const {
    const auto value = [&](f32v g, auto&& load_up) {
      if (!a.gated) return activate(g);
      const f32v u = max(set1(-a.limit), min(set1(a.limit), load_up()));
      return activate(min(set1(a.limit), g)) * (u + set1(a.offset));
    };
    for_lanes(
        n, [&](i64 i) { store(h + i, value(load(sums + i), [&] { return load(ups + i); })); },
        [&](i64 i, int rest) { store(h + i, value(load(sums + i, rest), [&] { return load(ups + i, rest); }), rest); });
  }

  // Elements [i, i+n) of h, expert e, its tokens [from, to).
  void first_product(i64 e, i64 i, i64 n, i64 from, i64 to, int thread) const {
    const i64 parts = a.gated ? 2 : 1, together = a.gated && a.interleaved ? 2 : 1;  // rows that are next to each other
    const T *rows[2 * kMoeUpRows], *taken[2 * kMoeUpRows];
    float bias[2 * kMoeUpRows], some_bias[2 * kMoeUpRows];
    T* copied = scratch<T>(at.rows) + thread * kMoeDownRows * at.row_stride;
    for (i64 p = 0; p < parts; p += together) {
      const i64 first = p * a.I + i * together, count = n * together;
      take_rows(static_cast<const T*>(a.up) + e * a.up_stride_e, a.up_stride_r, a.up_stride_h, first, count, a.H,
                copied + p * n * at.row_stride, at.row_stride, taken);
      take_bias<T>(a.up_bias, e * a.up_bias_stride_e + first * a.up_bias_stride_r, a.up_bias_stride_r, count, some_bias);
      for (i64 k = 0; k < count; ++k) {  // all gates, then all ups
        const i64 to = (p + k % together) * n + k / together;
        rows[to] = taken[k], bias[to] = some_bias[k];
      }
    }
    const auto many = [&](i64 c0, i64 count, const i32*) {
      product_many(rows, parts * n, token_blocks(e, c0, count, thread), at.x_block, count, a.H, bias, sums(thread), copy(thread));
      T h[kMoeBlock * kMoeUpRows];
      const T* made[kMoeBlock];
      for (i64 c = 0; c < count; c += kMoeBlock) {
        const i64 lanes = count - c < kMoeBlock ? count - c : kMoeBlock;
        for (i64 l = 0; l < lanes; ++l)
          gate(sums(thread) + (c + l) * kMoeSums, sums(thread) + (c + l) * kMoeSums + n, n, h + l * n), made[l] = h + l * n;
        pack_block(made, lanes, n, hidden_block(e, c0 + c) + block_words<T>(i));
      }
    };
    const auto few = [&](i64 count, const i32* pair) {
      const T* tokens[kMoeFewTokens];
      for (i64 c = 0; c < count; ++c) tokens[c] = token(pair[c] / a.K);
      product_few(rows, parts * n, tokens, count, a.H, bias, sums(thread), kMoeSums);
      for (i64 c = 0; c < count; ++c) gate(sums(thread) + c * kMoeSums, sums(thread) + c * kMoeSums + n, n, hidden(pair[c]) + i);
    };
    lists().each_chunk(e, from, to, many, few);
  }

  // Columns [o, o+n) of out: this thread's alone.
  void second_product(i64 o, i64 n, int thread) const {
    float* total = scratch<float>(at.total) + thread * a.T * at.down_rows;
    std::memset(total, 0, a.T * n * sizeof(float));
    const T* rows[kMoeDownRows];
    float bias[kMoeDownRows];
    for (i64 e = 0; e < a.E; ++e) {
      if (!lists().tokens_of(e)) continue;
      T* copied = scratch<T>(at.rows) + thread * kMoeDownRows * at.row_stride;
      take_rows(static_cast<const T*>(a.down) + e * a.down_stride_e, a.down_stride_o, a.down_stride_i, o, n, a.I, copied,
                at.row_stride, rows);
      take_bias<T>(a.down_bias, e * a.down_bias_stride_e + o * a.down_bias_stride_o, a.down_bias_stride_o, n, bias);
      const auto add = [&](i64 count, const i32* pair) {
        for (i64 c = 0; c < count; ++c) add_weighted(pair[c], sums(thread) + c * kMoeSums, n, total);
      };
      const auto many = [&](i64 c0, i64 count, const i32* pair) {
        product_many(rows, n, hidden_block(e, c0), at.hidden_block, count, a.I, bias, sums(thread), copy(thread));
        add(count, pair);
      };
      const auto few = [&](i64 count, const i32* pair) {
        const T* made[kMoeFewTokens];
        for (i64 c = 0; c < count; ++c) made[c] = hidden(pair[c]);
        product_few(rows, n, made, count, a.I, bias, sums(thread), kMoeSums);
        add(count, pair);
      };
      lists().each_chunk(e, 0, lists().tokens_of(e), many, few);
    }
    write(o, n, total);
  }

  void write(i64 o, i64 n, const float* total) const {
    for (i64 t = 0; t < a.T; ++t) {
      T* to = static_cast<T*>(a.out) + t * a.O + o;
      for_lanes(
          n, [&](i64 i) { store(to + i, load(total + t * n + i)); },
          [&](i64 i, int rest) { store(to + i, load(total + t * n + i, rest), rest); });
    }
  }

  void add_weighted(i64 pair, const float* sums, i64 n, float* total) const {
    const i64 t = pair / a.K, k = pair % a.K;
    const f32v weight = set1(a.weight[t * a.weight_stride_t + k * a.weight_stride_k]);
    float* to = total + t * n;
    for_lanes(
        n, [&](i64 i) { store(to + i, fma(weight, load(sums + i), load(to + i))); },
        [&](i64 i, int rest) { store(to + i, fma(weight, load(sums + i, rest), load(to + i, rest)), rest); });
  }

  // ---- weights stored transposed ----

  float* turned_sums(int thread) const { return scratch<float>(at.turned_sums) + thread * at.turned_chunk * kTurnedStride; }

  // Elements [i, i+n) of h for the tokens of expert e.
  void first_turned(i64 e, i64 i, i64 n, int thread) const {
    const i64 runs = a.gated && !a.interleaved ? 2 : 1, each = a.gated && a.interleaved ? 2 : 1, rows = n * each;
    const i64 ups = at.up_rows / 2;  // where the sums of up rows are
    float bias[kTurnedStride] = {}, *sums = turned_sums(thread);
    for (i64 p = 0; p < runs; ++p)
      take_bias<T>(a.up_bias, e * a.up_bias_stride_e + (p * a.I + i * each) * a.up_bias_stride_r, a.up_bias_stride_r, rows,
                   bias + p * ups);
    lists().each_run(e, kTurnedChunk, [&](i64 count, const i32* pair) {
      const float* tokens[kTurnedChunk];
      for (i64 c = 0; c < count; ++c) {
        tokens[c] = scratch<float>(at.x_words) + pair[c] / a.K * at.words_h;
        std::memcpy(sums + c * kTurnedStride, bias, sizeof bias);
      }
      for (i64 p = 0; p < runs; ++p) {
        const T* up = static_cast<const T*>(a.up) + e * a.up_stride_e + p * a.I + i * each;
        product_turned(up, a.up_stride_h, rows, a.H, tokens, count, sums + p * ups, kTurnedStride);
      }
      for (i64 c = 0; c < count; ++c) {
        float *made = sums + c * kTurnedStride, apart[kTurnedRows];
        T h[kTurnedRows];
        for (i64 k = 0; each == 2 && k < n; ++k) apart[k] = made[2 * k], apart[ups + k] = made[2 * k + 1];
        if (each == 2) made = apart;
        gate(made, made + ups, n, h);
        float* words = scratch<float>(at.hidden_words) + pair[c] * at.words_i;
        to_words(h, 1, n, words + i / TurnedLanes<T>::channels);
      }
    });
  }

  // Columns [o, o+n) of out: this thread's alone.
  void second_turned(i64 o, i64 n, int thread) const {
    float *total = scratch<float>(at.total) + thread * a.T * at.down_rows, *sums = turned_sums(thread);
    std::memset(total, 0, a.T * n * sizeof(float));
    for (i64 e = 0; e < a.E; ++e) {
      if (!lists().tokens_of(e)) continue;
      float bias[kTurnedStride] = {};
      take_bias<T>(a.down_bias, e * a.down_bias_stride_e + o * a.down_bias_stride_o, a.down_bias_stride_o, n, bias);
      lists().each_run(e, kTurnedChunk, [&](i64 count, const i32* pair) {
        const float* made[kTurnedChunk];
        for (i64 c = 0; c < count; ++c) {
          made[c] = scratch<float>(at.hidden_words) + pair[c] * at.words_i;
          std::memcpy(sums + c * kTurnedStride, bias, sizeof bias);
        }
        const T* down = static_cast<const T*>(a.down) + e * a.down_stride_e + o;
        product_turned(down, a.down_stride_i, n, a.I, made, count, sums, kTurnedStride);
        for (i64 c = 0; c < count; ++c) add_weighted(pair[c], sums + c * kTurnedStride, n, total);
      });
    }
    write(o, n, total);
  }

  void run_turned() const {
    parallel_for(a.T, 16, a.threads, [&](i64 begin, i64 end, int) {
      for (i64 t = begin; t < end; ++t)
        to_words(static_cast<const T*>(a.x) + t * a.x_stride_t, a.x_stride_h, a.H, scratch<float>(at.x_words) + t * at.words_h);
    });
    const i64 width = a.gated ? at.up_rows / 2 : at.up_rows, tasks = (a.I + width - 1) / width;
    parallel_for(lists().count_used() * tasks, 1, a.threads, [&](i64 begin, i64 end, int thread) {
      for (i64 task = begin; task < end; ++task) {
        const i64 e = lists().used[task / tasks], i = task % tasks * width;
        first_turned(e, i, a.I - i < width ? a.I - i : width, thread);
      }
    });
    each_columns([&](i64 o, i64 n, int thread) { second_turned(o, n, thread); });
  }

  template <class F>
  void each_columns(F&& f) const {
    parallel_for((a.O + at.down_rows - 1) / at.down_rows, 1, a.threads, [&](i64 begin, i64 end, int thread) {
      for (i64 task = begin; task < end; ++task) {
        const i64 o = task * at.down_rows;
        f(o, a.O - o < at.down_rows ? a.O - o : at.down_rows, thread);
      }
    });
  }

  void run() const {
    lists().sort("moe_ffn", a.T, a.K, a.ids, a.ids_stride_t, a.ids_stride_k);
    if (at.turned) return run_turned();
    lists().count_blocks(scratch<i32>(at.first_block));
    pack_tokens();
    for (int thread = 0; thread < a.threads; ++thread) scratch<i64>(at.packed)[thread] = -1;
    // Where experts have several chunks of tokens, a task takes some blocks of rows, so that packing a chunk serves all of them.
    const bool crowded = a.T * a.K > kMoeTokens * a.E && a.up_stride_h == 1;
    const i64 task_rows = kMoeUpRows * (crowded ? 4 : 1), tasks = (a.I + task_rows - 1) / task_rows;
    parallel_for(lists().count_used() * tasks, 1, a.threads, [&](i64 begin, i64 end, int thread) {
      for (i64 task = begin; task < end; ++task) {
        const i64 e = lists().used[task / tasks], first = task % tasks * task_rows;
        const i64 last = first + task_rows < a.I ? first + task_rows : a.I;
        const i64 all = lists().tokens_of(e), step = crowded ? kMoeTokens : all;
        for (i64 from = 0; from < all; from += step)
          for (i64 i = first; i < last; i += kMoeUpRows)
            first_product(e, i, last - i < kMoeUpRows ? last - i : kMoeUpRows, from, from + step < all ? from + step : all,
                          thread);
      }
    });
    each_columns([&](i64 o, i64 n, int thread) { second_product(o, n, thread); });
  }
};

}  // namespace

void moe_ffn_cpu(const MoeFfnArgs& a) {
#if defined(__AVX512BF16__)
  const MoeFfnLayout at(a, a.dtype == Dtype::bf16);
#else
  const MoeFfnLayout at(a, false);
#endif
  EFFVLM_CHECK(at.bytes <= a.workspace_bytes, "moe_ffn: workspace of %lld bytes is too small",
               static_cast<long long>(a.workspace_bytes));
  by_float_dtype("moe_ffn", a.dtype, [&](auto type) { Experts<typename decltype(type)::type>{a, at}.run(); });
}

}  // namespace effvlm::EFFVLM_ISA
