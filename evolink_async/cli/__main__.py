"""`python -m evolink_async.cli`."""

from evolink_async.cli import main

main()
