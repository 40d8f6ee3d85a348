// What a gate is called with: the struct of actors/native/gate.py, in the same order.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace expertmesh {

// See GateSpec in actors/model/spec.py. Types: 0 fp32, 1 bf16. Scores and choices are fp32.
struct Gate {
  Product weight;    // [experts, d], of the logits' type
  const void* bias;  // [experts], added to the scores for choosing only, of the logits' type, or null
  int64_t logits_type, weights_type, top_k, n_group, topk_group;
  int64_t softmax, best_two, normalise;  // yes or no
  double masked, epsilon, scale;
};

}  // namespace expertmesh
