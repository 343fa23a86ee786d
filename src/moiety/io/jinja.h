#pragma once
// Inside of ChatTemplate: values, syntax tree and interpreter of the Jinja2 language as its immutable sandbox runs it.
// Values behave as Python's (str of floats, floor division, truth, slices, comparison, undefined), strings are UTF-8
// and are indexed by code point. Integers are 64 bits: what Python would compute beyond that is an Error.
#include <cstdint>
#include <deque>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "moiety/base/error.h"

namespace moiety::jinja {

enum class Kind : uint8_t {
  undefined,
  none,
  boolean,
  integer,
  real,
  text,
  list,
  dict,
  space,
  macro,
  loop,
  function,
  cycler,
  joiner
};
enum class Shape : uint8_t { list, tuple, iterator, keys, values, items, range };

struct Text;
struct List;
struct Dict;
struct Space;
struct Macro;
struct Loop;
struct Function;
struct Missing;
class Run;

/// Python-like value. Containers are shared and never change, as in the immutable sandbox; namespaces and macros live
/// as long as the rendering.
class Value {
 public:
  Value() : kind_(Kind::undefined) {}
  Value(bool value) : kind_(Kind::boolean) { number_.boolean = value; }
  Value(int64_t value) : kind_(Kind::integer) { number_.integer = value; }
  Value(double value) : kind_(Kind::real) { number_.real = value; }
  Value(std::string value, bool markup = false);
  Value(const char* value) : Value(std::string(value)) {}
  Value(std::shared_ptr<const List> list);
  Value(std::shared_ptr<const Dict> dict);
  Value(std::shared_ptr<const Function> function);
  Value(std::shared_ptr<Loop> loop);
  static Value none() {
    Value v;
    v.kind_ = Kind::none;
    return v;
  }
  static Value list(std::vector<Value> items, Shape shape = Shape::list);
  static Value undefined(std::string message, bool unsafe = false);
  static Value space(Space* space);
  static Value macro(Macro* macro);
  static Value other(Kind kind, std::shared_ptr<void> object);

  Kind kind() const { return kind_; }
  bool is(Kind kind) const { return kind_ == kind; }
  bool is_undefined() const { return kind_ == Kind::undefined; }
  bool is_none() const { return kind_ == Kind::none; }
  bool is_text() const { return kind_ == Kind::text; }
  bool is_number() const { return kind_ == Kind::boolean || kind_ == Kind::integer || kind_ == Kind::real; }
  bool is_integral() const { return kind_ == Kind::boolean || kind_ == Kind::integer; }

  bool boolean() const { return number_.boolean; }
  int64_t integer() const { return kind_ == Kind::boolean ? number_.boolean : number_.integer; }
  double real() const { return kind_ == Kind::real ? number_.real : static_cast<double>(integer()); }
  const std::string& text() const;
  bool markup() const;
  const List& list() const { return *static_cast<const List*>(object_.get()); }
  const Dict& dict() const { return *static_cast<const Dict*>(object_.get()); }
  Space& space() const { return *number_.space; }
  Macro& macro() const { return *number_.macro; }
  Loop& loop() const { return *const_cast<Loop*>(static_cast<const Loop*>(object_.get())); }
  const Function& function() const { return *static_cast<const Function*>(object_.get()); }
  template <class T>
  T& object() const {
    return *const_cast<T*>(static_cast<const T*>(object_.get()));
  }
  const void* identity() const { return object_.get(); }

  bool truth() const;
  /// Message of the error that using this undefined value gives.
  std::string missing() const;

 private:
  Kind kind_;
  union {
    bool boolean;
    int64_t integer;
    double real;
    Space* space;
    Macro* macro;
  } number_ = {.integer = 0};
  std::shared_ptr<const void> object_;
};

/// Levels of containers below a value: bounded on construction, so that no walk or destructor recurses deeply.
int nesting(const Value& value);

struct Text {
  std::string text;
  bool markup = false;  ///< Markup of `safe` and `escape`: what is added to it is HTML-escaped
};
struct List {
  Shape shape = Shape::list;
  std::vector<Value> items;
  int nesting = 1;
  bool group = false;                     ///< a pair that groupby made: has .grouper and .list
  mutable size_t used = 0;                ///< of iterators: what was consumed
  int64_t start = 0, stop = 0, step = 1;  ///< of ranges
};
struct ValueHash {
  size_t operator()(const Value& value) const;
};
struct ValueEqual {
  bool operator()(const Value& a, const Value& b) const;
};
struct Dict {
  std::vector<std::pair<Value, Value>> items;  ///< insertion order
  int nesting = 1;
  const Value* find(const Value& key) const;
  const Value* find_text(std::string_view key) const;
  void set(Value key, Value value);

 private:
  std::unordered_map<Value, size_t, ValueHash, ValueEqual> index_;  ///< from 16 items on
};
struct Missing {
  std::string message;
  bool unsafe = false;
};
struct Function {
  std::string name;
  Value self;
  bool global = false;
};
struct Space {
  Dict attributes;
};
struct Cycler {
  std::vector<Value> items;
  int nesting = 1;
  size_t at = 0;
};
struct Joiner {
  std::string separator;
  bool used = false;
};

struct Arguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> keyword;
};

// --- Syntax tree
// -----------------------------------------------------------------------------------------------------------
struct Expression;
struct Statement;
using ExpressionPtr = std::unique_ptr<Expression>;
using Body = std::vector<std::unique_ptr<Statement>>;

enum class Op : uint8_t {
  constant,
  name,
  attribute,
  item,
  slice,
  call,
  filter,
  test,
  list,
  tuple,
  dict,
  negate,
  plus,
  invert,
  both,
  either,
  add,
  subtract,
  multiply,
  divide,
  floor_divide,
  modulo,
  power,
  concat,
  compare,
  choose,
  field /* ns.attr as a target */
};

struct Expression {
  Op op;
  int line = 0;
  int depth = 1;                     ///< of the tree below, bounded by the parser
  std::string name;                  ///< of names, attributes, filters, tests, fields
  Value value;                       ///< of constants
  std::vector<ExpressionPtr> parts;  ///< operands; entries of slices and of `choose` may be null
  std::vector<std::string> names;    ///< comparison operators, or keyword names of the last parts of a call
  ExpressionPtr star, star_star;     ///< *args, **kwargs
};

enum class Do : uint8_t { data, print, set, set_block, when, loop, with, macro, call, filter, generation, stop, next };

struct Branch {
  ExpressionPtr test;  ///< null: else
  Body body;
};

struct Statement {
  Do what;
  int line = 0;
  std::string text;                        ///< data, or the macro's name
  std::vector<ExpressionPtr> expressions;  ///< printed; values of `with`; defaults of a macro (its last parameters)
  std::vector<ExpressionPtr> targets;      ///< of set, for, with
  std::vector<std::string> parameters;     ///< of macro and call
  ExpressionPtr expression;      ///< value of set, iterable of for, call of call, filter chain of set and filter blocks
  ExpressionPtr test;            ///< of for ... if
  std::vector<Branch> branches;  ///< of if
  Body body, otherwise;
  bool recursive = false, uses_caller = false, uses_varargs = false, uses_kwargs = false;
};

struct Template {
  Body body;
};

/// Throws Error with line and column.
Template parse(const std::string& source);

// --- Running
// ---------------------------------------------------------------------------------------------------------------
struct Scope {
  Scope* parent = nullptr;
  std::vector<std::pair<const std::string*, Value>> names;  ///< few: searched from the end
  bool kept = false;                                        ///< a macro refers to it
};

struct Macro {
  const Statement* definition = nullptr;
  Scope* scope = nullptr;
  std::string name;
};

struct Loop : std::enable_shared_from_this<Loop> {
  std::vector<Value> source;           ///< what is iterated
  std::shared_ptr<const List> shared;  ///< of an iterator: what others may consume, too
  size_t cursor = 0;
  std::deque<Value> ahead;  ///< fetched, not yet visited
  int64_t index0 = -1;
  int64_t depth0 = 0;
  Value current, previous;
  bool changed_called = false, done = false;
  Value changed;
  const Statement* statement = nullptr;
  Scope* scope = nullptr;
};

struct Limits {
  int64_t steps = 10'000'000;
  int64_t bytes = 16 << 20;
  int depth = 200;
};

/// One rendering.
class Run {
 public:
  Run(const Template& source, Limits limits) : template_(source), limits_(limits) {}
  std::string render(const nlohmann::ordered_json& context, std::vector<std::pair<size_t, size_t>>* generation);
  int line() const { return line_; }

  /// Counts work; strings and lists count by size so that memory is bounded, too.
  void step(size_t amount = 1) {
    steps_ += static_cast<int64_t>(amount);
    if (steps_ > limits_.steps) [[unlikely]]
      fail("the template takes more than {} steps: it loops too long", limits_.steps);
  }
  Value text(std::string value, bool markup = false) {
    step(value.size() / 16);
    check(static_cast<int64_t>(value.size()) <= limits_.bytes,
          "the template makes a string of {} bytes: more than {} are refused", value.size(), limits_.bytes);
    return Value(std::move(value), markup);
  }
  Value list(std::vector<Value> items, Shape shape = Shape::list) {
    step(list_cost * items.size());
    return Value::list(std::move(items), shape);
  }
  static constexpr size_t list_cost = 4;  ///< steps for an element: it takes as much memory as that much text
  Space* new_space() { return &spaces_.emplace_back(); }
  int64_t max_bytes() const { return limits_.bytes; }

  Value call(const Value& callee, Arguments arguments);
  Value filter(const std::string& name, const Value& value, Arguments arguments);
  bool test(const std::string& name, const Value& value, Arguments arguments);

  struct Deeper {  ///< one level of recursion
    explicit Deeper(Run& run) : run_(run) { check(++run.frames_ <= 1500, "the template recurses too deeply"); }
    ~Deeper() { --run_.frames_; }
    Run& run_;
  };

 private:
  enum class Flow : uint8_t { normal, stop, next };
  struct Entered;
  struct Capture;
  Flow run(const Body& body, Scope& scope);
  Flow run(const Statement& statement, Scope& scope);
  Flow run_loop(const Statement& statement, Scope& outer, const Value& iterable, int64_t depth);
  void run_call(const Statement& statement, Scope& scope);
  void run_generation(const Statement& statement, Scope& scope);
  void run_set(const Statement& statement, Scope& scope);
  bool fetch(Loop& loop);
  void fetch_all(Loop& loop);
  Value loop_attribute(Loop& loop, const std::string& name);
  Value eval(const Expression& e, Scope& scope);
  Value eval_compare(const Expression& e, Scope& scope);
  Value eval_slice(const Expression& e, Scope& scope);
  Value eval_call(const Expression& e, Scope& scope);
  Value eval_filter(const Expression& e, Scope& scope, const Value* input);
  Value eval_concat(const Expression& e, Scope& scope);
  Value eval_container(const Expression& e, Scope& scope);
  Arguments arguments(const Expression& e, size_t first, Scope& scope);
  Value lookup(const std::string& name, Scope& scope);
  void assign(const Expression& target, Value value, Scope& scope);
  void bind(Scope& scope, const std::string& name, Value value);
  Value call_macro(Macro& macro, Arguments arguments);
  Value call_loop(Loop& loop, Arguments arguments);
  void emit(std::string_view text);
  Macro* new_macro(const Statement& statement, Scope& scope, std::string name);

  friend Value attribute(Run& run, const Value& object, const std::string& name);
  const Template& template_;
  Limits limits_;
  int64_t steps_ = 0;
  int frames_ = 0, calls_ = 0, line_ = 1;
  std::unordered_map<std::string, Value> context_;
  std::string* out_ = nullptr;
  int captures_ = 0;
  std::vector<std::pair<size_t, size_t>>* generation_ = nullptr;
  std::deque<Space> spaces_;
  std::deque<Macro> macros_;
  std::vector<std::unique_ptr<Scope>> free_;  ///< to use again
  std::vector<std::unique_ptr<Scope>> held_;  ///< a macro refers to them
};

/// Makes `run` the rendering of this thread.
struct RunningHere {
  explicit RunningHere(Run* run);
  ~RunningHere();
  Run* before_;
};

// --- Values as Python has them
// ---------------------------------------------------------------------------------------------
std::string type_name(const Value& value);          ///< Python's: "str", "NoneType", ...
std::string to_text(Run& run, const Value& value);  ///< str(value)
std::string to_repr(Run& run, const Value& value);  ///< repr(value)
std::string real_text(double value);                ///< repr of a float
std::string to_json(Run& run, const Value& value, bool ascii, const std::optional<std::string>& indent,
                    const std::string& comma, const std::string& colon, bool sorted);
bool equal(const Value& a, const Value& b);  ///< counts as work of the rendering that runs in this thread
int compare(Run& run, const Value& a, const Value& b,
            const char* op);  ///< < 0, 0, > 0; 2 when unordered (NaN); Error when Python raises
bool contains(Run& run, const Value& container, const Value& item);
std::vector<Value> iterate(Run& run, const Value& value);  ///< consumes iterators
bool iterable(const Value& value);
Value attribute(Run& run, const Value& object, const std::string& name);  ///< object.name
Value item(Run& run, const Value& object, const Value& key);              ///< object[key]
Value slice(Run& run, const Value& object, const Value& start, const Value& stop, const Value& step);
int64_t length(Run& run, const Value& value);
Value arithmetic(Run& run, Op op, const Value& a, const Value& b);
std::string percent_format(Run& run, const std::string& format, const Value& values, bool markup);
std::string brace_format(Run& run, const std::string& format, const Arguments& arguments);
std::string escape_html(std::string_view text);
void check_hashable(const Value& value);
Value from_json(const nlohmann::ordered_json& json, int depth = 0);

/// Calls a bound method or a global function.
Value call_function(Run& run, const Function& function, Arguments arguments);
bool has_method(const Value& object, std::string_view name, bool& unsafe);
bool is_global(const std::string& name);
bool has_filter(const std::string& name);
bool has_test(const std::string& name);

// Code points.
size_t text_length(std::string_view text);
std::string upper(std::string_view text);
std::string lower(std::string_view text);
void append_upper(std::string& out, char32_t c);
void append_title(std::string& out, char32_t c);
void append_lower(std::string& out, const std::vector<char32_t>& text,
                  size_t at);  ///< of text[at]: a final sigma looks around
bool is_space(char32_t c);
bool printable(char32_t c);  ///< repr shows it as it is
std::string_view strip(std::string_view text, const std::string* characters, bool left, bool right);

}  // namespace moiety::jinja
