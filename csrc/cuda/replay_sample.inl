// The replay's kernels: rows that are drawn.
#pragma once
#include "cuda/replay_choose.inl"

namespace angle::device {

constexpr uint64_t kWeighedAtOnce = 4096;  // batches up to this are weighed by the last block, without a second launch

// (N P)^-b over the largest of the batch, or of the buffer: the smallest weight over each, to the power of b.
ANGLE_DEVICE void write_weight(const View& view, const SampleParams& p, uint64_t i) {
  const double exponent = p.live == nullptr ? p.importance_exponent : p.live[1];
  const double least = static_cast<double>(p.scratch->least);
  const bool all_one = view.header().prioritized == 0 || exponent == 0.0;
  p.importance_weights[i] =
      all_one ? 1.0f : static_cast<float>(power_of(least / static_cast<double>(p.drawn[i]), exponent));
}

// kStacked: records keep one frame of a stack.
template <bool kStacked>
struct SampleRows {
  using Params = SampleParams;
  static constexpr uint32_t kThreads = 256, kWarps = kThreads / kLanes;
  struct Shared {
    TopSums<kThreads> top;
    uint64_t ages, lowest;
    uint32_t last;
    uint64_t slots[kWarps][kLanes], ends[kWarps][kLanes];  // of each draw its row and its window's last
  };

  ANGLE_DEVICE static void run(Block<Shared>& block, const SampleParams& p) {
    if (is_left_out(p)) return;
    const View view(p.view);
    SegmentHeader& h = view.header();
    Shared& shared = block.shared;
    const bool chosen = p.chosen != nullptr;
    if (!chosen && h.prioritized != 0) add_up_top(block, shared.top, view);
    block.each_thread([&](uint32_t thread) {
      if (thread != 0) return;
      shared.ages = 0;
      shared.lowest = ~0ull;
    });
    const uint64_t total = chosen ? 0 : total_of(view, shared.top);
    const double discount = p.live == nullptr ? p.discount : p.live[0];

    block.each_warp([&](const Warp& warp) {
      const uint64_t base = (uint64_t{block.index} * kWarps + warp.index) * p.draws_per_warp;
      if (base >= p.n) return;
      const uint32_t draws = static_cast<uint32_t>(p.n - base < p.draws_per_warp ? p.n - base : p.draws_per_warp);
      uint64_t *const slots = shared.slots[warp.index], *const ends = shared.ends[warp.index];
      Lanes<uint64_t> weights, ages;
      warp.each([&](int lane) {
        weights[lane] = ~0ull;
        ages[lane] = 0;
        if (static_cast<uint32_t>(lane) >= draws) return;
        const uint64_t i = base + static_cast<uint64_t>(lane);
        const uint64_t slot = chosen ? p.chosen[i] : choose(view, p, shared.top.prefix, total, i);
        slots[lane] = ends[lane] = slot;
        if (slot == kNowhere) {
          raise(&p.scratch->nothing, 1);
          p.handles[i] = -1;
          p.discounts[i] = 0.0f;
          p.steps[i] = 0;
          p.drawn[i] = 1;
          return;
        }
        weights[lane] = view.code.weight(view.leaves()[slot]);
        p.drawn[i] = weights[lane];
        const uint64_t lap = RecordHead::lap(*view.word(slot, RecordLayout::kHead));
        const Place at{view.ticket_of(slot, lap), slot, lap};
        p.handles[i] = static_cast<int64_t>(at.ticket);
        ages[lane] = h.next_ticket - at.ticket;
        ends[lane] = walk_window(view, p, at, discount, i);
      });
      const uint64_t smallest = warp.least(weights), age = warp.sum(ages);
      warp.each([&](int lane) {
        if (lane != 0) return;
        lower(&p.scratch->smallest, smallest);
        add(&shared.ages, age);
      });
      for (uint32_t f = 0; f < p.field_count; ++f) {
        const FieldOut& field = p.fields[f];
        if (kStacked && field.frames > 1) continue;
        move_field<false>(warp, view, field.rows + base * field.bytes, field.successor != 0 ? ends : slots, draws,
                          field.offset, field.bytes, field.bytes);
      }
      if constexpr (kStacked) {
        move_frames(warp, view, p, base, draws, slots, 0);
        move_frames(warp, view, p, base, draws, ends, 1);
      }
    });

    // The last block to come here finishes the batch.
    block.each_thread([&](uint32_t thread) {
      if (thread != 0) return;
      if ((p.how & SampleParams::kKeyed) == 0) add(&h.ages, shared.ages);
      fence();
      shared.last = add_and_tell(&p.scratch->finished, 1) + 1 == block.blocks;
      fence();
    });
    if (shared.last == 0) return;
    if ((p.how & SampleParams::kBoundByBuffer) != 0) {
      block.each_thread([&](uint32_t thread) {
        for (size_t bucket = thread; bucket < kBuckets; bucket += block.threads) {
          if (rows_counted(h, false, bucket) > 0 || rows_counted(h, true, bucket) > 0) {
            lower(&shared.lowest, WeightBuckets::lower_edge(bucket));
          }
        }
      });
    }
    block.each_thread([&](uint32_t thread) {
      if (thread != 0) return;
      const uint64_t smallest = fresh(&p.scratch->smallest);
      p.scratch->least = shared.lowest < smallest ? shared.lowest : smallest;
      p.scratch->smallest = ~0ull;
      p.scratch->finished = 0;
      const bool none = fresh(&p.scratch->nothing) != 0;
      const uint64_t retries = fresh(&p.scratch->retries);
      p.scratch->nothing = p.scratch->retries = 0;
      h.retries += none && retries > kAttempts ? kAttempts : retries;  // the host gives up with the first draw
      if (none && !chosen) tell(p.flags, ReplayFlags::kNothingToSample, 0, 0, 0.0);
      if (none || (p.how & SampleParams::kKeyed) != 0) return;
      ++h.sample_calls;
      h.samples += p.n;
    });
    if (p.n > kWeighedAtOnce) return;
    block.each_thread([&](uint32_t thread) {
      for (uint64_t i = thread; i < p.n; i += block.threads) write_weight(view, p, i);
    });
  }

  // The stacks of so many draws, newest frame first; `slots`, which are used up, hold the records of that one. Where a
  // chain ends, its oldest repeats.
  ANGLE_DEVICE static void move_frames(const Warp& warp, const View& view, const SampleParams& p, uint64_t base,
                                       uint32_t draws, uint64_t* slots, uint32_t successor) {
    for (uint32_t frame = view.parts.stack; frame-- > 0;) {
      for (uint32_t f = 0; f < p.field_count; ++f) {
        const FieldOut& field = p.fields[f];
        if (field.frames == 1 || field.successor != successor) continue;
        const uint32_t kept = field.bytes / field.frames;
        uint8_t* const column = field.rows + base * field.bytes + frame * kept;
        move_field<false>(warp, view, column, slots, draws, field.offset, kept, field.bytes);
      }
      warp.each([&](int lane) {
        if (frame == 0 || static_cast<uint32_t>(lane) >= draws || slots[lane] == kNowhere) return;
        slots[lane] = view.place_of(*view.word(slots[lane], RecordLayout::kPrevious)).slot;
      });
    }
  }

  // Sums the rewards of up to n_step rows of the stream, writes what follows from that, and returns the slot of the
  // record that shows the last one's successor.
  ANGLE_DEVICE static uint64_t walk_window(const View& view, const SampleParams& p, Place at, double discount,
                                           uint64_t i) {
    uint64_t head = *view.word(at.slot, RecordLayout::kHead);
    int64_t steps = 1;
    double factor = discount;
    if (p.n_step > 1) {
      double sum = reward_at(view, p, at.slot);
      for (; steps < static_cast<int64_t>(p.n_step); ++steps) {
        const uint64_t next = *view.word(at.slot, RecordLayout::kNext);
        if (RecordHead::has(head, RecordHead::kTerminated | RecordHead::kTruncated) || next == at.ticket) break;
        const Place then = view.place_of(next);
        if (!view.code.has_lap(view.leaves()[then.slot], then.lap)) break;
        const uint64_t then_head = *view.word(then.slot, RecordLayout::kHead);
        if (!RecordHead::has(then_head, RecordHead::kRow)) break;  // an observation alone
        at = then;
        head = then_head;
        sum += factor * reward_at(view, p, at.slot);
        factor *= discount;
      }
      if (p.reward == FieldReal::kFloat) {
        reinterpret_cast<float*>(p.rewards)[i] = static_cast<float>(sum);
      } else {
        reinterpret_cast<double*>(p.rewards)[i] = sum;
      }
    }
    p.steps[i] = steps;
    p.discounts[i] = RecordHead::has(head, RecordHead::kTerminated) ? 0.0f : static_cast<float>(factor);
    if (view.parts.shares_successors == 0) return at.slot;
    return view.place_of(*view.word(at.slot, RecordLayout::kNext)).slot;
  }

  ANGLE_DEVICE static double reward_at(const View& view, const SampleParams& p, uint64_t slot) {
    return real_at(view.record(slot) + p.reward_offset, 0, p.reward);
  }
};

// The importance weights of a batch that is too large for the last block alone.
struct WeighSample {
  using Params = SampleParams;
  static constexpr uint32_t kThreads = 256;
  struct Shared {};

  ANGLE_DEVICE static void run(Block<Shared>& block, const SampleParams& p) {
    if (is_left_out(p)) return;
    const View view(p.view);
    block.each_thread([&](uint32_t thread) {
      const uint64_t i = uint64_t{block.index} * block.threads + thread;
      if (i < p.n) write_weight(view, p, i);
    });
  }
};

}  // namespace angle::device
