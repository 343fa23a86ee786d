#include "moiety/train/run_folder.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <torch/torch.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "moiety/base/error.h"
#include "moiety/io/safetensors.h"
#include "moiety/nn/weights.h"

namespace moiety {
namespace fs = std::filesystem;
namespace {

// Everything that is being written or removed has a name that begins so.
constexpr const char* kHidden = ".moiety-";

void sync_folder(const fs::path& folder) {
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  ::fsync(fd);  // some file systems cannot sync a folder: the rename is atomic all the same
  ::close(fd);
}

void put_at(const fs::path& from, const fs::path& to) {
  check(::rename(from.c_str(), to.c_str()) == 0, "cannot rename {} to {}: {}", from.string(), to.string(),
        std::strerror(errno));
}

// Out of sight first: a kill in between leaves nothing that looks like a checkpoint.
void remove_folder(const fs::path& folder) {
  const fs::path hidden = folder.parent_path() / fmt::format("{}old-{}", kHidden, folder.filename().string());
  std::error_code ignored;
  fs::remove_all(hidden, ignored);
  put_at(folder, hidden);
  fs::remove_all(hidden, ignored);
}

}  // namespace

void write_tensors(const fs::path& file, const NamedTensors& tensors) {
  std::vector<TensorInfo> infos;
  for (const auto& [name, t] : tensors) {
    TensorInfo info;
    info.name = name;
    info.format = format_of(t.scalar_type());
    info.shape = t.sizes().vec();
    infos.push_back(std::move(info));
  }
  SafetensorsWriter writer(file, std::move(infos));
  for (const auto& [name, t] : tensors) {
    const auto flat = t.detach().to(torch::kCPU).contiguous();
    writer.write(name, {static_cast<const std::byte*>(flat.const_data_ptr()), static_cast<size_t>(flat.nbytes())});
  }
  writer.finish();
}

NamedTensors read_tensors(const fs::path& file) {
  const auto stored = SafetensorsFile::open(file);
  NamedTensors out;
  for (const TensorInfo& info : stored->tensors()) out[info.name] = as_tensor(stored->get(info.name)).clone();
  return out;
}

RunFolder::RunFolder(fs::path path, bool clean) : path_(std::move(path)) {
  if (!clean) return;
  std::error_code error;
  fs::create_directories(path_ / "checkpoints", error);
  check(fs::is_directory(path_ / "checkpoints"), "cannot create the folder {}: {}", path_.string(), error.message());
  for (const fs::path& folder : {path_, path_ / "checkpoints"})
    for (const auto& entry : fs::directory_iterator(folder))
      if (entry.path().filename().string().rfind(kHidden, 0) == 0) fs::remove_all(entry.path(), error);
}

fs::path RunFolder::checkpoint(int64_t step) const {
  return path_ / "checkpoints" / fmt::format("step-{:08}", step);
}

std::vector<int64_t> RunFolder::steps() const {
  std::vector<int64_t> out;
  for (const auto& entry : fs::directory_iterator(path_ / "checkpoints")) {
    const std::string name = entry.path().filename().string();
    if (name.rfind("step-", 0) != 0 || name.size() < 6 || name.size() > 20) continue;
    if (!std::all_of(name.begin() + 5, name.end(), [](char c) { return c >= '0' && c <= '9'; })) continue;
    if (fs::exists(entry.path() / "training" / "state.json")) out.push_back(std::stoll(name.substr(5)));
  }
  std::sort(out.begin(), out.end());
  return out;
}

void RunFolder::save(int64_t step, const std::function<void(const fs::path&)>& write) {
  const fs::path target = checkpoint(step);
  const fs::path temporary = target.parent_path() / fmt::format("{}new-{}-{}", kHidden, ::getpid(), step);
  std::error_code ignored;
  fs::remove_all(temporary, ignored);
  fs::create_directory(temporary);
  try {
    write(temporary);
    for (const auto& entry : fs::recursive_directory_iterator(temporary))
      if (entry.is_directory()) sync_folder(entry.path());
    sync_folder(temporary);
    if (fs::exists(target)) remove_folder(target);
    put_at(temporary, target);
  } catch (...) {
    fs::remove_all(temporary, ignored);
    throw;
  }
  sync_folder(target.parent_path());
  link("last", step);
}

void RunFolder::mark_best(int64_t step) {
  link("best", step);
}

void RunFolder::link(const std::string& name, int64_t step) {
  const fs::path temporary = path_ / fmt::format("{}link-{}", kHidden, name);
  std::error_code ignored;
  fs::remove(temporary, ignored);
  fs::create_symlink(fs::path("checkpoints") / checkpoint(step).filename(), temporary);
  put_at(temporary, path_ / name);
  sync_folder(path_);
}

void RunFolder::prune(int64_t keep) {
  std::error_code none;
  const fs::path best = fs::read_symlink(path_ / "best", none).filename();
  const auto all = steps();
  for (size_t i = 0; i + static_cast<size_t>(keep) < all.size(); ++i)
    if (checkpoint(all[i]).filename() != best) remove_folder(checkpoint(all[i]));
}

void RunFolder::clear() {
  std::error_code ignored;
  for (const char* name : {"last", "best"}) fs::remove(path_ / name, ignored);
  for (int64_t step : steps()) remove_folder(checkpoint(step));
  for (const char* name : {"log.jsonl", "report.html", "tensorboard"}) fs::remove_all(path_ / name, ignored);
}

}  // namespace moiety
