"""The manifest of a bundle: what it accepts, and every way in which it says no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifecycle.bundle.manifest import MANIFEST, verify_bundle, write_manifest
from lifecycle.errors import CorruptArtifactError, StoreError
from lifecycle.pipeline.artifact import digest_of

FILES = {"model.onnx": b"graph", "model.onnx.data": b"weights" * 9, "sub/extra.txt": b"x"}


def make(folder: Path) -> Path:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write_manifest(folder, {"name": "tiny", "gated": False})
    return folder


def rewrite(folder: Path, **changes: Any) -> None:
    """A manifest whose own digest is right, whatever else is wrong with it."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    manifest.pop("digest")
    manifest["digest"] = digest_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make(tmp_path / "bundle")


def test_a_whole_bundle_gives_its_manifest(bundle: Path) -> None:
    manifest = verify_bundle(bundle)
    assert manifest["name"] == "tiny"
    assert [entry["path"] for entry in manifest["files"]] == sorted(FILES)


def test_the_manifest_has_one_spelling(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    assert (one / MANIFEST).read_bytes() == (two / MANIFEST).read_bytes()


def test_the_note_of_the_store_may_lie_beside_it(bundle: Path) -> None:
    (bundle / "artifact.json").write_text("{}")
    verify_bundle(bundle)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_changed_byte_is_found_and_named(bundle: Path, name: str) -> None:
    file = bundle / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptArtifactError, match=f"{name} has changed"):
        verify_bundle(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    with pytest.raises(CorruptArtifactError, match=r"model\.onnx is missing"):
        verify_bundle(bundle)


def test_an_added_file_is_refused(bundle: Path) -> None:
    (bundle / "chat_template.jinja").write_text("{{ 1 }}")
    with pytest.raises(CorruptArtifactError, match=r"chat_template\.jinja does not belong"):
        verify_bundle(bundle)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is no bundle"):
        verify_bundle(tmp_path)


def test_a_newer_format_asks_for_an_upgrade(bundle: Path) -> None:
    rewrite(bundle, format=2)
    with pytest.raises(StoreError, match="has format 2, this version reads up to 1: upgrade"):
        verify_bundle(bundle)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "1"}', "\x00", "[" * 10**5])
def test_a_broken_manifest_is_damaged(bundle: Path, text: str) -> None:
    (bundle / MANIFEST).write_text(text)
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json is damaged"):
        verify_bundle(bundle)


@pytest.mark.parametrize("files", [None, 3, [3], [{"path": "model.onnx"}]])
def test_a_broken_list_of_files_is_damaged(bundle: Path, files: object) -> None:
    rewrite(bundle, files=files)
    with pytest.raises(CorruptArtifactError, match="list of files is broken"):
        verify_bundle(bundle)


@pytest.mark.parametrize(
    "path", ["../secret", "/etc/hostname", "sub/../../secret", "", ".", "a\0b", "\ud800"]
)
def test_a_path_cannot_leave_the_folder(bundle: Path, path: str) -> None:
    (bundle.parent / "secret").write_text("s")
    rewrite(bundle, files=[{"path": path, "size": 1, "sha256": "0"}])
    with pytest.raises(CorruptArtifactError, match="no path inside a bundle"):
        verify_bundle(bundle)


def test_a_link_cannot_leave_the_folder(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    outside.write_bytes(FILES["model.onnx"])
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").symlink_to(outside)
    with pytest.raises(CorruptArtifactError, match="points outside the bundle"):
        verify_bundle(bundle)


@given(place=st.integers(min_value=0), bit=st.integers(0, 7))
def test_no_changed_bit_of_the_manifest_changes_its_meaning(
    tmp_path_factory: pytest.TempPathFactory, place: int, bit: int
) -> None:
    bundle = make(tmp_path_factory.mktemp("bit"))
    before = json.loads((bundle / MANIFEST).read_bytes())
    data = bytearray((bundle / MANIFEST).read_bytes())
    data[place % len(data)] ^= 1 << bit
    (bundle / MANIFEST).write_bytes(data)
    try:
        after = verify_bundle(bundle)
    except StoreError:
        return
    assert after == before
