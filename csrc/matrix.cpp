// IF-Shampoo on the matrices of one bucket, both axes dense in bfloat16; see
// rootfree_fused/reference/matrix.py. Every product is one of packed operands by tiles, and what
// follows it happens while its tile is in the cache. A tile is one task and its sums have one
// order, so the number of threads does not change a bit.
#include "arguments.h"
#include "tasks.h"
#include "update.h"

#if defined(__x86_64__)
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#endif

namespace rootfree_fused {

struct MatrixOptions {
  DescentOptions descent;
  double factor_lr, factor_momentum, damping, batch_size;
  bool update_factors, refresh_products;
};

#if defined(__x86_64__)
namespace {

using c10::Half;

template <class P>
ROOTFREE_BF16 void descend(const Descent<float>& rule, void* params, float* buffer,
                           const Tile& tile, int64_t stride) {
  for (int64_t i = 0; i < tile.rows; ++i) {
    const int64_t offset = (tile.row + i) * stride + tile.column;
    P* param = static_cast<P*>(params) + offset;
    const float* values = tile.values[i];
    if (buffer) {
      float* row = buffer + offset;
      ROOTFREE_INDEPENDENT_ITERATIONS
      for (int64_t j = 0; j < tile.columns; ++j) {
        float p = param[j];
        update(rule, p, values[j], row[j]);
        param[j] = p;
      }
    } else {
      ROOTFREE_INDEPENDENT_ITERATIONS
      for (int64_t j = 0; j < tile.columns; ++j) {
        float p = param[j], none = 0;
        update(rule, p, values[j], none);
        param[j] = p;
      }
    }
  }
}

// The bits of |x| order as |x| does, infinity and then NaN last.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
template <class T>
ROOTFREE_INLINE Bits<T> magnitude(T x) {
  return std::bit_cast<Bits<T>>(x) & std::numeric_limits<Bits<T>>::max() >> 1;
}

// Returns whether any of the numbers is not zero.
template <class T>
ROOTFREE_BF16 bool pack_grad(const Right& to, const void* grad, int64_t row, int64_t rows,
                             int64_t columns) {
  const T* first = static_cast<const T*>(grad) + row * columns;
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
  pack(to, Block<T>{row, 0, rows, columns, first, columns});
  return largest != 0;
}

template <template <class> class Body>
auto select(int32_t dtype) {
  static const int32_t f32 = aoti_torch_dtype_float32(), bf16 = aoti_torch_dtype_bfloat16(),
                       f16 = aoti_torch_dtype_float16();
  STD_TORCH_CHECK(dtype == f32 || dtype == bf16 || dtype == f16,
                  "parameters and gradients must be float32, bfloat16 or float16");
  return dtype == f32 ? Body<float>::body : dtype == bf16 ? Body<BFloat16>::body : Body<Half>::body;
}
template <class T>
struct DescendFor {
  static constexpr Descend body = descend<T>;
};
template <class T>
struct PackGradFor {
  static constexpr PackGrad body = pack_grad<T>;
};

// Of the matrices whose gradient is not exactly zero.
void update_factors(Matrix* matrices, int64_t count, const MatrixOptions& options) {
  const Matrix& shape = *matrices;
  for_each(matrices, count, shape.tiles(), cost_on_rows, [](Matrix& m, int64_t task) {
    if (!m.rows.told) return;
    Tile tile = m.tile(task);
    multiply(tile, m.rows.transposed.x, m.packed_grad);
    pack(m.half, tile.block());
  });
  for_each(matrices, count, shape.tiles(), cost_on_columns, [](Matrix& m, int64_t task) {
    if (!m.rows.told) return;
    Tile tile = m.tile(task);
    multiply(tile, m.half, m.columns.transposed.x_transposed);
    pack(m.transformed, tile.block());
    pack_transposed(m.transformed_transposed, tile.block());
  });
  for_each_axis(matrices, count, shape.rows.pairs_of_tiles(), shape.columns.pairs_of_tiles(),
                [](const Axis& axis, const Axis& other, int64_t task) {
                  return symmetric_cost(triangle_tile(axis, task), axis.size + other.size);
                },
                [&](const Axis& axis, const Axis& other, const Gram& transformed, int64_t task) {
                  if (!axis.told) return;
                  const double trace = sum(other.squares, other.strips()) / other.size;
                  const double scale = options.batch_size / other.size;
                  Tile tile = triangle_tile(axis, task);
                  multiply(tile, axis.transposed);
                  multiply(tile, options.damping * trace / scale);
                  multiply(tile, transformed, true);
                  update_momentum(axis, task, tile, scale, options.factor_momentum);
                });
  for_each_axis(matrices, count, shape.rows.square_tiles(), shape.columns.square_tiles(),
                [](const Axis& axis, const Axis&, int64_t task) {
                  return cost(square_tile(axis, task), axis.size);
                },
                [&](const Axis& axis, const Axis&, const Gram&, int64_t task) {
                  if (!axis.told) return;
                  Tile tile = square_tile(axis, task);
                  update_factor(axis, tile, options.factor_lr);
                });
}

void update_products(Matrix* matrices, int64_t count) {
  const auto tasks = [](const Axis& axis) { return axis.cached ? axis.pairs_of_tiles() : 0; };
  for_each_axis(matrices, count, tasks(matrices->rows), tasks(matrices->columns),
                [](const Axis& axis, const Axis&, int64_t task) {
                  return symmetric_cost(triangle_tile(axis, task), axis.size);
                },
                [](const Axis& axis, const Axis&, const Gram&, int64_t task) {
                  Tile tile = triangle_tile(axis, task);
                  multiply(tile, axis.now);
                  if (tile.row == tile.column) mirror(tile);
                  if (axis.on_rows) {
                    write_symmetric(axis, tile, axis.product, axis.left_product);
                  } else {
                    write_symmetric(axis, tile, axis.product, axis.right_product);
                  }
                });
}

void update_params(Matrix* matrices, int64_t count, const MatrixOptions& options) {
  const int64_t tiles = matrices->tiles();
  const Descent<float> rule(options.descent);
  if (!matrices->rows.cached) {
    for_each(matrices, count, tiles, cost_on_rows, [](Matrix& m, int64_t task) {
      Tile tile = m.tile(task);
      multiply(tile, m.rows.transposed.x, m.packed_grad);
      pack(m.transformed_transposed.x_transposed, tile.block());
    });
  }
  for_each(matrices, count, tiles, cost_on_rows, [](Matrix& m, int64_t task) {
    Tile tile = m.tile(task);
    if (m.rows.cached) {
      multiply(tile, m.rows.left_product, m.packed_grad);
    } else {
      multiply(tile, m.rows.now.x, m.transformed_transposed.x_transposed);
    }
    pack(m.half, tile.block());
  });
  if (!matrices->columns.cached) {
    for_each(matrices, count, tiles, cost_on_columns, [](Matrix& m, int64_t task) {
      Tile tile = m.tile(task);
      multiply(tile, m.half, m.columns.transposed.x_transposed);
      pack(m.transformed.x, tile.block());
    });
  }
  for_each(matrices, count, tiles, cost_on_columns, [&](Matrix& m, int64_t task) {
    Tile tile = m.tile(task);
    if (m.columns.cached) {
      multiply(tile, m.half, m.columns.right_product);
    } else {
      multiply(tile, m.transformed.x, m.columns.now.x_transposed);
    }
    m.descend(rule, m.param, m.buffer, tile, m.columns.size);
  });
}

void run(Matrix* matrices, int64_t count, const MatrixOptions& options) {
  const auto alike = [](auto&&...) { return int64_t(1); };
  for_each(matrices, count, matrices->rows.strips(), alike, [](Matrix& m, int64_t strip) {
    const int64_t row = strip * strip_size, rows = std::min(strip_size, m.rows.size - row);
    m.told[strip] = m.pack_grad(m.packed_grad, m.grad, row, rows, m.columns.size);
  });
  for (Matrix* m = matrices; m < matrices + count; ++m) {
    const auto any = std::any_of(m->told, m->told + m->rows.strips(), std::identity());
    m->rows.told = m->columns.told = any;
  }
  for_each_axis(matrices, count, matrices->rows.strips(), matrices->columns.strips(),
                [](const Axis& axis, const Axis&, int64_t) { return axis.size; },
                [&](const Axis& axis, const Axis&, const Gram&, int64_t strip) {
                  if (options.update_factors && axis.told) {
                    pack_factor(axis, strip);
                  } else if (options.update_factors || options.refresh_products || !axis.cached) {
                    keep(axis, strip_of(axis, axis.factor, strip));
                  } else if (axis.on_rows) {
                    pack(axis.left_product, strip_of(axis, axis.product, strip));
                  } else {
                    pack(axis.right_product, strip_of(axis, axis.product, strip));
                  }
                });
  if (options.update_factors) update_factors(matrices, count, options);
  if (options.update_factors || options.refresh_products) update_products(matrices, count);
  update_params(matrices, count, options);
}

// At least `bytes` of memory, kept for the calling thread's next step: to fault in fresh pages would
// take a tenth of a step.
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
      const int64_t now = std::min(together, count - first);
      Arena arena{memory + worker * measure.used};
      for (int64_t i = first; i < first + now; ++i) matrices[i].take_scratch(arena);
      run(&matrices[first], now, options);
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
      axis = {d,
              ceil_div(d, tile_size),
              k == 0,
              cached,
              true,
              factor + first,
              momentum + first,
              cached ? product + first : nullptr,
              residual + first};
    }
  }
  const int64_t numel = sizes[0] * sizes[1];
  for (int64_t i = 0; i < count; ++i) {
    Matrix& m = matrices[i];
    const AtenTensorHandle param = lists.params[i], grad = lists.grads[i];
    m.descend = select<DescendFor>(dtype(param));
    m.pack_grad = select<PackGradFor>(dtype(grad));
    m.param = data<void>(param, dtype(param), numel, "parameters");
    m.buffer = lists.buffers.empty() ? nullptr
                                     : data<float>(lists.buffers[i], aoti_torch_dtype_float32(),
                                                   numel, "momentum buffers");
    STD_TORCH_CHECK(is_cpu(grad) && get(aoti_torch_get_numel, grad) == numel &&
                        get(aoti_torch_is_contiguous, grad),
                    "gradients must be contiguous CPU tensors of the parameters' shapes");
    m.grad = get(torch_get_const_data_ptr, grad);
  }
  return matrices;
}

}  // namespace
#endif

bool bf16_kernel_runs() {
#if defined(__x86_64__)
  return isa_in_use() == AMX ||
         (isa_in_use() == AVX512 && __builtin_cpu_supports("avx512bf16"));
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
  options.descent.lr = read_number(arguments.next_tensor(), "lr");
  options.update_factors = arguments.next<bool>();
  options.refresh_products = arguments.next<bool>();
  options.factor_lr = arguments.next<double>();
  options.factor_momentum = arguments.next<double>();
  options.damping = arguments.next<double>();
  options.batch_size = arguments.next<double>();
  options.descent.momentum = arguments.next<double>();
  options.descent.weight_decay = arguments.next<double>();
  options.descent.decoupled = arguments.next<bool>();
  options.descent.maximize = arguments.next<bool>();
  const auto bound = arguments.next<std::optional<double>>();
  if (bound) options.descent.bound = *bound;
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
