"""A web backend: submit in one request, wait for the result in another.

pip install fastapi uvicorn
EVOLINK_API_KEY=... uvicorn examples.web_backend:app

curl -X POST localhost:8000/pictures -H 'content-type: application/json' -d '{"prompt": "a lighthouse"}'
curl localhost:8000/pictures/task-unified-...          # waits up to 25 s, then says how far it is
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Header, HTTPException, Request, Response
from pydantic import BaseModel

from evolink_async import (
    AsyncEvoLink,
    EvoLinkError,
    InvalidRequestError,
    NotFoundError,
    QuotaExhaustedError,
    RateLimitError,
    SubmitOutcomeUnknownError,
    Task,
    TaskError,
    TaskLostError,
    TaskTimeoutError,
)

PATIENCE = 25  # seconds that one look may last


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """One client for the life of the process: one rate limit, one set of connections, one watcher."""
    async with AsyncEvoLink(rate_limit="5/s") as app.state.evolink:
        yield


app = FastAPI(lifespan=lifespan)


class Picture(BaseModel):
    """What the browser sends."""

    prompt: str
    size: str = "1024x1024"


@app.post("/pictures", status_code=202)
async def submit(
    picture: Picture, request: Request, idempotency_key: Annotated[str | None, Header()] = None
) -> dict[str, object]:
    """Start a generation. A browser that repeats the call with its own Idempotency-Key pays once."""
    client: AsyncEvoLink = request.app.state.evolink
    try:
        task = await client.images.submit(
            model="gpt-4o-image",
            prompt=picture.prompt,
            size=picture.size,
            timeout=20,
            idempotency_key=idempotency_key,
        )
    except InvalidRequestError as error:
        raise HTTPException(422, detail=str(error)) from error
    except RateLimitError as error:
        raise HTTPException(429, "busy, try again", {"Retry-After": str(int(error.retry_after or 30))}) from error
    except QuotaExhaustedError as error:
        raise HTTPException(503, detail="out of credits") from error
    except SubmitOutcomeUnknownError as error:
        if error.code == "idempotency_conflict":  # the key belongs to another picture: no repetition will find this one
            raise HTTPException(409, detail="this Idempotency-Key was used for another picture") from error
        # It may be running: the same key finds it, a new one could pay twice.
        raise HTTPException(504, detail={"unknown": True, "idempotency_key": error.idempotency_key}) from error
    except EvoLinkError as error:
        raise HTTPException(502, detail=str(error)) from error
    return {"id": task.id, "estimated_time": task.estimated_time}


@app.get("/pictures/{task_id}")
async def result(task_id: str, request: Request, response: Response) -> dict[str, object]:
    """Wait up to 25 s. 200: done; 202: still running, ask again; 404: unknown; 502: it failed."""
    client: AsyncEvoLink = request.app.state.evolink
    try:
        task = await ended_or_seen(client, task_id)
    except (NotFoundError, TaskLostError, InvalidRequestError) as error:
        raise HTTPException(404, detail=str(error)) from error
    except TaskError as error:
        raise HTTPException(502, detail={"code": error.code, "message": error.message}) from error
    except EvoLinkError as error:
        raise HTTPException(503, detail=str(error)) from error
    if not task.succeeded:
        response.status_code = 202
        return {"id": task.id, "status": task.status, "progress": task.progress}
    return {"id": task.id, "status": task.status, "urls": list(task.urls), "expires_at": task.expires_at}


async def ended_or_seen(client: AsyncEvoLink, task_id: str) -> Task:
    """The completed task, or what it is doing after 25 s. Raises `NotFoundError` for an id that is nobody's."""
    try:
        return await client.tasks.wait(task_id, timeout=PATIENCE)
    except TaskTimeoutError:  # not a failure: the task goes on and is paid for, if there is one
        return await client.tasks.get(task_id)
