// by_dtype: run-time element type -> compile-time type tag. A new type is one line here and an entry in the specs.
#pragma once
#include "core/check.h"
#include "core/dtype.h"

#ifndef EFFVLM_ISA  // files compiled once (bindings, CUDA) rather than once per ISA level
#define EFFVLM_ISA base
#endif

// Templates that several ISA levels instantiate sit in a namespace of that level: the linker merges equal weak symbols,
// and would otherwise be free to give an AVX-512 copy to everyone.
namespace effvlm::EFFVLM_ISA {

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<float>{}), f(Type<f16>{}) or f(Type<bf16>{}).
template <class F>
decltype(auto) by_float_dtype(const char* op, Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::f32: return f(Type<float>{});
    case Dtype::f16: return f(Type<f16>{});
    case Dtype::bf16: return f(Type<bf16>{});
    default: fail("%s: expected float32, float16 or bfloat16, got dtype code %d", op, static_cast<int>(dtype));
  }
}

}  // namespace effvlm::EFFVLM_ISA
