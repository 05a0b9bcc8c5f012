"""What the device reaches at best: bandwidth of a large copy, from host memory too, and the cost of a launch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from angle_rl.bench.gpu_timing import Case, Ceilings, Place

TORCH = "torch"
NODES = 500  # of the graph whose kernels do next to nothing


def measure_ceilings(place: Place) -> None:
    """Fills `place.ceilings`, and a row for each figure."""
    with place.part("copy on the device"):
        place.measure("copy", [_copies(place, from_host=False)], batch=1, rows="bytes")
    with place.part("copy from pinned host memory"):
        place.measure("copy_from_host", [_copies(place, from_host=True)], batch=1, rows="bytes")
    with place.part("launches"):
        _launches(place)
    rows = {row.operation: row for row in place.found.rows}
    known: dict[str, float] = {}
    for name, operation in (("bandwidth", "copy"), ("host_bandwidth", "copy_from_host")):
        if operation in rows:
            known[name] = rows[operation].extra["bytes"] / rows[operation].median_us * 1e6
            place.found.about[f"{name}_gb_s"] = known[name] / 1e9
    if "graph_node" in rows:
        known["node_us"] = place.found.about["graph_node_us"] = rows["graph_node"].median_us
    place.ceilings = Ceilings(**known)


def _copies(place: Place, *, from_host: bool) -> Case:
    """A copy far larger than the caches, of random numbers; its bytes count read and written on the device."""
    size = place.choose(2**31, 2**30, 2**16) // (8 if from_host else 1)
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=place.device, generator=place.generator())
    target = torch.empty_like(source)
    if from_host:
        source = source.cpu().pin_memory() if place.real else source.cpu()
    target.copy_(source)
    if not torch.equal(target[-4096:].cpu(), source[-4096:].cpu()):
        raise RuntimeError("the copy is not what was copied")
    return Case(
        library=TORCH,
        call=lambda: target.copy_(source, non_blocking=True),
        extra={"bytes": size if from_host else 2 * size},
    )


def _launches(place: Place) -> None:
    """A node of a long graph, the launch of a graph of one node, and a launch from Python."""
    number = torch.zeros(1, device=place.device)

    def fill() -> object:
        return number.fill_(1.0)

    def many() -> None:
        for _ in range(NODES):
            fill()

    cases: list[tuple[str, Callable[[], object], int]] = [
        ("graph_node", place.captured(many), NODES),
        ("graph_launch", place.captured(fill), 1),
        ("launch", fill, 1),
    ]
    for operation, call, calls in cases:
        place.measure(operation, [Case(library=TORCH, call=call, calls=calls)], batch=1)
