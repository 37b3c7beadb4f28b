// What the embedding op hands to the kernel of an instruction set.
#pragma once

#include "../dtype.h"
#include "../statistic.h"
#include "isa.h"

namespace htv {

// Some features of some tokens are the unit of work, so results do not depend on the threads.
constexpr int64_t kEmbeddingTokens = 32, kEmbeddingFeatures = 256;

struct EmbeddingTask {
  const void* grad_output;  // (rows, features)
  Dtype dtype;
  int64_t tokens, features;
  const int64_t* rows;    // token by token, those of a group beside each other
  const int64_t* starts;  // (tokens + 1): rows[starts[t]:starts[t + 1]] are those of token t
  const int64_t* voter;   // by row: its group
  Statistic statistic;    // one of sum and votes
  Parameters parameters;
  void* value;        // (tokens, features) in the compute type
  double* mask_sums;  // one per chunk

  int64_t chunks_along() const { return (features + kEmbeddingFeatures - 1) / kEmbeddingFeatures; }
  int64_t chunks() const {
    return (tokens + kEmbeddingTokens - 1) / kEmbeddingTokens * chunks_along();
  }
};

// Computes chunks first <= chunk < last.
HTV_DECLARE_PER_ISA(void embedding_kernel(const EmbeddingTask& task, int64_t first, int64_t last))

}  // namespace htv
