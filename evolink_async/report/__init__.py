"""The page that shows a finished job: a gallery with filters, and what it took, as one self-contained HTML file.

>>> from evolink_async.report import write_report
>>> path = await write_report("out/")

Needs the extra `report`; without it only `write_report` fails, and says so.
"""

from evolink_async.report.writing import write_report

__all__ = ["write_report"]
