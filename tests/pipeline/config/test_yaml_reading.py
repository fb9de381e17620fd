"""YAML as configurations have it: what is read, and what is refused in one line."""

import pytest

from maskloom.pipeline.config.yaml_reading import MAX_BYTES, MAX_DEPTH, NotYaml, parsed_yaml, plain_text, read_yaml
from maskloom.pipeline.errors import MaskLoomError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-2.5E3", -2500.0),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("0x10", 16),
        ("1_000", 1000),
        ("no", False),
        ("", None),
        (r"\${HOME}", "${HOME}"),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("{b: &x {c: 1}, d: {<<: *x, c: 2}}", {"b": {"c": 1}, "d": {"c": 2}}),
        (
            "{a: &a {p: 1}, x: {b: &b {<<: *a, p: 2}}, c: {<<: *b}}",
            {"a": {"p": 1}, "x": {"b": {"p": 2}}, "c": {"p": 2}},
        ),
        ("{255: lesion}", {255: "lesion"}),
    ],
)
def test_values(text, value):
    assert parsed_yaml(text) == value


def test_values_that_share_an_anchor_share_nothing():
    value = parsed_yaml("{a: &x [1], b: *x}")
    value["a"].append(2)
    assert value["b"] == [1]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("${oc.env:HOME}", "variables are not substituted; write the value itself"),
        ("{a: ['x ${b}']}", "variables are not substituted"),
        ("${${x}}", "variables are not substituted"),
        ('"a\\0b"', "contains a zero byte"),
        ('"\\ud800"', "is not UTF-8 text"),
        ("[" * 5000 + "]" * 5000, f"nested deeper than {MAX_DEPTH} levels"),
        ("[" * 100 + "]" * 100, f"nested deeper than {MAX_DEPTH} levels"),
        ("&x [*x]", f"nested deeper than {MAX_DEPTH} levels"),
        (LAUGHS, "more than 100000 values"),
        ("0x" + "f" * 5000, "a whole number of 20000 bits"),
        ("!!binary aGk=", "is not text, a number, a boolean, a list or a mapping"),
    ],
)
def test_what_is_refused(text, problem):
    with pytest.raises(ValueError, match=problem) as error:
        parsed_yaml(text)
    assert not isinstance(error.value, NotYaml)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("*/images/*.png", "while scanning an alias"),
        ("9" * 5000, "Exceeds the limit"),
        ("a: 1\na: 2", "the key 'a' occurs twice"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        (MERGES, "more than 100000 values are merged"),
        ("? [1, 2]\n: 3", "found unhashable key"),
        ("--- 1\n--- 2", "expected a single document"),
        ("!!int x", "invalid literal"),
    ],
)
def test_what_is_no_yaml(text, problem):
    with pytest.raises(NotYaml, match=problem) as error:
        parsed_yaml(text)
    assert "\n" not in str(error.value)


def test_plain_text_is_checked_as_well():
    assert plain_text("*/a.png") == "*/a.png"
    with pytest.raises(ValueError, match="variables are not substituted"):
        plain_text("*/${HOME}")


def test_a_file_that_is_too_large(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text("#" * (MAX_BYTES + 1))
    with pytest.raises(MaskLoomError, match="bytes, too large for a configuration"):
        read_yaml(path)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    path = tmp_path / "one.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_yaml(path) == {"a": 1}
