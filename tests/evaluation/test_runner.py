"""How items are thinned out, dealt to processes, and their images read; how answers are stored."""

import pytest
from PIL import Image

from common.errors import UserError
from evaluation.answers import AnswerStore
from evaluation.output import Output
from evaluation.runner import Processes, Run, read_images, share, thin
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


def test_an_image_that_recurs_is_read_once():
    read = []

    def reader(name: str):
        return lambda: (read.append(name), Image.new("RGB", (2, 2)))[1]

    items = [Item(str(n), "q", reader(name), name) for n, name in enumerate("aabc")]
    batches = list(read_images([items[:3], items[3:]]))
    assert sorted(read) == ["a", "b", "c"]
    assert batches[0][0] is batches[0][1] and len(batches[1]) == 1


def test_answers_on_disk(tmp_path):
    """Only a newline ends a line; missing answers and unreadable settings are named."""
    text = "one\u2028two\u2029three\x85four"
    store, item = AnswerStore(Output(tmp_path), {}), Item("t", f"{text}?")
    store.add(0, [item], [text])
    assert store.read([item]) == {"t": text}
    with pytest.raises(UserError, match="20 answers are missing; start the same command again"):
        Run(None, [item, *ITEMS], 21, store, {}).complete()
    store.begin()
    for content in ("{", "[]", "[" * 100_000):
        (tmp_path / "settings.json").write_text(content)
        with pytest.raises(UserError, match="settings.json .*(no valid JSON|expected an object)"):
            store.check()
