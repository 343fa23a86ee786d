// Modules take shorter ways when no gradient is asked for. They have to give what the composite gives that a graph is
// built from.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moiety/models/decoder.h"
#include "moiety/models/model.h"
#include "moiety/moe/experts.h"
#include "moiety/moe/router.h"
#include "moiety/nn/attention.h"
#include "moiety/nn/feed_forward.h"
#include "moiety/nn/norm.h"
#include "moiety/nn/packed.h"
#include "moiety/nn/packed_gated.h"
#include "moiety/nn/rope.h"
#include "threads.h"

namespace moiety {
namespace {

using torch::Tensor;

double distance(const Tensor& a, const Tensor& b) {
  return (a - b).abs().max().item<double>();
}

// f(x) with and without a graph behind x.
template <class F>
double difference(const Tensor& x, F f) {
  const auto with = f(x.clone().requires_grad_(true)).detach();
  const torch::NoGradGuard frozen;
  const auto without = f(x);
  EXPECT_EQ(with.sizes(), without.sizes());
  return distance(with, without);
}

TEST(Inference, NormEqualsItsComposite) {
  torch::manual_seed(1);
  for (const int64_t n : {1, 33, 576})
    for (const double offset : {0.0, 1.0}) {
      RmsNorm norm(torch::randn({n}), 1e-5, offset);
      EXPECT_LT(difference(torch::randn({3, 5, n}), [&](const Tensor& x) { return norm.forward(x); }), 3e-6);
    }
}

TEST(Inference, RotationEqualsItsComposite) {
  torch::manual_seed(2);
  for (const bool interleaved : {false, true})
    for (const double partial : {1.0, 0.5}) {
      RopeConfig config;
      config.head_dim = 24;
      config.partial = partial;
      config.interleaved = interleaved;
      const Rope rope(config);
      for (const auto& positions : {torch::arange(7).unsqueeze(0), torch::randint(0, 50, {2, 7}, torch::kInt64)}) {
        const auto angles = rope.angles(positions);
        // [B, T, H, D] turned, as projections come.
        EXPECT_LT(difference(torch::randn({2, 7, 3, 24}),
                             [&](const Tensor& x) { return rope.rotate(x.transpose(1, 2), angles); }),
                  1e-6);
      }
    }
}

TEST(Inference, OneTokensAttentionEqualsItsComposite) {
  torch::manual_seed(3);
  for (const int64_t window : {0, 4})
    for (const double softcap : {0.0, 3.0})
      for (const bool sinks : {false, true})
        for (const bool padded : {false, true}) {
          const int64_t batch = 2, heads = 6, shared = 2, past = 11, size = 20, v_size = 70;
          auto padding = torch::ones({batch, past + 1}, torch::kBool);
          if (padded) padding[1].slice(0, 0, 9).fill_(false);
          const AttentionContext context(torch::full({batch, 1}, past, torch::kInt64), past,
                                         padded ? padding : Tensor(), {});
          AttentionOptions options{.scale = 0.3, .window = window, .softcap = softcap, .sinks = {}};
          if (sinks) options.sinks = torch::randn({heads});
          // As the cache gives them: longer in memory than they are.
          const auto k = torch::randn({batch, shared, 20, size}).narrow(2, 0, past + 1),
                     v = torch::randn({batch, shared, 20, v_size}).narrow(2, 0, past + 1);
          EXPECT_LT(difference(torch::randn({batch, heads, 1, size}),
                               [&](const Tensor& q) { return attend(q, k, v, context, options); }),
                    2e-6)
              << window << softcap << sinks << padded;
        }
}

TEST(Inference, FewTokensEnterTheCacheAsManyDo) {
  torch::manual_seed(4);
  const auto k = torch::randn({2, 12, 3, 8}).transpose(1, 2), v = torch::randn({2, 12, 3, 5}).transpose(1, 2);
  KvCache whole, pieces;
  const auto [wk, wv] = whole.append(0, k, v);
  for (int64_t at = 0; at < 12; at += 4) pieces.append(0, k.narrow(2, at, 4), v.narrow(2, at, 4));
  const auto [pk, pv] = pieces.append(0, k.narrow(2, 0, 1), v.narrow(2, 0, 1));
  EXPECT_TRUE(torch::equal(pk.narrow(2, 0, 12), wk));
  EXPECT_TRUE(torch::equal(pv.narrow(2, 0, 12), wv));
  EXPECT_TRUE(torch::equal(pk.narrow(2, 12, 1), k.narrow(2, 0, 1)));
}

TEST(Inference, ReducedPairsEqualTheirComposite) {
  torch::manual_seed(5);
  Dispatch d;
  d.tokens = torch::tensor({2, 0, 2, 4}, torch::kInt64);
  d.gates = torch::rand({4});
  EXPECT_LT(difference(torch::randn({4, 9}), [&](const Tensor& y) { return d.reduce(y, 6); }), 1e-6);
}

TEST(Inference, RoutingEqualsItsComposite) {
  torch::manual_seed(8);
  const auto x = torch::randn({9, 12});
  for (const Scoring scoring : {Scoring::softmax, Scoring::softmax_kept, Scoring::sigmoid})
    for (const bool normalize : {false, true})
      for (const bool biased : {false, true}) {
        TopKRouterOptions options;
        options.top_k = 3;
        options.scoring = scoring;
        options.normalize = normalize;
        options.normalize_eps = 1e-3;
        options.scale = 1.5;
        TopKRouter router(Linear(12, 7), options, biased ? torch::randn({7}) : Tensor());
        Routing r[2];
        for (const bool graph : {false, true}) {
          const torch::AutoGradMode mode(graph);
          Pass pass;
          r[graph] = router.route(x, {}, pass);
        }
        EXPECT_TRUE(r[0].experts.equal(r[1].experts));
        EXPECT_LT(distance(r[0].scores, r[1].scores), 1e-6);
        EXPECT_LT(distance(r[0].gates, r[1].gates), 1e-6);
        EXPECT_LT(distance(r[0].logits, r[1].logits), 1e-6);
      }
}

// Matrices in blocks, for layers without a graph.
TensorView block_view(int64_t out, int64_t in) {
  const auto w = torch::randn({out, in}) * 0.05;
  const int64_t bytes = row_bytes(Format::Q8_0, in);
  const auto data = std::make_shared<std::vector<std::byte>>(static_cast<size_t>(out * bytes));
  for (int64_t r = 0; r < out; ++r)
    quantize_row(Format::Q8_0, w.const_data_ptr<float>() + r * in, data->data() + r * bytes, in);
  TensorView view;
  view.format = Format::Q8_0;
  view.shape = {out, in};
  view.data = *data;
  view.owner = data;
  return view;
}

Linear blocks(int64_t out, int64_t in) {
  return Linear(block_view(out, in));
}

// A copy in fewer bits of a matrix that the file has in 16.
TEST(Inference, AStreamedMatrixComputesByTheFormatOfItsCopy) {
  if (!can_pack(Format::Q8_0)) GTEST_SKIP() << "this machine has no products of packed rows";
  torch::manual_seed(7);
  const torch::NoGradGuard frozen;
  const auto copy = block_view(20, 64);
  TensorView file;
  file.format = Format::F16;
  file.shape = {20, 64};
  const auto data = std::make_shared<std::vector<std::byte>>(20 * 64 * 2);
  file.data = *data;
  file.owner = data;
  Linear streamed(file);
  streamed->stream();
  auto place = std::make_shared<LinearImpl::Place>();
  place->packed = std::make_shared<const PackedMatrix>(copy);
  streamed->put(place);
  const auto x = torch::randn({3, 64});
  EXPECT_TRUE(torch::equal(streamed(x), Linear(copy)(x)));
}

TEST(Inference, GatedLayersInBlocksEqualTheirMatricesOneByOne) {
  torch::manual_seed(6);
  const torch::NoGradGuard frozen;
  for (const char* act : {"silu", "gelu"}) {
    const auto f = activation(act);
    FeedForward layer(blocks(96, 64), blocks(96, 64), blocks(64, 96), f);
    for (const int64_t n : {1, 5, 30}) {
      const auto x = torch::randn({2, n, 64});
      const auto expected = layer.down(f(layer.gate(x)) * layer.up(x));
      Pass pass;
      EXPECT_LT(distance(layer.apply(x, pass), expected), 1e-5 * expected.abs().max().item<double>()) << act << n;
    }
  }
}

GatedExperts four_experts() {
  std::vector<Linear> gate, up, down;
  for (int e = 0; e < 4; ++e) {
    gate.push_back(blocks(32, 64));
    up.push_back(blocks(32, 64));
    down.push_back(blocks(64, 32));
  }
  return {LinearStack(gate), LinearStack(up), LinearStack(down), activation("silu")};
}

TEST(Inference, ExpertsInBlocksEqualTheLoopOverThem) {
  torch::manual_seed(7);
  const torch::NoGradGuard frozen;
  GatedExperts experts = four_experts();
  for (const int64_t n : {1, 3, 40, 300}) {
    Routing routing;
    routing.experts = torch::randint(-1, 3, {n, 2}, torch::kInt64);  // expert 3 is never chosen, -1 is an unused slot
    routing.gates = torch::rand({n, 2});
    const Dispatch d = Dispatch::of(routing, 4);
    const auto x = torch::randn({n, 64});
    const auto expected = d.reduce(experts.forward(d.gather(x), d.counts), n);
    const double size = std::max(1e-3, expected.abs().max().item<double>());
    EXPECT_LT(distance(experts.mix(x, d), expected), 1e-5 * size) << n;
  }
}

// Many rows go through an expert part by part, few through one matrix of all experts after another.
TEST(Inference, ARowsExpertsDoNotDependOnTheRowsBesideIt) {
  if (!can_pack(Format::Q8_0)) GTEST_SKIP() << "this machine has no products of packed rows";
  torch::manual_seed(8);
  const torch::NoGradGuard frozen;
  GatedExperts experts = four_experts();
  const int64_t n = 301;
  Routing routing;
  routing.experts = torch::randint(0, 4, {n, 2}, torch::kInt64);
  routing.gates = torch::rand({n, 2});
  const auto x = torch::randn({n, 64});
  for (const int threads : {1, 2}) {
    const test::Threads limited(threads);
    const auto all = experts.mix(x, Dispatch::of(routing, 4));
    for (const int64_t row : {0, 7, 150, 300}) {
      Routing one;
      one.experts = routing.experts.narrow(0, row, 1);
      one.gates = routing.gates.narrow(0, row, 1);
      EXPECT_TRUE(torch::equal(experts.mix(x.narrow(0, row, 1), Dispatch::of(one, 4))[0], all[row])) << row;
    }
  }
}

TEST(Inference, ExpertsWithBiasesInBlocksEqualTheLoopOverThem) {
  torch::manual_seed(9);
  const torch::NoGradGuard frozen;
  const auto stack = [](int64_t out, int64_t in) {
    std::vector<Linear> list;
    for (int e = 0; e < 4; ++e) list.push_back(blocks(out, in));
    return LinearStack(list, torch::randn({4, out}));
  };
  ClampedExperts experts(stack(32, 64), stack(32, 64), stack(64, 32), 1.702, 2.0);
  for (const int64_t n : {1, 3, 40, 301}) {
    Routing routing;
    routing.experts = torch::randint(-1, 3, {n, 2}, torch::kInt64);
    routing.gates = torch::rand({n, 2});
    const Dispatch d = Dispatch::of(routing, 4);
    const auto x = torch::randn({n, 64});
    // The same products and additions in the same order.
    EXPECT_TRUE(torch::equal(experts.outputs(x, d), experts.forward(d.gather(x), d.counts))) << n;
  }
}

TEST(Inference, DispatchSortsPairsByExpertAndKeepsTheOrderOfTokens) {
  Routing routing;
  routing.experts = torch::tensor({{2, 0}, {-1, 2}, {0, -1}}, torch::kInt64);
  routing.gates = torch::tensor({{0.1f, 0.2f}, {0.f, 0.3f}, {0.4f, 0.f}});
  const Dispatch d = Dispatch::of(routing, 3);
  EXPECT_EQ(d.counts, (std::vector<int64_t>{2, 0, 2}));
  EXPECT_TRUE(d.tokens.equal(torch::tensor({0, 2, 0, 1}, torch::kInt64)));
  EXPECT_TRUE(d.slots.equal(torch::tensor({1, 4, 0, 3}, torch::kInt64)));
  EXPECT_TRUE(d.gates.equal(torch::tensor({0.2f, 0.4f, 0.1f, 0.3f})));
}

}  // namespace
}  // namespace moiety
