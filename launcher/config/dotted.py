"""Nested dictionaries and their leaves by dotted path: the two ways to write a run key."""

from typing import Any


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by dotted path."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """Return nested dictionaries from dotted paths: the inverse of `flatten`.

    Raises KeyError with the path that is both a value and a section.
    """
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *sections, last = path.split(".")
        branch = tree
        for depth, section in enumerate(sections, 1):
            branch = branch.setdefault(section, {})
            if not isinstance(branch, dict):
                raise KeyError(".".join(sections[:depth]))
        if isinstance(branch.get(last), dict):
            raise KeyError(path)
        branch[last] = value
    return tree
