from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lifecycle.errors import CorruptArtifactError, StoreError
from lifecycle.pipeline import files
from lifecycle.pipeline.artifact import canonical_json, digest_of
from lifecycle.pipeline.store import Action, Store
from tests.pipeline.toys import Number


def put(store: Store, contents: dict[str, bytes], value: int = 0) -> str:
    action = Action("toy", 1, {"value": value}, {})
    out = store.new_output(action.key)
    for name, data in contents.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return store.commit(action, out, Number, {}, 0.0, []).digest


def test_artifacts_are_read_only_and_named_by_content(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "s")
    one = put(store, {"a": b"1", "sub/b": b"2"}, value=1)
    two = put(store, {"a": b"1", "sub/b": b"2"}, value=2)
    other = put(store, {"a": b"1", "sub/c": b"2"}, value=3)
    assert one == two != other
    assert len(list((store.root / "objects").iterdir())) == 2
    assert not (store.path(one) / "a").stat().st_mode & 0o222
    assert list((store.root / "tmp").iterdir()) == []


def test_a_damaged_twin_is_replaced(tmp_path: Path) -> None:
    digest = put(Store.open(tmp_path), {"a": b"1"}, value=1)
    path = tmp_path / "objects" / digest / "a"
    path.chmod(0o644)
    path.write_bytes(b"2")
    fresh = Store.open(tmp_path)
    with pytest.raises(CorruptArtifactError, match="a has changed"):
        fresh.artifact(digest, Number)
    assert put(fresh, {"a": b"1"}, value=2) == digest
    assert path.read_bytes() == b"1"


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path)
    (tmp_path / "store.json").write_text('{"format": 2}')
    with pytest.raises(StoreError, match="has format 2, this version reads 1: upgrade"):
        Store.open(tmp_path)
    (tmp_path / "store.json").write_text("x")
    with pytest.raises(StoreError, match="is no store"):
        Store.open(tmp_path)


def test_a_store_cannot_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(StoreError, match="is no store"):
        Store.open(path)


def test_the_place_of_the_store(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LIFECYCLE_STORE", raising=False)
    assert Store.open().root == tmp_path / ".lifecycle"
    monkeypatch.setenv("LIFECYCLE_STORE", str(tmp_path / "elsewhere"))
    assert Store.open().root == tmp_path / "elsewhere"
    assert Store.open(tmp_path / "given").root == tmp_path / "given"


@pytest.mark.parametrize("record", ["", "{", "[]", '{"key": 1}'])
def test_a_damaged_record_counts_as_none(tmp_path: Path, record: str) -> None:
    store = Store.open(tmp_path)
    put(store, {"a": b"1"}, value=1)
    key = Action("toy", 1, {"value": 1}, {}).key
    assert store.record(key) is not None
    (tmp_path / "records" / f"{key}.json").write_text(record)
    assert store.record(key) is None


def test_exclusive_use_is_refused_while_a_run_goes_on(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    with store.in_use(), pytest.raises(StoreError, match="a run is using"), store.exclusive():
        pass
    with store.exclusive():
        pass


def test_links_share_bytes_within_the_store(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "s")
    digest = put(store, {"a": b"1" * 10_000})
    source, target = store.path(digest) / "a", tmp_path / "s" / "linked"
    files.link_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    writable = tmp_path / "mine"
    writable.write_text("x")
    files.link_file(writable, tmp_path / "copy")
    writable.write_text("y")
    assert (tmp_path / "copy").read_text() == "x"


def test_write_atomic_leaves_the_old_bytes_when_it_fails(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "f"
    files.write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_kill_in_the_middle_of_commits_never_leaves_a_half(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lifecycle.pipeline.store import Store\n"
        "from tests.pipeline.test_store import put\n"
        "store = Store.open(Path(sys.argv[1]))\n"
        "for i in range(10**6): put(store, {'a': b'%d' % i * 1000, 'b': b'x'}, value=i)\n"
    )
    for delay in (0.05, 0.11, 0.23):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        objects = tmp_path / "objects"
        while not (objects.is_dir() and any(objects.iterdir())):
            assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.kill()
        process.wait()
        store = Store.open(tmp_path)
        for path in (tmp_path / "records").glob("*.json"):
            record = store.record(path.stem)
            assert record is not None
            store.artifact(record.digest, Number)


NAMES = st.text("abc", min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(contents=st.dictionaries(NAMES, st.binary(max_size=50), min_size=1), data=st.data())
def test_any_changed_byte_is_found(contents, data, tmp_path_factory) -> None:
    store = Store.open(tmp_path_factory.mktemp("s"))
    digest = put(store, contents)
    store.artifact(digest, Number)
    name = data.draw(st.sampled_from(sorted(contents)))
    path = store.path(digest) / name
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    raw = bytearray(path.read_bytes())
    if raw:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    else:
        raw += b"x"
    path.write_bytes(raw)
    with pytest.raises(CorruptArtifactError, match=f"{name} has changed"):
        Store.open(store.root).artifact(digest, Number)


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans()))
def test_equal_values_have_equal_digests(value: dict[str, object]) -> None:
    shuffled = dict(reversed(list(value.items())))
    assert digest_of(value) == digest_of(shuffled)
    assert json.loads(canonical_json(value)) == value


def test_a_record_cannot_name_a_folder_outside_the_store(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "s")
    put(store, {"a": b"1"}, value=1)
    (tmp_path / "precious").mkdir()
    path = next((store.root / "records").iterdir())
    for digest in ("../../precious", "", "../objects"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"digest": digest}))
        assert store.record(path.stem) is None


def test_a_linked_manifest_is_never_written_through(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    digest = put(store, {"a": b"1"}, value=1)
    manifest = store.path(digest) / "artifact.json"
    before = manifest.read_bytes()
    action = Action("copy", 1, {}, {})
    out = store.new_output(action.key)
    files.link_tree(store.path(digest), out)
    assert store.commit(action, out, Number, {"copied": 1}, 0.0, []).digest == digest
    assert manifest.read_bytes() == before


@pytest.mark.parametrize("place", ["notes.txt", "tmp/mine", "objects/mine"])
def test_a_folder_with_other_things_is_no_store(tmp_path: Path, place: str) -> None:
    mine = tmp_path / place
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(StoreError, match=r"is no store, and has other things in it"):
        Store.open(tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [mine]


def test_looking_writes_nothing(tmp_path: Path) -> None:
    place = tmp_path / "nowhere"
    store = Store.look(place)
    assert store.record("0" * 64) is None
    with pytest.raises(StoreError, match=r"there is no store at .*nowhere: `lifecycle run` makes"):
        store.require()
    assert not place.exists()
    Store.open(place)
    assert store.require() is store


@pytest.mark.parametrize("place", ["/proc/none/store", "file/store"])
def test_a_store_that_cannot_be_made_is_one_clear_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--store|is no store"):
        Store.open(tmp_path / place)


def test_a_folder_of_the_users_keeps_its_gitignore(tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("mine\n")
    Store.open(tmp_path)
    assert (tmp_path / ".gitignore").read_text() == "mine\n"
    Store.open(tmp_path / "new")
    assert (tmp_path / "new" / ".gitignore").read_text() == "*\n"


def test_a_manifest_without_its_keys_is_damage(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    digest = put(store, {"a": b"1"})
    manifest = store.path(digest) / "artifact.json"
    manifest.chmod(0o644)
    manifest.write_text(manifest.read_text().replace('"files"', '"fjles"'))
    with pytest.raises(CorruptArtifactError, match=r"artifact\.json is missing or damaged"):
        Store.open(tmp_path).artifact(digest, Number)


def test_equal_bytes_of_two_keys_move_in_one_after_the_other(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    digest = put(store, {"a": b"1"}, value=1)
    with store.lock(digest):
        other = threading.Thread(target=put, args=(Store.open(tmp_path), {"a": b"1"}, 2))
        other.start()
        other.join(0.1)
        assert other.is_alive()
    other.join(10)
    assert not other.is_alive()
    assert len(list((tmp_path / "records").iterdir())) == 2


def test_a_file_name_need_not_be_unicode(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    digest = put(store, {"\udcff": b"1"})
    assert Store.open(tmp_path).artifact(digest, Number).files[0].path == "\udcff"
