// What is asked of the kernels, as drift_ops/spec.py has it, and how points lie in memory.
#pragma once
#include <cstdint>
#include <vector>

#include "math.hpp"

namespace drift {

struct AffinitySpec {
    LogitKind logit;
    std::vector<double> widths;
    double temperature, floor;
    bool has_self;
    int sides;
    double least_distance, self_distance;
};

struct PairSpec {
    CostKind cost;
    bool has_self;
    double self_cost;
    int sides;
    double floor, least_distance;
};

struct LossSpec {
    std::vector<double> R_list;
    double floor, least_distance, least_scale, self_distance, least_squared_lambda;
};

// An array [L, T, count, …] of L·T groups, group g = l·T + t. What belongs to one of `count` is contiguous.
template <class T> struct Rows {
    T* first;
    int64_t count, inner, strides[3];  // inner: T; strides in elements
    DRIFT_MATH T* operator()(int64_t g, int64_t n) const {
        return first + g / inner * strides[0] + g % inner * strides[1] + n * strides[2];
    }
};

}  // namespace drift
