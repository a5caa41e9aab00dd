"""The emulator's OpenAPI document, built from the same table of models that its checks read. Pure.

``GET /openapi.json`` serves it. Descriptions say where each fact is from: documented by EvoLink, read off the vendor's
client, or our guess.
"""

from __future__ import annotations

from evolink_async._version import __version__
from evolink_async.emulator.answers import CURRENT, Json
from evolink_async.emulator.behaviour import Dialect
from evolink_async.emulator.models import KINDS

from .bodies import body_schemas, callback_url
from .inputs import BODIES, PARAMETERS
from .paths import paths
from .responses import HEADERS, refusal_components
from .shapes import answer_schemas

_ABOUT = """\
A local EvoLink: what it accepts, refuses and answers, as far as it is known.

- Facts are marked *documented*, *vendor's client* (read off the vendor's own code) or *our guess*.
- A path that exists answers other methods with 405 and an Allow header.
- Faults (`/_emulator/faults`) may answer anything. They are not described here, nor are the emulator's own pages.
- One server stands for all of EvoLink's hosts: the API, the files API and the media host.
- What is described is this emulator as it was started: its dialect, with or without batches, lists and callbacks.
"""


def document(
    dialect: Dialect = CURRENT, *, batch: bool = True, listing: bool = True, private_callbacks: bool = False
) -> Json:
    """The OpenAPI 3.1 document of an emulator with these options."""
    bodies = {name: schema for kind in KINDS for name, schema in body_schemas(kind, dialect).items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "EvoLink, emulated", "version": __version__, "description": _ABOUT},
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}],
        "tags": [{"name": name} for name in ("Generations", "Tasks", "Account", "Files", "Results")],
        "paths": paths(dialect, batch=batch, listing=listing, private_callbacks=private_callbacks),
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "The emulator knows one key."}
            },
            "parameters": PARAMETERS,
            "headers": HEADERS,
            "responses": refusal_components(dialect),
            "schemas": {
                **answer_schemas(dialect),
                **BODIES,
                "CallbackUrl": callback_url(private=private_callbacks),
                **bodies,
            },
        },
    }
