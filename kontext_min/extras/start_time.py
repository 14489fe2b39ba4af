"""Find the start time of `--start-time auto`: the mean over a few pictures of Flux's time that fits their damage.

The closed form is `flow.start_time`; it says where it comes from.
"""

from typing import Any

from kontext_min import data, flow
from kontext_min.extras import parallel

COUNT = 8  # pictures


def find_start_time(settings: Any, pairs: Any, encode: Any, written: dict[str, Any]) -> float:
    """The number given; for `auto`, the mean over a few pictures, which are the same after a resume.

    What is found goes into `written`, the settings to write, so that a change by --accept-changes is listed.
    """
    if settings.start_time != "auto":
        return float(settings.start_time)
    few = [data.collate([pairs[0, i]]) for i in range(min(COUNT, len(pairs)))]
    times = [flow.start_time(encode(x["control"]), encode(x["target"]), settings.source_noise) for x in few]
    found = f"{sum(times) / len(times):.3g}"  # rounded, so that another machine finds the same one after a resume
    if parallel.place()[0] == 0:
        print(f"--start-time auto: {found}")
    written["start_time_found"] = float(found)
    return float(found)
