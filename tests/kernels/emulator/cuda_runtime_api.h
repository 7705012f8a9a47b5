// Just enough of CUDA for the kernels' sources to compile and run on a CPU, one thread after the other; see machine.h.
#pragma once

#include "machine.h"
