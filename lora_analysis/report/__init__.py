"""The HTML report: every table of some adapters as pages that open from disk, without server or network.

Conventions
-----------
Pages are made by jinja2 with autoescape and hold what is read first; the rest is data in scripts under ``data/`` that
pages load when it is asked for, because a page opened from disk may run a script beside it but not read a file. Every
number comes from ``lora_analysis.tables``; where q is above 0.05 the report says *consistent with chance*.

Names out of files are text: control and direction characters are shown as escapes, pages and data have numbers for
names, and scripts set text, never markup.

Values
------
``write_report``.
"""

from lora_analysis.report.build import write_report

__all__ = ["write_report"]
