// What the bindings of all devices share: schemas, argument checks, shards behind integer handles, and the operators that take no tensors.
// Stable libtorch ABI only, so that one binary serves several torch versions.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/batch.h"
#include "core/shard.h"
#include "core/sketch.h"

namespace fiited::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error("fiited: " + message); }

// A macro, so that the message is put together only where it is needed.
#define REQUIRE(holds, message)  \
  do {                           \
    if (!(holds)) fail(message); \
  } while (false)

inline Tensor make(int64_t size, ScalarType type) { return torch::stable::empty({size}, type); }

template <class T>
Tensor from_vector(const std::vector<T>& values, ScalarType type) {
  Tensor out = make(static_cast<int64_t>(values.size()), type);
  std::copy(values.begin(), values.end(), static_cast<T*>(out.mutable_data_ptr()));
  return out;
}

// Checks what can be seen without reading the tensor; `place` is the device it must be on.
template <class T>
const T* read_on(torch::headeronly::DeviceType place, const Tensor& tensor, ScalarType type, const char* name, int64_t size) {
  REQUIRE(tensor.device().type() == place,
          std::string(name) + (place == torch::headeronly::DeviceType::CPU ? " must be on the CPU" : " must be on the store's device"));
  REQUIRE(tensor.scalar_type() == type, std::string(name) + " has the wrong dtype");
  REQUIRE(tensor.is_contiguous(), std::string(name) + " must be contiguous");
  REQUIRE(size < 0 || tensor.numel() == size,
          std::string(name) + " must have " + std::to_string(size) + " elements, not " + std::to_string(tensor.numel()));
  return static_cast<const T*>(tensor.const_data_ptr());
}

// The same for an argument that may be missing; null then, and only then.
template <class T>
const T* read_on(torch::headeronly::DeviceType place, const std::optional<Tensor>& tensor, ScalarType type, const char* name,
                 int64_t size) {
  static const T nothing{};  // an empty tensor has no address, but it is there
  if (!tensor) return nullptr;
  const T* const data = read_on<T>(place, *tensor, type, name, size);
  return data != nullptr ? data : &nothing;
}

inline const uint32_t* addresses_on(torch::headeronly::DeviceType place, const Tensor& addresses, int64_t n) {
  return reinterpret_cast<const uint32_t*>(read_on<int32_t>(place, addresses, ScalarType::Int, "addresses", n));
}

// Bags of n lookups as they are given: what their offsets say is not looked at.
inline Bags bags_on(torch::headeronly::DeviceType place, int64_t n, const Tensor& offsets, const std::optional<Tensor>& weights,
                    ScalarType real, int64_t features, bool mean, int64_t chunk, int64_t chunks) {
  REQUIRE(features > 0 && offsets.numel() > 0 && (offsets.numel() - 1) % features == 0, "offsets must have features * batch + 1 elements");
  const void* weights_data = real == ScalarType::Double ? static_cast<const void*>(read_on<double>(place, weights, real, "weights", n))
                                                        : read_on<float>(place, weights, real, "weights", n);
  return {features,
          (offsets.numel() - 1) / features,
          read_on<int64_t>(place, offsets, ScalarType::Long, "offsets", -1),
          nullptr,
          weights_data,
          mean,
          static_cast<int>(chunk),
          static_cast<int>(chunks)};
}

// The same, with the row of each lookup, which is not looked at either.
inline Bags bags_on(torch::headeronly::DeviceType place, const Tensor& inverse, const Tensor& offsets, const std::optional<Tensor>& weights,
                    ScalarType real, int64_t features, bool mean, int64_t chunk, int64_t chunks) {
  Bags bags = bags_on(place, inverse.numel(), offsets, weights, real, features, mean, chunk, chunks);
  bags.inverse = read_on<int32_t>(place, inverse, ScalarType::Int, "inverse", inverse.numel());
  return bags;
}

// An update as it is given; `numbers` is how many its gradients are.
inline Shard::Update update_on(torch::headeronly::DeviceType place, const Tensor& keys, const Tensor& tables, const Tensor& addresses,
                               const Tensor& widths, const Tensor& counts, const std::optional<Tensor>& lookup_norms, int64_t numbers,
                               double lr, int64_t step, int64_t quota) {
  const int64_t n = keys.numel();
  return {n,
          read_on<int64_t>(place, keys, ScalarType::Long, "keys", n),
          read_on<int32_t>(place, tables, ScalarType::Int, "tables", n),
          addresses_on(place, addresses, n),
          read_on<uint8_t>(place, widths, ScalarType::Byte, "widths", n),
          read_on<int32_t>(place, counts, ScalarType::Int, "counts", n),
          read_on<float>(place, lookup_norms, ScalarType::Float, "lookup_norms", n),
          numbers,
          lr,
          step,
          static_cast<uint64_t>(quota)};
}

inline ScalarType real_type(const Tensor& tensor, const char* name) {
  REQUIRE(tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double,
          std::string(name) + " must be float32 or float64");
  return tensor.scalar_type();
}

template <class Visit>
auto with_real(ScalarType type, Visit&& visit) {
  return type == ScalarType::Double ? visit(double{}) : visit(float{});
}

// ---- shards ---------------------------------------------------------------------------------------------------------

template <class AnyShard>
class Handles {
 public:
  int64_t add(std::shared_ptr<AnyShard> shard) {
    const std::lock_guard<std::mutex> lock(mutex_);
    shards_[next_] = std::move(shard);
    return next_++;
  }
  void remove(int64_t handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    shards_.erase(handle);
  }
  std::shared_ptr<AnyShard> operator[](int64_t handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = shards_.find(handle);
    REQUIRE(found != shards_.end(), "no shard has handle " + std::to_string(handle));
    return found->second;
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<AnyShard>> shards_;
  int64_t next_ = 1;
};

// The order of these numbers is that of fiited_ray/store/layout.py.
inline ShardConfig config_of(const std::vector<int64_t>& ints, const std::vector<double>& floats) {
  REQUIRE(ints.size() == 11 && floats.size() >= 7, "a shard's configuration is 11 integers, 7 numbers and levels");
  ShardConfig config;
  config.seed = static_cast<uint64_t>(ints[0]);
  config.chunk = static_cast<int>(ints[1]);
  config.chunks = static_cast<int>(ints[2]);
  config.storage = static_cast<fiited::Storage>(ints[3]);
  config.optimizer = static_cast<fiited::Optimizer>(ints[4]);
  config.importance = static_cast<fiited::Importance>(ints[5]);
  config.tables = static_cast<int>(ints[6]);
  config.first_bucket = static_cast<uint32_t>(ints[7]);
  config.end_bucket = static_cast<uint32_t>(ints[8]);
  config.sketch_sets = static_cast<uint32_t>(ints[9]);
  config.limit_bytes = ints[10];
  config.eps = floats[0];
  config.beta1 = floats[1];
  config.beta2 = floats[2];
  config.init_scale = floats[3];
  config.restore_scale = floats[4];
  config.decay = floats[5];
  config.admission = floats[6];
  config.levels.assign(floats.begin() + 7, floats.end());
  REQUIRE(config.chunk > 0 && config.chunks > 0 && config.chunks <= 64, "chunk and chunks must be positive, chunks at most 64");
  REQUIRE(static_cast<int>(config.levels.size()) == config.chunks, "one level for each chunk is wanted");
  REQUIRE(config.tables > 0 && config.tables <= kMostTables, "there must be 1 to 65536 tables");
  REQUIRE(config.first_bucket < config.end_bucket && config.end_bucket <= fiited::kBuckets, "bucket range out of order");
  REQUIRE(config.sketch_sets > 0, "the sketch needs one set for each bucket");
  REQUIRE(config.limit_bytes >= 0, "limit_bytes must not be negative");
  return config;
}

// [fixed bytes, bytes of a row of width 1, ..., of width k]
inline Tensor store_plan(std::vector<int64_t> ints, std::vector<double> floats) {
  const ShardConfig config = config_of(ints, floats);
  std::vector<int64_t> plan{config.fixed_bytes()};
  for (int width = 1; width <= config.chunks; ++width) plan.push_back(config.row_bytes(width));
  return from_vector(plan, ScalarType::Long);
}

inline Tensor store_histogram(Shard& shard) {
  Tensor out = torch::stable::empty({2, fiited::kImportanceBins}, ScalarType::Long);
  shard.histogram(static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

inline int64_t store_shrink(Shard& shard, double threshold) {
  REQUIRE(threshold >= 0, "the threshold must not be negative");
  return shard.shrink(threshold);
}

inline Tensor store_stats(Shard& shard) {
  const fiited::ShardStats s = shard.stats();
  const fiited::Counts& c = s.counted;
  return from_vector<int64_t>(
      {s.payload, s.optimizer, s.index,   s.sketch, s.slack,    s.total,   s.planned, s.fixed,   s.limit,          s.peak,
       s.rows,    s.distinct,  c.lookups, c.hits,   c.admitted, c.refused, c.resized, c.evicted, c.admitted_bytes, c.asked_bytes},
      ScalarType::Long);
}

inline Tensor store_rows_by_width(Shard& shard) {
  Tensor out = torch::stable::empty({shard.config().tables, shard.config().chunks}, ScalarType::Long);
  shard.rows_by_width(static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> store_export(Shard& shard, int64_t first_bucket, int64_t end_bucket) {
  const auto rows = shard.export_rows(static_cast<uint32_t>(first_bucket), static_cast<uint32_t>(end_bucket));
  return {from_vector(rows.raw_ids, ScalarType::Long), from_vector(rows.tables, ScalarType::Int),
          from_vector(rows.widths, ScalarType::Byte),  from_vector(rows.importance, ScalarType::Float),
          from_vector(rows.values, ScalarType::Float), from_vector(rows.state, ScalarType::Float)};
}

// The operators on a whole shard, by handle: `shard_at(handle)` finds it, and makes its device and stream the current ones.
template <auto shard_at>
struct ByHandle {
  static Tensor histogram(int64_t handle) { return store_histogram(*shard_at(handle)); }
  static int64_t shrink(int64_t handle, double threshold) { return store_shrink(*shard_at(handle), threshold); }
  static void grow(int64_t handle) { shard_at(handle)->grow(); }
  static void set_limit(int64_t handle, int64_t bytes) { shard_at(handle)->set_limit(bytes); }
  static Tensor stats(int64_t handle) { return store_stats(*shard_at(handle)); }
  static Tensor rows_by_width(int64_t handle) { return store_rows_by_width(*shard_at(handle)); }
  static void reset_round_counters(int64_t handle) { shard_at(handle)->reset_round_counters(); }
  static void check(int64_t handle) { shard_at(handle)->check(); }
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> export_rows(int64_t handle, int64_t first_bucket, int64_t end_bucket) {
    return store_export(*shard_at(handle), first_bucket, end_bucket);
  }

  template <class Library>
  static void implement(Library& m) {
    m.impl("store_plan", TORCH_BOX(&store_plan));
    m.impl("store_histogram", TORCH_BOX(&ByHandle::histogram));
    m.impl("store_shrink", TORCH_BOX(&ByHandle::shrink));
    m.impl("store_grow", TORCH_BOX(&ByHandle::grow));
    m.impl("store_set_limit", TORCH_BOX(&ByHandle::set_limit));
    m.impl("store_stats", TORCH_BOX(&ByHandle::stats));
    m.impl("store_rows_by_width", TORCH_BOX(&ByHandle::rows_by_width));
    m.impl("store_reset_round_counters", TORCH_BOX(&ByHandle::reset_round_counters));
    m.impl("store_check", TORCH_BOX(&ByHandle::check));
    m.impl("store_export", TORCH_BOX(&ByHandle::export_rows));
  }
};

// The schemas of every device's library.
template <class Library>
void define(Library& m) {
  m.def("store_create(int[] ints, float[] floats) -> int");
  m.def("store_destroy(int handle) -> ()");
  m.def("store_plan(int[] ints, float[] floats) -> Tensor");
  m.def("store_lookup(int handle, Tensor keys, Tensor tables, Tensor counts, bool training, int step, int quota) -> (Tensor, Tensor)");
  m.def("store_read(int handle, Tensor addresses, Tensor widths, Tensor? take) -> Tensor");
  m.def(
      "store_pool(int handle, Tensor addresses, Tensor widths, Tensor inverse, Tensor offsets, Tensor? weights, int features, bool mean) "
      "-> "
      "Tensor");
  m.def(
      "store_update(int handle, Tensor keys, Tensor tables, Tensor addresses, Tensor widths, Tensor counts, Tensor gradients, Tensor? "
      "target, Tensor? lookup_norms, float lr, int step, int quota) -> ()");
  m.def(
      "store_update_pooled(int handle, Tensor keys, Tensor tables, Tensor addresses, Tensor widths, Tensor counts, Tensor grad_out, Tensor "
      "inverse, Tensor offsets, Tensor? weights, int features, bool mean, Tensor? lookup_norms, float lr, int step, int quota) -> ()");
  m.def("store_histogram(int handle) -> Tensor");
  m.def("store_shrink(int handle, float threshold) -> int");
  m.def("store_grow(int handle) -> ()");
  m.def("store_set_limit(int handle, int bytes) -> ()");
  m.def("store_stats(int handle) -> Tensor");
  m.def("store_rows_by_width(int handle) -> Tensor");
  m.def("store_reset_round_counters(int handle) -> ()");
  m.def("store_check(int handle) -> ()");
  m.def("store_export(int handle, int first_bucket, int end_bucket) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "dedup_ids(Tensor ids, Tensor feature_ends, Tensor feature_tables, int seed, int workers) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def("dedup_keys(Tensor keys, Tensor tables, Tensor counts) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "pool(Tensor values, Tensor widths, Tensor inverse, Tensor offsets, Tensor? weights, int features, bool mean, int chunk, int chunks) "
      "-> Tensor");
  m.def(
      "pool_backward(Tensor grad_out, Tensor widths, Tensor inverse, Tensor offsets, Tensor? weights, int features, bool mean, int chunk, "
      "int chunks, bool fold) -> Tensor");
  m.def(
      "pool_weights_backward(Tensor grad_out, Tensor values, Tensor widths, Tensor inverse, Tensor offsets, int features, bool mean, int "
      "chunk, int chunks) -> Tensor");
  m.def(
      "lookup_norms(Tensor grad_out, int rows, Tensor inverse, Tensor offsets, Tensor? weights, int features, bool mean, int dim) -> "
      "Tensor");
  m.def("clear_odd(Tensor(a!) gradients, int dim, float longest) -> Tensor");
}

}  // namespace fiited::binding
