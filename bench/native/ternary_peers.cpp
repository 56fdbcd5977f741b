// What a sub-1-bit ternary product is compared with, each as fast as we can make it on AVX-512 (VNNI, VBMI, BF16), and plain
// loops elsewhere: dense bfloat16, dense 2-bit, and the dictionary code of QMoE (arXiv 2310.16795), written from its description.
//
// All take tokens x (T, C) and compute out (T, K, R) = weights[ids[t, k]] · x[t]. An expert's dense weights are read once for all
// of its tokens; the dictionary code decodes them anew for every token, as published.

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <queue>
#include <vector>

#include "ternary_peers_kernels.h"

struct Call {  // the same in bench/ternary_peers.py
  const float* x;
  const int64_t* ids;
  float* out;
  int64_t tokens, choices, experts, rows, columns, threads;
};

namespace {

constexpr int64_t kPartRows = 32;  // what a thread takes at a time
constexpr int64_t kSlack = 64;     // zeros behind a token: a codeword's window may reach beyond the row
constexpr int kCodes = 1 << 16;
constexpr double kZeros = .885;  // the share of zeros that the dictionary is made for

// Threads of torch's OpenMP runtime, found by name as in csrc/core/cpu/parallel.cpp: those are awake already.
template <class Body>
void parallel(int64_t count, int64_t threads, const Body& body) {
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto run = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  struct Job {
    int64_t count;
    const Body& body;
    std::atomic<int64_t> next{0};
  } job{count, body};
  const auto work = [](void* data) {
    Job& mine = *static_cast<Job*>(data);
    for (int64_t i; (i = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.count;) mine.body(i);
  };
  const int64_t team = std::min(threads, count);
  if (team > 1 && run) {
    run(work, &job, static_cast<unsigned>(team), 0);
  } else {
    work(&job);
  }
}

// Which (token, choice) pairs go to each expert, and the experts that have any.
struct Groups {
  std::vector<int64_t> begin, slots, used;

  explicit Groups(const Call& call) : begin(call.experts + 1), slots(call.tokens * call.choices) {
    for (std::size_t i = 0; i < slots.size(); ++i) ++begin[call.ids[i] + 1];
    for (int64_t e = 0; e < call.experts; ++e) {
      if (begin[e + 1]) used.push_back(e);
      begin[e + 1] += begin[e];
    }
    std::vector<int64_t> at(begin);
    for (std::size_t i = 0; i < slots.size(); ++i) slots[at[call.ids[i]]++] = static_cast<int64_t>(i);
  }
};

// body(expert, first row, row after the last, its slots, their number), in parallel
template <class Body>
void for_parts(const Call& call, const Body& body) {
  const Groups groups(call);
  const int64_t parts = (call.rows + kPartRows - 1) / kPartRows;
  parallel(static_cast<int64_t>(groups.used.size()) * parts, call.threads, [&](int64_t i) {
    const int64_t e = groups.used[i / parts], first = i % parts * kPartRows, begin = groups.begin[e];
    body(e, first, std::min(first + kPartRows, call.rows), &groups.slots[begin], groups.begin[e + 1] - begin);
  });
}

// Tokens as a kernel wants them, each followed by zeros. The memory is kept for the thread's next call, since a call is short.
template <class T>
struct Tokens {
  T* data;
  int64_t stride;
  std::vector<float> scale;
  std::vector<std::int32_t> sum;

  template <class Convert>  // (token's values, how many, where to, its scale, its sum)
  Tokens(const Call& call, const Convert& convert) : scale(call.tokens), sum(call.tokens) {
    thread_local std::vector<T> kept;
    stride = (call.columns + kBlock - 1) / kBlock * kBlock + kSlack;
    kept.resize(std::max<std::size_t>(kept.size(), stride * call.tokens + kSlack));
    void* memory = kept.data();
    std::size_t room = kept.size() * sizeof(T);
    data = static_cast<T*>(std::align(64, stride * call.tokens * sizeof(T), memory, room));
    parallel(call.tokens, call.tokens > 4 ? call.threads : 1, [&](int64_t t) {
      T* row = data + t * stride;
      std::fill(row + call.columns, row + stride, T{});
      convert(call.x + t * call.columns, call.columns, row, scale[t], sum[t]);
    });
  }
};

// One part of a dense product: `kernels[n - 1]` multiplies n tokens, `store(slot, row, sum)` takes what comes out.
template <class Weight, class Value, class Kernels, class Store>
void for_tiles(const Weight* weights, int64_t stride, int64_t length, const Tokens<Value>& tokens, int64_t choices, int64_t first,
               int64_t last, const int64_t* slots, int64_t count, const Kernels& kernels, const Store& store) {
  Tile<Weight, Value> tile{{}, {}, length};
  for (int64_t s = 0; s < count; s += kTokens) {
    const int64_t n = std::min<int64_t>(kTokens, count - s);
    for (int64_t j = 0; j < n; ++j) tile.x[j] = tokens.data + slots[s + j] / choices * tokens.stride;
    for (int64_t r = first; r < last; r += kRows) {
      for (int i = 0; i < kRows; ++i) tile.weights[i] = weights + std::min(r + i, last - 1) * stride;
      const auto sums = kernels[n - 1](tile);
      for (int64_t i = 0; i < std::min<int64_t>(kRows, last - r); ++i)
        for (int64_t j = 0; j < n; ++j) store(slots[s + j], r + i, sums[i][j]);
    }
  }
}

// The dictionary: the 65,536 most probable strings of 1 to 14 pairs of trits. Every prefix of a string is one, too.
class Dictionary {
 public:
  std::vector<std::array<std::int32_t, 9>> next;  // trie, by node and pair; a node is its code + 1, 0 the root, -1 none
  std::uint64_t* signs;                           // 28 trits in two bits each: 0, 1, or 2 for -1; in the top byte their number
  std::uint64_t* planes;                          // the same as 28 bits that tell 1, 28 bits that tell -1, and the number

  Dictionary() {
    constexpr std::size_t kHuge = 2 << 20;  // both tables in one huge page where there are any: every lookup is somewhere else
    signs = static_cast<std::uint64_t*>(std::aligned_alloc(kHuge, kHuge));
#ifdef MADV_HUGEPAGE
    madvise(signs, kHuge, MADV_HUGEPAGE);
#endif
    planes = signs + kCodes;
    next.push_back(leaf());
    grow(String{}, 0);
    for (int code = 0; code < kCodes; ++code) {
      const String best = strings_.top();
      strings_.pop();
      next[best.parent][best.pair] = code + 1;
      next.push_back(leaf());
      const std::uint64_t length = std::uint64_t(2 * best.pairs) << 56;
      signs[code] = best.signs | length;
      planes[code] = best.planes | length;
      if (2 * best.pairs < kLongest) grow(best, code + 1);
    }
    strings_ = {};
  }

 private:
  struct String {
    double log_probability = 0;
    int pairs = 0, zeros = 0, order = 0, parent = 0, pair = 0;
    std::uint64_t signs = 0, planes = 0;

    bool operator<(const String& other) const {  // among equals the older first: a code means the same everywhere
      return log_probability < other.log_probability || (log_probability == other.log_probability && order > other.order);
    }
  };
  std::priority_queue<String> strings_;
  int made_ = 0;

  static std::array<std::int32_t, 9> leaf() { return {-1, -1, -1, -1, -1, -1, -1, -1, -1}; }

  void grow(const String& string, int node) {
    for (int pair = 0; pair < 9; ++pair) {
      String longer = string;
      int at = 2 * string.pairs;
      for (const int trit : {pair % 3, pair / 3}) {
        longer.zeros += trit == 0;
        longer.signs |= std::uint64_t(trit) << 2 * at;
        if (trit) longer.planes |= std::uint64_t{1} << (trit == 1 ? at : kLongest + at);
        ++at;
      }
      longer.pairs = string.pairs + 1;
      longer.log_probability = longer.zeros * std::log(kZeros) + (2 * longer.pairs - longer.zeros) * std::log((1 - kZeros) / 2);
      longer.order = made_++;
      longer.parent = node;
      longer.pair = pair;
      strings_.push(longer);
    }
  }
};

const Dictionary& dictionary() {
  static const Dictionary made;
  return made;
}

template <class Row>  // (codewords, their end, token, row) → result
void each_code_row(const Call& call, const std::uint16_t* codes, const std::int32_t* offsets, const Row& row) {
  for_parts(call, [&](int64_t e, int64_t first, int64_t last, const int64_t* slots, int64_t count) {
    for (int64_t s = 0; s < count; ++s)
      for (int64_t r = first, at = e * call.rows + first; r < last; ++r, ++at)
        call.out[slots[s] * call.rows + r] = row(codes + offsets[at], codes + offsets[at + 1], slots[s] / call.choices, at);
  });
}

}  // namespace

extern "C" {

// Weights (E, R, stride), zeros behind the columns.
void peer_bf16(const Call& call, const std::uint16_t* weights, int64_t stride) {
  const Tokens<std::uint16_t> tokens(call, to_bf16);
  const auto kernels = {bf16_tile<1>, bf16_tile<2>, bf16_tile<3>, bf16_tile<4>};
  for_parts(call, [&](int64_t e, int64_t first, int64_t last, const int64_t* slots, int64_t count) {
    for_tiles(weights + e * call.rows * stride, stride, stride, tokens, call.choices, first, last, slots, count, kernels.begin(),
              [&](int64_t slot, int64_t r, float sum) { call.out[slot * call.rows + r] = sum; });
  });
}

// Weights (E, R, blocks of 64 bytes) as trit + 1, scales (E, R).
void peer_two_bit(const Call& call, const std::uint8_t* weights, const float* scales) {
  const Tokens<std::int8_t> tokens(call, to_int8);
  const auto kernels = {crumbs_tile<1>, crumbs_tile<2>, crumbs_tile<3>, crumbs_tile<4>};
  const int64_t length = (call.columns + kBlock - 1) / kBlock * kBlock;
  for_parts(call, [&](int64_t e, int64_t first, int64_t last, const int64_t* slots, int64_t count) {
    for_tiles(weights + e * call.rows * length / 4, length / 4, length, tokens, call.choices, first, last, slots, count,
              kernels.begin(), [&](int64_t slot, int64_t r, std::int32_t sum) {
                const int64_t t = slot / call.choices;
                const float scale = scales[e * call.rows + r] * tokens.scale[t];
                call.out[slot * call.rows + r] = static_cast<float>(sum - tokens.sum[t]) * scale;
              });
  });
}

// `offsets` (E · R + 1) into codes; `levels` (E, R, 2): what -1 and 1 stand for, in bfloat16.
void peer_codes_f32(const Call& call, const std::uint16_t* codes, const std::int32_t* offsets, const std::uint16_t* levels) {
  const auto same = [](const float* x, int64_t count, float* out, float&, std::int32_t&) { std::copy(x, x + count, out); };
  const Tokens<float> tokens(call, same);
  const std::uint64_t* signs = dictionary().signs;
  each_code_row(call, codes, offsets, [&](const std::uint16_t* code, const std::uint16_t* end, int64_t t, int64_t row) {
    return codes_f32(signs, code, end, tokens.data + t * tokens.stride, wide(levels[2 * row]), wide(levels[2 * row + 1]));
  });
}

void peer_codes_int8(const Call& call, const std::uint16_t* codes, const std::int32_t* offsets, const std::uint16_t* levels) {
  const Tokens<std::int8_t> tokens(call, to_int8);
  const std::uint64_t* planes = dictionary().planes;
  each_code_row(call, codes, offsets, [&](const std::uint16_t* code, const std::uint16_t* end, int64_t t, int64_t row) {
    const auto [plus, minus] = codes_int8(planes, code, end, tokens.data + t * tokens.stride);
    const float low = wide(levels[2 * row]), high = wide(levels[2 * row + 1]);
    return tokens.scale[t] * (static_cast<float>(plus) * high + static_cast<float>(minus) * low);
  });
}

// Greedy: the longest string of the dictionary, again and again; an odd last column is paired with a zero. Returns the number of
// codes; `codes` has room for half as many as there are trits, rounded up in each row, `offsets` (rows + 1) counts from 0.
int64_t peer_encode(const std::int8_t* trits, int64_t rows, int64_t columns, std::uint16_t* codes, std::int32_t* offsets) {
  const auto& next = dictionary().next;
  const auto symbol = [](std::int8_t trit) { return trit < 0 ? 2 : int{trit}; };
  std::uint16_t* end = codes;
  for (int64_t r = 0; r < rows; ++r) {
    *offsets++ = static_cast<std::int32_t>(end - codes);
    int node = 0;
    for (int64_t c = 0; c < columns; c += 2) {
      const int pair = symbol(trits[c]) + 3 * (c + 1 < columns ? symbol(trits[c + 1]) : 0);
      if (next[node][pair] < 0) {
        *end++ = static_cast<std::uint16_t>(node - 1);
        node = 0;
      }
      node = next[node][pair];
    }
    if (node) *end++ = static_cast<std::uint16_t>(node - 1);
    trits += columns;
  }
  *offsets = static_cast<std::int32_t>(end - codes);
  return end - codes;
}

}  // extern "C"
