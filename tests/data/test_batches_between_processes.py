"""Items cross the border between processes as few large tensors, and come out as they went in."""

import torch

from training.data.streams import Batch, pack, stack, unpack


def items() -> list[dict]:
    return [
        {"image": torch.full((3, 4, 4), float(n)), "input_ids": torch.arange(n + 1), "text": f"text {n}"}
        for n in range(3)
    ]


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[k], right[k]) if isinstance(left[k], torch.Tensor) else left[k] == right[k] for k in left
    )


def tensors(packed) -> int:
    return sum(isinstance(column, torch.Tensor) for column in packed.values())


def test_items_come_out_as_they_went_in():
    batch = unpack(pack(items()))
    assert isinstance(batch, list) and len(batch) == 3
    assert all(equal(left, right) for left, right in zip(batch, items(), strict=True))


def test_there_is_one_tensor_for_each_key_not_for_each_item():
    assert tensors(pack(items())) == 1, "input_ids differ in length"
    batch = unpack(pack(items()))
    assert batch.stacked["image"].shape == (3, 3, 4, 4)
    assert batch[1]["image"].data_ptr() == batch.stacked["image"][1].data_ptr(), "rows of it, not copies"
    assert "input_ids" not in batch.stacked, "they differ in length"


def test_texts_and_batches_of_mixed_items_stay_as_they_are():
    assert unpack(pack(["a", "b"])) == ["a", "b"]
    mixed = [{"image": torch.zeros(3, 4, 4), "text": "a"}, {"codes": torch.zeros(16), "text": "b"}]
    assert all(equal(left, right) for left, right in zip(unpack(pack(mixed)), mixed, strict=True))


def test_stacking_takes_what_is_stacked_already():
    batch = unpack(pack(items()))
    pixels, texts = stack(batch, "image"), [item["text"] for item in batch]
    assert pixels is batch.stacked["image"]
    assert texts == ["text 0", "text 1", "text 2"]
    assert torch.equal(stack(batch[:2], "image"), pixels[:2]), "a part of a batch is a plain list"
    assert torch.equal(stack(items(), "image"), pixels)
    assert Batch(["a"]).stacked == {}
