// What a store in the CPU's memory holds, whatever its rows are stored in: memory, index, pools, sketch and counts; how it is counted and
// checked (cpu/rows.cpp), saved and loaded (cpu/saving.cpp). What learns is in cpu/shard.cpp.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "core/importance.h"
#include "cpu/distinct.h"
#include "cpu/index.h"
#include "cpu/memory.h"
#include "cpu/parallel.h"
#include "cpu/pools.h"
#include "cpu/shard.h"
#include "cpu/sketch.h"

namespace fiited {

constexpr int64_t kKeysPerTask = 2048;
constexpr int64_t kInsertedPerTask = 512;

class ShardRows : public CpuShard {
 public:
  ~ShardRows() override { memory_.give(cells_, config_.sketch_bytes()); }

  void set_limit(int64_t bytes) override;
  int64_t first_moved(int64_t n, const uint32_t* addresses, const uint8_t* widths) const override {
    int64_t i = 0;
    while (i < n && pools_.fits(addresses[i], widths[i])) ++i;
    return i;
  }
  void histogram(int64_t* out) const override;
  ShardStats stats() override;
  void rows_by_width(int64_t* out) const override { std::copy(rows_by_.begin(), rows_by_.end(), out); }
  void check() const override;

  std::vector<uint32_t> addresses_in(uint32_t first_bucket, uint32_t end_bucket) const override;
  Listed changed(bool all) override;
  void widths_at(int64_t n, const uint32_t* addresses, uint8_t* widths) const override;
  void take(int64_t n, const uint32_t* addresses, const HeldRows& out) const override;
  ShardState state() const override;
  void sketch(uint16_t* cells, uint8_t* registers) const override;
  void reserve(const std::vector<int64_t>& rows_by_width) override;
  void put(int64_t n, const HeldRows& rows, const uint32_t* addresses) override;
  void put_sketch(uint32_t first_bucket, uint32_t buckets, const uint16_t* cells, int base, const uint8_t* registers) override;
  void seal() override;

 protected:
  explicit ShardRows(const ShardConfig& config);

  struct KeyAt {
    const Pools* pools;
    uint64_t operator()(uint32_t address) const { return pools->header(address).key; }
    void prefetch(uint32_t address) const { pools->prefetch_header(address); }
  };
  KeyAt key_at() const { return {&pools_}; }

  bool is_row(uint32_t address, uint64_t key, uint16_t table) const {
    const RowHeader& header = pools_.header(address);
    return header.key == key && header.table == table;
  }
  uint32_t find(uint64_t key, uint16_t table) const {
    return index_.find(key, [&](uint32_t address) { return is_row(address, key, table); });
  }

  // visit(address, header) for each row, by width and position.
  template <class Visit>
  void for_each_row(Visit&& visit) const {
    for (int width = 1; width <= layout_.chunks; ++width) {
      for (uint32_t at = 0; at < pools_.count(width); ++at) {
        const uint32_t address = pools_.address_of(width, at);
        visit(address, pools_.header(address));
      }
    }
  }

  // Visits each i in [0, n), which has the key `key(i)`: each of several tasks those of its own partitions of the index, in rising order,
  // with a visitor that `prepare()` makes for it. The partitions' lines are fetched ahead, so that visitors may insert.
  template <class Key, class Prepare>
  void for_each_by_partition(int64_t n, Key&& key, Prepare&& prepare) {
    const auto most = std::min<int64_t>(threads.count(), index_.most_tasks());
    const auto tasks = static_cast<uint32_t>(std::clamp<int64_t>(n / kInsertedPerTask, 1, most));
    for_each_task(tasks, [&](int64_t task) {
      auto visit = prepare();
      for (int64_t i = 0; i < n; ++i) {
        if (i + kInFlight < n) index_.prefetch(key(i + kInFlight));
        if (index_.task_of(key(i), tasks) == task) visit(i);
      }
    });
  }

  void require_no_rows(const char* what) const;
  std::string name_of(uint32_t address) const;
  void check_row(uint32_t address) const;

  Memory memory_;
  Index index_;
  Pools pools_;
  uint16_t* cells_;
  Sketch sketch_;
  DistinctCounter distinct_;
  std::vector<TableSalt> salts_;
  std::vector<int64_t> rows_by_;
};

}  // namespace fiited
