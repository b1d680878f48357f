// One worker's store in a device's memory. The host keeps counts and the byte plan; rows, index lines and sketch are the device's, and what
// the host must know of a step it reads in one piece, the board.
#pragma once

#include <memory>
#include <vector>

#include "core/distinct.h"
#include "core/importance.h"
#include "core/shard.h"
#include "cpu/memory.h"
#include "cuda/api.h"
#include "cuda/faults.h"
#include "cuda/index.h"
#include "cuda/platform.h"
#include "cuda/pools.h"
#include "cuda/sums.h"
#include "cuda/view.h"

namespace fiited::device {

constexpr int kMostParts = 1024;

// What kernels tell the host.
struct Board {
  // Of one operation, which clears them first.
  uint32_t by_width[kMostChunks + 2];
  uint32_t by_part[kMostParts];
  int64_t growth;                // bytes that rows which stay are worth more
  int64_t full_from;             // first position for which there is no room
  int64_t stop;                  // not 0: the input is too short to be read
  int64_t granted;               // rows
  int64_t asked_bytes, refused;  // of absent keys worth a row
  int64_t asked;                 // absent keys
  // Since the store was made; `asked` comes before them because lookups count all three.
  int64_t lookups, hits;
  uint32_t distinct[kBuckets];  // registers, four in a word
  Faults faults;                // a copy, for the host's read
};

// Where the rows of each width begin in a list that is ordered by width.
struct Starts {
  uint32_t first[kMostChunks + 2];
};

struct StagedRows;
struct Coming;

// Rows that a list of keys gets.
struct NewRows {
  int64_t count;
  const int32_t* chosen;  // [count] positions among the keys, ordered by width
  const uint64_t* keys;
  const int32_t* tables;
  const uint8_t* widths;    // by position; null: all are of full width
  const float* importance;  // scaled, by position; null: 0
  uint32_t* addresses;      // by position, written
  uint8_t* found_widths;    // likewise; may be null
};

class DeviceShard final : public StepShard {
 public:
  explicit DeviceShard(const ShardConfig& config);
  ~DeviceShard() override;

  void use_stream(void* stream) override { stream_ = static_cast<Stream>(stream); }
  void lookup(int64_t n, const int64_t* keys, const int32_t* tables, const int32_t* counts, bool training, int64_t step, uint64_t quota,
              uint32_t* addresses, uint8_t* widths) override;
  void update(const Update& rows, const float* gradients, int64_t arrivals, const int32_t* target) override;
  void histogram(int64_t* out) const override;
  int64_t shrink(double threshold) override;
  void grow() override;
  void set_limit(int64_t bytes) override;
  ShardStats stats() override;
  void rows_by_width(int64_t* out) const override;
  void check() const override;

  std::vector<uint32_t> addresses_in(uint32_t first_bucket, uint32_t end_bucket) const override;
  Listed changed(bool all) override { return list_rows(all, true); }
  void widths_at(int64_t n, const uint32_t* addresses, uint8_t* widths) const override;
  void take(int64_t n, const uint32_t* addresses, const HeldRows& out) const override;
  ShardState state() const override;
  void sketch(uint16_t* cells, uint8_t* registers) const override;
  void restore(const ShardState& state, double threshold) override;
  void reserve(const std::vector<int64_t>& rows_by_width) override;
  void put(int64_t n, const HeldRows& rows, const uint32_t* addresses) override;
  void put_sketch(uint32_t first_bucket, uint32_t buckets, const uint16_t* cells, int base, const uint8_t* registers) override;
  void seal() override;

  int64_t read_starts(int64_t n, int64_t rows, const int32_t* take, const uint32_t* addresses, const uint8_t* widths,
                      int64_t* starts) const override;
  void read(int64_t n, const int32_t* take, const uint32_t* addresses, const int64_t* starts, float* values) const override;
  void pool(const Bags& bags, int64_t n, int64_t rows, const uint32_t* addresses, const uint8_t* widths, float* out) const override;
  void update_pooled(const Update& rows, const Bags& bags, int64_t n, const float* grad_out) override;

  // All that follows is the implementation's; nvcc wants kernels' lambdas in public functions.
  View view() const;
  int64_t room() const { return limit_ == Memory::kUnlimited ? Memory::kUnlimited : limit_ - planned_; }
  void clear_board() const;
  Board read_board() const;
  void admit(const NewRows& rows, const Board& board);
  void admit_absent(int64_t n, const int64_t* keys, const int32_t* tables, int64_t absent, int64_t step, uint64_t quota,
                    uint32_t* addresses, uint8_t* widths);
  template <class Stored>
  void fill(const NewRows& rows, const View& view, const Starts& starts) const;
  void advance(int64_t step);
  void aim_sketch();
  template <class Source>
  void update_rows(const Update& rows, const Source& source, const int32_t* starts, const GroupSums<float>& groups);
  template <class Stored, class Source>
  void learn(const Update& rows, const Source& source, const int32_t* starts, const GroupSums<float>& groups, float* gains) const;
  template <class Source>
  void win_rows(const Update& rows, const Source& source, const int32_t* starts, const GroupSums<float>& groups, const float* gains);
  template <class Stored, class Source>
  void learn_first(const Update& rows, const Source& source, const int32_t* starts, const GroupSums<float>& groups, int64_t count,
                   const int32_t* chosen, const uint32_t* addresses) const;
  void name_infinite(const Update& rows) const;
  void change_width(int width, bool growing);
  bool change_rows(int width, bool growing, uint32_t begin, uint32_t end);
  template <class Stored>
  void move_rows(const View& view, int width, uint32_t end, int64_t first, int64_t count, const uint32_t* goals, const int32_t* order,
                 const Starts& starts) const;
  void evict_rows(const View& view, int width, uint32_t end, int64_t count, const int32_t* order) const;
  void fill_holes(const View& view, int width, uint32_t begin, uint32_t end, uint32_t count, uint32_t left, const uint32_t* goals) const;
  void require_no_rows(const char* what) const;
  template <class Stored>
  void gather_rows(int64_t n, const uint32_t* addresses, const StagedRows& staged) const;
  template <class Stored>
  void put_piece(int64_t first, int64_t n, const HeldRows& host, const StagedRows& staged, const uint32_t* addresses);
  void append_rows(int64_t n, const uint8_t* widths, const std::vector<uint32_t>& more, uint32_t* addresses);
  template <class Stored>
  void inspect_rows(int64_t n, const StagedRows& staged, uint64_t* keys, const uint32_t* addresses, Coming* coming) const;
  template <class Stored>
  void scatter_rows(int64_t n, const StagedRows& staged, const uint64_t* keys, const uint32_t* addresses) const;
  Listed list_rows(bool all, bool mark) const;

  Stream stream_ = nullptr;
  Memory ledger_;
  DeviceIndex index_;
  DevicePools pools_;
  uint16_t* cells_ = nullptr;
  LevelScale levels_;
  Scratch<Board> board_;
  Scratch<int64_t> rows_by_;  // [tables, chunks]
  Scratch<uint32_t> left_;    // [kMostParts] index entries erased in this round
  int64_t growth_ = 0;
  mutable Board known_{};      // the board as it was last read
  mutable bool stale_ = true;  // whether counters have moved since
};

}  // namespace fiited::device
