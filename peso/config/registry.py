"""Parts with names: strategies, proximal terms, baselines, data formats and report sections.

Each kind of part has a folder with one file per part, named like the part. Other distributions add parts
through entry points. The module of a part is imported when its name is first used. peso's own modules import
PyTorch and SciPy inside functions, so that errors in a configuration are reported without waiting for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import Any, Self

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from peso.config.parsing import Section, shown
from peso.errors import ConfigError

UNKNOWN_NAME, UNKNOWN_OPTION = "unknown_name", "unknown_option"  # error types for pydantic


class Options(Section):
    """A part in a configuration: its name and its options."""

    name: str = Field("", min_length=1)

    @classmethod
    def checked(cls, name: str, options: Mapping[str, Any]) -> Self:
        """The options of a part that is created in Python.

        Raises:
            ConfigError: if an option is unknown or has an invalid value.
        """
        try:
            return cls(**{"name": name, **options})
        except ValidationError as error:
            problems = error.errors(include_url=False)
            told = [f"{'.'.join(map(str, p['loc']))}: {p['msg']}; got {shown(p['input'])}" for p in problems]
            raise ConfigError(f"{name}: {'; '.join(told)}") from None

    def given(self) -> dict[str, Any]:
        """All options except the name."""
        return self.model_dump(exclude={"name"})

    def usual(self) -> dict[str, Any]:
        """The default options of the part with this name; only the name if an option has no default."""
        has_all = not any(field.is_required() for field in type(self).model_fields.values())
        return type(self)(name=self.name).model_dump() if has_all else {"name": self.name}


@dataclass(frozen=True, eq=False)
class Registry:
    """The parts of one kind.

    Args:
        what: a word for such a part, used in messages.
        folder: the package whose modules are the built-in parts, except for the modules in ``beside``.
        group: the group of entry points through which installed distributions provide parts.
        base: the class that provided parts must be subclasses of, as ``module:Class``. If empty, parts are
            functions.
        beside: modules in the folder that are not parts.
        hyphens: whether the names of parts have hyphens in place of the underscores in file names.
    """

    what: str
    folder: str
    group: str
    base: str = ""
    beside: Sequence[str] = ()
    hyphens: bool = False
    _known: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, part: Any) -> None:
        """Register a part under its name, in this process.

        Raises:
            TypeError: if another part has this name.
        """
        known = self._known.setdefault(name, part)
        if (known.__module__, known.__qualname__) != (part.__module__, part.__qualname__):
            raise TypeError(f"{self.what} {name!r} is defined twice: {known} and {part}")
        self._known[name] = part

    def find(self, name: str) -> Any:
        """The part with this name: a built-in part if there is one, else an added one, else an entry point.

        Raises:
            KeyError: if there is no such part.
            ConfigError: if the part of a distribution cannot be imported, if several distributions provide
                it, or if it lacks a method.
        """
        if name not in self._known:
            if module := self._built_in().get(name):
                import_module(module)
            elif offers := entry_points(group=self.group, name=name):
                self._known[name] = self._load(name, offers)
        require_whole(f"{self.what} {name!r}", self._known[name])
        return self._known[name]

    def built_in(self) -> list[str]:
        """The names of the parts of peso itself, without importing them."""
        return sorted(self._built_in())

    def names(self) -> list[str]:
        """All names that :meth:`find` accepts, without importing the parts."""
        return sorted({*self._built_in(), *self._known, *entry_points(group=self.group).names})

    def everything(self) -> dict[str, Any]:
        """All parts by their names. This imports all of them.

        Raises:
            ConfigError: as for :meth:`find`.
        """
        for module in self._built_in().values():
            import_module(module)
        for name in entry_points(group=self.group).names:
            self.find(name)
        return dict(sorted(self._known.items()))

    def options(self, name: Any, given: Mapping[str, Any]) -> Any:
        """The typed options of a part with their defaults, as an instance of its class ``Options``.

        Args:
            given: the options that a configuration gives.

        Raises:
            PydanticCustomError: if there is no such part.
            pydantic.ValidationError: if the part does not have an option, or an option has an invalid value.
        """
        try:
            part = self.find(str(name))
        except KeyError:
            known = ", ".join(map(repr, self.names()))
            raise PydanticCustomError(UNKNOWN_NAME, "{known}", {"known": known, "name": name}) from None
        try:
            return part.Options.model_validate({**given, "name": name})
        except ValidationError as error:
            problems = [self._told(name, part.Options, problem) for problem in error.errors()]
            raise ValidationError.from_exception_data(error.title, problems) from None

    def read(self, value: Any) -> Any:
        """The options of a part from the value of a key: a name, or options that include a name.

        Raises:
            ValueError: the value is neither; or as for :meth:`options`.
        """
        if isinstance(value, str):
            return self.options(value, {})
        if isinstance(value, Mapping):
            return self.options(value.get("name"), value)
        if isinstance(value, Options):
            return value
        raise ValueError(f"a {self.what} must be a name, or options that include a name")

    def _told(self, name: str, options: type[Options], problem: Any) -> InitErrorDetails:
        kind = problem["type"]
        if kind == "extra_forbidden" and len(problem["loc"]) == 1:
            there = [option for option in options.model_fields if option != "name"]
            kind = PydanticCustomError(
                UNKNOWN_OPTION, "{part}", {"part": f"{self.what} {name!r}", "there": there}
            )
        elif kind in (UNKNOWN_NAME, UNKNOWN_OPTION):  # a problem of a part within this one
            kind = PydanticCustomError(kind, problem["msg"], problem["ctx"])
        details = InitErrorDetails(type=kind, loc=problem["loc"], input=problem["input"])
        if "ctx" in problem:
            details["ctx"] = problem["ctx"]
        return details

    def _built_in(self) -> dict[str, str]:
        """The module of each built-in part, by name."""
        spec = find_spec(self.folder)
        assert spec is not None
        files = [file.name for file in iter_modules(spec.submodule_search_locations)]
        return {
            file.replace("_", "-") if self.hyphens else file: f"{self.folder}.{file}"
            for file in files
            if file not in self.beside
        }

    def _load(self, name: str, offers: Any) -> Any:
        if len({offer.value for offer in offers}) > 1:
            raise ConfigError(
                f"{self.what} {name!r} is provided by several distributions "
                f"({', '.join(sorted(offer.dist.name for offer in offers))}); uninstall all but one"
            )
        offer = next(iter(offers))
        try:
            found = offer.load()
        except Exception as error:  # whatever a module does when it is imported
            raise ConfigError(
                f"{self.what} {name!r} cannot be imported ({type(error).__name__}: {error}); it is "
                f"{offer.value} of the distribution {offer.dist.name}: correct or uninstall that distribution"
            ) from error
        wanted = f"subclass of {self.base.replace(':', '.')}" if self.base else "function"
        base = EntryPoint("", self.base, "").load() if self.base else object
        if not (isinstance(found, type) and issubclass(found, base) if self.base else callable(found)):
            raise ConfigError(
                f"{self.what} {name!r}, {offer.value} of the distribution {offer.dist.name}, is not a "
                f"{wanted}; correct or uninstall that distribution"
            )
        if self.base and not found.name:
            found.name = name
        return found


def require_whole(what: str, part: Any) -> None:
    """Raise ConfigError if a class does not define a method that its base class requires."""
    if missing := sorted(getattr(part, "__abstractmethods__", ())):
        raise ConfigError(
            f"{what} is {part.__module__}.{part.__qualname__}, which does not define {', '.join(missing)}; "
            "correct that class"
        )


def typed(registry: Registry) -> BeforeValidator:
    """The validator for the type of a key in the configuration that takes a part of this kind."""
    return BeforeValidator(registry.read)


def registry_of(metadata: Sequence[Any]) -> Registry | None:
    """The registry of the parts that an annotated type takes (see :func:`typed`), or None."""
    readers = [getattr(each.func, "__self__", None) for each in metadata if isinstance(each, BeforeValidator)]
    return next((reader for reader in readers if isinstance(reader, Registry)), None)
