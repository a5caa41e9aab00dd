"""A local EvoLink, for tests, demonstrations and benchmarks without a key and without costs.

>>> from evolink_async.emulator import Emulator
>>> async with Emulator(speed=50, seed=1).serve() as server:
...     client = AsyncEvoLink(server.api_key, base_url=server.base_url)

It imports nothing of the client: an emulator built from the client's own parser would prove nothing.
"""

from .behaviour import Behaviour, Dialect
from .emulator import Emulator, Server
from .faults import Fault, read_faults
from .http import ConnectionDropped

__all__ = ["Behaviour", "ConnectionDropped", "Dialect", "Emulator", "Fault", "Server", "read_faults"]
