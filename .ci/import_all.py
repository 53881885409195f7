"""Imports every module of the installed package PACKAGE, and says how many there were.

python .ci/import_all.py PACKAGE
"""

import importlib
import pkgutil
import sys
from pathlib import Path

package = importlib.import_module(sys.argv[1])
names = [module.name for module in pkgutil.walk_packages(package.__path__, f"{sys.argv[1]}.")]
for name in names:
    importlib.import_module(name)

place = Path(str(package.__file__)).parent
assert Path(sys.prefix) in place.parents, f"{place} is not the installed package"
on_disk = sum(1 for path in place.rglob("*.py") if path != place / "__init__.py")
assert len(names) == on_disk, f"{on_disk} modules installed, {len(names)} importable by name"
print(f"{len(names)} modules of {sys.argv[1]} imported from {place}")
