// The emulator behind simt.h: fibers, adversarial scheduling, and what is checked at every memory access.
#include "simt.h"

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

namespace simt {
namespace {

constexpr int kWarp = 32, kStack = 64 << 10, kOsThreads = 2;
constexpr char kPoison =
    static_cast<char>(0xfb);  // what shared memory holds before it is written: as f32, a large negative number

// ---- what a kernel may touch ----

struct Region {
  std::uintptr_t end;
  std::string name;
  bool writable;
  std::vector<bool> written;  // per byte, of outputs and workspace; empty: readable from the start
};
std::map<std::uintptr_t, Region> regions;  // by first address; changed only between launches
std::mutex region_mutex;

// ---- who touched a byte last, for races: one entry per granule of 4 bytes ----

struct Access {
  unsigned launch = 0;
  std::uint64_t block = 0;
  int thread = -1, block_epoch = 0, warp_epoch = 0;
  unsigned char bytes = 0;  // which of the granule's four
  bool atomic = false;
};
struct Cell {
  Access write, read[2];  // the last write, and the last reads by two different threads
};
constexpr int kShards = 64;
struct Shard {
  std::mutex mutex;
  std::unordered_map<std::uintptr_t, Cell> cells;
};
Shard global_cells[kShards];

// ---- fibers ----

struct Copy {  // asynchronous, of 16 bytes; it happens when its thread waits for it, the latest that CUDA allows
  std::uintptr_t to;
  unsigned char bytes[16];
  int group;
};
enum class Wait { no, block, warp };
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool done = false;
  Wait wait = Wait::no;
  unsigned mask = 0;                // of the warp operation waited for
  std::uint64_t slot = 0;           // the value it gives
  const void* published = nullptr;  // what other lanes may read during a warp operation
  int block_epoch = 0, warp_epoch = 0;
  std::vector<Copy> copies;
  int copy_group = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  int current = -1;
  std::uint64_t index = 0;
  Place place;
  const Body* body = nullptr;
  const char* kernel = "";
  std::mt19937 random;
  std::unordered_map<std::uintptr_t, Cell> shared_cells;
  std::vector<bool> shared_written;
  struct {
    std::uintptr_t begin = 0, end = 0;
  } shared;  // this OS thread's copy of the module's TLS segment
  std::string error;
  std::mutex* held = nullptr;  // what fail() must unlock
};

thread_local Block* block =
    nullptr;  // the only thread_local here: it lives in that segment too, and shared_fill() leaves it alone
std::atomic<unsigned> launches{0};
std::atomic<unsigned> seed{1};

void find_shared() {
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* data) {
        const auto mine = reinterpret_cast<std::uintptr_t>(&regions);
        bool here = false;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          const std::uintptr_t begin = info->dlpi_addr + header.p_vaddr;
          if (header.p_type == PT_LOAD && mine >= begin && mine < begin + header.p_memsz) here = true;
        }
        for (int i = 0; here && i < info->dlpi_phnum; ++i)
          if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data) {
            auto& shared = static_cast<Block*>(data)->shared;
            shared.begin = reinterpret_cast<std::uintptr_t>(info->dlpi_tls_data);
            shared.end = shared.begin + info->dlpi_phdr[i].p_memsz;
          }
        return here ? 1 : 0;
      },
      block);
}
// Fresh shared memory for a block: poison, nothing written, nobody's access.
void shared_fill() {
  const auto range = block->shared;
  const auto mine = reinterpret_cast<std::uintptr_t>(&block);
  std::memset(reinterpret_cast<void*>(range.begin), kPoison, mine - range.begin);
  std::memset(reinterpret_cast<void*>(mine + sizeof block), kPoison, range.end - mine - sizeof block);
  block->shared_cells.clear();
  block->shared_written.assign(range.end - range.begin, false);
}

class Hold {  // a lock that survives fail(), which unwinds nothing
 public:
  explicit Hold(std::mutex& mutex) {
    mutex.lock();
    block->held = &mutex;
  }
  ~Hold() { std::exchange(block->held, nullptr)->unlock(); }
};

std::string where(const Access& a) { return "thread " + std::to_string(a.thread) + " of block " + std::to_string(a.block); }

void park(Wait why) {
  Fiber& fiber = block->fibers[block->current];
  fiber.wait = why;
  swapcontext(&fiber.context, &block->scheduler);
}

bool ordered(const Access& before, const Access& now) {
  if (before.launch != now.launch || before.thread < 0) return true;
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.block_epoch < now.block_epoch) return true;
  return before.thread / kWarp == now.thread / kWarp && before.warp_epoch < now.warp_epoch;
}

void check_race(Cell& cell, const Access& now, bool write, const char* space) {
  const auto clash = [&](const Access& before, const char* did) {
    if ((before.bytes & now.bytes) && !ordered(before, now) && !(before.atomic && now.atomic))
      fail("race on %s memory: %s %s and %s %s with no barrier between them", space, where(before).c_str(), did,
           where(now).c_str(), write ? "writes" : "reads");
  };
  clash(cell.write, "writes");
  if (write) {
    clash(cell.read[0], "reads");
    clash(cell.read[1], "reads");
    cell.write = now;
  } else {
    Access& slot = cell.read[0].thread == now.thread && cell.read[0].block == now.block ? cell.read[0] : cell.read[1];
    if (&slot == &cell.read[1]) std::swap(cell.read[0], cell.read[1]);
    cell.read[0] = now;
  }
}

template <class Find>
void each_granule(std::uintptr_t address, int size, Access now, bool write, const char* space, Find&& find) {
  for (std::uintptr_t granule = address / 4; granule <= (address + size - 1) / 4; ++granule) {
    now.bytes = 0;
    for (int k = 0; k < 4; ++k)
      if (granule * 4 + k >= address && granule * 4 + k < address + size) now.bytes |= 1 << k;
    find(granule, [&](Cell& cell) { check_race(cell, now, write, space); });
  }
}

void shared_access(std::uintptr_t address, int size, bool write, const Access& now) {
  const std::uintptr_t base = block->shared.begin;
  for (int k = 0; k < size; ++k) {
    if (write) block->shared_written[address - base + k] = true;
    if (!write && !block->shared_written[address - base + k]) fail("read of shared memory that nobody has written");
  }
  each_granule(address, size, now, write, "shared",
               [](std::uintptr_t granule, auto&& check) { check(block->shared_cells[granule]); });
}

void global_access(std::uintptr_t address, int size, bool write, const Access& now) {
  {
    const Hold lock(region_mutex);
    auto at = regions.upper_bound(address);
    if (at == regions.begin() || address + size > (--at)->second.end)
      fail("out-of-bounds global %s of %d bytes at %p", write ? "write" : "read", size, reinterpret_cast<void*>(address));
    Region& region = at->second;
    if (write && !region.writable) fail("write to %s, which is an input", region.name.c_str());
    for (int k = 0; k < size && !region.written.empty(); ++k) {
      if (write) region.written[address - at->first + k] = true;
      if (!write && !region.written[address - at->first + k]) fail("read of %s before it is written", region.name.c_str());
    }
  }
  each_granule(address, size, now, write, "global", [](std::uintptr_t granule, auto&& check) {
    Shard& shard = global_cells[granule % kShards];
    const Hold lock(shard.mutex);
    check(shard.cells[granule]);
  });
}

bool constant_data(std::uintptr_t address) {  // the module's own read-only data, the kernel's arguments
  static const std::pair<std::uintptr_t, std::uintptr_t> image = [] {
    std::pair<std::uintptr_t, std::uintptr_t> range{0, 0};
    dl_iterate_phdr(
        [](dl_phdr_info* info, std::size_t, void* data) {
          auto& range = *static_cast<std::pair<std::uintptr_t, std::uintptr_t>*>(data);
          std::uintptr_t low = ~std::uintptr_t{0}, high = 0;
          for (int i = 0; i < info->dlpi_phnum; ++i)
            if (info->dlpi_phdr[i].p_type == PT_LOAD) {
              low = std::min<std::uintptr_t>(low, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
              high = std::max<std::uintptr_t>(high, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
            }
          const auto mine = reinterpret_cast<std::uintptr_t>(&regions);
          if (mine < low || mine >= high) return 0;
          range = {low, high};
          return 1;
        },
        &range);
    return range;
  }();
  return address >= image.first && address < image.second;
}

void access(const void* pointer, int size, bool write, bool atomic = false) {
  if (!block || block->current < 0) return;  // host code of the launcher
  Fiber& fiber = block->fibers[block->current];
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const auto stack = reinterpret_cast<std::uintptr_t>(fiber.stack.get());
  if (address >= stack && address < stack + kStack) return;
  if (!write && constant_data(address)) return;
  const auto arguments = reinterpret_cast<std::uintptr_t>(block->body->arguments);
  if (!write && address >= arguments && address < arguments + block->body->bytes) return;
  const Access now{launches.load(), block->index, block->current, fiber.block_epoch, fiber.warp_epoch, 0, atomic};
  const auto range = block->shared;
  if (address >= range.begin && address + size <= range.end) {
    shared_access(address, size, write, now);
  } else {
    global_access(address, size, write, now);
  }
  // Put the fiber aside now and then, so that values too show what a missing barrier does.
  if (block->random() % 61 == 0) park(Wait::no);
}

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

Place here() { return block->place; }
int lane() { return block->current % kWarp; }
void sync_block() { park(Wait::block); }

void sync_warp(unsigned mask) {
  block->fibers[block->current].mask = mask;
  park(Wait::warp);
}

std::uint64_t exchange(unsigned mask, std::uint64_t value, int from) {
  const int me = block->current, first = me / kWarp * kWarp;
  if (!(mask >> (me % kWarp) & 1)) fail("warp operation by lane %d, which its own mask leaves out", me % kWarp);
  if (!(mask >> from & 1)) fail("shuffle from lane %d, which is not in the mask", from);
  block->fibers[me].slot = value;
  sync_warp(mask);
  const std::uint64_t result = block->fibers[first + from].slot;
  sync_warp(mask);  // nobody overwrites its slot before all have read
  return result;
}

// One warp operation in which every lane sees what every other lane brought: calls use(lane → its `mine`).
template <class T, class Use>
void together(const T& mine, Use&& use) {
  const int first = block->current / kWarp * kWarp;
  block->fibers[block->current].published = &mine;
  sync_warp(0xffffffffu);
  use([first](int k) -> const T& { return *static_cast<const T*>(block->fibers[first + k].published); });
  sync_warp(0xffffffffu);  // nobody's `mine` ends before all have read
}

void load_matrices(std::uint32_t* out, const void* row) {
  struct Row {
    std::uint32_t pair[4];
  } mine;
  check_aligned(row, 16);
  access(row, 16, false);
  std::memcpy(&mine, row, 16);
  together(mine, [&](auto&& of) {
    for (int m = 0; m < 4; ++m) out[m] = of(8 * m + lane() / 4).pair[lane() % 4];
  });
}

struct Fragments {
  std::uint32_t a[4], b[2];
};
// Element (row, k) of A and (k, column) of B, for `each` values in a register: of lane 4·row + …, as mma.cuh says.
template <class Value, class T>
void multiply(T* d, const Fragments& mine, int each, Value&& value) {
  together(mine, [&](auto&& of) {
    const auto part = [&](const std::uint32_t word, int k) { return value(word, k % each); };
    for (int i = 0; i < 4; ++i) {
      const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
      for (int k = 0; k < 8 * each; ++k) {
        const int half = k / (4 * each), p = k % (4 * each) / each;
        d[i] += part(of(row % 8 * 4 + p).a[row / 8 + 2 * half], k) * part(of(column * 4 + p).b[half], k);
      }
    }
  });
}
void multiply_16x8x16(float* d, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1, bool bfloat) {
  multiply(d, Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}}, 2, [bfloat](std::uint32_t word, int k) {
    const std::uint16_t bits = static_cast<std::uint16_t>(word >> 16 * k);
    if (!bfloat) return half_to_float(bits);
    const std::uint32_t wide = std::uint32_t{bits} << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  });
}
void multiply_16x8x32(int* d, const std::uint32_t* a, std::uint32_t b0, std::uint32_t b1) {
  multiply(d, Fragments{{a[0], a[1], a[2], a[3]}, {b0, b1}}, 4,
           [](std::uint32_t word, int k) { return static_cast<int>(static_cast<std::int8_t>(word >> 8 * k)); });
}

void copy_async(void* shared, const void* global, int bytes) {
  const auto to = reinterpret_cast<std::uintptr_t>(shared);
  check_aligned(shared, 16);
  check_aligned(global, 16);
  if (to < block->shared.begin || to + 16 > block->shared.end)
    fail("asynchronous copy to %p, which is not shared memory", shared);
  if (bytes < 0 || bytes > 16) fail("asynchronous copy of %d bytes, not 0 … 16", bytes);
  access(shared, 16, true);  // from now on nobody may count on what was there
  if (bytes) access(global, bytes, false);
  Fiber& fiber = block->fibers[block->current];
  Copy copy{to, {}, fiber.copy_group};
  std::memcpy(copy.bytes, global, bytes);
  fiber.copies.push_back(copy);
  std::memset(shared, kPoison, 16);
  for (int k = 0; k < 16; ++k) block->shared_written[to - block->shared.begin + k] = false;
}
void copy_commit() { ++block->fibers[block->current].copy_group; }
void copy_wait(int pending) {
  Fiber& fiber = block->fibers[block->current];
  auto later = fiber.copies.begin();
  for (; later != fiber.copies.end() && later->group < fiber.copy_group - pending; ++later) {
    std::memcpy(reinterpret_cast<void*>(later->to), later->bytes, 16);
    access(reinterpret_cast<void*>(later->to), 16, true);
  }
  fiber.copies.erase(fiber.copies.begin(), later);
}

void atomic_access(const void* address, int size) {
  access(address, size, false, true);
  access(address, size, true, true);
}

void check_aligned(const void* address, int size) {
  if (reinterpret_cast<std::uintptr_t>(address) % size) fail("misaligned vector access of %d bytes at %p", size, address);
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
  ++launches;
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
  for (Shard& shard : global_cells) shard.cells.clear();
  if (!error.empty()) throw std::runtime_error(error);
}

float half_to_float(std::uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}
std::uint16_t float_to_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  std::uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
std::uint16_t float_to_bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<std::uint16_t>(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ---- for tests: what the next launches may touch, and how they are scheduled ----

void allow(std::uintptr_t address, std::size_t bytes, const char* name, bool output) {
  if (!bytes) return;
  regions[address] = Region{address + bytes, name, output, output ? std::vector<bool>(bytes, false) : std::vector<bool>{}};
}
std::string forget_all() {  // and the name of an output that was left unwritten, if there is one
  std::string unwritten;
  for (auto& [address, region] : regions)
    if (region.name.rfind("output", 0) == 0 &&
        std::find(region.written.begin(), region.written.end(), false) != region.written.end())
      unwritten = region.name;
  regions.clear();
  return unwritten;
}
void set_seed(unsigned value) { seed = value; }

}  // namespace simt

// ---- the functions that -fsanitize=thread calls ----
#define EFFVLM_HOOK(size)                                                                \
  extern "C" void __tsan_read##size(void* p) {                                           \
    simt::check_aligned(p, size);                                                        \
    simt::access(p, size, false);                                                        \
  }                                                                                      \
  extern "C" void __tsan_write##size(void* p) {                                          \
    simt::check_aligned(p, size);                                                        \
    simt::access(p, size, true);                                                         \
  }                                                                                      \
  extern "C" void __tsan_unaligned_read##size(void* p) { simt::access(p, size, false); } \
  extern "C" void __tsan_unaligned_write##size(void* p) { simt::access(p, size, true); } \
  extern "C" void __tsan_volatile_read##size(void* p) { simt::access(p, size, false); }  \
  extern "C" void __tsan_volatile_write##size(void* p) { simt::access(p, size, true); }
EFFVLM_HOOK(1)
EFFVLM_HOOK(2)
EFFVLM_HOOK(4)
EFFVLM_HOOK(8)
EFFVLM_HOOK(16)
extern "C" void __tsan_read_range(void* p, std::size_t size) { simt::access(p, static_cast<int>(size), false); }
extern "C" void __tsan_write_range(void* p, std::size_t size) { simt::access(p, static_cast<int>(size), true); }
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void* __tsan_memcpy(void* to, const void* from, std::size_t n) { return std::memcpy(to, from, n); }
