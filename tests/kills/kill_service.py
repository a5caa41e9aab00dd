"""An emulator in a process of its own, which survives whatever happens to its clients.

python kill_service.py OPTIONS      (JSON: the options of `Emulator`); prints its address, runs until SIGTERM
"""

from __future__ import annotations

import json
import sys

from evolink_async.emulator import Emulator

if __name__ == "__main__":
    Emulator(**json.loads(sys.argv[1])).run(port=0, on_start=lambda server: print(server.base_url, flush=True))
