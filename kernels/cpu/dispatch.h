// The CPU kernels exist once per instruction set; the best one this machine runs is chosen on first use.
#pragma once

#include <string>
#include <vector>

namespace fastib {

// Names of the instruction sets compiled in that this machine runs, slowest first.
std::vector<std::string> cpu_isas();

// The one in use.
std::string cpu_isa();

// Forces one of cpu_isas() for the whole process, for tests; false where `name` is none of them.
bool set_cpu_isa(const std::string& name);

}  // namespace fastib
