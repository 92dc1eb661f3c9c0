// Does the emulator see what it promises to see? One small kernel for each fault, and one without.
#include "../../csrc/cuda/primitives.h"

using namespace gross::cuda;

namespace {

int failures = 0;
alignas(256) uint32_t everything[256];
uint32_t* const memory = everything + 64;
uint32_t* const source = everything + 160;

// Runs a kernel of two blocks of 64 threads with 1 KB of shared memory, which must end with an
// error that says `expected`; with none where that is empty.
template <class Kernel>
void expect(const char* what, const std::string& expected, const Kernel& kernel,
            emulator::Schedule schedule = {}) {
  std::string got;
  try {
    emulator::launch(2, 1, 64, 1024, kernel, schedule);
  } catch (const emulator::Error& e) {
    got = e.what();
  }
  if (expected.empty() ? got.empty() : got.find(expected) != std::string::npos) return;
  failures++;
  printf("FAILED %s: expected \"%s\", got \"%s\"\n", what, expected.c_str(), got.c_str());
}

}  // namespace

int main() {
  emulator::allow(memory, 256, true);
  emulator::allow(source, 256, false);
  const auto word = [](int i) { return shared_base() + 4 * i; };
  const Words4 zeros = {0, 0, 0, 0};

  for (uint32_t seed = 1; seed < 9; seed++)
    expect("no fault", "",
           [&] {
             const int t = thread_index();
             store_shared_32(word(t), t, true);
             copy_async_16(word(64 + 4 * (t % 32)), source, t % 2 == 0, t < 32);
             copy_async_commit();
             copy_async_wait<0>();
             barrier(0, 64);
             const uint32_t other = load_shared_32(word(63 - t), true),
                            zero = load_shared_32(word(64 + 4 * (t % 32) + 3), t % 2 == 1);
             store_global_32(&memory[t], other + zero, block_x() == 0);
             if (other != static_cast<uint32_t>(63 - t)) throw emulator::Error("wrong value");
           },
           {seed, seed % 2 == 0});

  expect("shared memory starts as NaN", "", [&] {
    const float value = as_float(load_shared_32(word(3), true));
    if (value == value) throw emulator::Error("not a NaN");
  });
  expect("read without a barrier", "race", [&] {
    store_shared_32(word(thread_index()), 1, true);
    load_shared_32(word(63 - thread_index()), true);
  });
  expect("write without a barrier", "race", [&] {
    load_shared_32(word(thread_index()), true);
    store_shared_32(word(63 - thread_index()), 1, true);
  });
  expect("two threads of different warps write one word", "race",
         [&] { store_shared_32(word(thread_index() % 32), 1, true); });
  expect("lanes of a warp without a barrier", "race", [&] {
    store_shared_32(word(thread_index()), 1, true);
    load_shared_32(word(thread_index() ^ 1), true);
  });
  expect("lanes of a warp with its barrier", "", [&] {
    store_shared_32(word(thread_index()), 1, true);
    warp_barrier();
    load_shared_32(word(thread_index() ^ 1), true);
  });
  expect("halves of a word are two places", "",
         [&] { store_shared_16(shared_base() + 2 * thread_index(), 1, true); });
  expect("a barrier of one team does not order another", "race", [&] {
    store_shared_32(word(thread_index()), 1, true);
    barrier(1 + thread_index() / 32, 32);
    load_shared_32(word(63 - thread_index()), true);
  });
  for (bool late : {true, false})
    expect("read with a copy in flight", "in flight",
           [&] {
             copy_async_16(word(4 * thread_index()), memory, true, thread_index() < 32);
             copy_async_commit();
             load_shared_32(word(4 * thread_index()), thread_index() < 32);
           },
           {1, late});
  expect("write with a copy in flight", "in flight", [&] {
    copy_async_16(word(4 * thread_index()), memory, true, thread_index() < 32);
    copy_async_commit();
    store_shared_32(word(4 * thread_index()), 1, thread_index() < 32);
  });
  expect("a copy waited for by its own thread alone", "race",
         [&] {
           copy_async_16(word(4 * thread_index()), memory, true, thread_index() < 32);
           copy_async_commit();
           copy_async_wait<0>();
           load_shared_32(word(4 * (thread_index() % 32)), thread_index() >= 32);
         },
         {3, false});
  expect("copies in flight at the end", "in flight", [&] {
    copy_async_16(word(4 * (thread_index() % 32)), memory, true, thread_index() < 32);
  });
  expect("misaligned shared memory", "misaligned", [&] { load_shared_128(word(1), true); });
  expect("misaligned row of a matrix", "misaligned", [&] {
    uint32_t r[4];
    load_matrix_x4(r, shared_base() + 8);
  });
  expect("misaligned global memory", "misaligned",
         [&] { store_global_128(&memory[1], zeros, true); });
  expect("shared memory out of range", "out of range",
         [&] { load_shared_32(shared_base() + 1024, true); });
  expect("global memory out of range", "out of range", [&] { load_global_32(&memory[64], true); });
  expect("global memory before the tensor", "out of range",
         [&] { load_global_32(memory - 1, true); });
  expect("a write to what is only read", "only read", [&] { store_global_32(source, 1, true); });
  for (uint32_t seed = 1; seed < 5; seed++)  // in either order
    expect("a block reads what another writes", "race",
           [&] {
             store_global_32(&memory[thread_index()], 1, block_x() == 0);
             load_global_32(memory, block_x() == 1);
           },
           {seed});
  expect("two blocks write one number", "race",
         [&] { store_global_32(&memory[thread_index()], 1, true); });
  expect("part of a warp at a barrier", "divergent", [&] {
    if (thread_index() != 5) barrier(0, 64);
  });
  expect("a warp that never comes", "divergent", [&] {
    if (thread_index() >= 32) barrier(0, 64);
  });
  expect("more warps than expected", "divergent", [&] { barrier(0, 32); });
  expect("disagreement about a barrier", "disagree",
         [&] { barrier(0, thread_index() < 32 ? 64 : 32); });
  expect("part of a warp at a product", "divergent", [&] {
    float d[4] = {};
    const uint32_t a[4] = {};
    if (thread_index() != 40) multiply<Type::bfloat16>(d, a, 0, 0);
  });
  expect("different instructions in a warp", "different instructions", [&] {
    if (thread_index() % 2)
      any_lane(true);
    else
      uniform(1);
  });
  expect("different accesses in a warp", "different numbers of accesses", [&] {
    if (thread_index() == 7) load_shared_32(word(0), true);
  });

  // What is counted: 32 lanes that read a column of words 128 bytes apart take 32 turns,
  // neighbouring words one.
  const emulator::Counters counted = emulator::launch(1, 1, 32, 4096, [&] {
    store_shared_32(shared_base() + 128 * thread_index(), 0, true);
    store_shared_32(shared_base() + 4 * thread_index(), 0, thread_index() > 0);
    store_global_32(&memory[2 * thread_index()], 0, true);
  });
  if (counted.of[emulator::shared_write].units != 33 || counted.global_bytes() != 128 ||
      counted.of[emulator::global_write].units != 8) {
    failures++;
    printf("FAILED counts: %d turns, %d bytes\n",
           static_cast<int>(counted.of[emulator::shared_write].units),
           static_cast<int>(counted.global_bytes()));
  }
  return failures > 0;
}
