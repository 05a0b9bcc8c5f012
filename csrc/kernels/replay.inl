template <class Real>
inline size_t nan_rows(const Real* values, size_t n, size_t width) {
  int any = 0;
  for (size_t i = 0; i < n * width; ++i) any |= values[i] != values[i];
  if (any == 0) return 0;  // as nearly always
  size_t rows = 0;
  for (size_t row = 0; row < n; ++row, values += width) {
    int found = 0;
    for (size_t i = 0; i < width; ++i) found |= values[i] != values[i];
    rows += found != 0;
  }
  return rows;
}

size_t nan_rows_f32(const float* values, size_t n, size_t width) { return nan_rows(values, n, width); }
size_t nan_rows_f64(const double* values, size_t n, size_t width) { return nan_rows(values, n, width); }

// Inlined by force: gcc takes a function that only prefetches for one without effect and drops the calls.
__attribute__((always_inline)) inline void prefetch_record(const uint8_t* record, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(record + at, 0, 3);
}

inline int64_t load_once(const int64_t* address) { return __atomic_load_n(address, __ATOMIC_RELAXED); }
inline uint64_t load_once(const uint64_t* address) { return __atomic_load_n(address, __ATOMIC_RELAXED); }

#if defined(__AVX2__)
// A read that the compiler cannot repeat, of both halves of a group, added up.
inline __m256i load_halves(const int64_t* group) {
  __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(group));
  __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(group + 4));
  __asm__("" : "+x"(low), "+x"(high));
  return _mm256_add_epi64(low, high);
}

// The sums of four groups of 8.
inline void add_groups(const int64_t* nodes, int64_t* sums) {
  const auto pairs = [nodes](size_t group) {
    const __m256i a = load_halves(nodes + 8 * group), b = load_halves(nodes + 8 * group + 8);
    return _mm256_add_epi64(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
  };
  const __m256i ab = pairs(0), cd = pairs(2);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), _mm256_add_epi64(_mm256_permute2x128_si256(ab, cd, 0x20),
                                                                         _mm256_permute2x128_si256(ab, cd, 0x31)));
}
#endif

int64_t prefix_sums(const int64_t* nodes, size_t groups, int64_t* prefix) {
  size_t group = 0;
#if defined(__AVX2__)
  for (; group + 4 <= groups; group += 4) add_groups(nodes + 8 * group, prefix + group);
#endif
  for (; group < groups; ++group) {
    prefix[group] = 0;
    for (size_t i = 0; i < 8; ++i) prefix[group] += load_once(nodes + 8 * group + i);
  }
  int64_t total = 0;
  for (size_t i = 0; i < groups; ++i) {
    total += prefix[i] > 0 ? prefix[i] : 0;
    prefix[i] = total;
  }
  for (size_t i = groups; i % 8 != 0; ++i) prefix[i] = INT64_MAX;
  return total;
}

#if defined(__AVX512F__)

// A read that the compiler cannot repeat: what it holds afterwards did not come from memory as far as it knows.
inline __m512i load_vector(const void* address) {
  __m512i value = _mm512_load_si512(address);
  __asm__("" : "+v"(value));
  return value;
}

inline uint64_t count_le(const int64_t* sums, __m512i wanted) {
  return static_cast<uint64_t>(__builtin_popcount(_mm512_cmple_epi64_mask(_mm512_loadu_si512(sums), wanted)));
}

// A search tree of eight-way nodes over the prefix sums: every level is one comparison, without a branch to mispredict.
void locate(const int64_t* prefix, size_t n, int, size_t count, uint64_t* index, int64_t* target) {
  constexpr size_t kLevels = 5, kMost = 8 * 8 * 8 * 8;  // PriorityTree has at most this many groups
  int64_t coarse[kLevels][kMost / 8 + 8];
  const int64_t* levels[kLevels];
  size_t height = 0, length = (n + 7) / 8 * 8;
  levels[0] = prefix;
  while (length > 8) {
    const int64_t* below = levels[height];
    int64_t* above = coarse[height];
    const size_t groups = length / 8;
    for (size_t group = 0; group < groups; ++group) above[group] = below[8 * group + 7];
    length = (groups + 7) / 8 * 8;
    for (size_t group = groups; group < length; ++group) above[group] = INT64_MAX;
    levels[++height] = above;
  }
  for (size_t i = 0; i < count; ++i) {
    const __m512i wanted = _mm512_set1_epi64(target[i]);
    size_t node = 0;
    for (size_t level = height + 1; level-- > 0;) node = 8 * node + count_le(levels[level] + 8 * node, wanted);
    index[i] = node;
    target[i] -= node == 0 ? 0 : prefix[node - 1];
  }
}

inline __m512i running_sums(__m512i value) {
  const __m512i zero = _mm512_setzero_si512();
  value = _mm512_add_epi64(value, _mm512_alignr_epi64(value, zero, 7));
  value = _mm512_add_epi64(value, _mm512_alignr_epi64(value, zero, 6));
  return _mm512_add_epi64(value, _mm512_alignr_epi64(value, zero, 4));
}

// How many of the running sums of kFan children are <= target; `target` becomes what is left within the child found.
template <size_t kFan, class Child>
inline size_t find_child(int64_t* target, const Child& child) {
  alignas(64) int64_t sums[kFan + 8];
  int64_t* const inclusive = sums + 1;
  const __m512i wanted = _mm512_set1_epi64(*target);
  sums[0] = 0;
  const __m512i first = running_sums(child(0));
  _mm512_storeu_si512(inclusive, first);
  size_t found = static_cast<size_t>(__builtin_popcount(_mm512_cmple_epi64_mask(first, wanted)));
  if constexpr (kFan == 16) {
    const __m512i carry = _mm512_permutexvar_epi64(_mm512_set1_epi64(7), first);
    const __m512i second = _mm512_add_epi64(running_sums(child(8)), carry);
    _mm512_storeu_si512(inclusive + 8, second);
    found += static_cast<size_t>(__builtin_popcount(_mm512_cmple_epi64_mask(second, wanted)));
  }
  *target -= sums[found];
  return found;
}

template <size_t kFan>
void descend_by(const int64_t* level, size_t count, uint64_t* index, int64_t* target) {
  for (size_t i = 0; i < count; ++i) {
    if (index[i] == kLost) continue;
    const int64_t* node = level + index[i] * kFan;
    const size_t found = find_child<kFan>(target + i, [node](size_t start) {
      return _mm512_max_epi64(load_vector(node + start), _mm512_setzero_si512());
    });
    index[i] = found == kFan ? kLost : index[i] * kFan + found;
  }
}

template <size_t kFan>
void descend_leaves_by(const uint64_t* leaves, uint64_t weight_mask, size_t count, uint64_t* index, int64_t* target,
                       uint64_t* words) {
  const __m512i mask = _mm512_set1_epi64(static_cast<int64_t>(weight_mask));
  for (size_t i = 0; i < count; ++i) {
    if (index[i] == kLost) continue;
    const uint64_t* node = leaves + index[i] * kFan;
    alignas(64) uint64_t read[kFan + 1];
    read[kFan] = 0;
    const size_t found = find_child<kFan>(target + i, [&](size_t start) {
      const __m512i word = load_vector(node + start);
      _mm512_store_si512(read + start, word);
      return _mm512_and_si512(word, mask);
    });
    index[i] = found == kFan ? kLost : index[i] * kFan + found;
    words[i] = read[found];
  }
}

void descend(const int64_t* level, size_t fan, size_t count, uint64_t* index, int64_t* target) {
  if (fan == 8) {
    descend_by<8>(level, count, index, target);
  } else {
    descend_by<16>(level, count, index, target);
  }
}

void descend_leaves(const uint64_t* leaves, size_t fan, uint64_t weight_mask, size_t count, uint64_t* index,
                    int64_t* target, uint64_t* words) {
  if (fan == 8) {
    descend_leaves_by<8>(leaves, weight_mask, count, index, target, words);
  } else {
    descend_leaves_by<16>(leaves, weight_mask, count, index, target, words);
  }
}

#else

void locate(const int64_t* prefix, size_t n, int ascending, size_t count, uint64_t* index, int64_t* target) {
  const size_t groups = (n + 7) / 8;
  size_t group = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t wanted = target[i];
    if (ascending) {
      while (group + 1 < groups && prefix[8 * group + 7] <= wanted) ++group;
    } else {
      group = 0;
      for (size_t span = groups; span > 1;) {
        const size_t half = span / 2;
        group = prefix[8 * (group + half - 1) + 7] <= wanted ? group + half : group;
        span -= half;
      }
    }
    size_t node = 8 * group;
    for (size_t lane = 0; lane < 8; ++lane) node += prefix[8 * group + lane] <= wanted;
    index[i] = node;
    target[i] = node == 0 ? wanted : wanted - prefix[node - 1];
  }
}

void descend(const int64_t* level, size_t fan, size_t count, uint64_t* index, int64_t* target) {
  for (size_t i = 0; i < count; ++i) {
    if (index[i] == kLost) continue;
    const int64_t* node = level + index[i] * fan;
    int64_t running = 0, below = 0;
    size_t found = 0;
    for (size_t child = 0; child < fan; ++child) {
      const int64_t value = load_once(node + child);
      running += value > 0 ? value : 0;
      found += running <= target[i];
      below = running <= target[i] ? running : below;
    }
    target[i] -= below;
    index[i] = found == fan ? kLost : index[i] * fan + found;
  }
}

void descend_leaves(const uint64_t* leaves, size_t fan, uint64_t weight_mask, size_t count, uint64_t* index,
                    int64_t* target, uint64_t* words) {
  for (size_t i = 0; i < count; ++i) {
    if (index[i] == kLost) continue;
    const uint64_t* node = leaves + index[i] * fan;
    uint64_t read[16];
    int64_t running = 0, below = 0;
    size_t found = 0;
    for (size_t child = 0; child < fan; ++child) {
      read[child] = load_once(node + child);
      running += static_cast<int64_t>(read[child] & weight_mask);
      found += running <= target[i];
      below = running <= target[i] ? running : below;
    }
    target[i] -= below;
    index[i] = found == fan ? kLost : index[i] * fan + found;
    words[i] = found == fan ? 0 : read[found];
  }
}

#endif

// No masked stores: on Zen 5 they made the gather three times slower (docs/decisions/0002-gather.md).
inline void copy_bytes(uint8_t* out, const uint8_t* in, size_t bytes) {
  for (; bytes >= 64; bytes -= 64, in += 64, out += 64) memcpy(out, in, 64);
  const auto copy_piece = [&](size_t piece) __attribute__((always_inline)) {
    if ((bytes & piece) == 0) return;
    memcpy(out, in, piece);
    in += piece;
    out += piece;
  };
  copy_piece(32);
  copy_piece(16);
  copy_piece(8);
  copy_piece(4);
  copy_piece(2);
  copy_piece(1);
}

void gather(const uint8_t* records, size_t record_bytes, const uint64_t* slots, size_t count, const FieldCopy* fields,
            size_t field_count) {
  constexpr size_t kAhead = 32, kLarge = 2048;
  size_t needed = 0;  // bytes from a record's beginning on
  for (size_t f = 0; f < field_count; ++f) {
    const size_t end = fields[f].offset + size_t{fields[f].bytes};
    needed = end > needed ? end : needed;
  }
  if (needed > 1024) needed = 0;  // longer pieces keep the hardware's own prefetcher busy
  for (size_t i = 0; i < kAhead && i < count; ++i) {
    if (slots[i] != kLost) prefetch_record(records + slots[i] * record_bytes, needed);
  }
  for (size_t i = 0; i < count; ++i) {
    if (i + kAhead < count && slots[i + kAhead] != kLost) {
      prefetch_record(records + slots[i + kAhead] * record_bytes, needed);
    }
    if (slots[i] == kLost) continue;
    const uint8_t* record = records + slots[i] * record_bytes;
    for (size_t f = 0; f < field_count; ++f) {
      uint8_t* out = fields[f].out + i * fields[f].stride;
      if (fields[f].bytes <= kLarge) {
        copy_bytes(out, record + fields[f].offset, fields[f].bytes);
      } else {
        memcpy(out, record + fields[f].offset, fields[f].bytes);
      }
    }
  }
}

void powers(double* values, size_t n, double exponent) {
  for (size_t i = 0; i < n; ++i) values[i] = power_of(values[i], exponent);
}

template <class Real>
inline bool are_priorities(const Real* priorities, size_t n, Real largest) {
  unsigned bad = 0;
  for (size_t i = 0; i < n; ++i) bad |= !(priorities[i] >= 0 && priorities[i] <= largest);
  return bad == 0;
}

bool are_priorities_f32(const float* priorities, size_t n) { return are_priorities(priorities, n, __FLT_MAX__); }
bool are_priorities_f64(const double* priorities, size_t n) { return are_priorities(priorities, n, __DBL_MAX__); }

bool are_below(const int64_t* values, size_t n, uint64_t limit) {
  uint64_t bad = 0;
  for (size_t i = 0; i < n; ++i) bad |= static_cast<uint64_t>(values[i]) >= limit;
  return bad == 0;
}

uint64_t weigh(const float* priorities, size_t n, double epsilon, double exponent, uint64_t largest,
               uint64_t* weights) {
  constexpr size_t kPiece = 64;
  uint64_t cut = 0;
  for (size_t start = 0; start < n; start += kPiece) {
    double reals[kPiece];
    const size_t count = n - start < kPiece ? n - start : kPiece;
    for (size_t i = 0; i < count; ++i) reals[i] = static_cast<double>(priorities[start + i]) + epsilon;
    powers(reals, count, exponent);
    for (size_t i = 0; i < count; ++i) {
      bool over;
      weights[start + i] = weight_of(reals[i], largest, &over);
      cut += over;
    }
  }
  return cut;
}

constexpr ReplayKernels replay_kernels = {
    .nan_rows_f32 = nan_rows_f32,
    .nan_rows_f64 = nan_rows_f64,
    .philox_draws = philox_draws,
    .prefix_sums = prefix_sums,
    .locate = locate,
    .descend = descend,
    .descend_leaves = descend_leaves,
    .gather = gather,
    .are_priorities_f32 = are_priorities_f32,
    .are_priorities_f64 = are_priorities_f64,
    .are_below = are_below,
    .weigh = weigh,
    .powers = powers,
};
