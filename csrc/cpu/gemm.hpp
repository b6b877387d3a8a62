// A small matrix product for matrices that sit in cache: C += A·B with B packed in panels of PANEL columns.
//
//   A  element (i, k) at a[i * row_stride + k * depth_stride]: plain or transposed, never copied
//   B  panels[c / PANEL][k][c % PANEL], zero-padded to whole panels
//   C  row-major with leading dimension ldc; columns past `cols` are not touched
#pragma once
#include <algorithm>

#include "simd.hpp"

namespace drift::DRIFT_ISA {

template <class T> constexpr int PANEL = 2 * WIDTH<T>;
#if DRIFT_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int BLOCK_ROWS = 8;  // 32 vector registers: 8×2 accumulators
#else
constexpr int BLOCK_ROWS = 6;  // 16 vector registers
#endif

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T> DRIFT_INLINE void write_row(T* c, Vec<T> v, int64_t room, bool accumulate) {
    if (room >= WIDTH<T>) {
        store<T>(c, accumulate ? load<T>(c) + v : v);
    } else {
        T lanes[WIDTH<T>];
        store<T>(lanes, v);
        for (int l = 0; l < room; ++l) c[l] = accumulate ? c[l] + lanes[l] : lanes[l];
    }
}

template <class T, int ROWS, int VECS>
void multiply_block(int64_t depth, const T* a, int64_t row_stride, int64_t depth_stride, const T* panel, T* c, int64_t ldc,
                    int64_t cols, bool accumulate) {
    Vec<T> sum[ROWS][VECS];
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECS; ++v) sum[i][v] = Vec<T>{};
    for (int64_t k = 0; k < depth; ++k, a += depth_stride, panel += PANEL<T>) {
        Vec<T> b[VECS];
        for (int v = 0; v < VECS; ++v) b[v] = load<T>(panel + v * WIDTH<T>);
        for (int i = 0; i < ROWS; ++i)
            for (int v = 0; v < VECS; ++v) sum[i][v] += a[i * row_stride] * b[v];
    }
    for (int i = 0; i < ROWS; ++i)
        for (int v = 0; v < VECS; ++v) write_row<T>(c + i * ldc + v * WIDTH<T>, sum[i][v], cols - v * WIDTH<T>, accumulate);
}

template <class T, int ROWS>
void multiply_rows(int64_t rows, int64_t cols, int64_t depth, const T* a, int64_t row_stride, int64_t depth_stride,
                   const T* panel, T* c, int64_t ldc, bool accumulate) {
    if (rows == ROWS) {
        if (cols > WIDTH<T>)
            multiply_block<T, ROWS, 2>(depth, a, row_stride, depth_stride, panel, c, ldc, cols, accumulate);
        else
            multiply_block<T, ROWS, 1>(depth, a, row_stride, depth_stride, panel, c, ldc, cols, accumulate);
    } else if constexpr (ROWS > 1) {
        multiply_rows<T, ROWS - 1>(rows, cols, depth, a, row_stride, depth_stride, panel, c, ldc, accumulate);
    }
}

// `panels` points at the first row wanted of the first panel; consecutive panels are `panel_stride` elements apart.
template <class T>
void multiply(int64_t rows, int64_t cols, int64_t depth, const T* a, int64_t row_stride, int64_t depth_stride,
              const T* panels, int64_t panel_stride, T* c, int64_t ldc, bool accumulate) {
    for (int64_t j = 0; j < cols; j += PANEL<T>, panels += panel_stride)
        for (int64_t i = 0; i < rows; i += BLOCK_ROWS)
            multiply_rows<T, BLOCK_ROWS>(std::min<int64_t>(BLOCK_ROWS, rows - i), std::min<int64_t>(PANEL<T>, cols - j), depth,
                                         a + i * row_stride, row_stride, depth_stride, panels, c + i * ldc + j, ldc, accumulate);
}

// Rows as the columns of B: panels[j / PANEL][d][j % PANEL] = rows[j][d] − centre[d]; 0 past `count` and where rows[j] is
// null. A null centre is 0.
template <class T>
void pack_transposed(int64_t count, int64_t depth, const T* const* rows, const T* centre, T* panels) {
    for (int64_t j = 0; j < count; j += WIDTH<T>) {
        T* panel = panels + j / PANEL<T> * PANEL<T> * depth + j % PANEL<T>;
        for (int64_t d = 0; d < depth; d += WIDTH<T>) {
            const int64_t here = std::min<int64_t>(WIDTH<T>, depth - d);
            const Vec<T> origin = centre ? load_up_to<T>(centre + d, here) : Vec<T>{};
            Vec<T> square[WIDTH<T>];
            for (int l = 0; l < WIDTH<T>; ++l)
                square[l] = j + l < count && rows[j + l] ? load_up_to<T>(rows[j + l] + d, here) - origin : Vec<T>{};
            transpose<T>(square);
            for (int64_t l = 0; l < here; ++l) store<T>(panel + (d + l) * PANEL<T>, square[l]);
        }
    }
    if (count % PANEL<T> > 0 && count % PANEL<T> <= WIDTH<T>)  // the last panel's second half
        for (int64_t d = 0; d < depth; ++d)
            store<T>(panels + count / PANEL<T> * PANEL<T> * depth + d * PANEL<T> + WIDTH<T>, Vec<T>{});
}

// Squared norms of the first `count` columns of a panel.
template <class T> void find_panel_norms(const T* panel, int64_t depth, int64_t count, T* norms) {
    Vec<T> sum[2] = {};
    for (int64_t e = 0; e < depth; ++e, panel += PANEL<T>)
        for (int v = 0; v < 2; ++v) sum[v] += load<T>(panel + v * WIDTH<T>) * load<T>(panel + v * WIDTH<T>);
    for (int64_t l = 0; l < count; ++l) norms[l] = sum[l / WIDTH<T>][l % WIDTH<T>];
}

// Rows as the rows of B: panels[d / PANEL][j][d % PANEL] = rows[j][d] − centre[d]. Columns past `depth`, and rows that are null,
// are 0.
template <class T>
void pack_rows(int64_t count, int64_t depth, const T* const* rows, const T* centre, T* panels) {
    for (int64_t d = 0; d < depth; d += PANEL<T>) {
        const int64_t here = std::min<int64_t>(PANEL<T>, depth - d);
        for (int64_t j = 0; j < count; ++j, panels += PANEL<T>) {
            const int64_t found = rows[j] ? here : 0;
            for (int64_t l = 0; l < found; ++l) panels[l] = rows[j][d + l] - (centre ? centre[d + l] : T(0));
            for (int64_t l = found; l < PANEL<T>; ++l) panels[l] = 0;
        }
    }
}

}  // namespace drift::DRIFT_ISA
