"""Benchmarks that pair flcore with what its users run today, call by call, in one run.

`flcore bench` is the front.  In Python::

    from flcore.bench import Setup, markdown, run, select

    report = run(select("aggregation"), Setup(threads=2))
    print(markdown(report))
"""

from flcore.bench.cases import FAMILIES, Case, Setup, Workload, all_cases, select
from flcore.bench.report import markdown, terminal_table, write_json, write_markdown
from flcore.bench.results import Report
from flcore.bench.runner import run
from flcore.bench.timers import Plan, run_paired

__all__ = [
    "FAMILIES",
    "Case",
    "Plan",
    "Report",
    "Setup",
    "Workload",
    "all_cases",
    "markdown",
    "run",
    "run_paired",
    "select",
    "terminal_table",
    "write_json",
    "write_markdown",
]
