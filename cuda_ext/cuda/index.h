// The device's index as the host keeps it: partitions of lines, in memory of their own, that grow and shrink as those of cpu/index.h.
#pragma once

#include <vector>

#include "core/line.h"
#include "cpu/index.h"
#include "cpu/memory.h"
#include "cuda/platform.h"
#include "cuda/view.h"

namespace fiited::device {

// Partitions that are rebuilt together.
constexpr int kTogether = 32;
struct Rebuilt {
  Part old, fresh;
  int64_t first_line, first_slot;  // among the new lines, and the old slots, of all
};
struct RebuiltTogether {
  Rebuilt at[kTogether];
  int count = 0;

  // The last that begins at `number` or before.
  FIITED_DEVICE int find(int64_t number, int64_t Rebuilt::* first) const {
    return bisect(count, [&](int one) { return at[one].*first <= number; }) - 1;
  }
};

class DeviceIndex {
 public:
  DeviceIndex(Stream stream, Memory& ledger, int partitions_log2)
      : ledger_(ledger), parts_(size_t{1} << partitions_log2), on_device_(stream, int64_t{1} << partitions_log2), last_stream_(stream) {
    show(stream);
  }
  ~DeviceIndex() {
    for (Part& part : parts_) give(last_stream_, part);
  }
  DeviceIndex(const DeviceIndex&) = delete;
  DeviceIndex& operator=(const DeviceIndex&) = delete;

  const Part* parts() const { return on_device_.get(); }
  int64_t bytes() const { return line_bytes_ + static_cast<int64_t>(parts_.size() * sizeof(Part)); }
  int partitions() const { return static_cast<int>(parts_.size()); }

  // Makes room for `more[p]` entries more in each partition. They are counted as there.
  void reserve(Stream stream, const View& view, const uint32_t* more) {
    for (int p = 0; p < partitions(); ++p) {
      if (more[p] == 0) continue;
      Part& part = parts_[p];
      const uint32_t lines = grown_lines(part.size, uint64_t{part.count} + more[p], parts_.size());
      if (lines > part.size) rebuild_soon(stream, view, part, lines);
      part.count += more[p];
    }
    rebuild(stream, view);
    show(stream);
  }

  // Takes `less[p]` entries, which are erased, off each partition's count, and gives back the lines they have left over.
  void shrink(Stream stream, const View& view, const uint32_t* less) {
    for (int p = 0; p < partitions(); ++p) {
      Part& part = parts_[p];
      part.count -= less[p];
      const uint32_t lines = shrunk_lines(part.size, part.count, parts_.size());
      if (lines == 0) {
        give(stream, part);
      } else if (lines < part.size) {
        rebuild_soon(stream, view, part, lines);
      }
    }
    rebuild(stream, view);
    show(stream);
  }

  // Takes the memory for a partition's new lines, and fills them when several have come together: one by one would keep the device waiting,
  // all at once would take the index's memory twice.
  void rebuild_soon(Stream stream, const View& view, Part& part, uint32_t lines) {
    const size_t bytes = lines * sizeof(Line);
    const auto charged = static_cast<int64_t>(Memory::rounded(bytes));
    if (coming_.count == kTogether) rebuild(stream, view);
    if (!ledger_.charge(charged)) {
      rebuild(stream, view);  // which gives some back
      if (!ledger_.charge(charged)) throw std::runtime_error("fiited: the index has outgrown its plan");
    }
    auto* fresh = static_cast<Line*>(allocate(stream, bytes));
    if (fresh == nullptr) throw std::runtime_error("fiited: the device has no memory left for the index");
    line_bytes_ += charged;
    Rebuilt& next = coming_.at[coming_.count];
    next.old = part;
    next.fresh.lines = fresh;
    next.fresh.size = lines;
    of_coming_[coming_.count++] = &part;
  }

  // Of those that have come together; nvcc wants kernels' lambdas in public functions.
  void rebuild(Stream stream, const View& view) {
    if (coming_.count == 0) return;
    int64_t lines = 0;
    int64_t slots = 0;
    for (int at = 0; at < coming_.count; ++at) {
      coming_.at[at].first_line = lines;
      coming_.at[at].first_slot = slots;
      lines += coming_.at[at].fresh.size;
      slots += int64_t{coming_.at[at].old.size} * kSlots;
    }
    launch(stream, lines, [all = coming_] FIITED_KERNEL(int64_t at) {
      const Rebuilt& one = all.at[all.find(at, &Rebuilt::first_line)];
      one.fresh.lines[at - one.first_line] = Line{};
    });
    launch(stream, slots, [view, all = coming_] FIITED_KERNEL(int64_t at) {
      const Rebuilt& one = all.at[all.find(at, &Rebuilt::first_slot)];
      const int64_t slot = at - one.first_slot;
      const Line& line = one.old.lines[slot / kSlots];
      const uint32_t address = line.address[slot % kSlots];
      if (line.tag[slot % kSlots]) put_in_part(one.fresh, view.header(address).key, address);
    });
    for (int at = 0; at < coming_.count; ++at) {
      Part& part = *of_coming_[at];
      const uint32_t count = part.count;
      Part old = coming_.at[at].old;
      give(stream, old);
      part = coming_.at[at].fresh;
      part.count = count;
    }
    coming_.count = 0;
  }

 private:
  void show(Stream stream) {
    last_stream_ = stream;
    upload(stream, on_device_.get(), parts_.data(), partitions());
  }

  void give(Stream stream, Part& part) {
    if (part.lines == nullptr) return;
    const auto bytes = static_cast<int64_t>(Memory::rounded(part.size * sizeof(Line)));
    ledger_.charge(-bytes);
    line_bytes_ -= bytes;
    release(stream, part.lines);
    part = Part{};
  }

  Memory& ledger_;
  std::vector<Part> parts_;
  Scratch<Part> on_device_;
  Stream last_stream_;
  int64_t line_bytes_ = 0;
  RebuiltTogether coming_;
  Part* of_coming_[kTogether];
};

}  // namespace fiited::device
