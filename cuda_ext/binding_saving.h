// Saving and loading of a shard by handle, in the bindings of all devices. All tensors are the CPU's, wherever the rows are.
#pragma once

#include <cstdlib>

#include "binding.h"
#include "core/distinct.h"

namespace fiited::binding {

constexpr auto kHost = torch::headeronly::DeviceType::CPU;

inline ScalarType storage_type(const ShardConfig& config) {
  switch (config.storage) {
    case Storage::kFloat32: return ScalarType::Float;
    case Storage::kBFloat16: return ScalarType::BFloat16;
    case Storage::kFloat16: return ScalarType::Half;
  }
  fail("unknown storage type");
}

// `shard_at` as in ByHandle.
template <auto shard_at>
struct Saving {
  // Addresses of the rows changed since the last call, or of all, in pieces of buckets with at most so many rows where one bucket has
  // no more; the bucket before which each piece ends; and its rows.
  static std::tuple<Tensor, Tensor, Tensor> changed(int64_t handle, bool all, int64_t most) {
    const auto shard = shard_at(handle);
    const ShardConfig& config = shard->config();
    const Pieces pieces = pieces_of(shard->changed(all), config.first_bucket, config.end_bucket, most);
    return {from_vector(pieces.addresses, ScalarType::Int), from_vector(pieces.ends, ScalarType::Long),
            from_vector(pieces.counts, ScalarType::Long)};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> take(int64_t handle, Tensor addresses) {
    const auto shard = shard_at(handle);
    const ShardConfig& config = shard->config();
    const int64_t n = addresses.numel();
    const auto* addresses_data = addresses_on(kHost, addresses, n);
    Tensor widths = make(n, ScalarType::Byte);
    auto* widths_data = static_cast<uint8_t*>(widths.mutable_data_ptr());
    shard->widths_at(n, addresses_data, widths_data);
    const Numbers numbers = numbers_of(config.layout(), n, widths_data);
    Tensor raw_ids = make(n, ScalarType::Long);
    Tensor tables = make(n, ScalarType::Int);
    Tensor importance = make(n, ScalarType::Float);
    Tensor values = make(numbers.values, storage_type(config));
    Tensor state = make(numbers.state, ScalarType::Float);
    shard->take(
        n, addresses_data,
        {static_cast<int64_t*>(raw_ids.mutable_data_ptr()), static_cast<int32_t*>(tables.mutable_data_ptr()), widths_data,
         static_cast<float*>(importance.mutable_data_ptr()), values.mutable_data_ptr(), static_cast<float*>(state.mutable_data_ptr())});
    return {raw_ids, tables, widths, importance, values, state};
  }

  static void put(int64_t handle, Tensor raw_ids, Tensor tables, Tensor widths, Tensor importance, Tensor values, Tensor state,
                  std::optional<Tensor> addresses) {
    const auto shard = shard_at(handle);
    const ShardConfig& config = shard->config();
    const int64_t n = raw_ids.numel();
    const auto* raw_ids_data = read_on<int64_t>(kHost, raw_ids, ScalarType::Long, "raw_ids", n);
    const auto* tables_data = read_on<int32_t>(kHost, tables, ScalarType::Int, "tables", n);
    const auto* widths_data = read_on<uint8_t>(kHost, widths, ScalarType::Byte, "widths", n);
    const auto* importance_data = read_on<float>(kHost, importance, ScalarType::Float, "importance", n);
    for (int64_t i = 0; i < n; ++i) {
      REQUIRE(tables_data[i] >= 0 && tables_data[i] < config.tables,
              "row " + std::to_string(i) + " names table " + std::to_string(tables_data[i]));
      REQUIRE(widths_data[i] > 0 && widths_data[i] <= config.chunks,
              "row " + std::to_string(i) + " has width " + std::to_string(widths_data[i]));
      REQUIRE(importance_data[i] >= 0 && importance_data[i] < 3e38f,
              "the importance of row " + std::to_string(i) + " is not a number >= 0");
    }
    const Numbers numbers = numbers_of(config.layout(), n, widths_data);
    const void* values_data = read_on<uint8_t>(kHost, values, storage_type(config), "values", numbers.values);
    const auto* state_data = read_on<float>(kHost, state, ScalarType::Float, "state", numbers.state);
    shard->put(n,
               {const_cast<int64_t*>(raw_ids_data), const_cast<int32_t*>(tables_data), const_cast<uint8_t*>(widths_data),
                const_cast<float*>(importance_data), const_cast<void*>(values_data), const_cast<float*>(state_data)},
               addresses ? addresses_on(kHost, *addresses, n) : nullptr);
  }

  static void reserve(int64_t handle, std::vector<int64_t> rows_by_width) {
    const auto shard = shard_at(handle);
    REQUIRE(static_cast<int>(rows_by_width.size()) == shard->config().chunks, "one number of rows for each width is wanted");
    shard->reserve(rows_by_width);
  }

  static Tensor state(int64_t handle) {
    const ShardState s = shard_at(handle)->state();
    const Counts& c = s.counted;
    return from_vector<int64_t>(
        {s.step, s.lowered, s.base, c.lookups, c.hits, c.admitted, c.refused, c.resized, c.evicted, c.admitted_bytes, c.asked_bytes},
        ScalarType::Long);
  }

  // Of the sketch's levels. It falls by 4 with each octave of decay for as long as no threshold sets it anew.
  static bool is_base(int64_t base) { return std::abs(base) < int64_t{1} << 30; }

  static void restore(int64_t handle, std::vector<int64_t> n, double threshold) {
    REQUIRE(n.size() == 11, "a shard's state is 11 integers");
    REQUIRE(threshold >= 0 && threshold < 3e38, "the threshold is not a number >= 0");
    REQUIRE(n[0] >= 0 && n[1] >= 0 && is_base(n[2]), "the shard's state is out of range");
    shard_at(handle)->restore({n[0], n[1], n[2], {n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10]}}, threshold);
  }

  // Sketch cells [buckets, sets * 32] and registers of the distinct counter [buckets, 4].
  static std::tuple<Tensor, Tensor> sketch(int64_t handle) {
    const auto shard = shard_at(handle);
    const int64_t buckets = shard->config().buckets();
    Tensor cells = torch::stable::empty({buckets, int64_t{shard->config().sketch_sets} * kSketchEntries}, ScalarType::Short);
    Tensor registers = torch::stable::empty({buckets, kRegistersPerBucket}, ScalarType::Byte);
    shard->sketch(static_cast<uint16_t*>(cells.mutable_data_ptr()), static_cast<uint8_t*>(registers.mutable_data_ptr()));
    return {cells, registers};
  }

  static void put_sketch(int64_t handle, int64_t first_bucket, Tensor cells, int64_t base, Tensor registers) {
    const auto shard = shard_at(handle);
    const ShardConfig& config = shard->config();
    const int64_t entries = int64_t{config.sketch_sets} * kSketchEntries;
    const int64_t buckets = cells.numel() / entries;
    const auto* cells_data =
        reinterpret_cast<const uint16_t*>(read_on<int16_t>(kHost, cells, ScalarType::Short, "cells", buckets * entries));
    const auto* registers_data = read_on<uint8_t>(kHost, registers, ScalarType::Byte, "registers", buckets * kRegistersPerBucket);
    REQUIRE(first_bucket >= config.first_bucket && first_bucket + buckets <= config.end_bucket, "the buckets belong to another shard");
    REQUIRE(is_base(base), "the base of the sketch's levels is out of range");
    shard->put_sketch(static_cast<uint32_t>(first_bucket), static_cast<uint32_t>(buckets), cells_data, static_cast<int>(base),
                      registers_data);
  }

  static void seal(int64_t handle) { shard_at(handle)->seal(); }

  template <class Library>
  static void implement(Library& m) {
    m.impl("store_changed", TORCH_BOX(&Saving::changed));
    m.impl("store_take", TORCH_BOX(&Saving::take));
    m.impl("store_put", TORCH_BOX(&Saving::put));
    m.impl("store_reserve", TORCH_BOX(&Saving::reserve));
    m.impl("store_state", TORCH_BOX(&Saving::state));
    m.impl("store_restore", TORCH_BOX(&Saving::restore));
    m.impl("store_sketch", TORCH_BOX(&Saving::sketch));
    m.impl("store_put_sketch", TORCH_BOX(&Saving::put_sketch));
    m.impl("store_seal", TORCH_BOX(&Saving::seal));
  }
};

template <class Library>
void define_saving(Library& m) {
  m.def("store_changed(int handle, bool all, int most) -> (Tensor, Tensor, Tensor)");
  m.def("store_take(int handle, Tensor addresses) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "store_put(int handle, Tensor raw_ids, Tensor tables, Tensor widths, Tensor importance, Tensor values, Tensor state, Tensor? "
      "addresses) -> ()");
  m.def("store_reserve(int handle, int[] rows_by_width) -> ()");
  m.def("store_state(int handle) -> Tensor");
  m.def("store_restore(int handle, int[] state, float threshold) -> ()");
  m.def("store_sketch(int handle) -> (Tensor, Tensor)");
  m.def("store_put_sketch(int handle, int first_bucket, Tensor cells, int base, Tensor registers) -> ()");
  m.def("store_seal(int handle) -> ()");
}

}  // namespace fiited::binding
