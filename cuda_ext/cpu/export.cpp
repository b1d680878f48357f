// Rows out of a store of any device, in a form that depends on neither device, addresses nor storage.
#include <algorithm>
#include <numeric>

#include "core/numeric.h"
#include "core/shard.h"

namespace fiited {

ExportedRows Shard::export_rows(uint32_t first_bucket, uint32_t end_bucket) const {
  const std::vector<uint32_t> addresses = addresses_in(first_bucket, end_bucket);
  const auto n = static_cast<int64_t>(addresses.size());
  std::vector<uint8_t> widths(n);
  widths_at(n, addresses.data(), widths.data());
  const Begins begins(layout_, n, widths.data());
  std::vector<int64_t> raw_ids(n);
  std::vector<int32_t> tables(n);
  std::vector<float> importance(n);
  std::vector<float> stored(begins.values.back());  // room for whichever type
  std::vector<float> state(begins.state.back());
  take(n, addresses.data(), {raw_ids.data(), tables.data(), widths.data(), importance.data(), stored.data(), state.data()});

  std::vector<uint64_t> keys(n);
  for (int64_t i = 0; i < n; ++i) {
    keys[i] = key_of(static_cast<uint64_t>(raw_ids[i]), table_salt(config_.seed, static_cast<uint32_t>(tables[i])));
  }
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), int64_t{0});
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return keys[a] != keys[b] ? keys[a] < keys[b] : tables[a] < tables[b]; });

  ExportedRows rows;
  with_storage(config_.storage, [&](auto type) {
    using Stored = decltype(type);
    const auto* values = reinterpret_cast<const typename Stored::Bits*>(stored.data());
    for (const int64_t i : order) {
      for (int64_t at = begins.values[i]; at < begins.values[i + 1]; ++at) rows.values.push_back(Stored::to_float(values[at]));
    }
  });
  for (const int64_t i : order) {
    rows.raw_ids.push_back(raw_ids[i]);
    rows.tables.push_back(tables[i]);
    rows.widths.push_back(widths[i]);
    rows.importance.push_back(importance[i] * decay_.unscale());
    rows.state.insert(rows.state.end(), state.begin() + begins.state[i], state.begin() + begins.state[i + 1]);
  }
  return rows;
}

}  // namespace fiited
