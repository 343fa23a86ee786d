#include "moiety/nn/part.h"

#include <torch/torch.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <set>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/base/text.h"

namespace moiety {

Init normal_init(double std) {
  return [std](torch::Tensor t) { t.normal_(0.0, std); };
}

Init uniform_init() {
  return [](torch::Tensor t) {
    const double bound = 1.0 / std::sqrt(static_cast<double>(t.size(-1)));
    t.uniform_(-bound, bound);
  };
}

Init constant_init(double value) {
  return [value](torch::Tensor t) { t.fill_(value); };
}

Linear PartWeights::linear(const std::string& name, int64_t in, int64_t out, const Init& init, const Init& bias) {
  auto weight = get(name + ".weight", {out, in}, init);
  return bias ? Linear(weight, get(name + ".bias", {out}, bias)) : Linear(weight);
}

Linear PartWeights::linear(const std::string& name, int64_t in, int64_t out, bool bias, const Init& init) {
  return linear(name, in, out, init, bias ? constant_init(0.0) : nullptr);
}

LinearStack PartWeights::stack(const std::string& name, int64_t count, int64_t in, int64_t out, bool bias,
                               const Init& init) {
  auto weight = get(name, {count, out, in}, init);
  return bias ? LinearStack(weight, get(name + "_bias", {count, out}, constant_init(0.0))) : LinearStack(weight);
}

namespace {

std::vector<int64_t> layers_of(const nlohmann::json& value, int64_t count, const std::string& where) {
  std::set<int64_t> chosen;
  const auto add = [&](int64_t from, int64_t to) {
    check(from >= 0 && from <= to && to < count, "{}: layers {} to {} do not exist: the model has layers 0 to {}",
          where, from, to, count - 1);
    for (int64_t l = from; l <= to; ++l) chosen.insert(l);
  };
  if (value.is_number_integer()) {
    add(value.get<int64_t>(), value.get<int64_t>());
  } else if (value.is_array()) {
    for (const auto& one : value) {
      check(one.is_number_integer(), "{}: `layers` holds {} where a number was expected", where, shown(one.dump()));
      add(one.get<int64_t>(), one.get<int64_t>());
    }
  } else {
    check(value.is_string(), "{}: `layers` is \"all\", a number, a list of numbers, or ranges as \"0-3,5\"", where);
    const auto text = value.get<std::string>();
    if (text == "all") {
      add(0, count - 1);
    } else {
      size_t at = 0;
      while (at <= text.size()) {
        const size_t end = std::min(text.find(',', at), text.size());
        const std::string piece = text.substr(at, end - at);
        const size_t dash = piece.find('-');
        const auto number = [&](const std::string& digits) {
          int64_t n = -1;
          const auto [rest, error] = std::from_chars(digits.data(), digits.data() + digits.size(), n);
          check(error == std::errc() && rest == digits.data() + digits.size() && !digits.empty(),
                "{}: `layers` is `{}`; \"all\", a number, or ranges as \"0-3,5\" are right", where, shown(text));
          return n;
        };
        const int64_t first = number(piece.substr(0, dash));
        add(first, dash == std::string::npos ? first : number(piece.substr(dash + 1)));
        at = end + 1;
      }
    }
  }
  check(!chosen.empty(), "{}: no layer is named", where);
  return {chosen.begin(), chosen.end()};
}

std::vector<std::string> targets_of(const nlohmann::json& value, const std::string& where) {
  std::vector<std::string> out;
  for (const auto& one : value.is_array() ? value : nlohmann::json::array({value})) {
    check(one.is_string(), "{}: `target` is the name of a matrix, or a list of names, as [q_proj, v_proj]", where);
    out.push_back(one.get<std::string>());
  }
  check(!out.empty(), "{}: `target` names no matrix", where);
  return out;
}

}  // namespace

int64_t at_layer(const nlohmann::json& value, const char* name, int64_t least, const LinearSite& site) {
  const nlohmann::json* one = &value;
  if (value.is_array()) {
    check(static_cast<int64_t>(value.size()) == site.layers, "`{}` has {} entries, and the model has {} layers", name,
          value.size(), site.layers);
    one = &value[static_cast<size_t>(site.layer)];
  }
  check(one->is_number_integer() && one->get<int64_t>() >= least,
        "`{}` is {} where a whole number from {} was expected, or a list with one for every layer", name, one->dump(),
        least);
  return one->get<int64_t>();
}

bool is_adapter_name(const std::string& name) {
  return !name.empty() && name.size() <= 64 && std::all_of(name.begin(), name.end(), [](unsigned char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '_';
  });
}

std::vector<PartEntry> parse_parts(const nlohmann::json& config, int64_t layers) {
  std::vector<PartEntry> out;
  const auto own = config.find("moiety");
  if (own == config.end() || !own->is_object()) return out;
  const auto list = own->find("parts");
  if (list == own->end() || list->is_null()) return out;
  check(list->is_array(), "config.json: `moiety.parts` must be a list");
  std::set<std::pair<std::string, int64_t>> taken;
  for (size_t i = 0; i < list->size(); ++i) {
    const auto& item = (*list)[i];
    const std::string where = fmt::format("parts[{}]", i);
    check(item.is_object() && item.contains("slug") && item["slug"].is_string(), "{} must be a section with a `slug`",
          where);
    PartEntry entry;
    entry.slug = item["slug"].get<std::string>();
    const Method& method = get_method("part", entry.slug);
    check(!item.contains("site") || item["site"].is_string(), "{}: `site` is a name", where);
    entry.site = item.value("site", method.sites.size() == 1 ? method.sites.front() : std::string("ffn"));
    check(std::find(method.sites.begin(), method.sites.end(), entry.site) != method.sites.end(),
          "{}: {} cannot stand at the site `{}`; it can at {}", where, entry.slug, shown(entry.site),
          list_of(method.sites, "or"));
    entry.layers = layers_of(item.value("layers", nlohmann::json("all")), layers, where);
    if (entry.site == "linear" && item.contains("name")) {
      check(item["name"].is_string() && is_adapter_name(item["name"].get<std::string>()),
            "{}: `name` is {}; letters, digits, - and _ are right", where, shown(item["name"].dump()));
      entry.name = item["name"].get<std::string>();
    }
    if (entry.site == "linear")
      entry.targets = targets_of(item.value("target", nlohmann::json("all")), where);
    else
      check(!item.contains("target"), "{}: `target` names matrices; {} takes the site `{}`", where, entry.slug,
            entry.site);
    for (const auto& target : entry.targets)
      for (const int64_t l : entry.layers)
        check(taken.emplace("linear " + target + " " + entry.name, l).second,
              "{}: `{}` of layer {} is taken by another part already; parts with a `name` each can share it", where,
              shown(target), l);
    for (const int64_t l : entry.layers)
      check(entry.site == "linear" || taken.emplace(entry.site, l).second,
            "{}: the {} of layer {} is taken by another part already", where, entry.site, l);
    entry.settings = nlohmann::json::object();
    for (const auto& [key, value] : item.items())
      if (key != "slug" && key != "site" && key != "layers" && key != "target" &&
          !(entry.site == "linear" && key == "name"))
        entry.settings[key] = value;
    out.push_back(std::move(entry));
  }
  return out;
}

}  // namespace moiety
