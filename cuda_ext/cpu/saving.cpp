// Rows and sketch of a store in the CPU's memory, out of it and back, for checkpoints.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "core/numeric.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"

namespace fiited {

namespace {

constexpr uint32_t kRowsListed = 1 << 16;  // by a task; a multiple of 64

struct Place {  // in bytes, of a row's vector and state among those of other rows
  int64_t value, state;
};

// Of every kKeysPerTask-th row.
std::vector<Place> starts_of(const RowLayout& layout, int64_t n, const uint8_t* widths) {
  std::vector<Place> starts;
  Place at{0, 0};
  for (int64_t i = 0; i < n; ++i) {
    if (i % kKeysPerTask == 0) starts.push_back(at);
    at.value += layout.vector_bytes(widths[i]);
    at.state += layout.state_bytes(widths[i]);
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
      to.value += layout_.vector_bytes(width);
      to.state += layout_.state_bytes(width);
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
  const auto* values = static_cast<const std::byte*>(rows.values);
  const float* state = rows.state;
  for (int64_t i = 0; i < n; ++i) {
    const int width = rows.widths[i];
    const auto table = static_cast<uint16_t>(rows.tables[i]);
    const uint64_t key = key_of(static_cast<uint64_t>(rows.raw_ids[i]), salts_[table]);
    const auto fail = [&](const std::string& what) {
      throw std::runtime_error("row " + std::to_string(i) + " (table " + std::to_string(table) + ", id " + std::to_string(rows.raw_ids[i]) +
                               ") " + what);
    };
    const uint32_t bucket = bucket_of(key);
    if (bucket < config_.first_bucket || bucket >= config_.end_bucket) fail("belongs to another shard");
    if (!all_finite(config_.storage, values, width * layout_.chunk)) fail("has a value that is not finite");
    for (int at = 0; at < layout_.state_bytes(width) / 4; ++at) {
      if (std::isnan(state[at])) fail("has NaN in its optimizer state");
    }
    if (find(key, table) != kAbsent) fail("is already in the store");
    uint32_t address;
    if (addresses != nullptr) {
      address = addresses[i];
      if (!pools_.holds(address) || pools_.width(address) != width) fail("has an address that is none of its width");
      if (pools_.header(address).mark == Mark::kPlaced) fail("has the address of another row");
    } else {
      address = planned_ + row_bytes_[width] <= limit_ ? pools_.append(width) : kAbsent;
      if (address == kAbsent) fail("does not fit into the limit of " + std::to_string(limit_) + " bytes");
    }
    pools_.header(address) = RowHeader{key, rows.importance[i], table, Mark::kPlaced};
    if (!index_.insert(key, address, key_at())) fail("finds no memory for its index entry");
    std::byte* row = pools_.row(address);
    std::memcpy(row + sizeof(RowHeader), values, layout_.vector_bytes(width));
    std::copy_n(reinterpret_cast<const std::byte*>(state), layout_.state_bytes(width), row + layout_.state_offset(width));
    ++rows_by_[table * layout_.chunks + width - 1];
    planned_ += row_bytes_[width];
    values += layout_.vector_bytes(width);
    state += layout_.state_bytes(width) / 4;
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
