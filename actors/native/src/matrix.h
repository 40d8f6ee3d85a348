// How a weight is told of; see actors/native/matrix.py.
#pragma once

#include <cstdint>

namespace expertmesh {

// A weight [N, K].
struct Matrix {
  const void *data, *scale, *zero;
  int64_t group, scale_kind;
};

}  // namespace expertmesh
