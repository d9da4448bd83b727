"""From the words of a command to a story: a name of the zoo, or something in the user's own file."""

import ast
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from .faults import CommandError, UsageError

_FILE = re.compile(r"(?P<file>.+\.py)(?::(?P<name>\w+))?")


@dataclass(frozen=True)
class FoundStory:
    """A story ready to run.

    Attributes
    ----------
    label
        How the user called it.
    story
        A Pyro program, or an object with `model`.
    settings
        Keyword arguments of the program that are not data (for classes they went into the constructor).
    example
        Data that a story of the zoo brings along, by argument; None for a user's own story.
    guide
        The function `guide` beside a function `model` in the user's file, as Pyro's own examples have it.
    file
        The user's file; None for a story of the zoo.
    """

    label: str
    story: Any
    settings: Mapping[str, Any] = field(default_factory=dict)
    example: Mapping[str, Any] | None = None
    guide: Callable | None = None
    file: Path | None = None

    @property
    def model(self) -> Callable:
        """The Pyro program itself."""
        return getattr(self.story, "model", self.story)

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """What the program takes by name."""
        return _parameters(self.model)

    @property
    def arguments(self) -> dict[str, bool]:
        """Arguments that take data (no default, or None), and whether each is needed (no default).

        What is called `num_data` or `num_features` is a size.
        """
        return {
            name: p.default is p.empty
            for name, p in self.parameters.items()
            if (p.default is None or p.default is p.empty) and name not in self.settings and not name.startswith("num_")
        }

    @property
    def text(self) -> str:
        """The docstring that tells the story: of its module in the zoo, of the object in a user's file."""
        own = self.model if isinstance(self.story, FunctionType) else type(self.story)
        module = inspect.getmodule(own)
        texts = [inspect.getdoc(own), inspect.getdoc(self.model), inspect.getdoc(module) if module else None]
        if self.file is None:
            texts = texts[::-1]
        # A dataclass without a docstring of its own gets its signature as one.
        return next((t for t in texts if t and not t.startswith(f"{getattr(own, '__name__', '')}(")), "")


def file_of(text: str) -> Path | None:
    """The user's file that `text` names; None for a name of the catalog."""
    match = _FILE.fullmatch(text)
    return Path(match["file"]).resolve() if match else None


def parse_settings(words: Sequence[str] | None) -> dict[str, Any]:
    """`["num_components=3", "covariance=diag"]` to `{"num_components": 3, "covariance": "diag"}`.

    Raises
    ------
    UsageError
        A word is not of the form key=value, or a key comes twice.
    """
    settings: dict[str, Any] = {}
    for word in words or ():
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--set {word}: expected key=value, such as --set num_components=3")
        if key in settings:
            raise UsageError(f"--set gives {key} twice")
        settings[key] = _literal(value)
    return settings


def find_story(text: str, settings: Mapping[str, Any] | None = None, *, example_settings: bool = False) -> FoundStory:
    """The story called `text`.

    Parameters
    ----------
    text
        A name of the catalog, `file.py:name`, or `file.py` where the file holds one story.
    settings
        Hyperparameters, for the constructor of a class or as keyword arguments of a function.
    example_settings
        Where no settings are given, take those of the zoo story's own example.

    Raises
    ------
    CommandError
        No such story or file. (What the file itself raises passes through.)
    UsageError
        The file holds several stories and none was named; settings that the story does not have, or lacks.
    """
    settings = dict(settings or {})
    match = _FILE.fullmatch(text)
    if match:
        return _from_file(text, Path(match["file"]), match["name"], settings)
    return _from_catalog(text, settings, example_settings)


def _from_catalog(text: str, settings: dict[str, Any], example_settings: bool) -> FoundStory:
    from ..catalog import get

    try:
        entry = get(text)
    except ValueError as error:
        raise CommandError(f"{error} A file of your own is named file.py:function.") from None
    example, data = entry.example()
    if example_settings and not settings:
        return FoundStory(entry.name, example, example=_mapping(example, data))
    story = _construct(type(example), settings, entry.name)
    return FoundStory(entry.name, story, example=_mapping(example, data))


def _mapping(story: Any, data: Any) -> Mapping[str, Any]:
    return data if isinstance(data, Mapping) else {next(iter(_parameters(story.model))): data}


def _from_file(text: str, path: Path, name: str | None, settings: dict[str, Any]) -> FoundStory:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CommandError(f"{path} {what}; a story is named file.py:function, or by a name from `zoo list`")
    module = run_file(path)
    stories = _stories(module)
    if name is None:
        if not stories:
            raise CommandError(f"{path} holds no story: a function that calls pyro.sample, or a class with a model")
        if len(stories) > 1:
            raise UsageError(
                f"{path} holds {len(stories)} stories: {', '.join(stories)}. Name one: {path}:{next(iter(stories))}"
            )
        name = next(iter(stories))
    if not hasattr(module, name):
        have = f"it holds {', '.join(stories)}" if stories else "it holds no story"
        raise CommandError(f"{path} has no {name!r}; {have}")
    found, file = getattr(module, name), path.resolve()
    if inspect.isclass(found):
        return FoundStory(text, _checked(_construct(found, settings, name), name), file=file)
    _checked(found, name)
    guide = getattr(module, "guide", None) if name == "model" else None
    story = FoundStory(text, found, settings=settings, guide=guide, file=file)
    unknown = [key for key in settings if key not in story.parameters]
    if unknown:
        raise UsageError(f"{name} has no {unknown[0]!r} to --set; its arguments are {list(story.parameters)}")
    return story


def run_file(path: Path) -> ModuleType:
    """The module in `path`, run once; its folder can be imported from, and no byte code is left there."""
    path = path.resolve()
    # A prefix, so that a user's `random.py` does not become everybody's `random`.
    name = f"zoo_story_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = writes_bytecode
    return module


def _stories(module: ModuleType) -> dict[str, Any]:
    """What in `module` looks like a story, in the order of the file; no helpers, imports or guides."""
    public = {name: v for name, v in vars(module).items() if not name.startswith("_")}
    own = {name: v for name, v in public.items() if getattr(v, "__module__", None) == module.__name__}
    stories = {}
    for name, value in own.items():
        if isinstance(value, FunctionType):
            samples = "sample" in value.__code__.co_names and "guide" not in name
            if samples:
                stories[name] = value
        elif callable(getattr(value, "model", None)):
            stories[name] = value
    objects = [v for v in stories.values() if not isinstance(v, (FunctionType, type))]
    # `story = Coin(2.0)` below `class Coin` is one story, told by the object.
    return {name: v for name, v in stories.items() if not any(type(o) is v for o in objects)}


def _checked(story: Any, name: str) -> Any:
    if not callable(getattr(story, "model", story)):
        what = type(story).__name__
        raise CommandError(f"{name} is a {what}; a story is a Pyro program or an object with a `model`")
    return story


def _construct(cls: type, settings: Mapping[str, Any], name: str) -> Any:
    parameters = _parameters(cls)
    unknown = [key for key in settings if key not in parameters]
    if unknown:
        raise UsageError(f"{name} has no setting {unknown[0]!r}; it has {list(parameters)}")
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in settings]
    if missing:
        words = " ".join(f"{key}=..." for key in missing)
        raise UsageError(f"{name} needs {' and '.join(missing)}: add --set {words}")
    return cls(**settings)


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in inspect.signature(function).parameters.items() if p.kind in kinds}


def _literal(value: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return words[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
