// moiety-conform PATH...: runs case files, one line a case. Exit codes: 0 all passed, 1 not all passed, 2 wrong use.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <iostream>

#include "conform.h"
#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/io/safetensors.h"

namespace moiety::conform {

std::map<std::string, Op>& ops() {
  static std::map<std::string, Op> all;
  return all;
}

torch::Tensor Case::in(const std::string& name) const {
  auto found = inputs.find(name);
  check(found != inputs.end(), "the case has no input in.{}", name);
  return found->second.clone();
}

namespace {
namespace fs = std::filesystem;

torch::Dtype torch_type(const TensorInfo& tensor) {
  switch (tensor.format) {
    case Format::F32:
      return torch::kFloat32;
    case Format::F64:
      return torch::kFloat64;
    case Format::I64:
      return torch::kInt64;
    case Format::I32:
      return torch::kInt32;
    case Format::U8:
      return torch::kUInt8;
    case Format::I8:
      return torch::kInt8;
    case Format::BOOL:
      return torch::kBool;
    default:
      fail("tensor {} has type {}; a case holds F32, F64, I64, I32, U8, I8 or BOOL", shown(tensor.name),
           info(tensor.format).name);
  }
}

torch::Tensor load(const TensorView& view) {
  torch::Tensor tensor = torch::empty(view.shape, torch_type(view));
  check(static_cast<size_t>(tensor.nbytes()) == view.data.size(), "tensor {} has {} bytes, its shape needs {}",
        shown(view.name), view.data.size(), tensor.nbytes());
  std::copy(view.data.begin(), view.data.end(), static_cast<std::byte*>(tensor.data_ptr()));
  return view.format == Format::BOOL ? tensor.view(torch::kUInt8).ne(0) : tensor;
}

double tolerance(const std::map<std::string, std::string>& metadata, const std::string& key) {
  auto found = metadata.find(key);
  check(found != metadata.end(), "the metadata has no `{}`", key);
  char* end = nullptr;
  double value = std::strtod(found->second.c_str(), &end);
  check(!found->second.empty() && *end == '\0' && std::isfinite(value) && value >= 0,
        "`{}` is `{}`, not a number of at least 0", key, shown(found->second));
  return value;
}

std::string shape_text(const torch::Tensor& tensor) {
  return fmt::format("[{}]", fmt::join(tensor.sizes().begin(), tensor.sizes().end(), ", "));
}

struct Difference {
  double over = 0;  ///< error over what is allowed: above 1 fails
  double absolute = 0, relative = 0;
};

/// The worst element of `got` against `want`, both of one shape.
Difference compare(const torch::Tensor& got, const torch::Tensor& want, double rtol, double atol) {
  if (want.numel() == 0) return {};
  bool exact = !want.is_floating_point();
  if (exact) {
    check(!got.is_floating_point(), "has type {}, {} is right", toString(got.scalar_type()),
          toString(want.scalar_type()));
    rtol = atol = 0;
    if (torch::equal(got.to(torch::kInt64), want.to(torch::kInt64))) return {};
  }
  torch::Tensor a = got.to(torch::kFloat64).reshape(-1).contiguous();
  torch::Tensor b = want.to(torch::kFloat64).reshape(-1).contiguous();
  const double* x = a.const_data_ptr<double>();
  const double* y = b.const_data_ptr<double>();
  Difference worst;
  for (int64_t i = 0; i < a.numel(); ++i) {
    if (x[i] == y[i] || (std::isnan(x[i]) && std::isnan(y[i]))) continue;
    double absolute = std::abs(x[i] - y[i]);
    double allowed = atol + rtol * std::abs(y[i]);
    bool finite = std::isfinite(x[i]) && std::isfinite(y[i]);
    double over = !finite || allowed == 0 ? INFINITY : absolute / allowed;
    // Where nothing is allowed every difference is infinitely over: the largest of them is the worst.
    if (over > worst.over || (over == worst.over && absolute > worst.absolute))
      worst = {over, absolute, absolute / std::abs(y[i])};
  }
  // Integers beyond 2^53 may differ and yet be equal as doubles.
  if (exact && worst.over == 0) worst = {INFINITY, 1, 0};
  return worst;
}

std::string one_line(std::string text) {
  for (char& c : text) {
    if (c == '\n' || c == '\r') c = ' ';
  }
  return text;
}

struct Verdict {
  std::string name = "?/?";  ///< system/op
  std::string result;        ///< "ok", "no such op", or "FAIL ..."
};

std::string check_outputs(const SafetensorsFile& file, const Outputs& outputs, double rtol, double atol) {
  Difference worst;
  std::string worst_name;
  bool any = false;
  for (const TensorInfo& tensor : file.tensors()) {
    if (tensor.name.rfind("out.", 0) != 0) continue;
    any = true;
    std::string name = tensor.name.substr(4);
    auto found = outputs.find(name);
    if (found == outputs.end() || !found->second.defined())
      return fmt::format("FAIL {}: the op gives no such output", shown(name));
    torch::Tensor want = load(file.get(tensor.name)), got = found->second.detach().cpu();
    if (got.sizes() != want.sizes())
      return fmt::format("FAIL {}: shape {}, {} is right", shown(name), shape_text(got), shape_text(want));
    Difference difference;
    try {
      difference = compare(got, want, rtol, atol);
    } catch (const Error& error) {
      return fmt::format("FAIL {}: {}", shown(name), error.what());
    }
    if (difference.over > worst.over) {
      worst = difference;
      worst_name = name;
    }
  }
  if (!any) return "FAIL the case has no out.* tensor";
  if (worst.over <= 1) return "ok";
  return fmt::format("FAIL {}, abs {:.3g}, rel {:.3g}", shown(worst_name), worst.absolute, worst.relative);
}

Verdict run_case(const fs::path& path) {
  Verdict verdict;
  try {
    auto file = SafetensorsFile::open(path);
    const auto& metadata = file->metadata();
    auto text = [&](const std::string& key) {
      auto found = metadata.find(key);
      check(found != metadata.end(), "the metadata has no `{}`", key);
      return found->second;
    };
    std::string system = text("system"), op = text("op");
    verdict.name = shown(system) + "/" + shown(op);
    auto found = ops().find(system + "/" + op);
    if (found == ops().end()) {
      verdict.result = "no such op";
      return verdict;
    }
    Case given;
    given.config = nlohmann::json::parse(text("config"));
    check(given.config.is_object(), "`config` is not a JSON object");
    double rtol = tolerance(metadata, "rtol"), atol = tolerance(metadata, "atol");
    for (const TensorInfo& tensor : file->tensors()) {
      if (tensor.name.rfind("in.", 0) == 0) given.inputs[tensor.name.substr(3)] = load(file->get(tensor.name));
    }
    verdict.result = check_outputs(*file, found->second(given), rtol, atol);
  } catch (const c10::Error& error) {
    verdict.result = "FAIL " + one_line(error.what_without_backtrace());
  } catch (const std::exception& error) {
    verdict.result = "FAIL " + one_line(error.what());
  }
  return verdict;
}

/// Case files under `path`, sorted. Throws Error when there is nothing of that name.
std::vector<fs::path> find_cases(const fs::path& path) {
  std::vector<fs::path> files;
  check(fs::exists(path), "there is no file or folder {}", path.string());
  if (!fs::is_directory(path)) return {path};
  for (const auto& entry : fs::recursive_directory_iterator(path)) {
    if (!entry.is_directory() && entry.path().extension() == ".safetensors") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

int run(const std::vector<std::string>& words) {
  const char* usage =
      "usage: moiety-conform PATH...   case files, or folders that are searched for *.safetensors\n"
      "       moiety-conform --list    the ops that are implemented\n";
  if (words == std::vector<std::string>{"--help"} || words == std::vector<std::string>{"-h"}) {
    std::cout << usage;
    return 0;
  }
  if (words == std::vector<std::string>{"--list"}) {
    for (const auto& [name, op] : ops()) std::cout << name << "\n";
    return 0;
  }
  bool flags = std::any_of(words.begin(), words.end(), [](const std::string& word) { return word.rfind("-", 0) == 0; });
  if (words.empty() || flags) {
    std::cerr << usage;
    return 2;
  }
  std::vector<fs::path> files;
  for (const std::string& word : words) {
    auto found = find_cases(word);
    if (found.empty()) std::cerr << "moiety-conform: " << word << " holds no *.safetensors file\n";
    files.insert(files.end(), found.begin(), found.end());
  }
  int passed = 0, failed = 0;
  for (const fs::path& file : files) {
    Verdict verdict = run_case(file);
    (verdict.result == "ok" ? passed : failed)++;
    std::cout << verdict.name << " " << file.string() << " " << verdict.result << std::endl;
  }
  std::cout << passed << " passed, " << failed << " failed" << std::endl;
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace
}  // namespace moiety::conform

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_DFL);
  try {
    return moiety::conform::run({argv + 1, argv + argc});
  } catch (const std::exception& error) {
    std::cerr << "moiety-conform: " << error.what() << "\n";
    return 2;
  }
}
