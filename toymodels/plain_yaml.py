"""YAML as plain data, in which a key that is given twice is an error: elsewhere the last one wins, silently."""

from __future__ import annotations

from typing import Any

import yaml

MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Here what was written can still be told from what a merge (<<) brings, which may be set again."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node


def parse_yaml(text: str) -> Any:
    """What the text says.

    Raises:
        yaml.YAMLError: it is not YAML, or a mapping in it has a key twice.
    """
    try:
        return _Loader(text).get_single_data()
    except ValueError as error:  # of what looks like a date or a number, and is none
        raise yaml.YAMLError(str(error)) from error
