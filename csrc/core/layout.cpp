#include "core/layout.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

namespace angle {
namespace {

constexpr uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

constexpr uint64_t kLargestField = 1ull << 30;

uint64_t fnv1a(uint64_t hash, const void* data, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    hash ^= static_cast<const uint8_t*>(data)[i];
    hash *= 0x100000001B3ull;
  }
  return hash;
}

}  // namespace

RecordLayout::RecordLayout(std::vector<Field> fields_in, const RowRoles& roles_in)
    : fields(std::move(fields_in)), roles(roles_in) {
  schema_hash = 0xCBF29CE484222325ull;
  const uint64_t shape[] = {roles.observations, roles.reward, roles.share_successors};
  schema_hash = fnv1a(schema_hash, shape, sizeof shape);
  if (2 * roles.observations > fields.size() || (roles.share_successors && roles.observations == 0)) {
    throw std::invalid_argument("a row of " + std::to_string(fields.size()) + " fields cannot have " +
                                std::to_string(roles.observations) + " observations and as many successors");
  }
  std::vector<size_t> order;
  for (size_t i = 0; i < fields.size(); ++i) {
    const Field& field = fields[i];
    if (field.bytes == 0 || field.bytes > kLargestField) {
      throw std::invalid_argument("field '" + field.name + "' has " + std::to_string(field.bytes) +
                                  " bytes a row; it must have between 1 and " + std::to_string(kLargestField));
    }
    if (!std::has_single_bit(field.itemsize) || field.itemsize > 8 || field.bytes % field.itemsize != 0) {
      throw std::invalid_argument("field '" + field.name + "' has elements of " + std::to_string(field.itemsize) +
                                  " bytes; they must have 1, 2, 4 or 8 and divide the row");
    }
    if (field.frames == 0 || field.bytes % (field.frames * static_cast<uint64_t>(field.itemsize)) != 0 ||
        (field.frames > 1 && !(roles.share_successors && (i < roles.observations || is_successor(i))))) {
      throw std::invalid_argument("field '" + field.name + "' cannot be a stack of " + std::to_string(field.frames) +
                                  " frames: only observations with shared successors are, in equal frames");
    }
    if (field.frames > 1 && stack > 1 && field.frames != stack) {
      throw std::invalid_argument("field '" + field.name + "' is a stack of " + std::to_string(field.frames) +
                                  " frames, another one of " + std::to_string(stack) + "; they must be equal");
    }
    stack = std::max(stack, field.frames);
    schema_hash = fnv1a(schema_hash, field.name.data(), field.name.size() + 1);
    const uint32_t numbers[] = {field.itemsize, field.bytes, field.frames};
    schema_hash = fnv1a(schema_hash, numbers, sizeof numbers);
    if (!(roles.share_successors && is_successor(i))) order.push_back(i);
  }
  for (size_t f = 0; f < roles.observations; ++f) {
    const Field &own = fields[f], &next = fields[successor_of(f)];
    if (own.bytes != next.bytes || own.itemsize != next.itemsize || own.frames != next.frames) {
      throw std::invalid_argument("field '" + next.name + "' differs in size from '" + own.name + "'");
    }
  }
  if (roles.reward != SIZE_MAX && (roles.reward >= fields.size() || fields[roles.reward].bytes > 8)) {
    throw std::invalid_argument("the reward must be one number among the row's fields");
  }
  const auto alignment = [this](size_t i) -> uint32_t {
    // Long rows of small elements are copied by whole words.
    return fields[i].itemsize < 4 && fields[i].kept() >= kLine ? 8 : fields[i].itemsize;
  };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return alignment(a) > alignment(b); });
  if (stack > 1) header_bytes = 32;
  uint64_t end = header_bytes;
  for (const size_t i : order) {
    end = round_up(end, alignment(i));
    fields[i].offset = static_cast<uint32_t>(end);
    end += fields[i].kept();
    if (end > kLargestField) {
      throw std::invalid_argument("a row has more than " + std::to_string(kLargestField) + " bytes");
    }
  }
  if (roles.share_successors) {
    for (size_t f = 0; f < roles.observations; ++f) fields[successor_of(f)].offset = fields[f].offset;
  }
  record_bytes = round_up(end, kLine);
}

TreeShape::TreeShape(uint64_t capacity) {
  // Groups of one and two cache lines. Of a million rows a draw reads four lines, and an update adds to two sums, as
  // the levels end where a sampler can add up the groups that are left, once a call.
  constexpr uint32_t kShifts[kMaxLevels] = {3, 4, 3, 3, 3, 3, 3, 3, 3, 3};
  constexpr uint64_t kWidest = 16;
  uint64_t below = capacity;
  leaves_padded = round_up(capacity, kWidest);
  do {
    shift[levels] = kShifts[levels];
    below = (below + (1ull << shift[levels]) - 1) >> shift[levels];
    nodes[levels] = below;
    padded[levels] = round_up(below, kWidest);
    ++levels;
  } while (below > kMaxTop);
  const uint32_t capacity_bits = static_cast<uint32_t>(std::bit_width(capacity - 1));
  weight_bits = 62 - std::max(22u, capacity_bits);
}

namespace {

uint64_t checked_capacity(uint64_t capacity, size_t record_bytes) {
  const uint64_t most = std::min<uint64_t>(1ull << 40, (1ull << 61) / record_bytes);
  if (capacity == 0 || capacity > most) {
    throw std::invalid_argument("capacity is " + std::to_string(capacity) + "; it must be between 1 and " +
                                std::to_string(most) + " rows");
  }
  return capacity;
}

}  // namespace

SegmentLayout::SegmentLayout(uint64_t capacity_in, const RecordLayout& record, uint64_t meta_bytes)
    : tree(checked_capacity(capacity_in, record.record_bytes)),
      capacity(capacity_in),
      record_bytes(record.record_bytes) {
  meta_at = round_up(sizeof(SegmentHeader), kLine);
  uint64_t end = round_up(meta_at + meta_bytes, kLine);
  streams_at = end;
  end += kStreams * sizeof(uint64_t);
  leaves_at = end;
  end = round_up(end + tree.leaves_padded * sizeof(uint64_t), kLine);
  for (size_t level = 0; level < tree.levels; ++level) {
    sums_at[level] = end;
    end = round_up(end + tree.padded[level] * sizeof(int64_t), kLine);
  }
  records_at = end;
  total_bytes = end + capacity * record_bytes;
}

}  // namespace angle
