"""Readers of YAML and JSON files that may come from anybody: limited in size, plain values only."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

MAX_SETTINGS_BYTES = 1 << 16
MAX_JSON_BYTES = 1 << 24
MAX_NUMBER = 2**63
EXPECTED_FORM = "must hold `name: value` lines, named as the flags are; a value may be a list"


class _SettingsLoader(yaml.SafeLoader):
    """Loader of the YAML that settings need: `name: value` or `name: [values]`, without tags, aliases or repetition."""

    _containers: tuple[type[yaml.Event], ...] = (yaml.MappingStartEvent, yaml.SequenceStartEvent)
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            raise ComposerError(None, None, "anchors, aliases and tags are not supported", event.start_mark)
        if not isinstance(event, (yaml.ScalarEvent, *self._containers[self._depth : self._depth + 1])):
            raise ComposerError(None, None, f"it {EXPECTED_FORM}", event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode) or name.value in seen:
                raise ConstructorError(None, None, f"{name.value!r} is not a name, or occurs twice", name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)


def read_settings(path: Path) -> dict[str, Any]:
    """Read the settings in a YAML file of up to 64 KiB: numbers, strings, booleans and lists of them, by name.

    Raises:
        OSError, ValueError: if the file cannot be read, or holds something else.
    """
    try:
        settings = yaml.load(_read(path, MAX_SETTINGS_BYTES), _SettingsLoader)
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error)) from None
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ValueError(f"it {EXPECTED_FORM}")
    for value in settings.values():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and abs(number) > MAX_NUMBER:
                raise ValueError(f"a number in it has {number.bit_length()} bits")
    return settings


def read_json(path: Path) -> Any:
    """Read a JSON file of up to 16 MiB.

    Raises:
        OSError, ValueError: if the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    try:
        return json.loads(_read(path, MAX_JSON_BYTES))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _read(path: Path, limit: int) -> str:
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    return content.decode()
