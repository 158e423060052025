"""From folders of raw video to training shards: what is informative, physical and rich in time is kept.

Three steps, each of which a second call picks up where the first was stopped:

    run      sources -> shots -> clips -> scores, every result into a ledger
    select   thresholds, near duplicates and balance over the scores -> manifest and shards

`curate` runs all three.
"""

from kairos.curation.pipeline import Summary, curate, select, why
from kairos.curation.settings import Settings

__all__ = ["Settings", "Summary", "curate", "select", "why"]
