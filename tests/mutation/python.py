"""Mutants of the package's Python: mutmut's, and of whole statements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Final

import libcst as cst
import libcst.matchers as m
from libcst.metadata import (
    CodeRange,
    MetadataWrapper,
    ParentNodeProvider,
    PositionProvider,
    WhitespaceInclusivePositionProvider,
)
from mutmut.mutation.mutators import mutation_operators

from .mutants import Mutant, changed

#: What no test can tell, or what only people read: types, docstrings, messages, log lines.
_SKIPPED: Final = (
    m.Annotation()
    | m.Decorator()
    | m.ImportFrom()
    | m.Expr(m.SimpleString() | m.ConcatenatedString())
    | m.Assign(targets=[m.AssignTarget(m.Name("__all__"))])
    | m.Assign(value=m.Call(m.Name("TypeVar")))
    | m.If(test=m.Name("TYPE_CHECKING"))
    | m.Call(m.Attribute(m.Name("logger")))
    | m.Call(m.Name("cast"))
)

#: Operators of mutmut: an argument in two ways; a match, which is laid out without indentation.
_LEFT_OUT: Final = {"arg_removal", "match"}

#: What would only become another false value.
_NOTHING: Final = m.Name("None") | m.Name("False")
_FALSY: Final = m.Assign(value=_NOTHING) | m.AnnAssign(value=_NOTHING) | m.Return(_NOTHING)

#: Arguments whose loss changes nothing.
_EQUIVALENT: Final = m.Arg(m.Name("None")) | m.Arg(keyword=m.Name("strict"))


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """Yield every mutant of a module; some may be no Python."""
    wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    visitor = _Visitor(file, source, wrapper)
    wrapper.module.visit(visitor)
    yield from visitor.found


class _Visitor(cst.CSTVisitor):
    def __init__(self, file: str, source: str, wrapper: MetadataWrapper) -> None:
        self.file, self.source, self.module = file, source, wrapper.module
        self.parents = wrapper.resolve(ParentNodeProvider)
        self.whole: Mapping[cst.CSTNode, CodeRange] = wrapper.resolve(
            WhitespaceInclusivePositionProvider
        )
        self.places: Mapping[cst.CSTNode, CodeRange] = wrapper.resolve(PositionProvider)
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutant] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        if m.matches(node, _SKIPPED):
            return False
        for kind, other in _replacements(node):
            self._add(node, kind, self.module.code_for_node(other))
        above = self.parents.get(node)
        if isinstance(above, cst.If | cst.While) and above.test is node:
            self._add(node, "condition", f"not ({self.module.code_for_node(node)})")
        # What is raised is mostly a message.
        return not isinstance(node, cst.Raise)

    def _add(self, node: cst.CSTNode, kind: str, text: str) -> None:
        where = self.whole[node]
        start = self.starts[where.start.line - 1] + where.start.column
        end = self.starts[where.end.line - 1] + where.end.column
        if text == self.source[start:end]:
            return
        first, last, binds = self._statement(node)
        self.found.append(
            changed(
                self.file, self.source, start, end, text,
                kind=kind, first=first, last=last, binds=binds,
            )
        )  # fmt: skip

    def _statement(self, node: cst.CSTNode) -> tuple[int, int, str]:
        """Return the lines of the statement, or head of one, around a node; and what it binds.

        It binds something where it is outside functions, or is the head of one: it runs at import.
        """
        inner = node
        while not isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            inner, node = node, self.parents[node]
        lines = self.places[node]
        last = lines.end.line
        if isinstance(node, cst.BaseCompoundStatement):
            last = self.places[inner].end.line
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            return lines.start.line, last, node.name.value
        above: cst.CSTNode | None = node
        while above is not None and not isinstance(above, cst.FunctionDef):
            above = self.parents.get(above)
        return lines.start.line, last, "" if above else _bound(node)


def _bound(node: cst.CSTNode) -> str:
    names = m.findall(node, m.AssignTarget() | m.AnnAssign())
    target = names[0].target if names else None  # type: ignore[attr-defined]
    return target.value if isinstance(target, cst.Name) else "import"


def _replacements(node: cst.CSTNode) -> Iterator[tuple[str, Any]]:
    is_falsy = m.matches(node, _FALSY)
    for kind, operator in mutation_operators:
        name = operator.__name__.removeprefix("operator_")
        if isinstance(node, kind) and name not in _LEFT_OUT and not is_falsy:
            # The first of several does; other strings differ in letter case only.
            others = operator(node)
            for other in islice(others, 1) if name == "string" else others:
                yield name, other
    match node:
        case cst.Expr(value=cst.Call() | cst.Yield()) | cst.Raise():
            yield "statement", cst.Pass()
        case cst.Return(value=cst.BaseExpression(), whitespace_after_return=space) if not is_falsy:
            yield "return", cst.Return(cst.Name("None"), whitespace_after_return=space)
        case cst.Call(args=args):
            for at, argument in enumerate(args):
                # Without one in its place, those behind it would be other arguments.
                rest = [argument.with_changes(value=cst.Name("None"))]
                if argument.keyword or argument.star:
                    rest = []
                if not m.matches(argument, _EQUIVALENT):
                    yield "argument", node.with_changes(args=[*args[:at], *rest, *args[at + 1 :]])
