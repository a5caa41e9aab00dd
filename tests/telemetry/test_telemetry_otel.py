"""Spans and metrics, as an exporter in memory sees them."""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from programs import run_program

from evolink_async import (
    AsyncEvoLink,
    ConfigurationError,
    EvoLinkError,
    ImageRequest,
    InvalidRequestError,
    TaskFailedError,
    TaskTimeoutError,
)
from evolink_async.emulator import Emulator
from evolink_async.telemetry import instrument, otel, uninstrument

MODEL = "gpt-4o-image"


class Seen:
    """What a client's telemetry has exported."""

    def __init__(self, client: AsyncEvoLink, **options: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader], shutdown_on_exit=False)
        instrument(client, tracer_provider=self.tracers, meter_provider=self.meters, **options)

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def points(self, name: str) -> list[Any]:
        data = self._reader.get_metrics_data()
        if data is None:
            return []
        metrics = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics if m.name == name]
        return [point for metric in metrics for point in metric.data.data_points]

    def sums(self, name: str, label: str | None = None) -> dict[Any, float]:
        """The values of a counter by one label."""
        found: dict[Any, float] = {}
        for point in self.points(name):
            key = point.attributes.get(label) if label else None
            found[key] = found.get(key, 0) + point.value
        return found

    def count(self, name: str) -> int:
        return sum(point.count for point in self.points(name))

    def text(self) -> str:
        """Everything that left the process, as text."""
        data = self._reader.get_metrics_data()
        return "".join(span.to_json() for span in self.spans) + ("" if data is None else data.to_json())

    def close(self) -> None:
        self.tracers.shutdown()
        self.meters.shutdown()


@pytest.fixture
def seen(client: AsyncEvoLink) -> Iterator[Seen]:
    seen = Seen(client)
    yield seen
    seen.close()


def images(count: int) -> list[ImageRequest]:
    return [ImageRequest(model=MODEL, prompt=f"a lighthouse {n}", key=f"k{n}", n=1) for n in range(count)]


def named(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_each_task_of_a_job_is_one_span_from_its_submission_to_its_end(
    client: AsyncEvoLink, seen: Seen, emulator: Any
) -> None:
    async with client.pool(images(5)) as pool:
        outcomes = [outcome async for outcome in pool]
    assert all(outcome.ok for outcome in outcomes)
    assert len(seen.spans) == 5
    assert {named(span)["gen_ai.response.id"] for span in seen.spans} == {o.unwrap().id for o in outcomes}
    for span in seen.spans:
        assert span.name == f"generate_content {MODEL}"
        assert span.kind is SpanKind.CLIENT
        assert span.status.status_code is StatusCode.UNSET
        assert span.parent is None
        facts = named(span)
        assert facts["gen_ai.operation.name"] == "generate_content"
        assert facts["gen_ai.provider.name"] == "evolink"
        assert facts["gen_ai.request.model"] == facts["gen_ai.response.model"] == MODEL
        assert facts["gen_ai.output.type"] == "image"
        assert facts["gen_ai.request.choice.count"] == 1
        assert facts["server.address"] == "127.0.0.1"
        assert facts["server.port"] == int(emulator.base_url.rpartition(":")[2])
        assert facts["http.request.resend_count"] == 0
        assert facts["evolink.status"] == "completed"
        assert facts["evolink.poll.count"] >= 1
        assert facts["evolink.credits.spent"] == facts["evolink.credits.reserved"] == 2.5
        assert span.events[0].name == "evolink.post"


async def test_the_metrics_of_a_job_are_those_of_its_stats_and_of_the_book(
    client: AsyncEvoLink, seen: Seen, emulator: Any, tmp_path: Path
) -> None:
    async with client.pool(images(6), save_to=tmp_path / "out") as pool:
        outcomes = [outcome async for outcome in pool]
    stats, book = pool.stats, emulator.emulator.book()
    assert seen.sums("evolink.outcomes", "evolink.status") == {"completed": 6}
    assert seen.sums("evolink.posts", "evolink.verdict") == {"accepted": len(book["posts"])}
    assert seen.sums("evolink.credits.spent", "gen_ai.request.model") == {MODEL: float(stats.credits_spent)}
    assert seen.sums("evolink.credits.reserved") == {None: 0}
    assert seen.sums("evolink.tasks.active") == {None: 0}
    assert seen.sums("evolink.poll.count") == {None: stats.polls}
    assert seen.sums("evolink.poll.requests") == {None: stats.status_requests}
    assert seen.count("gen_ai.client.operation.duration") == seen.count("evolink.ratelimit.wait") == 6
    saved = sum(path.stat().st_size for outcome in outcomes for path in outcome.files)  # type: ignore[attr-defined]
    assert seen.sums("evolink.download.bytes") == {None: saved}


async def test_what_runs_now_is_active_and_its_credits_are_reserved(client: AsyncEvoLink, seen: Seen) -> None:
    slow = ImageRequest(model=MODEL, prompt="slow")
    async with client.pool() as pool:
        pool.add([slow])
        iteration = anext(pool)
        while not pool.outstanding:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        assert seen.sums("evolink.tasks.active") == {None: 1}
        assert seen.sums("evolink.credits.reserved") == {None: 2.5}
        await iteration
    assert seen.sums("evolink.tasks.active") == {None: 0}


async def test_a_failed_task_is_an_error_span_with_the_services_code(api_key: str) -> None:
    async with Emulator(speed=100, seed=1, api_key=api_key, failure_share=1).serve() as server:  # noqa: SIM117
        async with AsyncEvoLink(base_url=server.base_url) as client:
            seen = Seen(client)
            with pytest.raises(TaskFailedError) as failure:
                await client.images.generate(model=MODEL, prompt="p")
    [span] = seen.spans
    assert span.status.status_code is StatusCode.ERROR
    assert named(span)["error.type"] == failure.value.code == span.status.description
    assert named(span)["evolink.credits.spent"] == 0
    assert seen.sums("evolink.outcomes", "evolink.status") == {"failed": 1}
    assert not seen.sums("evolink.credits.spent")
    [duration] = seen.points("gen_ai.client.operation.duration")
    assert duration.attributes["error.type"] == failure.value.code
    seen.close()


@pytest.mark.parametrize("status", [400, 402, 500])
async def test_a_refused_or_lost_request_is_an_error_span_without_a_task(api_key: str, status: int) -> None:

    faults = [{"method": "POST", "path": "/v1/images/generations", "status": status}]
    async with Emulator(speed=100, api_key=api_key, faults=faults).serve() as server:  # noqa: SIM117
        async with AsyncEvoLink(base_url=server.base_url, on_lost_response="hold") as client:
            seen = Seen(client)
            with pytest.raises(EvoLinkError):
                await client.images.generate(model=MODEL, prompt="p")
    [span] = seen.spans
    assert span.status.status_code is StatusCode.ERROR
    assert "gen_ai.response.id" not in named(span)
    verdict, outcome = {400: ("refused", "rejected"), 402: ("account", "not_submitted"), 500: ("lost", "unknown")}[
        status
    ]
    assert seen.sums("evolink.posts", "evolink.verdict") == {verdict: 1}
    assert seen.sums("evolink.outcomes", "evolink.status") == {outcome: 1}
    seen.close()


@pytest.mark.looptime
async def test_a_429_is_an_event_of_the_span_a_post_and_a_cool_down(
    api_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otel, "clock", asyncio.get_running_loop().time)
    faults = [
        {"method": "POST", "path": "/v1/images/generations", "status": 429, "nth": 1, "headers": {"Retry-After": "1"}}
    ]
    emulator = Emulator(clock=asyncio.get_running_loop().time, api_key=api_key, faults=faults)
    async with emulator.serve() as server, AsyncEvoLink(base_url=server.base_url) as client:
        seen = Seen(client)
        await client.images.generate(model=MODEL, prompt="p")
    [span] = seen.spans
    verdicts = [(event.attributes or {})["evolink.verdict"] for event in span.events if event.name == "evolink.post"]
    assert verdicts == ["rate_limited", "accepted"]
    assert named(span)["http.request.resend_count"] == 1
    [cool_down] = seen.points("evolink.ratelimit.cooldown")
    assert (cool_down.count, cool_down.sum) == (1, pytest.approx(1, abs=0.01))
    assert seen.points("evolink.ratelimit.wait")[0].sum >= 0.95  # it begins a moment after the pause does
    seen.close()


async def test_a_later_wait_is_a_span_of_its_own_that_links_to_the_submission(
    client: AsyncEvoLink, seen: Seen, emulator: Any
) -> None:
    async with httpx.AsyncClient(base_url=emulator.base_url) as control:
        (await control.post("/_emulator/clock", json={"standing": True})).raise_for_status()
    task = await client.images.submit(model=MODEL, prompt="p")
    [submission] = seen.spans
    assert named(submission)["evolink.status"] == "submitted"
    with pytest.raises(TaskTimeoutError):
        await client.tasks.wait(task.id, timeout=0.001)
    emulator.emulator.advance(60)
    await client.tasks.wait(task.id)
    _, first, second = seen.spans
    assert named(first)["evolink.status"] == "unfinished"
    assert first.links[0].context == submission.context
    assert second.links[0].context == first.context
    assert named(second)["evolink.status"] == "completed"
    assert named(second)["evolink.credits.spent"] == 2.5
    assert seen.sums("evolink.tasks.active") == {None: 0}
    assert seen.sums("evolink.outcomes", "evolink.status") == {"unfinished": 1, "completed": 1}


async def test_a_wait_for_a_task_of_another_process_has_a_span_but_no_duration(
    client: AsyncEvoLink, emulator: Any
) -> None:
    task = await client.images.submit(model=MODEL, prompt="p")
    async with AsyncEvoLink(base_url=emulator.base_url) as other:
        seen = Seen(other)
        await other.tasks.wait(task.id)
    [span] = seen.spans
    assert span.name == f"generate_content {MODEL}"  # it was learned from the answer
    assert not span.links
    assert not seen.points("gen_ai.client.operation.duration")
    seen.close()


async def test_spans_stand_below_the_callers_span_also_those_of_a_pool(client: AsyncEvoLink, seen: Seen) -> None:
    tracer = seen.tracers.get_tracer("app")
    with tracer.start_as_current_span("request") as mine:
        await client.images.generate(model=MODEL, prompt="p")
        pool = await client.pool(images(3), max_outstanding=1).__aenter__()
    with tracer.start_as_current_span("reader"):
        _ = [outcome async for outcome in pool]
        await pool.run(ImageRequest(model=MODEL, prompt="p"))
    await pool.__aexit__(None, None, None)
    ours = [span for span in seen.spans if span.name.startswith("generate_content")]
    assert len(ours) == 5
    assert {span.parent and span.parent.span_id for span in ours} == {mine.get_span_context().span_id}


async def test_leaving_a_pool_ends_the_spans_of_what_still_runs(client: AsyncEvoLink, seen: Seen) -> None:
    async with client.pool(images(8)) as pool:
        async for _ in pool:
            break
    assert seen.sums("evolink.tasks.active") == {None: 0}
    ids = {named(span)["gen_ai.response.id"] for span in seen.spans if "gen_ai.response.id" in named(span)}
    assert {o.task.id for o in pool.leftovers if o.task is not None} <= ids
    telemetry = client._core.observation.observer
    assert isinstance(telemetry, otel.Telemetry)
    assert not telemetry._tasks
    assert not telemetry._submissions


async def test_neither_key_nor_prompt_nor_file_links_leave_the_process(
    api_key: str, client: AsyncEvoLink, seen: Seen, tmp_path: Path
) -> None:
    secret = f"prompt-canary-{secrets.token_hex(8)}"
    requests = [ImageRequest(model=MODEL, prompt=secret, key="k1", metadata={"who": secret})]
    async with client.pool(requests, save_to=tmp_path / "out") as pool:
        [outcome] = [outcome async for outcome in pool]
    with pytest.raises(InvalidRequestError):
        await client.images.generate(model=MODEL, prompt=secret, size=secret)
    text = seen.text()
    assert outcome.unwrap().id in text
    for leak in (secret, api_key, outcome.urls[0]):
        assert leak not in text


async def test_prompts_are_captured_where_asked_for_and_cut(client: AsyncEvoLink) -> None:
    seen = Seen(client, capture_prompts=True)
    await client.images.generate(model=MODEL, prompt="x" * 1500)
    assert named(seen.spans[0])["evolink.prompt"] == "x" * 1000
    seen.close()


async def test_made_up_models_do_not_flood_the_metrics(client: AsyncEvoLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otel, "_MOST_NAMES", 2)
    seen = Seen(client)
    for number in range(4):
        with pytest.raises(Exception, match="model"):
            await client.images.generate(model=f"made-up-{number}" + "y" * 200, prompt="p")
    models = set(seen.sums("evolink.posts", "gen_ai.request.model"))
    assert models == {("made-up-0" + "y" * 200)[:128], ("made-up-1" + "y" * 200)[:128], "_OTHER"}
    assert all(len(span.name) <= 128 + len("generate_content ") for span in seen.spans)
    seen.close()


async def test_a_span_processor_that_fails_costs_no_task(
    client: AsyncEvoLink, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            raise RuntimeError("broken exporter")

    tracers = TracerProvider(shutdown_on_exit=False)
    tracers.add_span_processor(Broken())
    instrument(client, tracer_provider=tracers, meter_provider=MeterProvider(shutdown_on_exit=False))
    async with client.pool(images(3)) as pool:
        assert [outcome.ok async for outcome in pool] == [True] * 3
    assert [getattr(record, "event", "") for record in caplog.records].count("telemetry_failed") == 1


async def test_a_client_is_instrumented_once_until_it_is_uninstrumented(client: AsyncEvoLink, seen: Seen) -> None:
    with pytest.raises(ConfigurationError, match="already"):
        instrument(client)
    uninstrument(client)
    uninstrument(client)
    await client.images.generate(model=MODEL, prompt="p")
    assert not seen.spans
    instrument(client)  # the global providers, which do nothing here
    await client.images.generate(model=MODEL, prompt="p")
    assert trace.get_current_span().get_span_context().is_valid is False


async def test_our_names_are_those_of_the_conventions() -> None:
    from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
    from opentelemetry.semconv._incubating.metrics import gen_ai_metrics

    source = Path(otel.__file__).read_text(encoding="utf-8")
    ours = {word for word in source.replace('"', "\n").splitlines() if word.startswith("gen_ai.")}
    theirs = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    theirs |= {value for name, value in vars(gen_ai_metrics).items() if name.isupper()}
    assert ours
    assert ours - {word for word in ours if " " in word} <= theirs


async def test_without_instrument_nothing_of_opentelemetry_is_loaded(emulator: Any) -> None:
    program = """
import asyncio, sys
from evolink_async import AsyncEvoLink
from evolink_async.telemetry import Thresholds, forecast, instrument

async def main():
    async with AsyncEvoLink() as client:
        await client.images.generate(model="gpt-4o-image", prompt="p")

asyncio.run(main())
print([name for name in sys.modules if name.startswith(("opentelemetry", "tqdm", "IPython"))])
"""
    done = await run_program([sys.executable, "-c", program], emulator)
    assert done.stdout == "[]\n", done.stderr
