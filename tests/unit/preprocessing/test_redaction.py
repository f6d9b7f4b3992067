from preprocessing.errors import printable


def test_control_characters_are_printed_as_escapes() -> None:
    odd = "a\x1b[31mb\x00c\rd\ne\x7f\x9bf\u202eg\ud83dh"
    assert printable(odd) == "a\\x1b[31mb\\x00c\\rd\\ne\\x7f\\x9bf\\u202eg\\ud83dh"
    assert printable("a cafe\u0301, 日本語, 🙂: 100 %") == "a cafe\u0301, 日本語, 🙂: 100 %"
