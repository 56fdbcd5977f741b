// One decay per head and step, no delta rule, in chunks. Part of chunk_scan_cpu.cpp.
#pragma once
#include "ops/chunk_scan_steps.h"

namespace effvlm::EFFVLM_ISA {
namespace {

template <class T>
void scan_decay(const ChunkScanArgs& a, const Head& head, float* scratch) {
  scan_steps<T>(a, head, scratch);
}

}  // namespace
}  // namespace effvlm::EFFVLM_ISA
