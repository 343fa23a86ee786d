// Attention by tasks against its definition in f64, whose gradients torch derives.
#include "moiety/nn/attention_tasks.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "moiety/kernels/cpu.h"
#include "moiety/kernels/matmul.h"
#include "moiety/nn/shortcut.h"
#include "threads.h"

namespace moiety {
namespace {

using test::Threads;
using torch::Tensor;

struct Case {
  std::string name;
  int64_t batch = 2, heads = 4, shared = 2, tokens = 100, past = 0, size = 24, v_size = 24;
  int64_t window = 0;
  double softcap = 0.0;
  bool sinks = false;
  Tensor padding = {}, segments = {};
};

struct Inputs {
  Tensor q, k, v, sinks, weight;
};

// As modules have them: views of [B, T, H, D].
Inputs inputs(const Case& c, torch::ScalarType type = torch::kFloat32) {
  torch::manual_seed(3);
  const auto rows = [&](int64_t tokens, int64_t heads, int64_t size) {
    return torch::randn({c.batch, tokens, heads, size}).to(type).transpose(1, 2);
  };
  Inputs in{rows(c.tokens, c.heads, c.size),
            rows(c.past + c.tokens, c.shared, c.size),
            rows(c.past + c.tokens, c.shared, c.v_size),
            {},
            rows(c.tokens, c.heads, c.v_size)};
  if (c.sinks) in.sinks = torch::randn({c.heads});
  return in;
}

AttentionContext context(const Case& c) {
  const auto positions = (torch::arange(c.tokens, torch::kInt64) + c.past).expand({c.batch, c.tokens});
  return {positions, c.past, c.padding, c.segments};
}

Tensor by_definition(const Inputs& in, const Tensor& allowed, const AttentionOptions& options) {
  const int64_t groups = in.q.size(1) / in.k.size(1);
  const auto k = in.k.repeat_interleave(groups, 1), v = in.v.repeat_interleave(groups, 1);
  auto logits = at::matmul(in.q, k.transpose(2, 3)) * options.scale;
  if (options.softcap != 0.0) logits = torch::tanh(logits / options.softcap) * options.softcap;
  const auto hidden = allowed.defined()
                          ? ~allowed
                          : torch::ones({in.q.size(2), k.size(2)}, torch::kBool).triu(k.size(2) - in.q.size(2) + 1);
  logits = logits.masked_fill(hidden, -std::numeric_limits<double>::infinity());
  if (in.sinks.defined()) {
    const auto sinks = in.sinks.view({1, -1, 1, 1}).expand({in.q.size(0), in.q.size(1), in.q.size(2), 1});
    logits = torch::cat({logits, sinks}, -1);
  }
  return at::matmul(torch::softmax(logits, -1).narrow(-1, 0, k.size(2)), v);
}

// The result, then the gradients of q, k, v and the sinks.
std::vector<Tensor> with_gradients(Inputs in, const std::function<Tensor(const Inputs&)>& attention) {
  std::vector<Tensor> wanted;
  for (Tensor* t : {&in.q, &in.k, &in.v, &in.sinks})
    if (t->defined()) {
      *t = t->detach().requires_grad_(true);
      wanted.push_back(*t);
    }
  const auto y = attention(in);
  auto all = torch::autograd::grad({y}, wanted, {in.weight});
  all.insert(all.begin(), y.detach());
  return all;
}

std::vector<Tensor> found(const Case& c, const Inputs& in) {
  const auto ctx = context(c);
  return with_gradients(in, [&](const Inputs& i) {
    return attend_by_tasks(i.q, i.k, i.v, ctx.allowed(c.window), ctx.causal(),
                           {.scale = 0.3, .window = c.window, .softcap = c.softcap, .sinks = i.sinks});
  });
}

std::vector<Tensor> wanted(const Case& c, Inputs in) {
  for (Tensor* t : {&in.q, &in.k, &in.v, &in.sinks, &in.weight})
    if (t->defined()) *t = t->to(torch::kFloat64);
  const auto ctx = context(c);
  return with_gradients(in, [&](const Inputs& i) {
    return by_definition(i, ctx.allowed(c.window),
                         {.scale = 0.3, .window = c.window, .softcap = c.softcap, .sinks = {}});
  });
}

Tensor left_padding(int64_t batch, int64_t total, int64_t each) {
  return torch::arange(total).unsqueeze(0) >= (torch::arange(batch) * each).unsqueeze(1);
}

// Blocks are of 64 queries and chunks of 512 keys: some end within them.
std::vector<Case> cases() {
  std::vector<Case> all = {
      {.name = "causal"},
      {.name = "one token", .tokens = 1},
      {.name = "one token of many", .tokens = 1, .past = 40},
      {.name = "whole blocks", .tokens = 128},
      {.name = "one head of keys", .heads = 6, .shared = 1},
      {.name = "a head of keys each", .shared = 4},
      {.name = "sizes", .size = 33, .v_size = 17},
      {.name = "sizes of one", .size = 1, .v_size = 1},
      {.name = "after a cache", .tokens = 70, .past = 45},
      {.name = "chunks", .batch = 1, .heads = 2, .shared = 1, .tokens = 600, .size = 16, .v_size = 16},
      {.name = "window", .tokens = 150, .window = 20},
      {.name = "window over chunks", .batch = 1, .heads = 2, .tokens = 20, .past = 1000, .window = 515},
      {.name = "softcap", .softcap = 2.0},
      {.name = "sinks", .sinks = true},
      {.name = "all at once", .tokens = 90, .past = 5, .v_size = 8, .window = 70, .softcap = 4.0, .sinks = true},
  };
  Case padded{.name = "padding"};
  padded.padding = left_padding(2, 100, 30);
  all.push_back(padded);
  padded.name = "padding within", padded.sinks = true;
  padded.padding = torch::arange(100).remainder(7).ne(3).expand({2, 100}).clone();
  all.push_back(padded);
  Case packed{.name = "segments", .tokens = 150};
  packed.segments = torch::stack({torch::arange(150).floor_divide(40), torch::arange(150).floor_divide(97)});
  all.push_back(packed);
  return all;
}

class AttendByTasks : public testing::Test {
 protected:
  void SetUp() override {
    if (!matmul_is_fast()) GTEST_SKIP() << "no products of our own on this machine";
  }
  void TearDown() override { set_isa(best_isa()); }

  template <class F>
  static void for_each_isa(const F& f) {
    for (const Isa each : {Isa::Avx2, Isa::Avx512})
      if (each <= best_isa()) {
        SCOPED_TRACE(std::string(isa_name(each)));
        set_isa(each);
        f();
      }
  }
};

const char* const kNames[] = {"the result", "the gradient of q", "the gradient of k", "the gradient of v",
                              "the gradient of the sinks"};

// Errors are measured by the largest value: sums over many queries and keys, some of which nearly cancel.
void expect_near(const std::vector<Tensor>& have, const std::vector<Tensor>& want, double tolerance) {
  ASSERT_EQ(have.size(), want.size());
  for (size_t i = 0; i < have.size(); ++i) {
    const double largest = std::max(1.0, want[i].abs().max().item<double>());
    EXPECT_LT((have[i].to(torch::kFloat64) - want[i]).abs().max().item<double>(), tolerance * largest) << kNames[i];
  }
}

TEST_F(AttendByTasks, EqualsTheDefinition) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name);
    const auto in = inputs(c);
    const auto want = wanted(c, in);
    for_each_isa([&] { expect_near(found(c, in), want, 3e-6); });
  }
}

// The bound is what rounding probabilities and their gradients to 8 bits gives; scores are exact products of bf16.
TEST_F(AttendByTasks, EqualsTheDefinitionInBf16) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name);
    const auto in = inputs(c, torch::kBFloat16);
    const auto want = wanted(c, in);
    for_each_isa([&] {
      const auto have = found(c, in);
      expect_near(have, want, 1e-2);
      for (size_t i = 0; i < 4; ++i) EXPECT_EQ(have[i].scalar_type(), torch::kBFloat16);
    });
  }
}

// In f32 with operands rounded to bf16, where a machine multiplies these faster; never under a graph.
TEST_F(AttendByTasks, MayRoundWhatItMultiplies) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name);
    const auto in = inputs(c);
    const auto ctx = context(c);
    AttentionOptions options{.scale = 0.3, .window = c.window, .softcap = c.softcap, .sinks = in.sinks};
    const auto attended = [&](bool round) {
      options.round_operands = round;
      return attend_by_tasks(in.q, in.k, in.v, ctx.allowed(c.window), ctx.causal(), options);
    };
    in.q.requires_grad_(true);
    EXPECT_TRUE(torch::equal(attended(true), attended(false)));
    const torch::NoGradGuard frozen;
    for_each_isa([&] {
      const auto exact = attended(false), rounded = attended(true);
      EXPECT_EQ(rounded.scalar_type(), torch::kFloat32);
      const double off = (rounded - exact).abs().max().item<double>();
      EXPECT_LT(off, 2e-2 * exact.abs().max().item<double>());
      EXPECT_EQ(off > 0.0, isa() == Isa::Avx512);
    });
  }
}

TEST_F(AttendByTasks, SeesAllKeysWithoutARule) {
  Case c{.tokens = 70, .past = 30};
  const auto in = inputs(c);
  const auto all = torch::ones({1, 1, 70, 100}, torch::kBool);
  const AttentionOptions options{.scale = 0.3, .window = 0, .softcap = 0.0, .sinks = {}};
  const auto y = attend_by_tasks(in.q, in.k, in.v, {}, false, options);
  EXPECT_TRUE(torch::equal(y, attend_by_tasks(in.q, in.k, in.v, all, false, options)));
  EXPECT_LT((y - by_definition(in, all, options)).abs().max().item<double>(), 3e-6);
}

TEST_F(AttendByTasks, GradientsAreSlopes) {
  Case c{.batch = 1, .heads = 2, .shared = 1, .tokens = 5, .size = 3, .v_size = 2, .softcap = 2.0, .sinks = true};
  Inputs in = inputs(c);
  const auto gradients = found(c, in);
  const auto ctx = context(c);
  const auto loss = [&] {
    const torch::NoGradGuard frozen;
    const auto y = attend_by_tasks(in.q, in.k, in.v, ctx.allowed(0), ctx.causal(),
                                   {.scale = 0.3, .window = 0, .softcap = c.softcap, .sinks = in.sinks});
    return (y.to(torch::kFloat64) * in.weight).sum().item<double>();
  };
  Tensor* const tensors[] = {&in.q, &in.k, &in.v, &in.sinks};
  for (size_t i = 0; i < 4; ++i) {
    *tensors[i] = tensors[i]->contiguous();
    const auto gradient = gradients[i + 1].contiguous();
    auto* x = tensors[i]->data_ptr<float>();
    for (int64_t j = 0; j < gradient.numel(); ++j) {
      const float step = 1e-2f, before = x[j];
      x[j] = before + step;
      const double above = loss();
      x[j] = before - step;
      const double below = loss();
      x[j] = before;
      // The values carry an error of 1e-7, the slope the square of the step.
      EXPECT_NEAR(gradient.const_data_ptr<float>()[j], (above - below) / (2.0 * step), 2e-4) << kNames[i + 1];
    }
  }
}

// By their number a head of keys is one task, or many that are parts of it.
TEST_F(AttendByTasks, DoesNotDependOnTheNumberOfThreads) {
  for (const auto type : {torch::kFloat32, torch::kBFloat16})
    for (Case c : cases())
      for (const int64_t batch : {int64_t{1}, c.batch}) {
        if (batch < c.batch && (c.padding.defined() || c.segments.defined())) continue;
        SCOPED_TRACE(c.name);
        c.batch = batch;
        const auto in = inputs(c, type);
        const auto at = [&](int threads) {
          const Threads n(threads);
          return found(c, in);
        };
        const auto one = at(1);
        for (const int threads : {2, 3, 16}) {
          const auto more = at(threads);
          for (size_t i = 0; i < one.size(); ++i) EXPECT_TRUE(torch::equal(one[i], more[i])) << kNames[i];
        }
      }
}

TEST_F(AttendByTasks, WithoutAGraphGivesTheSameValues) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name);
    const auto in = inputs(c);
    const auto ctx = context(c);
    const auto want = found(c, in)[0];
    const torch::NoGradGuard frozen;
    const AttentionOptions options{.scale = 0.3, .window = c.window, .softcap = c.softcap, .sinks = in.sinks};
    const auto y = attend_by_tasks(in.q, in.k, in.v, ctx.allowed(c.window), ctx.causal(), options);
    EXPECT_TRUE(torch::equal(y, want));
    const WithoutShortcuts as_with_a_graph;
    EXPECT_TRUE(torch::equal(y, attend(in.q, in.k, in.v, ctx, options)));
  }
}

TEST_F(AttendByTasks, OnlyWhatIsAskedForHasGradients) {
  Case c{.sinks = true};
  const auto in = inputs(c);
  const auto ctx = context(c);
  const auto all = found(c, in);
  for (int mask = 1; mask < 16; ++mask) {
    Inputs some = in;
    Tensor* const tensors[] = {&some.q, &some.k, &some.v, &some.sinks};
    for (size_t i = 0; i < 4; ++i) *tensors[i] = tensors[i]->detach().requires_grad_((mask >> i & 1) != 0);
    const auto y = attend_by_tasks(some.q, some.k, some.v, {}, true,
                                   {.scale = 0.3, .window = 0, .softcap = 0.0, .sinks = some.sinks});
    y.backward(some.weight);
    for (size_t i = 0; i < 4; ++i) {
      ASSERT_EQ(tensors[i]->grad().defined(), (mask >> i & 1) != 0) << kNames[i + 1];
      if (tensors[i]->grad().defined()) {
        EXPECT_TRUE(torch::equal(tensors[i]->grad(), all[i + 1])) << kNames[i + 1];
      }
    }
  }
}

TEST_F(AttendByTasks, TakesAnyStrides) {
  Case c;
  const auto in = inputs(c);
  const auto want = found(c, in);
  const auto expect_same = [&](const Inputs& other) {
    const auto have = found(c, other);
    for (size_t i = 0; i < have.size(); ++i) EXPECT_TRUE(torch::equal(have[i], want[i])) << kNames[i];
  };
  expect_same({in.q.contiguous(), in.k.contiguous(), in.v.contiguous(), {}, in.weight.contiguous()});
  const auto slice = [](const Tensor& t) {  // of a wider projection
    return torch::cat({t, t + 1}, -1).narrow(-1, 0, t.size(3));
  };
  expect_same({slice(in.q), slice(in.k), slice(in.v), {}, slice(in.weight)});
  // A gradient that is one number, spread.
  Inputs spread = in;
  spread.weight = torch::ones({}).expand_as(in.weight);
  expect_near(found(c, spread), wanted(c, spread), 3e-6);
  // Heads of keys that are one and the same.
  Inputs repeated = in;
  repeated.k = in.k.narrow(1, 0, 1).expand_as(in.k);
  expect_near(found(c, repeated), wanted(c, repeated), 3e-6);
}

TEST_F(AttendByTasks, ResultsAndGradientsLieByToken) {
  Case c{.v_size = 8};
  for (const Tensor& t : found(c, inputs(c))) EXPECT_TRUE(t.transpose(1, 2).is_contiguous());
}

TEST_F(AttendByTasks, ARowThatSeesNothingIsZero) {
  Case c{.tokens = 70};
  for (const bool sinks : {false, true})
    for (const int64_t blind : {10, 70}) {
      c.sinks = sinks;
      const auto in = inputs(c);
      auto allowed = torch::ones({1, 1, 70, 70}, torch::kBool).tril();
      allowed.narrow(2, 0, blind).fill_(false);
      const auto all = with_gradients(in, [&](const Inputs& i) {
        return attend_by_tasks(i.q, i.k, i.v, allowed, true,
                               {.scale = 0.3, .window = 0, .softcap = 0.0, .sinks = i.sinks});
      });
      for (const Tensor& t : all) EXPECT_TRUE(torch::isfinite(t).all().item<bool>());
      for (size_t i : {0, 1}) EXPECT_EQ(all[i].narrow(2, 0, blind).abs().max().item<double>(), 0.0);
    }
}

TEST_F(AttendByTasks, LeavesOthersToTheComposite) {
  Case c;
  const auto in = inputs(c);
  EXPECT_TRUE(runs_by_tasks(in.q, in.k, in.v, {}, true));
  const auto wide = [](const Tensor& t) { return t.to(torch::kFloat64); };
  EXPECT_FALSE(runs_by_tasks(wide(in.q), wide(in.k), wide(in.v), {}, true));
  EXPECT_FALSE(runs_by_tasks(in.q, in.k.to(torch::kBFloat16), in.v, {}, true));
  EXPECT_FALSE(runs_by_tasks(in.q.transpose(2, 3), in.k, in.v, {}, true));
  EXPECT_FALSE(runs_by_tasks(in.q.narrow(2, 0, 5), in.k, in.v, {}, true));
  set_isa(Isa::Portable);
  EXPECT_FALSE(runs_by_tasks(in.q, in.k, in.v, {}, true));
}

}  // namespace
}  // namespace moiety
