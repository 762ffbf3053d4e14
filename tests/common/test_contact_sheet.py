"""Every image is on the sheet, with an edge and its caption."""

import pytest
from PIL import Image

from common.contact_sheet import contact_sheet


def colours(sheet: Image.Image) -> dict[tuple[int, ...], int]:
    return {colour: count for count, colour in sheet.getcolors(sheet.width * sheet.height)}


def test_every_picture_is_on_the_sheet_whatever_its_size_and_mode():
    """Small ones are enlarged by whole factors."""
    images = [Image.new("RGB", (900, 300), (200, 0, 0)), Image.new("RGBA", (10, 40), (0, 200, 0, 255))]
    images += [Image.new("L", (2, 1), 100), Image.new("RGBA", (8, 8), (0, 0, 0, 0))]
    images[2].putpixel((1, 0), 50)
    found = colours(contact_sheet(images, columns=2, cell=120))
    assert found[(200, 0, 0)] == 120 * 40
    assert found[(0, 200, 0)] == 30 * 120
    assert found[(100, 100, 100)] == found[(50, 50, 50)] == 60 * 60, "nothing is smoothed"
    assert (0, 0, 0) not in found  # the transparent one is paper


def test_a_white_picture_has_an_edge_on_white_paper():
    sheet = contact_sheet([Image.new("L", (64, 32), 255)] * 2, ["mask", "mask"], cell=128)
    white, frame = Image.new("RGB", (128, 64), "white"), (190, 190, 190)
    for left in (8, 8 + 128 + 8):
        picture = sheet.crop((left, 8, left + 128, 8 + 64))
        assert colours(picture) == colours(white), "the frame lies outside"
        assert colours(sheet.crop((left - 1, 7, left + 129, 8 + 65)))[frame] == 2 * 130 + 2 * 64


def test_captions_take_room_below_their_row_and_long_words_are_cut():
    images = [Image.new("RGB", (32, 32))] * 3
    plain = contact_sheet(images, columns=2)
    short = contact_sheet(images, ["a", "b", "c"], columns=2)
    long = contact_sheet(images, ["a", "word " * 30, "c"], columns=2)
    endless = contact_sheet(images, ["a", "w" * 5000, "c\nd\n"], columns=2, title="Generated images")
    assert plain.width == short.width == long.width == endless.width
    assert plain.height < short.height < long.height
    assert endless.height < 3 * long.height  # it is cut off
    right_edge = colours(endless.crop((endless.width - 4, 0, endless.width, endless.height)))
    assert set(right_edge) == {(255, 255, 255)}, "no text runs out of its column"


def test_a_sheet_of_16_has_4_columns_and_wrong_counts_are_our_mistake():
    sheet = contact_sheet([Image.new("RGB", (64, 64))] * 16)
    assert abs(sheet.width - sheet.height) < 128
    with pytest.raises(AssertionError, match="2 captions"):
        contact_sheet([Image.new("RGB", (8, 8))], ["a", "b"])


def test_a_text_stands_in_the_place_of_an_image():
    image = Image.new("RGB", (64, 64), "red")
    empty, short, long = (
        contact_sheet([image, text, image], columns=3, cell=128).crop((144, 0, 272, 144))
        for text in (None, "a cat", "a cat " * 200)
    )
    assert set(colours(empty)) == {(255, 255, 255)}, "nor has it a frame"
    ink = [sum(count for colour, count in colours(sheet).items() if sum(colour) < 300) for sheet in (short, long)]
    assert 0 < ink[0] < ink[1]
    assert contact_sheet(["a cat"]).width == 8 + 128 + 8
