// What the parts of the emulator share: a running block, its fibers, and who touched which byte last.
#pragma once
#include <ucontext.h>

#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "simt.h"

namespace simt {

constexpr int kWarp = 32, kStack = 64 << 10;
constexpr char kPoison =
    static_cast<char>(0xfb);  // what shared memory holds before it is written: as f32, a large negative number

// The last accesses to a granule of 4 bytes, for races.
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

extern thread_local Block* block;  // running on this OS thread; null on threads that run none

void park(Wait why);  // puts the running fiber aside
void access(const void* pointer, int size, bool write, bool atomic = false);
unsigned launches();  // so far

// simt_memory.cpp, for launches.
void find_shared();
void shared_fill();
void forget_accesses();

}  // namespace simt
