// The thin layer between torch and the CPU's kernels: argument checks, tensors to pointers.

#include "binding.h"

#include "binding_saving.h"
#include "cpu/batch.h"
#include "cpu/buffers.h"
#include "cpu/distinct.h"
#include "cpu/interaction.h"
#include "cpu/parallel.h"
#include "cpu/relu.h"
#include "cpu/shard.h"
#include "cpu/sockets.h"

namespace {

using namespace fiited::binding;
using fiited::CpuShard;
using fiited::Shard;
using fiited::ShardConfig;

// For results that may be large: their memory comes from `buffers` and returns there with the tensor.
Tensor make_floats(std::initializer_list<int64_t> sizes, ScalarType type = ScalarType::Float) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  const size_t bytes = static_cast<size_t>(count) * sizeof(float);
  if (bytes < fiited::Buffers::kFrom || type != ScalarType::Float) return torch::stable::empty(sizes, type);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t dim = sizes.size() - 1; dim > 0; --dim) strides[dim - 1] = strides[dim] * sizes.begin()[dim];
  return torch::stable::from_blob(fiited::buffers.take(bytes), sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Float, [bytes](void* at) { fiited::buffers.give(at, bytes); });
}

constexpr auto kPlace = torch::headeronly::DeviceType::CPU;

template <class T>
const T* read(const Tensor& tensor, ScalarType type, const char* name, int64_t size) {
  return read_on<T>(kPlace, tensor, type, name, size);
}

// The kernels' tasks run on torch's own threads.
const bool threads_set = [] {
  fiited::threads.count = [] { return static_cast<int>(torch::stable::get_num_threads()); };
  fiited::threads.run = [](int count, void (*body)(void*), void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) body(context);
    });
  };
  return true;
}();

// ---- shards ---------------------------------------------------------------------------------------------------------

Handles<CpuShard> shards;

int64_t store_create(std::vector<int64_t> ints, std::vector<double> floats) { return shards.add(CpuShard::make(config_of(ints, floats))); }
void store_destroy(int64_t handle) { shards.remove(handle); }
std::shared_ptr<CpuShard> shard_at(int64_t handle) { return shards[handle]; }

// The first i below n for which `wrong(i)` is negative, n where there is none. Signs are gathered over a block, in vector code.
template <class Wrong>
int64_t first_wrong(int64_t n, Wrong&& wrong) {
  constexpr int64_t kBlock = 4096;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    int64_t signs = 0;
    for (int64_t i = begin; i < end; ++i) signs |= wrong(i);
    if (signs >= 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (wrong(i) < 0) return i;
    }
  }
  return n;
}

// Negative where `x` is not in [begin, end).
inline int64_t outside(int64_t x, int64_t begin, int64_t end) { return (x - begin) | (end - 1 - x); }

// The first i below n where offsets[i + 1] is less than offsets[i], or than 0; n where there is none. offsets[0] must not be negative:
// then none is before the first that is wrong, and no difference up to it overflows.
int64_t first_fall(int64_t n, const int64_t* offsets) {
  return first_wrong(n, [&](int64_t i) {
    return static_cast<int64_t>(static_cast<uint64_t>(offsets[i + 1]) - static_cast<uint64_t>(offsets[i])) | offsets[i + 1];
  });
}

void check_keys(const ShardConfig& config, const int64_t* keys, const int32_t* tables, int64_t n) {
  const auto bucket = [&](int64_t i) { return fiited::bucket_of(static_cast<uint64_t>(keys[i])); };
  const int64_t foreign = first_wrong(n, [&](int64_t i) { return outside(bucket(i), config.first_bucket, config.end_bucket); });
  REQUIRE(foreign == n, "key " + std::to_string(foreign) + " belongs to another shard (bucket " + std::to_string(bucket(foreign)) + ")");
  const int64_t odd = first_wrong(n, [&](int64_t i) { return outside(tables[i], 0, config.tables); });
  REQUIRE(odd == n, "table " + std::to_string(tables[odd]) + " of key " + std::to_string(odd) + " does not exist");
}

std::tuple<Tensor, Tensor> store_lookup(int64_t handle, Tensor keys, Tensor tables, Tensor counts, bool training, int64_t step,
                                        int64_t quota) {
  const auto shard = shard_at(handle);
  const int64_t n = keys.numel();
  const auto* keys_data = read<int64_t>(keys, ScalarType::Long, "keys", n);
  const auto* tables_data = read<int32_t>(tables, ScalarType::Int, "tables", n);
  const auto* counts_data = read<int32_t>(counts, ScalarType::Int, "counts", n);
  check_keys(shard->config(), keys_data, tables_data, n);
  Tensor addresses = make(n, ScalarType::Int);
  Tensor widths = make(n, ScalarType::Byte);
  shard->lookup(n, keys_data, tables_data, counts_data, training, step, static_cast<uint64_t>(quota),
                static_cast<uint32_t*>(addresses.mutable_data_ptr()), static_cast<uint8_t*>(widths.mutable_data_ptr()));
  return {addresses, widths};
}

const uint32_t* read_addresses(const Tensor& addresses, int64_t n) { return addresses_on(kPlace, addresses, n); }

// The rows of a lookup must still be there: reading them follows their addresses.
void check_addresses(const CpuShard& shard, const uint32_t* addresses, const uint8_t* widths, int64_t n) {
  const int64_t moved = shard.first_moved(n, addresses, widths);
  REQUIRE(moved == n, "row " + std::to_string(moved) + " was resized or moved since its lookup; look up again after a round");
}

Tensor store_read(int64_t handle, Tensor addresses, Tensor widths, std::optional<Tensor> take) {
  const auto shard = shard_at(handle);
  const int64_t rows = widths.numel();
  const auto* addresses_data = read_addresses(addresses, rows);
  const auto* widths_data = read<uint8_t>(widths, ScalarType::Byte, "widths", rows);
  check_addresses(*shard, addresses_data, widths_data, rows);
  const int64_t n = take ? take->numel() : rows;
  const auto* take_data = read_on<int32_t>(kPlace, take, ScalarType::Int, "take", n);
  int64_t chunks = 0;
  for (int64_t i = 0; i < n; ++i) {
    REQUIRE(!take || (take_data[i] >= 0 && take_data[i] < rows), "take " + std::to_string(i) + " is out of range");
    chunks += widths_data[take ? take_data[i] : i];
  }
  Tensor values = make_floats({chunks * shard->config().chunk});
  shard->read(n, take_data, addresses_data, widths_data, static_cast<float*>(values.mutable_data_ptr()));
  return values;
}

// ---- batches --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dedup_ids(Tensor ids, Tensor feature_ends, Tensor feature_tables, int64_t seed,
                                                             int64_t workers) {
  const int64_t n = ids.numel();
  const int64_t features = feature_ends.numel();
  const auto* ends = read<int64_t>(feature_ends, ScalarType::Long, "feature_ends", features);
  for (int64_t f = 0; f < features; ++f) {
    REQUIRE(ends[f] >= (f ? ends[f - 1] : 0), "feature_ends falls at feature " + std::to_string(f));
  }
  REQUIRE((features ? ends[features - 1] : 0) == n, "feature_ends must end at the number of ids");
  REQUIRE(workers > 0 && workers <= fiited::kBuckets, "there must be 1 to 1024 workers");
  const auto* table_of = read<int32_t>(feature_tables, ScalarType::Int, "feature_tables", features);
  for (int64_t f = 0; f < features; ++f) {
    REQUIRE(table_of[f] >= 0 && table_of[f] < fiited::kMostTables,
            "feature " + std::to_string(f) + " has table " + std::to_string(table_of[f]));
  }
  Tensor keys = make(n, ScalarType::Long);
  Tensor tables = make(n, ScalarType::Int);
  Tensor counts = make(n, ScalarType::Int);
  Tensor inverse = make(n, ScalarType::Int);
  Tensor splits = make(workers, ScalarType::Long);
  fiited::Deduped out{0, static_cast<int64_t*>(keys.mutable_data_ptr()), static_cast<int32_t*>(tables.mutable_data_ptr()),
                      static_cast<int32_t*>(counts.mutable_data_ptr()), static_cast<int32_t*>(inverse.mutable_data_ptr())};
  fiited::dedup_ids(read<int64_t>(ids, ScalarType::Long, "ids", n), ends, table_of, static_cast<int>(features), static_cast<uint64_t>(seed),
                    static_cast<int>(workers), out, static_cast<int64_t*>(splits.mutable_data_ptr()));
  return {torch::stable::narrow(keys, 0, 0, out.unique), torch::stable::narrow(tables, 0, 0, out.unique),
          torch::stable::narrow(counts, 0, 0, out.unique), inverse, splits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dedup_keys(Tensor keys, Tensor tables, Tensor counts) {
  const int64_t n = keys.numel();
  Tensor out_keys = make(n, ScalarType::Long);
  Tensor out_tables = make(n, ScalarType::Int);
  Tensor out_counts = make(n, ScalarType::Int);
  Tensor inverse = make(n, ScalarType::Int);
  fiited::Deduped out{0, static_cast<int64_t*>(out_keys.mutable_data_ptr()), static_cast<int32_t*>(out_tables.mutable_data_ptr()),
                      static_cast<int32_t*>(out_counts.mutable_data_ptr()), static_cast<int32_t*>(inverse.mutable_data_ptr())};
  fiited::dedup_keys(n, read<int64_t>(keys, ScalarType::Long, "keys", n), read<int32_t>(tables, ScalarType::Int, "tables", n),
                     read<int32_t>(counts, ScalarType::Int, "counts", n), out);
  return {torch::stable::narrow(out_keys, 0, 0, out.unique), torch::stable::narrow(out_tables, 0, 0, out.unique),
          torch::stable::narrow(out_counts, 0, 0, out.unique), inverse};
}

// Where each row starts, in floats, and how many there are in all.
std::vector<int64_t> starts_of(const uint8_t* widths, int64_t rows, int64_t chunk, int64_t chunks, bool wire) {
  std::vector<int64_t> starts(rows + 1, 0);
  for (int64_t i = 0; i < rows; ++i) {
    REQUIRE(widths[i] <= chunks, "width " + std::to_string(widths[i]) + " of row " + std::to_string(i) + " is more than all chunks");
    starts[i + 1] =
        starts[i] + (wire ? fiited::gradient_size(widths[i], static_cast<int>(chunk), static_cast<int>(chunks)) : widths[i] * chunk);
  }
  return starts;
}

// Bags of n lookups whose offsets have been looked at.
fiited::Bags checked(const fiited::Bags& bags, int64_t n) {
  const int64_t last = bags.features * bags.batch;
  REQUIRE(bags.offsets[0] == 0 && bags.offsets[last] == n, "offsets must begin at 0 and end at the number of lookups");
  const int64_t fall = first_fall(last, bags.offsets);
  REQUIRE(fall == last, "offsets fall at feature " + std::to_string(fall / std::max<int64_t>(bags.batch, 1)) + ", position " +
                            std::to_string(fall % std::max<int64_t>(bags.batch, 1)));
  return bags;
}

fiited::Bags bags_of(const Tensor& inverse, const Tensor& offsets, const std::optional<Tensor>& weights, ScalarType real, int64_t features,
                     bool mean, int64_t chunk, int64_t chunks, int64_t rows) {
  const int64_t n = inverse.numel();
  const fiited::Bags bags = checked(bags_on(kPlace, inverse, offsets, weights, real, features, mean, chunk, chunks), n);
  const int64_t lost = first_wrong(n, [&](int64_t i) { return outside(bags.inverse[i], 0, rows); });
  REQUIRE(lost == n, "lookup " + std::to_string(lost) + " names a row that is not there");
  return bags;
}

Tensor pool(Tensor values, Tensor widths, Tensor inverse, Tensor offsets, std::optional<Tensor> weights, int64_t features, bool mean,
            int64_t chunk, int64_t chunks) {
  const ScalarType type = real_type(values, "values");
  const int64_t rows = widths.numel();
  const auto* widths_data = read<uint8_t>(widths, ScalarType::Byte, "widths", rows);
  const auto starts = starts_of(widths_data, rows, chunk, chunks, false);
  const fiited::Bags bags = bags_of(inverse, offsets, weights, type, features, mean, chunk, chunks, rows);
  Tensor out = make_floats({bags.batch, features, chunk * chunks}, type);
  with_real(type, [&](auto real) {
    using Real = decltype(real);
    fiited::pool<Real>(bags, read<Real>(values, type, "values", starts.back()), starts.data(), widths_data,
                       static_cast<Real*>(out.mutable_data_ptr()));
  });
  return out;
}

Tensor pool_backward(Tensor grad_out, Tensor widths, Tensor inverse, Tensor offsets, std::optional<Tensor> weights, int64_t features,
                     bool mean, int64_t chunk, int64_t chunks, bool fold) {
  const ScalarType type = real_type(grad_out, "grad_out");
  const int64_t rows = widths.numel();
  const auto* widths_data = read<uint8_t>(widths, ScalarType::Byte, "widths", rows);
  const auto starts = starts_of(widths_data, rows, chunk, chunks, fold);
  const fiited::Bags bags = bags_of(inverse, offsets, weights, type, features, mean, chunk, chunks, rows);
  Tensor out = make_floats({starts.back()}, type);
  with_real(type, [&](auto real) {
    using Real = decltype(real);
    const auto* grad = read<Real>(grad_out, type, "grad_out", bags.batch * features * chunk * chunks);
    fiited::pool_backward<Real>(bags, grad, rows, starts.data(), widths_data, fold, static_cast<Real*>(out.mutable_data_ptr()));
  });
  return out;
}

Tensor pool_weights_backward(Tensor grad_out, Tensor values, Tensor widths, Tensor inverse, Tensor offsets, int64_t features, bool mean,
                             int64_t chunk, int64_t chunks) {
  const ScalarType type = real_type(grad_out, "grad_out");
  const int64_t rows = widths.numel();
  const auto* widths_data = read<uint8_t>(widths, ScalarType::Byte, "widths", rows);
  const auto starts = starts_of(widths_data, rows, chunk, chunks, false);
  const fiited::Bags bags = bags_of(inverse, offsets, std::nullopt, type, features, mean, chunk, chunks, rows);
  Tensor out = make(inverse.numel(), type);
  with_real(type, [&](auto real) {
    using Real = decltype(real);
    const auto* grad = read<Real>(grad_out, type, "grad_out", bags.batch * features * chunk * chunks);
    fiited::pool_weights_backward<Real>(bags, grad, read<Real>(values, type, "values", starts.back()), starts.data(), widths_data,
                                        static_cast<Real*>(out.mutable_data_ptr()));
  });
  return out;
}

Tensor lookup_norms(Tensor grad_out, int64_t rows, Tensor inverse, Tensor offsets, std::optional<Tensor> weights, int64_t features,
                    bool mean, int64_t dim) {
  const fiited::Bags bags = bags_of(inverse, offsets, weights, ScalarType::Float, features, mean, dim, 1, rows);
  Tensor out = make(rows, ScalarType::Float);
  fiited::lookup_norms(bags, read<float>(grad_out, ScalarType::Float, "grad_out", bags.batch * features * dim), rows,
                       static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

Tensor clear_odd(Tensor gradients, int64_t dim, double longest) {
  const int64_t n = gradients.numel() / dim;
  read<float>(gradients, ScalarType::Float, "gradients", n * dim);
  Tensor found = make(1, ScalarType::Long);
  *static_cast<int64_t*>(found.mutable_data_ptr()) =
      fiited::clear_odd(n, static_cast<int>(dim), static_cast<float>(longest), static_cast<float*>(gradients.mutable_data_ptr()));
  return found;
}

// ---- a lookup's rows, pooled ------------------------------------------------------------------------------------------

Tensor store_pool(int64_t handle, Tensor addresses, Tensor widths, Tensor inverse, Tensor offsets, std::optional<Tensor> weights,
                  int64_t features, bool mean) {
  const auto shard = shard_at(handle);
  const ShardConfig& config = shard->config();
  const int64_t rows = widths.numel();
  const auto* addresses_data = read_addresses(addresses, rows);
  check_addresses(*shard, addresses_data, read<uint8_t>(widths, ScalarType::Byte, "widths", rows), rows);
  const fiited::Bags bags = bags_of(inverse, offsets, weights, ScalarType::Float, features, mean, config.chunk, config.chunks, rows);
  Tensor out = make_floats({bags.batch, features, bags.dim()});
  shard->pool(bags, addresses_data, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

Tensor store_pool_ids(int64_t handle, Tensor ids, Tensor offsets, Tensor feature_tables, std::optional<Tensor> weights, bool mean) {
  const auto shard = shard_at(handle);
  const ShardConfig& config = shard->config();
  REQUIRE(config.buckets() == fiited::kBuckets, "rows of any id can be read from a shard with all buckets alone");
  const int64_t features = feature_tables.numel();
  const auto* tables_data = read<int32_t>(feature_tables, ScalarType::Int, "feature_tables", features);
  for (int64_t f = 0; f < features; ++f) {
    REQUIRE(tables_data[f] >= 0 && tables_data[f] < config.tables,
            "table " + std::to_string(tables_data[f]) + " of feature " + std::to_string(f) + " does not exist");
  }
  const fiited::Bags bags =
      checked(bags_on(kPlace, ids.numel(), offsets, weights, ScalarType::Float, features, mean, config.chunk, config.chunks), ids.numel());
  Tensor out = make_floats({bags.batch, features, bags.dim()});
  shard->pool_ids(bags, read<int64_t>(ids, ScalarType::Long, "ids", -1), tables_data, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

Shard::Update update_of(const ShardConfig& config, const Tensor& keys, const Tensor& tables, const Tensor& addresses, const Tensor& widths,
                        const Tensor& counts, const std::optional<Tensor>& lookup_norms, double lr, int64_t step, int64_t quota) {
  const Shard::Update rows = update_on(kPlace, keys, tables, addresses, widths, counts, lookup_norms, 0, lr, step, quota);
  check_keys(config, rows.keys, rows.tables, rows.n);
  return rows;
}

void store_update(int64_t handle, Tensor keys, Tensor tables, Tensor addresses, Tensor widths, Tensor counts, Tensor gradients,
                  std::optional<Tensor> target, std::optional<Tensor> lookup_norms, double lr, int64_t step, int64_t quota) {
  const auto shard = shard_at(handle);
  const ShardConfig& config = shard->config();
  const Shard::Update rows = update_of(config, keys, tables, addresses, widths, counts, lookup_norms, lr, step, quota);
  const int64_t arrivals = target ? target->numel() : rows.n;
  const auto* target_data = read_on<int32_t>(kPlace, target, ScalarType::Int, "target", arrivals);
  int64_t size = 0;
  for (int64_t i = 0; i < arrivals; ++i) {
    REQUIRE(!target || (target_data[i] >= 0 && target_data[i] < rows.n), "target " + std::to_string(i) + " is out of range");
    const uint8_t width = rows.widths[target ? target_data[i] : i];
    REQUIRE(width <= config.chunks, "width " + std::to_string(width) + " is more than all chunks");
    size += fiited::gradient_size(width, config.chunk, config.chunks);
  }
  shard->update(rows, read<float>(gradients, ScalarType::Float, "gradients", size), arrivals, target_data);
}

void store_update_pooled(int64_t handle, Tensor keys, Tensor tables, Tensor addresses, Tensor widths, Tensor counts, Tensor grad_out,
                         Tensor inverse, Tensor offsets, std::optional<Tensor> weights, int64_t features, bool mean,
                         std::optional<Tensor> lookup_norms, double lr, int64_t step, int64_t quota) {
  const auto shard = shard_at(handle);
  const ShardConfig& config = shard->config();
  const Shard::Update rows = update_of(config, keys, tables, addresses, widths, counts, lookup_norms, lr, step, quota);
  const fiited::Bags bags = bags_of(inverse, offsets, weights, ScalarType::Float, features, mean, config.chunk, config.chunks, rows.n);
  shard->update_pooled(rows, bags, read<float>(grad_out, ScalarType::Float, "grad_out", bags.batch * features * bags.dim()));
}

// ---- ids ---------------------------------------------------------------------------------------------------------------

Tensor hash_strings(Tensor offsets, Tensor bytes, int64_t seed) {
  const int64_t n = offsets.numel() - 1;
  REQUIRE(n >= 0, "offsets must have at least one element");
  const auto* ends = read<int64_t>(offsets, ScalarType::Long, "offsets", -1);
  const auto* data = read<uint8_t>(bytes, ScalarType::Byte, "bytes", -1);
  REQUIRE(ends[0] >= 0 && ends[n] <= bytes.numel(), "string offsets pass the end of the bytes");
  const int64_t fall = first_fall(n, ends);
  REQUIRE(fall == n, "string offsets fall at " + std::to_string(fall));
  Tensor out = make(n, ScalarType::Long);
  fiited::hash_strings(n, ends, data, static_cast<uint64_t>(seed), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

Tensor cross_ids(Tensor left, Tensor right, int64_t seed) {
  const int64_t n = left.numel();
  Tensor out = make(n, ScalarType::Long);
  fiited::cross_ids(n, read<int64_t>(left, ScalarType::Long, "left", n), read<int64_t>(right, ScalarType::Long, "right", n),
                    static_cast<uint64_t>(seed), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

// ---- interaction ---------------------------------------------------------------------------------------------------------

fiited::Interaction interaction_of(const std::optional<Tensor>& below, const Tensor& vectors) {
  REQUIRE(vectors.dim() == 3, "vectors must be [batch, features, dim]");
  fiited::Interaction shape{vectors.size(0), static_cast<int>(vectors.size(1)), static_cast<int>(vectors.size(2)), nullptr,
                            read<float>(vectors, ScalarType::Float, "vectors", -1)};
  if (below) shape.below = read<float>(*below, ScalarType::Float, "below", shape.batch * shape.dim);
  return shape;
}

Tensor interact(std::optional<Tensor> below, Tensor vectors, int64_t columns) {
  const auto shape = interaction_of(below, vectors);
  REQUIRE(columns >= shape.width(), "columns must be at least " + std::to_string(shape.width()));
  Tensor out = torch::stable::empty({shape.batch, columns}, ScalarType::Float);
  fiited::interact(shape, static_cast<int>(columns), static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

// Gradients of `below` (empty where there is none) and of `vectors`.
std::tuple<Tensor, Tensor> interact_backward(Tensor grad_out, std::optional<Tensor> below, Tensor vectors) {
  const auto shape = interaction_of(below, vectors);
  REQUIRE(grad_out.dim() == 2 && grad_out.size(0) == shape.batch && grad_out.size(1) >= shape.width(),
          "grad_out must be [batch, columns], as interact gave it");
  const auto* grad = read<float>(grad_out, ScalarType::Float, "grad_out", -1);
  Tensor grad_below = torch::stable::empty({shape.below != nullptr ? shape.batch : 0, shape.dim}, ScalarType::Float);
  Tensor grad_vectors = torch::stable::empty({shape.batch, shape.vectors_in, shape.dim}, ScalarType::Float);
  fiited::interact_backward(shape, static_cast<int>(grad_out.size(1)), grad, static_cast<float*>(grad_below.mutable_data_ptr()),
                            static_cast<float*>(grad_vectors.mutable_data_ptr()));
  return {grad_below, grad_vectors};
}

// ---- layers ---------------------------------------------------------------------------------------------------------------

// The gradient before a ReLU [rows, width], the same transposed (empty if it is not wanted), and its sum over the rows.
std::tuple<Tensor, Tensor, Tensor> relu_backward(Tensor grad_out, Tensor out, bool transposed) {
  REQUIRE(out.dim() == 2, "out must be [rows, width]");
  const int64_t rows = out.size(0), width = out.size(1);
  const auto* grad = read<float>(grad_out, ScalarType::Float, "grad_out", rows * width);
  Tensor before = torch::stable::empty({rows, width}, ScalarType::Float);
  Tensor columns = torch::stable::empty({width, transposed ? rows : 0}, ScalarType::Float);
  Tensor sums = make(width, ScalarType::Float);
  fiited::relu_backward(
      rows, static_cast<int>(width), grad, read<float>(out, ScalarType::Float, "out", -1), static_cast<float*>(before.mutable_data_ptr()),
      transposed ? static_cast<float*>(columns.mutable_data_ptr()) : nullptr, static_cast<float*>(sums.mutable_data_ptr()));
  return {before, columns, sums};
}

// ---- exchange ------------------------------------------------------------------------------------------------------------

int64_t sum_of_parts(const std::vector<int64_t>& parts) {
  int64_t sum = 0;
  for (const int64_t part : parts) {
    REQUIRE(part >= 0, "a part of an exchange has " + std::to_string(part) + " bytes");
    sum += part;
  }
  return sum;
}

int64_t bytes_of(const Tensor& tensor) {
  REQUIRE(tensor.is_contiguous(), "what is exchanged must be contiguous");
  return tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

// What goes from `rows` to each other process, and where in `out` what comes from it belongs; part `rank` is copied.
std::vector<fiited::Flow> flows_of(const std::vector<int64_t>& sockets, int64_t rank, Tensor& out, const Tensor& rows,
                                   const std::vector<int64_t>& send, const std::vector<int64_t>& receive) {
  const size_t workers = sockets.size();
  REQUIRE(send.size() == workers && receive.size() == workers && rank >= 0 && rank < static_cast<int64_t>(workers),
          "an exchange needs a socket and the sizes of what goes and comes for each worker");
  REQUIRE(sum_of_parts(send) == bytes_of(rows) && sum_of_parts(receive) == bytes_of(out),
          "the parts of an exchange are not all of what is exchanged");
  REQUIRE(send[rank] == receive[rank], "what a worker keeps of an exchange changes its size");
  const auto* from = static_cast<const std::byte*>(rows.const_data_ptr());
  auto* to = static_cast<std::byte*>(out.mutable_data_ptr());
  std::vector<fiited::Flow> flows;
  for (size_t peer = 0; peer < workers; ++peer) {
    if (static_cast<int64_t>(peer) == rank) {
      std::copy_n(from, send[rank], to);
    } else {
      flows.push_back({static_cast<int>(sockets[peer]), static_cast<int>(peer), from, send[peer], to, receive[peer]});
    }
    from += send[peer];
    to += receive[peer];
  }
  return flows;
}

// Part `rank` of `rows`, in bytes, goes to this process itself, the others through their sockets.
void all_to_all(std::vector<int64_t> sockets, int64_t rank, Tensor out, Tensor rows, std::vector<int64_t> send,
                std::vector<int64_t> receive, int64_t operation, double timeout) {
  std::vector<fiited::Flow> flows = flows_of(sockets, rank, out, rows, send, receive);
  fiited::all_to_all(flows, static_cast<uint64_t>(operation), timeout, [&] {
    for (const fiited::Flow& flow : flows) {
      REQUIRE(flow.more_to_receive == 0, "exchange with worker " + std::to_string(flow.peer) + ": it sends " +
                                             std::to_string(flow.more_to_receive) + " bytes more than are expected");
    }
  });
}

// The same, and behind each part of `rows` one of `more`, of which only the sender knows how much there is. Gives what came of it, and its
// parts' sizes.
std::tuple<Tensor, Tensor> all_to_all_with(std::vector<int64_t> sockets, int64_t rank, Tensor out, Tensor rows, std::vector<int64_t> send,
                                           std::vector<int64_t> receive, Tensor more, std::vector<int64_t> send_more, int64_t operation,
                                           double timeout) {
  std::vector<fiited::Flow> flows = flows_of(sockets, rank, out, rows, send, receive);
  REQUIRE(send_more.size() == sockets.size() && sum_of_parts(send_more) == bytes_of(more),
          "the parts of an exchange are not all of what is exchanged");
  // Visits each worker's flow, this one's being null, in the order of ranks.
  const auto for_each_worker = [&](auto&& visit) {
    auto flow = flows.begin();
    for (size_t worker = 0; worker < sockets.size(); ++worker) {
      visit(worker, static_cast<int64_t>(worker) == rank ? nullptr : &*flow++);
    }
  };
  const auto* from = static_cast<const std::byte*>(more.const_data_ptr());
  const std::byte* own = nullptr;
  for_each_worker([&](size_t worker, fiited::Flow* flow) {
    if (flow != nullptr) {
      flow->more_out = from;
      flow->more_to_send = send_more[worker];
    } else {
      own = from;
    }
    from += send_more[worker];
  });
  std::vector<int64_t> receive_more = send_more;  // right for this process's own part
  Tensor arrived;
  fiited::all_to_all(flows, static_cast<uint64_t>(operation), timeout, [&] {
    for (const fiited::Flow& flow : flows) receive_more[flow.peer] = flow.more_to_receive;
    arrived = make(sum_of_parts(receive_more), ScalarType::Byte);
    auto* to = static_cast<std::byte*>(arrived.mutable_data_ptr());
    for_each_worker([&](size_t worker, fiited::Flow* flow) {
      if (flow != nullptr) {
        flow->more_in = to;
      } else {
        std::copy_n(own, send_more[rank], to);
      }
      to += receive_more[worker];
    });
  });
  return {arrived, from_vector(receive_more, ScalarType::Long)};
}

}  // namespace

STABLE_TORCH_LIBRARY(fiited, m) {
  define(m);
  define_saving(m);
  m.def("store_pool_ids(int handle, Tensor ids, Tensor offsets, Tensor feature_tables, Tensor? weights, bool mean) -> Tensor");
  m.def("hash_strings(Tensor offsets, Tensor bytes, int seed) -> Tensor");
  m.def("cross_ids(Tensor left, Tensor right, int seed) -> Tensor");
  m.def("relu_backward(Tensor grad_out, Tensor out, bool transposed) -> (Tensor, Tensor, Tensor)");
  m.def("interact(Tensor? below, Tensor vectors, int columns) -> Tensor");
  m.def("interact_backward(Tensor grad_out, Tensor? below, Tensor vectors) -> (Tensor, Tensor)");
  m.def("all_to_all(int[] sockets, int rank, Tensor(a!) out, Tensor rows, int[] send, int[] receive, int operation, float timeout) -> ()");
  m.def(
      "all_to_all_with(int[] sockets, int rank, Tensor(a!) out, Tensor rows, int[] send, int[] receive, Tensor more, int[] send_more, "
      "int operation, float timeout) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fiited, CompositeExplicitAutograd, m) {
  m.impl("store_create", TORCH_BOX(&store_create));
  m.impl("store_destroy", TORCH_BOX(&store_destroy));
  ByHandle<&shard_at>::implement(m);
  Saving<&shard_at>::implement(m);
}

STABLE_TORCH_LIBRARY_IMPL(fiited, CPU, m) {
  m.impl("store_lookup", TORCH_BOX(&store_lookup));
  m.impl("store_read", TORCH_BOX(&store_read));
  m.impl("store_pool", TORCH_BOX(&store_pool));
  m.impl("store_pool_ids", TORCH_BOX(&store_pool_ids));
  m.impl("store_update", TORCH_BOX(&store_update));
  m.impl("store_update_pooled", TORCH_BOX(&store_update_pooled));
  m.impl("dedup_ids", TORCH_BOX(&dedup_ids));
  m.impl("dedup_keys", TORCH_BOX(&dedup_keys));
  m.impl("pool", TORCH_BOX(&pool));
  m.impl("pool_backward", TORCH_BOX(&pool_backward));
  m.impl("pool_weights_backward", TORCH_BOX(&pool_weights_backward));
  m.impl("lookup_norms", TORCH_BOX(&lookup_norms));
  m.impl("clear_odd", TORCH_BOX(&clear_odd));
  m.impl("relu_backward", TORCH_BOX(&relu_backward));
  m.impl("interact", TORCH_BOX(&interact));
  m.impl("interact_backward", TORCH_BOX(&interact_backward));
  m.impl("hash_strings", TORCH_BOX(&hash_strings));
  m.impl("cross_ids", TORCH_BOX(&cross_ids));
  m.impl("all_to_all", TORCH_BOX(&all_to_all));
  m.impl("all_to_all_with", TORCH_BOX(&all_to_all_with));
}
