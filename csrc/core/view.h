// View: a tensor as a kernel sees it, pointer + sizes + strides. Strides are int64, in elements, and may be zero.
#pragma once
#include <cstdint>

#include "core/dtype.h"

namespace effvlm {

constexpr int kMaxRank = 6;
constexpr int kCpu = -1;  // View::device of host memory; CUDA devices count from 0

struct View {
  void* data = nullptr;
  std::int64_t shape[kMaxRank] = {};
  std::int64_t stride[kMaxRank] = {};
  int rank = 0;
  Dtype dtype = Dtype::f32;
  int device = kCpu;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace effvlm
