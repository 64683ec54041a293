// Blocks of memory that were freed are used again, for large tensors and large scratch.
//
// The C library gives large blocks back to the operating system when they are freed, and gets them anew for the next
// call, page by page, every page cleared by the kernel at its first touch: several times the cost of writing to them.
// Small aligned blocks it carves out of larger ones and joins again: 0.3 us for each, and a short call takes a dozen.
#pragma once

#include <cstdint>

namespace dlkernels {

constexpr int64_t kPooledBytes = 1 << 20;  // of large blocks, at least; tensors that are smaller are the C library's

// Memory for `bytes`, uninitialised, aligned to a huge page; give_block takes it back with the same number.
void* take_block(int64_t bytes);
void give_block(void* data, int64_t bytes);

// The same for less than kPooledBytes, aligned to a cache line; null where there is no memory. Every thread keeps the
// blocks it gives back, as many as it ever had at once.
void* take_small_block(int64_t bytes);
void give_small_block(void* data, int64_t bytes);

}  // namespace dlkernels
