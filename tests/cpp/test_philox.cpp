// Philox4x32-10 against the known answers of its authors, and the dropout helpers on top of it.
#include "../../kernels/common/philox.h"

#include "check.h"

using namespace fastib;

static void known_answer(const uint32_t (&counter)[4], const uint32_t (&key)[2], const uint32_t (&expected)[4]) {
  const PhiloxBlock block = philox4x32_10(counter, key);
  for (int i = 0; i < 4; ++i) CHECK(block.word[i] == expected[i], "word ", i, " is ", block.word[i]);
}

int main() {
  known_answer({0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  known_answer({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  known_answer({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0},
               {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});

  // Seed and block fill both halves of key and counter; the stream is the third counter word.
  const uint64_t seed = 0x299f31d0a4093822, block = 0x85a308d3243f6a88;
  const PhiloxBlock expected = philox4x32_10({0x243f6a88, 0x85a308d3, 1, 0}, {0xa4093822, 0x299f31d0});
  const PhiloxBlock words = dropout_words(seed, kRpeDropoutStream, block);
  for (int i = 0; i < 4; ++i) CHECK(words.word[i] == expected.word[i]);
  for (uint64_t e = 0; e < 64; ++e) {
    CHECK(dropout_keep(seed, 0, e, 1u << 31) == (dropout_words(seed, 0, e / 4).word[e % 4] >= 1u << 31));
  }

  CHECK(dropout_threshold(0.0) == 0);
  CHECK(dropout_threshold(0.5) == 1u << 31);
  CHECK(dropout_threshold(0.1) == 429496729u);
  CHECK(dropout_threshold(1.0) == 0xFFFFFFFFu);
  CHECK(dropout_threshold(std::nextafter(1.0, 0.0)) == 0xFFFFFFFFu);
  CHECK(dropout_scale(0.75) == 4.0 && dropout_scale(0.0) == 1.0 && dropout_scale(1.0) == 0.0);

  const int count = 1 << 16;
  int kept = 0;
  for (int e = 0; e < count; ++e) kept += dropout_keep(7, 0, e, dropout_threshold(0.3));
  CHECK(std::abs(kept - 0.7 * count) < 5 * std::sqrt(0.21 * count), kept, " of ", count, " kept");
  return report();
}
