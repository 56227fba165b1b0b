"""The order of class names: by value where all are numbers; and names that only look different."""

import unicodedata
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.packing.class_table import is_number, number_key
from tests.support.commands import run_pack
from tests.support.images import write_tree
from xc.data.pack import Pack

DIGITS = st.text("0123456789", max_size=6) | st.integers(0, 3).map(lambda count: "0" * count + "10")
NUMBERS = st.builds(lambda *parts: "".join(parts), st.sampled_from(["", "-", "+"]), DIGITS,
                    st.just("") | DIGITS.map(".{}".format), st.just("") | st.integers(-300, 300).map("e{}".format))
NUMBERS = NUMBERS.filter(lambda text: is_number(text.encode()))


@given(NUMBERS, NUMBERS)
def test_keys_of_numbers_sort_by_value(one, other):
    values, keys = (Fraction(one), Fraction(other)), (number_key(one.encode()), number_key(other.encode()))
    assert (values[0] < values[1]) == (keys[0] < keys[1]) and (values[0] == values[1]) == (keys[0] == keys[1])


def test_numbers_of_any_length_sort_by_value():
    long = ["-1e9999999999999999", "-" + "9" * 4000, "-1e-99999999999999", "1e-99999999999999999",
            "0." + "0" * 4000 + "1", "1e-2000",
            "9" * 4000, "1" + "0" * 4000, "1" + "0" * 3999 + "1", "1e4001", "1e99999999999999999999"]
    assert sorted(reversed(long), key=lambda text: number_key(text.encode())) == long


@pytest.mark.parametrize("text", ["10", "007", "-1", "2.5", "1e3", "+4", ".5", "5.", "1E-7", "-0"])
def test_what_is_a_number(text):
    assert is_number(text.encode())


@pytest.mark.parametrize("text", ["", ".", "e3", "-", "1_0", "0x1", "٣", "inf", "nan", "1 2", "1\n", "1e", "--1",
                                  "1.2.3"])
def test_what_is_no_number(text):
    assert not is_number(text.encode())


@pytest.mark.parametrize("memory", ["1e-3", "64"])
@pytest.mark.parametrize("names", [
    ["0", "00", "007", "7", "9", "10", str(10**30)], ["-1e3", "-2.5", "-0", "0", "0.5", "5e-1", "007", "10", "1e3"],
    [str(label) for label in range(11)]])
def test_labels_are_in_the_order_of_the_values(tmp_path, capsys, names, memory):
    write_tree(tmp_path / "src", {name: 1 for name in reversed(names)})
    run_pack(tmp_path / "src", tmp_path / "pack", "--memory-mb", memory)
    assert Pack(tmp_path / "pack").class_names(0, len(names)) == names
    assert ("gaps" in capsys.readouterr().err) == (names[-1] != "10")


def test_one_name_that_is_no_number_makes_all_text(tmp_path):
    write_tree(tmp_path / "src", {"9": 1, "10": 1, "x": 1})
    run_pack(tmp_path / "src", tmp_path / "pack")
    assert Pack(tmp_path / "pack").class_names(0, 3) == ["10", "9", "x"]


def test_two_spellings_of_a_name_are_told(tmp_path, capsys):
    """é in one and two characters, both forms of which differ from NFC; and the sign of Kelvin, which is the letter."""
    pairs = [(unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)) for name in ("é", "ü1", "한")]
    pairs += [("K", "\u212a"), ("a\u0323\u0307", "a\u0307\u0323")]
    write_tree(tmp_path / "src", {name: 1 for pair in pairs for name in pair} | {"ö": 1, "plain": 1})
    run_pack(tmp_path / "src", tmp_path / "pack")
    assert Pack(tmp_path / "pack").num_classes == 12
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "5 class names come in two spellings of Unicode (NFC, NFD): " in error
    assert "'K' and '\u212a'" in error and "'\xf6'" not in error


def test_one_spelling_is_not_told(tmp_path, capsys):
    write_tree(tmp_path / "src", {unicodedata.normalize("NFD", name): 1 for name in ("é", "ü1")} | {"ö": 1})
    run_pack(tmp_path / "src", tmp_path / "pack")
    assert capsys.readouterr().err == ""
