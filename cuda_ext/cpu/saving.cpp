// Rows and sketch of a store in the CPU's memory, out of it and back, for checkpoints.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>

#include "core/numeric.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fiited {

namespace {

constexpr uint32_t kRowsListed = 1 << 16;  // by a task; a multiple of 64

struct Place {  // in bytes, of a row's vector and state among those of other rows
  int64_t value = 0, state = 0;

  void pass(const RowLayout& layout, int width) {
    value += layout.vector_bytes(width);
    state += layout.state_bytes(width);
  }
};

// Of every kKeysPerTask-th row.
std::vector<Place> starts_of(const RowLayout& layout, int64_t n, const uint8_t* widths) {
  std::vector<Place> starts;
  Place at;
  for (int64_t i = 0; i < n; ++i) {
    if (i % kKeysPerTask == 0) starts.push_back(at);
    at.pass(layout, widths[i]);
  }
  return starts;
}

bool all_finite(Storage storage, const void* vector, int size) {
  return with_storage(storage, [&](auto stored) {
    using Stored = decltype(stored);
    const auto* values = static_cast<const typename Stored::Bits*>(vector);
    return std::all_of(values, values + size, [](auto bits) { return std::isfinite(Stored::to_float(bits)); });
  });
}

}  // namespace

Listed ShardRows::changed(bool all) {
  struct Part {
    int width;
    uint32_t begin, end;
    Listed rows;
  };
  std::vector<Part> parts;
  for (int width = 1; width <= layout_.chunks; ++width) {
    const uint32_t count = pools_.count(width);
    for (uint32_t begin = 0; begin < count; begin += kRowsListed) parts.push_back({width, begin, std::min(count, begin + kRowsListed), {}});
  }
  for_each_task(static_cast<int64_t>(parts.size()), [&](int64_t task) {
    auto& [width, begin, end, rows] = parts[task];
    for (uint32_t first = begin; first < end; first += 64) {
      uint64_t& word = pools_.words(width)[first / 64];
      const uint64_t there = end - first < 64 ? (uint64_t{1} << (end - first)) - 1 : ~uint64_t{0};
      for (uint64_t wanted = (all ? ~uint64_t{0} : word) & there; wanted != 0; wanted &= wanted - 1) {
        const uint32_t address = pools_.address_of(width, first + static_cast<uint32_t>(std::countr_zero(wanted)));
        RowHeader& header = pools_.header(address);
        header.mark = Mark::kSaved;
        rows.addresses.push_back(address);
        rows.buckets.push_back(static_cast<uint16_t>(bucket_of(header.key)));
      }
      word = 0;
    }
  });
  Listed rows;
  for (const Part& part : parts) {
    rows.addresses.insert(rows.addresses.end(), part.rows.addresses.begin(), part.rows.addresses.end());
    rows.buckets.insert(rows.buckets.end(), part.rows.buckets.begin(), part.rows.buckets.end());
  }
  return rows;
}

void ShardRows::widths_at(int64_t n, const uint32_t* addresses, uint8_t* widths) const {
  for (int64_t i = 0; i < n; ++i) {
    if (!pools_.holds(addresses[i])) throw std::runtime_error("take: no row stands at address " + std::to_string(addresses[i]));
    widths[i] = static_cast<uint8_t>(pools_.width(addresses[i]));
  }
}

void ShardRows::take(int64_t n, const uint32_t* addresses, const HeldRows& out) const {
  const std::vector<Place> starts = starts_of(layout_, n, out.widths);
  for_each_range(n, kKeysPerTask, [&](int64_t begin, int64_t end) {
    Place to = starts[begin / kKeysPerTask];
    for (int64_t i = begin; i < end; ++i) {
      if (i + kInFlight < end) pools_.prefetch_row(addresses[i + kInFlight]);
      const std::byte* row = pools_.row(addresses[i]);
      const auto& header = *reinterpret_cast<const RowHeader*>(row);
      const int width = out.widths[i];
      out.raw_ids[i] = static_cast<int64_t>(raw_id_of(header.key, salts_[header.table]));
      out.tables[i] = header.table;
      out.importance[i] = header.importance;
      std::memcpy(static_cast<std::byte*>(out.values) + to.value, row + sizeof(RowHeader), layout_.vector_bytes(width));
      std::copy_n(row + layout_.state_offset(width), layout_.state_bytes(width), reinterpret_cast<std::byte*>(out.state) + to.state);
      to.pass(layout_, width);
    }
  });
}

ShardState ShardRows::state() const { return {step_, decay_.lowered(), sketch_.base(), counted_}; }

void ShardRows::sketch(uint16_t* cells, uint8_t* registers) const {
  std::copy_n(cells_, config_.sketch_bytes() / static_cast<int64_t>(sizeof(uint16_t)), cells);
  std::copy(distinct_.registers().begin(), distinct_.registers().end(), registers);
}

void ShardRows::require_no_rows(const char* what) const {
  for (int width = 1; width <= layout_.chunks; ++width) {
    if (pools_.count(width)) throw std::runtime_error(std::string(what) + ": there are rows in the store already");
  }
}

void ShardRows::reserve(const std::vector<int64_t>& rows_by_width) {
  require_no_rows("reserve");
  for (int width = 1; width <= layout_.chunks; ++width) {
    const int64_t rows = rows_by_width[width - 1];
    if (rows < 0 || !pools_.reserve(width, rows)) {
      throw std::runtime_error("reserve: there is no memory for " + std::to_string(rows) + " rows of width " + std::to_string(width));
    }
  }
}

void ShardRows::put(int64_t n, const HeldRows& rows, const uint32_t* addresses) {
  // The first row that cannot be: those before it are gone on with, in case one of them turns out to be another.
  int64_t end = n;
  std::string fault;
  std::mutex telling;
  const auto tell = [&](int64_t row, const std::string& what) {
    const std::lock_guard lock(telling);
    if (row >= end) return;
    end = row;
    fault = what;
  };

  const std::vector<Place> starts = starts_of(layout_, n, rows.widths);
  const std::unique_ptr<uint64_t[]> keys(new uint64_t[n]);
  const auto value_at = [&](Place at) { return static_cast<const std::byte*>(rows.values) + at.value; };
  const auto state_at = [&](Place at) { return reinterpret_cast<const std::byte*>(rows.state) + at.state; };
  for_each_range(n, kKeysPerTask, [&](int64_t begin, int64_t after) {
    Place from = starts[begin / kKeysPerTask];
    for (int64_t i = begin; i < after; from.pass(layout_, rows.widths[i++])) {
      const int width = rows.widths[i];
      keys[i] = key_of(static_cast<uint64_t>(rows.raw_ids[i]), salts_[rows.tables[i]]);
      const uint32_t bucket = bucket_of(keys[i]);
      const auto* const state = reinterpret_cast<const float*>(state_at(from));
      const auto is_nan = [](float x) { return std::isnan(x); };
      const char* const what = bucket < config_.first_bucket || bucket >= config_.end_bucket         ? "belongs to another shard"
                               : !all_finite(config_.storage, value_at(from), width * layout_.chunk) ? "has a value that is not finite"
                               : std::any_of(state, state + layout_.state_bytes(width) / 4, is_nan)  ? "has NaN in its optimizer state"
                               : addresses != nullptr && !pools_.fits(addresses[i], width) ? "has an address that is none of its width"
                                                                                           : nullptr;
      if (what != nullptr) return tell(i, what);
    }
  });

  const std::unique_ptr<uint32_t[]> places(new uint32_t[n]);
  for (int64_t i = 0; i < end; ++i) {
    if (addresses != nullptr && i + kInFlight < end) pools_.prefetch_header(addresses[i + kInFlight]);
    const int width = rows.widths[i];
    if (addresses != nullptr) {
      places[i] = addresses[i];
      if (pools_.header(places[i]).mark == Mark::kPlaced) tell(i, "has the address of another row");
    } else {
      places[i] = planned_ + row_bytes_[width] <= limit_ ? pools_.append(width) : kAbsent;
      if (places[i] == kAbsent) tell(i, "does not fit into the limit of " + std::to_string(limit_) + " bytes");
    }
    if (i == end) break;
    const auto table = static_cast<uint16_t>(rows.tables[i]);
    pools_.header(places[i]) = RowHeader{keys[i], rows.importance[i], table, Mark::kPlaced};
    ++rows_by_[table * layout_.chunks + width - 1];
    planned_ += row_bytes_[width];
  }

  for_each_by_partition(
      end, [&](int64_t i) { return keys[i]; },
      [&] {
        return [&, from = Place{}, passed = int64_t{0}](int64_t i) mutable {
          for (; passed < i; ++passed) from.pass(layout_, rows.widths[passed]);
          std::byte* const row = pools_.row(places[i]);
          const int width = rows.widths[i];
          std::memcpy(row + sizeof(RowHeader), value_at(from), layout_.vector_bytes(width));
          std::copy_n(state_at(from), layout_.state_bytes(width), row + layout_.state_offset(width));
          if (find(keys[i], static_cast<uint16_t>(rows.tables[i])) != kAbsent) {
            tell(i, "is already in the store");
          } else if (!index_.insert(keys[i], places[i], key_at())) {
            tell(i, "finds no memory for its index entry");
          }
        };
      });

  if (end < n) {
    throw std::runtime_error("row " + std::to_string(end) + " (table " + std::to_string(rows.tables[end]) + ", id " +
                             std::to_string(rows.raw_ids[end]) + ") " + fault);
  }
}

void ShardRows::put_sketch(uint32_t first_bucket, uint32_t buckets, const uint16_t* cells, int base, const uint8_t* registers) {
  const int64_t in_bucket = int64_t{config_.sketch_sets} * kSketchEntries;
  for (uint32_t at = 0; at < buckets; ++at) sketch_.put_bucket(first_bucket + at, cells + at * in_bucket, base);
  std::copy_n(registers, size_t{kRegistersPerBucket} * buckets,
              distinct_.registers().data() + size_t{kRegistersPerBucket} * (first_bucket - config_.first_bucket));
}

void ShardRows::seal() {
  for (int width = 1; width <= layout_.chunks; ++width) {
    for (uint32_t at = 0; at < pools_.count(width); ++at) {
      RowHeader& header = pools_.header(pools_.address_of(width, at));
      if (header.mark != Mark::kPlaced) {
        throw std::runtime_error("row " + std::to_string(at) + " of width " + std::to_string(width) + " never came");
      }
      header.mark = Mark::kSaved;
    }
  }
}

}  // namespace fiited
