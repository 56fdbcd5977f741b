// Part of token_diverse_cpu.cpp: lazy greedy choice among the tokens of one batch entry.
//
// `value` is the worth of a token (max-min: minus its largest cosine; DPP: r²·δ) after seen[i] of the columns it is to be
// compared with, which are the picks in their order. It only falls, so an old value is an upper bound: when the best value of all
// belongs to a token that has seen every pick, it is the next pick, whatever the others have seen. Until then, tokens whose value
// reaches a threshold just below the best are brought up to date, in parallel, each until it is below or has seen all. Every
// number of a token is computed in an order that depends on columns alone, so that what is put off and when has no influence on
// it.
#pragma once
#include <type_traits>

#include "core/cpu/dot.h"
#include "core/cpu/parallel.h"
#include "ops/token_diverse.h"

namespace effvlm::EFFVLM_ISA {
namespace {

using i64 = std::int64_t;
using i32 = std::int32_t;

#if defined(__AVX512F__)
constexpr int kTokens = 4, kColumns = 6;  // 24 sums, 6 columns and a token in 32 registers
#else
constexpr int kTokens = 2, kColumns = 4;  // 16 registers
#endif
constexpr int kBlock = 12;          // columns that a token is compared with at a time
constexpr int kChunk = 4 * kBlock;  // columns that stay in a second-level cache while tokens stream by
constexpr float kNever = -INFINITY;

// One batch entry.
template <class T>
struct Greedy {
  i64 N, C, k, stride;  // stride: elements between tokens
  const T* x;
  const float* inverse_norm;                   // 0 for a zero token
  i32* picks;                                  // what is filled
  float* value;                                // kNever once picked
  i32 *seen, *list, *sort, *columns, *places;  // places: 0 … N−1
  float *weight, *delta, *root, *c;            // DPP: r², δ, √δ of each pick, c of each token
  i64 pitch;
  const float* relevances;  // null: all ones
  i64 relevance_stride;
  bool dpp;
  int threads;
  float margin = 0.02f;  // how far below the best value candidates are brought up to date, adapted to the data as picks go by

  const T* token(i64 n) const { return x + n * stride; }

  float cosine(float dot, i32 i, i32 j) const {  // the same for (j, i); and neither product leaves the range of f32
    const float p = inverse_norm[i], q = inverse_norm[j];
    return p > q ? dot * p * q : dot * q * p;
  }

  // out[u][m] = <rows of tokens[m], rows of columns[first + u]>: up to kTokens tokens, columns up to `last`, at most kBlock.
  template <class Row>
  static void multiply(Row&& row, i64 length, const i32* tokens, int count, const i32* columns, int first, int last,
                       float (*out)[kTokens]) {
    using Pointer = decltype(row(0));
    Pointer rows[kTokens], others[kColumns];
    for (int m = 0; m < kTokens; ++m) rows[m] = row(tokens[m < count ? m : 0]);
    for (int u = first; u < last; u += kColumns) {
      for (int j = 0; j < kColumns; ++j) others[j] = row(columns[u + j < last ? u + j : u]);
      float dot[kColumns * kTokens];
      const int width = count > 1 ? kTokens : 1;
      using Element = std::remove_cv_t<std::remove_pointer_t<Pointer>>;
      if (count == 1) {
        dots<Element, 1, kColumns, 1>(rows, others, length, dot);
      } else if (last - u <= 2) {
        dots<Element, kTokens, 2, 1>(rows, others, length, dot);
      } else {
        dots<Element, kTokens, kColumns, 1>(rows, others, length, dot);
      }
      for (int j = 0; j < kColumns && u + j < last; ++j)
        for (int m = 0; m < count; ++m) out[u - first + j][m] = dot[j * width + m];
    }
  }

  // Token i, number m of its group, takes the others from … last − 1 into account; dot is of the others first … last − 1.
  void see_max_min(i32 i, int m, const i32* others, int from, int first, int last, const float (*dot)[kTokens]) {
    float least = value[i];
    for (int u = from; u < last; ++u) {
      const float worth = -cosine(dot[u - first][m], i, others[u]);
      if (others[u] != i && worth < least) least = worth;
    }
    value[i] = least;
  }

  // The same from seen[i] on; projection: <c_j, c_i> over the whole blocks before `first`.
  void see_dpp(i32 i, int m, int first, int last, const float (*dot)[kTokens], const float (*projection)[kTokens]) {
    float *own = c + i * pitch, left = delta[i];
    for (int u = seen[i]; u < last; ++u) {
      const float *other = c + picks[u] * pitch, to_pick = cosine(dot[u - first][m], i, picks[u]);
      float sum = projection[u - first][m];
      for (int v = first / kBlock * kBlock; v < u; ++v) sum += other[v] * own[v];
      own[u] = (to_pick - sum) / root[u];
      left -= own[u] * own[u];
    }
    delta[i] = left, value[i] = left > kDiverseSpent ? weight[i] * left : 0;
  }

  // Tokens of a group see the others, a block at a time, until they have seen `until` or are worth less than the threshold.
  void advance(const i32* group, int count, const i32* others, int until, float threshold) {
    for (;;) {
      const auto waits = [&](i32 i, int limit) { return value[i] >= threshold && seen[i] < limit; };
      int first = until, rows = 0;
      for (int m = 0; m < count; ++m)
        if (waits(group[m], first)) first = seen[group[m]];
      if (first == until) return;
      const int whole = first / kBlock * kBlock, last = whole + kBlock < until ? whole + kBlock : until;
      i32 tokens[kTokens];
      for (int m = 0; m < count; ++m)
        if (waits(group[m], last)) tokens[rows++] = group[m];
      float dot[kBlock][kTokens], projection[kBlock][kTokens];
      multiply([&](i32 n) { return token(n); }, C, tokens, rows, others, first, last, dot);
      if (dpp)
        multiply([&](i32 n) { return const_cast<const float*>(c + n * pitch); }, whole, tokens, rows, others, first, last,
                 projection);
      for (int m = 0; m < rows; ++m) {
        if (dpp) {
          see_dpp(tokens[m], m, first, last, dot, projection);
        } else {
          see_max_min(tokens[m], m, others, seen[tokens[m]], first, last, dot);
        }
        seen[tokens[m]] = last;
      }
    }
  }

  // The first `count` tokens of the list see the others, those together that have seen as many.
  void advance_list(i64 count, const i32* others, int until, float threshold) {
    i32* sorted = list + N;
    for (i64 q = 0; q <= until / kBlock + 1; ++q) sort[q] = 0;
    for (i64 n = 0; n < count; ++n) ++sort[seen[list[n]] / kBlock + 1];
    for (i64 q = 0; q <= until / kBlock; ++q) sort[q + 1] += sort[q];
    for (i64 n = 0; n < count; ++n) sorted[sort[seen[list[n]] / kBlock]++] = list[n];
    const i64 share = (count + threads - 1) / threads, size = share < kTokens ? share : kTokens;
    const i64 groups = size ? (count + size - 1) / size : 0, part = groups / threads / 2, grain = part < 8 ? part : 8;
    parallel_for(groups, grain, threads, [&](i64 begin, i64 end, int) {
      for (int limit = seen[sorted[begin * size]] / kChunk * kChunk; limit < until;) {  // a chunk of others for all these groups
        limit = limit + kChunk < until ? limit + kChunk : until;
        for (i64 g = begin; g < end; ++g)
          advance(sorted + g * size, static_cast<int>(count - g * size < size ? count - g * size : size), others, limit,
                  threshold);
      }
    });
  }

  // Lists the tokens worth the threshold that have not seen `until` others.
  i64 list_waiting(int until, float threshold) {
    i64 count = 0;
    const auto offer = [&](i64 n) {
      list[count] = static_cast<i32>(n);
      count += value[n] >= threshold && seen[n] < until;
    };
    constexpr int W = f32v::width;
    i64 n = 0;
    for (; n + 4 * W <= N; n += 4 * W) {
      const f32v largest = max(max(load(value + n), load(value + n + W)), max(load(value + n + 2 * W), load(value + n + 3 * W)));
      if (reduce_max(largest) >= threshold)
        for (i64 i = n; i < n + 4 * W; ++i) offer(i);
    }
    for (; n < N; ++n) offer(n);
    return count;
  }

  i32 best() const {
    f32v largest = set1(kNever);
    float most = kNever;
    for_lanes(
        N, [&](i64 n) { largest = max(load(value + n), largest); },
        [&](i64 n, int rest) {
          for (int l = 0; l < rest; ++l) most = value[n + l] > most ? value[n + l] : most;
        });
    const float whole = reduce_max(largest);
    most = whole > most ? whole : most;
    i64 n = 0;
    while (value[n] != most) ++n;
    return static_cast<i32>(n);
  }

  // All tokens, in an order whose beginnings are spread evenly.
  void spread_columns() {
    i64 step = N * 5 / 8;
    for (;; ++step) {
      i64 a = N, b = step;
      while (b) a %= b, std::swap(a, b);
      if (a == 1) break;
    }
    for (i64 q = 0, n = 0; q < N; ++q, n = (n + step) % N) columns[q] = static_cast<i32>(n), places[q] = static_cast<i32>(q);
  }

  // Goes on with the `most` best tokens that have not seen all, until they are worth less than the floor, and returns the new
  // floor: the best value of a token that has seen all.
  float raise_floor(i64 most, float floor) {
    const int all = static_cast<int>(N);
    i64 count = 0;
    for (i64 n = 0; n < N; ++n) {
      if (seen[n] == all || (count == most && value[n] <= value[list[count - 1]])) continue;
      count += count < most;
      i64 place = count - 1;
      for (; place > 0 && value[list[place - 1]] < value[n]; --place) list[place] = list[place - 1];
      list[place] = static_cast<i32>(n);
    }
    advance_list(count, columns, all, floor);
    for (i64 n = 0; n < N; ++n)
      if (seen[n] == all && value[n] > floor) floor = value[n];
    return floor;
  }

  // The tokens of a chunk of places that are worth the floor, and those of another chunk (or the same), see each other.
  void meet(i64 chunk, i64 other, float floor) {
    const i64 stop = (chunk + 1) * kChunk < N ? (chunk + 1) * kChunk : N,
              last = (other + 1) * kChunk < N ? (other + 1) * kChunk : N;
    i32 group[kTokens];
    int count = 0;
    for (i64 n = chunk * kChunk; n < stop; ++n) {
      if (value[n] >= floor) group[count++] = static_cast<i32>(n);
      if (count < kTokens && n + 1 < stop) continue;
      for (i64 u = count && chunk == other ? group[0] : other * kChunk; count && u < last; u += kBlock) {
        const int from = static_cast<int>(u), to = static_cast<int>(u + kBlock < last ? u + kBlock : last);
        float dot[kBlock][kTokens];
        multiply([&](i32 i) { return token(i); }, C, group, count, places, from, to, dot);
        for (i32 j = from; j < to; ++j)
          for (int m = 0; m < count; ++m) {
            const float worth = j == group[m] ? INFINITY : -cosine(dot[j - from][m], group[m], j);
            value[group[m]] = worth < value[group[m]] ? worth : value[group[m]];
            value[j] = worth < value[j] ? worth : value[j];
          }
      }
      count = 0;
    }
  }

  // All chunks with themselves; then those of even number with the next one, then those of odd number: tasks share no chunk.
  void meet_themselves() {
    parallel_for((N + kChunk - 1) / kChunk, 1, threads, [&](i64 begin, i64 end, int) {
      for (i64 chunk = begin; chunk < end; ++chunk) meet(chunk, chunk, kNever);
    });
  }
  void meet_neighbours(float floor) {
    const i64 chunks = (N + kChunk - 1) / kChunk;
    for (i64 odd = 0; odd < 2; ++odd)
      parallel_for((chunks - odd) / 2, 1, threads, [&](i64 begin, i64 end, int) {
        for (i64 pair = begin; pair < end; ++pair) meet(2 * pair + odd, 2 * pair + odd + 1, floor);
      });
  }

  // The token whose nearest other one is furthest: it sees all the others, and drops out once one of them is too near. That is
  // often a neighbour, so these come first.
  i32 first_pick() {
    constexpr i64 kFew = 8, kMore = 24;
    const int all = static_cast<int>(N);
    spread_columns();
    meet_themselves();
    float floor = raise_floor(kMore, raise_floor(kFew, kNever));
    meet_neighbours(floor);
    for (int chunk = 0, raise = 0; chunk * kChunk < all; ++chunk) {
      if (chunk == raise) floor = raise_floor(kMore, floor), raise = chunk ? 4 * chunk : 4;
      const int until = (chunk + 1) * kChunk < all ? (chunk + 1) * kChunk : all;
      advance_list(list_waiting(until, floor), columns, until, floor);
    }
    return best();
  }

  // The best token, when t picks have been seen.
  i32 next_pick(int t) {
    i32 top = best();
    for (int round = 0; seen[top] < t && !(dpp && value[top] <= 0); ++round) {
      if (round) margin = margin < 0.5f ? 2 * margin : 1;
      const float threshold = value[top] - margin * (dpp ? value[top] : 1);
      advance_list(list_waiting(t, threshold), picks, t, threshold);
      top = best();
      if (round == 0) margin *= 0.8f;
    }
    return top;
  }

  // Of the tokens not picked, those of the highest weight.
  void pick_rest(int t) {
    for (; t < k; ++t) {
      i64 most = -1;
      for (i64 n = 0; n < N; ++n)
        if (value[n] != kNever && (most < 0 || relevance(n) > relevance(most))) most = n;
      take(static_cast<i32>(most), t);
    }
  }

  float relevance(i64 n) const { return relevances ? relevances[n * relevance_stride] : 1; }

  void take(i32 n, int t) {
    picks[t] = n, value[n] = kNever;
    if (dpp) root[t] = delta[n] > 0 ? std::sqrt(delta[n]) : 1;
  }

  void start(i32 first) {
    for (i64 n = 0; n < N; ++n) {
      value[n] = INFINITY, seen[n] = 0;
      if (dpp) {
        delta[n] = inverse_norm[n] > 0 ? 1 : 0, weight[n] = relevance(n) * relevance(n);
        value[n] = weight[n] * delta[n];
      }
    }
    if (first >= 0) take(first, 0);
  }

  void run() {
    start(-1);
    if (!dpp) start(first_pick());
    for (int t = dpp ? 0 : 1; t < k; ++t) {
      const i32 next = next_pick(t);
      if (dpp && value[next] <= 0) return pick_rest(t);
      take(next, t);
    }
  }
};

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
