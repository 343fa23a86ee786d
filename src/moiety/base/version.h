#pragma once
// The version of moiety; the build reads it from here.
#define MOIETY_VERSION "0.1.0"
