#include "core/cpu/parallel.h"
#include "core/dispatch.h"
#include "ops/grouped_linear.h"
#include "ops/moe_ffn_lists.h"
#include "ops/moe_ffn_turned.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

template <class T>
struct Layers {
  const GroupedLinearArgs& a;
  const GroupedLinearLayout& at;

  template <class P>
  P* scratch(i64 offset) const {
    return reinterpret_cast<P*>(static_cast<char*>(a.workspace) + offset);
  }
  ExpertLists lists() const { return {a.E, scratch<i32>(at.start), scratch<i32>(at.order), scratch<i32>(at.used)}; }
  const T* token(i64 t) const {
    if (a.x_stride_c != 1) return scratch<T>(at.x) + t * at.x_stride;
    return static_cast<const T*>(a.x) + t * a.x_stride_t;
  }
  float* blocks(i64 e, i64 c) const {
    return scratch<float>(at.blocks) + (scratch<i32>(at.first_block)[e] + c / kMoeBlock) * at.block;
  }

  // What no layer writes, and tokens that are not read where they are.
  void prepare(i64 begin, i64 end) const {
    for (i64 t = begin; t < end; ++t) {
      const i64 e = a.ids[t * a.ids_stride];
      if (e < 0 || e >= a.E) std::memset(static_cast<char*>(a.out) + t * a.O * sizeof(T), 0, a.O * sizeof(T));
      if (at.turned)
        to_words(static_cast<const T*>(a.x) + t * a.x_stride_t, a.x_stride_c, a.C, scratch<float>(at.x) + t * at.words);
      for (i64 c = 0; !at.turned && a.x_stride_c != 1 && c < a.C; ++c)
        scratch<T>(at.x)[t * at.x_stride + c] = static_cast<const T*>(a.x)[t * a.x_stride_t + c * a.x_stride_c];
    }
  }

  // Block `number`, counted over all experts.
  void pack(i64 number) const {
    i64 e = 0;
    while (scratch<i32>(at.first_block)[e + 1] <= number) ++e;
    const i64 c = (number - scratch<i32>(at.first_block)[e]) * kMoeBlock, left = lists().blocked(e) - c;
    const i64 count = left < kMoeBlock ? left : kMoeBlock;
    const T* rows[kMoeBlock];
    for (i64 l = 0; l < count; ++l) rows[l] = token(lists().order[lists().start[e] + c + l]);
    pack_block(rows, count, a.C, blocks(e, c));
  }

  void write(i64 count, const i32* tokens, i64 o, i64 n, const float* sums, i64 stride) const {
    for (i64 c = 0; c < count; ++c) {
      T* to = static_cast<T*>(a.out) + tokens[c] * a.O + o;
      const float* from = sums + c * stride;
      for_lanes(
          n, [&](i64 i) { store(to + i, load(from + i)); }, [&](i64 i, int rest) { store(to + i, load(from + i, rest), rest); });
    }
  }

  // Columns [o, o+n) of out for the tokens of layer e.
  void multiply(i64 e, i64 o, i64 n, int thread) const {
    const T* rows[kMoeDownRows];
    float bias[kMoeDownRows], *sums = scratch<float>(at.sums) + thread * at.chunk * kMoeSums;
    take_rows(static_cast<const T*>(a.weight) + e * a.weight_stride_e, a.weight_stride_o, a.weight_stride_c, o, n, a.C,
              scratch<T>(at.rows) + thread * kMoeDownRows * at.row_stride, at.row_stride, rows);
    take_bias<T>(a.bias, e * a.bias_stride_e + o * a.bias_stride_o, a.bias_stride_o, n, bias);
    const auto many = [&](i64 c0, i64 count, const i32* tokens) {
      float* copy = scratch<float>(at.copy) + thread * kMoeCopiedRows * at.row_stride;
      product_many(rows, n, blocks(e, c0), at.block, count, a.C, bias, sums, copy);
      write(count, tokens, o, n, sums, kMoeSums);
    };
    const auto few = [&](i64 count, const i32* tokens) {
      const T* some[kMoeFewTokens];
      for (i64 c = 0; c < count; ++c) some[c] = token(tokens[c]);
      product_few(rows, n, some, count, a.C, bias, sums, kMoeSums);
      write(count, tokens, o, n, sums, kMoeSums);
    };
    lists().each_chunk(e, 0, lists().tokens_of(e), many, few);
  }

  // The same where the weights are stored transposed.
  void multiply_turned(i64 e, i64 o, i64 n, int thread) const {
    float bias[kTurnedStride] = {}, *sums = scratch<float>(at.sums) + thread * at.chunk * kTurnedStride;
    take_bias<T>(a.bias, e * a.bias_stride_e + o * a.bias_stride_o, a.bias_stride_o, n, bias);
    const T* weight = static_cast<const T*>(a.weight) + e * a.weight_stride_e + o;
    lists().each_run(e, kTurnedChunk, [&](i64 count, const i32* tokens) {
      const float* words[kTurnedChunk];
      for (i64 c = 0; c < count; ++c) {
        words[c] = scratch<float>(at.x) + tokens[c] * at.words;
        std::memcpy(sums + c * kTurnedStride, bias, sizeof bias);
      }
      product_turned(weight, a.weight_stride_c, n, a.C, words, count, sums, kTurnedStride);
      write(count, tokens, o, n, sums, kTurnedStride);
    });
  }

  void run() const {
    lists().sort("grouped_linear", a.T, 1, a.ids, a.ids_stride, 0);
    lists().count_blocks(scratch<i32>(at.first_block));
    parallel_for(a.T, 16, a.threads, [&](i64 begin, i64 end, int) { prepare(begin, end); });
    parallel_for(at.turned ? 0 : scratch<i32>(at.first_block)[a.E], 4, a.threads, [&](i64 begin, i64 end, int) {
      for (i64 number = begin; number < end; ++number) pack(number);
    });
    const i64 tasks = (a.O + at.out_rows - 1) / at.out_rows;
    parallel_for(lists().count_used() * tasks, 1, a.threads, [&](i64 begin, i64 end, int thread) {
      for (i64 task = begin; task < end; ++task) {
        const i64 e = lists().used[task / tasks], o = task % tasks * at.out_rows;
        const i64 n = a.O - o < at.out_rows ? a.O - o : at.out_rows;
        if (at.turned) {
          multiply_turned(e, o, n, thread);
        } else {
          multiply(e, o, n, thread);
        }
      }
    });
  }
};

}  // namespace

void grouped_linear_cpu(const GroupedLinearArgs& a) {
#if defined(__AVX512BF16__)
  const GroupedLinearLayout at(a, a.dtype == Dtype::bf16);
#else
  const GroupedLinearLayout at(a, false);
#endif
  EFFVLM_CHECK(at.bytes <= a.workspace_bytes, "grouped_linear: workspace of %lld bytes is too small",
               static_cast<long long>(a.workspace_bytes));
  by_float_dtype("grouped_linear", a.dtype, [&](auto type) { Layers<typename decltype(type)::type>{a, at}.run(); });
}

}  // namespace effvlm::EFFVLM_ISA
