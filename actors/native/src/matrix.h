// How a weight is told of; see actors/native/matrix.py.
#pragma once

#include <cstdint>

namespace expertmesh {

// A weight [N, K].
struct Matrix {
  const void *data, *scale, *zero;
  int64_t group, scale_kind;
  int64_t row_group = 0;  // columns of a row that share a scale where rows become int8: a multiple of group, or all
  int64_t in_lanes = 0;   // not row by row, see lanes.h
};

// A weight [n, k] that is not one of a matrix per head, and its bias [n] or null.
struct Product {
  int64_t kind;
  Matrix w;
  const void* bias;
  int64_t n, k;
};

}  // namespace expertmesh
