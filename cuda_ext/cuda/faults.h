// Bad input, as kernels find it: they leave it out, and note the first position of each kind for the host's next look.
#pragma once

#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/platform.h"

namespace fiited::device {

enum class Fault : int {
  kForeignKey,
  kNoTable,
  kMoved,
  kInfinite,
  kTake,
  kTarget,
  kRow,
  kWidth,
  kSize,
  kOffsetsEnds,
  kOffsetsFall,
  kCount,
};

struct Faults {
  int64_t first[static_cast<int>(Fault::kCount)];
  int64_t table, id;  // of kInfinite's; a table below 0: nobody has looked yet
};
constexpr int kFaultWords = sizeof(Faults) / sizeof(int64_t);

FIITED_DEVICE void note(Faults* faults, Fault kind, int64_t position) { atomic_min(&faults->first[static_cast<int>(kind)], position); }

constexpr int64_t kNoFault = std::numeric_limits<int64_t>::max();

inline void clear_faults(Stream stream, Faults* faults) {
  Faults none;
  for (int64_t& first : none.first) first = kNoFault;
  none.table = -1;
  upload(stream, faults, &none, 1);
}

// The device's own faults, kept as long as the process: every operation notes into them.
inline Faults* device_faults(Stream stream) {
  static std::mutex mutex;
  static std::map<int, Faults*> of_device;
  const std::lock_guard<std::mutex> lock(mutex);
  Faults*& faults = of_device[current_device()];
  if (faults == nullptr) {
    faults = static_cast<Faults*>(allocate(stream, sizeof(Faults)));
    if (faults == nullptr) throw std::runtime_error("fiited: the device has no memory left");
    clear_faults(stream, faults);
    wait(stream);  // other streams use them, too
  }
  return faults;
}

// Throws for what the host has just read, and forgets it on the device.
inline void throw_if_any(Stream stream, const Faults& faults) {
  for (int kind = 0; kind < static_cast<int>(Fault::kCount); ++kind) {
    const int64_t at = faults.first[kind];
    if (at == kNoFault) continue;
    clear_faults(stream, device_faults(stream));
    const std::string number = std::to_string(at);
    std::string message;
    switch (static_cast<Fault>(kind)) {
      case Fault::kForeignKey: message = "key " + number + " belongs to another shard"; break;
      case Fault::kNoTable: message = "the table of key " + number + " does not exist"; break;
      case Fault::kMoved: message = "row " + number + " was resized or moved since its lookup; look up again after a round"; break;
      case Fault::kInfinite:
        message = "the gradient of table " + std::to_string(faults.table) + ", id " + std::to_string(faults.id) + " is not finite";
        break;
      case Fault::kTake: message = "take " + number + " is out of range"; break;
      case Fault::kTarget: message = "target " + number + " is out of range"; break;
      case Fault::kRow: message = "lookup " + number + " names a row that is not there"; break;
      case Fault::kWidth: message = "the width of row " + number + " is more than all chunks"; break;
      case Fault::kSize: message = "values or gradients must have " + number + " elements, as the widths say"; break;
      case Fault::kOffsetsEnds: message = "offsets must begin at 0 and end at the number of lookups"; break;
      case Fault::kOffsetsFall:
        message = "offsets fall at feature " + std::to_string(at >> 32) + ", position " + std::to_string(at & 0xFFFFFFFF);
        break;
      case Fault::kCount: break;
    }
    throw std::runtime_error("fiited: " + message);
  }
}

// Whether faults are looked for after every operation, as on the CPU and emulated, or when the host next reads from the device anyway. The
// variable FIITED_CHECKS, at_once or later, says otherwise.
inline bool checks_at_once() {
  static const bool at_once = [] {
    const char* wanted = std::getenv("FIITED_CHECKS");
    return wanted == nullptr ? kEmulated : std::string(wanted) == "at_once";
  }();
  return at_once;
}

// For operations that read something back anyway: the faults beside it, as numbers.
inline void told_faults(Stream stream, int64_t* to) { copy_on_device(stream, to, device_faults(stream), sizeof(Faults)); }
inline void throw_if_told(Stream stream, const int64_t* told) {
  Faults faults;
  std::memcpy(&faults, told, sizeof(Faults));
  throw_if_any(stream, faults);
}

// For operations that read nothing back: their faults are thrown now, or by the next operation on the device that does read.
inline void check_faults(Stream stream) {
  if (checks_at_once()) throw_if_any(stream, read_one(stream, device_faults(stream)));
}

}  // namespace fiited::device
