"""Finds what would run code out of data: pickles, eval, YAML loaders that construct objects.

python .ci/banned_calls.py FOLDER...    prints every place; exits with 1 if there is one
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "torch.load", "yaml.full_load", "yaml.unsafe_load"}
YAML_LOADS = {"yaml.load", "yaml.load_all"}
STRICT_LOADER = "_StrictLoader"


def banned(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of every banned thing in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in {alias.name.split(".")[0] for alias in node.names} & MODULES:
                yield node.lineno, f"import of {name}"
        elif isinstance(node, ast.ImportFrom):
            if node.module and node.module.split(".")[0] in MODULES:
                yield node.lineno, f"import of {node.module}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in CALLS:
                yield node.lineno, f"call of {called}"
            if called in YAML_LOADS and keywords.get("Loader") != STRICT_LOADER:
                yield node.lineno, f"call of {called} without Loader={STRICT_LOADER}"
            if keywords.get("allow_pickle", "False") != "False":
                yield node.lineno, f"allow_pickle in a call of {called}"


def main() -> int:
    places = [
        f"{path}:{line}: {what}"
        for folder in sys.argv[1:]
        for path in sorted(Path(folder).rglob("*.py"))
        for line, what in banned(ast.parse(path.read_text()))
    ]
    print("\n".join(places) or "no banned call")
    return 1 if places else 0


if __name__ == "__main__":
    sys.exit(main())
