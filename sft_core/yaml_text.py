"""YAML from anywhere: recipes, overrides, data set cards.

In: a text. Out: its plain value. Everything that is wrong with it is one YAMLError of one line; that of a text which is
long, deep, or short and stands for more than `bounds` allows: an alias repeats what it names, ten lines can make a
billion.
"""

from typing import Any

import yaml

from sft_core.bounds import MOST_DEPTH, YAML_CHARACTERS, YAML_NODES, nests_too_deeply

TOO_DEEP = f"keys nested more than {MOST_DEPTH} deep"


class NotYaml(yaml.YAMLError):
    """In one line. `place`: what of it repeats nothing of the text."""

    def __init__(self, error: Exception, place: str) -> None:
        super().__init__(" ".join(str(error).split()))
        self.place = place


class BoundedLoader(yaml.SafeLoader):
    """YAML's scanner takes time that grows with the square of the depth."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:  # noqa: N803 - YAML's own name
        """An opening bracket."""
        _check_depth(self.flow_level)
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        """A deeper line."""
        _check_depth(len(self.indents))
        return bool(super().add_indent(column))


def _check_depth(depth: int) -> None:
    if depth > MOST_DEPTH:
        raise yaml.YAMLError(TOO_DEEP)


class UniqueKeys(BoundedLoader):
    """YAML's own reader keeps the last of two equal keys, and loses the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; YAMLError if a key stands in it twice."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise yaml.YAMLError(
                        f"the key {key.value[:100]!r} stands in line {lines[key.value]} and again in line {line}; the "
                        "first one would be lost"
                    )
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(text: str, loader: type[BoundedLoader] = BoundedLoader) -> Any:
    """The value. YAMLError, in one line, for what is no YAML, or none of a bearable size.

    >>> read_yaml("a: &x [1, 2]\\nb: *x")
    {'a': [1, 2], 'b': [1, 2]}
    """
    if len(text) > YAML_CHARACTERS:
        raise yaml.YAMLError(f"{len(text):,} characters, and {YAML_CHARACTERS:,} are the most")
    try:
        reader = loader(text)
        node = reader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        value = reader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError(TOO_DEEP) from None
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark
        raise NotYaml(error, f"line {place.line + 1}, column {place.column + 1}" if place else "") from None
    except yaml.reader.ReaderError as error:
        raise NotYaml(error, "it holds a character that YAML does not allow") from None
    except (ValueError, OverflowError, TypeError, KeyError, AttributeError) as error:
        raise NotYaml(error, "a value of it has no meaning") from None  # a date 2026-99-99, and so on
    if nests_too_deeply(value):
        raise yaml.YAMLError(TOO_DEEP)
    return value


def _check_nodes(root: yaml.Node) -> None:
    """YAMLError if there are more than YAML_NODES, those behind an alias counted each time, or one holds itself."""
    left = YAML_NODES
    waiting: list[yaml.Node] = [root]
    while waiting:
        node = waiting.pop()
        left -= 1
        if left < 0:
            raise yaml.YAMLError(
                f"more than {YAML_NODES:,} keys and values, counted once for each alias (*name) of them"
            )
        if isinstance(node, yaml.MappingNode):
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
