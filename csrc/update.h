// The updates on one element; see rootfree_fused/reference/diag.py and matrix.py. One source serves
// vectors and tails: the compiler vectorizes the loops that call it. Options hold the scalars of a
// call; a rule derives its own from them in double and rounds those once, to the compute type T.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

#include "isa.h"

namespace rootfree_fused {

// The largest g whose B g^2 is finite, to a rounding.
template <class T>
T largest_gradient_of(double batch_size) {
  return (1 - 1e-6) * std::sqrt(std::numeric_limits<T>::max() / batch_size);
}
// NaN stays.
template <class T>
ROOTFREE_INLINE T within(T x, T bound) {
  const T below = x > bound ? bound : x;
  return below < -bound ? -bound : below;
}

// -1, 0 or 1; NaN stays.
template <class T>
ROOTFREE_INLINE T sign(T x) {
  return x > 0 ? T(1) : x < 0 ? T(-1) : x;
}

// start + weight (end - start), as torch.lerp from the nearer end: exact at weight 0 and weight 1.
template <class T>
ROOTFREE_INLINE T lerp(T start, T end, T weight) {
  const T nearer = weight < T(0.5) ? start : end;
  return nearer + (weight < T(0.5) ? weight : weight - 1) * (end - start);
}

// The number of loss terms that a gradient averages: in the schemas a tensor of one number.
struct BatchSize {
  double value;
  operator double() const { return value; }
};

// How what s follows is made of the squares of micro-batches.
struct SquareWeights {
  double square, signal, floor;
};

// What s follows: B g^2, or of the mean square q of micro-batches of b terms
// max(w_square b q + w_signal (B g^2 - b q), w_floor B g^2), each at most the largest number.
template <class T>
struct SecondMoment {
  T batch_size, largest_grad, square_factor, square_weight, signal_weight, floor_weight;

  SecondMoment(double batch_size, double grad_scale, const SquareWeights& weights)
      : batch_size(batch_size),
        largest_grad(largest_gradient_of<T>(batch_size)),
        square_factor(batch_size / (grad_scale * grad_scale)),
        square_weight(weights.square),
        signal_weight(weights.signal),
        floor_weight(weights.floor) {}

  ROOTFREE_INLINE T of(T g) const {
    const T a = within(g, largest_grad);
    return batch_size * a * a;
  }
  ROOTFREE_INLINE T of(T g, T square) const {
    constexpr T largest = std::numeric_limits<T>::max();
    const T whole = of(g), parts = within(square_factor * square, largest);
    const T target = square_weight * parts + signal_weight * (whole - parts);
    const T floor = floor_weight * whole;
    return within(target < floor ? floor : target, largest);
  }
};

struct RmspropOptions {
  double lr, alpha, damping, weight_decay, momentum;
  BatchSize batch_size;
  bool decoupled, maximize;
  SquareWeights weights;
  double grad_scale = 1.0;

  // What the schema has between lr and grad_scale, in its order.
  auto scalars() {
    return std::tie(alpha, damping, weight_decay, momentum, batch_size, decoupled, maximize);
  }
  // What it has after the scaler's tensors and the parts of micro-batches.
  auto part_weights() { return std::tie(weights.square, weights.signal, weights.floor); }
};

template <class T>
struct Rmsprop {
  using Options = RmspropOptions;
  static constexpr int states = 2, required_states = 1;
  static constexpr bool takes_parts = true;
  T lr, square_avg_weight, damping, momentum, grad_factor;
  SecondMoment<T> target;
  T coupled_decay, decoupled_decay;  // one of them is 0

  explicit Rmsprop(const Options& o)
      : lr(o.lr),
        square_avg_weight(1 - o.alpha),
        damping(o.damping),
        momentum(o.momentum),
        grad_factor((o.maximize ? -1 : 1) / o.grad_scale),
        target(o.batch_size, o.grad_scale, o.weights),
        coupled_decay(o.decoupled ? 0 : o.weight_decay),
        decoupled_decay(o.decoupled ? o.lr * o.weight_decay : 0) {}
};

// State 0 is square_avg (s), state 1 momentum_buffer (buf), without which buf is 0 before a step.
//
// s   <- s + (1 - alpha) (target - s)
// u    = g / (s + damping)
// u   <- u + weight_decay p       unless decoupled
// p   <- p - lr weight_decay p    if decoupled
// buf <- momentum buf + u
// p   <- p - lr buf
template <class T>
ROOTFREE_INLINE void update(const Rmsprop<T>& h, T& p, T g, T target, T& s, T& buf) {
  s = lerp(s, target, h.square_avg_weight);
  T u = g / (s + h.damping);
  u += h.coupled_decay * p;
  p -= h.decoupled_decay * p;
  buf = h.momentum * buf + u;
  p -= h.lr * buf;
}

// 1 - beta^step, without cancellation.
inline double bias_correction(double beta, double step) {
  return beta == 0.0 ? 1.0 : -std::expm1(step * std::log(beta));
}

struct AdamwOptions {
  double lr, beta1, beta2, damping, weight_decay;
  BatchSize batch_size;
  bool maximize;
  SquareWeights weights;
  double grad_scale = 1.0, bias_correction1 = 1.0, bias_correction2 = 1.0;

  auto scalars() { return std::tie(beta1, beta2, damping, weight_decay, batch_size, maximize); }
  auto part_weights() { return std::tie(weights.square, weights.signal, weights.floor); }

  // Options with this method are those of an update that may depend on the number of steps.
  void set_step(double step) {
    bias_correction1 = bias_correction(beta1, step);
    bias_correction2 = bias_correction(beta2, step);
  }
};

template <class T>
struct Adamw {
  using Options = AdamwOptions;
  static constexpr int states = 2, required_states = 2;
  static constexpr bool takes_parts = true;
  T step_size, exp_avg_weight, exp_avg_sq_weight, damping, weight_decay, grad_factor;
  SecondMoment<T> target;

  // (lr/bc1) m / (s/bc2 + damping) is evaluated as (lr bc2/bc1) m / (s + bc2 damping).
  explicit Adamw(const Options& o)
      : step_size(o.lr * o.bias_correction2 / o.bias_correction1),
        exp_avg_weight(1 - o.beta1),
        exp_avg_sq_weight(1 - o.beta2),
        damping(o.bias_correction2 * o.damping),
        weight_decay(o.lr * o.weight_decay),
        grad_factor((o.maximize ? -1 : 1) / o.grad_scale),
        target(o.batch_size, o.grad_scale, o.weights) {}
};

// State 0 is exp_avg (m), state 1 exp_avg_sq (s).
//
// p <- p - lr weight_decay p
// m <- m + (1 - beta1) (g - m)
// s <- s + (1 - beta2) (target - s)
// p <- p - (lr/bc1) m / (s/bc2 + damping)
template <class T>
ROOTFREE_INLINE void update(const Adamw<T>& h, T& p, T g, T target, T& m, T& s) {
  p -= h.weight_decay * p;
  // By halves where g - m is beyond the largest number; to an infinite g it makes no difference.
  constexpr T largest = std::numeric_limits<T>::max();
  const bool beyond = std::abs(g - m) > largest;
  const T scale = beyond ? T(0.5) : T(1);
  m = lerp(scale * m, scale * g, h.exp_avg_weight) * (beyond ? T(2) : T(1));
  s = lerp(s, target, h.exp_avg_sq_weight);
  p -= h.step_size * m / (s + h.damping);
}

struct SignOptions {
  double lr, beta, weight_decay;
  BatchSize batch_size;  // which this update does not ask for
  bool sign_last, maximize;
  double part_weight;
  double grad_scale = 1.0;

  auto scalars() { return std::tie(beta, weight_decay, batch_size, sign_last, maximize); }
  auto part_weights() { return std::tie(part_weight); }
};

// What m follows: g, its sign, or the mean of micro-batches' signs.
template <class T>
struct SignTarget {
  T part_weight;
  bool sign_last;

  ROOTFREE_INLINE T of(T g) const { return sign_last ? g : sign(g); }
  ROOTFREE_INLINE T of(T, T part) const { return part_weight * part; }
};

template <class T>
struct Sign {
  using Options = SignOptions;
  static constexpr int states = 1, required_states = 1;
  static constexpr bool takes_parts = true;
  T lr, exp_avg_weight, weight_decay, grad_factor;
  SignTarget<T> target;

  explicit Sign(const Options& o)
      : lr(o.lr),
        exp_avg_weight(1 - o.beta),
        weight_decay(o.lr * o.weight_decay),
        grad_factor((o.maximize ? -1 : 1) / o.grad_scale),
        target{static_cast<T>((o.maximize ? -1 : 1) * o.part_weight), o.sign_last} {}
};

// State 0 is exp_avg (m).
//
// p <- p - lr weight_decay p
// m <- m + (1 - beta) (target - m)
// p <- p - lr sign(m)    if the sign comes last, else lr m
template <class T>
ROOTFREE_INLINE void update(const Sign<T>& h, T& p, T, T target, T& m, T&) {
  p -= h.weight_decay * p;
  m = lerp(m, target, h.exp_avg_weight);
  p -= h.lr * (h.target.sign_last ? sign(m) : m);
}

struct VectorAdamOptions {
  double lr, beta1, beta2, weight_decay, update_rms;
  BatchSize batch_size;  // which this update does not ask for
  bool maximize;
  double grad_scale = 1.0, bias_correction1 = 1.0, bias_correction2 = 1.0;

  auto scalars() { return std::tie(beta1, beta2, weight_decay, update_rms, batch_size, maximize); }

  void set_step(double step) {
    bias_correction1 = bias_correction(beta1, step + 1);
    bias_correction2 = bias_correction(beta2, step);
  }
};

// Adam with Nesterov's momentum; see rootfree_fused/reference/rootfree_shampoo.py.
template <class T>
struct VectorAdam {
  using Options = VectorAdamOptions;
  static constexpr int states = 2, required_states = 2;
  static constexpr bool takes_parts = false;
  T step_size, exp_avg_weight, exp_avg_sq_weight, inverse_correction, smallest_root, weight_decay,
      grad_factor, largest_grad;

  explicit VectorAdam(const Options& o)
      : step_size(o.lr * o.update_rms / o.bias_correction1),
        exp_avg_weight(1 - o.beta1),
        exp_avg_sq_weight(1 - o.beta2),
        inverse_correction(1 / o.bias_correction2),
        smallest_root((1 - 1e-6) * std::sqrt(double(std::numeric_limits<T>::min()))),
        weight_decay(o.lr * o.weight_decay),
        grad_factor((o.maximize ? -1 : 1) / o.grad_scale),
        largest_grad(largest_gradient_of<T>(1)) {}
};

// State 0 is exp_avg (m), state 1 exp_avg_sq (v).
//
// m <- m + (1 - beta1) (g - m)
// v <- v + (1 - beta2) (g^2 - v)
// p <- p - lr weight_decay p - (lr rms/bc1) (m + (1 - beta1) (g - m)) / sqrt(v/bc2)
template <class T>
ROOTFREE_INLINE void update(const VectorAdam<T>& h, T& p, T g, T& m, T& v) {
  g = std::abs(g) <= std::numeric_limits<T>::max() ? within(g, h.largest_grad) : g;
  m = lerp(m, g, h.exp_avg_weight);
  const T ahead = lerp(m, g, h.exp_avg_weight);
  v = lerp(v, g * g, h.exp_avg_sq_weight);
  const T root = std::sqrt(v * h.inverse_correction);
  p -= h.weight_decay * p;
  p -= h.step_size * ahead / (root < h.smallest_root ? h.smallest_root : root);
}

// On elements [begin, end) of arrays.
template <bool two_states, bool has_parts, class Rule, class P, class G, class T>
ROOTFREE_INLINE void update_each(const Rule& rule, P* param, const G* grad, T* state0, T* state1,
                                 const T* parts, int64_t begin, int64_t end) {
  ROOTFREE_INDEPENDENT_ITERATIONS
  for (int64_t i = begin; i < end; ++i) {
    T p = static_cast<T>(param[i]), s0 = state0[i], s1 = two_states ? state1[i] : T(0);
    const T g = rule.grad_factor * static_cast<T>(grad[i]);
    if constexpr (has_parts) {
      update(rule, p, g, rule.target.of(g, parts[i]), s0, s1);
    } else if constexpr (Rule::takes_parts) {
      update(rule, p, g, rule.target.of(g), s0, s1);
    } else {
      update(rule, p, g, s0, s1);
    }
    param[i] = static_cast<P>(p);
    state0[i] = s0;
    if (two_states) state1[i] = s1;
  }
}

template <bool has_parts, class Rule, class P, class G, class T>
ROOTFREE_INLINE void update_states(const Rule& rule, P* param, const G* grad, T* state0, T* state1,
                                   const T* parts, int64_t begin, int64_t end) {
  if (Rule::required_states == 2 || state1) {
    update_each<true, has_parts>(rule, param, grad, state0, state1, parts, begin, end);
  } else {
    update_each<false, has_parts>(rule, param, grad, state0, state1, parts, begin, end);
  }
}

// `state1` may be null where the rule does not require it, and `parts` always.
template <class Rule, class P, class G, class T>
ROOTFREE_INLINE void update_all(const Rule& rule, P* param, const G* grad, T* state0, T* state1,
                                const T* parts, int64_t begin, int64_t end) {
  if constexpr (Rule::takes_parts) {
    if (parts) {
      update_states<true>(rule, param, grad, state0, state1, parts, begin, end);
      return;
    }
  }
  update_states<false>(rule, param, grad, state0, state1, parts, begin, end);
}

struct DescentOptions {
  double lr, momentum, weight_decay;
  bool decoupled, maximize;
  double bound = std::numeric_limits<double>::infinity();  // of the entries of P
};

// Along a preconditioned gradient P.
template <class T>
struct Descent {
  using Options = DescentOptions;
  T lr, momentum, sign, bound;
  T coupled_decay, decoupled_decay;  // one of them is 0

  explicit Descent(const Options& o)
      : lr(o.lr),
        momentum(o.momentum),
        sign(o.maximize ? -1 : 1),
        bound(o.bound),
        coupled_decay(o.decoupled ? 0 : o.weight_decay),
        decoupled_decay(o.decoupled ? o.lr * o.weight_decay : 0) {}
};

// P   <- min(max(P, -bound), bound)
// u    = P + weight_decay p       (P if decoupled)
// p   <- p - lr weight_decay p    if decoupled
// buf <- momentum buf + u
// p   <- p - lr buf
template <class T>
ROOTFREE_INLINE void update(const Descent<T>& h, T& p, T preconditioned, T& buf) {
  const T u = h.sign * within(preconditioned, h.bound) + h.coupled_decay * p;
  p -= h.decoupled_decay * p;
  buf = h.momentum * buf + u;
  p -= h.lr * buf;
}

}  // namespace rootfree_fused
