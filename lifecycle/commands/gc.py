"""`lifecycle gc`: free the space of what no kept run refers to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lifecycle.commands.output import Parser, emit, say
from lifecycle.pipeline import files, runs
from lifecycle.pipeline.store import DIGEST, Store


def main(argv: list[str]) -> int:
    """Remove old runs, and every artifact, record and scratch folder that only they used."""
    parser = Parser(
        prog="lifecycle gc",
        description="Remove all but the newest runs, and whatever only the removed ones used.",
    )
    parser.add_argument(
        "--keep",
        type=int,
        default=10,
        metavar="N",
        help="runs to keep of each recipe, besides the last that succeeded (default 10; 0 keeps none)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.add_store()
    parser.add_json()
    args = parser.parse_args(argv)
    if args.keep < 0:
        parser.error("--keep takes 0 or more")
    store = Store.look(args.store).require()
    with store.exclusive():
        doomed = list(_doomed(store, args.keep))
        freed = sum(_size(path) for path in doomed)
        if not args.dry_run:
            for path in doomed:
                files.remove_tree(path) if path.is_dir() else path.unlink()
    artifacts = sum(path.parent.name == "objects" for path in doomed)
    gone = sum(path.parent.name == "runs" for path in doomed)
    if args.json:
        emit({"runs": gone, "artifacts": artifacts, "bytes": freed, "dry_run": args.dry_run})
    else:
        verb = "would remove" if args.dry_run else "removed"
        say(f"{verb} {gone} runs and {artifacts} artifacts: {freed / 1e6:,.1f} MB")
    return 0


def _doomed(store: Store, keep: int) -> Iterator[Path]:
    """What can go: records before the objects they name, so that a crash leaves no dangling one.

    Scratch goes with its run, or when there is nothing left to resume.
    """
    kept: dict[str, int] = {}
    keys: set[str] = set()
    digests: set[str] = set()
    old: list[Path] = []
    succeeded: set[str] = set()
    for run in runs.newest_first(store):
        kept[run.recipe] = kept.get(run.recipe, 0) + 1
        # Its bundle may be what is served, however many runs have failed since.
        last_good = run.status == "ok" and run.recipe not in succeeded
        succeeded |= {run.recipe} if last_good else set[str]()
        if kept[run.recipe] > keep and not (last_good and keep):
            old.append(runs.folder(store, run.run))
            continue
        for stage in run.stages.values():
            keys |= {key for key in (stage.key, *stage.built) if key}
            digests |= {digest for digest in (stage.digest, *stage.built.values()) if digest}
    yield from old
    yield from (p for p in _named(store, "records") if p.stem not in keys)
    yield from (p for p in _named(store, "objects") if p.name not in digests)
    scratch = _named(store, "scratch")
    yield from (p for p in scratch if p.name not in keys or store.record(p.name))
    yield from (store.root / "tmp").iterdir()
    locks = (store.root / "locks").iterdir()
    yield from (p for p in locks if p.stem not in keys and p.stem != "store")


def _named(store: Store, folder: str) -> Iterator[Path]:
    """What lies there under a key or a digest: anything else is not the store's to remove."""
    paths = (store.root / folder).iterdir()
    return (p for p in paths if DIGEST.fullmatch(p.name.removesuffix(".json")))


def _size(path: Path) -> int:
    """Bytes that removing it frees; a file that is linked elsewhere frees none."""
    paths = path.rglob("*") if path.is_dir() else [path]
    stats = [p.lstat() for p in paths if not p.is_dir()]
    return sum(s.st_size for s in stats if s.st_nlink == 1)
