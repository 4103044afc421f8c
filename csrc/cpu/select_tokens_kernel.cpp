#include <algorithm>
#include <cstring>
#include <vector>

#include "select_tokens.h"
#include "vec.h"

FASTDIFF_KERNEL_BEGIN

struct Token {
  uint64_t key;  // protection, then value
  uint32_t n;
  bool operator<(const Token& o) const { return key != o.key ? key < o.key : n < o.n; }
};

// Unsigned integers in the order of floats; no NaN, and one zero.
static uint32_t ordered(float value) {
  value = value == 0 ? 0.0f : value;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static uint32_t protection(const SelectTokensArgs& a, int64_t at) {
  if (a.forced && a.forced[at]) return kForced;
  if (a.score[at] != a.score[at]) return kNan;
  return a.most >= 0 && a.drops[at] >= a.most ? uint32_t(a.drops[at]) : 0;
}

// The product of score and factor, rounded to float32: the order is of that in every row.
static float scaled(const SelectTokensArgs& a, int64_t at, int side) {
  const float score = a.score[at];
  const int64_t waited = std::clamp<int64_t>(a.drops[at], 0, a.steps - 1);
  return score == score ? score * a.factors[side * a.steps + waited] : 0.0f;
}

// One sample. Two partial sorts: N comparisons or so each.
static void select_of(const SelectTokensArgs& a, int64_t b, std::vector<Token>& tokens) {
  const int64_t first = b * a.N, skip = a.N - a.count;
  for (int64_t n = 0; n < a.N; ++n)
    tokens[n] = {uint64_t(protection(a, first + n)) << 32 | ordered(scaled(a, first + n, 0)),
                 uint32_t(n)};
  if (a.low) std::nth_element(tokens.begin(), tokens.begin() + a.low - 1, tokens.end());
  if (skip > a.low) {
    for (int64_t i = a.low; i < a.N; ++i) {
      const int64_t at = first + tokens[i].n;
      tokens[i].key = uint64_t(protection(a, at)) << 32 | uint32_t(~ordered(scaled(a, at, 1)));
    }
    std::nth_element(tokens.begin() + a.low, tokens.begin() + skip - 1, tokens.end());
  }
  int32_t* drops = a.new_drops + first;
  for (int64_t n = 0; n < a.N; ++n) drops[n] = -1;  // chosen
  for (int64_t i = 0; i < skip; ++i) drops[tokens[i].n] = a.drops[first + tokens[i].n] + 1;
  int64_t* index = a.index + b * a.count;
  for (int64_t n = 0; n < a.N; ++n) {
    if (drops[n] >= 0) continue;
    *index++ = n;
    drops[n] = a.reset ? 0 : a.drops[first + n];
  }
}

void select_tokens(const SelectTokensArgs& a) {
  parallel_for(0, a.B, 1, [&](int64_t begin, int64_t end) {
    std::vector<Token> tokens(a.N);
    for (int64_t b = begin; b < end; ++b) select_of(a, b, tokens);
  });
}

FASTDIFF_KERNEL_END
