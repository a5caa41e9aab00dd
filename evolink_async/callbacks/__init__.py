"""Callbacks of the service: a hint that a task may have ended, never believed.

receiver = CallbackReceiver(client, public_url="https://example.org/evolink", secret=os.environ["CALLBACK_SECRET"])
app.mount("/evolink", receiver.asgi)                      # FastAPI, Starlette, or any ASGI server
async with client.pool(requests, callbacks=receiver) as pool: ...
"""

from __future__ import annotations

from evolink_async.callbacks.receiver import CallbackReceiver

__all__ = ["CallbackReceiver"]
