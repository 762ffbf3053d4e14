"""How items are thinned out, dealt to processes, and their pictures read."""

import pytest
from PIL import Image

from evaluation.answers import AnswerStore
from evaluation.official_files import read_json_lines, write_json_lines
from evaluation.runner import Processes, read_images, share, thin
from evaluation.task import Item

ITEMS = [Item(str(n), f"q{n}", group=f"g{n // 2}") for n in range(20)]


def test_thin_takes_whole_groups_evenly():
    assert thin(ITEMS, None) == thin(ITEMS, 20) == ITEMS
    assert [item.key for item in thin(ITEMS, 5)] == ["0", "1", "10", "11"]
    assert [item.key for item in thin(ITEMS, 1)] == ["0", "1"]  # a group at least
    assert len(thin(ITEMS, 19)) == 18


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_item_is_dealt_once_in_the_same_batches(count):
    alone = list(share(ITEMS, ITEMS, 3, Processes()))
    assert [len(batch) for _, batch, _ in alone] == [3] * 6 + [2] and all(b == w for _, b, w in alone)
    dealt = [batch for rank in range(count) for batch in share(ITEMS, ITEMS, 3, Processes(rank, count))]
    assert sorted(dealt, key=lambda batch: batch[0]) == alone


def test_what_is_answered_leaves_the_batches_as_they_were():
    rest = list(share(ITEMS, ITEMS[4:], 3, Processes()))
    found = [(number, [i.key for i in batch], [i.key for i in wanted]) for number, batch, wanted in rest[:2]]
    assert found == [(1, ["3", "4", "5"], ["4", "5"]), (2, ["6", "7", "8"], ["6", "7", "8"])]


def test_a_picture_that_recurs_is_read_once():
    read = []

    def reader(name: str):
        return lambda: (read.append(name), Image.new("RGB", (2, 2)))[1]

    items = [Item(str(n), "q", reader(name), name) for n, name in enumerate("aabc")]
    batches = list(read_images([items[:3], items[3:]]))
    assert sorted(read) == ["a", "b", "c"]
    assert batches[0][0] is batches[0][1] and len(batches[1]) == 1


def test_only_a_newline_ends_a_line(tmp_path):
    """Other separators of Unicode stand in texts as they are: `json.dumps` escapes none of them."""
    text = "one\u2028two\u2029three\x85four"
    store, item = AnswerStore(tmp_path, {}), Item("1", f"{text}?")
    store.add(0, [item], [text])
    assert store.read([item]) == {"1": text}
    write_json_lines(tmp_path / "lines.jsonl", [{"text": text}, {"text": "x"}])
    found = list(read_json_lines(tmp_path / "lines.jsonl", "lines"))
    assert [record["text"] for _, record in found] == [text, "x"] and found[1][0].endswith("line 2")
