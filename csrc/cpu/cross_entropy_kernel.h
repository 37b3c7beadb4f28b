// What the shifted_cross_entropy ops hand to the kernel of an instruction set.
#pragma once

#include "../dtype.h"
#include "isa.h"

namespace htv {

// Rows are the unit of work, so results do not depend on the threads. The compute type is that of
// the logits.
struct CrossEntropyTask {
  int64_t classes;
  const void* logits;  // (rows, classes), stride 1 along the classes
  Dtype dtype;
  int64_t stride;     // of its rows
  const void* shift;  // the same; float64 if and only if the logits are
  Dtype shift_dtype;
  int64_t shift_stride;
  const int64_t* targets;  // (rows,), each a class or `ignored`
  int64_t ignored;
  double scale;        // of the shift
  const void* weight;  // (classes,) in the compute type, or null: all 1
  double weights;      // their sum
  double smoothing;
};

// (rows,) in the compute type.
struct CrossEntropyRows {
  void *loss, *peak, *log_sum;
};

struct CrossEntropyGrad {
  const void* grad;  // of the losses, in the compute type
  int64_t grad_stride;
  const void *peak, *log_sum;
  void* grad_logits;  // (rows, classes) contiguous, in the type of the logits
};

// Computes rows first <= row < last.
HTV_DECLARE_PER_ISA(void cross_entropy_kernel(const CrossEntropyTask& task,
                                              const CrossEntropyRows& rows, int64_t first,
                                              int64_t last);
                    void cross_entropy_grad_kernel(const CrossEntropyTask& task,
                                                   const CrossEntropyGrad& grad, int64_t first,
                                                   int64_t last))

}  // namespace htv
