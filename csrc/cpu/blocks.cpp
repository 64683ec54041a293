#include "blocks.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "../common.h"

namespace dlkernels {
namespace {

constexpr int64_t kPageBytes = 2 << 20;             // of a huge page: blocks are multiples of it, and aligned to it
constexpr int64_t kPoolBytes = int64_t(512) << 20;  // of freed blocks kept at most

class Pool;
Pool& pool();

class Pool {
 public:
  // fork() leaves the child without the other threads: one that held the mutex would never let go of it there.
  Pool() {
    pthread_atfork([] { pool().mutex_.lock(); }, [] { pool().mutex_.unlock(); }, [] { pool().mutex_.unlock(); });
  }

  // A block of `bytes`, a multiple of kPageBytes: of the freed ones the smallest that is not twice too large,
  // and of equal ones the latest, which may still be in a cache; else new.
  void* take(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto best = freed_.end();
    for (auto block = freed_.begin(); block != freed_.end(); ++block) {
      const bool fits = block->bytes >= bytes && block->bytes <= 2 * bytes;
      if (fits && (best == freed_.end() || block->bytes <= best->bytes)) best = block;
    }
    if (best == freed_.end()) return create(bytes);
    void* data = best->data;
    freed_bytes_ -= best->bytes;
    freed_.erase(best);
    return data;
  }

  // Keeps the block, and gives back the oldest ones beyond kPoolBytes.
  void give(void* data, int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    freed_.push_back({data, bytes});
    freed_bytes_ += bytes;
    while (freed_bytes_ > kPoolBytes) {
      freed_bytes_ -= freed_.front().bytes;
      std::free(freed_.front().data);
      freed_.erase(freed_.begin());
    }
  }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };

  static void* create(int64_t bytes) {
    void* data = std::aligned_alloc(kPageBytes, bytes);
    check(data != nullptr, "dlkernels: not enough memory for ", bytes, " bytes");
    madvise(data, bytes, MADV_HUGEPAGE);  // a hint: it may be refused
    return data;
  }

  std::mutex mutex_;
  std::vector<Block> freed_;  // oldest first
  int64_t freed_bytes_ = 0;
};

// Never destroyed: tensors may outlive the library's static objects.
Pool& pool() {
  static Pool* pool = new Pool;
  return *pool;
}

// A thread's small blocks, by size: powers of two.
class SmallBlocks {
 public:
  ~SmallBlocks() {
    for (std::vector<void*>& blocks : freed_) std::for_each(blocks.begin(), blocks.end(), std::free);
  }

  void* take(int64_t bytes) {
    std::vector<void*>& blocks = freed_[size_class(bytes)];
    if (blocks.empty()) return std::aligned_alloc(kLine, kLine << size_class(bytes));
    void* data = blocks.back();
    blocks.pop_back();
    return data;
  }

  void give(void* data, int64_t bytes) { freed_[size_class(bytes)].push_back(data); }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int kClasses = 15;
  static_assert(kLine << (kClasses - 1) >= kPooledBytes);

  static int size_class(int64_t bytes) { return std::bit_width(uint64_t(ceil_div(bytes, kLine) - 1)); }

  std::vector<void*> freed_[kClasses];
};

thread_local SmallBlocks small_blocks;

int64_t whole_pages(int64_t bytes) { return ceil_div(bytes, kPageBytes) * kPageBytes; }

}  // namespace

void* take_block(int64_t bytes) { return pool().take(whole_pages(bytes)); }

void give_block(void* data, int64_t bytes) { pool().give(data, whole_pages(bytes)); }

#if defined(__SANITIZE_ADDRESS__)  // which sees nothing of blocks that are used again
void* take_small_block(int64_t bytes) { return std::aligned_alloc(64, bytes); }
void give_small_block(void* data, int64_t) { std::free(data); }
#else
void* take_small_block(int64_t bytes) { return small_blocks.take(bytes); }
void give_small_block(void* data, int64_t bytes) { small_blocks.give(data, bytes); }
#endif

}  // namespace dlkernels
