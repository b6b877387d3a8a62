#define DRIFT_ISA avx2
#define DRIFT_VECTOR_BYTES 32
#include "instantiate.hpp"
