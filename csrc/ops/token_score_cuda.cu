#include "ops/token_score.h"
