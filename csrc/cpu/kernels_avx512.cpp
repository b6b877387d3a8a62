#define DRIFT_ISA avx512
#define DRIFT_VECTOR_BYTES 64
#include "instantiate.hpp"
