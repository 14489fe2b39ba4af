"""Features that the programs add to the core, one per file. No file of the core imports them."""

import sys

if sys.argv[:1] == ["-m"]:  # python -m kontext_min.extras.export and the like
    import kontext_min.extras.ready  # noqa: F401
