#include <spdlog/spdlog.h>

#include "moiety/base/error.h"
#include "verb.h"

int main() { return 0; }
