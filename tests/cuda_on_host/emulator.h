// Runs CUDA kernels on the host, one thread block at a time: threads are fibers, warps run in
// random order, and whatever a GPU would leave undefined is an error. It checks every access for
// range and alignment; shared memory, word by word, for accesses that no barrier orders and for
// copies still in flight; barriers and warp-wide instructions for threads that are missing; global
// memory for blocks that touch what another wrote. Shared memory starts as NaN. It counts bytes of
// global memory and wavefronts of shared memory.
//
// It does not see time, the asynchronous proxy of the matrix units, or registers of a product that
// is still running.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Switches stacks: saves the callee's registers on this stack, its pointer in *save, and continues
// from `load`.
extern "C" void gross_switch_stack(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.type gross_switch_stack,@function
gross_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#error "the switch of stacks is written for x86-64"
#endif

namespace gross::cuda::emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Accesses are counted by kind. `matrix_read` is ldmatrix, `copy` the shared side of cp.async.
enum Kind { shared_read, shared_write, matrix_read, copy, global_read, global_write, kinds };

struct Traffic {
  uint64_t instructions = 0;  // of a warp
  uint64_t bytes = 0;         // asked for
  uint64_t units = 0;  // shared memory: wavefronts of 128 bytes, bank conflicts included; global:
                       // sectors of 32 bytes
  uint64_t least = 0;  // wavefronts without conflicts
};

struct Counters {
  std::array<Traffic, kinds> of{};
  uint64_t products = 0;  // 16 × 8 results each
  uint64_t barriers = 0;

  uint64_t shared_wavefronts() const {
    return of[shared_read].units + of[shared_write].units + of[matrix_read].units + of[copy].units;
  }
  uint64_t global_bytes() const { return of[global_read].bytes + of[global_write].bytes; }
};

// What may happen in any order on a GPU happens in an order drawn from `seed`.
struct Schedule {
  uint32_t seed = 1;
  bool late_copies = true;  // asynchronous copies land when they are waited for, else at once
  bool counting = true;
};

namespace detail {

constexpr int max_warps = 32;
constexpr size_t stack_bytes = 256 * 1024;
constexpr uint8_t poison = 0xff;  // a NaN in every floating-point type

enum class Wait { none, warp, barrier, done };

struct Access {
  Kind kind;
  uint8_t bytes;
  bool on;
  uint64_t address;
};

struct Copy {
  uint32_t destination;
  std::array<uint8_t, 16> data;
};

struct Thread {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  char* stack = nullptr;
  Wait wait = Wait::none;
  int barrier = 0, barrier_threads = 0;
  void (*collective)(void* operands[32]) = nullptr;
  void* operand = nullptr;
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                 // not committed
  std::vector<Access> log;
};

// When a thread did something: its warp's count of barriers then.
struct Moment {
  int32_t thread = -1, epoch = -1;
};

// Shared memory is followed in pieces of 2 bytes, the smallest that a thread writes.
struct Piece {
  Moment written;
  bool in_flight = false;
};
struct Reads {  // of a piece by a warp, after its last barrier before them
  int32_t epoch = -1;
  uint32_t lanes = 0;
};

// Global memory that the kernel may touch. Of what it may write, per 2 bytes: the blocks that wrote
// and read it in this launch, counted from 1; `several` readers are no single block.
constexpr uint32_t several = ~0u;
struct Allocation {
  size_t bytes;
  bool writable;
  std::vector<uint32_t> writer, reader;
  uint64_t bytes_read = 0;  // in this launch
};

struct Machine {
  std::vector<Thread> threads;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<uint8_t> shared;
  std::vector<Piece> pieces;
  std::vector<Reads> reads;  // [piece][warp]
  std::vector<std::vector<int32_t>>
      clock;  // [warp][of warp]: barriers of the second that the first knows of
  std::map<const char*, Allocation> allocations;
  std::function<void()> body;
  void* scheduler_stack_pointer = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  int current = 0, block_x = 0, block_y = 0, grid_x = 1, grid_y = 1;
  Schedule schedule;
  Counters counters;
  std::mt19937 random;
  std::string error;
};
inline Machine machine;

inline Thread& self() { return machine.threads[machine.current]; }

[[noreturn]] inline void fail(const std::string& what) {
  throw Error(what + " (block " + std::to_string(machine.block_x) + ", " +
              std::to_string(machine.block_y) + ", thread " + std::to_string(machine.current) +
              ")");
}

// Every switch is announced to AddressSanitizer, which otherwise takes another fiber's frames for
// overflows of this one's.
inline void enter(Thread& thread) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_fake_stack, thread.stack, stack_bytes);
#endif
  gross_switch_stack(&machine.scheduler_stack_pointer, thread.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_fake_stack, nullptr, nullptr);
#endif
}
inline void leave() {
  Thread& thread = self();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(thread.wait == Wait::done ? nullptr : &thread.fake_stack,
                                 machine.scheduler_stack, machine.scheduler_stack_bytes);
#endif
  gross_switch_stack(&thread.stack_pointer, machine.scheduler_stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self().fake_stack, &machine.scheduler_stack,
                                  &machine.scheduler_stack_bytes);
#endif
}
inline void first_frame() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack,
                                  &machine.scheduler_stack_bytes);
#endif
  try {
    machine.body();
  } catch (const std::exception& e) {
    machine.error = e.what();
  }
  self().wait = Wait::done;
  leave();
}

// Whether what happened then is ordered before the current thread. Only barriers order the lanes of
// a warp, too.
inline bool ordered(Moment then) {
  const int warp = machine.current / 32;
  if (then.thread == machine.current) return true;
  return machine.clock[warp][then.thread / 32] > then.epoch;
}
inline Moment now() {
  return {static_cast<int16_t>(machine.current),
          machine.clock[machine.current / 32][machine.current / 32]};
}

inline void check_shared(uint32_t address, uint32_t bytes) {
  if (address % bytes) fail("misaligned access to shared memory at " + std::to_string(address));
  if (address + static_cast<uint64_t>(bytes) > machine.shared.size())
    fail("shared memory out of range at " + std::to_string(address));
}
inline void note_read(uint32_t address, uint32_t bytes) {
  check_shared(address, bytes);
  const Moment here = now();
  for (uint32_t i = address / 2; i < (address + bytes) / 2; i++) {
    const Piece& piece = machine.pieces[i];
    if (piece.in_flight)
      fail("read of shared memory at " + std::to_string(2 * i) + " with a copy in flight");
    if (piece.written.thread >= 0 && !ordered(piece.written))
      fail("race: read of shared memory at " + std::to_string(2 * i) + ", written by thread " +
           std::to_string(piece.written.thread));
    Reads& reads = machine.reads[i * machine.clock.size() + here.thread / 32];
    if (reads.epoch != here.epoch) reads = {here.epoch, 0};
    reads.lanes |= 1u << here.thread % 32;
  }
}
inline void note_write(uint32_t address, uint32_t bytes, bool in_flight) {
  check_shared(address, bytes);
  const Moment here = now();
  const int warp = here.thread / 32, warps = static_cast<int>(machine.clock.size());
  for (uint32_t i = address / 2; i < (address + bytes) / 2; i++) {
    Piece& piece = machine.pieces[i];
    if (piece.in_flight)
      fail("write to shared memory at " + std::to_string(2 * i) + " with a copy in flight");
    if (piece.written.thread >= 0 && !ordered(piece.written))
      fail("race: write to shared memory at " + std::to_string(2 * i) + ", written by thread " +
           std::to_string(piece.written.thread));
    for (int v = 0; v < warps; v++) {
      const Reads& reads = machine.reads[static_cast<size_t>(i) * warps + v];
      if (reads.epoch < machine.clock[warp][v]) continue;
      if (v != warp || (reads.lanes & ~(1u << here.thread % 32)))
        fail("race: write to shared memory at " + std::to_string(2 * i) + ", read by warp " +
             std::to_string(v));
    }
    piece = {here, in_flight};
  }
}
inline void land(const Copy& copy) {
  if (machine.schedule.late_copies)
    std::memcpy(&machine.shared[copy.destination], copy.data.data(), 16);
  for (int i = 0; i < 8; i++) machine.pieces[copy.destination / 2 + i] = {now(), false};
}

inline void check_global(const void* pointer, size_t bytes, bool write) {
  const char* p = static_cast<const char*>(pointer);
  auto found = machine.allocations.upper_bound(p);
  if (found == machine.allocations.begin()) fail("global memory out of range");
  --found;
  Allocation& allocation = found->second;
  const size_t at = p - found->first;
  if (at + bytes > allocation.bytes) fail("global memory out of range");
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned access to global memory");
  if (!write) allocation.bytes_read += bytes;
  if (!allocation.writable) {
    if (write) fail("write to global memory that is only read");
    return;
  }
  const uint32_t block =
      static_cast<uint32_t>(machine.block_y * machine.grid_x + machine.block_x + 1);
  for (size_t i = at / 2; i < (at + bytes) / 2; i++) {
    uint32_t &writer = allocation.writer[i], &reader = allocation.reader[i];
    if (writer && writer != block) fail("race: global memory that another block wrote");
    if (write && reader && reader != block)
      fail("race: write to global memory that another block reads");
    if (write)
      writer = block;
    else
      reader = reader && reader != block ? several : block;
  }
}

inline void log(Kind kind, uint64_t address, int bytes, bool on) {
  if (machine.schedule.counting)
    self().log.push_back({kind, static_cast<uint8_t>(bytes), on, address});
}

// Wavefronts of one access to shared memory: words of one bank that differ take turns.
inline int wavefronts(const uint64_t* addresses, int count, int bytes) {
  std::array<std::set<uint64_t>, 32> banks;
  size_t most = 0;
  for (int i = 0; i < count; i++)
    for (uint64_t word = addresses[i] / 4; word <= (addresses[i] + bytes - 1) / 4; word++) {
      banks[word % 32].insert(word);
      most = std::max(most, banks[word % 32].size());
    }
  return static_cast<int>(most);
}

// Adds up what a block logged. Lanes of a warp must have made the same accesses (predicated off or
// on), else the warp diverged.
inline void fold_logs() {
  for (size_t warp = 0; warp < machine.threads.size() / 32; warp++) {
    const auto lane = [&](int l) -> std::vector<Access>& {
      return machine.threads[warp * 32 + l].log;
    };
    for (int l = 1; l < 32; l++)
      if (lane(l).size() != lane(0).size())
        throw Error("lanes of a warp made different numbers of accesses");
    for (size_t i = 0; i < lane(0).size(); i++) {
      const Kind kind = lane(0)[i].kind;
      const int bytes = lane(0)[i].bytes;
      std::vector<uint64_t>
          on[4];  // a quarter, half or whole warp at a time, so that it is 128 bytes
      std::set<uint64_t> sectors;
      int active = 0;
      for (int l = 0; l < 32; l++) {
        const Access& access = lane(l)[i];
        if (access.kind != kind || access.bytes != bytes)
          throw Error("lanes of a warp made different accesses");
        if (!access.on) continue;
        active++;
        on[std::max(bytes, 4) * l / 128].push_back(access.address);
        for (uint64_t sector = access.address / 32; sector <= (access.address + bytes - 1) / 32;
             sector++)
          sectors.insert(sector);
      }
      if (!active) continue;
      Traffic& traffic = machine.counters.of[kind];
      traffic.instructions++;
      traffic.bytes += static_cast<uint64_t>(active) * bytes;
      if (kind == global_read || kind == global_write) {
        traffic.units += sectors.size();
      } else {
        for (const auto& part : on)
          if (!part.empty()) {
            traffic.units += wavefronts(part.data(), static_cast<int>(part.size()), bytes);
            traffic.least++;
          }
      }
    }
    for (int l = 0; l < 32; l++) lane(l).clear();
  }
}

inline void run_block(int threads, size_t shared_bytes) {
  Machine& m = machine;
  const int warps = threads / 32;
  m.threads.clear();
  m.threads.resize(threads);
  m.shared.assign(shared_bytes, poison);
  m.pieces.assign(shared_bytes / 2, Piece{});
  m.reads.assign(shared_bytes / 2 * warps, Reads{});
  m.clock.assign(warps, std::vector<int32_t>(warps, 0));
  while (static_cast<int>(m.stacks.size()) < threads) m.stacks.emplace_back(new char[stack_bytes]);
  for (int i = 0; i < threads; i++) {
    Thread& thread = m.threads[i];
    thread.stack = m.stacks[i].get();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(thread.stack,
                                  stack_bytes);  // what a fiber left that an error ended
#endif
    // What gross_switch_stack pops: six registers and the address of the first frame, which needs a
    // stack aligned as after a call.
    void** top = reinterpret_cast<void**>(
                     (reinterpret_cast<uintptr_t>(thread.stack) + stack_bytes) & ~uintptr_t{15}) -
                 8;
    std::fill(top, top + 8, nullptr);
    top[6] = reinterpret_cast<void*>(&first_frame);
    thread.stack_pointer = top;
  }
  const auto lanes_in = [&](int warp, Wait wait) {
    int count = 0;
    for (int l = 0; l < 32; l++) count += m.threads[warp * 32 + l].wait == wait;
    return count;
  };
  for (;;) {
    std::vector<int> ready;
    for (int warp = 0; warp < warps; warp++)
      if (lanes_in(warp, Wait::none)) ready.push_back(warp);
    if (!ready.empty()) {  // one warp runs until all its lanes wait for others
      const int warp = ready[m.random() % ready.size()];
      while (lanes_in(warp, Wait::none)) {
        for (int l = 0; l < 32; l++) {
          m.current = warp * 32 + l;
          if (self().wait != Wait::none) continue;
          enter(self());
          if (!m.error.empty()) throw Error(std::exchange(m.error, ""));
        }
        if (lanes_in(warp, Wait::warp) == 32) {
          m.current = warp * 32;
          void* operands[32];
          for (int l = 0; l < 32; l++) {
            operands[l] = m.threads[warp * 32 + l].operand;
            if (m.threads[warp * 32 + l].collective != self().collective)
              fail("lanes of a warp reached different instructions");
            m.threads[warp * 32 + l].wait = Wait::none;
          }
          self().collective(operands);
        }
      }
      continue;
    }
    int done = 0;
    for (int warp = 0; warp < warps; warp++) done += lanes_in(warp, Wait::done);
    if (done == threads) break;
    bool progress = false;
    for (int id = 0; id < 16; id++) {
      int expected = -1, arrived = 0;
      std::vector<int> at;
      for (int warp = 0; warp < warps; warp++) {
        int here = 0;
        for (int l = 0; l < 32; l++) {
          const Thread& thread = m.threads[warp * 32 + l];
          if (thread.wait != Wait::barrier || thread.barrier != id) continue;
          if (expected >= 0 && thread.barrier_threads != expected)
            fail("threads disagree about how many meet at barrier " + std::to_string(id));
          expected = thread.barrier_threads;
          here++;
        }
        if (here == 32) at.push_back(warp);
        if (here > 0 && here < 32)
          fail("divergent barrier: part of a warp waits at barrier " + std::to_string(id));
        arrived += here;
      }
      if (expected < 0 || arrived < expected) continue;
      if (arrived > expected)
        fail("divergent barrier: more threads than expected at barrier " + std::to_string(id));
      std::vector<int32_t> joint(warps, 0);
      for (int warp : at) {
        m.clock[warp][warp]++;
        for (int v = 0; v < warps; v++) joint[v] = std::max(joint[v], m.clock[warp][v]);
      }
      for (int warp : at) {
        m.clock[warp] = joint;
        for (int l = 0; l < 32; l++) m.threads[warp * 32 + l].wait = Wait::none;
      }
      m.counters.barriers++;
      progress = true;
    }
    if (!progress) fail("deadlock: divergent barrier or warp-wide instruction");
  }
  for (const Thread& thread : m.threads) {
    bool in_flight = !thread.open.empty();
    for (const auto& group : thread.groups) in_flight |= !group.empty();
    if (in_flight) fail("the block ended with copies in flight");
  }
  fold_logs();
}

}  // namespace detail

// What kernels may touch; the rest of memory is out of range. Whole pieces of 2 bytes.
inline void allow(const void* pointer, size_t bytes, bool writable) {
  detail::machine.allocations[static_cast<const char*>(pointer)] = {bytes, writable, {}, {}, 0};
}
inline void forget_allocations() { detail::machine.allocations.clear(); }
// How much the last launch read of what was allowed at this address.
inline uint64_t bytes_read(const void* pointer) {
  return detail::machine.allocations.at(static_cast<const char*>(pointer)).bytes_read;
}

// Runs the kernel's blocks one after another, in random order, and returns what they counted.
// Throws Error.
inline Counters launch(int grid_x, int grid_y, int threads, size_t shared_bytes,
                       std::function<void()> kernel, Schedule schedule = {}) {
  detail::Machine& m = detail::machine;
  if (threads <= 0 || threads % 32 || threads > 32 * detail::max_warps)
    throw Error("a block has 32 to 1024 threads, whole warps");
  m.body = std::move(kernel);
  m.schedule = schedule;
  m.random.seed(schedule.seed);
  m.counters = {};
  m.error.clear();
  m.grid_x = grid_x, m.grid_y = grid_y;
  for (auto& [pointer, allocation] : m.allocations) {
    allocation.bytes_read = 0;
    if (allocation.writable) {
      allocation.writer.assign((allocation.bytes + 1) / 2, 0);
      allocation.reader.assign((allocation.bytes + 1) / 2, 0);
    }
  }
  std::vector<int> blocks(static_cast<size_t>(grid_x) * grid_y);
  for (size_t i = 0; i < blocks.size(); i++) blocks[i] = static_cast<int>(i);
  std::shuffle(blocks.begin(), blocks.end(), m.random);
  for (int block : blocks) {
    m.block_x = block % grid_x, m.block_y = block / grid_x;
    detail::run_block(threads, (shared_bytes + 15) / 16 * 16);
  }
  return m.counters;
}

// ---- what the host twins of primitives.h are made of ----

inline int thread_index() { return detail::machine.current; }
inline int block_threads() { return static_cast<int>(detail::machine.threads.size()); }
inline int block_x() { return detail::machine.block_x; }
inline int block_y() { return detail::machine.block_y; }
inline int grid_x() { return detail::machine.grid_x; }

// A warp-wide instruction: `run` sees the operands of all lanes once all have arrived.
inline void collective(void (*run)(void* operands[32]), void* operand) {
  detail::self().collective = run;
  detail::self().operand = operand;
  detail::self().wait = detail::Wait::warp;
  detail::leave();
}
inline void barrier(int id, int threads) {
  detail::self().barrier = id;
  detail::self().barrier_threads = threads;
  detail::self().wait = detail::Wait::barrier;
  detail::leave();
}
// Orders the lanes of the current warp; to be run as a collective.
inline void order_warp(void**) {
  const int warp = detail::machine.current / 32;
  detail::machine.clock[warp][warp]++;
}

inline void read_shared(void* to, uint32_t address, int bytes, bool on) {
  detail::log(shared_read, address, bytes, on);
  if (!on) return;
  detail::note_read(address, bytes);
  std::memcpy(to, &detail::machine.shared[address], bytes);
}
inline void write_shared(uint32_t address, const void* from, int bytes, bool on) {
  detail::log(shared_write, address, bytes, on);
  if (!on) return;
  detail::note_write(address, bytes, false);
  std::memcpy(&detail::machine.shared[address], from, bytes);
}
inline void read_global(void* to, const void* from, int bytes, bool on) {
  detail::log(global_read, reinterpret_cast<uint64_t>(from), bytes, on);
  if (!on) return;
  detail::check_global(from, bytes, false);
  std::memcpy(to, from, bytes);
}
inline void write_global(void* to, const void* from, int bytes, bool on) {
  detail::log(global_write, reinterpret_cast<uint64_t>(to), bytes, on);
  if (!on) return;
  detail::check_global(to, bytes, true);
  std::memcpy(to, from, bytes);
}

// 16 bytes on their way from global to shared memory; zeros where `valid` is false.
inline void start_copy(uint32_t destination, const void* source, bool valid, bool on) {
  detail::log(copy, destination, 16, on);
  detail::log(global_read, reinterpret_cast<uint64_t>(source), 16, on && valid);
  if (!on) return;
  detail::Copy piece{destination, {}};
  if (valid) {
    detail::check_global(source, 16, false);
    std::memcpy(piece.data.data(), source, 16);
  }
  detail::note_write(destination, 16, true);
  if (!detail::machine.schedule.late_copies)
    std::memcpy(&detail::machine.shared[destination], piece.data.data(), 16);
  detail::self().open.push_back(piece);
}
inline void commit_copies() {
  detail::self().groups.push_back(std::move(detail::self().open));
  detail::self().open.clear();
}
inline void wait_for_copies(int pending) {
  auto& groups = detail::self().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const detail::Copy& copy : groups.front()) detail::land(copy);
    groups.erase(groups.begin());
  }
}

// The row of 16 bytes that `lane` names in a matrix read. The instruction reads it in the lane's
// name.
inline void read_matrix_row(void* to, uint32_t address, int lane) {
  const int current = detail::machine.current;
  detail::machine.current = current / 32 * 32 + lane;
  detail::note_read(address, 16);
  detail::machine.current = current;
  std::memcpy(to, &detail::machine.shared[address], 16);
}
inline void count_matrix(const uint64_t (&rows)[8]) {
  Traffic& traffic = detail::machine.counters.of[matrix_read];
  traffic.instructions++;
  traffic.bytes += 128;
  traffic.units += detail::wavefronts(rows, 8, 16);
  traffic.least++;
}
inline void count_products(int count) { detail::machine.counters.products += count; }

}  // namespace gross::cuda::emulator
