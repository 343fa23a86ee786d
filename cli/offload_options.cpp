#include "offload_options.h"

#include <algorithm>

#include "moiety/base/error.h"
#include "moiety/base/text.h"

namespace moiety::cli {
namespace {

using nlohmann::json;

std::string dashes(std::string name) {
  std::replace(name.begin(), name.end(), '_', '-');
  return name;
}

json value_of(const FieldInfo& field, const std::string& text) {
  if (field.type == "text") return text;
  const json parsed = json::parse(text, nullptr, false);
  return parsed.is_discarded() ? json(text) : parsed;
}

}  // namespace

void OffloadArguments::add(CLI::App& app) {
  app.add_option("--memory", memory,
                 "Bytes that the whole process may have in memory, weights, caches and buffers: 512MiB, 2GiB, or auto; "
                 "experts that do not fit stay on disk");
  app.add_option("--offload", policy,
                 "Which experts are in memory and which on disk: none, or " + list_of(offload_policies()) +
                     " (with --memory or --capacity-high alone: lru)");
  auto* high = app.add_option("--capacity-high", capacity_high,
                              "Experts in memory in full precision, instead of what --memory leaves room for")
                   ->check(CLI::PositiveNumber);
  app.add_option("--capacity-low", capacity_low, "With it: experts in memory in low precision")
      ->check(CLI::NonNegativeNumber)
      ->needs(high);
  app.add_option(
         "--io", io,
         "Reads beside the computation, or each where it is asked for: runs with the same numbers of experts in "
         "memory then repeat exactly")
      ->check(CLI::IsMember({"async", "sync"}))
      ->capture_default_str();
  app.add_option("--read-rate", read_rate, "Read experts no faster than this, such as 200MB/s");
  app.add_flag("--skip-renormalize", skip_renormalize,
               "A token of whose experts some were left out is divided by the share of its gates that is left");
  app.add_flag("--no-direct", no_direct, "Read through the page cache, and drop the pages behind");
  app.add_flag("--no-uring", no_uring, "Read with pread");
  std::map<std::string, std::pair<FieldInfo, std::vector<std::string>>> fields;
  for (const auto& slug : offload_policies()) {
    const Method& method = get_method("policy", slug);
    if (!method.config) continue;
    for (const FieldInfo& f : method.config()) {
      auto& entry = fields[f.name];
      if (entry.second.empty()) entry.first = f;
      entry.second.push_back(slug);
    }
  }
  for (const auto& [name, entry] : fields) {
    const auto& [field, slugs] = entry;
    app.add_option_function<std::string>(
           "--" + dashes(name), [this, name = name](const std::string& text) { settings[name] = text; },
           fmt::format("{}: {}", list_of(slugs, "and"), field.help))
        ->group("OFFLOADING");
  }
}

bool OffloadArguments::on() const {
  return policy.empty() ? !memory.empty() || capacity_high > 0 : policy != "none";
}

OffloadOptions OffloadArguments::options() const {
  OffloadOptions out;
  out.policy = policy.empty() ? "lru" : policy;
  const auto known = offload_policies();
  check(std::find(known.begin(), known.end(), out.policy) != known.end(), "--offload is `{}` but must be none, {}{}",
        shown(out.policy), list_of(known), did_you_mean(out.policy, known));
  const Method& method = get_method("policy", out.policy);
  const auto fields = method.config ? method.config() : std::vector<FieldInfo>();
  for (const auto& [name, text] : settings) {
    const auto field = std::find_if(fields.begin(), fields.end(), [&](const FieldInfo& f) { return f.name == name; });
    check(field != fields.end(), "--{} is no setting of {}", dashes(name), out.policy);
    out.settings[name] = value_of(*field, text);
  }
  if (!memory.empty()) out.memory = parse_memory(memory);
  out.capacity_high = capacity_high;
  out.capacity_low = capacity_low;
  out.sync = io == "sync";
  out.read.direct = !no_direct;
  out.read.uring = !no_uring;
  if (!read_rate.empty()) out.read.rate = parse_rate(read_rate);
  out.skip_renormalize = skip_renormalize;
  return out;
}

}  // namespace moiety::cli
