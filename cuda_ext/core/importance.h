// A shard's view of importance: the growing scale that stands for decay, and the cuts that widths follow from.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace fiited {

// Decay without touching rows: new weight is added times a growing scale, and everything is scaled down now and then.
class Decay {
 public:
  explicit Decay(double decay) : octaves_per_step_(-std::log2(decay)) {}

  // Moves on to a step. Returns by how many octaves all importances must be scaled down, mostly 0.
  int advance(int64_t step) {
    double octaves = static_cast<double>(step) * octaves_per_step_ - lowered_;
    const int by = octaves > kLowerAt ? static_cast<int>(octaves) : 0;
    lowered_ += by;
    octaves -= by;
    scale_ = static_cast<float>(std::exp2(octaves));
    unscale_ = 1.0f / scale_;
    return by;
  }

  int64_t lowered() const { return lowered_; }  // octaves, in all
  void restore(int64_t lowered) { lowered_ = lowered; }

  float scale() const { return scale_; }
  float unscale() const { return unscale_; }

 private:
  static constexpr int kLowerAt = 16;  // octaves

  double octaves_per_step_;
  float scale_ = 1;
  float unscale_ = 1;
  int64_t lowered_ = 0;
};

// What importance must pass for each chunk; at threshold 0 everything is worth keeping, unused rows too.
inline std::vector<float> cuts_of(double threshold, const std::vector<double>& levels) {
  std::vector<float> cuts;
  for (const double level : levels) cuts.push_back(threshold == 0.0 ? -1.0f : static_cast<float>(threshold * level));
  return cuts;
}

}  // namespace fiited
