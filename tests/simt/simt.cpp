// The emulator behind simt.h: fibers, their adversarial scheduling, launches.
#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <utility>

#include "simt_block.h"

namespace simt {

thread_local Block* block =
    nullptr;  // the only thread_local here: it lives among the shared arrays, and shared_fill() leaves it alone

namespace {

constexpr int kOsThreads = 2;
std::atomic<unsigned> launched{0};
std::atomic<unsigned> seed{std::getenv("EFFVLM_SIMT_SEED") ? static_cast<unsigned>(std::atoi(std::getenv("EFFVLM_SIMT_SEED")))
                                                           : 1};

void enter() {
  block->body->call(block->body->arguments);
  block->fibers[block->current].done = true;
  swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

// ---- scheduling: one warp runs as far as it can, its lanes in random order, before the next one does ----

void release_warps(Block& b, bool& progress) {
  const int threads = static_cast<int>(b.fibers.size());
  for (int i = 0; i < threads; ++i) {
    if (b.fibers[i].done || b.fibers[i].wait != Wait::warp) continue;
    const int first = i / kWarp * kWarp;
    const unsigned mask = b.fibers[i].mask;
    bool all = true;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (first + lane >= threads || b.fibers[first + lane].done) {
        b.current = i;
        b.error = "warp operation with lane " + std::to_string(lane) + ", which is not active";
        return;
      }
      all &= b.fibers[first + lane].wait == Wait::warp && b.fibers[first + lane].mask == mask;
    }
    if (!all) continue;
    for (int lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1) b.fibers[first + lane].wait = Wait::no, ++b.fibers[first + lane].warp_epoch;
    progress = true;
  }
}

bool release_block(Block& b) {
  const auto waiting =
      std::count_if(b.fibers.begin(), b.fibers.end(), [](const Fiber& f) { return !f.done && f.wait == Wait::block; });
  if (waiting == static_cast<long>(b.fibers.size())) {
    for (Fiber& f : b.fibers) f.wait = Wait::no, ++f.block_epoch, ++f.warp_epoch;
    return true;
  }
  return false;
}

void run_block(Block& b) {
  const int threads = static_cast<int>(b.fibers.size()), warps = (threads + kWarp - 1) / kWarp;
  std::vector<int> order(warps);
  for (int w = 0; w < warps; ++w) order[w] = w;
  for (;;) {
    bool progress = false;
    std::shuffle(order.begin(), order.end(), b.random);
    for (int w : order) {
      for (bool ran = true; ran && b.error.empty();) {  // as far as this warp can get on its own
        ran = false;
        std::vector<int> lanes;
        for (int i = w * kWarp; i < std::min(threads, (w + 1) * kWarp); ++i)
          if (!b.fibers[i].done && b.fibers[i].wait == Wait::no) lanes.push_back(i);
        std::shuffle(lanes.begin(), lanes.end(), b.random);
        for (int i : lanes) {
          b.current = i;
          const unsigned x = b.place.block_dim.x, y = b.place.block_dim.y;
          b.place.thread = dim3(i % x, i / x % y, i / x / y);
          swapcontext(&b.scheduler, &b.fibers[i].context);
          ran = progress = true;
          if (!b.error.empty()) return;
        }
        release_warps(b, ran);
      }
      if (!b.error.empty()) return;
    }
    if (std::all_of(b.fibers.begin(), b.fibers.end(), [](const Fiber& f) { return f.done; })) return;
    if (release_block(b) || progress) continue;
    b.current = static_cast<int>(std::find_if(b.fibers.begin(), b.fibers.end(), [](const Fiber& f) { return !f.done; }) -
                                 b.fibers.begin());
    b.error = b.fibers[b.current].wait == Wait::block ? "__syncthreads that not every thread of the block reaches"
                                                      : "warp operation that not every lane of its mask reaches";
    return;
  }
}

void start_block(Block& b, std::uint64_t index, dim3 grid, dim3 size) {
  b.index = index;
  b.place.grid_dim = grid, b.place.block_dim = size;
  b.place.block = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
  b.random.seed(seed.load() * 7919 + static_cast<unsigned>(index));
  b.current = -1;
  shared_fill();
  for (Fiber& f : b.fibers) {
    f.done = false, f.wait = Wait::no, f.block_epoch = f.warp_epoch = f.copy_group = 0;
    f.copies.clear();
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, enter, 0);
  }
}

}  // namespace

void park(Wait why) {
  Fiber& fiber = block->fibers[block->current];
  fiber.wait = why;
  swapcontext(&fiber.context, &block->scheduler);
}
unsigned launches() { return launched.load(); }
void set_seed(unsigned value) { seed = value; }
Place here() { return block->place; }
int lane() { return block->current % kWarp; }
void sync_block() { park(Wait::block); }

void sync_warp(unsigned mask) {
  block->fibers[block->current].mask = mask;
  park(Wait::warp);
}

// Ends the running fiber: the message goes to the launcher, the fiber is never resumed.
void fail(const char* format, ...) {
  char text[400];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  block->error = text;
  if (block->held) std::exchange(block->held, nullptr)->unlock();
  setcontext(&block->scheduler);
  std::abort();
}

void launch(const char* name, dim3 grid, dim3 size, const Body& body) {
  ++launched;
  const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
  std::vector<std::uint64_t> order(blocks);
  for (std::uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::mt19937 random(seed.load());
  std::shuffle(order.begin(), order.end(), random);
  std::atomic<std::uint64_t> next{0};
  std::mutex error_mutex;
  std::string error;
  const auto work = [&] {
    Block mine;
    mine.fibers = std::vector<Fiber>(size.x * size.y * size.z);
    mine.body = &body, mine.kernel = name;
    block = &mine;
    find_shared();
    for (std::uint64_t i; (i = next++) < blocks;) {
      start_block(mine, order[i], grid, size);
      run_block(mine);
      if (mine.error.empty()) continue;
      std::lock_guard<std::mutex> lock(error_mutex);
      if (error.empty())
        error = std::string(name) + ": " + mine.error + " (thread " + std::to_string(mine.current) + " of block " +
                std::to_string(mine.index) + ")";
      next = blocks;
    }
    block = nullptr;
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < kOsThreads; ++t) threads.emplace_back(work);  // never on the caller's, whose thread_locals are not ours
  for (auto& t : threads) t.join();
  forget_accesses();
  if (!error.empty()) throw std::runtime_error(error);
}
}  // namespace simt
