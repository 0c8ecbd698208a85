// The diagonal updates of update.h on weights and states in the formats of formats.h: block after
// block of each parameter is decoded into the L1 cache, updated there, and encoded. The last lines
// register each as the body of its operator.
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "codecs.h"
#include "lists.h"
#include "update.h"

namespace rootfree_fused {
namespace {

static_assert(chunk_size % block_size == 0);

// Beside the operands: the residuals of the weights, and the stream of the weights' rounding.
constexpr int RESIDUAL = OPERANDS;
constexpr uint32_t weight_stream = 2;

// Of two blocks, as `Code` is of one.
using CodeBoth = void (*)(int64_t count, float* values0, char* stored0, char* beside0,
                          Random random0, float* values1, char* stored1, char* beside1,
                          Random random1);
template <class Rule>
using Update = void (*)(int64_t count, const Rule&, float* param, const float* grad, float* state0,
                        float* state1, const float* parts);

template <void (*function)(int64_t count, Block, Block)>
ROOTFREE_INLINE void code_both(int64_t count, float* values0, char* stored0, char* beside0,
                               Random random0, float* values1, char* stored1, char* beside1,
                               Random random1) {
  function(count, {values0, stored0, beside0, random0}, {values1, stored1, beside1, random1});
}

template <class Rule>
ROOTFREE_INLINE void update_block(int64_t count, const Rule& rule, float* param, const float* grad,
                                  float* state0, float* state1, const float* parts) {
  const Rule own = rule;  // which no store changes
  update_all(own, param, grad, state0, state1, parts, 0, count);
}

template <class Rule>
struct Task : Chunked {
  Rule rule;
  Update<Rule> update;
  Elements elements[OPERANDS + 1];  // by Operand and RESIDUAL
  PerOperand<Codec> codecs;
  CodeBoth encode_both;       // null, or instead of what codecs of states have
  PerOperand<Scales> scales;  // of states
  PerOperand<Random> random;  // but for the gradient
};

template <class Rule>
void run(const Task<Rule>& task, int64_t begin, int64_t end) {
  alignas(64) char gathered[OPERANDS + 1][block_size * sizeof(float)];
  alignas(64) float decoded[OPERANDS][block_size];
  for (; begin < end; begin += block_size) {
    const int64_t stop = std::min(end, begin + block_size), count = stop - begin;
    char* stored[OPERANDS + 1];
    for (int k = 0; k <= OPERANDS; ++k) {
      stored[k] = task.elements[k].read(begin, stop, gathered[k]);
    }
    PerOperand<char*> beside;
    PerOperand<float*> values;
    for (int k = 0; k < OPERANDS; ++k) {
      const Code decode = task.codecs[k].decode;
      beside[k] = k == PARAM ? stored[RESIDUAL] : task.scales[k].at(begin);
      values[k] = decode ? decoded[k] : reinterpret_cast<float*>(stored[k]);
      if (decode) decode(count, values[k], stored[k], beside[k], {});
    }
    task.update(count, task.rule, values[PARAM], values[GRAD], values[STATE0], values[STATE1],
                values[PARTS]);
    for (int k : {PARAM, STATE0, STATE1}) {
      const Code encode = task.codecs[k].encode;
      if (encode) encode(count, values[k], stored[k], beside[k], task.random[k].from(begin));
    }
    if (task.encode_both) {
      task.encode_both(count, values[STATE0], stored[STATE0], beside[STATE0],
                       task.random[STATE0].from(begin), values[STATE1], stored[STATE1],
                       beside[STATE1], task.random[STATE1].from(begin));
    }
    for (int k : {+PARAM, +STATE0, +STATE1, RESIDUAL}) {
      task.elements[k].write(begin, stop, stored[k]);
    }
  }
}

// What an operator of DiagonalMethod.lowbit_schema in rootfree_fused/ops/methods.py is given.
struct Lists {
  PerOperand<TensorHandles> operands;  // STATE1 and PARTS may be empty
  TensorHandles residuals;             // may be empty
  PerOperand<TensorHandles> scales;    // of states, may be empty
  std::vector<double> steps;
  std::vector<int64_t> seeds, firsts;
  bool stochastic;
};

Codec codec_of_weight(int32_t param, AtenTensorHandle residual, bool stochastic, size_t i) {
  const auto [f32, bf16, f16, i8, i16, u8] = dtypes();
  STD_TORCH_CHECK(!stochastic || (param == bf16 && !residual), "params[", i,
                  "] cannot be rounded stochastically: only bfloat16 without residuals is");
  if (residual) {
    const Codec codec = codec_of_parts(dtype(residual));
    STD_TORCH_CHECK(param == bf16 && codec.decode, "param_residuals[", i,
                    "] must be int8 or int16, and params of residuals bfloat16");
    return codec;
  }
  if (stochastic) return codec_of<Stochastic>();
  if (param == f32) return {};
  if (param == bf16) return codec_of<Nearest<BFloat16>>();
  if (param == f16) return codec_of<Nearest<c10::Half>>();
  STD_TORCH_CHECK(false, "params[", i, "] must be float32, bfloat16 or float16");
}

Codec codec_of_grad(int32_t grad, int32_t param, size_t i) {
  const auto [f32, bf16, f16, i8, i16, u8] = dtypes();
  STD_TORCH_CHECK(grad == f32 || grad == param, "grads[", i,
                  "] must have the dtype of its parameter or float32");
  if (grad == bf16) return codec_of<Nearest<BFloat16>>();
  if (grad == f16) return codec_of<Nearest<c10::Half>>();
  return {};
}

// Of two states, or null where they are encoded one after the other.
CodeBoth encoder_of_both(int32_t state0, int32_t state1) {
  const auto [f32, bf16, f16, i8, i16, u8] = dtypes();
  if (state0 == i8 && state1 == u8) return OfBlock<code_both<encode_both<S8, E5M3>>>::current();
  if (state0 == u8 && state1 == i8) return OfBlock<code_both<encode_both<E5M3, S8>>>::current();
  return nullptr;
}

template <class Rule>
void check_lengths(const Lists& lists) {
  const size_t count = lists.operands[PARAM].size();
  const auto fits = [&](const auto& list) { return list.size() == count; };
  const auto fits_or_empty = [&](const auto& list) { return list.empty() || fits(list); };
  const TensorHandles& states1 = lists.operands[STATE1];
  STD_TORCH_CHECK(fits(lists.operands[GRAD]) && fits(lists.operands[STATE0]) &&
                      (Rule::required_states == 2 ? fits(states1) : fits_or_empty(states1)) &&
                      fits_or_empty(lists.operands[PARTS]) && fits_or_empty(lists.residuals) &&
                      fits_or_empty(lists.scales[STATE0]) &&
                      fits_or_empty(lists.scales[STATE1]),
                  "the lists of tensors differ in length");
  STD_TORCH_CHECK(fits(lists.seeds) && fits(lists.firsts),
                  "seeds and firsts must have one entry for each parameter");
  STD_TORCH_CHECK(lists.scales[STATE1].empty() || !states1.empty(),
                  "there are scales of a state that is not there");
}

// Checks everything, so that an error leaves every tensor as it was.
template <class Rule, class Options>
std::vector<Task<Rule>> plan(const Lists& lists, Options options, bool at_steps) {
  check_lengths<Rule>(lists);
  std::vector<Task<Rule>> tasks;
  int64_t chunks = 0;
  for (size_t i = 0; i < lists.operands[PARAM].size(); ++i) {
    const double step = lists.steps[i];
    if constexpr (has_steps<Options>) {
      if (at_steps) options.set_step(step);
    }
    const auto stream = [&](uint32_t number) {
      return random_of(lists.seeds[i], static_cast<int64_t>(step), number, lists.firsts[i]);
    };
    const AtenTensorHandle param = lists.operands[PARAM][i];
    const Entry entry{"params", "its gradient, residual and states", i};
    Task<Rule> task{{get(aoti_torch_get_numel, param), chunks},
                    Rule(options),
                    OfBlock<update_block<Rule>>::current(),
                    {},
                    {},
                    nullptr,
                    {},
                    {stream(weight_stream), stream(0), stream(0), stream(1)}};
    for (int k = 0; k < OPERANDS; ++k) {
      if (lists.operands[k].empty()) continue;
      const AtenTensorHandle tensor = lists.operands[k][i];
      task.elements[k] = elements_of(tensor, param, k != GRAD && k != PARTS, entry);
      if (k == GRAD) {
        task.codecs[k] = codec_of_grad(dtype(tensor), dtype(param), i);
      } else if (k == PARTS) {
        STD_TORCH_CHECK(dtype(tensor) == dtypes().f32, "parts[", i, "] must be float32");
      } else if (k != PARAM) {
        const int32_t state = dtype(tensor);
        task.codecs[k] = codec_of_state(state);
        STD_TORCH_CHECK(task.codecs[k].decode || state == dtypes().f32, "the states of params[", i,
                        "] must be float32, bfloat16, int8 or uint8");
        STD_TORCH_CHECK(has_scales(state) != lists.scales[k].empty(), "the states of params[", i,
                        "] need scales if they are int8 or uint8, and else have none");
        if (has_scales(state)) {
          task.scales[k] = scales_of(lists.scales[k][i], state, task.numel, entry);
        }
      }
    }
    if (!lists.operands[STATE1].empty()) {
      task.encode_both =
          encoder_of_both(dtype(lists.operands[STATE0][i]), dtype(lists.operands[STATE1][i]));
      if (task.encode_both) {
        task.codecs[STATE0].encode = task.codecs[STATE1].encode = nullptr;
      }
    }
    const AtenTensorHandle residual = lists.residuals.empty() ? nullptr : lists.residuals[i];
    task.codecs[PARAM] = codec_of_weight(dtype(param), residual, lists.stochastic, i);
    if (residual) task.elements[RESIDUAL] = elements_of(residual, param, true, entry);
    chunks += chunk_count(task.numel);
    tasks.push_back(std::move(task));
  }
  return tasks;
}

template <template <class> class RuleOf>
void update_lowbit_tensors(StableIValue* stack, uint64_t argument_count, uint64_t) {
  using Rule = RuleOf<float>;
  using Options = typename Rule::Options;
  constexpr size_t scalars = std::tuple_size_v<decltype(Options().scalars())>;
  constexpr int states = Rule::states;
  Arguments arguments(stack, argument_count, 8 + 2 * states + has_steps<Options> + scalars + 2 +
                                                 part_arguments<Options>);
  Lists lists;
  for (int k = 0; k < STATE0 + states; ++k) lists.operands[k] = arguments.next_tensors();
  lists.residuals = arguments.next_tensors();
  for (int k = STATE0; k < STATE0 + states; ++k) lists.scales[k] = arguments.next_tensors();
  const AtenTensorHandle steps = arguments.next_tensor(), lr = arguments.next_tensor();
  lists.seeds = arguments.next_integers();
  lists.firsts = arguments.next_integers();
  lists.stochastic = arguments.next<bool>();
  const bool at_steps = has_steps<Options> && arguments.next<bool>();
  Options options{};
  std::apply([&](auto&... values) { arguments.read_all(values...); }, options.scalars());
  const bool take_step = next_scaling(arguments, options);
  if constexpr (Rule::takes_parts) {
    lists.operands[PARTS] = arguments.next_optional_tensors();
    std::apply([&](auto&... values) { arguments.read_all(values...); }, options.part_weights());
  }
  options.lr = read_number(lr, "lr");
  lists.steps = read_steps(steps, lists.operands[PARAM].size());
  const auto tasks = plan<Rule>(lists, options, at_steps);
  if (take_step) for_each_chunk(tasks, run<Rule>);
}

}  // namespace
}  // namespace rootfree_fused

STABLE_TORCH_LIBRARY_IMPL(rootfree_fused, CPU, m) {
  using namespace rootfree_fused;
  m.impl("lowbit_rmsprop_", update_lowbit_tensors<Rmsprop>);
  m.impl("lowbit_adamw_", update_lowbit_tensors<Adamw>);
  m.impl("lowbit_sign_", update_lowbit_tensors<Sign>);
  m.impl("lowbit_vector_adam_", update_lowbit_tensors<VectorAdam>);
}
