"""Faults that the native tests must find: each is a change of csrc's text and the test that fails on it.

What the replay promises, by number:
1 rows are whole and had weight, 2 exact sums at rest, 3 draws are off by no more than the weight in flight,
4 no priority on another row, 5 nobody waits, 6 reproducible, 7 a killed process costs only what it was writing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mutation:
    """One fault.

    Attributes:
        name: Names the test.
        promise: Which promise breaks, 1 to 7.
        edits: (file below csrc, text that occurs in it exactly once, replacement).
        caught_by: ("schedule", scenario) or ("native", name of a doctest case, * for any text).
    """

    name: str
    promise: int
    edits: tuple[tuple[str, str, str], ...]
    caught_by: tuple[str, str]


ACCESS = "core/access.h"
TREE = "core/tree.h"
COUNTS = "core/counts.h"
REPLAY = "core/replay.h"
INSERT = "core/insert.inl"
SAMPLE = "core/sample.inl"
CHOOSE = "core/choose.inl"
UPDATE = "core/update.inl"
CARE = "core/care.inl"
KERNELS = "kernels/replay.inl"

PUBLISH_LAST = """at.ticket, own.priority);
  publish(writer, at, own);
  if (static_cast"""
PUBLISH = "  tree_.leaf(at.slot).store(leaf, std::memory_order_release);\n"
CLAIM = """    if (code.state(found) == LeafCode::kBusy || passed) return false;
"""
UPDATE_FOUND = "if (at.lap + laps_told_apart >= issued_lap && code.has_lap(found, at.lap) && code.is_row(found)) {"
UPDATE_LEAF = "        while (code.has_lap(found, at.lap) && code.is_row(found)) {\n"
UPDATE_SWAP = "if (leaf.compare_exchange_weak(found, next, std::memory_order_acq_rel, std::memory_order_relaxed)) {"
UPDATE_LOOP = """    for (size_t i = 0; i < n; ++i) {
      if (i + kAhead < n) prefetch(i + kAhead);
"""
SUM_ADD = "tree_.sum(top, node).fetch_add(pending_, std::memory_order_relaxed);"
RECHECK = "if (code.lap(now) != code.lap(word) || !code.is_row(now)) [[unlikely]] {"
LEAF_READ = "static uint64_t load_node(const uint64_t* node) { return word(node).load(std::memory_order_acquire); }"

MUTATIONS = (
    # 1: rows are whole and had weight.
    Mutation(
        name="sample without looking at the leaf again",
        promise=1,
        edits=((SAMPLE, RECHECK, "if (now == 0) {"),),
        caught_by=("schedule", "insert_sample_one_slot"),
    ),
    Mutation(
        name="sample looks again for the state only",
        promise=1,
        edits=((SAMPLE, RECHECK, "if (!code.is_row(now)) {"),),
        caught_by=("schedule", "insert_sample_one_slot"),
    ),
    Mutation(
        name="publish before the record is written",
        promise=1,
        edits=(
            (INSERT, PUBLISH_LAST, PUBLISH_LAST.replace("  publish(writer, at, own);\n", "")),
            (
                INSERT,
                """  const RowWeight own = weigh(writer, rows, row);
  write_fields(at.slot, rows, row);
  write_header(""",
                """  const RowWeight own = weigh(writer, rows, row);
  publish(writer, at, own);
  write_fields(at.slot, rows, row);
  write_header(""",
            ),
        ),
        caught_by=("schedule", "insert_sample_one_slot"),
    ),
    Mutation(
        name="claim a busy slot",
        promise=1,
        edits=((INSERT, CLAIM, "    if (passed) return false;\n"),),
        caught_by=("schedule", "insert_on_itself"),
    ),
    Mutation(
        name="publish without release",
        promise=1,
        edits=((INSERT, PUBLISH, PUBLISH.replace("release", "relaxed")),),
        caught_by=("schedule", "insert_sample_one_slot"),
    ),
    Mutation(
        name="read the leaf without acquire",
        promise=1,
        edits=((ACCESS, LEAF_READ, LEAF_READ.replace("acquire", "relaxed")),),
        caught_by=("schedule", "insert_sample_one_slot"),
    ),
    Mutation(
        name="copy without acquire",
        promise=1,
        edits=(
            (
                ACCESS,
                "word(reinterpret_cast<const Piece*>(in + done)).load(std::memory_order_acquire)",
                "word(reinterpret_cast<const Piece*>(in + done)).load(std::memory_order_relaxed)",
            ),
        ),
        caught_by=("schedule", "insert_sample_one_slot"),
    ),
    Mutation(
        name="write a field without release",
        promise=1,
        edits=(
            (
                ACCESS,
                "word(reinterpret_cast<Piece*>(out + done)).store(piece, std::memory_order_release)",
                "word(reinterpret_cast<Piece*>(out + done)).store(piece, std::memory_order_relaxed)",
            ),
        ),
        caught_by=("schedule", "insert_sample_one_slot"),
    ),
    Mutation(
        name="draw rows of weight 0",
        promise=1,
        edits=((REPLAY, "slot != kLost && tree_.code.weight(leaf) != 0 &&", "slot != kLost &&"),),
        caught_by=("schedule", "weight_on_one_row"),
    ),
    Mutation(
        name="a window goes on in an overwritten row",
        promise=1,
        edits=(
            (
                SAMPLE,
                """      const Place at{0, s.walk[i], s.walk_laps[i]};
      if (!has_lap(at)) {
""",
                """      const Place at{0, s.walk[i], s.walk_laps[i]};
      if (s.walk_laps[i] == 0) {
""",
            ),
        ),
        caught_by=("schedule", "windows"),
    ),
    Mutation(
        name="a shared successor may be another record's",
        promise=1,
        edits=(
            (
                SAMPLE,
                "if (s.ends[i] != kLost && !has_lap({0, s.ends[i], s.end_laps[i]})) {",
                "if (s.ends[i] != kLost && s.end_laps[i] == 0) {",
            ),
        ),
        caught_by=("schedule", "shared_successors"),
    ),
    Mutation(
        name="a shared row is marked before it is linked",
        promise=1,
        edits=(
            (
                INSERT,
                "  word_at(at.slot, RecordLayout::kNext).store(next.ticket, std::memory_order_release);\n",
                "",
            ),
            (
                INSERT,
                "  tail.store(flags != 0",
                """  word_at(at.slot, RecordLayout::kNext).store(next.ticket, std::memory_order_release);
  tail.store(flags != 0""",
            ),
        ),
        caught_by=("schedule", "shared_successors"),
    ),
    Mutation(
        name="an open record is completed without marking it busy",
        promise=1,
        edits=(
            (
                INSERT,
                "return leaf.compare_exchange_strong(found, code.make(at.lap, LeafCode::kBusy, 0),",
                "return true || leaf.compare_exchange_strong(found, code.make(at.lap, LeafCode::kBusy, 0),",
            ),
        ),
        caught_by=("schedule", "shared_streams"),
    ),
    Mutation(
        name="a claim does not acquire",
        promise=1,
        edits=(
            (
                INSERT,
                """std::memory_order_acq_rel,
                                   std::memory_order_relaxed)) {
      *old_leaf = found;""",
                """std::memory_order_release,
                                   std::memory_order_relaxed)) {
      *old_leaf = found;""",
            ),
        ),
        caught_by=("schedule", "insert_on_itself"),
    ),
    Mutation(
        name="a stack's row stays when a frame is overwritten",
        promise=1,
        edits=((INSERT, "if (replay.record_.stack > 1 && ", "if (replay.record_.stack > 99 && "),),
        caught_by=("schedule", "stacks"),
    ),
    Mutation(
        name="a stack's row is published though a frame is gone",
        promise=1,
        edits=((INSERT, "(record_.stack > 1 && !frames_live(at.ticket))", "(record_.stack > 99)"),),
        caught_by=("schedule", "stacks_cut"),
    ),
    Mutation(
        name="a shared row that the ring passed stays",
        promise=1,
        edits=((INSERT, "if (passed || ", "if ("),),
        caught_by=("schedule", "shared_streams"),
    ),
    Mutation(
        name="a batch without replacement forgets what it took",
        promise=1,
        edits=((CHOOSE, "    overlay.take(s.slots[i], tree_.code.weight(s.words[i]));\n", ""),),
        caught_by=("schedule", "without_replacement"),
    ),
    Mutation(
        name="a descent at the right edge takes the last child",
        promise=1,
        edits=(
            (
                KERNELS,
                """    index[i] = found == fan ? kLost : index[i] * fan + found;
  }
}

void descend_leaves(""",
                """    index[i] = index[i] * fan + (found == fan ? fan - 1 : found);
  }
}

void descend_leaves(""",
            ),
        ),
        caught_by=("native", "a descent ends in the child that holds the target*"),
    ),
    # 2: exact sums at rest.
    Mutation(
        name="add to a sum in two steps",
        promise=2,
        edits=(
            (
                TREE,
                SUM_ADD,
                """const auto cell = tree_.sum(top, node);
        cell.store(cell.load(std::memory_order_relaxed) + pending_, std::memory_order_relaxed);""",
            ),
        ),
        caught_by=("schedule", "update_same_row"),
    ),
    Mutation(
        name="keep the weight of an overwritten row in the sums",
        promise=2,
        edits=((INSERT, "    if (replay.prioritized()) changes.add(slot, old_leaf, 0);\n", ""),),
        caught_by=("schedule", "insert_blocks"),
    ),
    Mutation(
        name="keep the old weight of an updated row in the sums",
        promise=2,
        edits=(
            (
                UPDATE,
                "changes.add(at.slot, found, next);",
                "changes.add(at.slot, 0, next);",
            ),
        ),
        caught_by=("schedule", "update_same_row"),
    ),
    Mutation(
        name="an update does not look for another one of its row",
        promise=2,
        edits=((UPDATE, "if (now != own) [[unlikely]] {", "if (now == 0) {"),),
        caught_by=("schedule", "update_same_row"),
    ),
    Mutation(
        name="an update's leaf does not release",
        promise=2,
        edits=((UPDATE, UPDATE_SWAP, UPDATE_SWAP.replace("acq_rel", "acquire")),),
        caught_by=("schedule", "update_same_row"),
    ),
    Mutation(
        name="an update misses a new exponent",
        promise=2,
        edits=((UPDATE, "  if (priority_exponent() != map.exponent) {\n", "  if (false) {\n"),),
        caught_by=("schedule", "exponent_update_insert"),
    ),
    Mutation(
        name="an insert misses a new exponent",
        promise=2,
        edits=(
            (
                INSERT,
                "if (prioritized() && word(h.exponent).load(std::memory_order_acquire) != exponent) {",
                "if (exponent == 0) {",
            ),
        ),
        caught_by=("schedule", "exponent_update_insert"),
    ),
    Mutation(
        name="a synced leaf is not compared with the priority again",
        promise=2,
        edits=(
            (
                UPDATE,
                "if (priority.load(std::memory_order_acquire) == seen && priority_exponent() == map.exponent) return;",
                "if (seen != 0) return;",
            ),
        ),
        caught_by=("schedule", "update_same_row"),
    ),
    Mutation(
        name="counts are added to without a claim",
        promise=2,
        edits=(
            (
                COUNTS,
                ".compare_exchange_strong(free, 1, std::memory_order_acquire, std::memory_order_relaxed);",
                ".load(std::memory_order_relaxed) >= free;",
            ),
        ),
        caught_by=("schedule", "update_same_row"),
    ),
    Mutation(
        name="a claim of counts does not acquire",
        promise=2,
        edits=((COUNTS, "(free, 1, std::memory_order_acquire,", "(free, 1, std::memory_order_relaxed,"),),
        caught_by=("schedule", "update_same_row"),
    ),
    # 3: draws are off by no more than the weight in flight.
    Mutation(
        name="sums overshoot on their way",
        promise=3,
        edits=(
            (
                TREE,
                SUM_ADD,
                """tree_.sum(top, node).fetch_add(1000 * pending_, std::memory_order_relaxed);
        tree_.sum(top, node).fetch_add(-999 * pending_, std::memory_order_relaxed);""",
            ),
        ),
        caught_by=("schedule", "weight_in_flight"),
    ),
    Mutation(
        name="a negative sum counts",
        promise=3,
        edits=((KERNELS, "    total += prefix[i] > 0 ? prefix[i] : 0;\n", "    total += prefix[i];\n"),),
        caught_by=("native", "prefix sums and location read negative sums as nothing"),
    ),
    Mutation(
        name="a total of 0 under way is taken for an empty buffer",
        promise=3,
        edits=(
            (
                SAMPLE,
                "if (total <= 0 && inserts_are_done() && !choose_by_scan(0, {}, scans, nullptr, s)) {",
                "if (total <= 0 && inserts_are_done()) {",
            ),
        ),
        caught_by=("schedule", "remove_update_sample"),
    ),
    # 4: no priority on another row.
    Mutation(
        name="an update does not look at the leaf's lap",
        promise=4,
        edits=((UPDATE, UPDATE_LEAF, "        while (code.is_row(found)) {\n"),),
        caught_by=("schedule", "update_overwritten_row"),
    ),
    Mutation(
        name="an update stores its leaf instead of swapping it",
        promise=4,
        edits=((UPDATE, UPDATE_SWAP, "leaf.store(next, std::memory_order_release);\n          {"),),
        caught_by=("schedule", "update_overwritten_row"),
    ),
    Mutation(
        name="a late update puts its priority over the next row's",
        promise=4,
        edits=((UPDATE, "if (RecordPriority::is_before(now, at.lap)) {", "if (now != own) {"),),
        caught_by=("schedule", "update_late_flat"),
    ),
    Mutation(
        name="a new exponent mends priorities that are none of its row's",
        promise=4,
        edits=(
            (
                UPDATE,
                "while (code.has_lap(s.words[i], s.slots[i]) && !RecordPriority::has_lap(s.bits[i], s.slots[i])) {",
                "while (!RecordPriority::has_lap(s.bits[i], s.slots[i])) {",
            ),
            (
                UPDATE,
                """          if (word_at(first + i, RecordLayout::kPriority)
                  .compare_exchange_strong(s.bits[i], mended, std::memory_order_acq_rel, std::memory_order_acquire)) {
""",
                """          word_at(first + i, RecordLayout::kPriority).store(mended, std::memory_order_release);
          {
""",
            ),
        ),
        caught_by=("schedule", "exponent_update_insert"),
    ),
    Mutation(
        name="of equal handles the first wins",
        promise=4,
        edits=((UPDATE, UPDATE_LOOP, "    for (size_t i = n; i-- > 0;) {\n"),),
        caught_by=("schedule", "alone"),
    ),
    Mutation(
        name="an update brings a removed row back",
        promise=4,
        edits=((UPDATE, UPDATE_LEAF, "        while (code.has_lap(found, at.lap)) {\n"),),
        caught_by=("schedule", "remove_update_sample"),
    ),
    # 5: nobody waits, and nothing is lost.
    Mutation(
        name="a writer waits for a busy slot",
        promise=5,
        edits=(
            (
                INSERT,
                CLAIM,
                """    if (passed) return false;
    if (code.state(found) == LeafCode::kBusy) {
      found = leaf.load(std::memory_order_relaxed);
      continue;
    }
""",
            ),
        ),
        caught_by=("schedule", "insert_on_itself"),
    ),
    Mutation(
        name="tickets of busy slots are not counted",
        promise=5,
        edits=((INSERT, "    for (;; ++given_up) {\n", "    for (;;) {\n"),),
        caught_by=("schedule", "insert_on_itself"),
    ),
    Mutation(
        name="the largest priority is lowered under a writer's hands",
        promise=5,
        edits=((COUNTS, "      counts_.raise_highest(highest);\n", ""),),
        caught_by=("schedule", "live_maximum"),
    ),
    Mutation(
        name="the largest priority is looked for before its counts are seen",
        promise=5,
        edits=(
            (
                COUNTS,
                "word(header_->counts[set].claimed).fetch_add(0, std::memory_order_acq_rel);",
                "static_cast<void>(set);",
            ),
        ),
        caught_by=("schedule", "live_maximum_again"),
    ),
    # 6: reproducible.
    Mutation(
        name="the count of calls stands still",
        promise=6,
        edits=((SAMPLE, "word(h.sample_calls).fetch_add(1,", "word(h.sample_calls).fetch_add(0,"),),
        caught_by=("schedule", "alone"),
    ),
    Mutation(
        name="the seed is ignored",
        promise=6,
        edits=((SAMPLE, "philox_draws(source.seed, source.call,", "philox_draws(0, source.call,"),),
        caught_by=("schedule", "alone"),
    ),
    # 7: a killed process costs only what it was writing.
    Mutation(
        name="repair leaves busy slots",
        promise=7,
        edits=(
            (
                CARE,
                """    if (code.state(found) == LeafCode::kBusy) {
      // Whatever""",
                """    if (found == 1) {
      // Whatever""",
            ),
        ),
        caught_by=("schedule", "killed_writer"),
    ),
    Mutation(
        name="repair leaves the sums",
        promise=7,
        edits=(
            (
                CARE,
                "++node) put(tree_.sum(level, node), truth.sums[level][node]);",
                "++node) put(tree_.sum(level, node), tree_.sum(level, node).load(std::memory_order_relaxed));",
            ),
        ),
        caught_by=("schedule", "killed_learner"),
    ),
    Mutation(
        name="repair leaves weights that do not fit their priorities",
        promise=7,
        edits=((CARE, "    } else if (weight_is_off(slot, found, map, &due)) {\n", "    } else if (false) {\n"),),
        caught_by=("schedule", "killed_learner"),
    ),
    Mutation(
        name="audit overlooks busy slots",
        promise=7,
        edits=((CARE, "  report(busy, ", "  report(0 * busy, "),),
        caught_by=("schedule", "killed_writer"),
    ),
)
