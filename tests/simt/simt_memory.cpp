// What a kernel may touch, and the checks at every access: bounds, unwritten bytes, races. The compiler calls the functions at
// the end.
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <utility>

#include "simt_block.h"

namespace simt {
namespace {

struct Region {
  std::uintptr_t end;
  std::string name;
  bool writable;
  std::vector<bool> written;  // per byte, of outputs and workspace; empty: readable from the start
};
std::map<std::uintptr_t, Region> regions;  // by first address; changed only between launches
std::mutex region_mutex;

constexpr int kShards = 64;
struct Shard {
  std::mutex mutex;
  std::unordered_map<std::uintptr_t, Cell> cells;
};
Shard global_cells[kShards];

class Hold {  // a lock that survives fail(), which unwinds nothing
 public:
  explicit Hold(std::mutex& mutex) {
    mutex.lock();
    block->held = &mutex;
  }
  ~Hold() { std::exchange(block->held, nullptr)->unlock(); }
};

std::string where(const Access& a) { return "thread " + std::to_string(a.thread) + " of block " + std::to_string(a.block); }

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
}  // namespace

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

void access(const void* pointer, int size, bool write, bool atomic) {
  if (!block || block->current < 0) return;  // host code of the launcher
  Fiber& fiber = block->fibers[block->current];
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  const auto stack = reinterpret_cast<std::uintptr_t>(fiber.stack.get());
  const auto frame = reinterpret_cast<std::uintptr_t>(__builtin_frame_address(0));
  if (frame < stack || frame >= stack + kStack) return;  // the scheduler, in a library function that was instrumented as well
  if (address >= stack && address < stack + kStack) return;
  if (!write && constant_data(address)) return;
  const auto arguments = reinterpret_cast<std::uintptr_t>(block->body->arguments);
  if (!write && address >= arguments && address < arguments + block->body->bytes) return;
  const Access now{launches(), block->index, block->current, fiber.block_epoch, fiber.warp_epoch, 0, atomic};
  const auto range = block->shared;
  if (address >= range.begin && address + size <= range.end) {
    shared_access(address, size, write, now);
  } else {
    global_access(address, size, write, now);
  }
  // Put the fiber aside now and then, so that values too show what a missing barrier does.
  static const bool steady = std::getenv("EFFVLM_SIMT_STEADY") != nullptr;
  if (!steady && block->random() % 61 == 0) park(Wait::no);
}

void atomic_access(const void* address, int size) {
  access(address, size, false, true);
  access(address, size, true, true);
}

void check_aligned(const void* address, int size) {
  if (reinterpret_cast<std::uintptr_t>(address) % size) fail("misaligned vector access of %d bytes at %p", size, address);
}

void forget_accesses() {
  for (Shard& shard : global_cells) shard.cells.clear();
}

// ---- for tests: what the next launches may touch ----

void allow(std::uintptr_t address, std::size_t bytes, const char* name, bool output) {
  if (!bytes) return;
  const bool empty = output && std::string(name).rfind("in place", 0) != 0;
  regions[address] = Region{address + bytes, name, output, empty ? std::vector<bool>(bytes, false) : std::vector<bool>{}};
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
