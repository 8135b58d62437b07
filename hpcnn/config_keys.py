"""Names of settings: which there are, which one somebody may have meant, and what it may be."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints


def all_keys(kind: type, prefix: str = "") -> list[str]:
    """Return the paths of all settings of a dataclass and those in it."""
    keys = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default):
            keys += all_keys(type(field.default), f"{prefix}{field.name}.")
        else:
            keys.append(f"{prefix}{field.name}")
    return keys


# What people call a setting elsewhere, where the spelling alone would not lead to ours.
_SYNONYMS = {
    "learning_rate": "train.lr",
    "batch_size": "train.global_batch",
    "batch": "train.global_batch",
    "max_steps": "train.steps",
    "num_epochs": "train.epochs",
    "wd": "train.weight_decay",
    "dataset": "data.source",
    "allreduce": "exchange.algorithm",
}


def suggestion(name: str, known: Sequence[str]) -> str:
    """Return a question after the known setting that `name` may stand for, or nothing."""
    last = name.rsplit(".", 1)[-1]
    synonym = _SYNONYMS.get(last)
    if synonym in known:
        return f" Did you mean '{synonym}'?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        tails = {key.rsplit(".", 1)[-1]: key for key in known}
        close = [tails[tail] for tail in difflib.get_close_matches(last, list(tails), n=1, cutoff=0.6)]
    return f" Did you mean '{close[0]}'?" if close else ""


def choices_of(settings: type, path: str) -> str:
    """Return the values that the setting at `path` may take, as words, or nothing when it is not a choice."""
    kind: Any = settings
    for name in path.split("."):
        kind = get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return " or ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else ""


def value_at(tree: Any, path: str) -> Any:
    """Return what a parsed document has at a path, or the last that it has on the way."""
    for name in path.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return tree
        tree = tree[name]
    return tree


def lower(text: str) -> str:
    """Return a text with its first letter small."""
    return text[:1].lower() + text[1:]


def without_none(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a tree without what is None, which TOML does not know."""
    return {
        name: without_none(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if value is not None
    }
