#pragma once
// Every method that is built in, by slug: its kind, paper, settings, and what makes it. Methods register from static
// objects.
#include <any>
#include <functional>
#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/base/error.h"

namespace moiety {

struct Paper {
  std::string title;
  std::string authors;  ///< "Ba, Kiros, Hinton"
  int year = 0;
  std::string arxiv;  ///< "1607.06450", "" when it is not there
};

struct Method {
  std::string slug;     ///< the one name: lower case, digits, hyphens
  std::string kind;     ///< part, transform, rule, policy, task, study, adapter, family
  std::string title;    ///< the name as the authors write it
  std::string summary;  ///< one line
  Paper paper;
  std::vector<std::string>
      sites;  ///< where it may stand: norm, attention, ffn, linear, block; empty when that says nothing
  std::function<std::vector<FieldInfo>()> config;  ///< e.g. describe<Config>; empty: no settings
  std::any make;  ///< a std::function of the type that the kind asks for; see factory()
};

/// Registered methods, sorted by slug and kind. Throws Error when two have one slug and kind, or a slug is ill-formed.
const std::vector<Method>& methods();
/// All kinds under one slug (a part and its study, say); empty when there is none.
std::vector<const Method*> find_methods(const std::string& slug);
/// Throws Error naming the nearest slug of that kind.
const Method& get_method(const std::string& kind, const std::string& slug);

struct RegisterMethod {
  explicit RegisterMethod(Method method);
};

/// What makes the method, as the function type of its kind.
template <class Function>
const Function& factory(const Method& method) {
  const auto* make = std::any_cast<Function>(&method.make);
  check(make != nullptr, "method {} is a {} that cannot be made here", method.slug, method.kind);
  return *make;
}

}  // namespace moiety
