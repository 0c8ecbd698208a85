// IF-Shampoo on the matrices of one bucket, both axes dense in bfloat16; see
// rootfree_fused/reference/matrix.py. Every product is one of packed operands by tiles, and what
// follows it happens while its tile is in the cache. A tile is one task and its sums have one
// order, so the number of threads does not change a bit.
#include "arguments.h"
#include "factors.h"
#include "params.h"

#if defined(__x86_64__)
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
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
void pack_grads(Matrix* matrices, int64_t count) {
  const auto alike = [](auto&&...) { return int64_t(1); };
  for_each(matrices, count, matrices->rows.strips(), alike, [](Matrix& m, int64_t strip) {
    const int64_t row = strip * strip_size, rows = std::min(strip_size, m.rows.size - row);
    const auto pack_strip = [&](const auto* grad) {
      return pack_grad(m.packed_grad, grad, row, rows, m.columns.size);
    };
    m.strip_has_gradient[strip] = std::visit(pack_strip, m.grad);
  });
  for (Matrix* m = matrices; m < matrices + count; ++m) {
    const bool* strips = m->strip_has_gradient;
    m->rows.has_gradient = m->columns.has_gradient =
        std::any_of(strips, strips + m->rows.strips(), std::identity());
  }
}

void update_products(Matrix* matrices, int64_t count) {
  const auto tasks = [](const Axis& axis) { return axis.cached ? axis.pairs_of_tiles() : 0; };
  for_each_axis(
      matrices, count, tasks(matrices->rows), tasks(matrices->columns),
      [](const Axis& axis, const Axis&, int64_t task) {
        return symmetric_cost(triangle_tile(axis, task), axis.size);
      },
      [](const Axis& axis, const Axis&, const Gram&, int64_t task) {
        Tile tile = triangle_tile(axis, task);
        multiply(tile, axis.factor_times_transpose());
        if (tile.row == tile.column) mirror(tile);
        write_symmetric(tile, axis.product, axis.size,
                        [&](const auto& part) { pack_product(axis, part); });
      });
}

void run(Matrix* matrices, int64_t count, const MatrixOptions& options) {
  pack_grads(matrices, count);
  for_each_axis(
      matrices, count, matrices->rows.strips(), matrices->columns.strips(),
      [](const Axis& axis, const Axis&, int64_t) { return axis.size; },
      [&](const Axis& axis, const Axis&, const Gram&, int64_t strip) {
        if (options.update_factors && axis.has_gradient) {
          pack_factor(axis, strip);
        } else if (options.update_factors || options.refresh_products || !axis.cached) {
          pack_updated_factor(axis, strip_of(axis, axis.factor, strip));
        } else {
          pack_product(axis, strip_of(axis, axis.product, strip));
        }
      });
  if (options.update_factors) update_factors(matrices, count, options.factors);
  if (options.update_factors || options.refresh_products) update_products(matrices, count);
  update_params(matrices, count, options.descent);
}

// At least `bytes` of memory, kept for the calling thread's next step: faulting in fresh pages
// takes a tenth of a step.
char* scratch(int64_t bytes) {
  constexpr int64_t huge_page = 1 << 21;
  static thread_local std::unique_ptr<char, decltype(&std::free)> memory(nullptr, std::free);
  static thread_local int64_t capacity = 0;
  if (bytes > capacity) {
    capacity = 0;
    memory.reset();
    const int64_t rounded = ceil_div(bytes, huge_page) * huge_page;
    memory.reset(static_cast<char*>(std::aligned_alloc(huge_page, rounded)));
    STD_TORCH_CHECK(memory, "out of memory: IF-Shampoo needs ", rounded, " bytes");
    madvise(memory.get(), rounded, MADV_HUGEPAGE);
    capacity = rounded;
  }
  return memory.get();
}

// Many matrices are shared among the threads, each from start to end in the cache of one; of a few,
// the tiles are. Neither changes a sum.
void run_all(std::vector<Matrix>& matrices, const MatrixOptions& options) {
  if (matrices.empty()) return;
  const int64_t count = matrices.size(), threads = torch::stable::get_num_threads();
  const int64_t tiles = matrices[0].tiles();
  const bool share_tiles = count % threads != 0 && count < 8 * threads;
  const int64_t together = share_tiles ? std::min(count, ceil_div(8 * threads, tiles)) : 1;
  const int64_t workers = share_tiles ? 1 : std::min(count, threads);
  Arena measure;
  for (int64_t i = 0; i < together; ++i) matrices[i].take_scratch(measure);
  char* memory = scratch(workers * measure.used);

  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t worker) {
    for (int64_t first; (first = next.fetch_add(together)) < count;) {
      const int64_t size = std::min(together, count - first);
      Arena arena{memory + worker * measure.used};
      for (int64_t i = first; i < first + size; ++i) matrices[i].take_scratch(arena);
      run(&matrices[first], size, options);
    }
  };
  if (workers == 1) {
    work(0);
  } else {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) work(worker);
    });
  }
}

template <class T>
T* data(AtenTensorHandle tensor, int32_t expected, int64_t numel, const char* name) {
  STD_TORCH_CHECK(is_cpu(tensor) && dtype(tensor) == expected &&
                      get(aoti_torch_get_numel, tensor) == numel &&
                      get(aoti_torch_is_contiguous, tensor),
                  name, " must be contiguous CPU tensors of ", numel, " elements and their dtype");
  return static_cast<T*>(get(torch_get_mutable_data_ptr, tensor));
}

// The one switch on a dtype: a pointer to numbers of that type.
template <class Pointer, class Void>
Pointer typed(int32_t dtype, Void* data) {
  static const int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       f16 = aoti_torch_dtype_float16();
  if (dtype == f32) return static_cast<std::variant_alternative_t<0, Pointer>>(data);
  if (dtype == bf16) return static_cast<std::variant_alternative_t<1, Pointer>>(data);
  if (dtype == f16) return static_cast<std::variant_alternative_t<2, Pointer>>(data);
  STD_TORCH_CHECK(false, "parameters and gradients must be float32, bfloat16 or float16");
}

struct Lists {
  TensorHandles params, grads, factors, residuals, momenta, products, buffers;
};

std::vector<Matrix> matrices_of(const Lists& lists) {
  static const int32_t bf16 = aoti_torch_dtype_bfloat16(), i16 = aoti_torch_dtype_int16();
  const int64_t count = lists.params.size();
  for (const auto& list : {lists.factors, lists.residuals, lists.momenta, lists.products}) {
    STD_TORCH_CHECK(list.size() == 2, "a matrix has two axes");
  }
  STD_TORCH_CHECK(lists.grads.size() == lists.params.size() &&
                      (lists.buffers.empty() || lists.buffers.size() == lists.params.size()),
                  "the lists of tensors differ in length");
  std::vector<Matrix> matrices(count);
  int64_t sizes[2];
  for (int k : {0, 1}) {
    STD_TORCH_CHECK(get(aoti_torch_get_dim, lists.factors[k]) == 3,
                    "factors must be (matrices, d, d)");
    const int64_t d = sizes[k] = get(aoti_torch_get_sizes, lists.factors[k])[1];
    auto* factor = data<BFloat16>(lists.factors[k], bf16, count * d * d, "factors");
    auto* residual = data<int16_t>(lists.residuals[k], i16, count * d * d, "residuals");
    auto* momentum = data<BFloat16>(lists.momenta[k], bf16, count * d * d, "factor momenta");
    const bool cached = get(aoti_torch_get_numel, lists.products[k]) != 0;
    auto* product =
        cached ? data<BFloat16>(lists.products[k], bf16, count * d * d, "products") : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      Axis& axis = k == 0 ? matrices[i].rows : matrices[i].columns;
      const int64_t first = i * d * d;
      axis.size = d;
      axis.tiles = ceil_div(d, tile_size);
      axis.on_rows = k == 0;
      axis.cached = cached;
      axis.factor = factor + first;
      axis.momentum = momentum + first;
      axis.product = cached ? product + first : nullptr;
      axis.residual = residual + first;
    }
  }
  const int64_t numel = sizes[0] * sizes[1];
  for (int64_t i = 0; i < count; ++i) {
    Matrix& m = matrices[i];
    const AtenTensorHandle param = lists.params[i], grad = lists.grads[i];
    m.param =
        typed<ParamPointer>(dtype(param), data<void>(param, dtype(param), numel, "parameters"));
    m.momentum_buffer =
        lists.buffers.empty()
            ? nullptr
            : data<float>(lists.buffers[i], aoti_torch_dtype_float32(), numel, "momentum buffers");
    STD_TORCH_CHECK(is_cpu(grad) && get(aoti_torch_get_numel, grad) == numel &&
                        get(aoti_torch_is_contiguous, grad),
                    "gradients must be contiguous CPU tensors of the parameters' shapes");
    m.grad = typed<GradPointer>(dtype(grad), get(torch_get_const_data_ptr, grad));
  }
  return matrices;
}

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
  Arguments arguments(stack, argument_count, 19);
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
  arguments.read_all(options.update_factors, options.refresh_products, factors.factor_lr,
                     factors.factor_momentum, factors.damping, factors.batch_size, descent.momentum,
                     descent.weight_decay, descent.decoupled, descent.maximize);
  const auto bound = arguments.next<std::optional<double>>();
  if (bound) descent.bound = *bound;
  STD_TORCH_CHECK(bf16_kernel_runs(), "this machine has no bfloat16 vector products");
  std::vector<Matrix> matrices = matrices_of(lists);
  run_all(matrices, options);
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
      "Tensor(f!)[] momentum_buffers, Tensor lr, *, bool update_factors, bool refresh_products, "
      "float factor_lr, float factor_momentum, float damping, float batch_size, float momentum, "
      "float weight_decay, bool decoupled, bool maximize, float? bound=None) -> ()");
  m.def("_bf16_kernel_runs() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CPU, m) {
  m.impl("_ifshampoo_bf16_", rootfree_fused::ifshampoo_bf16_);
}

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CompositeExplicitAutograd, m) {
  m.impl("_bf16_kernel_runs", TORCH_BOX(&rootfree_fused::bf16_kernel_runs));
}
