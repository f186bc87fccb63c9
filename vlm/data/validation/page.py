"""A validation as one HTML page: verdict, statistics, and every fault with a box to filter them.

The page needs nothing but itself (`vlm.page`). Not here: what a terminal shows (the tool).
"""

from pathlib import Path

from vlm import page
from vlm.data.validation.report import CHECKS, Report

#: faults that a page shows; a browser grows slow on more
MAX_SHOWN = 2000


def write_page(path: Path, report: Report) -> None:
    total = report.total
    facts = {
        "shards": f"{report.num_shards:,}",
        "samples": f"{report.num_samples:,}",
        "decoded in full": f"{report.num_decoded:,}",
        "frames": f"{total.num_frames:,}",
        "MB": f"{report.num_bytes / 1e6:,.1f}",
    }
    facts |= {f"{check}, allowed": f"{n:,}" for check, n in sorted(report.num_allowed.items())}
    if total.supervised_frac is not None:
        facts |= {
            "text tokens": f"{total.num_tokens:,}",
            "of them learned": f"{total.supervised_frac:.1%}",
        }
    html = (
        page.environment("vlm.data")
        .get_template("validation.html.j2")
        .render(
            report=report,
            total=total.as_json(),
            checks=CHECKS,
            facts=facts,
            shown=report.faults[:MAX_SHOWN],
        )
    )
    path.write_text(html, encoding="utf-8", newline="\n")
