// CUDA's execution model on the CPU, for tests: every thread of a block is a fiber.
//
// What a kernel asks of the hardware beyond arithmetic comes down to the functions below, which
// simt.h spells as CUDA does. The runtime (runtime.cpp) is compiled once and never instrumented, so
// that a kernel library built with a sanitizer is checked for what the kernel itself does.
#pragma once
#include <cstddef>
#include <cstdint>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern "C" {

struct SimtThread {  // what threadIdx and its like read
  dim3 thread, block, block_dim, grid_dim;
  unsigned lane;
  unsigned char* shared;  // dynamic shared memory of the block
};
extern SimtThread* simt_current;

// Errors end the launch, whose fibers are then abandoned; the first one's sentence stays.
[[noreturn]] void simt_fail(const char* what, int line);
int simt_launch(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context);
const char* simt_error();  // of the last launch of this thread; "" where it went well

// How threads advance and when asynchronous copies land; hardware may do any of it.
//   order: 0 in order, 1 reversed, else a new random order of warps and lanes for every block
//   greedy: a warp runs as far as it can before the next one (else all warps in turn)
//   eager: a copy lands when it is issued (else not before the wait that asks for it)
void simt_mode(uint64_t order, bool greedy, bool eager);

struct SimtCounters {
  uint64_t threads, switches, barriers, collectives, copies, ldmatrix, mma, bank_conflicts;
};
SimtCounters simt_counters();  // since the last call

void simt_barrier(int line);
void simt_sync_warp(unsigned mask, int line);
void simt_shuffle(unsigned mask, const void* value, int bytes, int source, void* out, int line);
unsigned simt_ballot(unsigned mask, bool predicate, int line);
void simt_copy_async(void* shared, const void* global, bool read, int line);  // 16 bytes, or zeros
void simt_copy_commit();
void simt_copy_wait(int pending, int line);
void simt_ldmatrix(const void* row, bool transposed, unsigned* out, int line);  // x4
// m16n8k16, float32 accumulators; a, b hold bfloat16 (or float16) pairs
void simt_mma(bool half, float* d, const unsigned* a, const unsigned* b, int line);
// m16n8k32, int32 accumulators; a, b hold four int8 each
void simt_mma_int8(int* d, const unsigned* a, const unsigned* b, int line);
// m16n8k32, float32 accumulators; a, b hold four float8_e4m3fn each. As Ada's tensor cores add them
// (SageAttention2, arXiv:2411.10958, sec. 3.3): with 13 bits of fraction, what is below cut off.
void simt_mma_float8(float* d, const unsigned* a, const unsigned* b, int line);
// float8_e4m3fn: to nearest even, at most 448
unsigned simt_e4m3(float x);
}
