#include "moiety/base/html.h"

#include "moiety/base/error.h"

namespace moiety {

std::string html_with_data(std::string_view page, const nlohmann::json& data) {
  constexpr std::string_view kMark = "{{data}}";
  const size_t at = page.find(kMark);
  check(at != std::string_view::npos, "the page has no place for its data");
  const std::string json = data.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  std::string out(page.substr(0, at));
  out.reserve(page.size() + json.size());
  for (const char c : json) {
    // `</script>` and `<!--` mean something to HTML even inside a string; `<` as an escape means the same to JSON.
    if (c == '<')
      out += "\\u003c";
    else
      out += c;
  }
  out += page.substr(at + kMark.size());
  return out;
}

}  // namespace moiety
