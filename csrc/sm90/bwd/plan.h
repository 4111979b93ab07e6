// How the work of one backward pass is numbered and divided.
#pragma once

#include "params.h"

namespace longgen::sm90 {

BwdPlan make_plan(const AttentionBwdParams& params);
BwdWorkspace workspace(const AttentionBwdParams& params, const BwdPlan& plan);

}  // namespace longgen::sm90
