// IF-Shampoo on the matrices of one bucket, both axes of bfloat16 factors; see
// rootfree_fused/reference/matrix.py. Every product is one of packed operands by tiles, and what
// follows it happens while its tile is in the cache. A tile is one task and its sums have one
// order, so the number of threads does not change a bit.
#include "arguments.h"
#include "momenta.h"
#include "params.h"
#include "tensors.h"

#if defined(__x86_64__)
#include <algorithm>
#include <bit>
#include <functional>
#include <limits>
#include <type_traits>
#include <variant>
#endif

namespace rootfree_fused {

#if defined(__x86_64__)
namespace {

struct MatrixOptions {
  FactorOptions factors;
  DescentOptions descent;
  bool update_factors, refresh_products;
};

// A limit of the specification: beyond it products of gradients would not be finite.
constexpr float largest_gradient = 0x1p40f;

// The bits of |x| order as |x| does, infinity and then NaN last.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
template <class T>
ROOTFREE_INLINE Bits<T> magnitude(T x) {
  return std::bit_cast<Bits<T>>(x) & std::numeric_limits<Bits<T>>::max() >> 1;
}

// Packs rows of the gradient; returns whether any of their numbers is not zero.
template <class T>
ROOTFREE_BF16 bool pack_grad(const Right& to, const T* grad, int64_t row, int64_t rows,
                             int64_t columns) {
  const T* first = grad + row * columns;
  Bits<T> largest = 0;
  for (int64_t i = 0; i < rows * columns; ++i) largest = std::max(largest, magnitude(first[i]));
  std::vector<T> limited;
  const T limit = largest_gradient;  // infinity in float16, which has no such numbers
  if (largest > magnitude(limit)) {
    const Bits<T> infinity = magnitude(std::numeric_limits<T>::infinity());
    limited.assign(first, first + rows * columns);
    for (T& x : limited) {
      if (magnitude(x) > magnitude(limit) && magnitude(x) < infinity) x = x > 0 ? limit : -limit;
    }
    first = limited.data();
  }
  pack(to, Submatrix<T>{row, 0, rows, columns, first, columns});
  return largest != 0;
}

// Also learns of which matrices the gradient is exactly zero.
void pack_grads(MomentumMatrix* matrices, int64_t count) {
  const auto alike = [](auto&&...) { return int64_t(1); };
  const int64_t all = strips_of(matrices->rows.size);
  for_each(matrices, count, all, alike, [](MomentumMatrix& m, int64_t strip) {
    const int64_t row = strip * strip_size, rows = std::min(strip_size, m.rows.size - row);
    const auto pack_strip = [&](const auto* grad) {
      return pack_grad(m.packed_update, grad, row, rows, m.columns.size);
    };
    m.strip_has_gradient[strip] = std::visit(pack_strip, m.grad);
  });
  for (MomentumMatrix* m = matrices; m < matrices + count; ++m) {
    const bool* strips = m->strip_has_gradient;
    m->rows.has_gradient = m->columns.has_gradient =
        std::any_of(strips, strips + all, std::identity());
  }
}

void run(MomentumMatrix* matrices, int64_t count, const MatrixOptions& options) {
  pack_grads(matrices, count);
  for_each_block(
      matrices, count, strips_of, strips_of, [](int64_t size, int64_t, int64_t) { return size; },
      [&](const MomentumAxis& axis, const FactorAxis&, const Gram&, int64_t strip) {
        if (options.update_factors && axis.has_gradient) {
          pack_factor(axis, strip);
          axis.factor_squares[strip] = sum_of_factor_squares(axis, strip);
        } else {
          pack_unchanged(axis, strip, !options.update_factors && !options.refresh_products);
        }
      });
  if (options.update_factors) {
    update_momenta(matrices, count, options.factors);
    update_factors(matrices, count, [&](const MomentumAxis& axis) {
      return factor_step(axis, options.factors.factor_lr);
    });
  }
  if (options.update_factors || options.refresh_products) update_products(matrices, count);
  update_params(matrices, count, options.descent);
}

struct Lists : FactorLists {
  TensorHandles momenta;
};

}  // namespace
#endif

bool bf16_kernel_runs() {
#if defined(__x86_64__)
  return isa_in_use() == AMX || (isa_in_use() == AVX512 && __builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

void ifshampoo_bf16_(StableIValue* stack, uint64_t argument_count, uint64_t) {
  Arguments arguments(stack, argument_count, 20);
#if defined(__x86_64__)
  Lists lists;
  for (TensorHandles* list : {&lists.params, &lists.grads, &lists.factors, &lists.residuals,
                              &lists.momenta, &lists.products, &lists.buffers}) {
    *list = arguments.next_tensors();
  }
  MatrixOptions options;
  FactorOptions& factors = options.factors;
  DescentOptions& descent = options.descent;
  descent.lr = read_number(arguments.next_tensor(), "lr");
  const std::vector<int64_t> sizes = arguments.next_integers();
  arguments.read_all(options.update_factors, options.refresh_products, factors.factor_lr,
                     factors.factor_momentum, factors.damping, factors.batch_size, descent.momentum,
                     descent.weight_decay, descent.decoupled, descent.maximize);
  const auto bound = arguments.next<std::optional<double>>();
  if (bound) descent.bound = *bound;
  STD_TORCH_CHECK(bf16_kernel_runs(), "this machine has no bfloat16 vector products");
  auto matrices = matrices_of<MomentumMatrix>(lists, sizes);
  add_stacks(matrices, lists.momenta, &MomentumAxis::momentum, aoti_torch_dtype_bfloat16(),
             "factor momenta");
  run_all(matrices, [&](MomentumMatrix* first, int64_t count) { run(first, count, options); });
#else
  STD_TORCH_CHECK(false, "this machine has no bfloat16 vector products");
#endif
}

}  // namespace rootfree_fused

// Of this operator and the next the schemas are here: only the extension has them.
STABLE_TORCH_LIBRARY_FRAGMENT(rootfree_fused, m) {
  m.def(
      "_ifshampoo_bf16_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] factors, "
      "Tensor(c!)[] residuals, Tensor(d!)[] factor_momenta, Tensor(e!)[] products, "
      "Tensor(f!)[] momentum_buffers, Tensor lr, *, int[] sizes, bool update_factors, "
      "bool refresh_products, float factor_lr, float factor_momentum, float damping, "
      "float batch_size, float momentum, float weight_decay, bool decoupled, bool maximize, "
      "float? bound=None) -> ()");
  m.def("_bf16_kernel_runs() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CPU, m) {
  m.impl("_ifshampoo_bf16_", rootfree_fused::ifshampoo_bf16_);
}

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CompositeExplicitAutograd, m) {
  m.impl("_bf16_kernel_runs", TORCH_BOX(&rootfree_fused::bf16_kernel_runs));
}
