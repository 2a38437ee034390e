"""The description for an index, and the compiled catalogues of translations."""

from __future__ import annotations

import re
from pathlib import Path

import polib
from setuptools import setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
# Less relative links and pictures, which an index cannot follow.
readme = (root / "README.md").read_text(encoding="utf-8")
without_pictures = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", readme)


class BuildWithCatalogues(build_py):
    """Compile each catalogue, in the wheel, or beside its source for an editable installation."""

    def run(self) -> None:
        """Copy the package, then compile."""
        super().run()
        folder = root if self.editable_mode else Path(self.build_lib)
        for source in folder.glob("django_clustered_sessions/locale/*/LC_MESSAGES/*.po"):
            polib.pofile(str(source)).save_as_mofile(str(source.with_suffix(".mo")))


setup(
    cmdclass={"build_py": BuildWithCatalogues},
    long_description=re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", without_pictures),
)
