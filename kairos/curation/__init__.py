"""From folders of raw video to training shards: what is informative, physical and rich in time is kept.

Steps, each of which a second call picks up where the first was stopped:

    run      sources -> shots -> clips -> scores, every result into a ledger
    select   thresholds, near duplicates and balance over the scores -> manifest and shards
    report   one page of HTML about all of it

`curate` runs the first two.
"""

from kairos.curation.pipeline import Summary, curate, select, why
from kairos.curation.report import write_report
from kairos.curation.settings import Settings

__all__ = ["Settings", "Summary", "curate", "select", "why", "write_report"]
