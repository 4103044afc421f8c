#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

// Present where the kernel library is built with a sanitizer.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
__attribute__((weak)) void __asan_poison_memory_region(void const volatile*, size_t);
__attribute__((weak)) void __asan_unpoison_memory_region(void const volatile*, size_t);
__attribute__((weak)) void* __asan_region_is_poisoned(void*, size_t);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_destroy_fiber(void*);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void __tsan_read_range(void*, size_t);
__attribute__((weak)) void __tsan_write_range(void*, size_t);

// Saves the callee's registers and the stack pointer, and goes on where `to` was saved.
void simt_switch(void** save, void* to);
}

#if defined(__x86_64__)
asm(".text\n.globl simt_switch\n.hidden simt_switch\n.type simt_switch,@function\nsimt_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#else
#error "csrc/simt has a fiber switch for x86-64 only"
#endif

namespace {

constexpr size_t kStack = 256 << 10;       // of one thread; touched pages only are used
constexpr size_t kMostShared = 227 << 10;  // bytes a block may have on sm_90 and sm_100
constexpr size_t kFence = 256;             // bytes behind the shared memory that nobody may write
constexpr int kSlots = 8;                  // collectives of disjoint lanes of one warp in flight

enum class State { kReady, kBarrier, kCollective, kDone };

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Fiber {
  SimtThread thread;
  int index, warp;
  State state;
  int line;
  void *stack_pointer, *fake_stack, *tsan;
  unsigned char* stack;
  std::vector<Copy> open;                 // issued, not committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

enum class Kind { kSync, kShuffle, kBallot, kLdmatrix, kMma, kMmaInt8, kMmaFloat8 };

// Lanes of a warp that are meeting.
struct Slot {
  Kind kind;
  unsigned mask = 0, arrived = 0;
  int line = 0;
  unsigned char tag[2];  // addresses by which TSan learns of __syncwarp, in turn
  unsigned turn = 0;
  unsigned char in[32][48], out[32][16];
  int extra[32];  // shuffle: source lane; ballot: predicate
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Slot> slots;
  std::vector<int> order;
  int at_barrier = 0, done = 0;
  unsigned turn = 0;
  unsigned char tag[2];
  void* stack_pointer = nullptr;  // of the launch
  void *fake_stack = nullptr, *tsan = nullptr;
  const void* bottom = nullptr;
  size_t bottom_size = 0;
  void (*body)(void*);
  void* context;
  bool failed = false;
};

uint64_t mode_order = 0;
bool mode_greedy = false, mode_eager = false;
SimtCounters counters{};
std::string error;
Block* block = nullptr;
Fiber* current = nullptr;
unsigned char began, ended;  // addresses by which TSan learns that a block begins, a launch ends

// Byte by byte, so that no sanitizer sees it: what the model moves for a kernel is no access of it.
void move(void* to, const void* from, size_t n) {
  auto* t = static_cast<volatile unsigned char*>(to);
  auto* f = static_cast<const volatile unsigned char*>(from);
  for (size_t i = 0; i < n; ++i) t[i] = f[i];
}

// An access that the hardware makes for the kernel: sanitizers are told of it.
void touch(const void* p, size_t n, bool write, int line, const char* what) {
  void* at = const_cast<void*>(p);
  if (__asan_region_is_poisoned && __asan_region_is_poisoned(at, n)) simt_fail(what, line);
  if (write && __tsan_write_range) __tsan_write_range(at, n);
  if (!write && __tsan_read_range) __tsan_read_range(at, n);
}

void release(void* tag) {
  if (__tsan_release) __tsan_release(tag);
}
void acquire(void* tag) {
  if (__tsan_acquire) __tsan_acquire(tag);
}

void to_launch() {
  Fiber* me = current;
  ++counters.switches;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(block->tsan, 1);  // 1: orders nothing
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(me->state == State::kDone ? nullptr : &me->fake_stack,
                                   block->bottom, block->bottom_size);
  simt_switch(&me->stack_pointer, block->stack_pointer);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(me->fake_stack, &block->bottom, &block->bottom_size);
}

void entry() {
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, &block->bottom, &block->bottom_size);
  acquire(&began);
  block->body(block->context);
  if (!current->open.empty()) simt_fail("cp.async was never committed", 0);
  current->state = State::kDone;
  ++block->done;
  release(&ended);
  to_launch();
  std::abort();
}

void run(Fiber& fiber) {
  current = &fiber;
  simt_current = &fiber.thread;
  ++counters.switches;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber.tsan, 1);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&block->fake_stack, fiber.stack, kStack);
  simt_switch(&block->stack_pointer, fiber.stack_pointer);
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(block->fake_stack, nullptr, nullptr);
}

// Memory whose every mapping is new to a sanitizer.
unsigned char* map(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) std::abort();
  return static_cast<unsigned char*>(p);
}

void start(Fiber& fiber) {
  fiber.state = State::kReady;
  fiber.line = 0;
  fiber.open.clear();
  fiber.groups.clear();
  fiber.fake_stack = nullptr;
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fiber.stack, kStack);
  void** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;  // so that the entry sees the alignment of a call
  *--top = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

// TSan's fibers, made once: it slows down and stops after some tens of thousands of them.
std::vector<void*> tsan_fibers;

// Whole warps in random order, and the lanes of each.
void shuffle(std::vector<int>& order, std::mt19937_64& random) {
  const size_t n = order.size(), warps = (n + 31) / 32;
  std::vector<size_t> at(warps);
  for (size_t w = 0; w < warps; ++w) at[w] = w;
  std::shuffle(at.begin(), at.end(), random);
  size_t k = 0;
  for (size_t w : at) {
    const size_t begin = k;
    for (size_t i = w * 32; i < std::min(n, w * 32 + 32); ++i) order[k++] = int(i);
    std::shuffle(order.begin() + begin, order.begin() + k, random);
  }
}

void run_block() {
  const size_t n = block->fibers.size();
  while (block->done < int(n)) {
    bool moved = false;
    for (size_t begin = 0; begin < n;) {
      // In `order` the lanes of a warp lie side by side.
      const int warp = block->fibers[block->order[begin]].warp;
      size_t end = begin;
      while (end < n && block->fibers[block->order[end]].warp == warp) ++end;
      bool ran = true;
      while (ran) {
        ran = false;
        for (size_t k = begin; k < end; ++k) {
          Fiber& fiber = block->fibers[block->order[k]];
          if (fiber.state != State::kReady) continue;
          run(fiber);
          if (block->failed) return;
          ran = moved = true;
        }
        if (!mode_greedy) break;
      }
      begin = end;
    }
    if (!moved) {
      current = nullptr;
      error = "deadlock: no thread can go on;";
      for (const Fiber& f : block->fibers)
        if (f.state != State::kDone) {
          error += " thread " + std::to_string(f.index) + " waits in " +
                   (f.state == State::kBarrier ? "__syncthreads" : "a warp collective") +
                   " at line " + std::to_string(f.line);
          break;
        }
      block->failed = true;
      return;
    }
  }
}

// The lanes of `mask` meet; the last to arrive runs finish(slot). Gives the slot, whose `out` of
// this lane holds until the lane returns.
template <class Finish>
Slot& meet(Kind kind, unsigned mask, int line, const void* in, size_t bytes, int extra,
           Finish finish) {
  ++counters.collectives;
  const unsigned lane = current->thread.lane;
  if (!(mask >> lane & 1)) simt_fail("a lane calls a collective whose mask leaves it out", line);
  Slot* base = &block->slots[size_t(current->warp) * kSlots];
  Slot* slot = nullptr;
  for (int i = 0; i < kSlots; ++i) {
    if (!base[i].arrived) continue;
    if (base[i].mask == mask && !(base[i].arrived >> lane & 1)) {
      slot = &base[i];
    } else if (base[i].mask & mask) {
      simt_fail("collectives with overlapping masks are in flight", line);
    }
  }
  for (int i = 0; i < kSlots && !slot; ++i)
    if (!base[i].arrived) slot = &base[i], slot->mask = mask, slot->line = line, slot->kind = kind;
  if (!slot) simt_fail("too many collectives of one warp are in flight", line);
  if (slot->line != line || slot->kind != kind)
    simt_fail("lanes of one warp meet in different collectives", line);
  move(slot->in[lane], in, bytes);
  slot->extra[lane] = extra;
  slot->arrived |= 1u << lane;
  const unsigned turn = slot->turn;
  if (kind == Kind::kSync) release(&slot->tag[turn & 1]);
  if (slot->arrived == mask) {
    finish(*slot);
    slot->arrived = 0;
    ++slot->turn;
    for (Fiber& f : block->fibers)
      if (f.warp == current->warp && f.index != current->index && (mask >> f.thread.lane & 1))
        f.state = State::kReady;
  } else {
    current->state = State::kCollective;
    current->line = line;
    to_launch();
  }
  if (kind == Kind::kSync) acquire(&slot->tag[turn & 1]);
  return *slot;
}

float element(bool half, unsigned word, int which) {
  const uint16_t bits = uint16_t(word >> (16 * which));
  if (half) {
    _Float16 h;
    move(&h, &bits, 2);
    return float(h);
  }
  const uint32_t wide = uint32_t(bits) << 16;
  float f;
  move(&f, &wide, 4);
  return f;
}

void finish_ldmatrix(Slot& slot, bool transposed) {
  ++counters.ldmatrix;
  for (int m = 0; m < 4; ++m) {
    const unsigned char* rows[8];
    unsigned banks = 0;  // groups of four banks: 16 bytes each
    for (int i = 0; i < 8; ++i) {
      move(&rows[i], slot.in[m * 8 + i], sizeof rows[i]);
      const unsigned bank = 1u << (uintptr_t(rows[i]) / 16 % 8);
      counters.bank_conflicts += (banks & bank) != 0;
      banks |= bank;
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int k = 0; k < 2; ++k) {
        const int row = transposed ? lane % 4 * 2 + k : lane / 4;
        const int column = transposed ? lane / 4 : lane % 4 * 2 + k;
        move(slot.out[lane] + m * 4 + k * 2, rows[row] + column * 2, 2);
      }
  }
}

template <class Sum>
struct MmaIn {
  Sum d[4];
  unsigned a[4], b[2];
};

void finish_mma(Slot& slot, bool half) {
  ++counters.mma;
  float a[16][16], b[8][16];
  MmaIn<float> in[32];
  for (int lane = 0; lane < 32; ++lane) {
    move(&in[lane], slot.in[lane], sizeof in[lane]);
    const int row = lane / 4, column = lane % 4 * 2;
    for (int k = 0; k < 2; ++k) {
      a[row][column + k] = element(half, in[lane].a[0], k);
      a[row + 8][column + k] = element(half, in[lane].a[1], k);
      a[row][column + 8 + k] = element(half, in[lane].a[2], k);
      a[row + 8][column + 8 + k] = element(half, in[lane].a[3], k);
      b[row][column + k] = element(half, in[lane].b[0], k);
      b[row][column + 8 + k] = element(half, in[lane].b[1], k);
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + (e >> 1) * 8, column = lane % 4 * 2 + (e & 1);
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      sum += in[lane].d[e];
      move(slot.out[lane] + e * 4, &sum, 4);
    }
}

float of_e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  float size = exponent ? std::ldexp(8.0f + float(fraction), exponent - 10)
                        : std::ldexp(float(fraction), -9);
  if ((bits & 0x7f) == 0x7f) size = std::nanf("");
  return bits & 0x80 ? -size : size;
}

// What all lanes bring to m16n8k32; value(byte): a factor.
template <class Sum, class Factor, class Value>
void gather_mma_32(const Slot& slot, MmaIn<Sum> (&in)[32], Factor (&a)[16][32], Factor (&b)[8][32],
                   Value value) {
  for (int lane = 0; lane < 32; ++lane) {
    move(&in[lane], slot.in[lane], sizeof in[lane]);
    const int row = lane / 4, column = lane % 4 * 4;
    for (int k = 0; k < 4; ++k) {
      const auto byte = [&](unsigned word) { return value(uint8_t(word >> (8 * k))); };
      a[row][column + k] = byte(in[lane].a[0]);
      a[row + 8][column + k] = byte(in[lane].a[1]);
      a[row][column + 16 + k] = byte(in[lane].a[2]);
      a[row + 8][column + 16 + k] = byte(in[lane].a[3]);
      b[row][column + k] = byte(in[lane].b[0]);
      b[row][column + 16 + k] = byte(in[lane].b[1]);
    }
  }
}

// The addend and all products by the largest one's exponent, each and then the sum cut to 13 bits
// of fraction.
void finish_mma_float8(Slot& slot) {
  ++counters.mma;
  constexpr int kFraction = 13;
  float a[16][32], b[8][32];
  MmaIn<float> in[32];
  gather_mma_32(slot, in, a, b, of_e4m3);
  const auto exponent = [](double x) {
    int e = 0;
    std::frexp(x, &e);
    return e;  // of a NaN or an infinity unspecified, and of no use
  };
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + (e >> 1) * 8, column = lane % 4 * 2 + (e & 1);
      double terms[33], most = std::fabs(double(in[lane].d[e])), sum = 0;
      terms[32] = in[lane].d[e];
      for (int k = 0; k < 32; ++k) {
        terms[k] = double(a[row][k]) * double(b[column][k]);
        most = std::fmax(most, std::fabs(terms[k]));
      }
      const int shift = kFraction + 1 - exponent(most);
      for (const double term : terms) sum += std::trunc(std::ldexp(term, shift));
      sum = std::ldexp(sum, -shift);
      const int after = kFraction + 1 - exponent(sum);
      const float out = float(std::ldexp(std::trunc(std::ldexp(sum, after)), -after));
      move(slot.out[lane] + e * 4, &out, 4);
    }
}

// Sums that leave int32 wrap, as they do without .satfinite.
void finish_mma_int8(Slot& slot) {
  ++counters.mma;
  int a[16][32], b[8][32];
  MmaIn<int> in[32];
  gather_mma_32(slot, in, a, b, [](uint8_t byte) { return int(int8_t(byte)); });
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) {
      const int row = lane / 4 + (e >> 1) * 8, column = lane % 4 * 2 + (e & 1);
      unsigned sum = unsigned(in[lane].d[e]);
      for (int k = 0; k < 32; ++k) sum += unsigned(a[row][k] * b[column][k]);
      move(slot.out[lane] + e * 4, &sum, 4);
    }
}

}  // namespace

extern "C" {

SimtThread* simt_current = nullptr;

void simt_fail(const char* what, int line) {
  const SimtThread& t = current->thread;
  if (!block->failed)
    error = std::string(what) + " (line " + std::to_string(line) + ", block " +
            std::to_string(t.block.x) + "," + std::to_string(t.block.y) + "," +
            std::to_string(t.block.z) + ", thread " + std::to_string(current->index) + ")";
  block->failed = true;
  to_launch();  // never resumed
  std::abort();
}

const char* simt_error() { return error.c_str(); }

void simt_mode(uint64_t order, bool greedy, bool eager) {
  mode_order = order, mode_greedy = greedy, mode_eager = eager;
}

SimtCounters simt_counters() {
  const SimtCounters seen = counters;
  counters = {};
  return seen;
}

void simt_barrier(int line) {
  ++counters.barriers;
  Block& b = *block;
  if (b.done) simt_fail("__syncthreads after threads of the block have left the kernel", line);
  const unsigned turn = b.turn;
  release(&b.tag[turn & 1]);
  current->line = line;
  current->state = State::kBarrier;
  if (++b.at_barrier == int(b.fibers.size())) {
    for (const Fiber& f : b.fibers)
      if (f.line != line) simt_fail("__syncthreads is reached at different lines", line);
    for (Fiber& f : b.fibers) f.state = State::kReady;
    b.at_barrier = 0;
    ++b.turn;
  } else {
    to_launch();
  }
  acquire(&b.tag[turn & 1]);
}

void simt_sync_warp(unsigned mask, int line) {
  meet(Kind::kSync, mask, line, nullptr, 0, 0, [](Slot&) {});
}

void simt_shuffle(unsigned mask, const void* value, int bytes, int source, void* out, int line) {
  bool outside = false;
  const Slot& slot = meet(Kind::kShuffle, mask, line, value, size_t(bytes), source, [&](Slot& s) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (mask >> s.extra[lane] & 1) {
        move(s.out[lane], s.in[s.extra[lane]], size_t(bytes));
      } else {
        outside = true;
      }
    }
  });
  if (outside) simt_fail("a shuffle reads a lane outside its mask", line);
  move(out, slot.out[current->thread.lane], size_t(bytes));
}

unsigned simt_ballot(unsigned mask, bool predicate, int line) {
  const Slot& slot = meet(Kind::kBallot, mask, line, nullptr, 0, predicate, [&](Slot& s) {
    unsigned ballot = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) ballot |= unsigned(s.extra[lane]) << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) move(s.out[lane], &ballot, 4);
  });
  unsigned ballot;
  move(&ballot, slot.out[current->thread.lane], 4);
  return ballot;
}

static void land(const Copy& copy) {
  if (copy.from) {
    move(copy.to, copy.from, 16);
  } else {
    for (int i = 0; i < 16; ++i) static_cast<unsigned char*>(copy.to)[i] = 0;
  }
}

void simt_copy_async(void* shared, const void* global, bool read, int line) {
  ++counters.copies;
  if (uintptr_t(shared) % 16 || (read && uintptr_t(global) % 16))
    simt_fail("cp.async: an address is not 16-byte aligned", line);
  if (read) touch(global, 16, false, line, "cp.async reads memory that is not the kernel's");
  touch(shared, 16, true, line, "cp.async writes memory that is not the block's");
  const Copy copy{shared, read ? global : nullptr};
  if (mode_eager) {
    land(copy);
  } else {
    current->open.push_back(copy);
  }
}

void simt_copy_commit() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void simt_copy_wait(int pending, int line) {
  auto& groups = current->groups;
  while (int(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      touch(copy.to, 16, true, line, "cp.async writes memory that is not the block's");
      land(copy);
    }
    groups.erase(groups.begin());
  }
}

void simt_ldmatrix(const void* row, bool transposed, unsigned* out, int line) {
  if (uintptr_t(row) % 16) simt_fail("ldmatrix: a row's address is not 16-byte aligned", line);
  touch(row, 16, false, line, "ldmatrix reads memory that is not the block's");
  const Slot& slot = meet(Kind::kLdmatrix, ~0u, line, &row, sizeof row, transposed,
                          [&](Slot& s) { finish_ldmatrix(s, transposed); });
  move(out, slot.out[current->thread.lane], 16);
}

void simt_mma(bool half, float* d, const unsigned* a, const unsigned* b, int line) {
  MmaIn<float> in;
  move(in.d, d, 16), move(in.a, a, 16), move(in.b, b, 8);
  const Slot& slot =
      meet(Kind::kMma, ~0u, line, &in, sizeof in, half, [&](Slot& s) { finish_mma(s, half); });
  move(d, slot.out[current->thread.lane], 16);
}

void simt_mma_int8(int* d, const unsigned* a, const unsigned* b, int line) {
  MmaIn<int> in;
  move(in.d, d, 16), move(in.a, a, 16), move(in.b, b, 8);
  const Slot& slot = meet(Kind::kMmaInt8, ~0u, line, &in, sizeof in, 0, finish_mma_int8);
  move(d, slot.out[current->thread.lane], 16);
}

void simt_mma_float8(float* d, const unsigned* a, const unsigned* b, int line) {
  MmaIn<float> in;
  move(in.d, d, 16), move(in.a, a, 16), move(in.b, b, 8);
  const Slot& slot = meet(Kind::kMmaFloat8, ~0u, line, &in, sizeof in, 0, finish_mma_float8);
  move(d, slot.out[current->thread.lane], 16);
}

unsigned simt_e4m3(float x) {
  if (std::isnan(x)) return 0x7f;
  const float size = std::fmin(std::fabs(x), 448.0f);
  const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
  // Eighths of that power of two; sixteen of them are the next one's eight.
  const unsigned eighths = unsigned(std::nearbyint(std::ldexp(size, 3 - exponent)));
  return (std::signbit(x) ? 0x80u : 0u) | (unsigned(exponent + 6) * 8 + eighths);
}

int simt_launch(dim3 grid, dim3 threads, size_t shared_bytes, void (*body)(void*), void* context) {
  constexpr int kInvalidConfiguration = 9, kLaunchFailure = 719;  // of cudaError_t
  error.clear();
  const size_t n = size_t(threads.x) * threads.y * threads.z;
  const bool fits = n >= 1 && n <= 1024 && threads.z <= 64 && shared_bytes <= kMostShared;
  const bool grid_fits = grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffffu &&
                         grid.y <= 65535 && grid.z <= 65535;
  if (!fits || !grid_fits) {
    error = "grid, block or shared memory is outside what a GPU takes";
    return kInvalidConfiguration;
  }
  Block here;
  block = &here;
  here.body = body, here.context = context;
  here.fibers.resize(n);
  here.order.resize(n);
  here.slots.resize((n + 31) / 32 * kSlots);
  if (__tsan_get_current_fiber) here.tsan = __tsan_get_current_fiber();
  std::mt19937_64 random(mode_order);
  for (size_t i = 0; i < n; ++i) {
    Fiber& f = here.fibers[i];
    f.index = int(i), f.warp = int(i / 32);
    f.thread.lane = unsigned(i % 32);
    f.thread.thread = dim3(unsigned(i % threads.x), unsigned(i / threads.x % threads.y),
                           unsigned(i / (size_t(threads.x) * threads.y)));
    f.thread.block_dim = threads, f.thread.grid_dim = grid;
    here.order[i] = int(mode_order == 1 ? n - 1 - i : i);
  }
  // A block's threads use the stacks and TSan fibers of the block before, 37 further on: only
  // what those pairs did has an order for TSan, and all else of two blocks may be found to race.
  // Shared memory is mapped anew, because TSan forgets what it knows of memory that is unmapped.
  unsigned char* stacks = map(n * kStack);
  while (__tsan_create_fiber && tsan_fibers.size() < n)
    tsan_fibers.push_back(__tsan_create_fiber(0));
  size_t turned = 0;
  for (unsigned z = 0; z < grid.z && !here.failed; ++z)
    for (unsigned y = 0; y < grid.y && !here.failed; ++y)
      for (unsigned x = 0; x < grid.x && !here.failed; ++x) {
        if (mode_order > 1) shuffle(here.order, random);
        unsigned char *shared = map(shared_bytes + kFence), *fence = shared + shared_bytes;
        std::fill(shared, fence, 0xff);  // NaN in every float type
        std::fill(fence, fence + kFence, 0xa5);
        if (__asan_poison_memory_region) __asan_poison_memory_region(fence, kFence);
        here.at_barrier = here.done = 0;
        for (Slot& s : here.slots) s.arrived = 0;
        for (size_t i = 0; i < n; ++i) {
          Fiber& f = here.fibers[i];
          f.thread.block = dim3(x, y, z);
          f.thread.shared = shared;
          const size_t own = (i + turned) % n;
          f.stack = stacks + own * kStack;
          f.tsan = __tsan_create_fiber ? tsan_fibers[own] : nullptr;
          start(f);
        }
        turned += 37;
        counters.threads += n;
        release(&began);
        run_block();
        if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fence, kFence);
        if (!here.failed && std::count(fence, fence + kFence, 0xa5) != int(kFence)) {
          error = "shared memory was written past its end";
          here.failed = true;
        }
        munmap(shared, shared_bytes + kFence);
      }
  acquire(&ended);
  munmap(stacks, n * kStack);
  if (here.failed && __tsan_destroy_fiber) {  // they stopped in the middle of a kernel
    for (void* fiber : tsan_fibers) __tsan_destroy_fiber(fiber);
    tsan_fibers.clear();
  }
  block = nullptr, current = nullptr, simt_current = nullptr;
  return here.failed ? kLaunchFailure : 0;
}
}
