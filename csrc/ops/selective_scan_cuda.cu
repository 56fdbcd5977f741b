#include "core/dispatch.h"
#include "ops/selective_scan.h"
