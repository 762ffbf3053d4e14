"""Tables of separated values: a row that does not parse costs only itself."""

import pytest

from training.data.delimited import UNBALANCED, Delimited


def rows_of(text: str, text_is_last: bool = True) -> list:
    """The last cell of each row, or (line, problem) of one that does not parse."""
    return [(row.line, row.problem) if row.problem else row.cells[-1] for row in Delimited(text).rows(text_is_last)]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["0.jpg,a red ball, cut open, on white", "1.jpg,x"], ["a red ball, cut open, on white", "x"]),
        (['0.jpg,"a box, blue"', '1.jpg,"he said ""hi"""'], ["a box, blue", 'he said "hi"']),
        (['0.jpg,"two\nlines, and more"', '1.jpg, "blank"  '], ["two\nlines, and more", "blank"]),
        (["0.jpg;a; b", '1.jpg;"x;y"'], ["a; b", "x;y"]),
        (['0.jpg\t"best box ever', '1.jpg\tit said "hello"', '2.jpg\t"12" screen'], None),
        (['0.jpg\t"a title"', "1.jpg\tx"], None),  # the marks are of the title
        (['0.jpg|"open', '1.jpg|closed"'], None),
        (['0.jpg\t"open', "1.jpg\tx", '2.jpg\tclosed"'], None),
        (['0.jpg\t"a 12"" screen"', "1.jpg\tx"], ['a 12" screen', "x"]),
        (['0.jpg\t"two\nlines"', "1.jpg\tx"], ["two\nlines", "x"]),
        (['0.jpg\t"a"', '1.jpg\t"b"'], ["a", "b"]),  # all of a column
        (["0.jpg\ta\tb", "1.jpg\tx"], ["a\tb", "x"]),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_captions_come_letter_by_letter(rows, expected, end):
    delimiter = next(sign for sign in "\t|;," if sign in rows[0][:6])
    text = "\n".join([f"image{delimiter}caption", *rows, "", ""]).replace("\n", end)
    wanted = [one.replace("\n", end) for one in expected or [row[6:] for row in rows]]
    assert rows_of(text) == wanted


@pytest.mark.parametrize(
    ("rows", "bad"),
    [
        (["0.jpg", "1.jpg,x"], {2: "it has 1 cells, the header 2"}),
        (['0.jpg,"a",b', "1.jpg,x"], {2: "it has 3 cells, the header 2"}),
        (["0.jpg,a,,", "1.jpg,x"], {2: "it has 4 cells, the header 2"}),
        (['0.jpg,"open', '1.jpg,"open, too', "2.jpg,x"], {2: UNBALANCED, 3: UNBALANCED}),
        (['0.jpg,"open', "1.jpg,x", '2.jpg,closed"'], {2: UNBALANCED}),  # swallows nothing
        (['0.jpg,"red" ball', "1.jpg,x"], {2: UNBALANCED}),
        (['0.jpg,"two\nlines"', "1.jpg", "2.jpg,x"], {4: "it has 1 cells"}),
        (["0.jpg\tx", "1.jpg"], {3: "it has 1 cells"}),
    ],
)
def test_a_row_that_does_not_parse_is_named_with_its_line(rows, bad):
    delimiter = "\t" if "\t" in rows[0] else ","
    found = rows_of("\n".join([f"image{delimiter}caption", *rows]))
    assert {one[0] for one in found if isinstance(one, tuple)} == bad.keys()
    for line, problem in (one for one in found if isinstance(one, tuple)):
        assert problem.startswith(f"line {line}: {bad[line]}")
    assert "x" in [one for one in found if isinstance(one, str)]


def test_surplus_cells_are_prose_only_in_the_last_column():
    assert rows_of('caption,image\na ball, cut open,0.jpg\n"a, b",1.jpg\n', False) == [
        (2, "line 2: it has 3 cells, the header 2: 'a ball, cut open,0.jpg'"),
        "1.jpg",
    ]
    assert rows_of("image,n,caption\n0.jpg,1,a ball, cut\n") == ["a ball, cut"]


def test_an_unbalanced_mark_does_not_make_long_tables_slow():
    text = "image,caption\n" + "".join(f'{number}.jpg,"open {number}\n' for number in range(20_000))
    assert len(rows_of(text)) == 20_000
    assert Delimited("").header == Delimited("\n\n").header == []
    assert Delimited("image , caption \n0.png,x").header == ["image", "caption"]
