"""Source fingerprints on a small package of our own: they follow every import, and nothing else."""

import pytest

from persyn_jax.provenance import source_fingerprint

FILES = {
    "app/__init__.py": "",
    "app/stage.py": "import os\nfrom app.room import tool\n",
    "app/room/__init__.py": "from app.room.other import thing\n",
    "app/room/tool.py": "def run():\n    from ..base import helper\n    return helper()\n",
    "app/room/other.py": "thing = 1\n",
    "app/base.py": "import app.cycle as c\nhelper = 1\n",
    "app/cycle.py": "from . import stage\n",
    "app/room/page.html.j2": "<p>",
    "app/unrelated.py": "x = 1\n",
    "other/__init__.py": "",
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "changed",
    [name for name in FILES if name not in ("app/unrelated.py", "other/__init__.py")],
)
def test_a_change_in_anything_imported_changes_it(root, changed):
    before = source_fingerprint("app.stage", root)
    (root / changed).write_text(FILES[changed] + "# changed\n")
    assert source_fingerprint("app.stage", root) != before


@pytest.mark.parametrize("changed", ["app/unrelated.py", "other/__init__.py", "app/room/new.py"])
def test_a_change_elsewhere_does_not(root, changed):
    before = source_fingerprint("app.stage", root)
    (root / changed).write_text("# changed\n")
    assert source_fingerprint("app.stage", root) == before


def test_where_the_package_lies_does_not_matter(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name, text in FILES.items():
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_text(text)
    assert source_fingerprint("app.stage", elsewhere) == source_fingerprint("app.stage", root)


def test_moving_text_from_one_file_to_the_next_changes_it(root):
    (root / "app/base.py").write_text("import app.cycle as c\n")
    (root / "app/cycle.py").write_text("from . import stage\nhelper = 1\n")
    moved = source_fingerprint("app.stage", root)
    (root / "app/base.py").write_text("import app.cycle as c\nhelper = 1\n")
    (root / "app/cycle.py").write_text("from . import stage\n")
    assert source_fingerprint("app.stage", root) != moved


def test_an_unknown_module_is_refused(root):
    with pytest.raises(ValueError, match=r"app\.nothing: no such module"):
        source_fingerprint("app.nothing", root)
    with pytest.raises(ValueError, match="no such module"):
        source_fingerprint("app.stage.name", root)
