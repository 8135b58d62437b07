"""One TOML file -> the dataclasses of `config.py`. Past this file nothing looks a setting up by a string.

`load` reads a preset or a file, applies `--set section.key=value`, and refuses what it does not know, with a
suggestion. Every rank reads the same text and so comes to the same verdict.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from hpcnn import bounded
from hpcnn.config import Config
from hpcnn.errors import ConfigError

SCORED = ("accuracy", "inverse-loss", "softmax", "best")
"""Values of `average.rule` that need held-out images."""


def presets() -> tuple[str, ...]:
    """Return the names of the presets shipped with the package."""
    folder = resources.files("hpcnn") / "presets"
    return tuple(sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml")))


def load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a preset or TOML file, with `section.key=value` overrides applied.

    Raises
    ------
    ConfigError
        If the file is missing or not TOML, or a key is unknown, of the wrong type or out of range.
    """
    tree = _read(source)
    for override in overrides:
        _apply(tree, override)
    return from_tree(tree)


def from_tree(tree: dict[str, Any]) -> Config:
    """Return the configuration that a parsed TOML document describes; raises ConfigError."""
    _refuse_unknown(tree, Config, "")
    try:
        config = msgspec.convert(tree, Config, strict=True)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        key = where.strip("`").removeprefix("$.") or "the document"
        choices = _choices(key)
        rule = f"must be {choices}" if choices else _lower(what)
        raise ConfigError(f"config: '{key}' (={_value_at(tree, key)!r}): {rule}.") from None
    _refuse_infinite(dataclasses.asdict(config), "")
    _refuse_combinations(config)
    return config


def to_toml(config: Config) -> str:
    """Return the whole configuration as TOML text that `load` reads back to an equal one."""
    import tomli_w  # written by rank 0 only

    return tomli_w.dumps(_without_none(dataclasses.asdict(config)))


def from_toml(text: str, origin: str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration in a TOML text, with overrides applied; `origin` names it in errors."""
    try:
        tree = bounded.toml(text)
    except ValueError as error:
        raise ConfigError(f"config: {origin} is not valid TOML: {error}.") from None
    for override in overrides:
        _apply(tree, override)
    return from_tree(tree)


def _read(source: str | Path) -> dict[str, Any]:
    name = str(source)
    if name in presets():
        return bounded.toml((resources.files("hpcnn") / "presets" / f"{name}.toml").read_text())
    try:
        return bounded.toml(bounded.text(source))
    except FileNotFoundError:
        hint = _suggestion(name, presets()) or f" Presets are: {', '.join(presets())}."
        raise ConfigError(f"config: '{name}' is neither a preset nor a file.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: cannot read '{name}': {error}.") from None
    except ValueError as error:
        raise ConfigError(f"config: '{name}' is not valid TOML: {error}.") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Put one `section.key=value` into the tree; the value is TOML, or else a plain string."""
    path, equals, text = override.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"config: --set '{override}' must read section.key=value, such as train.lr=0.1.")
    try:
        value = bounded.toml(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()
    node = tree
    for name in names[:-1]:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise ConfigError(f"config: --set '{override}': '{name}' is a value, not a section.")
    node[names[-1]] = value


def _refuse_unknown(tree: dict[str, Any], kind: type, prefix: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if name not in fields:
            raise ConfigError(f"config: unknown key '{path}'.{_suggestion(path, _all_keys(Config))}")
        default = fields[name].default
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise ConfigError(f"config: '{path}' (={value!r}) must be a section with keys, [{path}].")
            _refuse_unknown(value, type(default), f"{path}.")


def _refuse_infinite(tree: dict[str, Any], prefix: str) -> None:
    for name, value in tree.items():
        if isinstance(value, dict):
            _refuse_infinite(value, f"{prefix}{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"config: '{prefix}{name}' (={value}) must be a finite number.")


def _refuse_combinations(config: Config) -> None:
    """Raise for settings that are right each by itself but do not go together."""
    device, compute, exchange = config.device, config.train.compute, config.exchange
    if compute == "tf32" and device != "cuda":
        raise ConfigError(
            f"config: 'train.compute' (={compute!r}) needs a GPU, 'device' is {device!r}."
            ' Set device = "cuda", or train.compute = "fp32".'
        )
    if compute == "fp64" and device != "cpu":
        raise ConfigError(
            f"config: 'train.compute' (={compute!r}) runs on plain NumPy, 'device' is {device!r}."
            ' Set device = "cpu", or train.compute = "fp32".'
        )
    if config.train.reproducible:
        _refuse_irreproducible(config)
    if exchange.lazy_layers and exchange.lazy_steps < 2:
        raise ConfigError("config: 'exchange.lazy_steps' (=1) must be at least 2 with lazy layers.")
    analysis = config.analysis
    if analysis.kernel == "maps" and analysis.width == "alignment":
        raise ConfigError(
            "config: 'analysis.width' (='alignment') chooses one width a layer; analysis.kernel (='maps') needs one for"
            ' each map. Set analysis.kernel = "tensor", or another width.'
        )
    if analysis.kernel == "tensor" and analysis.maps_every:
        raise ConfigError(
            f"config: 'analysis.maps_every' (={analysis.maps_every}) measures single maps, which analysis.kernel"
            " (='tensor') does not tell apart. Set analysis.kernel = \"maps\", or maps_every = 0."
        )
    _refuse_averages(config)
    several = {
        "average.rule": config.average.rule != "none",
        "separation.method": config.separation.method == "rejection",
    }
    for key in (key for key, trained in several.items() if trained and config.fault.on_rank_failure == "continue"):
        raise ConfigError(
            f"config: 'fault.on_rank_failure' (='continue') is for runs of one network, '{key}' trains several."
            ' Set fault.on_rank_failure = "stop".'
        )
    if config.fault.spare_ranks and config.fault.on_rank_failure == "stop":
        raise ConfigError(
            f"config: 'fault.spare_ranks' (={config.fault.spare_ranks}) would stand by for nothing: the run ends when a"
            ' rank dies. Set fault.on_rank_failure = "continue", or spare_ranks = 0.'
        )
    if exchange.algorithm != "nccl":
        return
    if config.fault.on_rank_failure == "continue":
        raise ConfigError(
            "config: 'fault.on_rank_failure' (='continue') needs collectives that survive a rank, which those of NCCL"
            ' do not. Set exchange.algorithm = "auto".'
        )
    for key, value, needed in (
        ("device", device, "cuda"),
        ("exchange.kind", exchange.kind, "allreduce"),
        ("exchange.wire", exchange.wire, "fp32"),
    ):
        if value != needed:
            raise ConfigError(
                f"config: 'exchange.algorithm' (='nccl') needs {key} = \"{needed}\", which is {value!r}."
                ' Set that, or exchange.algorithm = "auto".'
            )


def _refuse_irreproducible(config: Config) -> None:
    """Raise for settings under which sums would go another way on another number of ranks, or might."""
    train, exchange = config.train, config.exchange
    for key, value, allowed in (
        ("device", config.device, ("cpu",)),
        ("train.compute", train.compute, ("fp32", "fp64")),
        ("model.sync_batchnorm", config.model.sync_batchnorm, (True,)),
        ("plan.preset", config.plan.preset, ("data",)),
        ("plan.turns", config.plan.turns, ((1, 1),)),
        ("exchange.kind", exchange.kind, ("allreduce", "sharded")),
        (
            "exchange.algorithm",
            exchange.algorithm,
            ("auto", "butterfly", "halving-doubling", "ring", "pairwise", "hierarchical"),
        ),
        ("exchange.wire", exchange.wire, ("fp32",)),
        ("exchange.lazy_layers", exchange.lazy_layers, (0,)),
        ("average.rule", config.average.rule, ("none",)),
        ("separation.method", config.separation.method, ("none",)),
        ("analysis.information_plane_every_steps", config.analysis.information_plane_every_steps, (0,)),
    ):
        if value not in allowed:
            raise ConfigError(
                f"config: 'train.reproducible' needs {key} = {' or '.join(map(_toml_word, allowed))}, which is"
                f" {_toml_word(value)}: the order of sums would depend on the number of ranks, or is not known not to."
            )
    if train.global_batch < train.virtual_shards:
        raise ConfigError(
            f"config: 'train.global_batch' (={train.global_batch}) must be at least 'train.virtual_shards'"
            f" (={train.virtual_shards}): each shard needs a sample."
        )
    if exchange.kind == "sharded" and (train.optimizer == "lars" or train.clip_norm):
        what = "train.optimizer = 'lars'" if train.optimizer == "lars" else "train.clip_norm"
        raise ConfigError(
            f"config: 'train.reproducible' with exchange.kind = 'sharded' cannot have {what}: each rank has slices of"
            " tensors, and norms over slices depend on their number. Set exchange.kind = 'allreduce'."
        )


def _toml_word(value: object) -> str:
    return json.dumps(value)


def _refuse_averages(config: Config) -> None:
    """Raise for ways to average replicas that do not go with each other, or with other settings."""
    average = config.average
    if average.rule == "none":
        return
    if config.exchange.lazy_layers:
        raise ConfigError(
            f"config: 'average.rule' (={average.rule!r}) averages parameters that lazy layers have not updated yet."
            " Set exchange.lazy_layers = 0."
        )
    if config.separation.method != "none":
        raise ConfigError(
            f"config: 'average.rule' (={average.rule!r}) does not go with 'separation.method'"
            f' (={config.separation.method!r}): averages of subspaces mean nothing. Set one of them to "none".'
        )
    if config.analysis.information_plane_every_steps:
        raise ConfigError(
            f"config: 'average.rule' (={average.rule!r}) trains replicas, and the information plane is of one network."
            " Set analysis.information_plane_every_steps = 0."
        )
    if average.rule in SCORED and not average.validation_samples:
        raise ConfigError(
            f"config: 'average.rule' (={average.rule!r}) scores replicas on held-out images."
            " Set average.validation_samples, such as 500."
        )
    if average.momentum == "reset" and config.train.optimizer in ("adam", "adamw"):
        raise ConfigError(
            f"config: 'average.momentum' (='reset') does not go with {config.train.optimizer}, whose moments are"
            ' corrected by their age. Set average.momentum = "average".'
        )
    if average.shards and not math.isclose(math.fsum(average.shards), 1.0, abs_tol=1e-6):
        raise ConfigError(f"config: 'average.shards' (={list(average.shards)}) must add up to 1.")


def _all_keys(kind: type, prefix: str = "") -> list[str]:
    keys = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default):
            keys += _all_keys(type(field.default), f"{prefix}{field.name}.")
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


def _suggestion(name: str, known: Sequence[str]) -> str:
    last = name.rsplit(".", 1)[-1]
    synonym = _SYNONYMS.get(last)
    if synonym in known:
        return f" Did you mean '{synonym}'?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        tails = {key.rsplit(".", 1)[-1]: key for key in known}
        close = [tails[tail] for tail in difflib.get_close_matches(last, list(tails), n=1, cutoff=0.6)]
    return f" Did you mean '{close[0]}'?" if close else ""


def _choices(path: str) -> str:
    """Return the values that the setting at `path` may take, as words, or nothing when it is not a choice."""
    kind: Any = Config
    for name in path.split("."):
        kind = get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return " or ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else ""


def _value_at(tree: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(tree, dict) or name not in tree:
            return tree
        tree = tree[name]
    return tree


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _without_none(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_none(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if value is not None
    }
