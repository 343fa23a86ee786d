#include "moiety/stream/task_stream.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "../train/tiny.h"
#include "moiety/base/error.h"
#include "moiety/io/checkpoint.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

class Stream : public testing::Test {
 protected:
  void SetUp() override {
    Trainer(tiny::run(folder_, "base", 20)).run();
    std::string digits;
    for (int i = 0; i < 120; ++i) digits += std::to_string(i * 37) + " " + std::to_string(i) + "\n";
    write_file(folder_ / "digits.txt", digits);
  }
  json config(const std::string& output,
              json part = {{"slug", "mora"}, {"rank", 2}, {"top_k", 2}, {"target", "all"}}) const {
    const auto source = [&](const char* file) {
      return json::array({{{"path", (folder_ / file).string()}, {"document", "line"}}});
    };
    return {{"model", (folder_ / "base" / "last").string()},
            {"part", std::move(part)},
            {"tasks",
             {{{"name", "digits"}, {"sources", source("digits.txt")}},
              {{"name", "words"}, {"sources", source("text.txt")}}}},
            {"data", {{"length", 32}, {"held_out", 0.2}}},
            {"train", {{"steps", 6}, {"batch", 4}}},
            {"optimizer", {{"lr", 0.02}}},
            {"evaluation_tokens", 400},
            {"output", (folder_ / output).string()}};
  }
  StreamResult run(const json& c, const StreamOptions& options = {}) const {
    return run_stream(read_stream_config(c.dump(), "stream.yaml"), options);
  }
  TemporaryFolder folder_{"moiety-test"};
};

TEST_F(Stream, EveryTaskGetsABlockAndTheFirstStaysAsItWas) {
  const auto result = run(config("out"));
  EXPECT_TRUE(result.complete);
  EXPECT_EQ(result.tasks, (std::vector<std::string>{"digits", "words"}));
  EXPECT_TRUE(result.accuracy.isfinite().all().item<bool>());
  // The first task is learned: the losses are before, and after it.
  const json state = parse_json(read_text(folder_ / "out" / "stream.json"), "stream.json");
  EXPECT_LT(result.loss[0][0].item<double>(), state["before"]["loss"][0].get<double>() - 0.05);
  const auto first = Checkpoint::open((folder_ / "out" / "digits" / "last").string()),
             last = Checkpoint::open((folder_ / "out" / "last").string());
  const std::string at = "model.layers.0.adapters.q_proj.";
  EXPECT_EQ(last->config()["moiety"]["parts"][0]["old_ranks"], 2);
  EXPECT_TRUE(torch::equal(as_tensor(first->get(at + "lora_A")), as_tensor(last->get(at + "old_A"))));
  EXPECT_TRUE(torch::equal(as_tensor(first->get(at + "lora_B")), as_tensor(last->get(at + "old_B"))));
  EXPECT_FALSE(torch::equal(as_tensor(first->get(at + "lora_A")), as_tensor(last->get(at + "lora_A"))));
}

TEST_F(Stream, GoesOnWhereItWasStopped) {
  const auto whole = run(config("whole"));
  StreamOptions options;
  int steps = 0;
  options.stop = [&] { return ++steps == 8; };  // within the second task
  const auto stopped = run(config("stopped"), options);
  EXPECT_FALSE(stopped.complete);
  EXPECT_TRUE(stopped.accuracy[0].isfinite().all().item<bool>());
  EXPECT_FALSE(stopped.accuracy[1].isfinite().any().item<bool>());
  const auto again = run(config("stopped"));
  EXPECT_TRUE(again.complete);
  EXPECT_TRUE(torch::equal(again.loss, whole.loss));
  // Nothing is left to do.
  int calls = 0;
  StreamOptions watch;
  watch.on_step = [&](const std::string&, int64_t, int64_t, double) { ++calls; };
  EXPECT_TRUE(torch::equal(run(config("stopped"), watch).loss, whole.loss));
  EXPECT_EQ(calls, 0);
}

TEST_F(Stream, OtherPartsGoOnLearning) {
  const auto result = run(config("lora", {{"slug", "lora"}, {"rank", 2}, {"target", "all"}}));
  EXPECT_TRUE(result.complete);
  EXPECT_FALSE(fs::exists(folder_ / "lora" / "digits" / "next"));
}

TEST_F(Stream, SaysWhatIsWrong) {
  const auto message = [&](const json& c) {
    try {
      run(c);
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  auto c = config("a");
  c["tasks"][1]["name"] = "digits";
  EXPECT_NE(message(c).find("two tasks are called digits"), std::string::npos);
  c = config("a");
  c["tasks"][0]["name"] = "../up";
  EXPECT_NE(message(c).find("letters, digits"), std::string::npos);
  c = config("a");
  c["part"]["old_ranks"] = 3;
  EXPECT_NE(message(c).find("old_ranks"), std::string::npos);
  c = config("a");
  c["part"]["rnak"] = 3;
  EXPECT_NE(message(c).find("rank"), std::string::npos);
  run(config("b"));
  c = config("b");
  c["train"]["steps"] = 7;
  EXPECT_NE(message(c).find("other settings"), std::string::npos);
}

}  // namespace
}  // namespace moiety
