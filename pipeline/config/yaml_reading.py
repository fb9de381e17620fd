"""Read YAML strictly: plain values, unique keys, no variables, bounded size and depth."""

import re
from pathlib import Path
from typing import Any

from yaml import SafeLoader, YAMLError, load
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, ScalarNode

from maskloom.pipeline.errors import MaskLoomError, one_line

MAX_BYTES = 1 << 20  # the largest shipped configuration has 5 kB
MAX_DEPTH = 50
MAX_VALUES = 100_000  # after anchors are expanded: a few lines of them can expand to billions of values
MAX_BITS = 64
DEEP = re.compile(rf"(?:[\[{{]\s*){{{MAX_DEPTH + 1}}}")
SHOWN = 200  # characters that are shown of a parser's message
VARIABLE = re.compile(r"(?<!\\)\$\{")


class NotYaml(ValueError):
    """The text is not YAML, or a value does not fit YAML's types."""


class _Loader(SafeLoader):
    """PyYAML's safe loader with YAML 1.2 numbers, without dates, and without duplicate keys."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.merged = 0

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        """Compose a mapping, and reject duplicate keys.

        This is done before `<<` merges anything into the mapping: a merged key may be overridden.
        """
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise ConstructorError(None, None, f"the key {key.value!r} occurs twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def flatten_mapping(self, node: MappingNode) -> None:
        """Merge the mappings of `<<`, up to a limit: a few nested merges could take forever."""
        super().flatten_mapping(node)
        self.merged += len(node.value)
        if self.merged > MAX_VALUES:
            raise ConstructorError(None, None, f"more than {MAX_VALUES} values are merged", node.start_mark)


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":int", ":float"))]
    for letter, resolvers in SafeLoader.yaml_implicit_resolvers.items()
}
# The numbers of YAML 1.2. In YAML 1.1, which PyYAML reads, `1e-5` is text, `010` is 8 and `1:30` is
# 90.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9_]+(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file: mappings, lists, text, numbers, booleans and null.

    Raises:
        MaskLoomError: the file is too large, not UTF-8, not YAML, or rejected by `parsed_yaml`.
    """
    if path.stat().st_size > MAX_BYTES:
        raise MaskLoomError(f"{path}: {path.stat().st_size} bytes, too large for a configuration; give a YAML file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MaskLoomError(f"{path}: not valid YAML: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    try:
        return parsed_yaml(text)
    except ValueError as error:
        raise MaskLoomError(f"{path}: not valid YAML: {error}") from None


def parsed_yaml(text: str) -> Any:
    r"""Return the value of a YAML text.

    Variables are not substituted: `${name}` is rejected, and `\${name}` is the text `${name}`.

    Raises:
        NotYaml: the text cannot be parsed; the message has one line.
        ValueError: the text contains a rejected value; the message has one line.
    """
    if DEEP.search(text):  # the parser takes seconds until it gives up
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    try:
        value = load(text, _Loader)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    except (YAMLError, ValueError, TypeError, OverflowError) as error:  # such as a number of thousands of digits
        raise NotYaml(one_line(error).replace('in "<unicode string>", ', "in ")[:SHOWN]) from None
    return _checked(value, [MAX_VALUES], 0)


def _checked(value: Any, left: list[int], depth: int) -> Any:
    """Return a copy without shared parts and with unescaped text.

    Args:
        value: nested values from the parser.
        left: one number, how many values may still follow; it is counted down.
        depth: nesting depth of the value.
    """
    left[0] -= 1
    if left[0] < 0 or depth > MAX_DEPTH:
        limit = f"more than {MAX_VALUES} values" if left[0] < 0 else f"nested deeper than {MAX_DEPTH} levels"
        raise ValueError(f"{limit}; write out its anchors")
    if isinstance(value, dict):
        return {_checked(k, left, depth + 1): _checked(v, left, depth + 1) for k, v in value.items()}
    if isinstance(value, list):
        return [_checked(one, left, depth + 1) for one in value]
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError(f"a whole number of {value.bit_length()} bits; at most {MAX_BITS} are supported")
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ValueError(
        f"{one_line(value)[:SHOWN]!r} is not text, a number, a boolean, a list or a mapping"
    )  # such as !!binary


def plain_text(text: str) -> str:
    r"""Return a text with `\${` for `${`.

    Raises:
        ValueError: it contains a variable, a zero byte, or bytes that are not UTF-8.
    """
    if VARIABLE.search(text):
        raise ValueError(
            f"{text[:SHOWN]!r}: variables are not substituted; write the value itself (or \\${{ for these two characters)"
        )
    if "\0" in text:
        raise ValueError(f"{text[:SHOWN]!r} contains a zero byte; remove it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{text[:SHOWN]!a} is not UTF-8 text; rename the file that it names") from None
    return text.replace("\\" + "${", "${")
