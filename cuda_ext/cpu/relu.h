// The derivative of a layer's ReLU, in the forms that matrix products want.
#pragma once

#include <cstdint>

namespace fiited {

// out: what relu(...) gave, [n, width]; grad: its gradient. before [n, width]: the gradient of what the ReLU was of, which is grad where
// out is above zero, or not a number; columns [width, n]: the same, transposed, where that is wanted (not null); sums [width]: over the n
// rows.
void relu_backward(int64_t n, int width, const float* grad, const float* out, float* before, float* columns, float* sums);

}  // namespace fiited
