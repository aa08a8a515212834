"""`lifecycle recipes`: the recipes that come with the project."""

from __future__ import annotations

import re
from pathlib import Path

from lifecycle.commands.output import Parser, emit, say, table
from lifecycle.errors import RecipeError
from lifecycle.pipeline import shipped
from lifecycle.pipeline.document import read


def main(argv: list[str]) -> int:
    """List, show or copy."""
    parser = Parser(prog="lifecycle recipes", description="The recipes that come with the project.")
    parser.add_argument("action", nargs="?", choices=("list", "show", "copy"), default="list")
    parser.add_argument("name", nargs="?", help="the recipe to show or copy")
    parser.add_argument("target", nargs="?", help="copy: the file to write (default: NAME.yaml)")
    parser.add_json()
    args = parser.parse_intermixed_args(argv)
    if args.action == "list":
        return _list(args.json)
    if args.name is None:
        parser.error(f"{args.action} needs the name of a recipe")
    path = shipped.find_recipe(args.name)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError("not UTF-8 text", file=path) from error
    if args.action == "show":
        emit({"name": path.stem, "text": text}) if args.json else say(text.rstrip())
        return 0
    target = Path(args.target or path.name)
    return _copy(_renamed(text, path.stem, target), target, args.json)


def _list(as_json: bool) -> int:
    found = {
        name: str(read(path).data.get("description", ""))
        for name, path in shipped.recipes().items()
    }
    if as_json:
        emit({"recipes": found})
    else:
        table(("recipe", "what it does"), found.items())
    return 0


def _renamed(text: str, name: str, target: Path) -> str:
    """The recipe under the name of its new file, or `serve NAME` would soon mean another model."""
    if target.stem == name or re.fullmatch(r"[A-Za-z][\w-]*", target.stem) is None:
        return text
    text = text.replace(f"# lifecycle run {name}\n", f"# lifecycle run {target.name}\n", 1)
    return re.sub(rf"^name: {re.escape(name)}$", f"name: {target.stem}", text, count=1, flags=re.M)


def _copy(text: str, target: Path, as_json: bool) -> int:
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError("exists already; name another file", file=target) from None
    except OSError as error:
        raise RecipeError(f"cannot be written: {error.strerror}", file=target) from error
    emit({"path": str(target)}) if as_json else say(
        f"{target}: edit it, then lifecycle run {target}"
    )
    return 0
