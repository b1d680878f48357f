// How a store in the CPU's memory is made, counted and checked.
#include "cpu/rows.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "core/numeric.h"
#include "cpu/parallel.h"

namespace fiited {

namespace {
constexpr int64_t kRowsPerTask = 65536;
}

ShardRows::ShardRows(const ShardConfig& config)
    : CpuShard(config),
      index_(memory_, config.partitions_log2()),
      pools_(memory_, layout_, config.granule()),
      cells_(static_cast<uint16_t*>(memory_.take(config.sketch_bytes()))),
      sketch_(cells_, config.first_bucket, config.sketch_sets),
      distinct_(config.first_bucket, config.buckets()),
      rows_by_(static_cast<size_t>(config.tables) * config.chunks, 0) {
  if (cells_ == nullptr) throw std::runtime_error("no memory for the sketch of " + std::to_string(config.sketch_bytes()) + " bytes");
  for (int table = 0; table < config.tables; ++table) salts_.push_back(table_salt(config.seed, table));
  ShardRows::set_limit(config.limit_bytes);
}

void ShardRows::set_limit(int64_t bytes) {
  limit_ = bytes > 0 ? bytes : Memory::kUnlimited;
  memory_.set_limit(bytes > 0 ? bytes - config_.uncounted_bytes() : Memory::kUnlimited);
}

void ShardRows::histogram(int64_t* out) const {
  std::fill(out, out + 2 * kImportanceBins, 0);
  std::mutex adding;
  for (int width = 1; width <= layout_.chunks; ++width) {
    for_each_range(pools_.count(width), kRowsPerTask, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> rows(kImportanceBins);
      for (int64_t at = begin; at < end; ++at) {
        const RowHeader& header = pools_.header(pools_.address_of(width, static_cast<uint32_t>(at)));
        ++rows[importance_bin(header.importance * decay_.unscale())];
      }
      const std::lock_guard lock(adding);
      for (int bin = 0; bin < kImportanceBins; ++bin) {
        out[bin] += rows[bin];
        out[kImportanceBins + bin] += rows[bin] * row_bytes_[width];
      }
    });
  }
}

ShardStats ShardRows::stats() {
  ShardStats s = stats_of(pools_, index_, memory_);
  const int64_t bits = pools_.bits_bytes();
  s.index += bits;
  s.slack -= bits;
  s.distinct = distinct_.estimate();
  return s;
}

std::vector<uint32_t> ShardRows::addresses_in(uint32_t first_bucket, uint32_t end_bucket) const {
  std::vector<uint32_t> addresses;
  for_each_row([&](uint32_t address, const RowHeader& header) {
    const uint32_t bucket = bucket_of(header.key);
    if (bucket >= first_bucket && bucket < end_bucket) addresses.push_back(address);
  });
  return addresses;
}

void ShardRows::check() const {
  int64_t planned = config_.fixed_bytes();
  int64_t rows = 0;
  std::vector<int64_t> rows_by(rows_by_.size(), 0);
  for (int width = 1; width <= layout_.chunks; ++width) {
    for (uint32_t at = 0; at < pools_.count(width); ++at) {
      const uint32_t address = pools_.address_of(width, at);
      check_row(address);
      ++rows_by[pools_.header(address).table * layout_.chunks + width - 1];
      planned += row_bytes_[width];
      ++rows;
    }
  }
  const int64_t entries =
      index_.check(key_at(), [&](uint32_t address) { return pools_.holds(address); }, [&](uint32_t address) { return name_of(address); });
  const auto require = [](bool holds, const char* what, int64_t is, int64_t should) {
    if (!holds) throw std::runtime_error(std::string("check: ") + what + ": " + std::to_string(is) + " against " + std::to_string(should));
  };
  require(entries == rows, "the index has as many entries as there are rows", entries, rows);
  require(planned == planned_, "planned bytes are what follows from the rows", planned_, planned);
  for (size_t at = 0; at < rows_by.size(); ++at) {
    require(rows_by[at] == rows_by_[at], "rows by table and width are counted", rows_by_[at], rows_by[at]);
  }
  const int64_t taken = memory_.used() + config_.uncounted_bytes();
  require(taken <= limit_, "bytes taken stay within the limit", taken, limit_);
  require(taken <= planned_, "bytes taken stay within the planned ones", taken, planned_);
}

// A row as a person knows it.
std::string ShardRows::name_of(uint32_t address) const {
  const RowHeader& header = pools_.header(address);
  if (header.table >= salts_.size()) return "the row at address " + std::to_string(address);
  return "the row of table " + std::to_string(header.table) + ", id " +
         std::to_string(static_cast<int64_t>(raw_id_of(header.key, salts_[header.table]))) + " (width " +
         std::to_string(pools_.width(address)) + ")";
}

// What must hold for one row; throws naming the row and what does not.
void ShardRows::check_row(uint32_t address) const {
  const RowHeader& header = pools_.header(address);
  const auto require = [&](bool holds, const std::string& what) {
    if (!holds) throw std::runtime_error("check: " + name_of(address) + ": " + what);
  };
  require(header.table < config_.tables, "its table " + std::to_string(header.table) + " does not exist");
  const uint32_t bucket = bucket_of(header.key);
  require(bucket >= config_.first_bucket && bucket < config_.end_bucket, "its bucket " + std::to_string(bucket) + " is another shard's");
  require(find(header.key, header.table) == address, "the index does not lead to it");
  require(header.mark != Mark::kChanged || pools_.has_bit(address), "it has changed, and saving would not see it");
  require(std::isfinite(header.importance) && header.importance >= 0, "its importance is " + std::to_string(header.importance));
  const int width = pools_.width(address);
  with_storage(config_.storage, [&](auto stored) {
    using Stored = decltype(stored);
    const auto* vector = reinterpret_cast<const typename Stored::Bits*>(pools_.row(address) + sizeof(RowHeader));
    for (int dim = 0; dim < width * layout_.chunk; ++dim) {
      const float value = Stored::to_float(vector[dim]);
      require(std::isfinite(value), "dimension " + std::to_string(dim) + " of its vector is " + std::to_string(value));
    }
  });
  const auto* state = reinterpret_cast<const float*>(pools_.row(address) + layout_.state_offset(width));
  for (int at = 0; at < layout_.state_bytes(width) / 4; ++at) {
    require(std::isfinite(state[at]), "value " + std::to_string(at) + " of its optimizer state is " + std::to_string(state[at]));
  }
}

}  // namespace fiited
