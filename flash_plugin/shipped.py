"""Configs and recipes that come with the package: where they lie, what each needs, and copies of them.

In a repository they are the folders ``configs/`` and ``recipes/`` beside the package; a wheel carries both inside it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path

_PACKAGE = Path(__file__).parent
_FOLDERS = ("configs", "recipes")
_PATH = re.compile(rf"\b(?:{'|'.join(_FOLDERS)})/([\w./-]*\w)")


def home() -> Path:
    """The folder in which ``configs/`` and ``recipes/`` are.

    Raises:
        RuntimeError: If the package came without them.
    """
    for folder in (_PACKAGE / "_shipped", _PACKAGE.parent):
        if (folder / "configs" / "flash_debug.yaml").is_file():
            return folder
    raise RuntimeError(
        f"configs and recipes (not in {_PACKAGE / '_shipped'}, nor in {_PACKAGE.parent}) must come with the package; "
        "install it anew, from a wheel or the repository"
    )


def names() -> list[str]:
    """Every config, such as ``configs/flash_debug.yaml``, and every recipe, but those of the repository's README."""
    configs, recipes = sorted((home() / "configs").glob("*.yaml")), sorted((home() / "recipes").glob("*.py"))
    scripts = [path for path in recipes if "__main__" in path.read_text()]  # others are parts of them
    return [f"{path.parent.name}/{path.name}" for path in [*configs, *scripts] if path.stem != "figures"]


def described(name: str) -> tuple[str, str]:
    """What launches a config, such as ``tune run generate``, and what it does, in a sentence."""
    header = " ".join(line[1:].strip() for line in _header((home() / name).read_text()))
    launched = re.search(r"\bLaunch\b.*?((?:tune run|python) .*?) --config", header)
    return (launched[1] if launched else ""), re.split(r"[.:;]\s", header)[0]


def find(name: str) -> str:
    """The config ``flash_debug`` or ``flash_debug.yaml``, or the recipe ``plot_loss.py``, as :func:`names` has it.

    Raises:
        ValueError: If there is none, with the nearest names.
    """
    wanted = Path(name).name
    for candidate in (f"configs/{wanted}", f"configs/{wanted}.yaml", f"recipes/{wanted}"):
        if candidate in names():
            return candidate
    stems = {Path(known).stem for known in names()}
    near = get_close_matches(Path(name).stem, stems, n=3, cutoff=0.4) or sorted(stems)
    raise ValueError(
        f"NAME ({name}) must be a config or a recipe that comes with flash_plugin, such as {', '.join(near)}; "
        "`python -m flash_plugin ls` lists them"
    )


def needed(name: str) -> list[str]:
    """The file itself, and whatever it reads, launches or imports of what comes with the package."""
    return _reached(name, _mentioned)


def prepared_with(name: str) -> list[str]:
    """What else comes with the package that the header says to prepare with, and whatever that needs in turn."""
    own = needed(name)
    return [one for one in _reached(name, lambda one: [*_mentioned(one), *_preparing(one)]) if one not in own]


def copy(name: str, destination: Path, *, overwrite: bool = False) -> dict[Path, bool]:
    """Copy a config, or a recipe, with what it needs, and what it is prepared with unless that is there.

    In the copies ``configs/NAME`` and ``recipes/NAME`` are ``NAME``: they are launched from the folder they lie in.

    Args:
        name: As :func:`find` takes it.
        destination: A folder, made if it is not there; or the path of the copy, with the suffix of the original.
        overwrite: Whether files that are there may be replaced. Those that ``name`` is only prepared with never are.

    Raises:
        ValueError: If ``name`` is unknown, a file is there and ``overwrite`` is False, or ``destination`` is where
            another file belongs; nothing is written then.

    Returns:
        The files, that of ``name`` first, and whether each was written; others were there.
    """
    wanted, source = find(name), home()
    renamed = destination.suffix == Path(wanted).suffix
    folder = destination.parent if renamed else destination
    copies = {one: folder / one.partition("/")[2] for one in needed(wanted)}
    if renamed:
        copies[wanted] = destination
    there = [str(path) for path in copies.values() if path.exists()]
    if there and not overwrite:
        raise ValueError(
            f"DESTINATION ({', '.join(there)}) must not exist; say --force to replace, or name another folder"
        )
    kept = []
    for one in prepared_with(wanted):
        path = folder / one.partition("/")[2]
        if path == copies[wanted]:
            raise ValueError(f"DESTINATION ({path}) must not be that of {one}, which comes along; give another name")
        if path.exists():
            kept.append(path)
        else:
            copies[one] = path
    for one, path in copies.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = _PATH.sub(
            lambda found: found[1] if (source / found[0]).exists() else found[0], (source / one).read_text()
        )
        path.write_text(text.replace(f"--config {Path(wanted).name}", f"--config {copies[wanted].name}"))
    return {**dict.fromkeys(copies.values(), True), **dict.fromkeys(kept, False)}


def _header(text: str) -> Iterator[str]:
    for line in text.splitlines():
        if not line.startswith("#"):
            return
        yield line


def _recipe_of(config: str) -> str | None:
    """The recipe of ours that a config is launched with."""
    _, _, recipe = described(config)[0].partition("python ")
    return recipe or None


def _reached(name: str, mentioned: Callable[[str], Iterable[str]]) -> list[str]:
    """A file, whatever it mentions, whatever that mentions, and so on."""
    found: list[str] = []
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.append(current)
            waiting += sorted(set(mentioned(current)) - set(found))
    return found


def _mentioned(name: str) -> Iterator[str]:
    path = home() / name
    text = path.read_text()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom | ast.Import):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                if module and (path.parent / f"{module}.py").exists():
                    yield f"recipes/{module}.py"
        return
    recipe = _recipe_of(name)
    if recipe:
        yield recipe
    for line in text.splitlines():
        content = line.partition("#")[0]
        for module in re.findall(r"_component_: (\w+)\.", content):
            if (home() / "recipes" / f"{module}.py").exists():
                yield f"recipes/{module}.py"
        yield from _paths(content)


def _preparing(name: str) -> Iterator[str]:
    """What the header of a config names where it says what to prepare, before it says how to launch."""
    header = "\n".join(_header((home() / name).read_text()))
    said = re.search(r"^# Prepare\b.*?(?=^# Launch\b)", header, re.MULTILINE | re.DOTALL)
    return _paths(said[0] if said else "")


def _paths(text: str) -> Iterator[str]:
    """The files that a text names, and those in folders it names."""
    for found in _PATH.finditer(text):
        target = home() / found[0]
        if target.is_dir():
            yield from (f"{found[0]}/{inner.name}" for inner in sorted(target.iterdir()) if inner.is_file())
        elif target.exists():
            yield found[0]
