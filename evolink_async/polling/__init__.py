"""When to look at a task next, and the one watcher that looks."""
