// The device's index as the host keeps it: partitions of lines, in memory of their own, that grow and shrink as those of cpu/index.h.
#pragma once

#include <vector>

#include "core/line.h"
#include "cpu/index.h"
#include "cpu/memory.h"
#include "cuda/platform.h"
#include "cuda/view.h"

namespace fiited::device {

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
      const uint32_t lines = grown_lines(part.size, uint64_t{part.count} + more[p]);
      if (lines > part.size) rebuild(stream, view, part, lines);
      part.count += more[p];
    }
    show(stream);
  }

  // Takes `less[p]` entries, which are erased, off each partition's count, and gives back the lines they have left over.
  void shrink(Stream stream, const View& view, const uint32_t* less) {
    for (int p = 0; p < partitions(); ++p) {
      Part& part = parts_[p];
      part.count -= less[p];
      const uint32_t lines = shrunk_lines(part.size, part.count);
      if (lines == 0) {
        give(stream, part);
      } else if (lines < part.size) {
        rebuild(stream, view, part, lines);
      }
    }
    show(stream);
  }

  // Of the two above; nvcc wants kernels' lambdas in public functions.
  void rebuild(Stream stream, const View& view, Part& part, uint32_t lines) {
    const size_t bytes = lines * sizeof(Line);
    if (!ledger_.charge(static_cast<int64_t>(Memory::rounded(bytes)))) throw std::runtime_error("fiited: the index has outgrown its plan");
    auto* fresh = static_cast<Line*>(allocate(stream, bytes));
    if (fresh == nullptr) throw std::runtime_error("fiited: the device has no memory left for the index");
    set_bytes(stream, fresh, 0, bytes);
    line_bytes_ += static_cast<int64_t>(Memory::rounded(bytes));
    Part larger;
    larger.lines = fresh;
    larger.size = lines;
    larger.count = part.count;
    const Part old = part;
    launch(stream, int64_t{old.size} * kSlots, [view, old, larger] FIITED_KERNEL(int64_t at) {
      const Line& line = old.lines[at / kSlots];
      const uint32_t address = line.address[at % kSlots];
      if (line.tag[at % kSlots]) put_in_part(larger, view.header(address).key, address);
    });
    give(stream, part);
    part = larger;
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
};

}  // namespace fiited::device
