"""One module out of several: the definitions that some names need, in the order in which Python runs them.

Sources are read, not imported, and a definition is taken as it is written, comments included. Imports within the
package go, and so do the shapes of jaxtyping: ``Float[Tensor, "batch seq"]`` becomes ``Tensor``.
"""

import ast
import builtins
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources.abc import Traversable

SHAPES = "jaxtyping"
WIDTH = 120


class SourceError(RuntimeError):
    """The modules do not fit into one: a mistake in the package, not of whoever uses it."""


@dataclass(frozen=True, kw_only=True)
class Definition:
    """A statement of a module that binds names.

    Attributes:
        module: Where it stands.
        names: What it binds.
        text: Its source.
        needs: Names that it reads, those of its own variables among them.
        imports: Roots of what it imports when it runs.
    """

    module: str
    names: tuple[str, ...]
    text: str
    needs: frozenset[str]
    imports: frozenset[str]

    @property
    def meaning(self) -> str:
        """The same for two definitions that differ in comments and layout alone."""
        return ast.dump(ast.parse(self.text).body[0])


@dataclass
class Source:
    """A module that was read.

    Attributes:
        name: Its dotted name.
        definitions: In their order.
        inner: Name → the module of the package, and the name there, that it is imported from.
        outer: Name → the statement that imports it from elsewhere.
        effects: Lines of statements that bind no name and so can be in no definition.
    """

    name: str
    definitions: list[Definition] = field(default_factory=list)
    inner: dict[str, tuple[str, str]] = field(default_factory=dict)
    outer: dict[str, str] = field(default_factory=dict)
    effects: list[int] = field(default_factory=list)

    def defining(self, name: str) -> Definition | None:
        """Returns the definition that binds ``name`` last, as a later one takes the place of an earlier."""
        return next((one for one in reversed(self.definitions) if name in one.names), None)


def flatten(
    folder: Traversable,
    package: str,
    roots: Sequence[tuple[str, str]],
    *,
    allowed: Iterable[str] = (),
    kept: Mapping[str, Iterable[str]] | None = None,
) -> str:
    """Returns the source of a module that defines ``roots`` and all that they need of ``package``.

    Args:
        folder: The folder of the package.
        package: Its name.
        roots: Modules and names in them.
        allowed: Packages beside the standard library that may be imported.
        kept: Class → the methods to keep; all others of that class are left out.

    Raises:
        SourceError: Two modules give one name two meanings, or a statement cannot be moved to another module.
    """
    reader = _Reader(folder, package, {name: frozenset(methods) for name, methods in (kept or {}).items()})
    taken, outer = _reached(reader, roots)
    known = {*sys.stdlib_module_names, *allowed}
    for definition in taken.values():
        if surplus := definition.imports - known:
            raise SourceError(f"{_place(definition)} imports {min(surplus)}, which may not be there. Move it out.")
    for statement in outer.values():
        if statement.split()[1].split(".")[0] not in known:
            raise SourceError(f"{statement!r} brings a package that may not be there. Move what needs it out.")
    parts = _import_block(outer.values())
    parts += [definition.text for definition in _in_order(reader, roots, taken.values(), outer)]
    return "\n\n".join(part if "\n" not in part else f"\n{part}" for part in parts) + "\n"


def _reached(reader: "_Reader", roots: Sequence[tuple[str, str]]) -> tuple[dict[int, Definition], dict[str, str]]:
    """Returns the definitions that the roots need, by identity, and the imports by name."""
    taken: dict[int, Definition] = {}
    outer: dict[str, str] = {}
    waiting = [(module, name, True) for module, name in roots]
    seen = set(waiting)
    while waiting:
        module, name, must_be_there = waiting.pop()
        source = reader[module]
        if definition := source.defining(name):
            if source.effects:
                raise SourceError(f"{module}, line {source.effects[0]}: a statement that binds no name would be lost.")
            taken[id(definition)] = definition
            further = [(module, need, False) for need in sorted(definition.needs)]
        elif name in source.inner:
            origin, original = source.inner[name]
            if original != name:
                raise SourceError(f"{module} imports {original} as {name}; one file has one name for it.")
            further = [(origin, name, True)]
        elif name in source.outer:
            statement = outer.setdefault(name, source.outer[name])
            if statement != source.outer[name]:
                raise SourceError(f"{name} means {statement!r} in one module and {source.outer[name]!r} in {module}.")
            further = []
        elif must_be_there:
            raise SourceError(f"{module} defines no {name}; a module that is imported whole cannot be flattened.")
        else:  # a builtin, or a variable of a function
            further = []
        waiting += [one for one in further if one not in seen]
        seen.update(further)
    return taken, outer


def _in_order(
    reader: "_Reader", roots: Sequence[tuple[str, str]], taken: Iterable[Definition], outer: Mapping[str, str]
) -> Iterator[Definition]:
    """Yields each definition once: modules after those that they import, and within a module as they stand."""
    order: dict[str, None] = {}

    def visit(module: str, above: tuple[str, ...] = ()) -> None:
        if module in order or module in above:
            return
        for origin, _ in reader[module].inner.values():
            visit(origin, (*above, module))
        order[module] = None

    for module, _ in roots:
        visit(module)
    chosen = {id(definition) for definition in taken}
    owners: dict[str, Definition] = {}
    for module in order:
        for definition in reader[module].definitions:
            if id(definition) in chosen and _is_new(definition, owners, outer):
                yield definition


def _is_new(definition: Definition, owners: dict[str, Definition], outer: Mapping[str, str]) -> bool:
    """Claims the names of a definition; ``False`` if another module has defined the very same.

    Raises:
        SourceError: A name already means something else.
    """
    for name in definition.names:
        if name in outer or hasattr(builtins, name):
            raise SourceError(f"{_place(definition)}: {name} is imported elsewhere, or a builtin. Rename it.")
        other = owners.setdefault(name, definition)
        if other is not definition and other.meaning != definition.meaning:
            raise SourceError(f"{name} is defined by {other.module} and, differently, by {definition.module}. Rename.")
    return all(owners[name] is definition for name in definition.names)


def _import_block(statements: Iterable[str]) -> list[str]:
    """Returns the imports as blocks, the standard library first, one statement a module."""
    whole: set[str] = set()
    names: dict[str, set[str]] = {}
    for statement in statements:
        if statement.startswith("import "):
            whole.add(statement)
        else:
            module, name = statement.removeprefix("from ").split(" import ")
            names.setdefault(module, set()).add(name)
    lines = {statement: statement.split()[1] for statement in whole}
    for module, wanted in names.items():
        line = f"from {module} import {', '.join(sorted(wanted))}"
        if len(line) > WIDTH:
            line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in sorted(wanted)) + ")"
        lines[line] = module
    blocks: tuple[list[str], list[str]] = [], []
    for line in sorted(lines, key=lambda line: (line.startswith("from"), lines[line])):
        blocks[lines[line].split(".")[0] not in sys.stdlib_module_names].append(line)
    return ["\n".join(block) for block in blocks if block]


def _place(definition: Definition) -> str:
    return f"{definition.module}.{definition.names[0]}"


class _Reader:
    """The modules of a package, each read once."""

    def __init__(self, folder: Traversable, package: str, kept: Mapping[str, frozenset[str]]) -> None:
        self.folder, self.package, self.kept = folder, package, kept
        self.sources: dict[str, Source] = {}

    def __getitem__(self, module: str) -> Source:
        if module not in self.sources:
            self.sources[module] = self._read(module)
        return self.sources[module]

    def _read(self, module: str) -> Source:
        place = self.folder.joinpath(*module.split(".")[1:])
        file = self.folder.joinpath(*module.split(".")[1:-1], f"{module.split('.')[-1]}.py")
        file = place.joinpath("__init__.py") if place.is_dir() else file
        text = file.read_bytes()
        source, shapes = Source(name=module), set[str]()
        previous: ast.stmt | None = None
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._take_import(source, shapes, node)
            elif names := _bound(node):
                statement = _Statement(text, node, frozenset(shapes), self.kept)
                source.definitions.append(statement.definition(module, names, self.package))
            elif _is_text(node):
                if isinstance(previous, ast.Assign | ast.AnnAssign):  # what documents a constant
                    last = source.definitions[-1]
                    lines = text.decode().splitlines()[node.lineno - 1 : node.end_lineno]
                    source.definitions[-1] = Definition(**{**vars(last), "text": "\n".join((last.text, *lines))})
            else:
                source.effects.append(node.lineno)
            previous = node
        return source

    def _take_import(self, source: Source, shapes: set[str], node: ast.Import | ast.ImportFrom) -> None:
        origin = node.module if isinstance(node, ast.ImportFrom) else None
        if isinstance(node, ast.ImportFrom) and node.level:
            raise SourceError(f"{source.name}, line {node.lineno}: imports must be absolute to be followed.")
        for alias in node.names:
            bound = alias.asname or alias.name.split(".")[0]
            renamed = f" as {alias.asname}" if alias.asname else ""
            if origin is None:
                if alias.name.split(".")[0] == self.package:
                    raise SourceError(f"{source.name}, line {node.lineno}: imports of the package must name what.")
                source.outer[bound] = f"import {alias.name}{renamed}"
            elif origin.split(".")[0] == self.package:
                source.inner[bound] = (origin, alias.name)
            elif origin == SHAPES:
                shapes.add(bound)
            else:
                source.outer[bound] = f"from {origin} import {alias.name}{renamed}"


class _Statement:
    """A top-level statement, as its text without what is left out."""

    def __init__(self, text: bytes, node: ast.stmt, shapes: frozenset[str], kept: Mapping[str, frozenset[str]]) -> None:
        self.lines, self.node, self.shapes = text.splitlines(keepends=True), node, shapes
        self.needs: set[str] = set()
        self.imports: set[str] = set()
        self.changes: list[tuple[tuple[int, int], tuple[int, int], bytes]] = []
        self.left_out = set[ast.stmt]()
        if isinstance(node, ast.ClassDef) and node.name in kept:
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef)]
            self.left_out = {one for one in methods if one.name not in kept[node.name]}

    def definition(self, module: str, names: tuple[str, ...], package: str) -> Definition:
        """Returns the statement with its text and all that it reads."""
        self._visit(self.node)
        if self.needs & self.shapes:
            raise SourceError(f"{module}.{names[0]} uses {min(self.needs & self.shapes)} for more than a shape.")
        if package in self.imports:
            raise SourceError(f"{module}.{names[0]} imports from {package} when it runs; import it at the top.")
        return Definition(
            module=module,
            names=names,
            text=self._text(),
            needs=frozenset(self.needs),
            imports=frozenset(self.imports),
        )

    def _visit(self, node: ast.AST) -> None:
        if node in self.left_out:
            assert isinstance(node, ast.FunctionDef)
            assert node.end_lineno is not None
            first = _first_line(node)
            while not self.lines[first - 2].strip():
                first -= 1
            self.changes.append(((first, 0), (node.end_lineno + 1, 0), b""))
            return
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in self.shapes:
            assert isinstance(node.slice, ast.Tuple)
            kind = node.slice.elts[0]
            self.changes.append((_start(node), _end(node), ast.unparse(kind).encode()))
            self._visit(kind)
            return
        if isinstance(node, ast.Name):
            self.needs.add(node.id)
        elif isinstance(node, ast.Import):
            self.imports.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            self.imports.add((node.module or "").split(".")[0])
        for child in ast.iter_child_nodes(node):
            self._visit(child)

    def _text(self) -> str:
        first, last = _first_line(self.node), self.node.end_lineno
        assert last is not None
        while first > 1 and self.lines[first - 2].startswith(b"#"):
            first -= 1
        offsets = [0]
        for line in self.lines[first - 1 : last]:
            offsets.append(offsets[-1] + len(line))
        text = b"".join(self.lines[first - 1 : last])
        for (from_line, from_column), (to_line, to_column), new in sorted(self.changes, reverse=True):
            start, end = offsets[from_line - first] + from_column, offsets[to_line - first] + to_column
            text = text[:start] + new + text[end:]
        return text.decode().rstrip()


def _bound(node: ast.stmt) -> tuple[str, ...]:
    """The names that a definition binds; none if it is none."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return (node.name,)
    if isinstance(node, ast.AnnAssign):
        return (node.target.id,) if isinstance(node.target, ast.Name) else ()
    if not isinstance(node, ast.Assign):
        return ()
    targets = [one for target in node.targets for one in (target.elts if isinstance(target, ast.Tuple) else [target])]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return tuple(names) if len(names) == len(targets) else ()


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _first_line(node: ast.stmt) -> int:
    """The line of the statement, or of its first decorator."""
    return min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])


def _start(node: ast.expr) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _end(node: ast.expr) -> tuple[int, int]:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.end_lineno, node.end_col_offset
