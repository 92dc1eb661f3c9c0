// Memory of a thread and of a call, and how much of it the caches hold.
#pragma once

#include "includes.h"

namespace gross::cpu::GROSS_ISA {

// Bytes that one thread's planes, and its assembled weights, may take: both stay in a 1 MB
// second-level cache.
constexpr int64_t plane_budget = 384 << 10, weight_budget = 256 << 10;
// Bytes of planes that the weight gradient passes over at once: three quarters of a 32 KB
// first-level cache.
constexpr int64_t run_budget = 24 << 10;

// Memory aligned like pages. Tests define GROSS_POISON: what is read before it is written must
// show, as NaN.
class Block {
 public:
  Block() = default;
  explicit Block(size_t size) : memory_(std::aligned_alloc(4096, size)), size_(size) {
    if (!memory_) throw std::bad_alloc();
  }
  Block(Block&& other) noexcept { *this = std::move(other); }
  Block& operator=(Block&& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Block() { std::free(memory_); }

  size_t size() const { return size_; }
  void* memory() const {
#ifdef GROSS_POISON
    std::memset(memory_, 0xff, size_);
#endif
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// Memory of one thread, kept from call to call and grown as needed; contents are not kept.
template <class T>
T* scratch(int64_t count) {
  static thread_local Block block;
  const size_t need = round_up(count * sizeof(T), 4096);
  if (block.size() < need) {
    block = Block();
    block = Block(need);
  }
  return static_cast<T*>(block.memory());
}

// Memory of one call; contents are undefined. The calling thread keeps the two last blocks: fresh
// pages cost more than what is written to them.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t need = round_up(std::max<int64_t>(count, 1) * sizeof(T), 4096);
    for (Block& block : spare())
      if (block.size() >= need && (!block_.size() || block.size() < block_.size()))
        std::swap(block, block_);
    if (!block_.size()) block_ = Block(need);
    memory_ = static_cast<T*>(block_.memory());
  }
  ~Buffer() {
    Block* smallest = &spare()[0];
    for (Block& block : spare())
      if (block.size() < smallest->size()) smallest = &block;
    if (smallest->size() < block_.size()) std::swap(*smallest, block_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return memory_; }

 private:
  static Block (&spare())[2] {
    static thread_local Block blocks[2];
    return blocks;
  }
  Block block_;
  T* memory_;
};

}  // namespace gross::cpu::GROSS_ISA
