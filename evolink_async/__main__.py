"""`python -m evolink_async` is the `evolink-async` command."""

from evolink_async.cli import main

main()
