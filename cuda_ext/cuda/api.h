// What the binding sees of the device's side: no CUDA in it, so that the host's compiler builds the binding. A stream is a cudaStream_t.
#pragma once

#include <cstdint>
#include <memory>

#include "core/batch.h"
#include "core/shard.h"

namespace fiited::device {

// A shard's operators on one batch that other devices' bindings call with other arguments.
class StepShard : public Shard {
 public:
  // What follows runs in the order of this stream.
  virtual void use_stream(void* stream) = 0;

  // How many numbers the vectors of the rows take[0..n-1] of a lookup are (or of its rows 0..n-1), and where each begins: [n + 1].
  virtual int64_t read_starts(int64_t n, int64_t rows, const int32_t* take, const uint32_t* addresses, const uint8_t* widths,
                              int64_t* starts) const = 0;
  // Those vectors, at their width.
  virtual void read(int64_t n, const int32_t* take, const uint32_t* addresses, const int64_t* starts, float* values) const = 0;
  // The vectors of `rows` rows of a lookup, pooled over n lookups: out [batch, features, chunks * chunk].
  virtual void pool(const Bags& bags, int64_t n, int64_t rows, const uint32_t* addresses, const uint8_t* widths, float* out) const = 0;
  // The gradient of what `pool` gave: [batch, features, chunks * chunk].
  virtual void update_pooled(const Update& rows, const Bags& bags, int64_t n, const float* grad_out) = 0;

 protected:
  using Shard::Shard;
};

std::shared_ptr<StepShard> make_shard(const ShardConfig& config);

// Operators on one batch, before and after the store; the same as those of cpu/batch.h. `n` is the number of lookups.

// `splits` [workers] is the host's.
void dedup_ids(void* stream, int64_t n, const int64_t* ids, const int64_t* feature_ends, const int32_t* feature_tables, int features,
               uint64_t seed, int workers, Deduped& out, int64_t* splits);
void dedup_keys(void* stream, int64_t n, const int64_t* keys, const int32_t* tables, const int32_t* counts, Deduped& out);

// Where each row starts, in numbers: [rows + 1]; `wire`: of gradients in wire layout. Returns how many there are in all.
int64_t row_starts(void* stream, int64_t rows, const uint8_t* widths, int chunk, int chunks, bool wire, int64_t* starts);

// values: rows of widths[u] * chunk numbers one behind the other, `size` in all; out [batch, features, chunks * chunk].
template <class Real>
void pool(void* stream, const Bags& bags, int64_t n, int64_t rows, const Real* values, int64_t size, const uint8_t* widths, Real* out);
// Gradient of `values`, in their layout, or on the wire's with `fold`; grad_out [batch, features, chunks * chunk].
template <class Real>
void pool_backward(void* stream, const Bags& bags, int64_t n, const Real* grad_out, int64_t rows, const int64_t* starts,
                   const uint8_t* widths, bool fold, Real* grad_values);
// Gradient of the per-lookup weights: grad_weights [n].
template <class Real>
void pool_weights_backward(void* stream, const Bags& bags, int64_t n, const Real* grad_out, int64_t rows, const Real* values, int64_t size,
                           const uint8_t* widths, Real* grad_weights);
// Sum over each row's lookups of the norm of the lookup's own gradient: norms [rows].
void lookup_norms(void* stream, const Bags& bags, int64_t n, const float* grad_out, int64_t rows, float* norms);
// Makes zeros of each of the n vectors that is longer than that, or not finite; counts them in found[0].
void clear_odd(void* stream, int64_t n, int dim, float longest, float* vectors, int64_t* found);

// How often the host has read from the device, and so waited for it.
int64_t host_reads();

}  // namespace fiited::device
