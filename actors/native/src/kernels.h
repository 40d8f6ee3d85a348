// The kernels that express calls itself; kernels.cpp says what each does.
#pragma once

#include <cstdint>

extern "C" {
int64_t expertmesh_experts(int isa, int type, int gate_up_kind, int down_kind, const void* x, const int64_t* pair_row,
                           const int64_t* pair_expert, const void* matrices, void* out, int64_t rows, int64_t pairs,
                           int64_t d, int64_t inter, int64_t n_experts, int threads);
int64_t expertmesh_combine(int isa, int kind, int weight_kind, int out_kind, const void* pieces, const void* weight,
                           void* out, int64_t n_pieces, int64_t tokens, int64_t k, int64_t d, int threads);
int64_t expertmesh_gate(int isa, int type, const void* gate, const void* x, int64_t* experts, void* weights, int64_t rows,
                        int threads);
}
