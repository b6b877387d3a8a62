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

enum class CouplingKind : int { row, two_sided, sinkhorn };
constexpr const char* COUPLING_NAMES[] = {"row", "two_sided", "sinkhorn"};
enum class WeightsKind : int { affinity, kernel, marginal };
constexpr const char* WEIGHTS_NAMES[] = {"affinity", "kernel", "marginal"};
enum class NormalizeKind : int { global, group, group_mean, none };
constexpr const char* NORMALIZE_NAMES[] = {"global", "group", "group_mean", "none"};

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
    CostKind cost;
    CouplingKind coupling;
    bool split_sides;
    int iterations;
    WeightsKind weights;
    bool include_self, scale_of_groups, scale_given, scale_self_pairs;
    NormalizeKind normalize;
    bool details;
    double least_cost() const { return cost == CostKind::l2 ? least_distance : least_distance * least_distance; }
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
