#include "bindings/replay_state.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace angle {
namespace {

void require_bytes(const char* part, uint64_t have, uint64_t need) {
  if (have != need) {
    throw std::invalid_argument(std::string("the saved replay's ") + part + " has " + std::to_string(have) +
                                " bytes; it must have " + std::to_string(need));
  }
}

// A copy of the saved header that fits this replay, with what the segment says of itself put in.
std::unique_ptr<SegmentHeader> checked_header(const Replay& replay, const StateBytes& bytes, uint64_t slots) {
  require_bytes("header", static_cast<uint64_t>(bytes.size()), sizeof(SegmentHeader));
  auto saved = std::make_unique<SegmentHeader>();
  std::memcpy(saved.get(), bytes.data(), sizeof(SegmentHeader));
  replay.check_header(*saved);
  if (const uint64_t used = std::min<uint64_t>(saved->next_ticket, replay.capacity()); used != slots) {
    throw std::invalid_argument("the saved replay has " + std::to_string(slots) + " records; its tickets say " +
                                std::to_string(used));
  }
  if (saved->highest_bucket >= kBuckets) {
    throw std::invalid_argument("the saved replay's highest bucket is " + std::to_string(saved->highest_bucket) +
                                "; there are " + std::to_string(kBuckets));
  }
  const auto& own = *reinterpret_cast<const SegmentHeader*>(replay.segment());
  saved->segment_bytes = own.segment_bytes;
  saved->meta_bytes = own.meta_bytes;
  saved->ready = own.ready;
  return saved;
}

}  // namespace

StateParts state_parts(const Replay& replay, uint64_t slots, py::handle owner) {
  const SegmentLayout& layout = replay.layout();
  if (slots > layout.capacity) {
    throw std::invalid_argument("slots is " + std::to_string(slots) + "; the capacity is " +
                                std::to_string(layout.capacity));
  }
  const auto view = [&](uint64_t from, uint64_t bytes) {
    return py::array_t<uint8_t>(static_cast<py::ssize_t>(bytes), replay.segment() + from, owner);
  };
  StateParts out;
  out["header"] = view(0, sizeof(SegmentHeader));
  out["index"] = view(layout.streams_at, layout.records_at - layout.streams_at);
  out["records"] = view(layout.records_at, slots * layout.record_bytes);
  return out;
}

void adopt_state(Replay& replay, const StateBytes& header, uint64_t slots) {
  std::memcpy(replay.segment(), checked_header(replay, header, slots).get(), sizeof(SegmentHeader));
}

void restore_state(Replay& replay, const StateBytes& header, const StateBytes& index, const StateBytes& records) {
  const SegmentLayout& layout = replay.layout();
  const auto index_bytes = static_cast<uint64_t>(index.size()), record_bytes = static_cast<uint64_t>(records.size());
  require_bytes("index", index_bytes, layout.records_at - layout.streams_at);
  require_bytes("records", record_bytes, record_bytes / layout.record_bytes * layout.record_bytes);
  const auto saved = checked_header(replay, header, record_bytes / layout.record_bytes);
  std::memcpy(replay.segment() + layout.streams_at, index.data(), index_bytes);
  std::memcpy(replay.segment() + layout.records_at, records.data(), record_bytes);
  std::memcpy(replay.segment(), saved.get(), sizeof(SegmentHeader));
}

}  // namespace angle
