#pragma once
#include <string>

#include "moiety/base/error.h"

namespace moiety {

/// The sentence of the Error that `f` throws, empty when it throws none.
template <class F>
std::string message_of(const F& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

}  // namespace moiety
