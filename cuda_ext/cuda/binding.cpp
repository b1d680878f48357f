// The thin layer between torch and the device's kernels. Built twice of one source: for CUDA tensors, and, with FIITED_EMULATED, for CPU
// tensors that stand in for them. What tensors hold is checked by the kernels (cuda/faults.h).

#include "binding.h"

#include <torch/csrc/stable/accelerator.h>

#include "binding_saving.h"
#include "core/layout.h"
#include "cuda/api.h"

#if !defined(FIITED_EMULATED)
// Of torch's stable shims; their header declares it only where torch itself was built for CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);
#endif

namespace {

using namespace fiited::binding;
using fiited::Bags;
using fiited::Shard;
using fiited::ShardConfig;
namespace device = fiited::device;

#if defined(FIITED_EMULATED)
#define FIITED_NAMESPACE fiited_emulated
#define FIITED_KEY CPU
constexpr auto kPlace = torch::headeronly::DeviceType::CPU;

// Makes a tensor's device the current one, as long as this lives.
struct OnDevice {
  explicit OnDevice(const Tensor&) {}
  explicit OnDevice(int) {}
  void* stream() const { return nullptr; }
};
int current_index() { return 0; }
#else
#define FIITED_NAMESPACE fiited_cuda
#define FIITED_KEY CUDA
constexpr auto kPlace = torch::headeronly::DeviceType::CUDA;

struct OnDevice {
  explicit OnDevice(const Tensor& tensor) : OnDevice(tensor.get_device_index()) {}
  explicit OnDevice(int index) : index(index), guard(index) {}
  void* stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    return stream;
  }
  int index;
  torch::stable::accelerator::DeviceGuard guard;
};
int current_index() { return torch::stable::accelerator::getCurrentDeviceIndex(); }
#endif

template <class T>
const T* read(const Tensor& tensor, ScalarType type, const char* name, int64_t size) {
  return read_on<T>(kPlace, tensor, type, name, size);
}

Tensor make_beside(const Tensor& other, std::initializer_list<int64_t> sizes, ScalarType type) {
  return torch::stable::empty(sizes, type, std::nullopt, other.device());
}

template <class T>
T* data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// ---- shards ---------------------------------------------------------------------------------------------------------

struct Placed {
  std::shared_ptr<device::StepShard> shard;
  int index;  // of its device
};
Handles<Placed> shards;

int64_t store_create(std::vector<int64_t> ints, std::vector<double> floats) {
  const int index = current_index();
  const OnDevice on(index);
  return shards.add(std::make_shared<Placed>(Placed{device::make_shard(config_of(ints, floats)), index}));
}

void store_destroy(int64_t handle) {
  const auto placed = shards[handle];
  const OnDevice on(placed->index);
  shards.remove(handle);
  placed->shard.reset();
}

// A shard with its device current, on torch's stream there.
class Current {
 public:
  explicit Current(int64_t handle) : placed_(shards[handle]), on_(placed_->index) { placed_->shard->use_stream(on_.stream()); }
  device::StepShard* operator->() const { return placed_->shard.get(); }
  device::StepShard& operator*() const { return *placed_->shard; }
  void* stream() const { return on_.stream(); }

 private:
  std::shared_ptr<Placed> placed_;
  OnDevice on_;
};

Current shard_at(int64_t handle) { return Current(handle); }

std::tuple<Tensor, Tensor> store_lookup(int64_t handle, Tensor keys, Tensor tables, Tensor counts, bool training, int64_t step,
                                        int64_t quota) {
  const Current shard(handle);
  const int64_t n = keys.numel();
  const auto* keys_data = read<int64_t>(keys, ScalarType::Long, "keys", n);
  Tensor addresses = make_beside(keys, {n}, ScalarType::Int);
  Tensor widths = make_beside(keys, {n}, ScalarType::Byte);
  shard->lookup(n, keys_data, read<int32_t>(tables, ScalarType::Int, "tables", n), read<int32_t>(counts, ScalarType::Int, "counts", n),
                training, step, static_cast<uint64_t>(quota), data<uint32_t>(addresses), data<uint8_t>(widths));
  return {addresses, widths};
}

const uint32_t* read_addresses(const Tensor& addresses, int64_t n) { return addresses_on(kPlace, addresses, n); }

Tensor store_read(int64_t handle, Tensor addresses, Tensor widths, std::optional<Tensor> take) {
  const Current shard(handle);
  const int64_t rows = widths.numel();
  const int64_t n = take ? take->numel() : rows;
  const auto* addresses_data = read_addresses(addresses, rows);
  const auto* take_data = read_on<int32_t>(kPlace, take, ScalarType::Int, "take", n);
  Tensor starts = make_beside(widths, {n + 1}, ScalarType::Long);
  const int64_t size = shard->read_starts(n, rows, take_data, addresses_data, read<uint8_t>(widths, ScalarType::Byte, "widths", rows),
                                          data<int64_t>(starts));
  Tensor values = make_beside(widths, {size}, ScalarType::Float);
  shard->read(n, take_data, addresses_data, data<int64_t>(starts), data<float>(values));
  return values;
}

Tensor store_pool(int64_t handle, Tensor addresses, Tensor widths, Tensor inverse, Tensor offsets, std::optional<Tensor> weights,
                  int64_t features, bool mean) {
  const Current shard(handle);
  const ShardConfig& config = shard->config();
  const int64_t rows = widths.numel();
  const Bags bags = bags_on(kPlace, inverse, offsets, weights, ScalarType::Float, features, mean, config.chunk, config.chunks);
  Tensor out = make_beside(widths, {bags.batch, features, bags.dim()}, ScalarType::Float);
  shard->pool(bags, inverse.numel(), rows, read_addresses(addresses, rows), read<uint8_t>(widths, ScalarType::Byte, "widths", rows),
              data<float>(out));
  return out;
}

void store_update(int64_t handle, Tensor keys, Tensor tables, Tensor addresses, Tensor widths, Tensor counts, Tensor gradients,
                  std::optional<Tensor> target, std::optional<Tensor> lookup_norms, double lr, int64_t step, int64_t quota) {
  const Current shard(handle);
  const auto rows = update_on(kPlace, keys, tables, addresses, widths, counts, lookup_norms, gradients.numel(), lr, step, quota);
  const int64_t arrivals = target ? target->numel() : rows.n;
  shard->update(rows, read<float>(gradients, ScalarType::Float, "gradients", -1), arrivals,
                read_on<int32_t>(kPlace, target, ScalarType::Int, "target", arrivals));
}

void store_update_pooled(int64_t handle, Tensor keys, Tensor tables, Tensor addresses, Tensor widths, Tensor counts, Tensor grad_out,
                         Tensor inverse, Tensor offsets, std::optional<Tensor> weights, int64_t features, bool mean,
                         std::optional<Tensor> lookup_norms, double lr, int64_t step, int64_t quota) {
  const Current shard(handle);
  const ShardConfig& config = shard->config();
  const auto rows = update_on(kPlace, keys, tables, addresses, widths, counts, lookup_norms, grad_out.numel(), lr, step, quota);
  const Bags bags = bags_on(kPlace, inverse, offsets, weights, ScalarType::Float, features, mean, config.chunk, config.chunks);
  shard->update_pooled(rows, bags, inverse.numel(),
                       read<float>(grad_out, ScalarType::Float, "grad_out", bags.batch * features * bags.dim()));
}

// ---- batches --------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> dedup_ids(Tensor ids, Tensor feature_ends, Tensor feature_tables, int64_t seed,
                                                             int64_t workers) {
  const OnDevice on(ids);
  const int64_t n = ids.numel();
  const int64_t features = feature_ends.numel();
  REQUIRE(workers > 0 && workers <= fiited::kBuckets, "there must be 1 to 1024 workers");
  REQUIRE(features > 0 || n == 0, "feature_ends must end at the number of ids");
  Tensor keys = make_beside(ids, {n}, ScalarType::Long);
  Tensor tables = make_beside(ids, {n}, ScalarType::Int);
  Tensor counts = make_beside(ids, {n}, ScalarType::Int);
  Tensor inverse = make_beside(ids, {n}, ScalarType::Int);
  Tensor splits = make(workers, ScalarType::Long);  // the host's
  fiited::Deduped out{0, data<int64_t>(keys), data<int32_t>(tables), data<int32_t>(counts), data<int32_t>(inverse)};
  device::dedup_ids(on.stream(), n, read<int64_t>(ids, ScalarType::Long, "ids", n),
                    read<int64_t>(feature_ends, ScalarType::Long, "feature_ends", features),
                    read<int32_t>(feature_tables, ScalarType::Int, "feature_tables", features), static_cast<int>(features),
                    static_cast<uint64_t>(seed), static_cast<int>(workers), out, data<int64_t>(splits));
  return {torch::stable::narrow(keys, 0, 0, out.unique), torch::stable::narrow(tables, 0, 0, out.unique),
          torch::stable::narrow(counts, 0, 0, out.unique), inverse, splits};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dedup_keys(Tensor keys, Tensor tables, Tensor counts) {
  const OnDevice on(keys);
  const int64_t n = keys.numel();
  Tensor out_keys = make_beside(keys, {n}, ScalarType::Long);
  Tensor out_tables = make_beside(keys, {n}, ScalarType::Int);
  Tensor out_counts = make_beside(keys, {n}, ScalarType::Int);
  Tensor inverse = make_beside(keys, {n}, ScalarType::Int);
  fiited::Deduped out{0, data<int64_t>(out_keys), data<int32_t>(out_tables), data<int32_t>(out_counts), data<int32_t>(inverse)};
  device::dedup_keys(on.stream(), n, read<int64_t>(keys, ScalarType::Long, "keys", n), read<int32_t>(tables, ScalarType::Int, "tables", n),
                     read<int32_t>(counts, ScalarType::Int, "counts", n), out);
  return {torch::stable::narrow(out_keys, 0, 0, out.unique), torch::stable::narrow(out_tables, 0, 0, out.unique),
          torch::stable::narrow(out_counts, 0, 0, out.unique), inverse};
}

Tensor pool(Tensor values, Tensor widths, Tensor inverse, Tensor offsets, std::optional<Tensor> weights, int64_t features, bool mean,
            int64_t chunk, int64_t chunks) {
  const OnDevice on(values);
  const ScalarType type = real_type(values, "values");
  const int64_t rows = widths.numel();
  const Bags bags = bags_on(kPlace, inverse, offsets, weights, type, features, mean, chunk, chunks);
  Tensor out = make_beside(values, {bags.batch, features, chunk * chunks}, type);
  with_real(type, [&](auto real) {
    using Real = decltype(real);
    device::pool<Real>(on.stream(), bags, inverse.numel(), rows, read<Real>(values, type, "values", -1), values.numel(),
                       read<uint8_t>(widths, ScalarType::Byte, "widths", rows), data<Real>(out));
  });
  return out;
}

Tensor pool_backward(Tensor grad_out, Tensor widths, Tensor inverse, Tensor offsets, std::optional<Tensor> weights, int64_t features,
                     bool mean, int64_t chunk, int64_t chunks, bool fold) {
  const OnDevice on(grad_out);
  const ScalarType type = real_type(grad_out, "grad_out");
  const int64_t rows = widths.numel();
  const auto* widths_data = read<uint8_t>(widths, ScalarType::Byte, "widths", rows);
  const Bags bags = bags_on(kPlace, inverse, offsets, weights, type, features, mean, chunk, chunks);
  Tensor starts = make_beside(grad_out, {rows + 1}, ScalarType::Long);
  const int64_t size = device::row_starts(on.stream(), rows, widths_data, bags.chunk, bags.chunks, fold, data<int64_t>(starts));
  Tensor out = make_beside(grad_out, {size}, type);
  with_real(type, [&](auto real) {
    using Real = decltype(real);
    const auto* grad = read<Real>(grad_out, type, "grad_out", bags.batch * features * chunk * chunks);
    device::pool_backward<Real>(on.stream(), bags, inverse.numel(), grad, rows, data<int64_t>(starts), widths_data, fold, data<Real>(out));
  });
  return out;
}

Tensor pool_weights_backward(Tensor grad_out, Tensor values, Tensor widths, Tensor inverse, Tensor offsets, int64_t features, bool mean,
                             int64_t chunk, int64_t chunks) {
  const OnDevice on(grad_out);
  const ScalarType type = real_type(grad_out, "grad_out");
  const int64_t rows = widths.numel();
  const Bags bags = bags_on(kPlace, inverse, offsets, std::nullopt, type, features, mean, chunk, chunks);
  Tensor out = make_beside(grad_out, {inverse.numel()}, type);
  with_real(type, [&](auto real) {
    using Real = decltype(real);
    device::pool_weights_backward<Real>(
        on.stream(), bags, inverse.numel(), read<Real>(grad_out, type, "grad_out", bags.batch * features * chunk * chunks), rows,
        read<Real>(values, type, "values", -1), values.numel(), read<uint8_t>(widths, ScalarType::Byte, "widths", rows), data<Real>(out));
  });
  return out;
}

Tensor lookup_norms(Tensor grad_out, int64_t rows, Tensor inverse, Tensor offsets, std::optional<Tensor> weights, int64_t features,
                    bool mean, int64_t dim) {
  const OnDevice on(grad_out);
  const Bags bags = bags_on(kPlace, inverse, offsets, weights, ScalarType::Float, features, mean, dim, 1);
  Tensor out = make_beside(grad_out, {rows}, ScalarType::Float);
  device::lookup_norms(on.stream(), bags, inverse.numel(),
                       read<float>(grad_out, ScalarType::Float, "grad_out", bags.batch * features * dim), rows, data<float>(out));
  return out;
}

Tensor clear_odd(Tensor gradients, int64_t dim, double longest) {
  const OnDevice on(gradients);
  const int64_t n = gradients.numel() / dim;
  read<float>(gradients, ScalarType::Float, "gradients", n * dim);
  Tensor found = make_beside(gradients, {1}, ScalarType::Long);
  device::clear_odd(on.stream(), n, static_cast<int>(dim), static_cast<float>(longest), data<float>(gradients), data<int64_t>(found));
  return found;
}

// How often the host has read from the device, and so waited for it.
int64_t host_reads() { return device::host_reads(); }

}  // namespace

STABLE_TORCH_LIBRARY(FIITED_NAMESPACE, m) {
  define(m);
  define_saving(m);
  m.def("host_reads() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(FIITED_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("store_create", TORCH_BOX(&store_create));
  m.impl("store_destroy", TORCH_BOX(&store_destroy));
  m.impl("host_reads", TORCH_BOX(&host_reads));
  ByHandle<&shard_at>::implement(m);
  Saving<&shard_at>::implement(m);
}

STABLE_TORCH_LIBRARY_IMPL(FIITED_NAMESPACE, FIITED_KEY, m) {
  m.impl("store_lookup", TORCH_BOX(&store_lookup));
  m.impl("store_read", TORCH_BOX(&store_read));
  m.impl("store_pool", TORCH_BOX(&store_pool));
  m.impl("store_update", TORCH_BOX(&store_update));
  m.impl("store_update_pooled", TORCH_BOX(&store_update_pooled));
  m.impl("dedup_ids", TORCH_BOX(&dedup_ids));
  m.impl("dedup_keys", TORCH_BOX(&dedup_keys));
  m.impl("pool", TORCH_BOX(&pool));
  m.impl("pool_backward", TORCH_BOX(&pool_backward));
  m.impl("pool_weights_backward", TORCH_BOX(&pool_weights_backward));
  m.impl("lookup_norms", TORCH_BOX(&lookup_norms));
  m.impl("clear_odd", TORCH_BOX(&clear_odd));
}
