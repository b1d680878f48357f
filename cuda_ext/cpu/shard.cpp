#include "cpu/shard.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>

#include "cpu/bags.h"
#include "cpu/optimizers.h"
#include "cpu/rows.h"

namespace fiited {

namespace {

constexpr int64_t kProbed = 32;          // keys in a block of a lookup
constexpr uint32_t kRoundBlock = 65536;  // rows of a round that are looked at together, before the first of them moves
constexpr uint32_t kRoundRange = 4096;
constexpr uint64_t kAllKeys = 1ull << 32;

template <class Store>
class ShardOf final : public ShardRows {
 public:
  explicit ShardOf(const ShardConfig& config) : ShardRows(config) { set_cuts(); }

  void lookup(int64_t n, const int64_t* keys, const int32_t* tables, const int32_t* counts, bool training, int64_t step, uint64_t quota,
              uint32_t* addresses, uint8_t* widths) override {
    std::atomic<int64_t> lookups{0};
    std::atomic<int64_t> hits{0};
    for_each_range(n, kKeysPerTask, [&](int64_t first, int64_t end) {
      int64_t asked = 0;
      int64_t found = 0;
      for_each_address(first, end, keys, tables, [&](int64_t i, uint32_t address) {
        addresses[i] = address;
        widths[i] = address == kAbsent ? 0 : static_cast<uint8_t>(pools_.width(address));
        if (!training) return;
        distinct_.add(static_cast<uint64_t>(keys[i]), static_cast<uint16_t>(tables[i]));
        asked += counts[i];
        if (address != kAbsent) found += counts[i];
      });
      lookups += asked;
      hits += found;
    });
    counted_.lookups += lookups;
    counted_.hits += hits;
    if (!training || threshold_ != 0.0) return;
    full_ = false;
    std::vector<NewRow> fresh;
    for (int64_t i = 0; i < n; ++i) {
      if (addresses[i] != kAbsent) continue;
      addresses[i] = ask(keys[i], static_cast<uint16_t>(tables[i]), layout_.chunks, step, quota);
      if (addresses[i] == kAbsent) continue;
      widths[i] = static_cast<uint8_t>(layout_.chunks);
      fresh.push_back({i, addresses[i], 0.0f});
    }
    write_rows(fresh, keys, tables, [] { return [](const NewRow&) {}; });
  }

  void read(int64_t n, const int32_t* take, const uint32_t* addresses, const uint8_t* widths, float* values) const override {
    const auto at = [&](int64_t i) { return take ? take[i] : i; };
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t next = i + kInFlight; i % kInFlight == 0 && next < std::min(n, i + 2 * kInFlight); ++next) {
        pools_.prefetch_row(addresses[at(next)]);
      }
      const int live = widths[at(i)] * layout_.chunk;
      if (live) read_vector(pools_.row(addresses[at(i)]), live, values);
      values += live;
    }
  }

  void pool(const Bags& bags, const uint32_t* addresses, float* out) const override {
    const auto vector_of = [this, addresses, inverse = bags.inverse](int64_t i) { return stored_at(addresses[inverse[i]]); };
    pool_rows<float, Store>(bags, vector_of, out);
  }

  void pool_ids(const Bags& bags, const int64_t* ids, const int32_t* feature_tables, float* out) const override {
    for_each_range(bags.features * bags.batch, kBagsPerTask, [&](int64_t first, int64_t last) {
      std::array<uint64_t, kKeysPerTask> keys;
      std::array<uint16_t, kKeysPerTask> tables;
      Pooler<float, Store> pooler(bags, out, first);
      int64_t f = first / bags.batch;
      const int64_t end = bags.offsets[last];
      for (int64_t begin = bags.offsets[first]; begin < end; begin += kKeysPerTask) {
        const int64_t size = std::min(end - begin, kKeysPerTask);
        for (int64_t i = 0; i < size; ++i) {
          while (begin + i >= bags.offsets[(f + 1) * bags.batch]) ++f;
          tables[i] = static_cast<uint16_t>(feature_tables[f]);
          keys[i] = key_of(static_cast<uint64_t>(ids[begin + i]), salts_[tables[i]]);
        }
        for_each_address<Fetched::kVector>(0, size, keys.data(), tables.data(),
                                           [&](int64_t i, uint32_t address) { pooler.add(begin + i, stored_at(address)); });
      }
      pooler.close_until(bags.offsets + last);
    });
  }

  void update(const Update& rows, const float* gradients, int64_t arrivals, const int32_t* target) override {
    start_update(rows);
    update_rows(rows, WireGradients(gradients, rows.n, rows.widths, layout_.chunk, layout_.chunks, arrivals, target));
  }

  void update_pooled(const Update& rows, const Bags& bags, const float* grad_out) override {
    start_update(rows);
    update_rows(rows, BagGradients<float>(bags, grad_out, rows.n, true));
  }

  int64_t shrink(double threshold) override {
    threshold_ = threshold;
    set_cuts();
    const int64_t limit = limit_;
    if (planned_ > limit) set_limit(planned_);  // what passes the limit is to give way here
    int64_t growth = 0;
    for (int width = layout_.chunks; width >= 1; --width) {
      growth += for_each_changing(
          width,
          [&](int wanted, int64_t& bytes) {
            if (wanted > width) bytes += row_bytes_[wanted] - row_bytes_[width];
            return wanted < width;
          },
          [&](uint32_t address, int wanted) {
            if (wanted == 0) {
              evict(address);
            } else {
              move(address, wanted);
            }
          });
    }
    index_.shrink(key_at());
    if (limit_ != limit) set_limit(limit);
    return growth;
  }

  void grow() override {
    for (int width = layout_.chunks - 1; width >= 1; --width) {
      for_each_changing(
          width, [&](int wanted, int64_t&) { return wanted > width; }, [&](uint32_t address, int wanted) { move(address, wanted); });
    }
  }

  void restore(const ShardState& state, double threshold) override {
    require_no_rows("restore");
    decay_.restore(state.lowered);
    sketch_.set_base(static_cast<int>(state.base));
    threshold_ = threshold;
    advance(state.step);
    set_cuts();
    counted_ = state.counted;
  }

 private:
  // Visits the rows of a width that are to have another one, last one first: `changes(wanted, tally)` says which, by the width that a row's
  // importance earns it. `visit(address, wanted)` takes the row out; the pool's last row, which has been looked at, then moves into its
  // place. All threads look, at some rows before the first of them moves; what the moves touch is fetched ahead. Returns the tallies' sum.
  template <class Changes, class Visit>
  int64_t for_each_changing(int width, Changes&& changes, Visit&& visit) {
    struct Changing {
      uint32_t address;
      int32_t wanted;
    };
    std::array<std::vector<Changing>, kRoundBlock / kRoundRange> found;  // by range, last row first
    std::vector<Changing> changing;
    std::atomic<int64_t> tallied{0};
    for (uint32_t end = pools_.count(width); end > 0;) {
      const uint32_t begin = end > kRoundBlock ? end - kRoundBlock : 0;
      for_each_range(end - begin, kRoundRange, [&](int64_t first, int64_t last) {
        auto& mine = found[first / kRoundRange];
        const float unscale = decay_.unscale();
        int64_t tally = 0;
        for (int64_t at = last; at-- > first;) {
          const uint32_t address = pools_.address_of(width, begin + static_cast<uint32_t>(at));
          const int wanted = width_of(pools_.header(address).importance * unscale, cuts_.data(), layout_.chunks);
          if (changes(wanted, tally)) mine.push_back({address, wanted});
        }
        tallied += tally;
      });
      for (size_t range = found.size(); range-- > 0; found[range].clear()) {
        changing.insert(changing.end(), found[range].begin(), found[range].end());
      }
      uint32_t last = pools_.count(width);
      for (size_t at = 0; at < changing.size() + kInFlight; ++at) {
        if (at + kInFlight < changing.size()) pools_.prefetch_row(changing[at + kInFlight].address);
        if (at < changing.size()) {
          const uint64_t key = pools_.header(changing[at].address).key;
          index_.prefetch(key);
          if (changing[at].wanted == 0) sketch_.prefetch(key);
          index_.prefetch(pools_.header(pools_.address_of(width, --last)).key);  // the row that will take its place
        }
        if (at >= kInFlight) visit(changing[at - kInFlight].address, changing[at - kInFlight].wanted);
      }
      changing.clear();
      end = begin;
    }
    return tallied;
  }

  enum class Fetched { kHeader, kVector };

  // Finds the rows of the keys [first, end) and calls visit(i, address) for each, in order. In three stages, a block of keys in each: index
  // lines fetched; candidates found, and of their rows what is `fetched`; keys compared.
  template <Fetched fetched = Fetched::kHeader, class Key, class Table, class Visit>
  void for_each_address(int64_t first, int64_t end, const Key* keys, const Table* tables, Visit&& visit) const {
    uint32_t candidates[2][kProbed];
    for (int64_t at = first; at < end + 2 * kProbed; at += kProbed) {
      for (int64_t i = at; i < std::min(end, at + kProbed); ++i) index_.prefetch(keys[i]);
      const int64_t middle = at - kProbed;
      if (middle >= first) {
        uint32_t* const mine = candidates[middle / kProbed % 2];
        const int64_t size = std::min(end, middle + kProbed) - middle;
        for (int64_t i = 0; i < size; ++i) mine[i] = index_.candidate(keys[middle + i]);
        for (int64_t i = 0; i < size; ++i) {
          if constexpr (fetched == Fetched::kVector) {
            pools_.prefetch_vector(mine[i]);
          } else {
            pools_.prefetch_header(mine[i]);
          }
        }
      }
      const int64_t last = middle - kProbed;
      for (int64_t i = std::max(first, last); i < std::min(end, last + kProbed); ++i) {
        const auto key = static_cast<uint64_t>(keys[i]);
        const auto table = static_cast<uint16_t>(tables[i]);
        uint32_t address = candidates[last / kProbed % 2][i - last];
        if (address != kAbsent && !is_row(address, key, table)) address = find(key, table);
        visit(i, address);
      }
    }
  }

  StoredVector<Store> stored_at(uint32_t address) const {
    if (address == kAbsent) return {nullptr, 0};
    return {vector_in(pools_.row(address)), pools_.width(address) * layout_.chunk};
  }
  static const typename Store::Bits* vector_in(const std::byte* row) {
    return reinterpret_cast<const typename Store::Bits*>(row + sizeof(RowHeader));
  }
  static void read_vector(const std::byte* row, int live, float* out) {
    const auto* vector = vector_in(row);
    for_each_dim(live, [&](int64_t i) { out[i] = Store::to_float(vector[i]); });
  }

  void initialise(std::byte* row, int width, int from_dim, uint64_t key, uint16_t table, double scale) {
    auto* vector = reinterpret_cast<typename Store::Bits*>(row + sizeof(RowHeader));
    for (int dim = from_dim; dim < width * layout_.chunk; ++dim) {
      vector[dim] = Store::from_float(initial_value(key, table, dim, static_cast<float>(scale)), 0);
    }
  }

  // A row that has been given its place; nothing is written in it yet.
  struct NewRow {
    int64_t position;  // of its key among those of the batch
    uint32_t address;
    float importance;  // scaled
  };

  // A place for the row of a key that is worth one, if the key is among the share that is let in at this step and there is room; kAbsent
  // otherwise. After the first that finds none, no other gets in at this step, so that who does can be found by prefix sums.
  uint32_t ask(uint64_t key, uint16_t table, int width, int64_t step, uint64_t quota) {
    counted_.asked_bytes += row_bytes_[width];
    uint32_t address = kAbsent;
    if (!full_ && let_in(key, step, quota)) {
      if (planned_ + row_bytes_[width] <= limit_) address = pools_.append(width);
      full_ = address == kAbsent;
    }
    if (address == kAbsent) {
      ++counted_.refused;
      return kAbsent;
    }
    ++rows_by_[table * layout_.chunks + width - 1];
    planned_ += row_bytes_[width];
    counted_.admitted_bytes += row_bytes_[width];
    ++counted_.admitted;
    return address;
  }

  // Writes new rows, with initial values and clean state, and their entries in the index. Each is then handed to a visitor that `prepare`
  // makes for each task.
  template <class Prepare>
  void write_rows(const std::vector<NewRow>& fresh, const int64_t* keys, const int32_t* tables, Prepare&& prepare) {
    std::atomic<bool> written{true};
    const auto key_of_row = [&](int64_t at) { return static_cast<uint64_t>(keys[fresh[at].position]); };
    for_each_by_partition(static_cast<int64_t>(fresh.size()), key_of_row, [&] {
      return [&, visit = prepare()](int64_t at) mutable {
        const NewRow& one = fresh[at];
        const uint64_t key = key_of_row(at);
        const auto table = static_cast<uint16_t>(tables[one.position]);
        const int width = pools_.width(one.address);
        std::byte* const row = pools_.row(one.address);
        pools_.header(one.address) = RowHeader{key, one.importance, table, Mark::kSaved};
        pools_.mark_changed(one.address);
        initialise(row, width, 0, key, table, config_.init_scale);
        std::memset(row + layout_.state_offset(width), 0, layout_.state_bytes(width));
        if (!index_.insert(key, one.address, key_at())) written = false;
        visit(one);
      };
    });
    if (!written) throw std::runtime_error("the system has no memory for the index of new rows");
  }

  void drop(uint32_t address) {  // the index no longer leads here
    const uint32_t moved = pools_.remove(address);
    if (moved == kAbsent) return;
    index_.move(pools_.header(address).key, moved, address);
    pools_.mark_changed(address);
  }

  void evict(uint32_t address) {
    const RowHeader header = pools_.header(address);
    const int width = pools_.width(address);
    sketch_.hand_back(header.key, header.importance);
    index_.erase(header.key, address);
    --rows_by_[header.table * layout_.chunks + width - 1];
    planned_ -= row_bytes_[width];
    drop(address);
    ++counted_.evicted;
  }

  // Gives a row another width: the common prefix stays, what is new starts clean.
  void move(uint32_t from, int width) {
    const int old = pools_.width(from);
    const uint32_t to = planned_ - row_bytes_[old] + row_bytes_[width] <= limit_ ? pools_.append(width) : kAbsent;
    if (to == kAbsent) {
      ++counted_.refused;
      return;
    }
    const int kept = std::min(old, width);
    std::byte* source = pools_.row(from);
    std::byte* target = pools_.row(to);
    const RowHeader header = pools_.header(from);
    std::memcpy(target, source, sizeof(RowHeader) + layout_.vector_bytes(kept));
    pools_.mark_changed(to);
    initialise(target, width, kept * layout_.chunk, header.key, header.table, config_.restore_scale);
    copy_state(source + layout_.state_offset(old), old, target + layout_.state_offset(width), width);
    index_.move(header.key, from, to);
    --rows_by_[header.table * layout_.chunks + old - 1];
    ++rows_by_[header.table * layout_.chunks + width - 1];
    planned_ += row_bytes_[width] - row_bytes_[old];
    drop(from);
    ++counted_.resized;
  }

  void copy_state(const std::byte* source, int old, std::byte* target, int width) const {
    if (layout_.optimizer == Optimizer::kRowwiseAdagrad) {
      std::memcpy(target, source, 4);
      return;
    }
    const int moments = layout_.optimizer == Optimizer::kAdam ? 2 : layout_.optimizer == Optimizer::kAdagrad ? 1 : 0;
    const int chunk_bytes = layout_.chunk * 4;
    const int kept = std::min(old, width) * chunk_bytes;
    for (int moment = 0; moment < moments; ++moment) {
      std::byte* to = target + moment * width * chunk_bytes;
      std::memcpy(to, source + moment * old * chunk_bytes, kept);
      std::memset(to + kept, 0, width * chunk_bytes - kept);
    }
  }

  // Checks that the rows are where their lookup found them.
  void start_update(const Update& rows) {
    quota_ = rows.quota;
    full_ = false;
    if (config_.importance == Importance::kLookupNormSum && rows.lookup_norms == nullptr) {
      throw std::runtime_error("importance lookup_norm_sum needs the lookups' gradient norms");
    }
    advance(rows.step);
  }

  template <class Gradients>
  void update_rows(const Update& rows, const Gradients& gradients) {
    switch (config_.optimizer) {
      case Optimizer::kSgd: return update_rows<Optimizer::kSgd>(rows, gradients);
      case Optimizer::kAdagrad: return update_rows<Optimizer::kAdagrad>(rows, gradients);
      case Optimizer::kRowwiseAdagrad: return update_rows<Optimizer::kRowwiseAdagrad>(rows, gradients);
      case Optimizer::kAdam: return update_rows<Optimizer::kAdam>(rows, gradients);
    }
  }

  template <Optimizer kind, class Gradients>
  void update_rows(const Update& rows, const Gradients& gradients) {
    const StepConstants constants = step_constants(rows.lr, config_.eps, config_.beta1, config_.beta2, rows.step);
    const std::unique_ptr<float[]> gains(new float[rows.n]);  // of importance, for the keys without a row
    std::atomic<int64_t> moved{rows.n};                       // the first row that is not where it was
    std::atomic<int64_t> infinite{rows.n};                    // the first row whose gradient is not finite
    for_each_range(rows.n, kKeysPerTask, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(kSumLevels * layout_.chunks * layout_.chunk);
      const int32_t ahead = ahead_of(layout_.stride(layout_.chunks));
      const auto fetch = [&](int64_t at) __attribute__((always_inline)) {
        for (int64_t i = at; i < std::min(end, at + ahead); ++i) pools_.prefetch_row(rows.addresses[i]);
      };
      gradients.start(begin);
      fetch(begin);
      for (int64_t i = begin; i < end; ++i) {
        if (((i - begin) & (ahead - 1)) == 0) fetch(i + ahead);
        const uint32_t address = rows.addresses[i];
        const auto key = static_cast<uint64_t>(rows.keys[i]);
        const int width = rows.widths[i];
        const int live = whole_chunks(width) * layout_.chunk;
        if (!still_there(rows, i)) {
          lower_to(moved, i);
          continue;
        }
        const float* g = gradients.sum(i, width, scratch.data());
        const float live_squares = sum_of_squares(live, g);
        const float squares =
            has_folded_chunk(width, layout_.chunks) ? live_squares + sum_of_squares(layout_.chunk, g + live) : live_squares;
        if (!std::isfinite(squares)) {
          lower_to(infinite, i);
          continue;
        }
        const float gain =
            gain_of(config_.importance, rows.counts[i], std::sqrt(squares), rows.lookup_norms ? rows.lookup_norms[i] : 0.0f) *
            decay_.scale();
        if (address == kAbsent) {
          gains[i] = gain;
          continue;
        }
        std::byte* row = pools_.row(address);
        auto* const header = reinterpret_cast<RowHeader*>(row);
        header->importance += gain;
        if (header->mark != Mark::kChanged) pools_.mark_changed(address);
        apply<Store, kind>(row + sizeof(RowHeader), row + layout_.state_offset(width), g, live, live, live_squares, key, constants);
      }
    });
    if (moved < rows.n) {
      throw std::runtime_error("update: row " + std::to_string(moved) +
                               " was resized or moved since its lookup; look up again after a round");
    }
    if (infinite < rows.n) {
      throw std::runtime_error("the gradient of table " + std::to_string(rows.tables[infinite]) + ", id " +
                               std::to_string(static_cast<int64_t>(raw_id_of(rows.keys[infinite], salts_[rows.tables[infinite]]))) +
                               " is not finite");
    }
    if (threshold_ == 0.0) return;  // rows are then given out at lookup
    std::vector<NewRow> won;
    for (int64_t i = 0; i < rows.n; ++i) {
      if (i + kInFlight < rows.n && rows.addresses[i + kInFlight] == kAbsent) sketch_.prefetch(rows.keys[i + kInFlight]);
      if (rows.addresses[i] == kAbsent) win_row(rows, i, gains[i], won);
    }
    write_rows(won, rows.keys, rows.tables, [&] {
      return [&, scratch = std::vector<float>(kSumLevels * layout_.chunks * layout_.chunk)](const NewRow& one) mutable {
        const float* g = gradients.sum(one.position, 0, scratch.data());
        const int width = pools_.width(one.address);
        std::byte* row = pools_.row(one.address);
        apply<Store, kind>(row + sizeof(RowHeader), row + layout_.state_offset(width), g, layout_.chunk, width * layout_.chunk,
                           sum_of_squares(layout_.chunk, g), static_cast<uint64_t>(rows.keys[one.position]), constants);
      };
    });
  }

  bool still_there(const Update& rows, int64_t i) const {
    const uint32_t address = rows.addresses[i];
    return pools_.fits(address, rows.widths[i]) &&
           (address == kAbsent || is_row(address, rows.keys[i], static_cast<uint16_t>(rows.tables[i])));
  }

  static void lower_to(std::atomic<int64_t>& least, int64_t value) {
    for (int64_t now = least; value < now && !least.compare_exchange_weak(now, value);) {
    }
  }

  // An absent key's gain goes to the sketch; what that remembers of the key may be worth a row.
  void win_row(const Update& rows, int64_t i, float gain, std::vector<NewRow>& won) {
    const auto key = static_cast<uint64_t>(rows.keys[i]);
    const float estimate = sketch_.add(key, gain, rows.step);
    const int width = width_of(estimate * decay_.unscale() / static_cast<float>(config_.admission), cuts_.data(), layout_.chunks);
    if (width == 0) return;
    const uint32_t address = ask(key, static_cast<uint16_t>(rows.tables[i]), width, rows.step, quota_);
    if (address == kAbsent) return;
    sketch_.forget(key);
    won.push_back({i, address, estimate});
  }

  void advance(int64_t step) {
    step_ = step;
    if (const int by = decay_.advance(step)) {
      const float factor = std::ldexp(1.0f, -by);
      for (int width = 1; width <= layout_.chunks; ++width) {
        for (uint32_t at = 0; at < pools_.count(width); ++at) {
          const uint32_t address = pools_.address_of(width, at);
          pools_.header(address).importance *= factor;
          pools_.mark_changed(address);
        }
      }
      sketch_.lower(by);
    }
    aim_sketch();
  }

  void aim_sketch() {
    if (threshold_ > 0.0) sketch_.aim(static_cast<float>(threshold_ * config_.admission) * decay_.scale(), config_.buckets());
  }

  void set_cuts() {
    cuts_ = cuts_of(threshold_, config_.levels);
    aim_sketch();
  }

  uint64_t quota_ = kAllKeys;
  bool full_ = false;
};

}  // namespace

std::shared_ptr<CpuShard> CpuShard::make(const ShardConfig& config) {
  config.check_limit();
  switch (config.storage) {
    case Storage::kFloat32: return std::make_shared<ShardOf<Float32>>(config);
    case Storage::kBFloat16: return std::make_shared<ShardOf<BFloat16>>(config);
    case Storage::kFloat16: return std::make_shared<ShardOf<Float16>>(config);
  }
  throw std::runtime_error("unknown storage type");
}

}  // namespace fiited
