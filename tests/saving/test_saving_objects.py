"""Results into an object store: a real S3 server (moto's) on loopback."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from urllib.request import Request, urlopen

import pytest
from mediahost import Call, answer, media_host, picture
from programs import ROOT

from evolink_async import AsyncEvoLink, ConfigurationError, DownloadError, ImageRequest, Outcome, RetryPolicy, Task
from evolink_async.emulator import Emulator
from evolink_async.saving import ObjectPath, Saver, folder, objects

Writer = asyncio.StreamWriter
PNG = picture()
OTHER = picture(80)
FAST = RetryPolicy(base_delay=0.001, max_delay=0.002)
NAMES = {"key": "k", "index": 0, "identity": "k"}


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    """An S3 server in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            raise RuntimeError("the S3 server did not start")
        drain = threading.Thread(target=server.stderr.read, daemon=True)
        drain.start()
        yield found[0]
    finally:
        server.kill()
        server.wait()
        drain.join(5)
        server.stderr.close()


@pytest.fixture
def bucket(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a new bucket; the environment leads to it."""
    settings = {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "REGION": "us-east-1", "ALLOW_HTTP": "true"}
    for name, value in (settings | {"ENDPOINT_URL": s3_url}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    name = f"bucket-{secrets.token_hex(4)}"
    told(s3_url, "PUT", name)
    return name


def told(s3_url: str, method: str, bucket: str) -> None:
    """Make a bucket, or remove it."""
    urlopen(Request(f"{s3_url}/{bucket}", method=method)).close()


@pytest.fixture
async def client() -> AsyncIterator[AsyncEvoLink]:
    async with AsyncEvoLink(base_url="http://127.0.0.1:9", retry=FAST, allow_private_hosts=True) as client:
        yield client


@pytest.fixture(autouse=True)
def _own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    folder._prepared.cache_clear()
    yield
    assert list((tmp_path / "temporary").iterdir()) == []


async def good(call: Call, writer: Writer) -> None:
    answer(writer, OTHER if "other" in call.path else PNG)


def task_with(*links: str, id: str = "task-unified-1-abc") -> Task:
    return Task.model_validate({"id": id, "status": "completed", "type": "image", "results": list(links)})


def store(address: str) -> Any:
    from obstore.store import from_url

    return from_url(address)


def objects_in(address: str) -> dict[str, int]:
    import obstore

    return {row["path"]: row["size"] for rows in obstore.list(store(address)) for row in rows}


def content_of(path: ObjectPath) -> bytes:
    import obstore

    place, _, name = str(path).rpartition("/")
    return bytes(obstore.get(store(place), name).bytes())


async def test_results_are_put_under_the_prefix_with_their_type_and_mark(client: AsyncEvoLink, bucket: str) -> None:
    import obstore

    address = f"s3://{bucket}/some/prefix"
    async with media_host(good) as host:
        saver = Saver(client._core, address)
        await saver.prepare()
        paths = await saver.save(task_with(f"{host.url}/1", f"{host.url}/other"), **NAMES)
        by_id = await client.save(task_with(f"{host.url}/1"), address)
        by_link = await client.save(f"{host.url}/sunset.jpeg", f"{address}/")
    assert [str(path) for path in paths] == [f"{address}/k-1.png", f"{address}/k-2.png"]
    assert [str(path) for path in by_id] == [f"{address}/task-unified-1-abc-1.png"]
    assert [str(path) for path in by_link] == [f"{address}/sunset.png"]
    assert [content_of(path) for path in (*paths, *by_id)] == [PNG, OTHER, PNG]  # type: ignore[arg-type]
    attributes = obstore.get(store(address), "k-2.png").attributes
    assert attributes == {"Content-Type": "image/png", "evolink-result": "task-unified-1-abc/2"}


async def test_what_is_there_is_not_fetched_again_and_nothing_else_is_replaced(
    client: AsyncEvoLink, bucket: str
) -> None:
    address = f"s3://{bucket}/prefix"
    async with media_host(good) as host:
        task, other = task_with(f"{host.url}/1"), task_with(f"{host.url}/other", id="task-unified-2-xyz")
        first = await Saver(client._core, address).save(task, **NAMES)
        assert await Saver(client._core, address).save(task, **NAMES) == first  # known by its mark
        renamed = NAMES | {"key": "renamed"}
        assert await Saver(client._core, address).save(task, **renamed, saved=[str(first[0])]) == first  # recorded
        assert len(host.calls) == 1
        with pytest.raises(DownloadError, match="another object is there already"):
            await Saver(client._core, address).save(other, **NAMES, saved=[str(first[0])])
        same = task_with(f"{host.url}/1", id="task-unified-3-xyz")
        assert await Saver(client._core, address).save(same, **NAMES) == first
        await client.save(task, address)
        await client.save(task, address)
        assert len(host.calls) == 4
        gone = f"{address}/gone-1.png"
        assert await Saver(client._core, address).save(task, **NAMES, saved=[gone]) == first
    assert content_of(first[0]) == PNG  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix", ["50%25 off", "a%2fb", "é ü/[x]*", "p q ", ""])
async def test_the_object_is_where_its_path_says(client: AsyncEvoLink, bucket: str, prefix: str) -> None:
    async with media_host(good) as host:
        [path] = await client.save(task_with(f"{host.url}/a.png"), f"s3://{bucket}/{prefix}")
    [name] = objects_in(f"s3://{bucket}")
    assert str(path) == f"s3://{bucket}/{name}"


@pytest.mark.parametrize("as_path", [Path, PurePosixPath, ObjectPath, lambda address: str(Path(address))])
async def test_an_address_that_was_made_a_path_is_an_address(
    client: AsyncEvoLink, bucket: str, as_path: Callable[[str], PurePath | str]
) -> None:
    async with media_host(good) as host:
        [path] = await client.save(task_with(f"{host.url}/a.png"), as_path(f"s3://{bucket}/pre"))
        assert await client.save(task_with(f"{host.url}/a.png"), path.parent) == [path]
    assert str(path).startswith(f"s3://{bucket}/pre/")
    assert len(objects_in(f"s3://{bucket}")) == 1


def test_an_address_that_leads_upwards_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="bucket/prefix"):
        objects.Bucket("s3://bucket/a/../b")


async def test_a_large_object_goes_up_in_parts(
    client: AsyncEvoLink, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    monkeypatch.setattr(objects, "AT_ONCE", 1000)
    body = b"\0\0\0\x18ftypmp42" + bytes(12) + b"\0\0\0\x0cmoov" + bytes(4) + b"\0\0\0\0mdat" + os.urandom(11 * 2**20)

    async def handler(call: Call, writer: Writer) -> None:
        answer(writer, body if call.path == "/clip" else OTHER if call.path == "/other" else PNG)

    address = f"s3://{bucket}"
    async with media_host(handler) as host:
        [path] = await Saver(client._core, address).save(task_with(f"{host.url}/clip"), **NAMES)
        assert str(path) == f"{address}/k-1.mp4"
        assert hashlib.sha256(content_of(path)).digest() == hashlib.sha256(body).digest()  # type: ignore[arg-type]
        assert obstore.head(store(address), "k-1.mp4")["e_tag"].endswith('-3"')
        await Saver(client._core, address).save(task_with(f"{host.url}/1"), **NAMES)
        with pytest.raises(DownloadError, match="another object is there already"):
            await Saver(client._core, address).save(
                task_with(f"{host.url}/2/../other", id="task-x"), **NAMES | {"key": "k"}
            )


async def test_two_at_once_leave_one_object(client: AsyncEvoLink, bucket: str) -> None:
    address = f"s3://{bucket}/x"
    async with media_host(good) as host:
        savers = [Saver(client._core, address) for _ in range(6)]
        task = task_with(f"{host.url}/1")
        paths = await asyncio.gather(*(saver.save(task, **NAMES) for saver in savers))
    assert len(set(paths)) == 1
    assert objects_in(address) == {"k-1.png": len(PNG)}


async def test_a_transfer_that_breaks_off_leaves_no_object(client: AsyncEvoLink, bucket: str) -> None:
    async def cut(call: Call, writer: Writer) -> None:
        answer(writer, PNG[:900], length=len(PNG))

    async with media_host(cut) as host:
        with pytest.raises(DownloadError, match="could not be fetched"):
            await Saver(client._core, f"s3://{bucket}").save(task_with(f"{host.url}/1"), **NAMES)
    assert objects_in(f"s3://{bucket}") == {}


async def test_what_a_store_did_not_take_is_saved_by_the_next_run_and_not_paid_for_again(
    api_key: str, s3_url: str, bucket: str, tmp_path: Path
) -> None:
    request = ImageRequest(model="gpt-4o-image", prompt="a lighthouse", key="k")
    address = f"s3://{bucket}/out"

    async def run(server: Any, *, fails: bool) -> Outcome:
        options: dict[str, Any] = {"ledger": tmp_path / "job.db", "save_to": address}
        async with (
            AsyncEvoLink(base_url=server.base_url, retry=FAST) as client,
            client.pool([request], **options) as pool,
        ):
            if fails:
                told(s3_url, "DELETE", bucket)
            [outcome] = [outcome async for outcome in pool]
        return outcome

    async with Emulator(speed=100, seed=1, api_key=api_key).serve() as server:
        failed = await run(server, fails=True)
        assert (failed.status, failed.files) == ("completed", ())
        assert isinstance(failed.error, DownloadError)
        told(s3_url, "PUT", bucket)
        saved = await run(server, fails=False)
        assert saved.ok
        assert saved.from_ledger
        assert [str(file) for file in saved.files] == list(map(f"s3://{bucket}/".__add__, objects_in(f"s3://{bucket}")))
        assert len(server.emulator.book()["posts"]) == 1


async def test_a_bucket_that_is_not_there_is_found_before_anything_is_paid(client: AsyncEvoLink, bucket: str) -> None:
    nowhere = f"s3://{bucket}-nowhere/prefix"
    with pytest.raises(ConfigurationError, match="cannot write into") as caught:
        await Saver(client._core, nowhere).prepare()
    assert "\n" not in str(caught.value)
    async with media_host(good) as host:
        with pytest.raises(DownloadError, match="could not be written") as failed:
            await Saver(client._core, nowhere).save(task_with(f"{host.url}/1"), **NAMES)
    assert "done and paid" in str(failed.value)
    assert failed.value.__cause__ is None
    assert "\n" not in str(failed.value)


async def test_a_cancelled_save_doesn_t_wait_for_its_upload(
    client: AsyncEvoLink, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    publish = objects.Bucket.publish

    def slow(self: objects.Bucket, *args: Any) -> ObjectPath:
        begun.set()
        goes_on.wait(100)
        return publish(self, *args)

    monkeypatch.setattr(objects.Bucket, "publish", slow)
    async with media_host(good) as host:
        saving = asyncio.create_task(Saver(client._core, f"s3://{bucket}").save(task_with(f"{host.url}/1"), **NAMES))
        await asyncio.to_thread(begun.wait, 60)
        saving.cancel()
        await asyncio.wait([saving], timeout=60)
        assert saving.cancelled()
    goes_on.set()
    async with asyncio.timeout(60):
        while list((tmp_path / "temporary").iterdir()):  # noqa: ASYNC110  (a thread that nobody waits for)
            await asyncio.sleep(0.01)
    assert objects_in(f"s3://{bucket}") == {"k-1.png": len(PNG)}


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    client = AsyncEvoLink(base_url="http://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match=r"pip install 'evolink-async\[storage\]'"):
        Saver(client._core, "s3://bucket/prefix")


@pytest.mark.parametrize("address", ["gs://bucket/a b/c", "az://container/prefix"])
def test_the_other_stores_are_known(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert str(objects.Bucket(address)) == repr(address)


def test_an_address_without_an_account_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigurationError, match="cannot be used") as caught:
        objects.Bucket("az://container/prefix")
    assert "\n" not in str(caught.value)


def test_the_path_of_an_object_is_told_as_its_address() -> None:
    path = ObjectPath("s3://bucket/prefix") / "k-1.png"
    assert str(path) == "s3://bucket/prefix/k-1.png"
    assert (path.name, path.suffix, str(path.parent)) == ("k-1.png", ".png", "s3://bucket/prefix")
    assert isinstance(path, PurePosixPath)


def test_signatures_and_details_stay_out_of_messages() -> None:
    error = ValueError("Error PUT https://x.example/a?sig=secret&x=1 in 3ms: 403: <?xml ...\n\nDebug source:\nx")
    assert objects._first_line(error) == "Error PUT https://x.example/a in 3ms: 403"


async def test_a_program_that_ends_right_after_its_last_object_ends_well(bucket: str, tmp_path: Path) -> None:
    """obstore's asyncio functions abort such programs now and then: they are not used."""
    program = (
        "import asyncio, sys\n"
        "from evolink_async import AsyncEvoLink\n"
        "async def main():\n"
        "    async with AsyncEvoLink('sk-x', base_url=sys.argv[1], allow_private_hosts=True) as client:\n"
        "        print(*(await client.save(sys.argv[1] + '/a.png', sys.argv[2])))\n"
        "asyncio.run(main())\n"
    )
    async with media_host(good) as host:
        for n in range(4):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", program, host.url, f"s3://{bucket}/{n}"),
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=asyncio.subprocess.PIPE,
            )
            told, _ = await process.communicate()
            assert (process.returncode, told.decode().strip()) == (0, f"s3://{bucket}/{n}/a.png")
