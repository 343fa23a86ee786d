#include "moiety/models/model_parts.h"

#include <algorithm>

#include "moiety/base/error.h"
#include "moiety/base/registry.h"
#include "moiety/base/text.h"
#include "moiety/io/regex.h"
#include "moiety/nn/beside.h"

namespace moiety {

using std::string;

const PartEntry* ModelParts::at(const string& site, int64_t layer) const {
  for (const PartEntry& e : entries)
    if (e.site == site && std::binary_search(e.layers.begin(), e.layers.end(), layer)) return &e;
  return nullptr;
}

Linear NamedWeights::linear(const string& name, int64_t in, int64_t out, const Init& init, const Init& bias) {
  Linear made = PartWeights::linear(name, in, out, init, bias);
  source_.store(prefix_ + name + ".weight", [made] { return stored_matrix(made); });
  if (bias) source_.store(prefix_ + name + ".bias", [made] { return stored_bias(made); });
  return made;
}

namespace {

// Whether one of the targets means a matrix: by its name, or, for targets that are no names, a regular expression that
// matches the whole path.
bool is_pattern(const string& target) {
  return target.find_first_of("*+?()[]|^$\\") != string::npos;
}

bool targeted(const std::vector<string>& targets, const string& name, const string& path) {
  return std::any_of(targets.begin(), targets.end(), [&](const string& t) {
    if (t == name || (t == "all" && name.find('.') == string::npos)) return true;
    if (!is_pattern(t)) return false;
    // Adapters of others bring patterns: the steps of a match are bounded.
    const Regex whole("\\A(?:" + t + ")\\z", "target '" + shown(t) + "'");
    size_t begin = 0, end = 0;
    return Regex::Matches(whole, path).next(begin, end);
  });
}

}  // namespace

void attach_parts(WeightsSource& w, const LayerName& at, ModelParts& parts, const std::vector<SiteMatrix>& matrices,
                  const std::vector<SiteStack>& stacks) {
  const string& layer = at.tensors;
  const int64_t index = at.index;
  for (PartEntry& entry : parts.entries) {
    if (entry.site != "linear" || !std::binary_search(entry.layers.begin(), entry.layers.end(), index)) continue;
    const auto path = [&](const string& half, const string& name) { return at.path + half + "." + name; };
    std::vector<string> names;
    std::vector<SiteMatrix> chosen;
    std::vector<SiteStack> chosen_stacks;
    for (const SiteMatrix& m : matrices) {
      names.push_back(m.name);
      if (!m.elsewhere && targeted(entry.targets, m.name, path(m.half, m.name))) chosen.push_back(m);
    }
    for (const SiteStack& s : stacks) {
      names.push_back(s.name);
      if (targeted(entry.targets, s.name, path("mlp", s.name))) chosen_stacks.push_back(s);
    }
    for (const string& target : entry.targets) {
      check(target == "all" || is_pattern(target) || std::find(names.begin(), names.end(), target) != names.end(),
            "part {}: layer {} has no matrix '{}' that a part could stand beside; it has {}", entry.slug, index,
            shown(target), names.empty() ? "none" : list_of(names, "and"));
    }
    // A pattern may mean some layers only.
    if (chosen.empty() && chosen_stacks.empty()) continue;
    entry.placed = true;
    const auto& maker = factory<MakeBeside>(get_method("part", entry.slug));
    const string last = entry.name.empty() ? "" : entry.name + ".";
    const auto guarded = [&](const string& place, const auto& make) {
      try {
        check(parts.beside.insert(layer + place + " " + entry.name).second,
              "something stands beside the matrix already; parts with a `name` each can share it");
        make();
      } catch (const Error& e) {
        fail("part {} at {} of layer {}: {}", entry.slug, place, index, e.what());
      }
    };
    NamedWeights model(w, "", true);
    for (size_t begin = 0; begin < chosen.size();) {
      size_t end = begin + 1;
      while (maker.per_input && end < chosen.size() && chosen[end].input == chosen[begin].input) ++end;
      std::vector<SiteMatrix> group(chosen.begin() + static_cast<int64_t>(begin),
                                    chosen.begin() + static_cast<int64_t>(end));
      string place;
      for (const SiteMatrix& m : group) place += (place.empty() ? "" : "+") + m.name;
      NamedWeights own(w, layer + "adapters." + last + place + ".", true), targets(w, layer + "adapters." + last, true);
      LinearSite site{.layer = index,
                      .layers = parts.layers,
                      .targets = {},
                      .own = own,
                      .all = targets,
                      .model = model,
                      .shared = parts.shared};
      for (SiteMatrix& m : group)
        site.targets.push_back({m.name, path(m.half, m.name), m.linear->in(), m.linear->out(), m.linear.get()});
      for (size_t i = 1; i < group.size(); ++i) guarded(group[i].name, [] {});
      guarded(group[0].name, [&] {
        const auto beside = maker.make(site, entry.settings);
        for (SiteMatrix& m : group) m.linear->attach(beside);
      });
      begin = end;
    }
    for (const SiteStack& s : chosen_stacks) {
      guarded(s.name, [&] {
        check(maker.make_stack != nullptr, "it cannot stand beside the matrices of experts");
        NamedWeights own(w, layer + "adapters." + last + s.name + ".", true);
        StackSite site{.layer = index,
                       .layers = parts.layers,
                       .name = s.name,
                       .path = path("mlp", s.name),
                       .experts = s.stacks[0]->count(),
                       .in = s.stacks[0]->in(),
                       .stacks = s.stacks,
                       .own = own,
                       .shared = parts.shared};
        const auto made = maker.make_stack(site, entry.settings);
        for (size_t i = 0; i < made.size(); ++i) s.stacks[i]->attach(made[i]);
      });
    }
  }
}

void check_placed(const ModelParts& parts) {
  for (const PartEntry& entry : parts.entries)
    check(entry.site != "linear" || entry.placed,
          "part {}: no layer has a matrix that its targets ({}) name and a part could stand beside", entry.slug,
          list_of(entry.targets, "and"));
}

}  // namespace moiety
