// Rows on their way between the device and the host's memory, in pieces.
#pragma once

#include <algorithm>
#include <vector>

#include "core/shard.h"
#include "cuda/platform.h"

namespace fiited::device {

// Bytes of rows that are staged at a time; emulated, so few that every test goes over their end.
constexpr int64_t kStagedBytes = kEmulated ? 4096 : int64_t{64} << 20;

// A piece of rows on the device, as kernels see it.
struct StagedRows {
  HeldRows rows;
  const int64_t* value_starts;  // of each row's vector among `values`, in numbers
  const int64_t* state_starts;
};

// Calls visit(first, count, rows) for one piece after the other of `n` rows of the host's.
template <class Visit>
void in_pieces(const RowLayout& layout, int64_t n, const HeldRows& rows, const Visit& visit) {
  const int64_t most = std::max<int64_t>(1, kStagedBytes / layout.stride(layout.chunks));
  HeldRows piece = rows;
  for (int64_t first = 0; first < n; first += most) {
    const int64_t count = std::min(most, n - first);
    visit(first, count, piece);
    const Numbers taken = numbers_of(layout, count, piece.widths);
    piece = piece.behind(count, taken.values * layout.value_bytes, taken.state);
  }
}

// The memory of a piece on the device, and the rows of the host that it stands for.
class Staged {
 public:
  Staged(Stream stream, const RowLayout& layout, int64_t n, const HeldRows& host)
      : begins_(layout, n, host.widths),
        stream_(stream),
        value_bytes_(layout.value_bytes),
        n_(n),
        host_(host),
        raw_ids_(stream, n),
        tables_(stream, n),
        widths_(stream, n),
        importance_(stream, n),
        values_(stream, begins_.values.back() * layout.value_bytes),
        state_(stream, begins_.state.back()),
        value_starts_(stream, n + 1),
        state_starts_(stream, n + 1) {
    upload(stream_, value_starts_.get(), begins_.values.data(), n + 1);
    upload(stream_, state_starts_.get(), begins_.state.data(), n + 1);
  }

  StagedRows rows() const {
    return {{raw_ids_.get(), tables_.get(), widths_.get(), importance_.get(), values_.get(), state_.get()},
            value_starts_.get(),
            state_starts_.get()};
  }
  // Widths, which the host knows beforehand, do not come back.
  void to_host() const {
    read_back(stream_, raw_ids_.get(), host_.raw_ids, n_);
    read_back(stream_, tables_.get(), host_.tables, n_);
    read_back(stream_, importance_.get(), host_.importance, n_);
    read_back(stream_, values_.get(), static_cast<std::byte*>(host_.values), begins_.values.back() * value_bytes_);
    read_back(stream_, state_.get(), host_.state, begins_.state.back());
  }
  void to_device() const {
    upload(stream_, raw_ids_.get(), host_.raw_ids, n_);
    upload(stream_, tables_.get(), host_.tables, n_);
    upload(stream_, widths_.get(), host_.widths, n_);
    upload(stream_, importance_.get(), host_.importance, n_);
    upload(stream_, values_.get(), static_cast<const std::byte*>(host_.values), begins_.values.back() * value_bytes_);
    upload(stream_, state_.get(), host_.state, begins_.state.back());
  }

 private:
  Begins begins_;
  Stream stream_;
  int value_bytes_;
  int64_t n_;
  HeldRows host_;
  Scratch<int64_t> raw_ids_;
  Scratch<int32_t> tables_;
  Scratch<uint8_t> widths_;
  Scratch<float> importance_;
  Scratch<std::byte> values_;
  Scratch<float> state_;
  Scratch<int64_t> value_starts_, state_starts_;
};

}  // namespace fiited::device
