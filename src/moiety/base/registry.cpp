#include "moiety/base/registry.h"

#include <algorithm>
#include <tuple>

#include "moiety/base/text.h"

namespace moiety {
namespace {

struct All {
  std::vector<Method> methods;
  bool checked = false;
};

All& all() {
  static All registered;
  return registered;
}

bool well_formed(const std::string& slug) {
  return !slug.empty() && slug.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-") == std::string::npos;
}

}  // namespace

RegisterMethod::RegisterMethod(Method method) {
  all().methods.push_back(std::move(method));
  all().checked = false;
}

const std::vector<Method>& methods() {
  auto& [list, checked] = all();
  if (checked) return list;
  auto key = [](const Method& m) { return std::tie(m.slug, m.kind); };
  std::sort(list.begin(), list.end(), [&](const Method& a, const Method& b) { return key(a) < key(b); });
  for (size_t i = 0; i < list.size(); ++i) {
    check(well_formed(list[i].slug), "method `{}`: a slug has lower-case letters, digits and hyphens only",
          list[i].slug);
    check(i == 0 || key(list[i - 1]) != key(list[i]), "method {} is registered twice as a {}", list[i].slug,
          list[i].kind);
  }
  checked = true;
  return list;
}

std::vector<const Method*> find_methods(const std::string& slug) {
  std::vector<const Method*> found;
  for (const Method& method : methods()) {
    if (method.slug == slug) found.push_back(&method);
  }
  return found;
}

const Method& get_method(const std::string& kind, const std::string& slug) {
  std::vector<std::string> slugs, other_kinds;
  for (const Method& method : methods()) {
    if (method.kind == kind && method.slug == slug) return method;
    if (method.kind == kind) slugs.push_back(method.slug);
    if (method.slug == slug) other_kinds.push_back(method.kind);
  }
  if (!other_kinds.empty()) fail("{} is a {}, not a {}", slug, list_of(other_kinds, "and"), kind);
  fail("there is no {} `{}`{}", kind, shown(slug), did_you_mean(slug, slugs));
}

}  // namespace moiety
