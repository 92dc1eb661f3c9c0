// What the kernels use of the standard library and of this project's code for any processor: units
// include it before they set their target, so that nothing of it is compiled for a processor that
// may not be there.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../series.h"
#include "call.h"
#include "plan.h"
#include "threads.h"
