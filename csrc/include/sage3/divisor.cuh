// Division by a number that only the host knows beforehand: a multiplication. A GPU's own takes some forty instructions.
//
// After T. Granlund and P. Montgomery, Division by Invariant Integers using Multiplication (1994), for numbers below 2^31.
#pragma once

#include <cstdint>

#include "sage3/host_device.h"

namespace sage3 {

struct Divisor {
  unsigned by, multiplier;
  int shift;  // ceil(log2(by))

  explicit Divisor(unsigned by_) : by(by_), multiplier(0), shift(0) {
    while ((uint64_t(1) << shift) < by) ++shift;
    multiplier = static_cast<unsigned>(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - by)) / by + 1);
  }

  // n / by and n % by.
  SAGE3_HD unsigned divide(unsigned n, unsigned& rest) const {
    const unsigned high = static_cast<unsigned>((uint64_t(n) * multiplier) >> 32), quotient = (high + n) >> shift;
    rest = n - quotient * by;
    return quotient;
  }
};

}  // namespace sage3
