// Blocks of memory that were freed are used again, for large tensors and large scratch.
//
// The C library gives large blocks back to the operating system when they are freed, and gets them anew for the next
// call, page by page, every page cleared by the kernel at its first touch: several times the cost of writing to them.
#pragma once

#include <cstdint>

namespace dlkernels {

constexpr int64_t kPooledBytes = 1 << 20;  // less is left to the C library, which keeps such blocks itself

// Memory for `bytes`, uninitialised, aligned to a huge page; give_block takes it back with the same number.
void* take_block(int64_t bytes);
void give_block(void* data, int64_t bytes);

}  // namespace dlkernels
