// ternary_matmul on damaged weights, for a build with AddressSanitizer: every buffer is a block of its own and exactly as large
// as promised. Arguments: rounds, then prefix:R:C:levels of whole weights, each in the files <prefix>.data, .tiles and .base.
#include "ops/ternary_matmul.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/cpu/parallel.h"

namespace effvlm {

[[noreturn]] void fail(const char*, ...) { throw std::runtime_error("refused"); }
void parallel_run(std::int64_t count, std::int64_t, int, ParallelBody body, void* context) {
  if (count) body(context, 0, count, 0);
}

}  // namespace effvlm

namespace {

using namespace effvlm;
using Words = std::vector<std::uint32_t>;

struct Weight {
  int R, C, levels;
  Words data, tiles, base;
};

Words slurp(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  Words words(static_cast<std::size_t>(file.tellg()) / 4);
  file.seekg(0).read(reinterpret_cast<char*>(words.data()), static_cast<std::streamsize>(4 * words.size()));
  return words;
}

Weight read_weight(const std::string& argument) {
  std::stringstream parts(argument);
  std::string prefix, R, C, levels;
  std::getline(parts, prefix, ':'), std::getline(parts, R, ':'), std::getline(parts, C, ':'), std::getline(parts, levels);
  return {std::stoi(R),           std::stoi(C), std::stoi(levels), slurp(prefix + ".data"), slurp(prefix + ".tiles"),
          slurp(prefix + ".base")};
}

// Some bits flipped, or whole words replaced, mostly in the data.
void damage(Weight& w, std::mt19937& random) {
  for (unsigned hits = 1 + random() % 4; hits; --hits) {
    const unsigned which = random() % 10;
    Words& words = which < 6 ? w.data : which < 9 ? w.tiles : w.base;
    std::uint32_t& word = words[random() % words.size()];
    word = random() % 2 ? word ^ 1u << random() % 32 : static_cast<std::uint32_t>(random());
  }
}

void multiply(const Weight& w, std::mt19937& random) {
  TernaryMatmulArgs a{};
  a.T = random() % 2 ? 1 : 5 + random() % 40, a.K = 1, a.dtype = Dtype::f32, a.int8 = random() % 2;
  std::vector<float> x(a.T * w.C), out(a.T * w.R);
  std::vector<std::int64_t> ids(a.T);
  std::vector<bf16> scale(w.R);
  for (float& value : x) value = static_cast<float>(static_cast<int>(random() % 2001) - 1000);
  a.x = x.data(), a.x_stride_t = w.C, a.x_stride_c = 1, a.ids = ids.data(), a.ids_stride_t = 1;
  a.weight = {1, w.R, w.C, w.levels, w.data.data(), static_cast<std::int64_t>(w.data.size()), w.tiles.data(), w.base.data()};
  a.scale = scale.data(), a.scale_stride_r = 1, a.out = out.data(), a.threads = 1;
  a.workspace_bytes = TernaryMatmulLayout(a).bytes;
  void* workspace = std::aligned_alloc(64, (a.workspace_bytes + 63) / 64 * 64);
  a.workspace = workspace;
  try {
    EFFVLM_ISA::ternary_matmul_cpu(a);
  } catch (...) {
    std::free(workspace);
    throw;
  }
  std::free(workspace);
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<Weight> whole;
  for (int i = 2; i < count; ++i) whole.push_back(read_weight(arguments[i]));
  std::mt19937 random(0);
  int ran = 0, refused = 0;
  for (int round = 0; round < std::atoi(arguments[1]); ++round) {
    Weight w = whole[random() % whole.size()];
    if (round % 16) damage(w, random);
    try {
      multiply(w, random), ++ran;
    } catch (const std::runtime_error&) {
      if (round % 16 == 0) return std::puts("undamaged weights were refused"), 1;
      ++refused;
    }
  }
  std::printf("%d %d\n", ran, refused);
}
