"""Fingerprints of source code: has anything changed that a stage runs?"""

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE_PARENT = Path(__file__).parent.parent
_DATA_SUFFIXES = (".j2", ".json")


def source_fingerprint(module: str, root: Path = PACKAGE_PARENT) -> str:
    """16 hex digits over the source of `module` and of all that it imports from its own package.

    Imports are followed transitively, those inside functions too, by reading the source: nothing is
    imported. Templates and JSON beside a module count as its source. Other packages do not count.

    module: dotted name, e.g. `persyn_jax.pipeline.score`. root: the folder that holds the package.
    Raises ValueError if there is no such module.
    """
    if _source_file(module, root) is None:
        raise ValueError(f"{module}: no such module under {root}")
    digest = hashlib.sha256()
    for file in sorted(_files(module, root)):
        digest.update(f"{file.relative_to(root).as_posix()}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _files(module: str, root: Path) -> set[Path]:
    """The source files of `module` and of its imports, and the data files beside them."""
    files: set[Path] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _source_file(name, root)
        if file is None or file in files:
            continue
        files.add(file)
        waiting += _ancestors(name)
        waiting += _imports(name, file)
    beside = {path for file in files for path in file.parent.iterdir()}
    return files | {path for path in beside if path.suffix in _DATA_SUFFIXES}


def _source_file(name: str, root: Path) -> Path | None:
    """Where module `name` is written; None if it is no module of this root, e.g. a class."""
    stem = root.joinpath(*name.split("."))
    candidates = (stem / "__init__.py", stem.with_name(stem.name + ".py"))
    return next((path for path in candidates if path.is_file()), None)


def _ancestors(name: str) -> list[str]:
    """The packages around `name`: importing it runs their __init__ files."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _imports(name: str, file: Path) -> Iterator[str]:
    """The dotted names of its own package that `file` imports: modules, or names inside them."""
    package = name.split(".")[0]
    # Relative imports count from the package that holds the module; an __init__ is its own package.
    home = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found = [source, *(f"{source}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (target for target in found if target.split(".")[0] == package)
