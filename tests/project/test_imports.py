"""Which room may import which. Every import counts, wherever in a file it stands."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "persyn_jax"

# A room imports only from floors below its own, and from its own files without going in a circle.
FLOOR = {
    "config": 1,
    "huge_pages": 1,
    "intervals": 1,
    "mesh": 1,
    "provenance": 1,
    "records": 1,
    "streams": 1,
    "models": 1,
    "gossip": 1,
    "sampling": 2,
    "training": 2,
    "routing": 2,
    "evaluation": 2,
    "store": 2,
    "pipeline": 3,
    "bench": 3,
    "reporting": 3,
    "scripts": 4,
    "tests": 5,
}
# And from these on its own floor: files of the ground floor serve what stands beside them, and the
# report is a stage. Gossip takes little, for those who never heard of prompts and teachers.
BESIDE = {
    "models": {"config", "mesh", "records", "streams"},
    "gossip": {"mesh", "streams"},
    "intervals": {"streams"},
    "provenance": {"config"},
    "pipeline": {"reporting"},
}
MAY_IMPORT_FLAX = {"models", "tests"}
# Scripts for a Python of its own, which has what they compare us with. Nothing imports them.
STANDS_ALONE = {
    Path(PACKAGE, "bench", "llama_cpp_peer.py"),
    Path(PACKAGE, "bench", "transformers_peer.py"),
    Path("tests", "models", "parity", "record_parity.py"),
    Path("tests", "models", "reward_models", "record_rewards.py"),
}


def violations(root: Path) -> list[str]:
    """Every broken rule in the tree at `root`, as `file:line: what`."""
    folders = (PACKAGE, "scripts", "tests")
    paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    paths = [path for path in paths if path.relative_to(root) not in STANDS_ALONE]
    modules = {path: module_name(path.relative_to(root)) for path in paths}
    known = {name for module in modules.values() for name in (module, *parents(module))}
    broken = []
    inside: dict[str, set[str]] = {module: set() for module in modules.values()}
    for path, module in modules.items():
        room = room_of(module)
        for line, imported in imports_of(path, module, known):
            complaint = complaint_about(room, imported)
            if complaint:
                broken.append(f"{path.relative_to(root)}:{line}: {complaint}")
            if room_of(imported) == room and imported in inside:
                inside[module].add(imported)
    try:
        graphlib.TopologicalSorter(inside).prepare()
    except graphlib.CycleError as error:
        broken.append("circle: " + " -> ".join(error.args[1]))
    return broken


def complaint_about(room: str, imported: str) -> str | None:
    """What is wrong when a file of `room` imports `imported`, if anything is."""
    if room not in FLOOR and room != PACKAGE:
        return f"{room} is on no floor"
    top = imported.split(".")[0]
    if top == "torch":
        return "imports torch"
    if top == "flax" and room not in MAY_IMPORT_FLAX:
        return f"{room} imports flax"
    other = room_of(imported)
    if other in (room, PACKAGE, None) or other in BESIDE.get(room, set()):
        return None
    if FLOOR.get(other, 9) < FLOOR.get(room, 0):
        return None
    return f"{room} imports {other}"


def room_of(module: str) -> str | None:
    """The room of one of our modules, the package's own name for its first file, else None."""
    top, *rest = module.split(".")
    if top == PACKAGE:
        return rest[0] if rest else PACKAGE
    return top if top in ("scripts", "tests") else None


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def imports_of(path: Path, module: str, known: set[str]) -> list[tuple[int, str]]:
    """(line, imported module) of every import; `from a import b` is a.b if that is one of ours."""
    package = module if path.name == "__init__.py" else parents(module)[-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: 1 - node.level or None] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name if name in known else origin) for name in names]
    return found


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_project_keeps_its_floors():
    assert (ROOT / PACKAGE / "__init__.py").is_file()
    assert violations(ROOT) == []


def test_lawful_imports_pass(tmp_path):
    root = plant(
        tmp_path,
        {
            "persyn_jax/__init__.py": "__version__ = '1'",
            "persyn_jax/config.py": "import yaml",
            "persyn_jax/mesh.py": "import jax",
            "persyn_jax/streams.py": "",
            "persyn_jax/models/__init__.py": "",
            "persyn_jax/models/decoder.py": "import flax.linen\nfrom persyn_jax.config import load",
            "persyn_jax/gossip/__init__.py": "from persyn_jax.gossip import rules",
            "persyn_jax/gossip/rules.py": "from . import exchange",
            "persyn_jax/gossip/exchange.py": "from persyn_jax import mesh, streams",
            "persyn_jax/training/loop.py": "from persyn_jax import gossip, models",
            "persyn_jax/store/rows.py": "from persyn_jax import __version__, config",
            "persyn_jax/pipeline/route.py": "import persyn_jax.store.rows, persyn_jax.gossip",
            "persyn_jax/pipeline/report.py": "from persyn_jax import reporting",
            "persyn_jax/reporting/__init__.py": "",
            "scripts/route.py": "def main():\n    from persyn_jax.pipeline import route",
            "tests/test_all.py": "from scripts import route\nimport flax",
        },
    )
    assert violations(root) == []


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("persyn_jax/models/m.py", "import persyn_jax.training.loop", "models imports training"),
        ("persyn_jax/models/m.py", "from persyn_jax import gossip", "models imports gossip"),
        ("persyn_jax/models/m.py", "from ..gossip import rules", "models imports gossip"),
        ("persyn_jax/gossip/g.py", "from persyn_jax.models import m", "gossip imports models"),
        ("persyn_jax/gossip/g.py", "from persyn_jax import records", "gossip imports records"),
        ("persyn_jax/gossip/g.py", "from ..records import Prompt", "gossip imports records"),
        ("persyn_jax/routing/r.py", "from persyn_jax import store", "routing imports store"),
        ("persyn_jax/store/s.py", "import persyn_jax.sampling", "store imports sampling"),
        ("persyn_jax/reporting/r.py", "from persyn_jax import bench", "reporting imports bench"),
        ("persyn_jax/pipeline/p.py", "import scripts.route", "pipeline imports scripts"),
        ("persyn_jax/training/t.py", "from flax import linen", "training imports flax"),
        ("scripts/route.py", "import flax.linen as nn", "scripts imports flax"),
        ("persyn_jax/models/m.py", "import torch.nn", "imports torch"),
        ("tests/test_models.py", "from torch import nn", "imports torch"),
        ("persyn_jax/config.py", "from persyn_jax import streams", "config imports streams"),
        ("persyn_jax/__init__.py", "from persyn_jax import gossip", "persyn_jax imports gossip"),
        ("persyn_jax/attic/a.py", "import os", "attic is on no floor"),
        ("scripts/route.py", "from persyn_jax.attic import a", "scripts imports attic"),
    ],
)
def test_each_broken_rule_is_found_at_any_depth_of_a_file(tmp_path, path, line, complaint):
    """The rooms that the planted line names are there, with and without an `__init__.py`."""
    rooms = {f"persyn_jax/{room}/x.py": "" for room in ("training", "bench", "store", "sampling")}
    rooms |= {f"persyn_jax/{name}.py": "" for name in ("records", "streams", "gossip/rules")}
    inner = f"def late():\n    if True:\n        {line}\n"
    assert violations(plant(tmp_path / "top", rooms | {path: line})) == [f"{path}:1: {complaint}"]
    assert violations(plant(tmp_path / "in", rooms | {path: inner})) == [f"{path}:3: {complaint}"]


def test_circle_inside_a_room_is_found(tmp_path):
    root = plant(
        tmp_path,
        {
            "persyn_jax/routing/a.py": "from persyn_jax.routing import b",
            "persyn_jax/routing/b.py": "def late():\n    from . import c",
            "persyn_jax/routing/c.py": "from persyn_jax.routing.a import x",
        },
    )
    (found,) = violations(root)
    assert found.startswith("circle: ")
    assert {f"persyn_jax.routing.{name}" for name in "abc"} <= set(found[8:].split(" -> "))
