"""A web backend that is called back: submit, watch the progress as server-sent events, know the end at once.

pip install fastapi uvicorn
EVOLINK_API_KEY=... PUBLIC_URL=https://example.org/evolink CALLBACK_SECRET=... uvicorn examples.callback_backend:app

curl -X POST localhost:8000/pictures -H 'content-type: application/json' -d '{"prompt": "a lighthouse"}'
curl -N localhost:8000/pictures/task-unified-.../events

PUBLIC_URL is where the service reaches this program's /evolink; it has to be https and public. CALLBACK_SECRET is any
long random text that stays the same over restarts. If callbacks are lost, polling finds every end all the same.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from evolink_async import AsyncEvoLink, EvoLinkError, ImageRequest, InvalidRequestError, Task, TaskError
from evolink_async.callbacks import CallbackReceiver

client = AsyncEvoLink(rate_limit="5/s")  # nothing is opened before the first call


def keep(task: Task) -> None:
    """Called once for each task that has ended, as the service tells it: the place for your database."""
    print(f"{task.id} {task.status} {len(task.urls)} links", flush=True)


receiver = CallbackReceiver(
    client, public_url=os.environ["PUBLIC_URL"], secret=os.environ["CALLBACK_SECRET"], on_task=keep
)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client for the life of the process: one rate limit, one set of connections, one watcher."""
    async with client:
        yield


app = FastAPI(lifespan=lifespan)
app.mount("/evolink", receiver.asgi)


class Picture(BaseModel):
    """What the browser sends."""

    prompt: str
    size: str = "1024x1024"


@app.post("/pictures", status_code=202)
async def submit(picture: Picture) -> dict[str, object]:
    """Start a generation that calls back when it has ended."""
    request = ImageRequest(model="gpt-4o-image", prompt=picture.prompt, size=picture.size)
    request = request.model_copy(update={"callback_url": receiver.url_for(request)})
    try:
        task = await client.submit(request, timeout=20)
    except InvalidRequestError as error:
        raise HTTPException(422, detail=str(error)) from error
    except EvoLinkError as error:
        raise HTTPException(502, detail=str(error)) from error
    return {"id": task.id, "estimated_time": task.estimated_time, "events": f"/pictures/{task.id}/events"}


@app.get("/pictures/{task_id}/events")
async def events(task_id: str) -> StreamingResponse:
    """Server-sent events: `progress` at every look that finds the task running, then `done` or `error`."""
    return StreamingResponse(
        progress_of(task_id), media_type="text/event-stream", headers={"cache-control": "no-store"}
    )


async def progress_of(task_id: str) -> AsyncIterator[str]:
    """The events of one browser. Any number of them share the looks at one task."""
    seen: asyncio.Queue[Task | None] = asyncio.Queue()
    waiting = asyncio.ensure_future(client.tasks.wait(task_id, timeout=3600, on_progress=seen.put_nowait))
    waiting.add_done_callback(lambda _: seen.put_nowait(None))
    try:
        while (task := await seen.get()) is not None:
            yield event("progress", {"status": task.status, "progress": task.progress})
        try:
            task = await waiting
        except TaskError as error:
            yield event("error", {"code": error.code, "message": error.message})
        except EvoLinkError as error:
            yield event("error", {"message": str(error)})
        else:
            yield event("done", {"status": task.status, "urls": task.urls})
    finally:
        waiting.cancel()  # the browser has gone: that stops the waiting, not the task


def event(name: str, data: dict[str, object]) -> str:
    """One event as it is written on the wire."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
