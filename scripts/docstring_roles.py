"""Griffe extension of the reference: Sphinx's roles in docstrings, as Markdown has them."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(?:~[\w.]*\.)?([^`]+)`")


class DocstringRoles(griffe.Extension):
    """``:func:`~module.name``` becomes ```name```."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)
