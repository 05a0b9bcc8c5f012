"""The device benchmark: all of it runs by the kernels for the host, and goals are read off the rows as they should."""

from __future__ import annotations

import json
import math

import pytest
import torch

from angle_rl import device
from angle_rl.bench import gpu
from angle_rl.bench.gpu import main
from angle_rl.bench.gpu_goals import device_table, judge_device
from angle_rl.bench.gpu_lean import LeanStyle
from angle_rl.bench.gpu_measure import run_apart, settings_from_json
from angle_rl.bench.gpu_ops import OPERATIONS, Operation, _check
from angle_rl.bench.gpu_replay import cycle_bytes
from angle_rl.bench.gpu_timing import FEWEST_SETS, SECTIONS, Ceilings, Place, Settings, turns
from angle_rl.bench.gpu_updates import PRODUCTS
from angle_rl.bench.learners import check_learner, random_rows
from angle_rl.bench.report import summarize
from angle_rl.bench.rows import HALFCHEETAH

OURS = ("angle", "angle-cuda_graph", "angle-torch")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """What one emulated run printed and wrote."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr(
            "builtins.print", lambda *words, file=None, **_: file or printed.append(" ".join(map(str, words)))
        )
        status = main(["--emulated", "--quick", "--json", str(path)])
    return status, "\n".join(printed), json.loads(path.read_text())


def test_all_of_it_runs_by_the_kernels_for_the_host(emulated):
    status, _, written = emulated
    assert (status, written["metadata"]["failed"]) == (0, [])
    assert not [note for note in written["notes"] if "torchrl" not in note]
    ran = {(row["operation"], row["library"]) for row in written["rows"]}
    replay = ("sample_update", "sample_update_graph", "insert_host", "insert_device", "sample_frames", "insert_frames")
    for operation in replay:
        assert {(operation, "angle"), (operation, "floor")} <= ran
    for operation in OPERATIONS:
        for name in (operation.name, f"{operation.name}_graph"):
            assert {(name, "angle"), (name, "torch"), (name, "floor")} <= ran
    for library in ("angle-cuda_graph", "angle-torch", "lean-style", "lean-style, not compiled", "floor"):
        assert ("learner_update", library) in ran
    assert {("wide_update", "angle-cuda_graph"), ("wide_update", "angle-torch"), ("graph_node", "torch")} <= ran
    assert {row["rows"] for row in written["rows"]} >= {"halfcheetah", "4 KB", "float32", "bfloat16"}


def test_an_emulated_run_shows_no_figure(emulated):
    _, printed, written = emulated
    assert written["metadata"]["emulated"]
    assert all(row[name] is None for row in written["rows"] for name in ("median_us", "min_us", "max_us"))
    assert not any(name.endswith(("_us", "_gb_s")) for name in written["metadata"])
    ran = {goal["work"]: goal["ran"] for goal in written["goals"]}
    table = printed.split("\n\n")[-1].splitlines()  # the last that is printed
    assert table[0].startswith("goal")
    assert len(table) == 1 + len(ran) == 10
    assert all(value for work, value in ran.items() if "TorchRL" not in work)
    for line in table[1:]:
        assert "ran " in line or "not measured" in line
        assert "missed" not in line


def test_without_a_device_one_line_says_why(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("angle bench gpu cannot run: device is cuda, but torch finds no CUDA device")


def test_sections_are_known_by_name(capsys):
    assert SECTIONS[0] == "ceilings"
    assert set(gpu.LIMITS) == set(SECTIONS)
    with pytest.raises(SystemExit):
        main(["--emulated", "--only", "replays"])
    assert "'replays' does not name sections" in capsys.readouterr().err


# Goals ----------


def row(library, operation, us, batch, capacity=10_000_000, rows="halfcheetah", **extra):
    return summarize(library, operation, [us], capacity=capacity, batch=batch, threads=1, rows=rows, **extra)


ROWS = [
    row("angle", "sample_update", 40.0, 65_536),
    row("angle", "sample_update", 20.0, 65_536, out=True),
    row("torchrl", "sample_update", 1000.0, 65_536),
    row("floor", "sample_update", 8.0, 65_536),
    row("angle", "sample_update", 30.0, 256),
    row("angle", "sample_update_graph", 14.0, 256, pairs_a_launch=1),
    row("angle", "sample_update_graph", 9.0, 256, pairs_a_launch=50),
    row("floor", "sample_update_graph", 3.0, 256),
    row("angle", "sample_update_graph", 24.0, 65_536),
    row("angle", "sample_update_graph", 200.0, 65_536, 1_000_000, "4 KB"),
    row("floor", "sample_update_graph", 100.0, 65_536, 1_000_000, "4 KB"),
    row("angle-torch", "learner_update", 900.0, 256, 1_000_000),
    row("angle-cuda_graph", "learner_update", 200.0, 256, 1_000_000),
    row("angle-cuda_graph", "learner_update", 110.0, 256, 1_000_000, updates_a_call=8),
    row("lean-style", "learner_update", 330.0, 256, 1_000_000),
    row("lean-style, not compiled", "learner_update", 350.0, 256, 1_000_000),
    row("floor", "learner_update", 50.0, 256, 1_000_000),
    row("angle-cuda_graph", "wide_update", 9000.0, 32_768, 200_000, "width 1024, highest", products_share=0.9),
    row("angle-torch", "wide_update", 9500.0, 32_768, 200_000, "width 1024, highest", products_share=0.5),
]


def test_goals_are_ratios_of_what_stands_side_by_side():
    found = {verdict.work: verdict for verdict in judge_device(ROWS)}
    large = found["sample + update 65,536 of 10M: times TorchRL's"]
    assert (large.measured, large.met, large.peer_name, large.over_floor) == (25.0, True, "torchrl", 5.0)
    small = found["sample + update 256 of 10M in a graph"]
    assert (small.measured, small.met, small.over_floor) == (9.0, True, 3.0)
    pages = found["sample + update 65,536 rows of 4 KB, of 1M: times the bytes' floor"]
    assert (pages.measured, pages.words()) == (2.0, "missed by 1.33x")
    one = found["SAC update, 1 a call: times lean-style's"]
    assert (one.measured, one.words(), one.over_floor) == (1.65, "missed by 1.21x", 4.0)
    assert found["SAC update, 1 a call"].measured == pytest.approx(5000)
    assert found["SAC update, 8 a call: times lean-style's"].met
    assert found["SAC update, 8 a call"].met
    assert found["share of products, batch 32,768, width 1024, highest"].measured == 0.9
    table = device_table(found.values())
    assert "missed by 1.33x" in table
    assert "(lean-style)" in table


def test_every_goal_stands_there_where_nothing_was_measured():
    verdicts = judge_device([])
    assert [verdict.met for verdict in verdicts] == [None] * 6
    assert device_table(verdicts).count("not measured") == 6


def test_the_floor_is_the_larger_of_bytes_and_kernels():
    ceilings = Ceilings(bandwidth=4e12, node_us=1.5)
    assert ceilings.floor_us(4_000_000, 2) == 3.0
    assert ceilings.floor_us(40_000_000, 2) == pytest.approx(10.0)
    assert Ceilings().floor_us(40_000_000, 2) == 0.0
    assert cycle_bytes(HALFCHEETAH, 2) == 2 * (2 * 164 + 40 + 36)


def test_kernels_of_products_are_known_by_name():
    products = (
        "nvjet_tst_128x64",
        "sm90_xmma_gemm_f32f32",
        "void cutlass::Kernel2<x>",
        "cublasLt::splitKreduce_kernel",
    )
    others = ("angle::device::kernel<SampleRows>", "multi_tensor_apply_kernel", "Memcpy DtoD", "aten::add", "aten::mul")
    assert all(PRODUCTS.search(name) for name in (*products, "aten::mm", "aten::addmm", "aten::baddbmm", "aten::bmm"))
    assert not any(PRODUCTS.search(name) for name in others)


# Parts ----------


@pytest.fixture
def place():
    with device.emulated():
        yield Place(Settings(section="ops", emulated=True))


def test_what_fails_is_noted_and_the_rest_goes_on(place, capsys):
    with place.part("first"):
        raise RuntimeError("it broke")
    with place.part("a peer's", ours=False):
        raise ImportError("it is not there")
    with place.part("second"):
        place.measure("nothing", [], batch=1)
    assert place.found.notes == ["ops, first: it broke", "ops, a peer's: it is not there"]
    assert place.failed == ["first"]
    assert "it broke" in capsys.readouterr().err


def test_wrong_answers_of_an_operation_are_found(place):
    right = OPERATIONS[0]
    _check(place, right, torch.float32, 64)
    fields = {name: getattr(right, name) for name in Operation.__dataclass_fields__}
    wrong = Operation(**{**fields, "ours": lambda *inputs: (right.ours(*inputs)[0] * 1.001,)})
    with pytest.raises(RuntimeError, match="twin_q_target: output 0 is off by"):
        _check(place, wrong, torch.float32, 64)


def test_the_peers_updates_change_everything(place):
    torch.manual_seed(0)
    lean = LeanStyle(place, 64, 32, compiled=False)
    lean.fill(random_rows(64))
    check_learner(lean)
    assert lean.coefficient.item() != 1.0
    assert math.isclose(lean.coefficient.item(), lean.log_coefficient.exp().item())


def test_calls_take_turns(place):
    seen = []
    call = turns([lambda: seen.append("a"), lambda: seen.append("b")])
    for _ in range(3):
        call()
    assert seen == ["a", "b", "a"]
    assert place.sets(1.0) < FEWEST_SETS


def test_a_section_in_a_process_of_its_own_gives_back_what_it_found(tmp_path):
    settings = Settings(section="ceilings", emulated=True, ceilings=Ceilings(bandwidth=1.0))
    assert settings_from_json(json.dumps({**settings.__dict__, "ceilings": settings.ceilings.__dict__})) == settings
    found, failed, ceilings = run_apart(settings, seconds=60.0)
    assert not failed
    assert {row.operation for row in found.rows} >= {"copy", "graph_node"}
    assert ceilings.bandwidth > 1.0
    found, failed, _ = run_apart(settings, seconds=0.01)
    assert failed == ["ceilings"]
    assert found.notes == ["ceilings: it was ended after 0 s"]
