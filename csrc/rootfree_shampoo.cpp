// RootFreeShampoo on the matrices of one bucket, both axes of bfloat16 factors; see
// rootfree_fused/reference/rootfree_shampoo.py. As IF-Shampoo's in matrix.cpp: a stage a product,
// a tile a task, and the number of threads does not change a bit.
#include "arguments.h"
#include "params.h"
#include "roots.h"
#include "tensors.h"

namespace rootfree_fused {

bool bf16_kernel_runs();

#if defined(__x86_64__)
namespace {

struct ShampooOptions {
  RootOptions roots;
  bool update_factors, refresh_products, maximize;
  double lr, beta1, weight_decay, update_rms;
  std::optional<double> row_beta;
};

// Added to the mean square of a row before it divides.
constexpr double row_damping = 0.1;
// The sides of the square matrix whose update has the RMS update_rms.
constexpr double reference_side = 256;
// P of a smaller root mean square gives a smaller update: what multiplies it stays finite.
constexpr double smallest_rms = 0x1p-120;

// Whose squares leave neither end of a double's range.
template <class T>
ROOTFREE_BF16 double sum_of_squares(const T* x, int64_t count) {
  constexpr int64_t width = 32;
  alignas(64) double sums[width] = {};
  for (int64_t first = 0; first < count; first += width) {
    const int64_t here = std::min(width, count - first);
    for (int64_t i = 0; i < here; ++i) {
      const double value = float(x[first + i]);
      sums[i] += value * value;
    }
  }
  return sum(sums, width);
}

// The strips of a matrix are at the same places as those of the axis of its rows.
ROOTFREE_INLINE int64_t rows_of_strip(const RootMatrix& m, int64_t strip) {
  return std::min(strip_size, m.rows.size - strip * strip_size);
}

// 1 / rms of numbers with these squares as two factors, since one may be beyond a float: of zeros 0,
// of numbers that are not all finite NaN.
struct Scale {
  float first, second;

  Scale(double squares, int64_t count) {
    const double rms = std::sqrt(squares / count);
    first = rms < 0x1p-64 ? 0x1p64f : rms > 0x1p64 ? 0x1p-64f : 1;
    second = rms == 0 ? 0 : rms / rms / (rms * first);
  }
};

// M <- beta1 M + (1 - beta1) G of a strip, with G / rms(G) for G; packs G where the factors learn
// from it, and N = beta1 M + (1 - beta1) G.
template <class T>
ROOTFREE_BF16 void pack_strip(const RootMatrix& m, const T* grad, int64_t strip,
                              const ShampooOptions& options, const Scale& scale, bool packs_grad) {
  const int64_t row = strip * strip_size, rows = rows_of_strip(m, strip), stride = m.columns.size;
  const float beta1 = options.beta1, weight = 1 - options.beta1;
  const float sign = options.maximize ? -1 : 1;
  alignas(64) float g[strip_size][tile_size], ahead[strip_size][tile_size];
  for (int64_t column = 0; column < stride; column += tile_size) {
    const int64_t columns = std::min(tile_size, stride - column);
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = grad + (row + i) * stride + column;
      float* momentum = m.momentum_buffer + (row + i) * stride + column;
      ROOTFREE_INDEPENDENT_ITERATIONS
      for (int64_t j = 0; j < columns; ++j) {
        g[i][j] = float(from[j]) * scale.first * scale.second * sign;
        momentum[j] = lerp(momentum[j], g[i][j], weight);
        ahead[i][j] = beta1 * momentum[j] + weight * g[i][j];
      }
    }
    pack(m.packed_update, Submatrix<float>{row, column, rows, columns, ahead[0], tile_size});
    if (!packs_grad) continue;
    const Submatrix<float> part{row, column, rows, columns, g[0], tile_size};
    pack(m.left_grad, part);
    pack(m.right_grad, part);
  }
}

// Everything that a step reads, as operands.
void pack_all(RootMatrix* matrices, int64_t count, const ShampooOptions& options) {
  const int64_t strips = strips_of(matrices->rows.size);
  const auto alike = [](auto&&...) { return int64_t(1); };
  for_each(matrices, count, strips, alike, [](RootMatrix& m, int64_t strip) {
    const int64_t first = strip * strip_size * m.columns.size;
    const auto squares = [&](const auto* grad) {
      return sum_of_squares(grad + first, rows_of_strip(m, strip) * m.columns.size);
    };
    m.strip_squares[strip] = std::visit(squares, m.grad);
  });
  for (RootMatrix* m = matrices; m < matrices + count; ++m) {
    m->rows.has_gradient = m->columns.has_gradient = sum(m->strip_squares, strips) != 0;
  }
  const auto pack_axis = [&](const RootAxis& whole, int64_t task) {
    const BlockTask at(whole, strips_of, task);
    const RootAxis axis = at.narrowed();
    if (options.update_factors && axis.has_gradient) {
      pack_factor(axis, at.task);
    } else {
      pack_unchanged(axis, at.task, !options.update_factors && !options.refresh_products);
    }
  };
  for_each(
      matrices, count, 2 * strips + strips_of(matrices->columns.size),
      [&](const RootMatrix& m, int64_t task) {
        return task < strips ? m.columns.size : task < 2 * strips ? m.rows.side : m.columns.side;
      },
      [&](RootMatrix& m, int64_t task) {
        if (task >= 2 * strips) return pack_axis(m.columns, task - 2 * strips);
        if (task >= strips) return pack_axis(m.rows, task - strips);
        const Scale scale(sum(m.strip_squares, strips), m.rows.size * m.columns.size);
        const bool packs_grad = options.update_factors && m.rows.has_gradient;
        const auto pack_one = [&](const auto* grad) {
          pack_strip(m, grad, task, options, scale, packs_grad);
        };
        std::visit(pack_one, m.grad);
      });
}

// Stores a tile of P and the sums of the squares of its rows.
ROOTFREE_BF16 void store_preconditioned(const RootMatrix& m, const Tile& tile, int64_t task) {
  const int64_t across = m.columns.tiles();
  write(tile, m.preconditioned, m.columns.size);
  double* squares = m.row_squares + tile.row * across + task % across;
  for (int64_t i = 0; i < tile.rows; ++i) {
    squares[i * across] = sum_of_squares(tile.values[i], tile.columns);
  }
}

// What the rows of P are multiplied by, from the sums of their squares.
//
//   P  <- P / rms(P)
//   v  <- v + max(1 - row_beta, 1 / step) (r - v),   r_i = mean_j P_ij^2
//   P_i <- P_i / sqrt(v_i + 0.1)                     where row_beta is given
//   P  <- update_rms 2 sqrt(256 m / n) / (sqrt(m) + sqrt(n)) P / rms(P)
void scale_rows(const RootMatrix& m, const ShampooOptions& options) {
  const int64_t rows = m.rows.size, columns = m.columns.size, tiles = m.columns.tiles();
  const double square = sum(m.row_squares, rows * tiles) / (rows * columns);
  const double rms = std::max(std::sqrt(square), smallest_rms);
  double after = 0;  // the mean square of the balanced rows
  for (int64_t i = 0; i < rows; ++i) {
    const double row_square = sum(m.row_squares + i * tiles, tiles) / columns / rms / rms;
    double balance = 1;
    if (m.row_square_avg) {
      const double weight = std::max(1 - *options.row_beta, 1 / m.step);
      float& average = m.row_square_avg[i];
      average = lerp<double>(average, row_square, weight);
      balance = 1 / std::sqrt(average + row_damping);
    }
    m.row_scales[i] = balance;
    after += row_square * balance * balance / rows;
  }
  // Zero stays zero; where P is not finite, no row is.
  const double shape_scale = 2 * std::sqrt(reference_side * rows / columns) /
                             (std::sqrt(double(rows)) + std::sqrt(double(columns)));
  const double update_rms = options.update_rms * shape_scale;
  const double factor = after == 0 ? 0 : after / after * update_rms / std::sqrt(after);
  for (int64_t i = 0; i < rows; ++i) m.row_scales[i] *= factor / rms;
}

// p <- (1 - lr weight_decay) p - lr P
template <class P>
ROOTFREE_BF16 void descend_strip(const RootMatrix& m, P* params, int64_t strip, float lr,
                                 float decay) {
  const int64_t columns = m.columns.size, first = strip * strip_size;
  for (int64_t row = first; row < first + rows_of_strip(m, strip); ++row) {
    P* param = params + row * columns;
    const float* preconditioned = m.preconditioned + row * columns;
    const float row_scale = m.row_scales[row];
    ROOTFREE_INDEPENDENT_ITERATIONS
    for (int64_t j = 0; j < columns; ++j) {
      const float p = param[j];
      param[j] = p - decay * p - lr * (row_scale * preconditioned[j]);
    }
  }
}

void run(RootMatrix* matrices, int64_t count, const ShampooOptions& options) {
  pack_all(matrices, count, options);
  if (options.update_factors) update_roots(matrices, count, options.roots);
  if (options.update_factors || options.refresh_products) update_products(matrices, count);
  precondition(matrices, count, store_preconditioned);
  for (RootMatrix* m = matrices; m < matrices + count; ++m) scale_rows(*m, options);
  const auto alike = [](auto&&...) { return int64_t(1); };
  const int64_t strips = strips_of(matrices->rows.size);
  for_each(matrices, count, strips, alike, [&](RootMatrix& m, int64_t strip) {
    const auto descend = [&](auto* params) {
      descend_strip(m, params, strip, options.lr, options.lr * options.weight_decay);
    };
    std::visit(descend, m.param);
  });
}

void add_rows(std::vector<RootMatrix>& matrices, const TensorHandles& row_square_avgs,
              AtenTensorHandle steps, bool balances) {
  const size_t count = matrices.size();
  const int32_t f32 = aoti_torch_dtype_float32();
  STD_TORCH_CHECK(row_square_avgs.size() == (balances ? count : 0),
                  "there must be a row_square_avg for each parameter, or none without row_beta");
  const auto* numbers = data<float>(steps, f32, count, "steps");
  for (size_t i = 0; i < count; ++i) {
    RootMatrix& m = matrices[i];
    STD_TORCH_CHECK(m.momentum_buffer, "there must be a momentum buffer for each parameter");
    m.row_square_avg =
        balances ? data<float>(row_square_avgs[i], f32, m.rows.size, "row_square_avgs") : nullptr;
    m.step = numbers[i];
  }
}

}  // namespace
#endif

void rootfree_shampoo_bf16_(StableIValue* stack, uint64_t argument_count, uint64_t) {
  Arguments arguments(stack, argument_count, 20);
#if defined(__x86_64__)
  FactorLists lists;
  TensorHandles row_square_avgs, grams;
  for (TensorHandles* list : {&lists.params, &lists.grads, &lists.buffers, &row_square_avgs, &grams,
                              &lists.factors, &lists.residuals, &lists.products}) {
    *list = arguments.next_tensors();
  }
  const AtenTensorHandle steps = arguments.next_tensor();
  ShampooOptions options;
  options.lr = read_number(arguments.next_tensor(), "lr");
  const std::vector<int64_t> sizes = arguments.next_integers();
  arguments.read_all(options.update_factors, options.refresh_products, options.beta1,
                     options.roots.beta2, options.roots.damping, options.weight_decay,
                     options.update_rms);
  options.row_beta = arguments.next<std::optional<double>>();
  arguments.read_all(options.maximize);
  STD_TORCH_CHECK(bf16_kernel_runs(), "this machine has no bfloat16 vector products");
  auto matrices = matrices_of<RootMatrix>(lists, sizes);
  add_stacks(matrices, grams, &RootAxis::gram, aoti_torch_dtype_float32(), "grams");
  add_rows(matrices, row_square_avgs, steps, options.row_beta.has_value());
  run_all(matrices, [&](RootMatrix* first, int64_t count) { run(first, count, options); });
#else
  STD_TORCH_CHECK(false, "this machine has no bfloat16 vector products");
#endif
}

}  // namespace rootfree_fused

STABLE_TORCH_LIBRARY_FRAGMENT(rootfree_fused, m) {
  m.def(
      "_rootfree_shampoo_bf16_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(c!)[] row_square_avgs, Tensor(d!)[] grams, Tensor(e!)[] factors, "
      "Tensor(f!)[] residuals, Tensor(g!)[] products, Tensor steps, Tensor lr, *, "
      "int[] sizes, bool update_factors, bool refresh_products, float beta1, float beta2, "
      "float damping, float weight_decay, float update_rms, float? row_beta, bool maximize) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CPU, m) {
  m.impl("_rootfree_shampoo_bf16_", rootfree_fused::rootfree_shampoo_bf16_);
}
