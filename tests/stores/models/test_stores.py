"""One suite for every backend of the model repository."""

import asyncio
import os
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from support.cli import run_python_async
from support.memory_store import MemoryObjectStore
from support.model_versions import WEIGHTS, digest, manifest

from fedbus.contracts.champion import Champion
from fedbus.contracts.model import Manifest
from fedbus.stores.errors import StoreCorrupt, StoreUnavailable
from fedbus.stores.models import open as models_open
from fedbus.stores.models.open import (
    ArtifactMissing,
    ArtifactRetired,
    DigestMismatch,
    ModelStore,
    UnknownStore,
    VersionSkipped,
    VersionTaken,
    list_tasks,
    open_model_store,
)
from fedbus.stores.s3.bucket import Bucket, BucketAddress


@pytest.fixture
async def store(store_url: str) -> ModelStore:
    """An empty repository of each kind."""
    store = open_model_store(store_url, "mnist")
    await store.prepare()
    return store


@pytest.fixture
async def shared_store(shared_url: str) -> ModelStore:
    """An empty repository of each kind that several processes can use."""
    store = open_model_store(shared_url, "mnist")
    await store.prepare()
    return store


async def put_all(store: ModelStore, *contents: bytes) -> ModelStore:
    for content in contents or (WEIGHTS,):
        await store.put(content, digest(content))
    return store


async def test_an_empty_repository_has_no_versions(store: ModelStore) -> None:
    assert await store.read_latest() is None
    assert await store.list_versions() == []


async def test_an_artifact_is_read_unchanged(store: ModelStore, tmp_path: Path) -> None:
    (tmp_path / "new.safetensors").write_bytes(WEIGHTS)
    await store.put(tmp_path / "new.safetensors", digest(WEIGHTS))
    assert (await store.local_path(digest(WEIGHTS))).read_bytes() == WEIGHTS


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_an_artifact_can_be_put_from_memory(store: ModelStore, kind: type) -> None:
    await store.put(kind(WEIGHTS), digest(WEIGHTS))
    assert (await store.local_path(digest(WEIGHTS))).read_bytes() == WEIGHTS


async def test_an_artifact_in_several_buffers_is_hashed_during_the_put(
    store: ModelStore,
) -> None:
    assert await store.put([WEIGHTS[:5], memoryview(WEIGHTS)[5:]]) == digest(WEIGHTS)
    assert (await store.local_path(digest(WEIGHTS))).read_bytes() == WEIGHTS


async def test_bytes_with_another_digest_are_rejected(store: ModelStore) -> None:
    with pytest.raises(DigestMismatch, match="fetch them again"):
        await store.put(b"other bytes", digest(WEIGHTS))
    with pytest.raises(ArtifactMissing):
        await store.local_path(digest(WEIGHTS))


async def test_an_unknown_artifact_is_missing(
    store: ModelStore,
) -> None:
    with pytest.raises(ArtifactMissing, match=digest(b"never stored")):
        await store.local_path(digest(b"never stored"))


async def test_a_published_version_is_the_latest(store: ModelStore) -> None:
    await put_all(store)
    first, second = manifest(1), manifest(2, run="mnist-1")
    assert await store.publish(first) == first
    assert await store.publish(second) == second
    assert await store.read_latest() == second
    assert await store.list_versions() == [first, second]


async def test_versions_are_ordered_by_number(store: ModelStore) -> None:
    await put_all(store)
    for version in range(1, 12):
        await store.publish(manifest(version))
    assert [manifest.version for manifest in await store.list_versions()] == list(range(1, 12))


async def test_a_long_manifest_is_read_completely(store: ModelStore) -> None:
    await put_all(store)
    participants = {f"client-{number}": number for number in range(20_000)}
    long = manifest(1).model_copy(update={"participants": participants})
    await store.publish(long)
    assert await store.read_latest() == long


async def test_the_same_manifest_can_be_published_twice(store: ModelStore) -> None:
    await put_all(store)
    first = manifest(1)
    await store.publish(first)
    assert await store.publish(first) == first


async def test_a_version_is_never_overwritten(store: ModelStore) -> None:
    await put_all(store)
    first = await store.publish(manifest(1))
    with pytest.raises(VersionTaken) as taken:
        await store.publish(manifest(1, run="mnist-7"))
    assert taken.value.latest == 1
    assert await store.read_latest() == first


async def test_a_version_number_cannot_be_skipped(store: ModelStore) -> None:
    await put_all(store)
    await store.publish(manifest(1))
    with pytest.raises(VersionSkipped, match="publish 2"):
        await store.publish(manifest(3))


async def test_a_version_without_its_artifact_is_rejected(store: ModelStore) -> None:
    with pytest.raises(ArtifactMissing):
        await store.publish(manifest(1))
    assert await store.read_latest() is None


async def test_of_concurrent_publishers_exactly_one_succeeds(store: ModelStore) -> None:
    await put_all(store)
    for version in range(1, 6):
        results = await asyncio.gather(
            *(store.publish(manifest(version, run=f"run-{n}")) for n in range(4)), return_exceptions=True
        )
        winners = [result for result in results if isinstance(result, Manifest)]
        assert len(winners) == 1
        assert [type(result) for result in results if result not in winners] == [VersionTaken] * 3
        assert await store.read_latest() == winners[0]


PUBLISHES = """
import asyncio, sys
from fedbus.contracts.model import Manifest
from fedbus.stores.models.open import VersionTaken, open_model_store
try:
    asyncio.run(open_model_store(sys.argv[1], "mnist").publish(Manifest.model_validate_json(sys.argv[2])))
    print("published")
except VersionTaken:
    print("taken")
"""


async def test_of_publishers_in_several_processes_exactly_one_succeeds(
    shared_store: ModelStore,
) -> None:
    await put_all(shared_store)
    publishers = [
        run_python_async(
            PUBLISHES,
            shared_store.url,
            manifest(1, run=f"run-{n}").model_dump_json(),
            environment=os.environ,
            within_s=60,
        )
        for n in range(3)
    ]
    outputs = [result.out.strip() for result in await asyncio.gather(*publishers)]
    assert sorted(outputs) == ["published", "taken", "taken"]
    latest = await shared_store.read_latest()
    assert latest is not None
    assert latest.run == f"run-{outputs.index('published')}"


async def test_a_repository_that_was_not_prepared_is_unavailable(store: ModelStore) -> None:
    unprepared = open_model_store(store.url, "unprepared")
    for attempt in (unprepared.read_latest, unprepared.list_versions):
        with pytest.raises(StoreUnavailable, match="no model repository"):
            await attempt()
    with pytest.raises(StoreUnavailable):
        await unprepared.put(WEIGHTS, digest(WEIGHTS))


async def test_a_valid_artifact_is_verified(store: ModelStore) -> None:
    await put_all(store)
    await store.verify(digest(WEIGHTS))
    with pytest.raises(ArtifactMissing):
        await store.verify(digest(b"never stored"))


async def overwrite(store: ModelStore, name: str, content: bytes) -> None:
    """Replace the object *name* without the repository."""
    if store.url.startswith("memory://"):
        await MemoryObjectStore(store.url, "mnist").put(name, content)
        return
    if "://" not in store.url:
        (Path(store.url) / "mnist" / name).write_bytes(content)
        return
    address = BucketAddress.parse(store.url)
    await Bucket(address).write(f"{address.prefix}/mnist/{name}", content)


@pytest.mark.parametrize("content", [WEIGHTS[:-1], WEIGHTS[:-1] + b"!", WEIGHTS + b"!", b""])
async def test_an_artifact_with_other_bytes_is_corrupt(store: ModelStore, content: bytes) -> None:
    await put_all(store)
    await store.publish(manifest(1))
    await overwrite(store, f"{digest(WEIGHTS)}.safetensors", content)
    for attempt in (store.local_path, store.verify):
        with pytest.raises(StoreCorrupt, match="its bytes have digest"):
            await attempt(digest(WEIGHTS))
    assert await store.list_artifacts() == {digest(WEIGHTS)}  # it still exists, for an investigation


COPIES_LARGE_ARTIFACT = """
import asyncio, resource, sys
from pathlib import Path
from fedbus.stores.models.open import open_model_store

def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

async def main(url, path):
    store = open_model_store(url, "mnist")
    await store.local_path(await store.put(b"something small"))  # imports happen before the measurement
    before = peak_bytes()
    fetched = await open_model_store(url, "mnist").local_path(await store.put(path))
    print(peak_bytes() - before, fetched.stat().st_size)

asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
"""


@pytest.mark.slow
async def test_a_large_model_is_put_and_fetched_in_little_memory(
    shared_store: ModelStore, tmp_path: Path
) -> None:
    size, piece = 200 * 1024**2, os.urandom(1024**2)
    with (tmp_path / "large").open("wb") as file:
        for _ in range(size // len(piece)):
            file.write(piece)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", COPIES_LARGE_ARTIFACT, shared_store.url, str(tmp_path / "large")),
        stdout=subprocess.PIPE,
    )
    growth, fetched = map(int, (await process.communicate())[0].split())
    assert fetched == size
    assert growth < size / 2, "a few parts of 8 MiB, not the whole model"


async def test_old_weights_are_removed_and_manifests_stay(store: ModelStore) -> None:
    contents = [f"weights {version}".encode() for version in range(1, 6)]
    await put_all(store, *contents, b"of an active round")
    parents = {1: None, 2: 1, 3: 2, 4: 3, 5: 1}
    for version, content in enumerate(contents, 1):
        await store.publish(manifest(version, content).model_copy(update={"parent": parents[version]}))
    removed = await store.retire(keep=1, spare=[digest(contents[2])])
    assert removed == sorted([digest(contents[1]), digest(contents[3])])
    with pytest.raises(ArtifactRetired, match="keep-models"):
        await store.local_path(digest(contents[1]))
    for content in (contents[0], contents[2], contents[4], b"of an active round"):
        assert (await store.local_path(digest(content))).read_bytes() == content
    assert len(await store.list_versions()) == 5
    assert await store.retire(keep=1, spare=[digest(contents[2])]) == []


async def test_retired_weights_can_be_stored_again(store: ModelStore) -> None:
    await put_all(store, b"1", b"2", b"3")
    for version in (1, 2, 3):
        await store.publish(manifest(version, b"%d" % version))
    await store.retire(keep=1)
    await store.put(b"1", digest(b"1"))
    await store.verify(digest(b"1"))


async def test_each_task_has_its_own_versions(store: ModelStore) -> None:
    other = open_model_store(store.url, "cifar10")
    await other.prepare()
    await put_all(store)
    await store.publish(manifest(1))
    assert await other.read_latest() is None


# --- faults of a directory --------------------------------------------------------------------


@pytest.fixture
async def home(tmp_path: Path) -> Path:
    """The directory of a repository with two versions."""
    store = open_model_store(str(tmp_path), "mnist")
    await store.prepare()
    await put_all(store)
    await store.publish(manifest(1))
    await store.publish(manifest(2))
    return tmp_path / "mnist"


async def test_a_changed_file_is_verified_again_whatever_its_date(
    home: Path,
) -> None:
    store, file = open_model_store(str(home.parent), "mnist"), home / f"{digest(WEIGHTS)}.safetensors"
    path, before = await store.local_path(digest(WEIGHTS)), file.stat()
    file.write_bytes(WEIGHTS[::-1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(StoreCorrupt, match="its bytes have digest"):
        await store.local_path(digest(WEIGHTS))
    file.write_bytes(WEIGHTS)
    assert await store.local_path(digest(WEIGHTS)) == path


async def test_a_version_with_corrupt_weights_is_not_published(home: Path) -> None:
    (home / f"{digest(WEIGHTS)}.safetensors").write_bytes(WEIGHTS[::-1])
    with pytest.raises(StoreCorrupt):
        await open_model_store(str(home.parent), "mnist").publish(manifest(3))


async def test_a_directory_that_was_not_prepared_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    store = open_model_store(str(tmp_path), "mnist")
    for attempt in (store.read_latest, store.list_versions):
        with pytest.raises(StoreUnavailable, match="no model repository"):
            await attempt()
    with pytest.raises(StoreUnavailable):
        await store.put(WEIGHTS, digest(WEIGHTS))


async def test_a_directory_that_cannot_be_created_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match="cannot use"):
        await open_model_store(str(tmp_path / "file"), "mnist").prepare()


async def test_an_unmounted_volume_is_unavailable(home: Path) -> None:
    shutil.move(home, home.with_name("unmounted"))
    with pytest.raises(StoreUnavailable):
        await open_model_store(str(home.parent), "mnist").read_latest()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "2"}', '{"version": 0}', '{"version": 9}'])
async def test_an_invalid_pointer_is_corrupt(home: Path, content: str) -> None:
    (home / "latest").write_text(content)
    with pytest.raises(StoreCorrupt, match="is corrupt"):
        await open_model_store(str(home.parent), "mnist").read_latest()


async def test_a_missing_pointer_is_corrupt_and_not_empty(home: Path) -> None:
    (home / "latest").unlink()
    with pytest.raises(StoreCorrupt, match="there are versions"):
        await open_model_store(str(home.parent), "mnist").read_latest()


async def test_an_invalid_manifest_is_corrupt(home: Path) -> None:
    (home / "versions" / "2.json").write_text('{"version": 2')
    with pytest.raises(StoreCorrupt, match=r"2\.json"):
        await open_model_store(str(home.parent), "mnist").read_latest()


@pytest.mark.parametrize("pointer", [0, 1])
async def test_the_publish_of_a_dead_publisher_is_finished(home: Path, pointer: int) -> None:
    """The publisher wrote the version file, and died before it moved the pointer."""
    if pointer:
        (home / "latest").write_text('{"version": 1}')
    else:
        (home / "latest").unlink()
        (home / "versions" / "2.json").unlink()
    latest = await open_model_store(str(home.parent), "mnist").read_latest()
    assert latest is not None
    assert latest.version == pointer + 1


def partial_files(home: Path) -> list[Path]:
    return list(home.rglob(".*.part"))


async def test_a_failed_put_leaves_no_partial_file(home: Path) -> None:
    store = open_model_store(str(home.parent), "mnist")
    with pytest.raises(DigestMismatch):
        await store.put(b"other", digest(b"wrong"))
    assert partial_files(home) == []


# --- backends ---------------------------------------------------------------------------------


def test_an_unknown_scheme_is_rejected_with_the_known_ones(memory_url: str) -> None:
    with pytest.raises(
        UnknownStore, match="'gopher'; give a directory or a URL with one of: file, memory, s3"
    ):
        open_model_store("gopher://models", "mnist")


def test_a_backend_without_its_package_names_it(memory_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "support.memory_store", None)
    with pytest.raises(
        UnknownStore, match=r"'memory' needs support.memory_store; pip install support.memory_store"
    ):
        open_model_store(memory_url, "mnist")


def test_an_entry_point_cannot_replace_a_scheme_of_fedbus(monkeypatch: pytest.MonkeyPatch) -> None:
    other = EntryPoint("s3", "support.memory_store:MemoryObjectStore", models_open.GROUP)
    monkeypatch.setattr(models_open, "entry_points", lambda **_: [other])
    assert open_model_store("s3://bucket/models", "mnist").url == "s3://bucket/models"
    with pytest.raises(UnknownStore, match="bucket"):
        open_model_store("s3://B", "mnist")


def test_the_entry_points_are_the_built_in_backends() -> None:
    """The built-in table works without metadata; the entry points are for other programs."""
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    declared = project["project"]["entry-points"][models_open.GROUP]
    loaded = {name: EntryPoint(name, value, models_open.GROUP).load() for name, value in declared.items()}
    assert loaded == {name: load() for name, load in models_open.BUILT_IN.items()}


async def test_a_file_url_is_a_directory(home: Path) -> None:
    store = open_model_store(f"file://{home.parent}", "mnist")
    assert await store.list_version_numbers() == [1, 2]
    assert await list_tasks(f"file://{home.parent}") == ["mnist"]


async def test_tasks_are_the_folders_with_a_marker(store: ModelStore) -> None:
    assert await list_tasks(store.url) == ["mnist"]
    await open_model_store(store.url, "cifar10").prepare()
    assert await list_tasks(store.url) == ["cifar10", "mnist"]


# --- the layout -------------------------------------------------------------------------------


async def test_the_layout_of_a_directory_does_not_change(tmp_path: Path) -> None:
    """Repositories are compatible with earlier and later versions of fedbus."""
    store = open_model_store(str(tmp_path), "mnist")
    await store.prepare()
    await put_all(store, WEIGHTS, b"second")
    await store.publish(manifest(1))
    await store.publish(manifest(2, b"second"))
    await store.set_champion(Champion(version=2, term=1, before=(), since=datetime.now(UTC)))
    await store.retire(keep=1)
    await put_all(store, b"third")
    await store.publish(manifest(3, b"third"))
    await store.retire(keep=1)
    written = {
        path.relative_to(tmp_path / "mnist").as_posix(): path.read_text()
        for path in (tmp_path / "mnist").rglob("*")
        if path.is_file()
    }
    manifests = {
        f"versions/{one.version}.json": f"{one.model_dump_json(indent=2)}\n"
        for one in await store.list_versions()
    }
    champion = await store.read_champion()
    assert champion is not None
    assert written == manifests | {
        "fedbus-models.json": '{"layout": 1}\n',
        "latest": '{"version": 3}\n',
        "champion": f"{champion.model_dump_json(indent=2)}\n",
        f"{digest(WEIGHTS)}.safetensors": WEIGHTS.decode(),
        f"{digest(b'second')}.safetensors": "second",
        f"{digest(b'third')}.safetensors": "third",
        ".lock": "",
    }


async def test_files_of_an_interrupted_writer_are_ignored(home: Path) -> None:
    store = open_model_store(str(home.parent), "mnist")
    for name in (".3.json.x.part", "versions/.3.json.x.part", f".{digest(b'x')}.safetensors"):
        (home / name).write_bytes(b"half")
        os.utime(home / name, (0, 0))
    assert await store.list_artifacts() == {digest(WEIGHTS)}
    assert await store.list_version_numbers() == [1, 2]
    await store.prepare()
    assert partial_files(home) == []
