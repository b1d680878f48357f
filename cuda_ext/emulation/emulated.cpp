// The CUDA sources as C++, in one piece: a CPU's compiler does not take the .cu files by themselves.
#include "cuda/dedup.cu"
#include "cuda/pooling.cu"
#include "cuda/round.cu"
#include "cuda/saving.cu"
#include "cuda/shard.cu"
#include "cuda/update.cu"
