// What the library of ops says of itself. Each op registers itself, beside its code, for what
// htv/ops/schema.py declares: load the library after it.
#include "statistic.h"

// The statistics this library was built with, "mean=0 and_mask=1 ...", each once, by single spaces.
// To be read and compared by whoever passes numbers to the ops; lives as long as the library.
extern "C" __attribute__((visibility("default"))) const char* htv_statistics() {
#define HTV_USE(name, number, kind, masks) " " #name "=" #number
  static const char table[] = HTV_STATISTICS(HTV_USE);
#undef HTV_USE
  return table + 1;  // without the first space
}
