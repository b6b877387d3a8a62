#define DRIFT_ISA portable
#define DRIFT_VECTOR_BYTES 16
#include "instantiate.hpp"
