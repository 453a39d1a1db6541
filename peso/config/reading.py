"""Read a configuration from YAML, change it from the command line, validate, compare and write it."""

from __future__ import annotations

import difflib
import glob
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from peso.config.data import expand_data
from peso.config.model import AUTO, BUILT_IN, is_path
from peso.config.parsing import DEEPEST, expand_name, parse, read_tree, shown
from peso.config.registry import UNKNOWN_NAME, UNKNOWN_OPTION, Options, registry_of
from peso.config.strategy import expand_strategy
from peso.config.tree import Config
from peso.errors import ConfigError

# parts of pydantic's locations that are not keys: the member of a union of plain values
MEMBER = re.compile(r"(constrained-)?(int|float|bool|str)$|(literal|list)\[|function-")
MOST_PROBLEMS = 5  # problems of a configuration that one message lists
MOST_LISTED = 12  # keys of a section that a message lists
MARKS = "*?["  # the characters that make a path a pattern, unless it exists
SIZED = ("backbone", "head", "training")  # the sections that `backbone: auto` chooses


def load_config(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), base: Path | None = None
) -> Config:
    """Read, override and validate a configuration.

    Args:
        source: a YAML file, or a tree that was already read.
        overrides: texts of the form ``a.b=value`` with the value in YAML. Later ones take precedence.
        base: the folder that relative paths refer to; by default the folder of the file. A path that does not
            exist there refers to the working directory.

    Raises:
        ConfigError: if the configuration is not valid. The message names the key, the value and the nearest
            valid key.
    """
    if isinstance(source, Mapping):
        tree = dict(source)
    else:
        tree, base = read_tree(Path(source)), base or Path(source).parent
    for text in overrides:
        override(tree, text)
    if "compare" in tree:
        raise ConfigError("the section compare describes several runs: use `peso compare`, or remove it")
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explained(error, _explain)) from None
    return _absolute_paths(config, base)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, with the sections in the order in which they are used.

    With ``backbone: auto``, the sections whose values are chosen later contain only the keys that were given.
    """
    return yaml.safe_dump(as_tree(config), sort_keys=False, allow_unicode=True)


def as_tree(config: Config) -> dict[str, Any]:
    """A configuration as plain values, see :func:`dump_config`."""
    tree = config.model_dump(mode="json")
    if not config.backbone.is_auto:
        return tree
    tree = {name: section for name, section in tree.items() if name not in SIZED} | given(config)
    return {name: tree[name] for name in type(config).model_fields if name in tree}


def given(config: Config) -> dict[str, Any]:
    """The keys of the sections ``SIZED`` that were given when a configuration was read, including those given
    with their default value."""
    return {
        name: values(getattr(config, name), given=True) for name in SIZED if name in config.model_fields_set
    }


def values(section: BaseModel, given: bool = False) -> dict[str, Any]:
    """All keys of a section, or with ``given`` only the given ones. Keys that are not written at their
    default are included."""
    names = [name for name in type(section).model_fields if not given or name in section.model_fields_set]
    found = {name: getattr(section, name) for name in names}
    return {
        name: values(each, given) if isinstance(each, BaseModel) else each for name, each in found.items()
    }


def with_earlier_defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a resolved configuration that was read from a workspace. Keys that an earlier version did not
    write get the values that it trained with, where these differ from today's defaults."""
    earlier = dict(tree)
    backbone, head = tree.get("backbone"), tree.get("head")
    if isinstance(backbone, Mapping) and backbone.get("name") in BUILT_IN and "dropout" not in backbone:
        earlier["backbone"] = {**backbone, "dropout": 0.0}
    if isinstance(head, Mapping) and head.get("name") == "items":
        earlier["head"] = {"reads": False, "transitions": False, **head}
    return earlier


def changed_keys(old: Config, new: Config) -> list[str]:
    """The dotted names of the keys whose values differ, in the order of the tree."""
    before, after = dict(leaves(as_tree(old))), dict(leaves(as_tree(new)))
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]


def _absolute_paths(config: Config, base: Path | None) -> Config:
    def absolute(section: Any, *keys: str) -> Any:
        """The section with absolute paths at these keys; the section itself if it has none."""
        given = {key: path for key in keys if (path := getattr(section, key)) not in (None, [])}
        paths = {
            key: [_absolute(each, base) for each in path] if isinstance(path, list) else _absolute(path, base)
            for key, path in given.items()
        }
        return section.model_copy(update=paths) if paths else section

    data, backbone = absolute(config.data, "path"), config.backbone.name
    if data.items is not None:
        data = data.model_copy(update={"items": absolute(data.items, "path")})
    in_folder = backbone not in (*BUILT_IN, AUTO) and _is_backbone(backbone, base)
    sections = {
        "data": data,
        "items": absolute(config.items, "vectors", "index", *["encoder"] * is_path(config.items.encoder)),
        "backbone": absolute(config.backbone, "pretrained", *["name"] * in_folder),
        "report": absolute(config.report, "users"),
    }
    changed = {name: each for name, each in sections.items() if each is not getattr(config, name)}
    return config.model_copy(update=changed)


def _is_backbone(name: str, base: Path | None) -> bool:
    """Whether a name is the path of a backbone. Any other name may be one on the hub or of ``peso pull``."""
    places = (base or Path(), Path())
    return is_path(name) or any((folder / name / "config.json").is_file() for folder in places)


def matching(pattern: str) -> list[Path]:
    """The files and folders that a path refers to, if it is a pattern. Of the folders before the first one
    that does not exist, the names are not patterns, whatever characters they have."""
    parts = Path(pattern).parts
    there = next(n for n in range(len(parts), -1, -1) if Path(*parts[:n]).exists())
    folder, rest = Path(*parts[:there]), parts[there:]
    return [folder / name for name in glob.glob("/".join(rest), root_dir=folder, recursive=True)]


def _absolute(text: str, base: Path | None) -> str:
    if "://" in text:  # an address
        return text
    path = Path(text).expanduser()
    if not path.is_absolute():
        beside = (base or Path()) / path
        path = beside if beside.exists() or matching(str(beside)) else path
    try:
        return str(path.resolve())
    except RuntimeError:  # Python 3.11 and 3.12
        raise ConfigError(f"{path} is a symbolic link that leads to itself; correct the link") from None


def missing_keys(tree: Mapping[str, Any], config: Config) -> list[str]:
    """The keys of the resolved configuration that a tree read from a file does not have."""
    there = {key for key, _ in leaves(tree)}
    return [key for key, _ in leaves(as_tree(config)) if key not in there]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted key and the value of every entry that is not a section."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def override(tree: dict[str, Any], text: str) -> None:
    """Change a tree by a text ``a.b=value`` with the value in YAML. Raises ConfigError for any other form."""
    key, equals, value = text.partition("=")
    if not equals or not key or key.count(".") >= DEEPEST:
        raise ConfigError(f"--set takes key=value, for example --set training.epochs=2; got {shown(text)}")
    # a time format (%d/%m/%Y) and a separator (|) are text, for which YAML would require quotes
    parsed = value if value.startswith(("%", "|")) else parse(value, f"--set {shown(key)}")
    place(tree, key.strip(), parsed)


def place(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key. The sections that contain it are copied, because other trees may share them."""
    *parents, last = key.split(".")
    for parent in parents:
        below = tree.get(parent)
        # a short form (`strategy: peso`, `backbone: tiny`) is expanded to a section
        tree[parent] = (
            dict(below) if isinstance(below, Mapping) else {} if below is None else _expand(parent, below)
        )
        tree = tree[parent]
    tree[last] = value


def merged(below: Any, above: Mapping[str, Any]) -> dict[str, Any]:
    """The tree ``below`` with the values of the tree ``above``, merged section by section."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(below.get(key), Mapping)
        result[key] = merged(below[key], value) if both else value
    return result


def _expand(key: str, short: Any) -> dict[str, Any]:
    expanded = {
        "strategy": expand_strategy,
        "backbone": expand_name,
        "head": expand_name,
        "data": expand_data,
    }.get(key, lambda v: v)(short)
    if not isinstance(expanded, dict):
        raise ConfigError(f"{key} is {shown(short)}, which is not a section with keys")
    return dict(expanded)


def sections(
    annotation: Any, metadata: Sequence[Any] = (), parts: bool = True, within: type[BaseModel] | None = None
) -> list[tuple[str, Any, type[BaseModel]]]:
    """The section types that an annotation allows, as tuples of a part's name, the part and the type.

    An ordinary section has "" and None for the part. A union has several sections. A key that takes a part of
    :mod:`peso.config.registry` has the options of all parts of its kind, which are imported.

    Args:
        annotation: the type of the key.
        metadata: the metadata of the key's field, which tells whether the key takes a part.
        parts: whether to list the options of each part; if not, only those that all parts have.
        within: the section that has the key. If this is the options of a part (such as a hybrid, whose
            partners are parts too), the sections of its parts are not listed again.
    """
    if parts and (registry := registry_of(metadata)):
        if within is not None and issubclass(within, Options):
            return []
        return [(name, part, part.Options) for name, part in registry.everything().items()]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [("", None, annotation)]
    inner, *more = (get_args(annotation) if get_origin(annotation) is not Literal else ()) or (None,)
    if get_origin(annotation) is Annotated:
        return sections(inner, more, parts, within)
    return [section for each in (inner, *more) if inner for section in sections(each, (), parts, within)]


def valid_keys(parts: bool = True) -> list[str]:
    """All dotted keys of a configuration. ``parts``: include the options of strategies, baselines and so
    on."""

    def below(section: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            yield prefix + name
            for _, _, inner in sections(field.annotation, field.metadata, parts, section):
                yield from below(inner, f"{prefix}{name}.")

    return list(dict.fromkeys(below(Config, "")))


def explained(error: ValidationError, explain: Callable[[Any], str]) -> str:
    """A message with the first few problems, one sentence for each."""
    problems: list[Any] = error.errors(include_url=False)
    for problem in problems:
        problem["loc"] = tuple(part for part in problem["loc"] if not MEMBER.match(str(part)))
    more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    told = [textwrap.shorten(explain(problem), 600, placeholder=" …") for problem in problems[:MOST_PROBLEMS]]
    return "; ".join([*told, *more])


def nearest(key: str, names: Sequence[str]) -> str:
    """The most similar of these names; those whose last part contains that of the key are preferred."""
    last = key.rpartition(".")[2]
    names = [name for name in names if last in name.rpartition(".")[2]] or names
    return (difflib.get_close_matches(key[:80], names, n=1, cutoff=0) or names)[0]


def unknown_key(key: str, value: str, names: Sequence[str]) -> str:
    """A sentence about a key that is none of these names. If its section has some of them, one of these is
    suggested."""
    section = key.rpartition(".")[0]
    own = [name for name in names if section and name.rpartition(".")[0] == section]
    told = (
        f"unknown key {shown(key)} (value {value}); the nearest valid key is {nearest(key, own or names)!r}"
    )
    return f"{told}; {section} has the keys {_listed(own)}" if 1 < len(own) <= MOST_LISTED else told


def _listed(keys: Sequence[str]) -> str:
    """The last parts of keys, such as ``epochs, patience``."""
    return ", ".join(key.rpartition(".")[2] for key in keys)


def _explain(problem: Any) -> str:
    parts = [str(part) for part in problem["loc"]]
    if len(parts) > 1 and parts[0] == "baselines":
        del parts[1]  # the place in the list
    key, value, context = ".".join(parts), shown(problem.get("input")), problem.get("ctx", {})
    if problem["type"] == "extra_forbidden":
        names = valid_keys(parts=False)
        if (last := parts[-1]) not in {name.rpartition(".")[2] for name in names}:  # an option of a part?
            names += [name for name in valid_keys() if name.rpartition(".")[2] == last]
        return unknown_key(key, value, names)
    if problem["type"] == UNKNOWN_OPTION:
        *above, option = parts
        there = [".".join([*above, each]) for each in context["there"]]
        cure = f"the nearest valid key is {nearest(key, there)!r}" if there else "it has none"
        if 1 < len(there) <= MOST_LISTED:
            cure += f"; the options are {_listed(there)}"
        why = f"{context['part']} has no option {shown(option)} (given {value})"
        return f"unknown key {shown(key)}: {why}; {cure}"
    if problem["type"] == UNKNOWN_NAME:
        return (
            f"{key}.name: {shown(context['name'])} is unknown; known names are {context['known']}. Other "
            "names require the distribution that provides them to be installed"
        )
    if problem["type"] == "missing":
        hint = "; a configuration needs at least data.format (and data.path)" if parts[0] == "data" else ""
        return f"{key} is missing{hint}"
    if problem["type"] in ("model_type", "model_attributes_type"):
        own = [name for name in valid_keys() if name.rpartition(".")[0] == key]
        listed = f" ({_listed(own)})" if 0 < len(own) <= MOST_LISTED else ""
        return f"{key} is a section: give its keys{listed} below it, or remove it; got {value}"
    if problem["type"] == "list_type":
        return f"{key} is a list: write it in brackets, such as [a, b]; got {value}"
    message: str = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and (not parts or message.startswith(f"{parts[0]}.")):
        # raised by a check of a section, whose message names the keys
        return message
    return f"{key[:80]}: {message}; got {value}"
