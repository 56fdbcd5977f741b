#include <algorithm>
#include <type_traits>

#include "core/check.h"
#include "core/cpu/parallel.h"
#include "ops/selective_scan_tile.h"

namespace effvlm::EFFVLM_ISA {
namespace {

// A thread's part of the workspace, and the tensors it works on.
class Scanner {
 public:
  Scanner(const SelectiveScanArgs& args, const SelectiveScanLayout& layout, int thread)
      : a(args), at_(layout), base(static_cast<float*>(args.workspace) + thread * layout.thread) {}

  // Channels channel … of one batch entry or packed sequence, `blocks` vectors of them: in tiles of steps, each with all vectors.
  void in_order(i64 s, i64 channel, i64 blocks) {
    const i64 b = a.starts ? 0 : s, first = a.starts ? a.starts[s * a.starts_stride] : 0;
    const i64 last = a.starts ? a.starts[(s + 1) * a.starts_stride] : a.L;
    for (i64 block = 0; block < blocks; ++block) begin(s, 0, channel + block * kLanes, block);
    for (i64 l = first; l < last; l += kScanTile) {
      const i64 steps = std::min(kScanTile, last - l);
      read_shared(b, 0, l, 1, steps);
      for (i64 block = 0; block < blocks; ++block) {
        const i64 c = channel + block * kLanes;
        read(a.u, b, 0, c, l, 1, steps, lanes(c), u(), kLanes);
        read_dt(b, 0, c, l, steps, block);
        clear(y(), steps);
        run({steps, kLanes, dt(), u(), y()}, block);
        finish(b, c, l, steps, y());
      }
    }
    for (i64 block = 0; block < blocks; ++block) end(s, 0, channel + block * kLanes, block);
  }

  // One vector of channels along all paths. u, dt and y of all places are kept in order, where a path's rows are a stride apart.
  void along_paths(i64 b, i64 channel) {
    read(a.u, b, 0, channel, 0, 1, a.L, lanes(channel), u(), kLanes);
    clear(y(), a.L);
    for (i64 k = 0; k < a.K; ++k) {
      begin(b, k, channel, 0);
      read_dt(b, k, channel, 0, a.L, 0);
      const ScanPath path = joined(a.paths[k]);
      for (i64 o = 0; o < path.outer; ++o)
        for (i64 i = 0; i < path.inner; i += kScanTile) {
          const i64 steps = std::min(kScanTile, path.inner - i);
          const i64 l = path.offset + o * path.outer_stride + i * path.inner_stride, row = l * kLanes;
          read_shared(b, k, l, path.inner_stride, steps);
          run({steps, path.inner_stride * kLanes, dt() + row, u() + row, y() + row}, 0);
        }
      end(b, k, channel, 0);
    }
    for (i64 l = 0; l < a.L; l += kScanTile) finish(b, channel, l, std::min(kScanTile, a.L - l), y() + l * kLanes);
  }

 private:
  // The same path as one run, where it is one.
  static ScanPath joined(ScanPath path) {
    if (path.inner == 1) return {1, path.outer, path.offset, 0, path.outer_stride};
    if (path.outer_stride == path.inner * path.inner_stride)
      return {1, path.outer * path.inner, path.offset, 0, path.inner_stride};
    return path;
  }

  static void clear(float* rows, i64 count) {
    for (i64 i = 0; i < count * kLanes; i += kLanes) store(rows + i, set1(0));
  }

  int lanes(i64 channel) const { return static_cast<int>(std::min<i64>(kLanes, a.D - channel)); }

  void begin(i64 s, i64 k, i64 c, i64 block) {
    float *state = states(block), *decay = decays(block);
    clear(state, a.N);
    clear(biases(block), 1);
    read(a.a, 0, k, c, 0, 1, a.N, lanes(c), decay, kLanes);
    for (i64 n = 0; n < a.N; ++n) store(decay + n * kLanes, load(decay + n * kLanes) * set1(1.44269504f));
    if (a.initial.data) read(a.initial, s, k, c, 0, 1, a.N, lanes(c), state, kLanes);
    if (a.skip.data) read(a.skip, 0, k, c, 0, 1, 1, lanes(c), skips(block), kLanes);
    if (a.bias.data) read(a.bias, 0, k, c, 0, 1, 1, lanes(c), biases(block), kLanes);
  }

  void end(i64 s, i64 k, i64 c, i64 block) { write(states(block), a.final, s, k, c, 0, a.N, lanes(c)); }

  // B and C of a tile, which all channels share.
  void read_shared(i64 b, i64 k, i64 l, i64 every, i64 steps) {
    for (i64 n = 0; n < a.N; n += kLanes) {
      const int count = static_cast<int>(std::min<i64>(kLanes, a.N - n));
      read(a.b, b, k, n, l, every, steps, count, base + at_.b + n, at_.pitch);
      read(a.c, b, k, n, l, every, steps, count, base + at_.c + n, at_.pitch);
    }
  }

  void read_dt(i64 b, i64 k, i64 c, i64 l, i64 steps, i64 block) {
    read(a.delta, b, k, c, l, 1, steps, lanes(c), dt(), kLanes);
    const f32v bias = load(biases(block));
    if (!a.bias.data && !a.softplus) return;
    for (float *row = dt(), *last = row + steps * kLanes; row < last; row += kLanes) {
      const f32v x = load(row) + bias;
      store(row, a.softplus ? softplus(x) : x);
    }
  }

  void run(const ScanRows& rows, i64 block) {
    scan(rows, a.N, base + at_.b, base + at_.c, at_.pitch, decays(block), a.skip.data ? skips(block) : nullptr, states(block));
  }

  void finish(i64 b, i64 c, i64 l, i64 steps, float* rows) {
    float* z = base + at_.scratch;
    if (a.z.data) {
      read(a.z, b, 0, c, l, 1, steps, lanes(c), z, kLanes);
      by_float_dtype("selective_scan", a.out.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        for (i64 i = 0; i < steps * kLanes; i += kLanes) store(rows + i, load(rows + i) * silu_for<T>(load(z + i)));
      });
    }
    write(rows, a.out, b, 0, c, l, steps, lanes(c));
  }

  float* u() const { return base + at_.u; }
  float* dt() const { return base + at_.dt; }
  float* y() const { return base + at_.y; }
  float* states(i64 block) const { return base + at_.states + block * a.N * kLanes; }
  float* decays(i64 block) const { return base + at_.decays + block * a.N * kLanes; }
  float* skips(i64 block) const { return base + at_.skips + block * kLanes; }
  float* biases(i64 block) const { return base + at_.biases + block * kLanes; }

  const SelectiveScanArgs& a;
  const SelectiveScanLayout& at_;
  float* base;
};

void check_starts(const SelectiveScanArgs& a) {
  for (i64 s = 0; s <= a.S; ++s) {
    const i64 start = a.starts[s * a.starts_stride], before = s ? a.starts[(s - 1) * a.starts_stride] : 0;
    if (start < before || (s == 0 && start != 0) || (s == a.S && start != a.L))
      fail("selective_scan: expected cu_seqlens to ascend from 0 to L = %lld, got %lld at %lld", static_cast<long long>(a.L),
           static_cast<long long>(start), static_cast<long long>(s));
  }
}

}  // namespace

void selective_scan_cpu(const SelectiveScanArgs& a) {
  if (a.starts) check_starts(a);
  const SelectiveScanLayout layout(a);
  const i64 vectors = (a.D + kLanes - 1) / kLanes;
  // As many vectors of channels to a task as leave every thread some tasks.
  const i64 blocks = std::max<i64>(1, std::min(layout.blocks, vectors * a.S / (4 * std::max(a.threads, 1))));
  const i64 groups = (vectors + blocks - 1) / blocks;
  parallel_for(a.S * groups, 1, a.threads, [&](i64 begin, i64 end, int thread) {
    Scanner scanner(a, layout, thread);
    for (i64 task = begin; task < end; ++task) {
      const i64 s = task / groups, vector = task % groups * blocks;
      if (a.in_order)
        scanner.in_order(s, vector * kLanes, std::min(blocks, vectors - vector));
      else
        scanner.along_paths(s, vector * kLanes);
    }
  });
}

}  // namespace effvlm::EFFVLM_ISA
