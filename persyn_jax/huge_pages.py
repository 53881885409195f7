"""Huge pages for the large arrays of a program that computes on CPU."""

import os
import sys
from collections.abc import Mapping

_VARIABLE, _SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def ask_for_huge_pages() -> None:
    """Starts this program anew, once, with its memory in huge pages. For a script's first line.

    XLA takes fresh memory for every large array that a program on CPU makes, and Linux hands it out
    in pages of 4 KiB, which takes as long as filling it. With `madvise` in
    /sys/kernel/mm/transparent_hugepage/enabled, as usual, it hands out pages of 2 MiB to those who
    ask; glibc's malloc asks if an environment variable says so, and reads that only at the start.
    A GLIBC_TUNABLES that is there already stands, also an empty one. Does nothing elsewhere than on
    Linux, nor where the script is not the program but run by it; another C library does not know
    the variable.
    """
    is_program = sys.argv[0] in sys.orig_argv
    if sys.platform == "linux" and is_program and _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = _SETTING
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def without_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without what `ask_for_huge_pages` set in it: for a program of others."""
    return {k: v for k, v in environment.items() if (k, v) != (_VARIABLE, _SETTING)}
