from __future__ import annotations

import re
from collections import Counter
from xml.etree import ElementTree as ET

import pytest

from mpitrain.schedules import ALGORITHMS, Algorithm, Round, draw_svg, draw_text

ALL = [algorithm for row in ALGORITHMS.values() for algorithm in row.values()]
by_case = pytest.mark.parametrize("size", [1, 2, 5, 16])
by_name = pytest.mark.parametrize("algorithm", ALL, ids=lambda each: each.qualified_name)
NS = "{http://www.w3.org/2000/svg}"


def rounds_by_rank(algorithm: Algorithm, size: int) -> list[list[Round]]:
    return [list(algorithm.rounds_of(rank, size, root=size - 1, num_segments=3)) for rank in range(size)]


@by_case
@by_name
def test_table_can_be_read_back(algorithm: Algorithm, size: int) -> None:
    lines = draw_text(algorithm, size, root=size - 1, num_segments=3).splitlines()
    assert lines[0].startswith(f"{algorithm.qualified_name}, {size} rank")
    rows = [line.split("|")[1:] for line in lines[3:]]
    ranks = rounds_by_rank(algorithm, size)
    assert len(rows) == len(ranks[0])
    for round_index, cells in enumerate(rows):
        for rank, cell in enumerate(cells):
            current = ranks[rank][round_index]
            found = re.findall(r"(->|<-)(\d+)(?: (\+?)\[(\d+):(\d+)\])?", cell)
            numbers = [
                (way, int(peer), sign, int(start or 0), int(stop or 0)) for way, peer, sign, start, stop in found
            ]
            expected = [("->", *send[:1], "", *send[1:]) for send in current.sends]
            expected += [("<-", each.peer, "+" * each.reduce, each.start, each.stop) for each in current.receives]
            assert numbers == expected


@by_case
@by_name
def test_picture_has_an_arrow_and_a_label_per_message(algorithm: Algorithm, size: int) -> None:
    root = ET.fromstring(draw_svg(algorithm, size, root=size - 1, num_segments=3))
    assert root.tag == f"{NS}svg"
    receives = [each for rank in rounds_by_rank(algorithm, size) for current in rank for each in current.receives]
    kinds = Counter(
        "signal" if each.start == each.stop else "reduce" if each.reduce else "replace" for each in receives
    )
    legend = Counter(["reduce", "replace", "signal"])
    arrows = Counter(line.get("class") for line in root.iter(f"{NS}line") if line.get("class"))
    assert arrows == kinds + legend
    texts = Counter(text.text for text in root.iter(f"{NS}text"))
    for each in receives:
        chunks = "" if each.start == each.stop else f"{'+' * each.reduce}[{each.start}:{each.stop}] "
        texts[f"{chunks}from {each.peer}"] -= 1
    assert min(texts.values()) >= 0
    assert all(texts[f"round {index}"] == 1 for index in range(algorithm.rounds(size, 3)))


@by_name
def test_picture_keeps_all_within_its_frame_and_labels_apart(algorithm: Algorithm) -> None:
    root = ET.fromstring(draw_svg(algorithm, 16, root=3, num_segments=9))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    boxes = []
    for text in root.iter(f"{NS}text"):
        if "from" in (text.text or ""):
            x, y = float(text.get("x", 0)), float(text.get("y", 0))
            boxes.append((x, y - 9, x + 6.7 * len(text.text or ""), y + 3))
    assert boxes
    assert all(0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height for x1, y1, x2, y2 in boxes)
    boxes.sort()
    for index, (_, top, right, bottom) in enumerate(boxes):
        for left, other_top, _, other_bottom in boxes[index + 1 :]:
            assert left >= right or other_top >= bottom or other_bottom <= top


def test_title_states_rounds_and_volume() -> None:
    picture = draw_svg(ALGORITHMS["broadcast"]["chain"], 4, root=2, num_segments=3)
    assert "broadcast_chain, 4 ranks, root 2, 3 segments: 5 rounds, a rank sends at most n" in picture
    assert "rank 2 (root)" in picture
    assert "1 rank: 0 rounds, no data is sent" in draw_text(ALGORITHMS["allreduce"]["ring"], 1)
