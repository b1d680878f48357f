// DLRM's interaction: the dot products of all pairs of a row's vectors, and their derivative.
#pragma once

#include <cstdint>

namespace fiited {

// Shape of an interaction. A row has vectors_in vectors of dim numbers and, with `below`, one more before them.
struct Interaction {
  int64_t batch;
  int vectors_in;
  int dim;
  const float* below;    // [batch, dim], or null
  const float* vectors;  // [batch, vectors_in, dim]

  int vectors_all() const { return vectors_in + (below != nullptr); }
  int pairs() const { return vectors_all() * (vectors_all() - 1) / 2; }
  int width() const { return pairs() + (below != nullptr ? dim : 0); }  // numbers that the interaction gives for a row
};

// out [batch, columns]: `below` itself, the products of vector i with j < i, i rising, then zeros up to `columns`.
void interact(const Interaction& shape, int columns, float* out);

// grad_out [batch, columns] -> grad_below [batch, dim] (where there is one) and grad_vectors [batch, vectors_in, dim].
void interact_backward(const Interaction& shape, int columns, const float* grad_out, float* grad_below, float* grad_vectors);

}  // namespace fiited
