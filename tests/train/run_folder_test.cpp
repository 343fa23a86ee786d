#include "moiety/train/run_folder.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/base/files.h"

namespace moiety {
namespace {

namespace fs = std::filesystem;

void write_state(const fs::path& folder) {
  fs::create_directory(folder / "training");
  write_file(folder / "training" / "state.json", "{}");
}

TEST(RunFolder, CheckpointsAppearWholeAndOldOnesGo) {
  const TemporaryFolder temporary;
  RunFolder run(temporary / "run");
  for (int64_t step : {10, 20, 30, 40}) run.save(step, write_state);
  run.mark_best(10);
  run.prune(2);
  EXPECT_EQ(run.steps(), (std::vector<int64_t>{10, 30, 40}));
  EXPECT_EQ(fs::canonical(run.path() / "last"), fs::canonical(run.checkpoint(40)));
  EXPECT_EQ(fs::canonical(run.path() / "best"), fs::canonical(run.checkpoint(10)));
  run.mark_best(40);
  run.prune(1);
  EXPECT_EQ(run.steps(), (std::vector<int64_t>{40}));
}

TEST(RunFolder, AFailedSaveLeavesNothing) {
  const TemporaryFolder temporary;
  RunFolder run(temporary / "run");
  run.save(1, write_state);
  EXPECT_THROW(run.save(2,
                        [](const fs::path& folder) {
                          write_state(folder);
                          fail("disk full");
                        }),
               Error);
  EXPECT_EQ(run.steps(), (std::vector<int64_t>{1}));
  EXPECT_EQ(std::distance(fs::directory_iterator(run.path() / "checkpoints"), fs::directory_iterator()), 1);
}

TEST(RunFolder, CleansUpBehindAKilledRun) {
  const TemporaryFolder temporary;
  fs::create_directories(temporary / "run" / "checkpoints" / ".moiety-new-1-7" / "training");
  fs::create_directories(temporary / "run" / "checkpoints" / "step-00000005");  // a model somebody put there
  RunFolder run(temporary / "run");
  EXPECT_FALSE(fs::exists(temporary / "run" / "checkpoints" / ".moiety-new-1-7"));
  EXPECT_TRUE(run.steps().empty());
}

TEST(RunFolder, TensorsComeBackAsTheyWere) {
  const TemporaryFolder temporary;
  NamedTensors tensors;
  tensors["a"] = torch::randn({3, 4}).t();
  tensors["b"] = torch::arange(5, torch::kInt64);
  tensors["c"] = torch::zeros({0, 2});
  tensors["d"] = torch::tensor(1.5f);
  tensors["e"] = torch::randint(256, {9}, torch::kUInt8);
  write_tensors(temporary / "t.safetensors", tensors);
  const auto back = read_tensors(temporary / "t.safetensors");
  ASSERT_EQ(back.size(), tensors.size());
  for (const auto& [name, t] : tensors) {
    EXPECT_EQ(back.at(name).scalar_type(), t.scalar_type());
    EXPECT_TRUE(torch::equal(back.at(name), t)) << name;
  }
}

}  // namespace
}  // namespace moiety
