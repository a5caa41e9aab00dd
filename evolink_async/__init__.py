"""evolink_async: run many EvoLink generations from asyncio."""
