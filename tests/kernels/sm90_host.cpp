// Hopper's 8-bit attention, its own source on a CPU, for ctypes. SAGE3_ATTEND names it, as emulated.py has translated it.
#include SAGE3_ATTEND

#include "host.h"

using namespace sage3;

#pragma GCC visibility push(default)
extern "C" int attend(const Int8Attend* call, char* message) {
  emulator::readable_begin = static_cast<const unsigned char*>(call->workspace);
  emulator::readable_end = emulator::readable_begin + int8::Workspace(call->shape).bytes;
  return launched(message, [&] { return static_cast<int>(int8_attend_sm90(*call, nullptr)); });
}
#pragma GCC visibility pop
